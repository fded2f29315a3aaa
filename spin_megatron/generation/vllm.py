"""Engine "vllm": vLLM, through vllm_worker.py. It loads the Hugging Face folder; nothing is built.

Float32 on vLLM's CPU build, bfloat16 on GPUs. Rows are stable in fp32; in bf16 they may depend on what is computed beside them.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spin_megatron.generation.built import WORK_NAME, build_once, engine_identity, require_identity
from spin_megatron.generation.engine import Engine, EngineSpec, Environment, Provider
from spin_megatron.generation.external import ExternalEngine, WorkerCommand
from spin_megatron.generation.replica import (
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

NAME = "vllm"
_SCRIPT = Path(__file__).with_name("vllm_worker.py")


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
    return ExternalEngine(NAME, command, replica_job(spec, options, probed), spec, work)


def examine(options: Mapping[str, Any], environment: Environment, folder: Path) -> str:
    """See Provider.examine."""
    read_options(ReplicaOptions, options, NAME)
    return f"vLLM {probe(environment, _SCRIPT, folder)}"


def gpus(spec: EngineSpec, gpu: str) -> int:
    """See Provider.gpus."""
    return replica_gpus(read_options(ReplicaOptions, spec.options, NAME), spec, gpu)


def _identity(spec: EngineSpec, probe_folder: Path) -> tuple[ReplicaOptions, Probed, dict[str, Any]]:
    options = read_options(ReplicaOptions, spec.options, NAME)
    shape = check_model(spec, NAME, dtypes=("bfloat16", "float32"))
    probed = probe(spec.environment, _SCRIPT, probe_folder)
    options = with_tensor_parallel(options, spec, shape, probed)
    runtime = probed.runtime("vllm") | {"options.tensor_parallel": options.tensor_parallel}
    return options, probed, engine_identity(spec, engine=NAME, runtime=runtime, run_options=RUN_OPTIONS)


PROVIDER = Provider(build, load, examine, gpus)
