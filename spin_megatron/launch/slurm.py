"""`spin-megatron submit`: an iteration as Slurm job arrays, from wherever the run stands.

    once: export theta_0, prepare; then for the first iteration that is not complete
    build-engine -> generate (array over missing shards) -> merge -> train (array of slots, one at a time)
    -> export -> evaluate -> benchmark (array over missing tasks) -> advance (two slots, one at a time)

Each link is submitted only while its manifest is missing and waits for the one before. Links after an array use `afterany`,
the others `afterok`: an element's exit code says whether its manifest exists, because launch/supervise.py makes it so, never
what srun returned. The last link, `advance`, runs however the others ended: it submits what is still missing, or the next
iteration, or stops when the run is complete, a rule of [stop] fired or the failure cap is reached; its second slot stands in
for a first one that was killed. The array index is a shard, a task or a slot, never the iteration.
"""

import argparse
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from spin_megatron.config import RunConfig
from spin_megatron.config_sections import SlurmStageSection, StageName
from spin_megatron.launch.failures import record_submission
from spin_megatron.launch.resources import check_resources
from spin_megatron.launch.started_run import open_or_start, remember_changes
from spin_megatron.pipeline import LOCK_STALE_SECONDS, early_stop, missing_stages, redo, require_all_current
from spin_megatron.run import manifest as manifests
from spin_megatron.run.children import ended_with_parent
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.lock import Owner, held
from spin_megatron.run.manifest import StageIncomplete
from spin_megatron.stage_table import STAGES, StageRef, line, log_folder, made_in

logger = logging.getLogger(__name__)

ADVANCE = "advance"
ADVANCE_ARRAY = "0-1%1"
# The one file a cluster owner edits, the batch body, and the way in; copied into the run directory at submission.
SCRIPTS = ("env.sh", "stage.sh", "spin_iter.sh")
DEFAULT_SCRIPTS = Path(__file__).resolve().parents[2].joinpath("slurm")  # of the project, not of a run

# A busy controller times out, and a queue may be full for a while. The pause doubles.
TRIES, PAUSE_SECONDS, ANSWER_SECONDS = 5, 5.0, 120.0
LOCK_WAIT_SECONDS = 300.0


@dataclass(frozen=True)
class Link:
    """One job array of the chain. refs: the stages its elements run; empty for `advance`."""

    name: str
    iteration: int
    array: str
    refs: tuple[StageRef, ...]
    after_any: bool

    def job_name(self, run_name: str) -> str:
        return f"{_job_prefix(run_name)}{self.name}-{self.iteration}"


def _job_prefix(run_name: str) -> str:
    """What the names of a run's jobs begin with; link and iteration follow."""
    return f"spin-{run_name}-"


@dataclass(frozen=True)
class SubmittedJob:
    """A line of slurm_jobs.json. user: the number of who submitted it; "" of earlier versions."""

    job_id: str
    link: str
    iteration: int
    array: str
    user: str = ""


def command(arguments: argparse.Namespace) -> int:
    """Handle the verb: start the run if need be, and submit its chain."""
    redone = StageRef.parse(arguments.redo) if arguments.redo else None
    if arguments.dry_run and redone is not None:
        raise ValueError(f"--dry-run moves nothing, so it cannot show what follows --redo {arguments.redo}; leave one of them out.")
    config, layout = open_or_start(arguments, is_trial=arguments.dry_run)
    if arguments.dry_run:
        _require_current(config, layout)
        for words in dry_run(config, layout):
            print(shlex.join(words))  # noqa: T201 (the answer of the command)
    else:
        submit(config, layout, scripts=arguments.scripts or DEFAULT_SCRIPTS, redone=redone)
    return 0


def chain(config: RunConfig, layout: RunLayout) -> list[Link]:
    """The links of the first iteration that is not complete; empty when the run is, or when a rule of [stop] ended it."""
    missing = missing_stages(config, layout)
    if not missing:
        return []
    iteration = min(made_in(ref) for ref in missing)
    links: list[Link] = []
    for name, t in dict.fromkeys((ref.name, ref.iteration) for ref in missing if made_in(ref) == iteration):
        refs = tuple(ref for ref in missing if (ref.name, ref.iteration) == (name, t))
        links.append(Link(name, t, _array(config, refs), refs, _after_any(name, links)))
    return [*links, Link(ADVANCE, iteration, ADVANCE_ARRAY, (), after_any=True)]


