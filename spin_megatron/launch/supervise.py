"""The body of a Slurm batch job: `python -m spin_megatron.launch.supervise RUN_DIR LINK ITERATION`, on the job's first node.

Starts one process a rank with srun, and then decides from the manifest, never from srun's exit code (which is 0 when a node
died after the surviving ranks had ended). Exit codes: 0 the stage is done; 2, 3 as the stage said; 1 it failed too often.
Otherwise the job's own element is requeued, which keeps the jobs that wait for it waiting.

- SIGUSR1 (Slurm's notice before the time limit) becomes a stop file: rank 0 polls it between steps and tells all ranks. Signals
  themselves reach workers on some clusters and not on others.
- A heartbeat file that rank 0 stopped touching means a hung step: it is ended and counts as a failure.
"""

import contextlib
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
from spin_megatron.config_file import as_override
from spin_megatron.generation.engine import EXTERNAL
from spin_megatron.launch.failures import (
    MAX_SUBMISSION_FAILURES,
    count_barren,
    failures_in_a_row,
    job_log,
    last_error,
    progress_of,
    record_failure,
    record_stop,
    stop_reason,
    submission_name,
)
from spin_megatron.launch.local import BAD_INPUT, DONE, INCOMPLETE, STOPPED, new_attempt
from spin_megatron.launch.slurm import ADVANCE, active_jobs, run_slurm, submit
from spin_megatron.launch.started_run import changes, open_as_changed
from spin_megatron.pipeline import early_stop, inputs_of, missing_stages, newest_theta
from spin_megatron.run import manifest as manifests
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import StageIncomplete
from spin_megatron.run.telemetry import configure_logging
from spin_megatron.stage_table import STAGES, StageRef, folder_of, line, log_folder, made_in

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
    run_dir, link, iteration = sys.argv[1:] if argv is None else argv
    configure_logging(None)
    config, layout = open_as_changed(Path(run_dir))
    element = Element.from_environment()
    logger.info("%s %s: element %s, restart %d, on %s", link, iteration, element.name, element.restart, socket.gethostname())
    if link == ADVANCE:
        return advance(config, layout, element)
    ref = next((ref for ref in _refs(config, link, int(iteration)) if ref.shard in (None, element.task_id)), None)
    if ref is None:  # run.iterations was lowered while this job was waiting
        logger.info("the run ends before %s %s by now; nothing to do", link, iteration)
        return DONE
    return supervise(config, layout, ref, element)


def _refs(config: RunConfig, link: str, iteration: int) -> list[StageRef]:
    return [ref for ref in line(config) if (ref.name, ref.iteration) == (link, iteration)]


def advance(config: RunConfig, layout: RunLayout, element: Element) -> int:
    """Submit what is still missing; stop when the run is complete, or tried often enough."""
    missing = missing_stages(config, layout)
    if not missing:
        stop, theta = early_stop(config, layout), layout.theta(newest_theta(config, layout))
        logger.info("the run is %s: %s", "complete" if stop is None else f"stopped {stop.reason}", theta)
        return DONE
    name = submission_name(missing)
    try:
        others = active_jobs(layout).keys() - {element.name}
        other_slots = {name for name in others if name.partition("_")[0] == element.array_job_id}
        if other_slots and element.task_id:
            logger.info("the first slot goes on itself; nothing to do")
            return DONE
        if others == other_slots:
            count_barren(layout, missing, chain=element.array_job_id)
        if (reason := stop_reason(config, layout)) is not None:
            logger.error("stopped: %s", reason)
            return FAILED
        submit(config, layout, scripts=layout.slurm, own_job=element.array_job_id)
    except (ValueError, StageIncomplete) as error:  # a full queue, a controller that is away: wait, and come back
        record_failure(layout, name, job=element.name, restart=element.restart, reason=str(error))
        return FAILED if failures_in_a_row(layout, name) >= MAX_SUBMISSION_FAILURES else _requeue(element)
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
        record_failure(layout, ref, job=element.name, restart=element.restart, reason=step.failure(code))
        return code
    if step.was_stopped(code) or _is_preempted(element):
        logger.info("%s was stopped from outside; requeueing %s", ref, element.name)
        record_stop(layout, ref)
        return _requeue(element)
    reason = step.failure(code)
    record_failure(layout, ref, job=element.name, restart=element.restart, reason=reason)
    if failures + 1 >= config.slurm.max_failures:
        logger.error("%s failed %d times in a row; not tried again", ref, failures + 1)
        return FAILED
    return _requeue(element)


