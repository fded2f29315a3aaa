"""The line of stages: what each reads and makes, where its files and logs lie, and which settings decide its result.

    export theta_0 -> prepare
    for each t: build-engine -> generate shards -> merge -> train -> export theta_{t+1} -> evaluate -> benchmarks

`pipeline` walks it. No torch: a stage's module is named here and imported when the stage runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_megatron.config import HARNESS, OPERATIONAL, PER_ITERATION, RunConfig, flat_settings
from spin_megatron.config_sections import StageName
from spin_megatron.run.layout import RunLayout


@dataclass(frozen=True)
class StageRef:
    """One stage of one iteration. For export, iteration is that of the theta it makes; shard is the task's number for benchmark."""

    name: StageName
    iteration: int = 0
    shard: int | None = None

    def __str__(self) -> str:
        shard = "" if self.shard is None else f" shard {self.shard}"
        return f"{self.name} {self.iteration}{shard}"

    @classmethod
    def parse(cls, text: str) -> "StageRef":
        """The stage that a person names as STAGE:ITERATION or STAGE:ITERATION:SHARD; without a shard, all of them.

        Raises:
            ValueError: the text is not of that form.
        """
        name, *numbers = text.split(":")
        if name not in STAGES or not 1 <= len(numbers) <= 2 or not all(number.isdigit() for number in numbers):
            raise ValueError(f"--redo {text!r} is not STAGE:ITERATION[:SHARD] with a stage of {', '.join(STAGES)}; for example train:1.")
        return cls(name, *(int(number) for number in numbers))

    def command(self, layout: RunLayout) -> str:
        """What a person types to run exactly this stage."""
        shard = "" if self.shard is None else f" --shard {self.shard}"
        return f"spin-megatron {self.name} --run-dir {layout.quoted} --iteration {self.iteration}{shard}"

    def redo_command(self, layout: RunLayout) -> str:
        """What a person types to make exactly this stage, and what was made from it, anew."""
        shard = "" if self.shard is None else f":{self.shard}"
        verb = "submit" if layout.slurm.exists() else "run"
        return f"spin-megatron {verb} {layout.quoted} --redo {self.name}:{self.iteration}{shard}"


@dataclass(frozen=True)
class Stage:
    """A row of the stage table.

    settings: config sections ("data") and keys ("run.seed") that decide the result; ignored: keys of those that do not.
    folder: where its files and manifest lie.
    needs: the stages it reads.
    resumes: unfinished files are continued; otherwise they are removed before the stage runs.
    distributed: runs as parallel.world_size ranks.
    """

    module: str
    settings: tuple[str, ...]
    folder: Callable[[RunLayout, StageRef], Path]
    needs: Callable[[RunConfig, int], tuple[StageRef, ...]]
    ignored: tuple[str, ...] = ()
    resumes: bool = False
    distributed: bool = False


def _merge_needs(config: RunConfig, iteration: int) -> tuple[StageRef, ...]:
    shards = tuple(StageRef("generate", iteration, shard) for shard in range(config.generate.num_shards))
    window = config.at(iteration).window
    earlier = tuple(StageRef("merge", earlier) for earlier in range(max(0, iteration - window + 1), iteration))
    return (StageRef("prepare"), *shards, *earlier)


_ENGINE_SETTINGS = ("generate.engine", "generate.dtype", "generate.options", "data.max_prompt_tokens", "data.max_response_tokens")

_HARNESS_SETTINGS = tuple(f"evaluate.{name}" for name in HARNESS)