def _array(config: RunConfig, refs: Sequence[StageRef]) -> str:
    """Generate and benchmark: what is missing of them; train: interchangeable slots, one at a time; else one element."""
    settings = config.slurm.of(refs[0].name)
    numbers = [ref.shard for ref in refs if ref.shard is not None]
    if numbers:
        return f"{_ranges(numbers)}%{settings.max_parallel}"
    if refs[0].name == "train":
        return f"0-{settings.slots - 1}%1"
    return "0-0"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as sbatch writes them: 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _after_any(name: StageName, links: Sequence[Link]) -> bool:
    """Behind an array some elements may fail and others make up for it; the link's own guard finds out. A benchmark needs no evaluation."""
    return bool(links) and (links[-1].name in ("generate", "train") or name == "benchmark")


def sbatch_command(config: RunConfig, layout: RunLayout, link: Link, *, after: str | None) -> list[str]:
    """The sbatch line of a link. after: the job it waits for."""
    stage: StageName = link.refs[0].name if link.refs else "merge"
    settings = config.slurm.of(stage)
    logs = slurm_log_folder(layout, link)
    words = ["sbatch", "--parsable", f"--job-name={link.job_name(config.run.name)}", f"--array={link.array}"]
    if after is not None:
        words.append(f"--dependency={'afterany' if link.after_any else 'afterok'}:{after}")
    words += ["--kill-on-invalid-dep=yes", "--requeue", "--open-mode=append", f"--signal=B:USR1@{config.slurm.signal_seconds}"]
    folder = str(logs).replace("%", "%%")  # a % of the path itself is no pattern
    words += [f"--output={folder}/slurm_%A_%a.log", f"--chdir={layout.root}"]
    words += _resources(config, settings if link.refs else SlurmStageSection(time="00:30:00", partition=settings.partition))
    return [*words, str(layout.slurm / "stage.sh"), str(layout.slurm), str(layout.root), link.name, str(link.iteration)]


def slurm_log_folder(layout: RunLayout, link: Link) -> Path:
    """Where the batch shells of a link write."""
    return log_folder(layout, replace(link.refs[0], shard=None)) if link.refs else layout.logs(link.name, link.iteration)


def _resources(config: RunConfig, settings: SlurmStageSection) -> list[str]:
    words = [f"--nodes={settings.nodes}", f"--ntasks-per-node={settings.ranks_per_node}", f"--cpus-per-task={settings.cpus_per_rank}"]
    words.append(f"--time={settings.time}")
    if settings.gpus_per_node:
        words.append(f"--gpus-per-node={settings.gpus_per_node}")
    if settings.memory is not None:
        words.append(f"--mem={settings.memory}")
    partition = settings.partition or config.slurm.partition
    if partition is not None:
        words.append(f"--partition={partition}")
    if config.slurm.account is not None:
        words.append(f"--account={config.slurm.account}")
    return words + config.slurm.options + settings.options


def dry_run(config: RunConfig, layout: RunLayout) -> list[list[str]]:
    """Every sbatch line of the chain as it would be submitted now; job ids are named by their link."""
    check_resources(config)
    commands = []
    after = None
    for link in chain(config, layout):
        commands.append(sbatch_command(config, layout, link, after=after))
        after = f"<job of {link.name} {link.iteration}>"
    return commands


