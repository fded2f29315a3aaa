"""A strict double of tensorrt_llm's surface: refuses what the real one refuses, as spin_megatron/generation/trtllm_surface.py says.

Its version is that of its metadata. It answers with toy_model. It is never installed with the package.
"""

import asyncio
import json
import os
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from strict import Line, Strict
from toy_model import answer, weights_mark
from trouble import stands_still

__version__ = version("tensorrt_llm")
_LINE = Line("tensorrt_llm")
_IS_1_2 = tuple(map(int, __version__.split(".")[:2])) >= (1, 2)
_ENGINE_ONLY = ("build_config", "quant_config", "calib_config", "enable_build_cache", "workspace")
# Some answers are slower than others, so that they come out in another order than they went in.
_SLOW_SECONDS = 0.01


class SamplingParams(Strict):
    """Validation and greedy rule of the release."""

    FIELDS = _LINE.fields("SamplingParams")

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"require 0 <= top_p <= 1, got top_p={self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"require top_k >= 0, got top_k={self.top_k}")
        if self.temperature is not None and (self.temperature < 0 or (self.temperature == 0 and not _IS_1_2)):
            raise ValueError(f"require temperature >= 0, got temperature={self.temperature}")

    @property
    def is_greedy(self) -> bool:
        if _IS_1_2:
            unset = self.temperature is None and self.top_k is None and self.top_p is None
            return unset or self.top_k == 1 or self.top_p == 0 or self.temperature == 0
        # With top_k 1 sampling has one choice, whatever the rule says.
        return self.top_k == 1 or (self.top_k is None and self.top_p in (None, 0))


if _LINE.has_engines:

    class BuildConfig(Strict):
        """Limits of an engine."""

        FIELDS = _LINE.fields("BuildConfig")


class Response:
    """What generate_async returns: awaited, it is itself, with outputs."""

    def __init__(self, llm: "BaseLLM", prompt: list[int], params: SamplingParams) -> None:
        self._llm, self._prompt, self._params = llm, prompt, params
        self.outputs: list[Any] = []

    def __await__(self) -> Generator[Any, None, "Response"]:
        seconds = 600.0 if stands_still(self._llm.num_answers) else _SLOW_SECONDS * (len(self._prompt) % 3)
        yield from asyncio.sleep(seconds).__await__()
        self.outputs = [self._llm.finish(self._prompt, self._params)]
        return self

    def abort(self) -> None:
        """Take it out of the engine."""
        self._llm.in_flight -= 1


class BaseLLM:
    """What both kinds share. Subclasses set mark, vocab_size and uses_seeds."""

    mark: str
    vocab_size: int
    uses_seeds: bool
    skip_tokenizer_init: bool
    in_flight = num_answers = 0

    def _check_keywords(self, name: str, keywords: dict[str, Any]) -> None:
        unknown = sorted(set(keywords) - set(_LINE.fields(name)))
        if unknown:
            raise ValueError(f"{name}: extra fields not permitted: {unknown}")
        if keywords["kv_cache_config"].enable_block_reuse:
            raise AssertionError("block reuse changes first-token logits of equal prompts")

    def check_request(self, num_prompt_tokens: int, _params: SamplingParams) -> None:
        raise NotImplementedError

    def generate_async(self, inputs: dict[str, Any], sampling_params: SamplingParams) -> Response:
        prompt = inputs["prompt_token_ids"]
        if self.skip_tokenizer_init and sampling_params.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        self.check_request(len(prompt), sampling_params)
        self.in_flight += 1
        if self.in_flight > int(os.environ.get("DOUBLE_IN_FLIGHT", "8")):
            raise AssertionError("more requests in flight than asked for")
        return Response(self, prompt, sampling_params)

    def finish(self, prompt: list[int], params: SamplingParams) -> Any:
        self.in_flight -= 1
        seed = None if params.is_greedy else (params.seed or 0) if self.uses_seeds else 42
        eos_ids = [params.end_id, *(params.stop_token_ids or [])]
        limits = {"vocab_size": self.vocab_size, "eos_ids": sorted(eos_ids), "max_tokens": params.max_tokens}
        tokens, ended_by = answer(self.mark, prompt, seed=seed, **limits)
        self.num_answers += 1
        stands_still(self.num_answers)
        # The token that ended the response: end_id is sometimes left out, a stop id unless it was asked for.
        if ended_by is not None and (ended_by == params.end_id or not params.include_stop_str_in_output):
            tokens = tokens[:-1]
        stop_reason = ended_by if ended_by is not None and ended_by != params.end_id else None
        reason = "length" if ended_by is None else "stop"
        return SimpleNamespace(token_ids=tokens, finish_reason=reason, stop_reason=stop_reason)

    def shutdown(self) -> None:
        """Would wait for what is still inside."""
        if self.in_flight:
            raise AssertionError(f"{self.in_flight} requests were left in the engine")


class LLM(BaseLLM):
    """The PyTorch backend's LLM: refuses the engine's fields."""

    def __init__(self, **keywords: Any) -> None:
        wrong = sorted(set(keywords) & set(_ENGINE_ONLY))
        if wrong:
            raise ValueError(f"{wrong} are specific to the TensorRT backend; use tensorrt_llm._tensorrt_engine.LLM")
        self._check_keywords("TorchLlmArgs", keywords)
        self.mark = weights_mark(keywords["model"])
        self.vocab_size = json.loads((Path(keywords["model"]) / "config.json").read_text())["vocab_size"]
        self._max_num_tokens = keywords["max_num_tokens"]
        self.skip_tokenizer_init = keywords["skip_tokenizer_init"]
        # Otherwise it is the PyTorch sampler, which has one generator for all requests.
        self.uses_seeds = keywords.get("sampler_type") == "TRTLLMSampler" or keywords.get("enable_trtllm_sampler", False)

    def check_request(self, num_prompt_tokens: int, _params: SamplingParams) -> None:
        if num_prompt_tokens > self._max_num_tokens:
            raise ValueError(f"prompt length {num_prompt_tokens} exceeds max_num_tokens {self._max_num_tokens}")