STAGES: dict[StageName, Stage] = {
    "export": Stage(
        "spin_megatron.stages.export",
        ("model", "train.precision"),
        lambda layout, ref: layout.theta(ref.iteration),
        lambda config, t: (StageRef("train", t - 1),) if t else (),
    ),
    "prepare": Stage(
        "spin_megatron.stages.prepare",
        ("run.seed", "data"),
        lambda layout, ref: layout.data,
        lambda config, t: (StageRef("export", 0),),
        ignored=("data.window",),
    ),
    "build-engine": Stage(
        "spin_megatron.stages.build_engine",
        _ENGINE_SETTINGS,
        lambda layout, ref: layout.engine(ref.iteration),
        lambda config, t: (StageRef("prepare"), StageRef("export", t)),
    ),
    "generate": Stage(
        "spin_megatron.stages.generate",
        ("run.seed", "generate", "data.max_response_tokens"),
        lambda layout, ref: layout.shard(ref.iteration, ref.shard or 0),
        lambda config, t: (StageRef("prepare"), StageRef("build-engine", t), StageRef("export", t)),
        ignored=("generate.rows_per_part", "generate.environment", "generate.batch_size"),
        resumes=True,
    ),
    "merge": Stage(
        "spin_megatron.stages.merge",
        ("run.seed", "data.window", "train.pack_tokens", "train.max_pairs_per_pack", "train.share_prompt"),
        lambda layout, ref: layout.pairs(ref.iteration),
        _merge_needs,
    ),
    "train": Stage(
        "spin_megatron.stages.train",
        ("run.seed", "objective", "optimizer", "train", "lora"),
        lambda layout, ref: layout.train(ref.iteration),
        lambda config, t: (StageRef("merge", t), StageRef("export", t)),
        ignored=OPERATIONAL,
        resumes=True,
        distributed=True,
    ),
    "evaluate": Stage(
        "spin_megatron.stages.evaluate",
        ("objective", "evaluate", "train.precision", "train.num_bf16_end_layers"),
        lambda layout, ref: layout.evaluate(ref.iteration),
        lambda config, t: (StageRef("merge", t), StageRef("train", t), StageRef("export", t + 1)),
        ignored=_HARNESS_SETTINGS,
        distributed=True,
    ),
    "benchmark": Stage(
        "spin_megatron.stages.benchmark",
        (*_HARNESS_SETTINGS, "train.precision"),
        lambda layout, ref: layout.benchmark(ref.iteration, ref.shard or 0),
        lambda config, t: (StageRef("export", t + 1),),
    ),
}


def line(config: RunConfig) -> list[StageRef]:
    """Every stage of a run, in an order in which each comes after what it needs."""
    refs = [StageRef("export", 0), StageRef("prepare")]
    for t in range(config.run.iterations):
        refs.append(StageRef("build-engine", t))
        refs += [StageRef("generate", t, shard) for shard in range(config.generate.num_shards)]
        refs += [StageRef("merge", t), StageRef("train", t), StageRef("export", t + 1), StageRef("evaluate", t)]
        refs += [StageRef("benchmark", t, task) for task in range(len(config.evaluate.lm_eval_tasks))]
    return refs


def folder_of(layout: RunLayout, ref: StageRef) -> Path:
    return STAGES[ref.name].folder(layout, ref)


def log_folder(layout: RunLayout, ref: StageRef) -> Path:
    """Logs of a stage's attempts; theta_{t+1} is made in iteration t, beside theta_0 in the first."""
    name = "export_base" if ref == StageRef("export", 0) else ref.name
    return layout.logs(name, made_in(ref), ref.shard)


def made_in(ref: StageRef) -> int:
    """The iteration whose folder holds a stage's logs and locks."""
    return max(0, ref.iteration - 1) if ref.name == "export" else ref.iteration


def settings_of(config: RunConfig, ref: StageRef) -> dict[str, Any]:
    """The flat settings that decide a stage's result, per-iteration lists as this iteration's scalar."""
    stage = STAGES[ref.name]
    sections = sorted({name.partition(".")[0] for name in stage.settings})
    flat = flat_settings(config, sections)
    scalars = config.at(ref.iteration)
    chosen = {}
    for name, value in flat.items():
        wanted = any(name == setting or name.startswith(f"{setting}.") for setting in stage.settings)
        if wanted and name not in stage.ignored:
            chosen[name] = getattr(scalars, name.partition(".")[2]) if name in PER_ITERATION else value
    if ref.name == "benchmark":  # of its own task alone
        chosen["evaluate.lm_eval_tasks"] = config.evaluate.lm_eval_tasks[ref.shard or 0]
    if ref.name == "export" and ref.iteration:
        # A trained theta is what train wrote; the base model's address decides theta_0 alone.
        return {name: value for name, value in chosen.items() if not name.startswith("model.")}
    return chosen
