"""`spin-megatron submit`: an iteration as Slurm job arrays, from wherever the run stands.

    once: export theta_0, prepare; then for the first iteration that is not complete
    build-engine -> generate (array over missing shards) -> merge -> train (array of slots, one at a time)
    -> export -> evaluate -> advance

Each link is submitted only while its manifest is missing and waits for the one before. Links after an array use `afterany`,
the others `afterok`: an element's exit code says whether its manifest exists, because launch/supervise.py makes it so, never
what srun returned. The last link, `advance`, runs however the others ended: it submits what is still missing, or the next
iteration, or stops at the failure cap. The array index is a shard or a slot, never the iteration.
"""

import argparse
import json
import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spin_megatron.config import RunConfig, SlurmStageSection, StageName
from spin_megatron.generation.engine import EXTERNAL
from spin_megatron.launch.loop import check_config, open_or_start
from spin_megatron.pipeline import STAGES, StageRef, folder_of, line, made_in
from spin_megatron.run import manifest as manifests
from spin_megatron.run.layout import RunLayout

logger = logging.getLogger(__name__)

ADVANCE = "advance"
# The one file a cluster owner edits, the batch body, and the way in; copied into the run directory at submission.
SCRIPTS = ("env.sh", "stage.sh", "spin_iter.sh")
DEFAULT_SCRIPTS = Path(__file__).resolve().parents[2].joinpath("slurm")  # of the project, not of a run

QUESTION_TRIES, QUESTION_PAUSE_SECONDS = 3, 5.0


@dataclass(frozen=True)
class Link:
    """One job array of the chain. refs: the stages its elements run; empty for `advance`."""

    name: str
    iteration: int
    array: str
    refs: tuple[StageRef, ...]
    after_any: bool

    def job_name(self, run_name: str) -> str:
        return f"spin-{run_name}-{self.name}-{self.iteration}"


@dataclass(frozen=True)
class SubmittedJob:
    """A line of slurm_jobs.json."""

    job_id: str
    link: str
    iteration: int
    array: str


def command(arguments: argparse.Namespace) -> int:
    """Handle the verb: start the run if need be, and submit its chain."""
    config, layout = open_or_start(arguments)
    scripts = arguments.scripts or DEFAULT_SCRIPTS
    if arguments.dry_run:
        for words in dry_run(config, layout):
            print(shlex.join(words))  # noqa: T201 (the answer of the command)
        return 0
    submit(config, layout, overrides=arguments.overrides, scripts=scripts)
    return 0


def chain(config: RunConfig, layout: RunLayout) -> list[Link]:
    """The links of the first iteration that is not complete; empty when the run is."""
    missing = [ref for ref in line(config) if manifests.read_manifest(folder_of(layout, ref)) is None]
    if not missing:
        return []
    iteration = min(made_in(ref) for ref in missing)
    links: list[Link] = []
    for ref in missing:
        if made_in(ref) != iteration or (links and links[-1].refs and links[-1].refs[0].name == ref.name == "generate"):
            continue
        refs = tuple(other for other in missing if (other.name, other.iteration) == (ref.name, ref.iteration))
        links.append(Link(ref.name, ref.iteration, _array(config, refs), refs, _after_any(links)))
    links.append(Link(ADVANCE, iteration, "0-0", (), after_any=True))
    return links


def num_done(config: RunConfig, layout: RunLayout) -> int:
    """Number of finished stages of the run."""
    return sum(manifests.read_manifest(folder_of(layout, ref)) is not None for ref in line(config))


def _array(config: RunConfig, refs: Sequence[StageRef]) -> str:
    """Generate: its missing shards; train: interchangeable slots, one at a time; else one element."""
    settings = config.slurm.of(refs[0].name)
    if refs[0].name == "generate":
        return ",".join(str(ref.shard) for ref in refs) + f"%{settings.max_parallel}"
    if refs[0].name == "train":
        return f"0-{settings.slots - 1}%1"
    return "0-0"


def _after_any(links: Sequence[Link]) -> bool:
    """Behind an array some elements may fail and others make up for it; the link's own guard finds out."""
    return bool(links) and links[-1].name in ("generate", "train")


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
    iteration = made_in(link.refs[0]) if link.refs else link.iteration
    return layout.logs(link.name, iteration)


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
    config: RunConfig, layout: RunLayout, *, overrides: Sequence[str] = (), scripts: Path = DEFAULT_SCRIPTS, own_job: str | None = None
) -> list[SubmittedJob]:
    """Submit the chain of the first iteration that is not complete.

    Args:
        overrides: --set options of a started run, kept for the jobs.
        scripts: folder of env.sh and stage.sh; they are copied into the run directory.
        own_job: the job this runs in, which does not count as one that is under way.

    Raises:
        ValueError: the resources do not fit the layout, or sbatch refused a job.
    """
    check_resources(config)
    check_config(config)
    links = chain(config, layout)
    if not links:
        logger.info("the run is complete; nothing to submit")
        return []
    _make_log_folders(layout, links)
    layout.slurm.mkdir(parents=True, exist_ok=True)
    with manifests.exclusive(layout.lock):
        active = [job for job in active_jobs(layout) if job.partition("_")[0] != own_job]
        if active:
            logger.info("jobs of this run are under way (%s); nothing to submit", ", ".join(sorted(active)))
            return []
        if own_job is None:
            _copy_scripts(scripts, layout.slurm)
            manifests.write_json(layout.slurm_overrides, list(overrides))
            # A person who submits starts the counts of failures anew.
            manifests.write_json(layout.slurm_progress, {"done": num_done(config, layout), "barren": 0})
            with open(layout.slurm_failures, "a", encoding="utf-8") as events:
                events.write(json.dumps({"event": "submitted", "ref": ""}) + "\n")
        return _submit_links(config, layout, links)


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


