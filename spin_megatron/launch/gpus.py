"""Which GPUs of this machine each shard gets, when several answer at a time: without, all would start on the first one."""

import os
import queue
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spin_megatron.run.layout import RunLayout

if TYPE_CHECKING:  # the doctor runs where pydantic is missing too
    from spin_megatron.config import RunConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
_ANSWER_SECONDS = 60


def visible_gpus() -> list[tuple[str, str]]:
    """(index, name) of the GPUs this process may use, as nvidia-smi tells them; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[word.strip() for word in line.split(",")] for line in output.splitlines()]
    chosen = os.environ.get(VISIBLE)
    if chosen is None:
        return [(index, name) for index, _uuid, name in rows]
    known = {key: name for index, uuid, name in rows for key in (index, uuid)}
    return [(word.strip(), known.get(word.strip(), "")) for word in chosen.split(",") if word.strip()]


class GpuPool:
    """Groups of GPUs, one for each replica that fits side by side."""

    def __init__(self, gpus: list[str], gpus_per_replica: int) -> None:
        self._groups: queue.SimpleQueue[str] | None = None
        if gpus and gpus_per_replica and len(gpus) >= gpus_per_replica:
            self._groups = queue.SimpleQueue()
            for start in range(0, len(gpus) - gpus_per_replica + 1, gpus_per_replica):
                self._groups.put(",".join(gpus[start : start + gpus_per_replica]))

    @contextmanager
    def group(self) -> Iterator[dict[str, str]]:
        """The environment variable that gives a process its GPUs, which are waited for; nothing where there are none to share out."""
        if self._groups is None:
            yield {}
            return
        taken = self._groups.get()
        try:
            yield {VISIBLE: taken}
        finally:
            self._groups.put(taken)


def pool_for(config: "RunConfig", layout: RunLayout, iteration: int) -> GpuPool:
    """The pool of an iteration's shards on this machine."""
    gpus = visible_gpus()
    if not gpus:
        return GpuPool([], 0)
    from spin_megatron.generation.engine import provider
    from spin_megatron.stages.build_engine import engine_spec
    from spin_megatron.stages.context import StageContext

    spec = engine_spec(StageContext(config, layout, iteration))
    return GpuPool([index for index, _name in gpus], provider(config.generate.engine).gpus(spec, gpus[0][1]))
