"""What engines on GPUs in another environment have in common: options, how their worker is started, what it finds there.

A replica is one copy of the model on tensor_parallel x pipeline_parallel GPUs of one node, answering one shard. Several small
replicas beat one large one, since every GPU more exchanges more: by default the planner's rates choose the smallest that pays.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from spin_megatron.generation.engine import EngineSpec, Environment, check_options
from spin_megatron.generation.external import Worker, WorkerCommand, WorkerFailed
from spin_megatron.plan.duration import replica_tensor
from spin_megatron.plan.hardware import Gpu, gpu_of_driver_name
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.records import longest_list

# Of a number, by generate.dtype.
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
# How a worker is run, not what the engine is.
RUN_OPTIONS = frozenset({"free_gpu_memory_fraction", "in_flight", "no_progress_seconds"})


@dataclass(frozen=True)
class ReplicaOptions:
    """[generate.options] of every engine of this kind.

    tensor_parallel: 0 lets the planner choose for the GPU that is there.
    in_flight: requests the engine holds at a time; 0 is twice the batch size.
    no_progress_seconds: a worker that shows nothing new for so long is ended.
    """

    tensor_parallel: int = 0
    pipeline_parallel: int = 1
    free_gpu_memory_fraction: float = 0.9
    in_flight: int = 0
    no_progress_seconds: float = 3600.0

    def __post_init__(self) -> None:
        self.require("tensor_parallel", self.tensor_parallel >= 0, "0 (the planner chooses) or positive")
        self.require("pipeline_parallel", self.pipeline_parallel >= 1, "at least 1")
        self.require("free_gpu_memory_fraction", 0 < self.free_gpu_memory_fraction < 1, "between 0 and 1")
        self.require("in_flight", self.in_flight >= 0, "0 or positive")
        self.require("no_progress_seconds", self.no_progress_seconds > 0, "positive")

    def require(self, name: str, is_good: bool, wanted: str) -> None:
        if not is_good:
            raise ValueError(f"generate.options.{name}={getattr(self, name)!r} (config.toml [generate.options]) must be {wanted}.")

    @property
    def ranks(self) -> int:
        assert self.tensor_parallel, "the planner has not chosen yet: see with_tensor_parallel"
        return self.tensor_parallel * self.pipeline_parallel


Options = TypeVar("Options", bound=ReplicaOptions)


def read_options(kind: type[Options], options: Mapping[str, Any], name: str) -> Options:
    """The options of a run, checked.

    Raises:
        ValueError: one is unknown, of the wrong type or out of range; the message names it.
    """
    check_options(options, name, known=[field.name for field in fields(kind)])
    for field in fields(kind):
        value, wanted = options.get(field.name, field.default), type(field.default)
        accepted = (int, float) if wanted is float else (wanted,)
        if type(value) not in accepted:
            raise ValueError(f"generate.options.{field.name}={value!r} (config.toml [generate.options]) must be of type {wanted.__name__}.")
    return kind(**options)


def check_model(spec: EngineSpec, name: str, *, dtypes: tuple[str, ...]) -> ModelShape:
    """Refuse a model of a family we do not train, or a dtype the engine does not run in.

    Raises:
        ValueError: naming the setting and the valid choices.
    """
    if spec.dtype not in dtypes:
        raise ValueError(f"generate.dtype={spec.dtype}: engine {name!r} runs in {' or '.join(dtypes)}; set generate.dtype to that.")
    return ModelShape.from_huggingface(spec.model)


@dataclass(frozen=True)
class Probed:
    """What a worker found where it runs. gpus: name, compute_cap and driver_version of each, empty where there is none."""

    version: str
    python: str
    gpus: tuple[Mapping[str, str], ...]

    @property
    def gpu(self) -> str:
        return self.gpus[0]["name"] if self.gpus else "none"

    def runtime(self, package: str) -> dict[str, Any]:
        """The part of an engine's identity that its surroundings decide."""
        capability = self.gpus[0]["compute_cap"] if self.gpus else "none"
        return {package: self.version, "gpu": self.gpu, "compute_capability": capability}

    def __str__(self) -> str:
        gpus = f"{len(self.gpus)} x {self.gpu}" if self.gpus else "no GPU"
        return f"{self.version} under Python {self.python}, {gpus}"


