"""The loop on a real Slurm that nothing disturbs: two iterations on two nodes of two ranks, tensor 2 x data 2."""

from pathlib import Path

import pytest

from spin_megatron.config import RunConfig
from spin_megatron.launch.slurm import read_jobs
from spin_megatron.pipeline import StageRef, line, log_folder
from spin_megatron.run.layout import RunLayout
from tests.slurm.cluster_run import assert_same_result, fork
from tests.tiny_run import spin_megatron

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_each_iteration_is_one_chain_in_which_no_stage_needs_a_second_attempt(undisturbed: RunLayout) -> None:
    chains = [[job.link for job in read_jobs(undisturbed.slurm_jobs(t))] for t in (0, 1)]
    every = ["build-engine", "generate", "merge", "train", "export", "evaluate", "advance"]
    assert chains == [["export", "prepare", *every], every]
    config = RunConfig.from_json(undisturbed.run_json.read_text(encoding="utf-8"))
    attempts = {str(ref): sum(1 for _ in log_folder(undisturbed, ref).glob("attempt_*")) for ref in line(config)}
    assert attempts == {str(ref): 1 for ref in line(config)}


def test_training_on_this_machine_without_slurm_ends_with_the_same_weights(undisturbed: RunLayout, tmp_path: Path) -> None:
    layout = fork(undisturbed, tmp_path / "run", removed=("train", "export"))
    for ref in (StageRef("train", 0), StageRef("export", 1)):
        result = spin_megatron(ref.name, "--run-dir", layout.root, "--iteration", str(ref.iteration), timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
    assert_same_result(layout, undisturbed, iterations=1)
