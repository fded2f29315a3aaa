"""Whether what [slurm] asks for fits: as many ranks as the layout has, GPUs for the engine, and time in which a stage can work."""

import re

from spin_megatron.config import RunConfig
from spin_megatron.config_sections import StageName
from spin_megatron.generation.engine import EXTERNAL, EXTERNAL_ON_CPU
from spin_megatron.stage_table import STAGES

# slurmctld looks at time limits every 30 s (PERIODIC_TIMEOUT, src/slurmctld/slurmctld.h, the same in 22.05 and 26.05): a notice may
# come so much before --signal asks for it, never after, and the end so much after the limit.
EARLY_NOTICE_SECONDS = 30
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def check_resources(config: RunConfig) -> None:
    """Check that train's and evaluate's nodes x ranks_per_node is the layout's number of ranks, and that every stage has time to work.

    Raises:
        ValueError: it is not so; the message has the numbers.
    """
    world_size = config.parallel.layout().world_size
    for stage in STAGES:
        settings = config.slurm.of(stage)
        wanted = world_size if STAGES[stage].distributed else 1
        if settings.nodes * settings.ranks_per_node != wanted:
            raise ValueError(
                f"slurm.stages.{stage}: nodes={settings.nodes} x ranks_per_node={settings.ranks_per_node} must be {wanted} "
                f"({'the ranks of [parallel]' if wanted > 1 else 'this stage is one process'}); set both in [slurm.stages.{stage}]."
            )
        seconds = _time_seconds(settings.time, stage)
        if STAGES[stage].resumes and seconds is not None and seconds <= config.slurm.signal_seconds + EARLY_NOTICE_SECONDS:
            raise ValueError(
                f"slurm.stages.{stage}: time={settings.time} leaves no time to work: the notice to save and leave comes "
                f"slurm.signal_seconds={config.slurm.signal_seconds} before its end, and up to {EARLY_NOTICE_SECONDS} s earlier. Raise "
                "time, or lower signal_seconds as far as a step and a checkpoint allow."
            )
    _check_engine_gpus(config)


def _time_seconds(time: str, stage: StageName) -> int | None:
    """A time limit as sbatch reads it, in seconds; None where it is none."""
    if time.lower() in ("0", "infinite", "unlimited"):
        return None
    found = _TIME.fullmatch(time)
    if found is None:
        raise ValueError(
            f"slurm.stages.{stage}: time={time!r} is no time limit of sbatch; write minutes, minutes:seconds, hours:minutes:seconds, "
            "days-hours, days-hours:minutes or days-hours:minutes:seconds."
        )
    days, first, second, third = (int(number or 0) for number in found.groups())
    if found[1] is None and found[4] is None:  # minutes, not hours, come first
        return first * 60 + second
    return days * 86400 + first * 3600 + second * 60 + third


def _check_engine_gpus(config: RunConfig) -> None:
    """An engine that is told its number of GPUs must get them, to build on and to answer on; one that computes on a CPU too needs none.

    A run that asks for a GPU nowhere is for a cluster without them; where another stage asks for one, the engine's was forgotten.
    """
    if config.generate.engine not in EXTERNAL:
        return
    tensor, pipeline = config.generate.options.get("tensor_parallel", 0), config.generate.options.get("pipeline_parallel", 1)
    wanted = max(int(tensor) * int(pipeline), 1)
    has_gpus = config.slurm.gpu is not None or any(config.slurm.of(stage).gpus_per_node for stage in STAGES)
    if wanted == 1 and not has_gpus and config.generate.engine in EXTERNAL_ON_CPU:
        return
    for stage in ("build-engine", "generate"):
        found = config.slurm.of(stage).gpus_per_node
        if found < wanted:
            raise ValueError(
                f"slurm.stages.{stage}: gpus_per_node={found}, but generate.engine={config.generate.engine} runs on {wanted} GPUs of one "
                f"node (generate.options tensor_parallel x pipeline_parallel); set gpus_per_node = {wanted} in [slurm.stages.{stage}]."
            )
