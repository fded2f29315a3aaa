"""The whole loop on a tiny random model: end to end, killed in every stage, two shards, a rerun, another layout."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spin_megatron.launch.started_run import open_run
from spin_megatron.pipeline import redo
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import digest_file
from spin_megatron.run.records import SpinPair, read_rows
from spin_megatron.stage_table import StageRef, folder_of
from tests.tiny_run import SPIN_MEGATRON, make_tiny_run, spin_megatron

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("it's a \"tiny\" run"))


@pytest.fixture(scope="module")
def undisturbed(config_path: Path) -> RunLayout:
    """A run of two iterations that nothing disturbs."""
    root = config_path.parent / "undisturbed run"
    result = spin_megatron("run", config_path, "--run-dir", root)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"The new Hugging Face model: {root / 'models' / 'theta_2'}" in result.stdout
    return RunLayout(root)


def weights(layout: RunLayout, theta: int) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(layout.theta(theta).glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_weights(first: RunLayout, second: RunLayout, theta: int) -> None:
    ours, theirs = weights(first, theta), weights(second, theta)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


def metrics(layout: RunLayout, iteration: int) -> list[dict]:
    return [json.loads(line) for line in layout.metrics(iteration).read_text(encoding="utf-8").splitlines()]


def test_every_iteration_starts_at_ln_2_with_margins_of_exactly_zero(undisturbed: RunLayout) -> None:
    for t in (0, 1):
        first = metrics(undisturbed, t)[0]
        assert first["margin"] == 0.0
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_training_raises_the_held_out_margin(undisturbed: RunLayout) -> None:
    evaluation = json.loads(undisturbed.evaluation(0).read_text(encoding="utf-8"))
    assert evaluation["margin"] > 0
    assert evaluation["loss"] < math.log(2)
    assert evaluation["ln2_minus_loss"] == pytest.approx(math.log(2) - evaluation["loss"], abs=1e-6)


def test_the_second_iteration_trains_on_the_pairs_of_both(undisturbed: RunLayout) -> None:
    made_in = {pair.made_in_iteration for pair in read_rows(undisturbed.train_pairs(1), SpinPair)}
    assert made_in == {0, 1}
    assert {pair.made_in_iteration for pair in read_rows(undisturbed.train_pairs(0), SpinPair)} == {0}


def test_each_theta_differs_from_the_one_before(undisturbed: RunLayout) -> None:
    for theta in (0, 1):
        before, after = weights(undisturbed, theta), weights(undisturbed, theta + 1)
        assert before.keys() == after.keys()
        assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_rerun_changes_no_byte(undisturbed: RunLayout, config_path: Path) -> None:
    def contents() -> dict[str, tuple[int, str]]:
        files = [path for path in undisturbed.root.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, digest_file(path)) for path in files}

    before = contents()
    assert spin_megatron("run", config_path, "--run-dir", undisturbed.root).returncode == 0
    assert contents() == before


def test_status_says_that_every_stage_is_done(undisturbed: RunLayout) -> None:
    result = spin_megatron("status", undisturbed.root, "--json")
    stages = json.loads(result.stdout)["stages"]
    assert len(stages) == 14
    assert {stage["state"] for stage in stages} == {"done"}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, f"the run ended with {process.returncode} before {what}"
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen")


def kill_while(condition: Callable[[], bool], command: list[str], what: str) -> None:
    """Start the run and kill -9 its launcher, and with it every rank, as soon as the condition holds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(condition, process, what)
    finally:
        process.kill()
        process.wait(timeout=60)