class _Step:
    """One srun step: its command, its signals, its heartbeat."""

    def __init__(self, config: RunConfig, layout: RunLayout, ref: StageRef, element: Element) -> None:
        names = (ref.name, made_in(ref), ref.shard)
        self._layout, self._ref, self._kept_before = layout, ref, progress_of(layout, ref)
        self._was_asked_to_stop = False
        self._hung = ""
        self._hang_seconds = config.slurm.hang_seconds
        # Stages that start over take their time in one piece (an export of 140 GB, a benchmark); Slurm's time limit ends those.
        self._beats = STAGES[ref.name].resumes
        self._stop_file, self._heartbeat = layout.stop_file(*names), layout.heartbeat(*names)
        self._last_beat, self._last_beat_seen = 0, time.monotonic()
        self._logs, self._job_log = new_attempt(log_folder(layout, ref)), job_log(layout, ref, element.name)
        self._words = step_command(config, layout, ref, self._logs)
        self._environment = dict(os.environ, MASTER_ADDR=_first_host(), MASTER_PORT=str(20000 + int(element.job_id) % 10000))

    def run(self) -> int:
        """Start the step and wait for it; srun's exit code."""
        self._stop_file.parent.mkdir(parents=True, exist_ok=True)
        self._stop_file.unlink(missing_ok=True)
        self._heartbeat.touch()
        previous = signal.signal(signal.SIGUSR1, self._ask_to_stop)
        try:
            process = subprocess.Popen(self._words, env=self._environment)
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL_SECONDS)
                self._watch(process)
        finally:
            signal.signal(signal.SIGUSR1, previous)
            self._stop_file.unlink(missing_ok=True)

    def _ask_to_stop(self, _number: int, _frame: object) -> None:
        self._was_asked_to_stop = True
        self._stop_file.touch()

    def was_stopped(self, code: int) -> bool:
        """Whether the ranks left because they were told to, and not for nothing: a life too short to keep anything is a failure."""
        if self._hung:
            return False
        # srun may have ended a rank that left a little later than the first, so its exit code says less than what was kept.
        return progress_of(self._layout, self._ref) != self._kept_before if self._was_asked_to_stop else code == STOPPED

    def failure(self, code: int) -> str:
        """Why this life of the stage came to nothing."""
        if self._was_asked_to_stop and code == STOPPED:
            name = self._ref.name
            return f"its time limit came before it had kept anything new; raise slurm.stages.{name}.time, or lower slurm.signal_seconds"
        return self._hung or f"exit code {code}: {last_error(self._logs, self._job_log)}"

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        if not self._beats:
            return
        beat = self._heartbeat.stat().st_mtime_ns
        if beat != self._last_beat:  # when it was seen, not what it says: a file server's clock is not this host's
            self._last_beat, self._last_beat_seen = beat, time.monotonic()
        silent_seconds = time.monotonic() - self._last_beat_seen
        if silent_seconds < self._hang_seconds:
            return
        self._hung = f"no progress for {silent_seconds:.0f} s: the step was ended"
        logger.error("%s", self._hung)
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

    SPIN_ENGINE_SRUN_OPTIONS holds the engine's container, SPIN_ENGINE_PYTHON what starts the interpreter in it, as shell-quoted words.
    """
    changed: dict[str, object] = {}
    if not config.generate.environment.launcher:
        # One node; the step's tasks share all that the job has, rather than a CPU each.
        shape = ["--nodes=1", "--ntasks={ranks}", "--ntasks-per-node={ranks}", "--cpu-bind=none", "--kill-on-bad-exit=1"]
        options = shlex.split(os.environ.get("SPIN_ENGINE_SRUN_OPTIONS", ""))
        # TensorRT-LLM's ranks meet through MPI; vLLM is one rank, which starts the others itself, and not every Slurm has pmix.
        mpi = "none" if config.generate.engine == "vllm" else "pmix"
        changed["launcher"] = ["srun", f"--mpi={mpi}", *shape, *options]
    words = shlex.split(os.environ.get("SPIN_ENGINE_PYTHON", ""))
    if words:
        changed |= {"prefix": words[:-1], "python": words[-1]}
    return [as_override(f"generate.environment.{name}", value) for name, value in changed.items()]


def srun_command(config: RunConfig, layout: RunLayout, ref: StageRef, logs: Path) -> list[str]:
    """The srun line of a stage: one process a rank. env.sh: SPIN_SRUN_OPTIONS a container, SPIN_RANK_PYTHON what starts Python."""
    settings = config.slurm.of(ref.name)
    words = ["srun", "--kill-on-bad-exit=1", "--wait=60", "--label", f"--nodes={settings.nodes}"]
    words += [f"--ntasks-per-node={settings.ranks_per_node}", f"--cpus-per-task={settings.cpus_per_rank}"]
    words += shlex.split(os.environ.get("SPIN_SRUN_OPTIONS", ""))
    words += shlex.split(os.environ.get("SPIN_RANK_PYTHON") or shlex.quote(sys.executable))
    return words + _rank_words(config, layout, ref, logs)


def _rank_words(config: RunConfig, layout: RunLayout, ref: StageRef, logs: Path) -> list[str]:
    """The arguments of the Python of a rank."""
    words = ["-m", "spin_megatron.launch.rank", str(logs), ref.name, "--run-dir", str(layout.root), "--iteration", str(ref.iteration)]
    if ref.shard is not None:
        words += ["--shard", str(ref.shard)]
    return words + [word for change in changes(config, layout) for word in ("--set", change)]


def _first_host() -> str:
    """Rank 0's host: the first of the job's list, the only one all ranks agree on beforehand."""
    result = run_slurm(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], is_repeatable=True)
    hosts = result.stdout.split()
    if not hosts:
        raise ValueError(f"scontrol named no host of {os.environ['SLURM_JOB_NODELIST']!r}: {result.stderr.strip()}")
    return hosts[0]


def _is_preempted(element: Element) -> bool:
    """Whether Slurm is taking the nodes away: it ends the step first, and this process a grace time later."""
    result = run_slurm(["scontrol", "show", "job", element.job_id], is_repeatable=True)
    facts = dict(word.partition("=")[::2] for word in result.stdout.split())
    return facts.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")


def _requeue(element: Element) -> int:
    """Requeue this element alone and wait for Slurm to end it."""
    result = run_slurm(["scontrol", "requeue", element.name], is_repeatable=True)
    if result.returncode:
        logger.error("scontrol requeue %s: %s; the run's last link will submit it anew", element.name, result.stderr.strip())
        return FAILED
    time.sleep(END_SECONDS)
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())
