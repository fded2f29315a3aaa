"""What engines on GPUs in another environment have in common: options, how their worker is started, what it finds there.

A replica is one copy of the model on tensor_parallel x pipeline_parallel GPUs, answering one shard. Several small replicas
beat one large one: raise generate.num_shards before tensor_parallel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from spin_megatron.generation.engine import EngineSpec, check_options
from spin_megatron.generation.external import Worker, WorkerCommand, worker_words
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.records import PromptRow, read_all

# How a worker is started and run, not what the engine is.
RUN_OPTIONS = frozenset({"command", "free_gpu_memory_fraction", "in_flight", "no_progress_seconds"})


@dataclass(frozen=True)
class ReplicaOptions:
    """[generate.options] of every engine of this kind.

    command: what stands before the worker script: the Python of the engine's environment, with its container or launcher in
        front; {ranks} is the number of GPUs. Empty is the engine's own default.
    in_flight: requests the engine holds at a time; 0 is four times the batch size.
    no_progress_seconds: a worker that shows nothing new for so long is ended.
    """

    command: str = ""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    free_gpu_memory_fraction: float = 0.9
    in_flight: int = 0
    no_progress_seconds: float = 3600.0

    def __post_init__(self) -> None:
        self.require("tensor_parallel", self.tensor_parallel >= 1, "at least 1")
        self.require("pipeline_parallel", self.pipeline_parallel >= 1, "at least 1")
        self.require("free_gpu_memory_fraction", 0 < self.free_gpu_memory_fraction < 1, "between 0 and 1")
        self.require("in_flight", self.in_flight >= 0, "0 or positive")
        self.require("no_progress_seconds", self.no_progress_seconds > 0, "positive")

    def require(self, name: str, is_good: bool, wanted: str) -> None:
        if not is_good:
            raise ValueError(f"generate.options.{name}={getattr(self, name)!r} (config.toml [generate.options]) must be {wanted}.")

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


Options = TypeVar("Options", bound=ReplicaOptions)


def read_options(kind: type[Options], spec: EngineSpec, name: str) -> Options:
    """The options of a run, checked.

    Raises:
        ValueError: one is unknown, of the wrong type or out of range; the message names it.
    """
    check_options(spec, name, known=[field.name for field in fields(kind)])
    for field in fields(kind):
        value, wanted = spec.options.get(field.name, field.default), type(field.default)
        accepted = (int, float) if wanted is float else (wanted,)
        if type(value) not in accepted:
            raise ValueError(f"generate.options.{field.name}={value!r} (config.toml [generate.options]) must be of type {wanted.__name__}.")
    return kind(**spec.options)


def check_model(spec: EngineSpec, name: str, *, dtypes: tuple[str, ...]) -> None:
    """Refuse a model of a family we do not train, or a dtype the engine does not run in.

    Raises:
        ValueError: naming the setting and the valid choices.
    """
    ModelShape.from_huggingface(spec.model)
    if spec.dtype not in dtypes:
        raise ValueError(f"generate.dtype={spec.dtype}: engine {name!r} runs in {' or '.join(dtypes)}; set generate.dtype to that.")


def worker_command(options: ReplicaOptions, script: Path, *, for_many: str, settings: tuple[str, ...] = ()) -> WorkerCommand:
    """The command of the options, or the default for one GPU or for many."""
    template = options.command or ("python3" if options.ranks == 1 else for_many)
    return WorkerCommand(worker_words(template, ranks=options.ranks, option="command"), script, settings, options.no_progress_seconds)


@dataclass(frozen=True)
class Probed:
    """What a worker found where it runs. gpus: name, compute_cap and driver_version of each, empty where there is none."""

    version: str
    python: str
    gpus: tuple[Mapping[str, str], ...]

    @property
    def gpu(self) -> str:
        return self.gpus[0]["name"] if self.gpus else "none"

    def runtime(self, package: str) -> dict[str, str]:
        """The part of an engine's identity that its surroundings decide."""
        capability = self.gpus[0]["compute_cap"] if self.gpus else "none"
        return {package: self.version, "gpu": self.gpu, "compute_capability": capability}


def probe(command: WorkerCommand, folder: Path) -> Probed:
    """Ask a worker what is installed where it runs; it imports nothing for that.

    Raises:
        RuntimeError: it could not be started, or the package is not there.
    """
    found = Worker(command, {"action": "probe"}, folder).wait()
    return Probed(found["version"], found["python"], tuple(found["gpus"]))


def longest_prompt(spec: EngineSpec) -> int:
    """Tokens of the longest prompt of this run; the configured limit where its prompts are not known."""
    return max((len(row.prompt_ids) for row in read_all(spec.prompt_files, PromptRow)), default=spec.max_prompt_tokens)


def replica_job(spec: EngineSpec, options: ReplicaOptions, probed: Probed) -> dict[str, Any]:
    """What every job says: the model, limits from the data's real lengths, and the machines it is for."""
    longest = longest_prompt(spec)
    return {
        "model": str(spec.model.resolve()),
        "dtype": spec.dtype,
        "tensor_parallel": options.tensor_parallel,
        "pipeline_parallel": options.pipeline_parallel,
        "free_gpu_memory_fraction": options.free_gpu_memory_fraction,
        "max_batch_size": spec.batch_size,
        "max_input_len": longest,
        "max_seq_len": longest + spec.max_new_tokens,
        "in_flight": options.in_flight or 4 * spec.batch_size,
        "chunk_rows": spec.batch_size,
        "expected": {"version": probed.version, "gpu": probed.gpu},
    }
