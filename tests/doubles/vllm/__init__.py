"""A strict double of the little of vLLM that the worker uses; it answers with toy_model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from toy_model import answer, weights_mark

_ENGINE_ARGUMENTS = {
    "model",
    "dtype",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_model_len",
    "max_num_seqs",
    "gpu_memory_utilization",
    "enable_prefix_caching",
    "skip_tokenizer_init",
    "trust_remote_code",
    "seed",
}


class SamplingParams:
    """top_k is off at -1 (0 is refused, as releases before 0.9 do); temperature 0 is greedy."""

    def __init__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        max_tokens: int,
        stop_token_ids: list[int],
        ignore_eos: bool,
        detokenize: bool,
    ) -> None:
        if top_k == 0 or top_k < -1:
            raise ValueError(f"top_k must be -1 (disable), or at least 1, got {top_k}")
        if not 0 < top_p <= 1 or temperature < 0:
            raise ValueError("top_p must be in (0, 1], temperature non-negative")
        if detokenize:
            raise ValueError("detokenize needs the tokenizer")
        self.is_greedy = temperature == 0 or top_k == 1
        self.seed, self.max_tokens, self.stop_token_ids, self.ignore_eos = seed, max_tokens, stop_token_ids, ignore_eos


class LLM:
    """Loads a Hugging Face folder."""

    def __init__(self, **keywords: Any) -> None:
        unknown = sorted(set(keywords) - _ENGINE_ARGUMENTS)
        if unknown:
            raise TypeError(f"unexpected keyword arguments {unknown}")
        if keywords["enable_prefix_caching"] or keywords["trust_remote_code"]:
            raise AssertionError("prefix caching and remote code stay off")
        self._mark = weights_mark(keywords["model"])
        self._vocab_size = json.loads((Path(keywords["model"]) / "config.json").read_text())["vocab_size"]
        self._max_model_len = keywords["max_model_len"]

    def generate(self, prompts: list[dict[str, Any]], sampling_params: list[SamplingParams], *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        return [self._answer(prompt["prompt_token_ids"], params) for prompt, params in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt: list[int], params: SamplingParams) -> Any:
        if len(prompt) + params.max_tokens > self._max_model_len:
            raise ValueError("longer than max_model_len")
        seed = None if params.is_greedy else params.seed
        limits = {"vocab_size": self._vocab_size, "eos_ids": sorted(params.stop_token_ids), "max_tokens": params.max_tokens}
        tokens, ended_by = answer(self._mark, prompt, seed=seed, **limits)
        # A stop token stays in the output here.
        output = SimpleNamespace(token_ids=tokens, finish_reason="length" if ended_by is None else "stop", stop_reason=ended_by)
        return SimpleNamespace(outputs=[output])
