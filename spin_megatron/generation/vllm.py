"""Engine "vllm": vLLM, through vllm_worker.py. It loads the Hugging Face folder; nothing is built.

Float32 on vLLM's CPU build, bfloat16 on GPUs. Rows are stable in fp32; in bf16 they may depend on what is computed beside them.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from spin_megatron.generation.built import WORK_NAME, build_once, engine_identity, require_identity
from spin_megatron.generation.engine import Engine, EngineSpec, Provider
from spin_megatron.generation.external import ExternalEngine, WorkerCommand
from spin_megatron.generation.replica import (
    RUN_OPTIONS,
    Probed,
    ReplicaOptions,
    check_model,
    probe,
    read_options,
    replica_job,
    worker_command,
)

NAME = "vllm"
_SCRIPT = Path(__file__).with_name("vllm_worker.py")
# vLLM starts its own processes for the GPUs of one node.
_FOR_MANY = "python3"


def build(spec: EngineSpec, folder: Path) -> dict[str, Any]:
    """Nothing is built; the folder records what will run, and generate compares it."""
    options, probed, identity = _identity(spec, folder / WORK_NAME / "probe")
    build_once(spec, folder, identity, lambda _folder: None)
    return {"needs_build": False, **identity, "gpus": list(probed.gpus), "options": asdict(options)}


def load(spec: EngineSpec, folder: Path, work: Path) -> Engine:
    """An engine that starts its worker when it is asked to answer."""
    options, probed, identity = _identity(spec, work / "probe")
    require_identity(folder, identity)
    return ExternalEngine(NAME, _command(options), replica_job(spec, options, probed), spec, work)


def _identity(spec: EngineSpec, probe_folder: Path) -> tuple[ReplicaOptions, Probed, dict[str, Any]]:
    options = read_options(ReplicaOptions, spec, NAME)
    check_model(spec, NAME, dtypes=("bfloat16", "float32"))
    probed = probe(_command(options), probe_folder)
    return options, probed, engine_identity(spec, engine=NAME, runtime=probed.runtime("vllm"), run_options=RUN_OPTIONS)


def _command(options: ReplicaOptions) -> WorkerCommand:
    return worker_command(options, _SCRIPT, for_many=_FOR_MANY)


PROVIDER = Provider(build, load)