def test_killed_in_every_stage_and_with_two_shards_it_ends_with_the_same_weights(undisturbed: RunLayout, config_path: Path) -> None:
    root = config_path.parent / "killed run"
    layout = RunLayout(root)
    command = [*SPIN_MEGATRON, "run", str(config_path), "--run-dir", str(root), "--set", "generate.num_shards=2"]

    def working(stage: str, shard: int | None = None) -> bool:
        """The stage holds its lock: it is past its imports and at work (or, if it was very quick, done)."""
        ref = StageRef(stage, 0, shard)
        return layout.stage_lock(stage, 0, shard).exists() or layout.manifest(folder_of(layout, ref)).exists()

    kills: list[tuple[str, Callable[[], bool]]] = [
        ("export of theta_0", lambda: working("export")),
        ("prepare", lambda: working("prepare")),
        ("build-engine", lambda: working("build-engine")),
        ("an answered part of the second shard", lambda: any(layout.shard(0, 1).glob("part_*.parquet"))),
        ("merge", lambda: working("merge")),
        ("the reference phase", lambda: any(layout.reference(0).glob("*"))),
        ("the second update", lambda: layout.metrics(0).exists() and len(metrics(layout, 0)) >= 2),
        ("a checkpoint", lambda: any(layout.checkpoints(0).glob("*"))),
        ("export of theta_1", lambda: layout.theta(1).exists()),
        ("evaluate", lambda: working("evaluate")),
        ("an answered part", lambda: any(layout.shard(1, 0).glob("part_*.parquet"))),
        ("training of iteration 1", lambda: layout.metrics(1).exists() and len(metrics(layout, 1)) >= 3),
    ]
    for what, condition in kills:
        kill_while(condition, command, what)
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for t in (0, 1):
        assert read_rows(layout.train_pairs(t), SpinPair) == read_rows(undisturbed.train_pairs(t), SpinPair)
        assert_same_weights(layout, undisturbed, t + 1)


def test_a_stop_request_saves_exits_75_and_resumes_to_the_same_weights(undisturbed: RunLayout, config_path: Path) -> None:
    root = config_path.parent / "stopped run"
    layout = RunLayout(root)
    command = [*SPIN_MEGATRON, "run", str(config_path), "--run-dir", str(root), "--set", "run.iterations=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: layout.metrics(0).exists() and len(metrics(layout, 0)) >= 1, process, "the first update")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=300) == 75
    finally:
        process.kill()
    assert not layout.manifest(layout.train(0)).exists()
    steps_before = len(metrics(layout, 0))
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line["step"] for line in metrics(layout, 0)] == [line["step"] for line in metrics(undisturbed, 0)]
    assert steps_before < len(metrics(layout, 0))
    assert_same_weights(layout, undisturbed, 1)


def test_a_disk_that_fills_up_ends_training_with_3_and_the_next_attempt_with_the_same_weights(
    undisturbed: RunLayout, config_path: Path
) -> None:
    layout = RunLayout(config_path.parent / "full run")
    shutil.copytree(undisturbed.root, layout.root, symlinks=True)
    config, _ = open_run(layout.root)
    redo(config, layout, StageRef("train", 0))
    command = [*SPIN_MEGATRON, "train", "--run-dir", str(layout.root), "--iteration", "0"]
    # Room for logs, metrics and reference scores, but not for a checkpoint: weights and optimizer state are 0.8 MB a rank.
    full = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); os.execv(sys.argv[1], sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", full, *command], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 3, result.stdout + result.stderr
    assert "The disk is full" in result.stderr
    assert "goes on from the last whole file" in " ".join(result.stderr.split())
    assert not layout.manifest(layout.train(0)).exists()
    assert spin_megatron("train", "--run-dir", layout.root, "--iteration", "0").returncode == 0
    assert spin_megatron("export", "--run-dir", layout.root, "--iteration", "1").returncode == 0
    assert_same_weights(layout, undisturbed, 1)


def test_a_config_with_other_settings_does_not_touch_a_started_run(undisturbed: RunLayout, config_path: Path) -> None:
    result = spin_megatron("run", config_path, "--run-dir", undisturbed.root, "--set", "optimizer.learning_rate=0.5")
    assert result.returncode == 2
    assert "optimizer.learning_rate: 0.001 -> 0.5" in result.stderr


def test_a_stage_whose_input_is_missing_says_which_command_makes_it(config_path: Path) -> None:
    root = config_path.parent / "not far"
    result = spin_megatron("run", config_path, "--run-dir", root, "--set", "parallel.tensor=3")
    assert result.returncode == 2
    assert "parallel.tensor=3 does not divide model.num_heads=4" in result.stderr.replace("\n", " ")
    assert not root.exists()
