"""The loop on a real Slurm that nothing disturbs: two iterations on two nodes of two ranks, tensor 2 x data 2."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spin_megatron.config import RunConfig
from spin_megatron.launch.slurm import read_jobs
from spin_megatron.run.layout import RunLayout
from spin_megatron.stage_table import StageRef, line, log_folder
from tests.slurm.cluster_run import REPOSITORY, SPIN_ITER, ClusterRun, assert_same_result, fork
from tests.tiny_run import make_tiny_run, spin_megatron
from tools.local_slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_each_iteration_is_one_chain_in_which_no_stage_needs_a_second_attempt(undisturbed: RunLayout) -> None:
    chains = [[job.link for job in read_jobs(undisturbed.slurm_jobs(t))] for t in (0, 1)]
    every = ["build-engine", "generate", "merge", "train", "export", "evaluate", "advance"]
    assert chains == [["export", "prepare", *every], every]
    config = RunConfig.model_validate_json(undisturbed.run_json.read_text(encoding="utf-8"))
    attempts = {str(ref): sum(1 for _ in log_folder(undisturbed, ref).glob("attempt_*")) for ref in line(config)}
    assert attempts == {str(ref): 1 for ref in line(config)}


def test_training_on_this_machine_without_slurm_ends_with_the_same_weights(undisturbed: RunLayout, tmp_path: Path) -> None:
    layout = fork(undisturbed, tmp_path / "run", removed=("train", "export"))
    for ref in (StageRef("train", 0), StageRef("export", 1)):
        result = spin_megatron(ref.name, "--run-dir", layout.root, "--iteration", str(ref.iteration), timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
    assert_same_result(layout, undisturbed, iterations=1)


KILLING_SBATCH = """#!/bin/sh
{sbatch} "$@" && kill -KILL $PPID
"""


def test_a_submission_that_is_killed_right_behind_an_sbatch_leaves_no_job_to_be_submitted_twice(
    cluster: Cluster, tmp_path: Path
) -> None:
    config, run = make_tiny_run(tmp_path / "it's a run"), ClusterRun(cluster, RunLayout(tmp_path / "it's a run" / "run"))
    settings = ["--set", "parallel.pipeline=1", "--set", 'slurm.options=["--hold"]']
    words = ["bash", str(SPIN_ITER), str(config), "--run-dir", str(run.layout.root), *settings]

    def submission(path: str) -> int:
        environment = os.environ | {"PATH": path}
        return subprocess.run(words, env=environment, capture_output=True, timeout=120, cwd=REPOSITORY, check=False).returncode

    killing = tmp_path / "killing" / "sbatch"
    killing.parent.mkdir()
    killing.write_text(KILLING_SBATCH.format(sbatch=shutil.which("sbatch")), encoding="utf-8")
    killing.chmod(0o755)
    assert submission(f"{killing.parent}:{os.environ['PATH']}") == -signal.SIGKILL
    assert run.job_ids() == [], "a job is queued, and nothing says so"
    try:
        for _ in range(2):
            assert submission(os.environ["PATH"]) == 0
            listing = run.slurm("squeue", "--noheader", "--format=%Z|%j").splitlines()
            ours = sorted(row.partition("|")[2] for row in listing if row.startswith(f"{run.layout.root}|"))
            assert ours == ["spin-tiny-advance-0", "spin-tiny-export-0"]
        assert [job.link for job in read_jobs(run.layout.slurm_jobs(0))] == ["export", "advance"]
    finally:
        run.slurm("scancel", *run.job_ids())


def slurm_local(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(REPOSITORY / "tools" / "slurm_local.py"), arguments[0], "--dir", str(cluster.root), *arguments[1:]]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_the_tool_shows_kills_and_starts_the_nodes_of_a_cluster(cluster: Cluster) -> None:
    assert slurm_local(cluster, "env").stdout == f"export SLURM_CONF={cluster.conf}\n"
    assert "n4" in slurm_local(cluster, "exec", "--", "sinfo", "--noheader", "--format=%n").stdout.split()
    assert slurm_local(cluster, "node-kill", "n4").returncode == 0
    shown = slurm_local(cluster, "status", "--json")
    assert (shown.returncode, json.loads(shown.stdout)["pids"]["slurmd-n4"]) == (1, None)
    assert slurm_local(cluster, "node-start", "n4").stdout == "n4: back\n"
    shown = slurm_local(cluster, "status")
    assert (shown.returncode, shown.stdout.partition(" ")[0]) == (0, "usable")
    refused = slurm_local(cluster, "up", "--nodes", "2")
    assert (refused.returncode, refused.stderr) == (2, "slurm_local: already up with other options: run `down` first\n")
    assert slurm_local(cluster, "node-kill", "n9").returncode == 2
