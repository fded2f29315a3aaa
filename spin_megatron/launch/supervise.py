"""The body of a Slurm batch job: `python -m spin_megatron.launch.supervise RUN_DIR LINK ITERATION`, on the job's first node.

Starts one process a rank with srun, and then decides from the manifest, never from srun's exit code (which is 0 when a node
died after the surviving ranks had ended). Exit codes: 0 the stage is done; 2, 3 as the stage said; 1 it failed too often.
Otherwise the job's own element is requeued, which keeps the jobs that wait for it waiting.

- SIGUSR1 (Slurm's notice before the time limit) becomes a stop file: rank 0 polls it between steps and tells all ranks. Signals
  themselves reach workers on some clusters and not on others.
- A heartbeat file that rank 0 stopped touching means a hung step: it is ended and counts as a failure.
"""

import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from spin_megatron.config import RunConfig
from spin_megatron.generation.engine import EXTERNAL
from spin_megatron.launch.local import BAD_INPUT, DONE, INCOMPLETE, STOPPED, new_attempt
from spin_megatron.launch.loop import changes, open_run
from spin_megatron.launch.slurm import ADVANCE, chain, num_done, run_slurm, submit
from spin_megatron.pipeline import STAGES, StageRef, folder_of, inputs_of, line, log_folder, made_in
from spin_megatron.run import manifest as manifests
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import StageIncomplete
from spin_megatron.run.telemetry import configure_logging

logger = logging.getLogger(__name__)

FAILED = 1
POLL_SECONDS = 1.0
# How long a requeued element waits for Slurm to end it, and a hung step for its processes to go.
END_SECONDS = 120.0


@dataclass(frozen=True)
class Element:
    """This job's array element."""

    job_id: str
    array_job_id: str
    task_id: int
    restart: int

    @classmethod
    def from_environment(cls) -> "Element":
        job_id = os.environ["SLURM_JOB_ID"]
        task_id, restart = os.environ.get("SLURM_ARRAY_TASK_ID", "0"), os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(job_id, os.environ.get("SLURM_ARRAY_JOB_ID", job_id), int(task_id), int(restart))

    @property
    def name(self) -> str:
        """Requeueing the plain job id of an array's last element would rerun the whole array."""
        return f"{self.array_job_id}_{self.task_id}"


def main(argv: list[str] | None = None) -> int:
    """Run the link this job is for."""
    # Until a step runs, Slurm's notice has nothing to save; its default action would end this process without a word.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    run_dir, link, iteration = sys.argv[1:] if argv is None else argv
    configure_logging(None)
    layout = RunLayout(Path(run_dir))
    overrides = json.loads(layout.slurm_overrides.read_text(encoding="utf-8"))
    config, layout = open_run(Path(run_dir), overrides)
    element = Element.from_environment()
    logger.info("%s %s: element %s, restart %d, on %s", link, iteration, element.name, element.restart, socket.gethostname())
    if link == ADVANCE:
        return advance(config, layout, element)
    ref = next(ref for ref in _refs(config, link, int(iteration)) if ref.shard in (None, element.task_id))
    return supervise(config, layout, ref, element)


def _refs(config: RunConfig, link: str, iteration: int) -> list[StageRef]:
    shards: list[int | None] = list(range(config.generate.num_shards)) if link == "generate" else [None]
    return [StageRef(name, iteration, shard) for name in STAGES if name == link for shard in shards]


def advance(config: RunConfig, layout: RunLayout, element: Element) -> int:
    """Submit what is still missing; stop when the run is complete or several chains in a row finished nothing."""
    if not chain(config, layout):
        logger.info("the run is complete: %s", layout.theta(config.run.iterations))
        return DONE
    seen = json.loads(layout.slurm_progress.read_text(encoding="utf-8"))
    done = num_done(config, layout)
    barren = 0 if done > seen["done"] else seen["barren"] + 1
    manifests.write_json(layout.slurm_progress, {"done": done, "barren": barren})
    if barren >= config.slurm.max_failures:
        logger.error("%d chains in a row finished no stage; stopped. See: spin-megatron status %r", barren, str(layout.root))
        return FAILED
    submit(config, layout, overrides=json.loads(layout.slurm_overrides.read_text(encoding="utf-8")), own_job=element.array_job_id)
    return DONE


def supervise(config: RunConfig, layout: RunLayout, ref: StageRef, element: Element) -> int:
    """Run one stage under srun and see that it gets done."""
    if manifests.read_manifest(folder_of(layout, ref)) is not None:
        logger.info("%s is done; nothing to do", ref)
        return DONE
    try:
        inputs_of(config, layout, ref)
    except StageIncomplete as error:  # not this stage's failure; the run's last link submits what is missing
        logger.error("%s", error)
        return INCOMPLETE
    failures = failures_in_a_row(layout, ref)
    if failures >= config.slurm.max_failures:
        logger.error("%s failed %d times in a row; not tried again. Mend the cause, then submit the run again", ref, failures)
        return FAILED
    step = _Step(config, layout, ref, element)
    code = step.run()
    if manifests.read_manifest(folder_of(layout, ref)) is not None:
        return DONE
    if code in (BAD_INPUT, INCOMPLETE):
        record_failure(layout, ref, element, f"exit code {code}: {last_error(step.logs)}")
        return code
    if not step.hung and (step.was_asked_to_stop or code == STOPPED or _is_preempted(element)):
        logger.info("%s was stopped from outside; requeueing %s", ref, element.name)
        record_stop(layout, ref)
        return _requeue(element)
    record_failure(layout, ref, element, step.hung or f"exit code {code}: {last_error(step.logs)}")
    if failures + 1 >= config.slurm.max_failures:
        logger.error("%s failed %d times in a row; not tried again", ref, failures + 1)
        return FAILED
    return _requeue(element)


