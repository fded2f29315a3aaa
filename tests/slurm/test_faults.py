"""What a cluster does to a run: each fault falls on a running stage of a real Slurm, and the result is the undisturbed one.

Several faults share a run, one after the other, because every restart costs the start of Python on each rank.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from spin_megatron.pipeline import StageRef
from spin_megatron.run.layout import RunLayout
from tests.slurm.cluster_run import REPOSITORY, SPIN_ITER, ClusterRun, assert_same_result, fork, heartbeat, signal_all, stop_file
from tests.slurm.conftest import SmallDisk
from tools.local_slurm.cluster import Cluster

# Minutes more than the rest of the suite has room for.
only_when_asked = pytest.mark.skipif(not os.environ.get("SPIN_SLURM_ALL"), reason="long: set SPIN_SLURM_ALL=1 to run it")
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400), only_when_asked]

TRAIN = StageRef("train", 0)
SHARDS = (StageRef("generate", 0, 0), StageRef("generate", 0, 1))
PREEMPTABLE = ("--set", "slurm.partition=preempt")
LONG_AGO_SECONDS = 7200.0


def next_attempt(run: ClusterRun, ref: StageRef, number: int) -> None:
    run.wait(lambda: run.num_attempts(ref) >= number, f"attempt {number} of {ref}")


def node_down(run: ClusterRun, node: str) -> None:
    """The node's processes die, and Slurm is told, as it would find out itself after its time-out."""
    run.cluster.kill_node(node)
    run.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def training(run: ClusterRun) -> str:
    """The slot that trains, once its four ranks run. A requeued slot waits, and the next one goes on in its place."""
    run.wait_for_ranks(TRAIN, 4)
    element = run.running("train")
    assert element is not None, run.describe()
    return element


def ended(run: ClusterRun, element: str) -> bool:
    """Whether this life of the element is over."""
    return run.running("train") != element


def test_training_survives_every_fault_with_the_same_weights(cluster: Cluster, undisturbed: RunLayout, tmp_path: Path) -> None:
    run = ClusterRun(cluster, fork(undisturbed, tmp_path / "run", removed=("train", "export")))
    run.submit(*PREEMPTABLE)

    # Preemption: the slot is requeued by Slurm.
    element = training(run)
    run.preempt(lambda: int(run.fact(element, "Restarts")) >= 1)

    # kill -9 of a rank between two updates: the step ends, the supervisor requeues its own element.
    element = training(run)
    run.wait(lambda: run.num_updates() >= 1, "the first update")
    signal_all(run.rank_pids(TRAIN)[-1:], signal.SIGKILL)
    run.wait(lambda: ended(run, element), "the requeue after a killed rank")

    # The time limit: Slurm's notice becomes a stop file; all ranks save and leave.
    element = training(run)
    run.wait(lambda: run.num_updates() >= 3, "the third update")
    ranks = run.rank_pids(TRAIN)
    signal_all(ranks, signal.SIGSTOP)
    run.slurm("scancel", "--batch", "--signal=USR1", element)
    run.wait(stop_file(run.layout, TRAIN).exists, "the stop file")
    signal_all(ranks, signal.SIGCONT)
    run.wait(lambda: ended(run, element), "the requeue after the time limit")
    saved = run.num_updates()

    # A node dies and is back before Slurm misses it: srun would wait for ever, the watchdog ends the step.
    element = training(run)
    first, second = run.nodes_of(element)
    signal_all(run.rank_pids(TRAIN, first), signal.SIGSTOP)
    cluster.kill_node(second)
    cluster.start_node(second, forget_jobs=False)
    os.utime(heartbeat(run.layout, TRAIN), times=(0, heartbeat(run.layout, TRAIN).stat().st_mtime - LONG_AGO_SECONDS))
    run.wait(lambda: ended(run, element), "the requeue after the watchdog")
    assert run.num_updates() >= saved, "what was saved at the time limit is kept"

    # kill -9 of the batch shell: this slot is lost, the next one goes on.
    element = training(run)
    signal_all(run.supervisor_pids("train", run.nodes_of(element)[0]), signal.SIGKILL)
    run.wait(lambda: ended(run, element), "the end of the slot")

    # A node goes down for good.
    element = training(run)
    node = run.nodes_of(element)[1]
    node_down(run, node)
    run.wait(lambda: ended(run, element), "the requeue after a lost node")
    cluster.start_node(node)

    # A person requeues it.
    element = training(run)
    run.slurm("scontrol", "requeue", element)

    run.finish()
    assert_same_result(run.layout, undisturbed, iterations=1)


