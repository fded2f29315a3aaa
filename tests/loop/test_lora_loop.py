"""Two iterations with adapters: killed in training and in export, they end with the bytes of a run that nothing disturbs."""

import argparse
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spin_megatron.launch.started_run import open_or_start, open_run
from spin_megatron.pipeline import execute, missing_stages
from spin_megatron.run.layout import RunLayout
from spin_megatron.stages import export, train
from tests.parity.gloo import fork_server
from tests.tiny_run import make_tiny_run

pytestmark = pytest.mark.timeout(300)

SETTINGS = ["lora.rank=4", "lora.alpha=8.0", "parallel.pipeline=1", "optimizer.learning_rate=0.005"]
# Which function of a stage does not come back, and at which call of it.
KILLS: tuple[tuple[Any, str, int], ...] = (
    (train, "_make_step", 4),  # one update after the newest checkpoint of iteration 0
    (export, "write_peft", 1),  # theta_1 is merged and written, its adapters are not
    (train, "cached_scores", 2),  # the held-out reference of iteration 1 is done, that of the train pairs is not
    (export, "_largest_probe_difference", 1),  # theta_2 is all there but not compared
)


def _start(config: Path, root: Path) -> RunLayout:
    _, layout = open_or_start(argparse.Namespace(target=config, run_dir=root, overrides=SETTINGS))
    return layout


def _go_on(root: Path) -> None:
    """Every stage that is left. `run` gives each a process; their imports would take most of this test's time."""
    config, layout = open_run(root)
    for ref in missing_stages(config, layout):
        assert execute(config, layout, ref, rank=0, stop_requested=lambda: False)


def _go_on_until_killed(root: Path, number: int) -> None:
    module, name, last = KILLS[number]
    real: Callable[..., Any] = getattr(module, name)
    calls = iter(range(1, 1_000_000))

    def dying(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, dying)
    _go_on(root)


def _contents(layout: RunLayout, theta: int) -> dict[str, bytes]:
    """What theta's folder holds; an adapter names its base by path."""
    folder, root = layout.theta(theta), str(layout.root).encode()
    files = (path for path in folder.rglob("*") if path.is_file() and path != layout.manifest(folder))
    return {str(path.relative_to(folder)): path.read_bytes().replace(root, b"RUN") for path in files}


def _losses(layout: RunLayout, iteration: int) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in layout.metrics(iteration).read_text(encoding="utf-8").splitlines()]
    return [(line["loss"], line["margin"]) for line in lines]


def test_killed_in_training_and_in_export_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    config = make_tiny_run(tmp_path / "it's a \"tiny\" run")
    undisturbed, killed = (_start(config, tmp_path / name) for name in ("undisturbed", "killed"))
    _go_on(undisturbed.root)
    for number in range(len(KILLS)):
        process = fork_server().Process(target=_go_on_until_killed, args=(killed.root, number))
        process.start()
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL, KILLS[number]
    _go_on(killed.root)
    for t in (0, 1):
        steps = _losses(undisturbed, t)
        assert steps[0] == (pytest.approx(math.log(2), abs=1e-6), 0.0)
        assert steps[-1][1] > 0.0
        assert _losses(killed, t) == steps
        contents, expected = _contents(killed, t + 1), _contents(undisturbed, t + 1)
        assert contents.keys() == expected.keys()
        assert [name for name in contents if contents[name] != expected[name]] == []
        assert "adapter/adapter_model.safetensors" in contents
    assert _contents(undisturbed, 2) != _contents(undisturbed, 1)
