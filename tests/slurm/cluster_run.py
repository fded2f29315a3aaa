"""A run on the virtual nodes: started from a copy of the undisturbed one less some stages, watched, hit, and compared."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from spin_megatron.config import RunConfig
from spin_megatron.launch.slurm import read_jobs
from spin_megatron.pipeline import missing_stages
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import read_manifest
from spin_megatron.run.records import SpinPair, read_rows
from spin_megatron.stage_table import StageRef, folder_of, line, log_folder, made_in
from tools.local_slurm.cluster import Cluster
from tools.local_slurm.processes import read_proc

REPOSITORY = Path(__file__).parents[2]
SPIN_ITER = REPOSITORY / "slurm" / "spin_iter.sh"
# Tensor 2 x data 2 on two nodes of two ranks; enough updates that a fault can fall between two of them, a checkpoint every second.
SETTINGS = (
    "parallel.tensor=2",
    "parallel.pipeline=1",
    "parallel.data=2",
    "train.global_batch_pairs=4",
    "train.schedule_epochs=1",
    "generate.num_shards=2",
    "generate.rows_per_part=4",
    "slurm.max_failures=8",
    "slurm.stages.train.nodes=2",
    "slurm.stages.train.ranks_per_node=2",
    "slurm.stages.train.slots=3",
    "slurm.stages.evaluate.nodes=2",
    "slurm.stages.evaluate.ranks_per_node=2",
)
WAIT_SECONDS = 300.0
POLL_SECONDS = 0.05
HURRY_SECONDS = 0.25
CREDENTIAL_SECONDS = 1.1


@dataclass(frozen=True)
class ClusterRun:
    """One run directory and the cluster its jobs run on."""

    cluster: Cluster
    layout: RunLayout
    waiting_since: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        return RunConfig.model_validate_json(self.layout.run_json.read_text(encoding="utf-8"))

    def submit(self, *options: str, target: Path | None = None) -> int:
        """`sbatch slurm/spin_iter.sh RUN_DIR`, and wait until that job has ended well; returns how many jobs it submitted."""
        before = len(self.job_ids())
        log = self.layout.root.parent / f"{self.layout.root.name} submission.log"
        pattern = str(log).replace("%", "%%")
        words = ["sbatch", "--parsable", f"--output={pattern}", "--open-mode=append", str(SPIN_ITER), str(target or self.layout.root)]
        job = self.slurm(*words, *options, cwd=REPOSITORY).strip()
        self.wait(lambda: self.job_state(job) in ("COMPLETED", "FAILED"), "the end of the job that submits")
        assert self.job_state(job) == "COMPLETED", log.read_text(encoding="utf-8")
        return len(self.job_ids()) - before

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

    def newest_job(self, link: str, iteration: int = 0) -> str:
        """The array job of a link that was submitted last."""
        jobs = [job for path in self.layout.all_slurm_jobs() for job in read_jobs(path)]
        return [job.job_id for job in jobs if (job.link, job.iteration) == (link, iteration)][-1]

    def job_state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ... of a job or array element (JOB_TASK)."""
        words = self.slurm("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith("JobState="))

    def fact(self, element: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.slurm("scontrol", "--oneliner", "show", "job", element).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def running(self, ref: StageRef) -> str | None:
        """The element of a stage that runs now, as JOB_TASK."""
        listing = self.slurm("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i|%F")
        ours = [row.strip().split("|") for row in listing.splitlines()]
        newest = self.newest_job(ref.name, ref.iteration)
        return next((name for name, job in ours if job == newest and ref.shard in (None, int(name.partition("_")[2]))), None)

    def queued(self) -> list[str]:
        """Rows of squeue of this run's jobs."""
        ids = set(self.job_ids())
        listing = self.slurm("squeue", "--noheader", "--array", "--format=%F|%i|%T|%r|%j")
        return [row.strip() for row in listing.splitlines() if row.strip().partition("|")[0] in ids]

    def is_done(self, ref: StageRef) -> bool:
        return read_manifest(folder_of(self.layout, ref)) is not None

    def is_complete(self) -> bool:
        return not missing_stages(self.config, self.layout) and not self.queued()

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
            if now - hurried > HURRY_SECONDS:
                hurried = now
                self._hurry()
            time.sleep(POLL_SECONDS)

    def _hurry(self) -> None:
        """Slurm lets a requeued job wait until what is left of its old life has surely gone; here it may start once it has."""
        listing = self.slurm("squeue", "--noheader", "--states=PENDING", "--format=%A|%i|%r")
        waiting = [row.strip().split("|") for row in listing.splitlines() if row.strip().endswith("|BeginTime")]
        daemons = b"".join(read_proc(pid, "cmdline") for pid in self.cluster.step_pids()) if waiting else b""
        since = {name: self.waiting_since.get(name, time.monotonic()) for _, name, _ in waiting}
        self.waiting_since.clear()
        self.waiting_since.update(since)
        for job, name, _ in waiting:
            # Credentials are revoked by the second; a step daemon that still clears its control group would kill the new life too.
            if time.monotonic() - since[name] > CREDENTIAL_SECONDS and f"[{job}.".encode() not in daemons:
                subprocess.run(["scontrol", "update", f"jobid={name}", "starttime=now"], capture_output=True, timeout=60, check=False)

    def finish(self, *, seconds: float = WAIT_SECONDS) -> None:
        """Wait for the run's end; no one helps it."""
        self.wait(lambda: self.is_complete() or not self.queued(), "the end of the run", seconds=seconds)
        assert self.is_complete(), self.describe()

    def rank_pids(self, ref: StageRef, element: str, node: str | None = None) -> list[int]:
        """Processes of a stage's ranks in an element (JOB_TASK), rank 0 first, as srun started them, on one node or on all."""
        logs = os.fsencode(log_folder(self.layout, ref)) + b"/"  # of this shard and no other
        pids = _of_element(element, self._pids(node, [b"spin_megatron.launch.rank", ref.name.encode()], logs))
        return sorted(pids, key=lambda pid: int(_environment(pid).get(b"SLURM_PROCID", 0)))

    def shell_pids(self, element: str) -> list[int]:
        """The batch shell of an element (JOB_TASK), which has become the supervisor."""
        return _of_element(element, self._pids(None, [b"spin_megatron.launch.supervise"]))

    def _pids(self, node: str | None, words: Sequence[bytes], logs: bytes = b"") -> list[int]:
        """Python processes whose command holds these words and this run's folder (srun's holds them too, behind its options)."""
        wanted = {*words, os.fsencode(self.layout.root)}
        commands = {pid: read_proc(pid, "cmdline").split(b"\0") for pid in self.cluster.step_pids(node)}
        python = {pid: command for pid, command in commands.items() if command[1:2] == [b"-m"]}
        return [pid for pid, command in python.items() if wanted <= set(command) and command[3].startswith(logs)]

    def wait_for_ranks(self, ref: StageRef, count: int = 1) -> str:
        """Wait until a stage's ranks run, not those of an element that is being ended; returns their element, as JOB_TASK."""
        found: list[str] = []

        def is_running() -> bool:
            element = self.running(ref)
            if element is not None and len(self.rank_pids(ref, element)) >= count:
                found.append(element)
            return bool(found)

        self.wait(is_running, f"the start of {count} ranks of {ref}")
        return found[0]

    def catch(self, *refs: StageRef, count: int = 1) -> list[str]:
        """Stop (SIGSTOP) each stage's ranks as soon as they run, so that a fault finds them unfinished; returns their elements."""
        caught: dict[StageRef, str] = {}

        def has_caught_all() -> bool:
            for ref in refs:
                element = None if ref in caught else self.running(ref)
                if element is not None and len(pids := self.rank_pids(ref, element)) >= count:
                    signal_all(pids, signal.SIGSTOP)
                    caught[ref] = element
            return len(caught) == len(refs)

        self.wait(has_caught_all, f"the start of {', '.join(map(str, refs))}")
        return [caught[ref] for ref in refs]

    def preempt(self, what: Callable[[], bool]) -> None:
        """Take every node for a moment from a partition of higher priority, until `what` says that it hit."""
        words = ["sbatch", "--parsable", "--partition=main", f"--nodes={len(self.cluster.node_states())}", "--exclusive"]
        job = self.slurm(*words, "--output=/dev/null", "--wrap=true").strip()
        try:
            self.wait(what, "preemption")
        finally:
            self.slurm("scancel", job)

    def requeue(self, element: str) -> None:
        """What a person or an administrator does; waits until the new life is counted."""
        before = self.restarts(element)
        self.slurm("scontrol", "requeue", element)
        self.wait(lambda: self.restarts(element) > before, f"the requeue of {element}")

    def preempt_element(self, element: str) -> None:
        before = self.restarts(element)
        self.preempt(lambda: self.restarts(element) > before)

    def restarts(self, element: str) -> int:
        return int(self.fact(element, "Restarts"))

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


def _environment(pid: int) -> dict[bytes, bytes]:
    return dict(word.partition(b"=")[::2] for word in read_proc(pid, "environ").split(b"\0"))


def _of_element(element: str, pids: Sequence[int]) -> list[int]:
    """Those of the processes that Slurm started for an array element (JOB_TASK)."""
    job, _, task = element.partition("_")
    wanted = {b"SLURM_ARRAY_JOB_ID": job.encode(), b"SLURM_ARRAY_TASK_ID": task.encode()}
    return [pid for pid in pids if wanted.items() <= _environment(pid).items()]


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    assert pids, "there is no process to signal"
    for pid in pids:
        os.kill(pid, number)


def fork(source: RunLayout, root: Path, *, removed: Sequence[str], tasks: Sequence[str] = ()) -> RunLayout:
    """A copy of a finished run as one of a single iteration that has yet to run the named stages (`export`: theta_1) and tasks."""
    ignored = shutil.ignore_patterns("iter_1", "theta_2", "logs", "locks", "slurm", "slurm_jobs.json")
    shutil.copytree(source.root, root, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    layout = RunLayout(root)
    for file in (layout.run_json, layout.changes_json):
        values = json.loads(file.read_text(encoding="utf-8"))
        values.get("run", {})["iterations"] = 1
        values.get("evaluate", {})["lm_eval_tasks"] = list(tasks)
        file.write_text(json.dumps(values), encoding="utf-8")
    config = RunConfig.model_validate_json(layout.run_json.read_text(encoding="utf-8"))
    for ref in line(config):
        if ref.name in removed and (ref != StageRef("export", 0) or "export 0" in removed):
            shutil.rmtree(folder_of(layout, ref))
    return layout


def stop_file(layout: RunLayout, ref: StageRef) -> Path:
    return layout.stop_file(ref.name, made_in(ref), ref.shard)


def weights(layout: RunLayout, theta: int) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(layout.theta(theta).glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_result(run: RunLayout, expected: RunLayout, *, iterations: int) -> None:
    """The same pairs, and every weight the same to the last bit."""
    for t in range(iterations):
        assert read_rows(run.train_pairs(t), SpinPair) == read_rows(expected.train_pairs(t), SpinPair)
        ours, theirs = weights(run, t + 1), weights(expected, t + 1)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