class _Step:
    """One srun step: its command, its signals, its heartbeat."""

    def __init__(self, config: RunConfig, layout: RunLayout, ref: StageRef, element: Element) -> None:
        names = (ref.name, made_in(ref), ref.shard)
        self.was_asked_to_stop = False
        self.hung = ""
        self._hang_seconds = config.slurm.hang_seconds
        # Stages that start over take their time in one piece (an export of 140 GB, a benchmark); Slurm's time limit ends those.
        self._beats = STAGES[ref.name].resumes
        self._stop_file, self._heartbeat = layout.stop_file(*names), layout.heartbeat(*names)
        self.logs = new_attempt(log_folder(layout, ref))
        self._words = step_command(config, layout, ref, self.logs)
        self._environment = dict(os.environ, MASTER_ADDR=_first_host(), MASTER_PORT=str(20000 + int(element.job_id) % 10000))

    def run(self) -> int:
        """Start the step and wait for it; srun's exit code."""
        self._stop_file.parent.mkdir(parents=True, exist_ok=True)
        self._stop_file.unlink(missing_ok=True)
        self._heartbeat.touch()
        previous = signal.signal(signal.SIGUSR1, self._ask_to_stop)
        try:
            process = subprocess.Popen(self._words, env=self._environment)
            while process.poll() is None:
                self._watch(process)
                time.sleep(POLL_SECONDS)
            return process.returncode
        finally:
            signal.signal(signal.SIGUSR1, previous)
            self._stop_file.unlink(missing_ok=True)

    def _ask_to_stop(self, _number: int, _frame: object) -> None:
        self.was_asked_to_stop = True
        self._stop_file.touch()

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        if not self._beats:
            return
        silent_seconds = time.time() - self._heartbeat.stat().st_mtime
        if silent_seconds < self._hang_seconds:
            return
        self.hung = f"no progress for {silent_seconds:.0f} s: the step was ended"
        logger.error("%s", self.hung)
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def step_command(config: RunConfig, layout: RunLayout, ref: StageRef, logs: Path) -> list[str]:
    """What runs a stage: srun with one process a rank, or, for an engine of another environment, its driver in this batch shell."""
    if ref.name in ("build-engine", "generate") and config.generate.engine in EXTERNAL:
        # The driver starts the engine's own step, and a step inside a step would wait for what the outer one holds.
        words = ["env", "SLURM_PROCID=0", "SLURM_NTASKS=1", "SLURM_LOCALID=0", sys.executable]
        return words + _rank_words(config, layout, ref, logs) + [word for change in engine_changes(config) for word in ("--set", change)]
    return srun_command(config, layout, ref, logs)


def engine_changes(config: RunConfig) -> list[str]:
    """[generate.environment] of a Slurm job, as --set options: srun is the launcher unless the config names one, env.sh adds the rest.

    SPIN_ENGINE_SRUN_OPTIONS holds the engine's container, SPIN_ENGINE_PYTHON the interpreter in it.
    """
    changed: dict[str, object] = {}
    if not config.generate.environment.launcher:
        # One node; the step's tasks share all that the job has, rather than a CPU each.
        shape = ["--nodes=1", "--ntasks={ranks}", "--ntasks-per-node={ranks}", "--cpu-bind=none", "--kill-on-bad-exit=1"]
        options = shlex.split(os.environ.get("SPIN_ENGINE_SRUN_OPTIONS", ""))
        changed["launcher"] = ["srun", "--mpi=pmix", *shape, *options]
    if os.environ.get("SPIN_ENGINE_PYTHON"):
        changed["python"] = os.environ["SPIN_ENGINE_PYTHON"]
    return [f"generate.environment.{name}={json.dumps(value)}" for name, value in changed.items()]


def srun_command(config: RunConfig, layout: RunLayout, ref: StageRef, logs: Path) -> list[str]:
    """The srun line of a stage: one process a rank. SPIN_SRUN_OPTIONS (env.sh) holds a container's options, SPIN_RANK_PYTHON its Python."""
    settings = config.slurm.of(ref.name)
    words = ["srun", "--kill-on-bad-exit=1", "--wait=60", "--label", f"--nodes={settings.nodes}"]
    words += [f"--ntasks-per-node={settings.ranks_per_node}", f"--cpus-per-task={settings.cpus_per_rank}"]
    words += shlex.split(os.environ.get("SPIN_SRUN_OPTIONS", ""))
    return [*words, os.environ.get("SPIN_RANK_PYTHON") or sys.executable, *_rank_words(config, layout, ref, logs)]