def submit(
    config: RunConfig,
    layout: RunLayout,
    *,
    scripts: Path = DEFAULT_SCRIPTS,
    own_job: str | None = None,
    redone: StageRef | None = None,
) -> list[SubmittedJob]:
    """Submit the chain of the first iteration that is not complete; or, behind jobs that nothing goes on from, its last link alone.

    Args:
        scripts: folder of env.sh and stage.sh; they are copied into the run directory.
        own_job: the job this runs in, which does not count as one that is under way; absent when a person submits.
        redone: a stage to be moved aside before, with what was made from it.

    Raises:
        ValueError: the resources do not fit the layout, or sbatch refused a job; then none of the chain is left behind.
        StaleStage, ValueError: a person submits, and a finished stage is stale or lacks files that are still to be read.
        StageIncomplete: another submission holds the lock, or a stage is to be moved aside while jobs are under way.
    """
    check_resources(config)
    layout.slurm.mkdir(parents=True, exist_ok=True)
    what = f"the submission of {layout.root}"
    with held(layout.submit_lock, Owner.this_process(), what=what, stale_seconds=LOCK_STALE_SECONDS, wait_seconds=LOCK_WAIT_SECONDS):
        if redone is not None:
            _redo(config, layout, redone)
        links = chain(config, layout)
        if not links:
            stop = early_stop(config, layout)
            logger.info("%s; nothing to submit", "the run is complete" if stop is None else f"the run is stopped {stop.reason}")
            return []
        for job in _unrecorded_jobs(config, layout):
            logger.info("job %s (%s %d) is this run's, of a submission that was cut off", job.job_id, job.link, job.iteration)
            _record(layout, links[-1].iteration, job)
        after = _active_arrays(layout, own_job)
        if ADVANCE in after.values():
            logger.info("jobs of this run are under way (%s); nothing to submit", ", ".join(after))
            if own_job is None:  # what the jobs were asked for with holds for them
                remember_changes(config, layout, sections=("run", "stop"))
                logger.info("run.iterations and [stop] hold from now on; what else is to change, change when these jobs are over")
            return []
        links = links[-1:] if after else links
        _make_log_folders(layout, links)
        if own_job is None:
            _require_current(config, layout)
            _copy_scripts(scripts, layout.slurm)
            remember_changes(config, layout)
            record_submission(layout, missing_stages(config, layout))
        return _submit_links(config, layout, links, after=":".join(after) or None, tries=TRIES if own_job else 1)


def _require_current(config: RunConfig, layout: RunLayout) -> None:
    """Refuse what `run` would refuse to go on from; a stage whose inputs are missing cannot be judged before they are there."""
    missing = set(missing_stages(config, layout))
    require_all_current(config, layout, [ref for ref in line(config) if missing.isdisjoint(STAGES[ref.name].needs(config, ref.iteration))])


def _redo(config: RunConfig, layout: RunLayout, redone: StageRef) -> None:
    """Move a stage aside, unless jobs in the queue count on it."""
    if queued := [*active_jobs(layout), *(job.job_id for job in _unrecorded_jobs(config, layout))]:
        cure = f"scancel {' '.join(dict.fromkeys(name.partition('_')[0] for name in queued))}"
        raise StageIncomplete(f"--redo {redone} would take from jobs of this run what they count on; end them first ({cure}).")
    redo(config, layout, redone)


def _active_arrays(layout: RunLayout, own_job: str | None) -> dict[str, str]:
    """Array job -> link, of this run's jobs that squeue still shows."""
    links = {job.job_id: job.link for path in layout.all_slurm_jobs() for job in read_jobs(path)}
    arrays = dict.fromkeys(name.partition("_")[0] for name in active_jobs(layout))
    return {job: links[job] for job in arrays if job != own_job}


def _make_log_folders(layout: RunLayout, links: Sequence[Link]) -> None:
    """A job whose log cannot be opened dies without a word, so this is found out before."""
    for link in links:
        folder = slurm_log_folder(layout, link)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(folder, os.W_OK)
        except OSError:
            is_writable = False
        if not is_writable:
            raise ValueError(f"{folder} cannot be written, so no job could open its log; make it writable, then submit again.")


def _submit_links(config: RunConfig, layout: RunLayout, links: Sequence[Link], *, after: str | None, tries: int) -> list[SubmittedJob]:
    """All of the links, each after the one before, or none: half a chain would end with nobody to go on."""
    jobs: list[SubmittedJob] = []
    for link in links:
        try:
            job = _sbatch(config, layout, link, after=after, tries=tries)
        except ValueError as error:
            if jobs:
                run_slurm(["scancel", *(job.job_id for job in jobs)], is_repeatable=True)
            raise ValueError(f"sbatch refused {link.name} {link.iteration}: {error}; no job of this chain is left in the queue.") from error
        jobs.append(job)
        _record(layout, links[-1].iteration, job)
        logger.info("submitted %s %d as job %s, array %s", link.name, link.iteration, job.job_id, link.array)
        after = job.job_id
    return jobs


def _record(layout: RunLayout, iteration: int, job: SubmittedJob) -> None:
    path = layout.slurm_jobs(iteration)
    manifests.write_json(path, [asdict(known) for known in (*read_jobs(path), job)])