def _submit_links(config: RunConfig, layout: RunLayout, links: Sequence[Link]) -> list[SubmittedJob]:
    jobs: list[SubmittedJob] = []
    record = layout.slurm_jobs(links[-1].iteration)
    earlier = read_jobs(record)
    for link in links:
        words = sbatch_command(config, layout, link, after=jobs[-1].job_id if jobs else None)
        result = run_slurm(words)
        if result.returncode:
            hint = "; the jobs submitted before it stay queued (scancel them, or submit again when they ended)" if jobs else ""
            raise ValueError(f"sbatch refused {link.name} {link.iteration}: {result.stderr.strip()} (command: {words}){hint}")
        jobs.append(SubmittedJob(result.stdout.strip().partition(";")[0], link.name, link.iteration, link.array))
        manifests.write_json(record, [asdict(job) for job in [*earlier, *jobs]])
        logger.info("submitted %s %d as job %s, array %s", link.name, link.iteration, jobs[-1].job_id, link.array)
    return jobs


def check_resources(config: RunConfig) -> None:
    """Check that train's and evaluate's nodes x ranks_per_node is the layout's number of ranks.

    Raises:
        ValueError: it is not; the message has the numbers.
    """
    world_size = config.parallel.layout().world_size
    for stage in STAGES:
        settings = config.slurm.of(stage)
        wanted = world_size if STAGES[stage].distributed else 1
        if settings.nodes * settings.ranks_per_node != wanted:
            raise ValueError(
                f"slurm.stages.{stage}: nodes={settings.nodes} x ranks_per_node={settings.ranks_per_node} must be {wanted} "
                f"({'the ranks of [parallel]' if wanted > 1 else 'this stage is one process'}); set both in [slurm.stages.{stage}]."
            )
    _check_engine_gpus(config)


def _check_engine_gpus(config: RunConfig) -> None:
    """An engine that is told its number of GPUs must get them, to build on and to answer on."""
    if config.generate.engine not in EXTERNAL:
        return
    tensor, pipeline = config.generate.options.get("tensor_parallel", 0), config.generate.options.get("pipeline_parallel", 1)
    wanted = max(int(tensor) * int(pipeline), 1)
    for stage in ("build-engine", "generate"):
        found = config.slurm.of(stage).gpus_per_node
        if found < wanted:
            raise ValueError(
                f"slurm.stages.{stage}: gpus_per_node={found}, but generate.engine={config.generate.engine} runs on {wanted} GPUs of one "
                f"node (generate.options tensor_parallel x pipeline_parallel); set gpus_per_node = {wanted} in [slurm.stages.{stage}]."
            )


def read_jobs(path: Path) -> list[SubmittedJob]:
    """The jobs submitted for an iteration so far."""
    if not path.exists():
        return []
    return [SubmittedJob(**job) for job in json.loads(path.read_text(encoding="utf-8"))]


def active_jobs(layout: RunLayout) -> Mapping[str, str]:
    """Job or array element id -> state, of this run's jobs that squeue still shows."""
    ids = {job.job_id for path in layout.all_slurm_jobs() for job in read_jobs(path)}
    if not ids:
        return {}
    result = run_slurm(["squeue", "--noheader", "--array", "--format=%A|%i|%T"])
    if result.returncode:
        raise ValueError(f"squeue failed: {result.stderr.strip()}; is this a host of the cluster?")
    found = {}
    for row in result.stdout.splitlines():
        _, name, state = row.strip().split("|")
        if name.partition("_")[0] in ids:
            found[name] = state
    return found


def run_slurm(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs; ValueError where it is not installed. A question is asked again: a busy controller times out."""
    if shutil.which(words[0]) is None:
        raise ValueError(f"{words[0]} is not on PATH; run this on a login node of the cluster, or use `spin-megatron run` on one machine.")
    is_question = words[0] == "squeue" or list(words[:2]) == ["scontrol", "show"]
    for tries_left in reversed(range(QUESTION_TRIES if is_question else 1)):
        result = subprocess.run(list(words), capture_output=True, text=True, timeout=120, check=False)
        if result.returncode == 0 or tries_left == 0:
            break
        time.sleep(QUESTION_PAUSE_SECONDS)
    return result


def _copy_scripts(source: Path, destination: Path) -> None:
    for name in SCRIPTS:
        if not (source / name).exists():
            raise ValueError(f"{source / name} is missing; give the folder of the Slurm scripts with --scripts.")
        with manifests.atomic_path(destination / name) as aside:
            shutil.copy(source / name, aside)