def _rank_words(config: RunConfig, layout: RunLayout, ref: StageRef, logs: Path) -> list[str]:
    """The arguments of the Python of a rank."""
    words = ["-m", "spin_megatron.launch.rank", str(logs), ref.name, "--run-dir", str(layout.root), "--iteration", str(ref.iteration)]
    if ref.shard is not None:
        words += ["--shard", str(ref.shard)]
    return words + [word for change in changes(config, layout) for word in ("--set", change)]


def _first_host() -> str:
    """Rank 0's host: the first of the job's list, the only one all ranks agree on beforehand."""
    result = run_slurm(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]])
    hosts = result.stdout.split()
    if not hosts:
        raise ValueError(f"scontrol named no host of {os.environ['SLURM_JOB_NODELIST']!r}: {result.stderr.strip()}")
    return hosts[0]


def _is_preempted(element: Element) -> bool:
    """Whether Slurm is taking the nodes away: it ends the step first, and this process a grace time later."""
    result = run_slurm(["scontrol", "show", "job", element.job_id])
    facts = dict(word.partition("=")[::2] for word in result.stdout.split())
    return facts.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")


def _requeue(element: Element) -> int:
    """Requeue this element alone and wait for Slurm to end it."""
    result = run_slurm(["scontrol", "requeue", element.name])
    if result.returncode:
        logger.error("scontrol requeue %s: %s; the run's last link will submit it anew", element.name, result.stderr.strip())
        return FAILED
    time.sleep(END_SECONDS)
    return STOPPED


def record_failure(layout: RunLayout, ref: StageRef, element: Element, reason: str) -> None:
    """Keep a failed try on disk, for the cap and for `status`."""
    logger.error("%s failed: %s", ref, reason)
    event = {"event": "failed", "ref": str(ref), "job": element.name, "restart": element.restart, "reason": reason}
    _append(layout, {**event, "progress": progress_of(layout, ref)})


def record_stop(layout: RunLayout, ref: StageRef) -> None:
    """A planned stop ends a row of failures."""
    _append(layout, {"event": "stopped", "ref": str(ref)})


def _append(layout: RunLayout, event: dict[str, object]) -> None:
    text = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **event}) + "\n"
    with manifests.exclusive(layout.lock), open(layout.slurm_failures, "a", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def progress_of(layout: RunLayout, ref: StageRef) -> str:
    """What a stage that resumes has kept so far (parts, checkpoints), as a digest; it changes only when the stage got further."""
    if not STAGES[ref.name].resumes:
        return ""
    folder = folder_of(layout, ref)
    kept = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if not path.name.startswith(".")]
    return manifests.digest_values(sorted(str(path.relative_to(folder)) for path in kept))


def failures_in_a_row(layout: RunLayout, ref: StageRef) -> int:
    """How often a stage failed without getting any further, since its last planned stop or the last submission by a person."""
    count, progress = 0, None
    for event in read_events(layout):
        if event["event"] == "submitted" or (event["event"] == "stopped" and event["ref"] == str(ref)):
            count = 0
        elif event["event"] == "failed" and event["ref"] == str(ref):
            count = count + 1 if event.get("progress") == progress else 1
            progress = event.get("progress")
    return count


def read_events(layout: RunLayout) -> list[dict[str, str]]:
    """The events of failures.jsonl, oldest first; a line cut short by a crash is passed over."""
    if not layout.slurm_failures.exists():
        return []
    events = []
    for text in layout.slurm_failures.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return events


def last_error(logs: Path) -> str:
    """The last error in an attempt's logs, or what its absence means."""
    return last_logged_error(logs) or "no error was logged: the process was killed from outside, or its node died"


def last_logged_error(logs: Path) -> str | None:
    """The message of the last error line of an attempt; where a traceback follows it, the exception."""
    found = None
    for path in sorted(logs.glob("*.log")):
        in_traceback = False
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if " ERROR " in text:
                found, in_traceback = text.partition(" ERROR ")[2], False
            elif text.startswith("Traceback "):
                in_traceback = True
            elif in_traceback and text and not text.startswith(" "):
                found, in_traceback = text, False
    return found


def stop_reason(config: RunConfig, layout: RunLayout) -> str | None:
    """Why the run is not tried any further, and what to do; None while it is."""
    advice = f"mend the cause, then: bash slurm/spin_iter.sh {str(layout.root)!r}"
    for ref in line(config):
        if manifests.read_manifest(folder_of(layout, ref)) is None and failures_in_a_row(layout, ref) >= config.slurm.max_failures:
            reason = [event["reason"] for event in read_events(layout) if event["ref"] == str(ref) and event["event"] == "failed"][-1]
            return f"{ref} failed {config.slurm.max_failures} times in a row, last: {reason}; {advice}"
    if layout.slurm_progress.exists():
        barren = json.loads(layout.slurm_progress.read_text(encoding="utf-8"))["barren"]
        if barren >= config.slurm.max_failures:
            return f"{barren} chains of jobs in a row finished no stage; {advice}"
    return None


if __name__ == "__main__":
    sys.exit(main())
