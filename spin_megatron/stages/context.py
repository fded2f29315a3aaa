"""What a stage is given and what it gives back. Stages read and write files; only the pipeline writes manifests."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin_megatron.config import IterationConfig, RunConfig
from spin_megatron.run.layout import RunLayout


@dataclass(frozen=True)
class StageContext:
    """The input of `run(context)` of every stage.

    iteration: t; for the export of the base model and for prepare it is 0.
    shard: k for generate, the task's number for benchmark, else None.
    show: whether this process draws progress bars (rank 0).
    stop_requested: true once the run was asked to save and leave; poll it between steps. Only rank 0's answer says so: hand it to all.
    """

    config: RunConfig
    layout: RunLayout
    iteration: int
    shard: int | None = None
    show: bool = True
    stop_requested: Callable[[], bool] = lambda: False

    @property
    def scalars(self) -> IterationConfig:
        """This iteration's values of the per-iteration settings."""
        return self.config.at(self.iteration)


@dataclass(frozen=True)
class StageOutput:
    """What a stage made. Of a distributed stage only rank 0's counts.

    files: finished file -> number of rows, or None where rows mean nothing.
    summary: numbers for people, shown by `status`.
    stopped: the stage saved its state and left on request; it is not done.
    """

    files: Mapping[Path, int | None]
    summary: Mapping[str, Any] = field(default_factory=dict)
    stopped: bool = False
