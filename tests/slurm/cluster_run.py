"""A run on the virtual nodes: started from a copy of the undisturbed one less some stages, watched, hit, and compared."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from spin_megatron.config import RunConfig
from spin_megatron.launch.slurm import read_jobs
from spin_megatron.pipeline import StageRef, folder_of, line, log_folder, made_in
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import read_manifest
from spin_megatron.run.records import SpinPair, read_rows
from tools.local_slurm.cluster import Cluster
from tools.local_slurm.processes import read_proc

REPOSITORY = Path(__file__).parents[2]
SPIN_ITER = REPOSITORY / "slurm" / "spin_iter.sh"
# Tensor 2 x data 2 on two nodes of two ranks; enough updates that a fault can fall between two of them.
SETTINGS = (
    "parallel.tensor=2",
    "parallel.pipeline=1",
    "parallel.data=2",
    "train.global_batch_pairs=4",
    "generate.num_shards=2",
    "generate.rows_per_part=4",
    "slurm.max_failures=8",
    "slurm.stages.train.nodes=2",
    "slurm.stages.train.ranks_per_node=2",
    "slurm.stages.train.slots=3",
    "slurm.stages.evaluate.nodes=2",
    "slurm.stages.evaluate.ranks_per_node=2",
)
WAIT_SECONDS = 420.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class ClusterRun:
    """One run directory and the cluster its jobs run on."""

    cluster: Cluster
    layout: RunLayout

    @property
    def config(self) -> RunConfig:
        return RunConfig.from_json(self.layout.run_json.read_text(encoding="utf-8"))

    def submit(self, *options: str) -> None:
        """`sbatch slurm/spin_iter.sh RUN_DIR`, and wait until that job submitted the chain."""
        before = len(self.job_ids())
        log = self.layout.root.parent / f"{self.layout.root.name} submission.log"
        words = ["sbatch", "--parsable", f"--output={log}", "--open-mode=append", str(SPIN_ITER), str(self.layout.root), *options]
        job = self.slurm(*words, cwd=REPOSITORY).strip()
        self.wait(lambda: self.job_state(job) in ("COMPLETED", "FAILED"), "the end of the job that submits")
        assert self.job_state(job) == "COMPLETED", log.read_text(encoding="utf-8")
        assert len(self.job_ids()) > before, log.read_text(encoding="utf-8")

    def slurm(self, *words: str, cwd: Path | None = None) -> str:
        """Run one of Slurm's programs, which must succeed; a question is asked again, as a loaded controller may not answer."""
        for _ in range(5 if words[0] == "squeue" or "show" in words else 1):
            result = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)
            if result.returncode == 0:
                break
            time.sleep(1)
        assert result.returncode == 0, f"{words}: {result.stderr}"
        return result.stdout

    def job_ids(self) -> list[str]:
        return [job.job_id for path in self.layout.all_slurm_jobs() for job in read_jobs(path)]

    def newest_job(self, link: str) -> str:
        """The array job of a link that was submitted last."""
        return [job.job_id for path in self.layout.all_slurm_jobs() for job in read_jobs(path) if job.link == link][-1]

    def job_state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ... of a job or array element (JOB_TASK)."""
        words = self.slurm("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith("JobState="))

    def fact(self, element: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.slurm("scontrol", "--oneliner", "show", "job", element).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def running(self, link: str) -> str | None:
        """The element of a link that runs now, as JOB_TASK."""
        listing = self.slurm("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i|%F")
        ours = [row.strip().split("|") for row in listing.splitlines()]
        newest = self.newest_job(link)
        return next((name for name, job in ours if job == newest), None)

    def queued(self) -> list[str]:
        """Rows of squeue of this run's jobs."""
        ids = set(self.job_ids())
        listing = self.slurm("squeue", "--noheader", "--array", "--format=%F|%i|%T|%r|%j")
        return [row.strip() for row in listing.splitlines() if row.strip().partition("|")[0] in ids]

    def is_done(self, ref: StageRef) -> bool:
        return read_manifest(folder_of(self.layout, ref)) is not None

    def is_complete(self) -> bool:
        return all(self.is_done(ref) for ref in line(self.config)) and not self.queued()

    def num_updates(self, iteration: int = 0) -> int:
        path = self.layout.metrics(iteration)
        return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0

    def num_attempts(self, ref: StageRef) -> int:
        return sum(1 for _ in log_folder(self.layout, ref).glob("attempt_*"))

    def wait(self, condition: Callable[[], bool], what: str, *, seconds: float = WAIT_SECONDS) -> None:
        """Wait, and let requeued jobs start without Slurm's delay."""
        deadline, hurried = time.monotonic() + seconds, 0.0
        while not condition():
            now = time.monotonic()
            assert now < deadline, f"{what} did not happen in {seconds:.0f} s\n{self.describe()}"
            if now - hurried > 1:
                hurried = now
                self._hurry()
            time.sleep(POLL_SECONDS)

    def _hurry(self) -> None:
        """Slurm lets a requeued job wait until its old credential has expired; here nothing is left of its old life."""
        listing = self.slurm("squeue", "--noheader", "--states=PENDING", "--format=%i|%r")
        for row in listing.splitlines():
            name, reason = row.strip().split("|")
            if reason == "BeginTime":
                subprocess.run(["scontrol", "update", f"jobid={name}", "starttime=now"], capture_output=True, timeout=60, check=False)

    def finish(self, *, seconds: float = WAIT_SECONDS) -> None:
        """Wait for the run's end; no one helps it."""
        self.wait(lambda: self.is_complete() or not self.queued(), "the end of the run", seconds=seconds)
        assert self.is_complete(), self.describe()

    def rank_pids(self, ref: StageRef, node: str | None = None) -> list[int]:
        """Processes of a stage's ranks, as srun started them, on one node or on all."""
        logs = os.fsencode(log_folder(self.layout, ref)) + b"/"  # of this shard and no other
        return self._pids(node, [b"spin_megatron.launch.rank", ref.name.encode()], logs)

    def supervisor_pids(self, link: str, node: str) -> list[int]:
        """The batch shell on a node, which has become the supervisor."""
        return self._pids(node, [b"spin_megatron.launch.supervise", link.encode()])

    def _pids(self, node: str | None, words: Sequence[bytes], logs: bytes = b"") -> list[int]:
        """Python processes whose command holds these words and this run's folder (srun's holds them too, behind its options)."""
        wanted = {*words, os.fsencode(self.layout.root)}
        commands = {pid: read_proc(pid, "cmdline").split(b"\0") for pid in self.cluster.step_pids(node)}
        python = {pid: command for pid, command in commands.items() if command[1:2] == [b"-m"]}
        return [pid for pid, command in python.items() if wanted <= set(command) and command[3].startswith(logs)]

    def wait_for_ranks(self, ref: StageRef, count: int = 1) -> list[int]:
        """Wait until a stage's ranks run; returns their processes."""
        self.wait(lambda: len(self.rank_pids(ref)) >= count, f"the start of {count} ranks of {ref}")
        return self.rank_pids(ref)

    def preempt(self, what: Callable[[], bool]) -> None:
        """Take every node for a moment from a partition of higher priority, until `what` says that it hit."""
        words = ["sbatch", "--parsable", "--partition=main", f"--nodes={len(self.cluster.node_states())}", "--exclusive"]
        job = self.slurm(*words, "--output=/dev/null", "--wrap=sleep 1").strip()
        try:
            self.wait(what, "preemption")
        finally:
            self.slurm("scancel", job)

    def nodes_of(self, element: str) -> list[str]:
        return self.slurm("scontrol", "show", "hostnames", self.fact(element, "NodeList")).split()

    def describe(self) -> str:
        """What a person would look at: the queue, the nodes, what failed, the ends of the logs."""
        parts = ["squeue:", *self.queued(), f"nodes: {self.cluster.node_states()}"]
        if self.layout.slurm_failures.exists():
            parts.append(self.layout.slurm_failures.read_text(encoding="utf-8"))
        for path in sorted(self.layout.root.glob("iter_*/logs/**/*.log"), key=lambda path: path.stat().st_mtime)[-8:]:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
            parts += [f"--- {path.relative_to(self.layout.root)}", *lines]
        return "\n".join(parts)


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    assert pids, "there is no process to signal"
    for pid in pids:
        os.kill(pid, number)


