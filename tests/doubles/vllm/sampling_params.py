"""vLLM's sampling parameters."""

import enum


class RequestOutputKind(enum.Enum):
    """When outputs are given."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class SamplingParams:
    """top_k is off at -1 (0 is refused, as releases before 0.9 do); temperature 0 is greedy, other low ones become 0.01."""

    def __init__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        max_tokens: int,
        stop_token_ids: "list[int]",
        ignore_eos: bool,
        detokenize: bool,
        output_kind: RequestOutputKind,
    ) -> None:
        if top_k == 0 or top_k < -1:
            raise ValueError(f"top_k must be -1 (disable), or at least 1, got {top_k}")
        if not 0 < top_p <= 1 or not 0 <= temperature <= 2:
            raise ValueError("top_p must be in (0, 1], temperature in [0, 2]")
        if detokenize:
            raise ValueError("detokenize needs the tokenizer")
        if output_kind is not RequestOutputKind.FINAL_ONLY:
            raise AssertionError("an output a step is wasted")
        self.temperature = max(temperature, 0.01) if temperature else 0.0
        self.is_greedy = temperature == 0 or top_k == 1
        self.seed, self.max_tokens, self.stop_token_ids, self.ignore_eos = seed, max_tokens, stop_token_ids, ignore_eos