def test_generation_survives_every_fault_with_the_same_pairs(cluster: Cluster, undisturbed: RunLayout, tmp_path: Path) -> None:
    """Training is kept from the undisturbed run: `finish` finds it stale unless the pairs are the same to the last byte."""
    run = ClusterRun(cluster, fork(undisturbed, tmp_path / "run", removed=("generate", "merge")))
    first, second = SHARDS

    # Two people start it at once: one chain is submitted.
    words = ["bash", str(SPIN_ITER), str(run.layout.root), *PREEMPTABLE]
    both = [subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert len(run.job_ids()) == 3
    array = run.newest_job("generate")

    # kill -9 of an element's process, and a person who requeues the other element.
    signal_all(run.wait_for_ranks(first), signal.SIGKILL)
    run.wait_for_ranks(second)
    run.slurm("scontrol", "requeue", f"{array}_1")
    run.wait(lambda: all(int(run.fact(f"{array}_{shard}", "Restarts")) >= 1 for shard in (0, 1)), "both restarts")

    # A node goes down under one element; the batch shell of the other is killed, which loses that element.
    run.wait_for_ranks(first)
    (node,) = run.nodes_of(f"{array}_0")
    node_down(run, node)
    run.wait(lambda: int(run.fact(f"{array}_0", "Restarts")) >= 2, "the requeue after a lost node")
    cluster.start_node(node)
    if not run.is_done(second):
        run.wait_for_ranks(second)
        signal_all(run.supervisor_pids("generate", run.nodes_of(f"{array}_1")[0]), signal.SIGKILL)

    # The last link finds what is missing and submits it again: there, preemption.
    run.wait(lambda: run.newest_job("generate") != array, "a new chain for the lost element")
    array = run.newest_job("generate")
    run.wait_for_ranks(second)
    run.preempt(lambda: int(run.fact(f"{array}_1", "Restarts")) >= 1)

    # A person cancels all of it, and starts it again later.
    run.wait_for_ranks(second)
    run.slurm("scancel", *run.job_ids())
    run.wait(lambda: not run.queued(), "the end of cancelled jobs")
    run.submit(*PREEMPTABLE)

    run.finish()
    assert_same_result(run.layout, undisturbed, iterations=1)


def test_every_other_stage_survives_a_requeue(cluster: Cluster, undisturbed: RunLayout, tmp_path: Path) -> None:
    run = ClusterRun(cluster, fork(undisturbed, tmp_path / "run", removed=("build-engine", "merge", "export", "evaluate")))
    run.submit()
    for ref in (StageRef("build-engine", 0), StageRef("merge", 0), StageRef("export", 1), StageRef("evaluate", 0)):
        run.wait_for_ranks(ref, 4 if ref.name == "evaluate" else 1)
        element = run.running(ref.name)
        assert element is not None
        run.slurm("scontrol", "requeue", element)
        next_attempt(run, ref, 2)
    run.finish()
    assert_same_result(run.layout, undisturbed, iterations=1)


def test_a_full_disk_and_a_read_only_log_folder_end_the_jobs_and_spoil_nothing(
    cluster: Cluster, undisturbed: RunLayout, small_disk: SmallDisk
) -> None:
    run = ClusterRun(cluster, fork(undisturbed, small_disk.root, removed=("generate", "merge")))

    def submission() -> subprocess.CompletedProcess[str]:
        words = ["bash", str(SPIN_ITER), str(run.layout.root), "--set", 'slurm.options=["--hold"]']
        return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=REPOSITORY, check=False)

    # Read-only at submission: refused, with the folder's name, before a job exists.
    subprocess.run(["mount", "-o", "remount,ro", small_disk.logs], check=True, timeout=30)
    refused = submission()
    subprocess.run(["mount", "-o", "remount,rw", small_disk.logs], check=True, timeout=30)
    assert refused.returncode == 2
    assert str(small_disk.logs) in refused.stderr.replace("\n", "")
    assert run.job_ids() == []

    # Read-only when the jobs start: they end without having run.
    assert submission().returncode == 0
    jobs = run.job_ids()
    subprocess.run(["mount", "-o", "remount,ro", small_disk.logs], check=True, timeout=30)
    run.slurm("scontrol", "release", *jobs)
    run.wait(lambda: not run.queued(), "the end of jobs that cannot write their log")
    subprocess.run(["mount", "-o", "remount,rw", small_disk.logs], check=True, timeout=30)
    assert not any(run.is_done(ref) for ref in SHARDS)

    # The disk fills while a shard runs: its jobs end; once there is room it is submitted again.
    run.submit("--set", "slurm.max_failures=1")
    run.wait_for_ranks(SHARDS[0])
    filler = small_disk.root.parent / "filler"
    with open(filler, "wb", buffering=0) as handle, pytest.raises(OSError, match="No space left"):
        while True:
            handle.write(bytes(2**16))
    run.wait(lambda: not run.queued(), "the end of jobs on a full disk")
    assert not run.is_complete()
    filler.unlink()
    run.submit()

    run.finish()
    assert_same_result(run.layout, undisturbed, iterations=1)