def probe(environment: Environment, script: Path, folder: Path) -> Probed:
    """Ask a worker what is installed where it runs; it imports nothing for that, and one process is enough.

    Raises:
        ValueError: it could not be started, or the package is not there.
    """
    try:
        found = Worker(WorkerCommand(environment, script, no_progress_seconds=600.0), {"action": "probe"}, folder).wait()
    except WorkerFailed as error:
        raise ValueError(f"the engine's environment ([generate.environment]) does not answer: {error}") from None
    return Probed(found["version"], found["python"], tuple(found["gpus"]))


def longest_prompt(spec: EngineSpec) -> int:
    """Tokens of the longest prompt of this run; the configured limit where its prompts are not known."""
    return longest_list(spec.prompt_files, "prompt_ids") or spec.max_prompt_tokens


def planned_tensor_parallel(spec: EngineSpec, shape: ModelShape, gpu: Gpu) -> int:
    """The planner's number of GPUs, for requests of half the limits."""
    prompt_tokens, new_tokens = spec.max_prompt_tokens / 2, spec.max_new_tokens / 2
    return replica_tensor(
        shape,
        gpu,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        max_batch=spec.batch_size,
        element_bytes=DTYPE_BYTES[spec.dtype],
    )


def replica_gpus(options: ReplicaOptions, spec: EngineSpec, gpu_name: str) -> int:
    """GPUs of a replica on GPUs that the driver calls `gpu_name`.

    Raises:
        ValueError: the planner is to choose, and does not know the GPU.
    """
    if options.tensor_parallel:
        return options.ranks
    gpu = gpu_of_driver_name(gpu_name)
    if gpu is None:
        raise ValueError(f"generate.options.tensor_parallel is not set, and the planner does not know the GPU {gpu_name!r}; set it.")
    return planned_tensor_parallel(spec, ModelShape.from_huggingface(spec.model), gpu) * options.pipeline_parallel


def with_tensor_parallel(options: Options, spec: EngineSpec, shape: ModelShape, probed: Probed) -> Options:
    """The options with a number of GPUs: the given one, or the planner's for this model on the GPU that was found.

    Raises:
        ValueError: the planner does not know the GPU, the replica needs more GPUs than are there, or it does not divide the heads.
    """
    if not options.tensor_parallel:
        chosen = replica_gpus(options, spec, probed.gpu) // options.pipeline_parallel if probed.gpus else 1
        options = replace(options, tensor_parallel=chosen)
    if probed.gpus and options.ranks > len(probed.gpus):
        raise ValueError(
            f"a replica on {options.ranks} GPUs (generate.options tensor_parallel={options.tensor_parallel} x pipeline_parallel="
            f"{options.pipeline_parallel}) does not fit on the {len(probed.gpus)} that are there; ask for more "
            "(slurm.stages.generate.gpus_per_node and build-engine's), or lower them."
        )
    if shape.num_heads % options.tensor_parallel:
        raise ValueError(f"generate.options.tensor_parallel={options.tensor_parallel} does not divide the model's {shape.num_heads} heads.")
    return options


def replica_job(spec: EngineSpec, options: ReplicaOptions, probed: Probed) -> dict[str, Any]:
    """What every job says: the model, limits from the data's real lengths, and the machines it is for."""
    longest = longest_prompt(spec)
    # Engines refuse to be sized for more than the model has; a prompt that leaves no room for an answer is refused on its own.
    positions = ModelShape.from_huggingface(spec.model).max_positions
    return {
        "model": str(spec.model.resolve()),
        "dtype": spec.dtype,
        "tensor_parallel": options.tensor_parallel,
        "pipeline_parallel": options.pipeline_parallel,
        "free_gpu_memory_fraction": options.free_gpu_memory_fraction,
        "max_batch_size": spec.batch_size,
        "max_input_len": longest,
        "max_seq_len": min(longest + spec.max_new_tokens, positions),
        "in_flight": options.in_flight or 2 * spec.batch_size,
        "chunk_rows": spec.batch_size,
        "expected": {"version": probed.version, "gpu": probed.gpu},
    }