def fork(source: RunLayout, root: Path, *, removed: Sequence[str]) -> RunLayout:
    """A copy of a finished run as one of a single iteration that still has to run the named stages (`export` means theta_1)."""
    ignored = shutil.ignore_patterns("iter_1", "theta_2", "logs", "locks")
    shutil.copytree(source.root, root, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    layout = RunLayout(root)
    values = json.loads(layout.run_json.read_text(encoding="utf-8"))
    values["run"]["iterations"] = 1
    layout.run_json.write_text(json.dumps(values), encoding="utf-8")
    config = RunConfig.from_json(layout.run_json.read_text(encoding="utf-8"))
    for ref in line(config):
        if ref.name in removed and ref != StageRef("export", 0):
            shutil.rmtree(folder_of(layout, ref))
    return layout


def stop_file(layout: RunLayout, ref: StageRef) -> Path:
    return layout.stop_file(ref.name, made_in(ref), ref.shard)


def heartbeat(layout: RunLayout, ref: StageRef) -> Path:
    return layout.heartbeat(ref.name, made_in(ref), ref.shard)


def weights(layout: RunLayout, theta: int) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(layout.theta(theta).glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_result(run: RunLayout, expected: RunLayout, *, iterations: int) -> None:
    """The same pairs, and every weight the same to the last bit."""
    for t in range(iterations):
        assert read_rows(run.train_pairs(t), SpinPair) == read_rows(expected.train_pairs(t), SpinPair)
        ours, theirs = weights(run, t + 1), weights(expected, t + 1)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
