"""Engine "vllm": vLLM, through vllm_worker.py. It loads the Hugging Face folder; nothing is built.

Float32 on vLLM's CPU build, bfloat16 on GPUs. Rows are stable in fp32; in bf16 they may depend on what is computed beside them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from spin_megatron.generation.built import WORK_NAME, build_once, engine_identity, require_identity
from spin_megatron.generation.engine import Engine, EngineSpec, Environment, Provider
from spin_megatron.generation.external import ExternalEngine, WorkerCommand
from spin_megatron.generation.replica import (
    DTYPE_BYTES,
    RUN_OPTIONS,
    Probed,
    ReplicaOptions,
    check_model,
    probe,
    read_options,
    replica_gpus,
    replica_job,
    with_tensor_parallel,
)
from spin_megatron.plan.shape import ModelShape

NAME = "vllm"
_SCRIPT = Path(__file__).with_name("vllm_worker.py")
# Tokens of a KV cache block on CPU.
_BLOCK_TOKENS = 128
# vllm/v1/attention/backends/cpu_attn.py of 0.32, get_supported_head_sizes; vLLM itself refuses others at the first request.
_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass(frozen=True)
class VllmOptions(ReplicaOptions):
    """[generate.options] of vLLM.

    eager: neither compile the model nor capture CUDA graphs; for shards too short to repay the minute or so that this takes.
    """

    eager: bool = False


def _kv_cache_bytes(spec: EngineSpec, max_seq_len: int) -> int:
    """Keys and values of a full batch, in whole blocks; a block more, since vLLM keeps one for itself."""
    shape = ModelShape.from_huggingface(spec.model)
    token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES[spec.dtype]
    return (spec.batch_size * ceil(max_seq_len / _BLOCK_TOKENS) + 1) * _BLOCK_TOKENS * token_bytes


def build(spec: EngineSpec, folder: Path) -> dict[str, Any]:
    """Nothing is built; the folder records what will run, and generate compares it."""
    options, probed, identity = _identity(spec, folder / WORK_NAME / "probe")
    build_once(spec, folder, identity, lambda _folder: None)
    return {"needs_build": False, **identity, "gpus": list(probed.gpus), "options": asdict(options)}


def load(spec: EngineSpec, folder: Path, work: Path) -> Engine:
    """An engine that starts its worker when it is asked to answer. vLLM starts the processes for its GPUs itself: one rank here."""
    options, probed, identity = _identity(spec, work / "probe")
    require_identity(folder, identity)
    command = WorkerCommand(spec.environment, _SCRIPT, no_progress_seconds=options.no_progress_seconds)
    job = replica_job(spec, options, probed)
    job |= {"eager": options.eager, "kv_cache_bytes": _kv_cache_bytes(spec, job["max_seq_len"])}
    return ExternalEngine(NAME, command, job, spec, work)


def examine(options: Mapping[str, Any], environment: Environment, folder: Path) -> str:
    """See Provider.examine."""
    read_options(VllmOptions, options, NAME)
    return f"vLLM {probe(environment, _SCRIPT, folder)}"


def gpus(spec: EngineSpec, gpu: str) -> int:
    """See Provider.gpus."""
    return replica_gpus(read_options(VllmOptions, spec.options, NAME), spec, gpu)


def _identity(spec: EngineSpec, probe_folder: Path) -> tuple[VllmOptions, Probed, dict[str, Any]]:
    options = read_options(VllmOptions, spec.options, NAME)
    shape = check_model(spec, NAME, dtypes=("bfloat16", "float32"))
    probed = probe(spec.environment, _SCRIPT, probe_folder)
    if not probed.gpus and shape.head_dim not in _CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, _CPU_HEAD_SIZES))
        raise ValueError(f"{spec.model} has head size {shape.head_dim}; on a CPU vLLM takes {sizes}; use another engine, e.g. builtin.")
    options = with_tensor_parallel(options, spec, shape, probed)
    runtime = probed.runtime("vllm") | {"options.tensor_parallel": options.tensor_parallel}
    return options, probed, engine_identity(spec, engine=NAME, runtime=runtime, run_options=RUN_OPTIONS)


PROVIDER = Provider(build, load, examine, gpus)
