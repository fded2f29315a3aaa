"""What every generation engine is: prompts of token ids with a seed each in, responses of token ids with a finish reason out.

A provider is two functions, `build` and `load`; one line of PROVIDERS makes it known. Nothing here imports torch or an
engine: a provider's module is imported when its name is asked for.

    build(spec, folder) -> facts          make what the engine loads from theta_t; an engine without a build step makes nothing
    load(spec, folder, work) -> Engine    open it; `work` is a folder of the shard's own for what it keeps while it runs

An engine knows no shards and draws nothing that does not follow from a prompt's seed.
"""

import importlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.records import GeneratedRow, TokenIds

# name in [generate] engine -> module:object
PROVIDERS: dict[str, str] = {
    "builtin": "spin_megatron.generation.hf_loop:PROVIDER",
    "onnxruntime-genai": "spin_megatron.generation.onnx_cpu:PROVIDER",
    "trtllm-engine": "spin_megatron.generation.trtllm:ENGINE",
    "trtllm-torch": "spin_megatron.generation.trtllm:TORCH",
    "vllm": "spin_megatron.generation.vllm:PROVIDER",
}
# Engines whose model runs in another environment: the process of their stage drives a worker, and needs neither torch nor a GPU.
EXTERNAL = frozenset({"trtllm-engine", "trtllm-torch", "vllm"})
# Those of them that have a build for machines without a GPU.
EXTERNAL_ON_CPU = frozenset({"vllm"})


