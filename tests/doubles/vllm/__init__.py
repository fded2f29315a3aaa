"""A strict double of the little of vLLM that the worker uses; it answers with toy_model."""

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from toy_model import answer, weights_mark
from trouble import stands_still

from vllm.sampling_params import SamplingParams

__all__ = ["EngineArgs", "LLMEngine", "SamplingParams"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """The fields the worker sets; others are refused."""

    model: str
    dtype: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    enforce_eager: bool
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: "int | None" = None
    enable_prefix_caching: bool
    skip_tokenizer_init: bool
    trust_remote_code: bool
    seed: int


class LLMEngine:
    """Loads a Hugging Face folder; a step gives one token to each running request, the oldest max_num_seqs."""

    def __init__(self, arguments: EngineArgs) -> None:
        if arguments.enable_prefix_caching or arguments.trust_remote_code:
            raise AssertionError("prefix caching and remote code stay off")
        self._arguments = arguments
        self._mark = weights_mark(arguments.model)
        self._vocab_size = json.loads((Path(arguments.model) / "config.json").read_text())["vocab_size"]
        self._running: dict[str, list[Any]] = {}
        self._num_finished = 0

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        return cls(engine_args)

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        if request_id in self._running:
            raise ValueError(f"request {request_id} is there already")
        if len(prompt["prompt_token_ids"]) + params.max_tokens > self._arguments.max_model_len:
            raise ValueError("longer than max_model_len")
        seed = None if params.is_greedy else params.seed
        limits = {"vocab_size": self._vocab_size, "eos_ids": sorted(params.stop_token_ids), "max_tokens": params.max_tokens}
        tokens, ended_by = answer(self._mark, prompt["prompt_token_ids"], seed=seed, **limits)
        self._running[request_id] = [len(tokens), tokens, ended_by]

    def step(self) -> list[Any]:
        if stands_still(self._num_finished):
            time.sleep(0.05)
            return []
        for request in list(self._running.values())[: self._arguments.max_num_seqs]:
            request[0] -= 1
        finished = [request_id for request_id, request in self._running.items() if not request[0]]
        self._num_finished += len(finished)
        stands_still(self._num_finished)
        return [self._output(request_id) for request_id in finished]

    def _output(self, request_id: str) -> Any:
        _, tokens, ended_by = self._running.pop(request_id)
        # A stop token stays in the output here.
        output = SimpleNamespace(token_ids=tokens, finish_reason="length" if ended_by is None else "stop", stop_reason=ended_by)
        return SimpleNamespace(request_id=request_id, finished=True, outputs=[output])
