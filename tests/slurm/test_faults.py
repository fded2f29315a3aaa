"""What a cluster does to a run: each fault falls on a running stage of a real Slurm, and the result is the undisturbed one.

Several faults share a run, one after the other, because every restart costs the start of Python on each rank.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spin_megatron.convert.saved_checkpoint import COMPLETE_NAME
from spin_megatron.launch.failures import read_events
from spin_megatron.launch.slurm import read_jobs
from spin_megatron.launch.started_run import open_as_changed, remember_changes
from spin_megatron.report.status import read_queue, stage_rows, why_stopped
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.lock import Owner, held
from spin_megatron.stage_table import StageRef, log_folder
from tests.slurm.cluster_run import REPOSITORY, SPIN_ITER, ClusterRun, assert_same_result, fork, signal_all, stop_file
from tests.slurm.conftest import SmallDisk
from tools.local_slurm.cluster import Cluster
from tools.local_slurm.processes import is_alive

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

TRAIN = StageRef("train", 0)
SHARDS = (StageRef("generate", 0, 0), StageRef("generate", 0, 1))
PREEMPTABLE = ("--set", "slurm.partition=preempt")
LONG_AGO_SECONDS = 7200.0


def node_down(run: ClusterRun, node: str) -> None:
    """The node's processes die, and Slurm is told, as it would find out itself after its time-out."""
    run.cluster.kill_node(node)
    run.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def age(path: Path) -> None:
    """As if a file that is touched every few seconds had not been for hours."""
    os.utime(path, times=(0, path.stat().st_mtime - LONG_AGO_SECONDS))


def set_hang_seconds(run: ClusterRun, seconds: int) -> None:
    """For the elements that start from now on. An old heartbeat would not do: a step hangs when its heartbeat stands still."""
    config, layout = open_as_changed(run.layout.root)
    slurm = config.slurm.model_copy(update={"hang_seconds": seconds})
    remember_changes(config.model_copy(update={"slurm": slurm}), layout, sections=("slurm",))


def is_shown(run: ClusterRun, element: str) -> bool:
    """Whether `status` shows that the training runs, and where; a busy controller may leave it without an answer once."""
    row = next(row for row in stage_rows(run.config, run.layout, read_queue(run.layout)) if row["stage"] == "train")
    return row["state"] == "running" and {"id": element, "state": "RUNNING"} in row["jobs"]


def training(run: ClusterRun) -> str:
    """The slot that trains, once its four ranks run. A requeued slot waits, and the next one goes on in its place."""
    return run.wait_for_ranks(TRAIN, 4)


def wait_for_end(run: ClusterRun, element: str, what: str) -> None:
    """Wait until this life of the element is over."""
    run.wait(lambda: run.running(TRAIN) != element, f"the end of the slot after {what}")


def test_training_survives_killed_ranks_and_shells_and_lost_nodes(cluster: Cluster, undisturbed: RunLayout, tmp_path: Path) -> None:
    run = ClusterRun(cluster, fork(undisturbed, tmp_path / "run", removed=("train", "export")))
    run.submit()

    # kill -9 of a rank between two updates: the step ends, the supervisor requeues its own element.
    element = training(run)
    run.wait(lambda: run.num_updates() >= 1, "the first update")
    *others, last = run.rank_pids(TRAIN, element)
    signal_all([*others, last], signal.SIGSTOP)
    run.wait(lambda: is_shown(run, element), "a view that shows the job and that it runs")
    signal_all([last], signal.SIGKILL)
    signal_all(others, signal.SIGCONT)
    wait_for_end(run, element, "a killed rank")

    # kill -9 of the batch shell: this slot is lost, the next one goes on.
    element = training(run)
    set_hang_seconds(run, 20)  # of the slot that starts next
    signal_all(run.shell_pids(element), signal.SIGKILL)
    wait_for_end(run, element, "a killed batch shell")

    # A node dies and is back before Slurm misses it: srun would wait for ever, the watchdog ends the step.
    element = training(run)
    set_hang_seconds(run, 3600)
    first, second = run.nodes_of(element)
    signal_all(run.rank_pids(TRAIN, element, first), signal.SIGSTOP)
    cluster.kill_node(second)
    cluster.start_node(second, forget_jobs=False)
    wait_for_end(run, element, "the watchdog")

    # A node goes down for good.
    element = training(run)
    node = run.nodes_of(element)[1]
    node_down(run, node)
    wait_for_end(run, element, "a lost node")
    cluster.start_node(node)

    run.finish()
    assert_same_result(run.layout, undisturbed, iterations=1)