@dataclass(frozen=True)
class Prompt:
    """One request. token_ids are exactly what the model sees (no template, no BOS is added); seed decides every draw."""

    example_id: str
    token_ids: TokenIds
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature, then top-k, then top-p, as transformers orders them.

    temperature 0 is greedy; top_k 0 and top_p 1 are off, and off unless asked for (transformers' own default is top_k 50).
    eos_ids: every id that ends a response. max_new_tokens counts the EOS token.
    """

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    eos_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} ([generate]) must be 0 (greedy) or positive.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} ([generate]) must be 0 (off) or positive.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} ([generate]) must be in (0, 1]; 1 is off.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be positive.")
        if not self.eos_ids:
            raise ValueError("eos_ids is empty: no response could end; give the model's EOS ids.")


@dataclass(frozen=True)
class Environment:
    """[generate.environment]: how an interpreter with another engine's packages is started. It is no part of what an engine is.

    The words of a command are launcher, prefix, python; launcher starts {ranks} processes, and is empty for plain ones of this machine.
    variables: NAME=VALUE.
    """

    python: str = "python3"
    prefix: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is made from; equal specs and equal weights make equal engines.

    model: Hugging Face folder of theta_t. dtype: "float32" or "bfloat16". batch_size: rows computed at a time.
    max_prompt_tokens, max_new_tokens: limits of every request. options: settings of one engine alone.
    prompt_files: the run's own prompts, for engines that are sized or calibrated by them.
    environment: where an engine of another environment is started.
    """

    model: Path
    dtype: str
    batch_size: int
    max_prompt_tokens: int
    max_new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt_files: tuple[Path, ...] = ()
    environment: Environment = Environment()


def never() -> bool:
    """No stop is asked for."""
    return False


class Engine(Protocol):
    """An engine that is ready to answer. Use it as a context manager: some hold other processes."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Callable[[], bool] = never) -> Iterator[GeneratedRow]:
        """Answer every prompt once; rows come as they finish, in any order.

        Args:
            stop: asked between steps or answers, or a few times a second; once it holds no more rows come.

        Raises:
            ValueError: a prompt is empty, too long, repeated or has ids the model does not know (before any work).
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for the manifest: engine, dtype, what ran, on what, with which guarantees.

        in_flight_use: how full the engine was, the mean over time (or steps) of the rows in it as a share of its batch size, 0 to 1.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def _nothing_to_examine(_options: Mapping[str, Any], _environment: Environment, _folder: Path) -> str:
    return ""


def _one_gpu(_spec: EngineSpec, _gpu: str) -> int:
    return 1


@dataclass(frozen=True)
class Provider:
    """How an engine is built and loaded; see the module's docstring.

    examine(options, environment, folder): says what would run, before there is a model; refuses what cannot. `folder` is for logs.
    gpus(spec, gpu): GPUs of one replica, where the driver calls them `gpu`; 0 for an engine that uses none.
    """

    build: Callable[[EngineSpec, Path], dict[str, Any]]
    load: Callable[[EngineSpec, Path, Path], Engine]
    examine: Callable[[Mapping[str, Any], Environment, Path], str] = _nothing_to_examine
    gpus: Callable[[EngineSpec, str], int] = _one_gpu


def provider(name: str) -> Provider:
    """Import a provider.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    if name not in PROVIDERS:
        raise ValueError(f"generate.engine={name!r} (config.toml [generate]) is no engine; use one of: {', '.join(PROVIDERS)}.")
    module, _, attribute = PROVIDERS[name].partition(":")
    found: Provider = getattr(importlib.import_module(module), attribute)
    return found


def check_options(options: Mapping[str, Any], engine: str, *, known: Collection[str]) -> None:
    """Refuse options the engine does not have.

    Raises:
        ValueError: naming them and those there are.
    """
    unknown = sorted(set(options) - set(known))
    if unknown:
        has = ", ".join(sorted(known)) or "none"
        raise ValueError(f"{unknown} (config.toml [generate.options]) are no options of engine {engine!r}, which has: {has}.")


def eos_token_ids(model: Path) -> tuple[int, ...]:
    """Every EOS id of a Hugging Face folder, sorted: generation_config.json's, else config.json's.

    A chat model often has two (end of turn, end of text); only generation_config.json names both.

    Raises:
        ValueError: neither file names one.
    """
    for name in ("generation_config.json", "config.json"):
        path = model / name
        value = _read_json(path).get("eos_token_id") if path.exists() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            return tuple(sorted(set(ids)))
    raise ValueError(
        f"{model} names no eos_token_id in generation_config.json or config.json, so no response could end; "
        "add the id of the token that ends an assistant turn to generation_config.json."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the folder of a complete Hugging Face model.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore the model's folder.") from error
    return values


def check_prompts(prompts: Collection[Prompt], *, spec: EngineSpec, sampling: Sampling, shape: ModelShape) -> None:
    """Refuse requests the model cannot answer, before any work is done.

    Raises:
        ValueError: naming the first example that is empty, over a limit, repeated or holds an id outside the vocabulary.
    """
    if sampling.max_new_tokens > spec.max_new_tokens:
        raise ValueError(f"max_new_tokens={sampling.max_new_tokens} exceeds the engine's limit {spec.max_new_tokens}; build it for more.")
    unknown_eos = [token for token in sampling.eos_ids if not 0 <= token < shape.vocab_size]
    if unknown_eos:
        raise ValueError(f"EOS ids {unknown_eos} lie outside the model's vocabulary of {shape.vocab_size} ids; correct eos_token_id.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.example_id in seen:
            raise ValueError(f"example {prompt.example_id} comes twice; give each prompt once.")
        seen.add(prompt.example_id)
        _check_prompt(prompt, spec=spec, sampling=sampling, shape=shape)


def _check_prompt(prompt: Prompt, *, spec: EngineSpec, sampling: Sampling, shape: ModelShape) -> None:
    length = len(prompt.token_ids)
    if length == 0:
        raise ValueError(f"example {prompt.example_id} has an empty prompt; there is nothing to answer.")
    if length > spec.max_prompt_tokens:
        raise ValueError(
            f"example {prompt.example_id} has a prompt of {length} tokens, more than data.max_prompt_tokens={spec.max_prompt_tokens}; "
            "raise it or drop the example."
        )
    if length + sampling.max_new_tokens > shape.max_positions:
        raise ValueError(
            f"example {prompt.example_id}: {length} prompt tokens + {sampling.max_new_tokens} new tokens exceed the model's "
            f"{shape.max_positions} positions (max_position_embeddings); lower data.max_prompt_tokens or data.max_response_tokens."
        )
    unknown = [token for token in prompt.token_ids if not 0 <= token < shape.vocab_size]
    if unknown:
        raise ValueError(
            f"example {prompt.example_id} has token ids outside the model's vocabulary of {shape.vocab_size} ids: {unknown[:5]}; "
            "the prompts were made with another tokenizer, prepare them with this model's."
        )
