"""Engine "onnxruntime-genai": theta_t exported to ONNX each iteration and run by ONNX Runtime on CPU, in fp32.

It is the small sibling of a compiled GPU engine: a true build step, so that rebuilding, the cache and the refusal of stale
engines are exercised for real wherever there is a CPU. Tokens are drawn here, from the engine's logits, with the row's own
seed; rows are computed one at a time, so they do not depend on each other.
"""

import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spin_megatron.generation.built import CACHE_OPTION, build_once, engine_identity, require_identity
from spin_megatron.generation.engine import Engine, EngineSpec, Prompt, Provider, Sampling, check_options, check_prompts, never
from spin_megatron.generation.sampling import draw_tokens, row_uniforms
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.records import FinishReason, GeneratedRow

logger = logging.getLogger(__name__)

NAME = "onnxruntime-genai"
_PACKAGES = ("onnxruntime-genai", "onnxruntime", "onnx-ir")
_BUILD_TIMEOUT_SECONDS = 3600
_TOLD_LINES = 15
_HEAD_MULTIPLE = 16  # GroupQueryAttention of onnxruntime 1.32 on CPU


def build(spec: EngineSpec, folder: Path) -> dict[str, Any]:
    """Export theta_t to ONNX, or take the export of equal weights from the cache.

    Raises:
        ValueError: onnxruntime-genai is not installed, the dtype is not float32, an option is unknown, or the export failed.
    """
    identity = _identity(spec)
    started = time.monotonic()
    from_cache = build_once(spec, folder, identity, lambda place: _export(spec.model, place))
    return {"needs_build": True, "from_cache": from_cache, "build_seconds": time.monotonic() - started, **identity}


def _identity(spec: EngineSpec) -> dict[str, Any]:
    runtime = {package: _version(package) for package in _PACKAGES}
    shape = ModelShape.from_huggingface(spec.model)
    if shape.head_dim % _HEAD_MULTIPLE:
        raise ValueError(
            f"{spec.model} has head size {shape.head_dim}; ONNX Runtime's attention takes multiples of {_HEAD_MULTIPLE}; "
            "use another engine, e.g. builtin."
        )
    check_options(spec.options, NAME, known=(CACHE_OPTION,))
    if spec.dtype != "float32":
        raise ValueError(f'generate.dtype={spec.dtype}: engine {NAME!r} computes in fp32 on CPU; set generate.dtype = "float32".')
    return engine_identity(spec, engine=NAME, runtime=runtime | {"processor": platform.machine()}, run_options=frozenset())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise ValueError(f"engine {NAME!r} needs {package}; pip install 'spin-megatron[onnx]', or use another engine.") from None


def _export(model: Path, folder: Path) -> None:
    """Run the exporter in a process of its own: it keeps the weights several times in memory.

    Its command line is its stable interface; the function behind it changed its arguments between releases.
    """
    options = ["-i", str(model), "-o", str(folder), "-p", "fp32", "-e", "cpu", "-c", str(folder / "scratch")]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *options, "--extra_options", "hf_token=false"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_SECONDS, check=False)
    if result.returncode != 0 or not (folder / "genai_config.json").exists():
        tail = "\n".join(result.stderr.splitlines()[-_TOLD_LINES:])
        raise ValueError(f"exporting {model} to ONNX failed (exit code {result.returncode}):\n{tail}")


def load(spec: EngineSpec, folder: Path, _work: Path) -> Engine:
    """Open the export, after checking that it is of these weights and versions."""
    require_identity(folder, _identity(spec))
    return OnnxEngine(spec, folder)


class OnnxEngine:
    """Answers prompts one at a time from an ONNX Runtime model."""

    def __init__(self, spec: EngineSpec, folder: Path) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(folder))
        threads = {"intra_op_num_threads": torch.get_num_threads()}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._genai = genai
        self._model = genai.Model(config)
        self._spec = spec
        self._shape = ModelShape.from_huggingface(spec.model)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Callable[[], bool] = never) -> Iterator[GeneratedRow]:
        """See Engine.generate; rows come in the order of the prompts."""
        check_prompts(prompts, spec=self._spec, sampling=sampling, shape=self._shape)
        return (self._answer(prompt, sampling) for prompt in takewhile(lambda _prompt: not stop(), prompts))

    def _answer(self, prompt: Prompt, sampling: Sampling) -> GeneratedRow:
        parameters = self._genai.GeneratorParams(self._model)
        # The search itself is never run: tokens are drawn here and appended.
        parameters.set_search_options(do_sample=False, batch_size=1, max_length=len(prompt.token_ids) + sampling.max_new_tokens)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompt.token_ids, dtype=np.int32))
        tokens: list[int] = []
        for uniform in row_uniforms(prompt.seed, sampling.max_new_tokens):
            if tokens:
                generator.append_tokens(np.array(tokens[-1:], dtype=np.int32))
            logits_1V = torch.from_numpy(generator.get_logits()[0, -1:])
            tokens.append(int(draw_tokens(logits_1V, torch.tensor([uniform]), sampling)))
            if tokens[-1] in sampling.eos_ids:
                break
        reason: FinishReason = "stop" if tokens[-1] in sampling.eos_ids else "length"
        return GeneratedRow(prompt.example_id, tuple(tokens), reason, prompt.seed)

    def describe(self) -> dict[str, Any]:
        """See Engine.describe."""
        versions = {package: _version(package) for package in _PACKAGES}
        facts = {"engine": NAME, "dtype": self._spec.dtype, "threads": torch.get_num_threads(), "rows_independent": True}
        # Rows are computed one at a time, whatever the batch size: its one place is always taken.
        return {**facts, "in_flight_use": 1.0, **versions}

    def close(self) -> None:
        """Nothing is held beyond this process's memory."""


PROVIDER = Provider(build, load, gpus=lambda _spec, _gpu: 0)
