"""The loop on a real Slurm: undisturbed, and with the faults of a real cluster; each run ends with the same pairs and weights."""

import shutil
from pathlib import Path

import pytest

from spin_megatron.pipeline import StageRef
from spin_megatron.run.layout import RunLayout
from tests.slurm.cluster_run import ClusterRun, assert_same_result
from tools.local_slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]


def test_two_iterations_on_two_nodes_end_with_the_weights_of_a_local_run(
    cluster: Cluster, undisturbed: RunLayout, tmp_path: Path
) -> None:
    root = tmp_path / "it's a \"cluster\" run"
    root.mkdir()
    shutil.copy(undisturbed.run_json, root)
    run = ClusterRun(cluster, RunLayout(root))
    run.submit()
    run.finish(seconds=1800)
    assert_same_result(run.layout, undisturbed, iterations=2)
    # One chain an iteration, and no stage needed a second attempt.
    assert len(run.job_ids()) == 9 + 7
    assert {run.num_attempts(StageRef("train", t)) for t in (0, 1)} == {1}