def hold_until_gone(pid: int) -> None:
    """Keep a process from doing anything until it is killed. Slurm continues stopped ones when it asks them to end."""
    while is_alive(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(0.002)


def test_training_goes_on_after_a_time_limit_whether_or_not_it_could_save(cluster: Cluster, undisturbed: RunLayout, tmp_path: Path) -> None:
    """Slurm itself sends the notice and ends the job: the end of the running job's time is moved here, and nothing else is done."""
    run = ClusterRun(cluster, fork(undisturbed, tmp_path / "run", removed=("train", "export")))
    run.submit()

    # The notice: a stop file, all ranks save after the step they are in, and the element requeues itself.
    element = training(run)
    run.wait(lambda: run.num_updates() >= 1, "the first update")
    ranks = run.rank_pids(TRAIN, element)
    signal_all(ranks, signal.SIGSTOP)
    made = run.num_updates()
    run.slurm("scontrol", "update", f"jobid={element}", f"endtime=now+{run.config.slurm.signal_seconds + 10}")
    run.wait(stop_file(run.layout, TRAIN).exists, "Slurm's notice of the time limit")
    signal_all(ranks, signal.SIGCONT)
    run.wait(lambda: run.restarts(element) == 1, "the element that requeues itself")
    saved = newest_checkpoint(run)
    assert saved in (made, made + 1), "the update that was under way is in the checkpoint, and no other was begun"
    assert [event["event"] for event in read_events(run.layout) if event["ref"] == "train 0"] == ["stopped"], "no failure"

    # The limit itself, before anything could be saved: the job is over, the next slot goes on from the newest checkpoint.
    element = training(run)
    first = run.rank_pids(TRAIN, element)[0]
    run.wait(lambda: run.num_updates() > saved, "an update after the checkpoint")
    signal_all([first], signal.SIGSTOP)
    run.slurm("scontrol", "update", f"jobid={element}", "endtime=now+1")
    hold_until_gone(first)
    kept = newest_checkpoint(run)
    run.wait(lambda: run.job_state(element) == "TIMEOUT", "Slurm's end of the job")
    shown = next(row for row in stage_rows(run.config, run.layout) if row["stage"] == "train")
    assert "DUE TO TIME LIMIT" in shown["last_error"]
    # The lock of a job that died on another node is taken over a minute after its last touch.
    with contextlib.suppress(FileNotFoundError):
        age(run.layout.stage_lock("train", 0, None))
    run.finish()
    resumed = [path.read_text(encoding="utf-8") for path in log_folder(run.layout, TRAIN).glob("attempt_*/rank_0_*.log")]
    assert any(f"after {kept} steps" in text for text in resumed)
    assert_same_result(run.layout, undisturbed, iterations=1)


def newest_checkpoint(run: ClusterRun) -> int:
    """The step of the newest one that is whole."""
    return max(int(path.parent.name.removeprefix("step_")) for path in run.layout.checkpoints(0).glob(f"step_*/{COMPLETE_NAME}"))


def test_generation_survives_every_fault(cluster: Cluster, undisturbed: RunLayout, tmp_path: Path) -> None:
    run = ClusterRun(cluster, fork(undisturbed, tmp_path / "run", removed=("generate", "merge", "train", "export")))
    first, second = SHARDS

    # Two people start it at once: one chain is submitted.
    words = ["bash", str(SPIN_ITER), str(run.layout.root), *PREEMPTABLE]
    both = [subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert [job.link for job in read_jobs(run.layout.slurm_jobs(0))] == ["generate", "merge", "train", "export", "advance"]
    array = run.newest_job("generate")

    # kill -9 of an element's process, and a person who requeues the other element.
    run.catch(first, second)
    signal_all(run.rank_pids(first, f"{array}_0"), signal.SIGKILL)
    run.requeue(f"{array}_1")
    run.wait(lambda: run.restarts(f"{array}_0") >= 1, "the requeue after a killed process")

    # The batch shell of one element is killed, which loses that element; a node goes down under the other.
    run.catch(first, second)
    signal_all(run.shell_pids(f"{array}_1"), signal.SIGKILL)
    run.wait(lambda: run.job_state(f"{array}_1") == "FAILED", "the end of an element whose batch shell is gone")
    (node,) = run.nodes_of(f"{array}_0")
    node_down(run, node)
    run.wait(lambda: run.restarts(f"{array}_0") >= 2, "the requeue after a lost node")
    cluster.start_node(node)

    # The link that goes on is killed too, while it submits what is missing: its second slot does it.
    slot = f"{run.newest_job('advance')}_0"
    with held(run.layout.submit_lock, Owner.this_process(), what="the submission", stale_seconds=60, wait_seconds=60):
        run.wait(lambda: bool(run.shell_pids(slot)), "the link that goes on")
        signal_all(run.shell_pids(slot), signal.SIGKILL)
    # Its five links are recorded one by one.
    run.wait(lambda: len(read_jobs(run.layout.slurm_jobs(0))) >= 10, "a new chain for the lost element")
    array = run.newest_job("generate")
    chain = [job.array for job in read_jobs(run.layout.slurm_jobs(0))][5:]
    assert chain == ["1%8", "0-0", "0-2%1", "0-0", "0-1%1"], "only what was lost, and what waits for it"

    # There, preemption; then a person cancels the element, and starts the run again while its chain is still queued, and later.
    run.preempt_element(*run.catch(second))
    run.slurm("scancel", *run.catch(second))
    assert run.submit(*PREEMPTABLE) in (0, 5), "nothing while jobs are under way, a chain afterwards"

    run.finish()
    assert_same_result(run.layout, undisturbed, iterations=1)


STAND_IN = """
import json, sys
from pathlib import Path
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
results = {"results": {arguments["--tasks"]: {"acc,none": 0.5}}, "n-shot": {}}
(Path(arguments["--output_path"]) / "results.json").write_text(json.dumps(results))
"""


def install_stand_in(folder: Path) -> Path:
    """A folder for PYTHONPATH that holds a stand-in for lm-evaluation-harness, whose real one needs more than this machine may have."""
    for name, text in (("lm_eval/__main__.py", STAND_IN), ("lm_eval-0.4.9.dist-info/METADATA", "Name: lm-eval\nVersion: 0.4.9\n")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_every_stage_survives_a_requeue_and_preemption(
    cluster: Cluster, undisturbed: RunLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = ("export 0", "prepare", "build-engine", "merge", "train", "export", "evaluate")
    run = ClusterRun(cluster, fork(undisturbed, tmp_path / "run", removed=removed, tasks=("first", "second")))
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{install_stand_in(tmp_path / 'stand in')}")
    run.submit(*PREEMPTABLE)
    refs = [StageRef("export", 0), StageRef("prepare"), StageRef("build-engine", 0), StageRef("merge", 0)]
    for ref in (*refs, TRAIN, StageRef("export", 1), StageRef("evaluate", 0), StageRef("benchmark", 0, 1)):
        num_ranks = 4 if ref.name in ("train", "evaluate") else 1
        for disturb in (run.requeue, run.preempt_element):
            disturb(*run.catch(ref, count=num_ranks))
    run.finish()
    assert_same_result(run.layout, undisturbed, iterations=1)


def test_a_stage_that_always_fails_ends_the_run_at_its_cap_and_says_why(
    cluster: Cluster, undisturbed: RunLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ClusterRun(cluster, fork(undisturbed, tmp_path / "run", removed=("generate", "merge")))
    monkeypatch.setenv("SPIN_RANK_PYTHON", f"{sys.executable} -S")  # finds nothing that is installed
    run.submit("--set", "slurm.max_failures=2")
    run.wait(lambda: not run.queued(), "the end of a run that cannot go on")
    assert len(run.job_ids()) == 3, "one chain"
    reason = why_stopped(*open_as_changed(run.layout.root))
    assert reason is not None
    assert reason.startswith("generate 0 shard 0 failed 2 times in a row, last: exit code 1: ")
    assert "No module named" in reason

    monkeypatch.delenv("SPIN_RANK_PYTHON")
    run.submit()
    run.finish()
    assert_same_result(run.layout, undisturbed, iterations=1)


def test_a_full_disk_and_a_read_only_log_folder_end_the_jobs_and_spoil_nothing(
    cluster: Cluster, undisturbed: RunLayout, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
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

    # Read-only when the jobs start: they end without having run. A cluster owner's partition is that of every job.
    monkeypatch.setenv("SBATCH_PARTITION", "preempt")
    assert submission().returncode == 0
    jobs = run.job_ids()
    assert [run.fact(job, "Partition") for job in jobs] == ["preempt"] * 3
    subprocess.run(["mount", "-o", "remount,ro", small_disk.logs], check=True, timeout=30)
    run.slurm("scontrol", "release", *jobs)
    run.wait(lambda: not run.queued(), "the end of jobs that cannot write their log")
    subprocess.run(["mount", "-o", "remount,rw", small_disk.logs], check=True, timeout=30)
    assert not any(run.is_done(ref) for ref in SHARDS)

    # The disk fills while a shard runs: its jobs end; once there is room it is submitted again.
    # What a submission sets holds for the next ones too, so this one gives it back.
    run.submit("--set", "slurm.max_failures=1", "--set", "slurm.options=[]")
    run.wait_for_ranks(SHARDS[0])
    filler = small_disk.root.parent / "filler"
    with open(filler, "wb", buffering=0) as handle, pytest.raises(OSError, match="No space left"):
        while True:
            handle.write(bytes(2**16))
    run.wait(lambda: not run.queued(), "the end of jobs on a full disk")
    assert not run.is_complete()
    filler.unlink()
    reason = why_stopped(*open_as_changed(run.layout.root))
    assert reason is not None
    assert "generate 0 shard" in reason
    assert "disk is full" in reason
    run.submit("--set", "slurm.max_failures=3")

    run.finish()
    assert_same_result(run.layout, undisturbed, iterations=1)