def _sbatch(config: RunConfig, layout: RunLayout, link: Link, *, after: str | None, tries: int) -> SubmittedJob:
    """Submit the job of a link. ValueError: Slurm goes on refusing it."""
    words = sbatch_command(config, layout, link, after=after)
    for number in range(tries):
        result = run_slurm(words)
        if result.returncode == 0:
            return SubmittedJob(result.stdout.strip().partition(";")[0], link.name, link.iteration, link.array, str(os.getuid()))
        if number + 1 == tries:
            break
        pause = PAUSE_SECONDS * 2**number
        logger.warning("sbatch: %s; trying again in %.0f s", result.stderr.strip(), pause)
        time.sleep(pause)
        # An answer that came too late is no refusal: the job is there, and a second one would run beside it.
        late = [job for job in _unrecorded_jobs(config, layout) if (job.link, job.iteration) == (link.name, link.iteration)]
        if late:
            return late[0]
    raise ValueError(f"{result.stderr.strip()} (command: {shlex.join(words)})")


def _unrecorded_jobs(config: RunConfig, layout: RunLayout) -> list[SubmittedJob]:
    """This run's jobs that the queue shows and no record names: whoever submitted them was killed, or got no answer."""
    recorded = {job.job_id for path in layout.all_slurm_jobs() for job in read_jobs(path)}
    user, prefix = str(os.getuid()), _job_prefix(config.run.name)
    found: dict[str, SubmittedJob] = {}
    for row in _squeue(f"--user={user}", "--format=%F|%K|%j|%Z"):
        job_id, array, name, folder = row.split("|", 3)
        link, _, iteration = name.removeprefix(prefix).rpartition("-")
        if folder == str(layout.root) and name.startswith(prefix) and link in (*STAGES, ADVANCE) and job_id not in recorded:
            found[job_id] = SubmittedJob(job_id, link, int(iteration), array, user)
    return list(found.values())


def read_jobs(path: Path) -> list[SubmittedJob]:
    """The jobs submitted for an iteration so far."""
    if not path.exists():
        return []
    return [SubmittedJob(**job) for job in json.loads(path.read_text(encoding="utf-8"))]


def active_jobs(layout: RunLayout, *, is_patient: bool = True) -> Mapping[str, str]:
    """Job or array element id -> state, of this run's jobs that squeue still shows. is_patient: ask a busy controller again."""
    jobs = [job for path in layout.all_slurm_jobs() for job in read_jobs(path)]
    if not jobs:
        return {}
    ids, users = {job.job_id for job in jobs}, {job.user for job in jobs}
    # The controller sends one user's jobs alone, where asked for job ids it would send all for squeue to choose from.
    by_user = [f"--user={','.join(sorted(users))}"] if "" not in users else []
    states = dict(row.split("|") for row in _squeue("--array", *by_user, "--format=%i|%T", is_patient=is_patient))
    return {name: state for name, state in states.items() if name.partition("_")[0] in ids}


def _squeue(*options: str, is_patient: bool = True) -> list[str]:
    result = run_slurm(["squeue", "--noheader", *options], is_repeatable=is_patient)
    if result.returncode:
        raise ValueError(f"squeue failed: {result.stderr.strip()}; is this a host of the cluster?")
    return [row.strip() for row in result.stdout.splitlines()]


def run_slurm(words: Sequence[str], *, is_repeatable: bool = False) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs; ValueError where it is not installed, or never answers. is_repeatable: twice does what once does."""
    if shutil.which(words[0]) is None:
        raise ValueError(f"{words[0]} is not on PATH; run this on a login node of the cluster, or use `spin-megatron run` on one machine.")
    for tries_left in reversed(range(TRIES if is_repeatable else 1)):
        try:
            result = subprocess.run(
                list(words),
                capture_output=True,
                text=True,
                timeout=ANSWER_SECONDS,
                check=False,
                # An sbatch that outlived us, waiting for a busy controller, would submit unseen by the next submission.
                preexec_fn=ended_with_parent(signal.SIGKILL),
            )
        except subprocess.TimeoutExpired as error:
            result = subprocess.CompletedProcess(error.cmd, 1, "", f"no answer in {ANSWER_SECONDS:.0f} s")
        if result.returncode == 0 or tries_left == 0:
            break
        time.sleep(PAUSE_SECONDS)
    return result


def _copy_scripts(source: Path, destination: Path) -> None:
    for name in SCRIPTS:
        if not (source / name).exists():
            raise ValueError(f"{source / name} is missing; give the folder of the Slurm scripts with --scripts.")
        with manifests.atomic_path(destination / name) as aside:
            shutil.copy(source / name, aside)
