"""Walk the line of stages: what is done and what must run, and the manifests that say so.

A stage is done exactly when its manifest exists. This module is the only writer of manifests. It imports no torch:
a stage's module is imported when the stage runs.
"""

import importlib
import logging
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from spin_megatron.config import RunConfig, default_settings
from spin_megatron.config_sections import StopSection
from spin_megatron.run import manifest as manifests
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.lock import Owner, held, is_held
from spin_megatron.run.manifest import Manifest, OutputFile, StageIncomplete, StaleStage
from spin_megatron.run.telemetry import progress_bar
from spin_megatron.stage_table import STAGES, StageRef, folder_of, line, made_in, settings_of

logger = logging.getLogger(__name__)

State = Literal["done", "stale", "ready", "waiting"]

# Ten missed touches of a lock (run/lock.py): a file server may be slow for a while.
LOCK_STALE_SECONDS = 60.0
MANIFEST_POLL_SECONDS = 0.2
DIGEST_BAR_MEBIBYTES = 2048  # less is a matter of seconds
SOURCE_INPUT = "data.source (content)"
_NAMED_FILES = 3


@dataclass(frozen=True)
class EarlyStop:
    """The iteration after which a rule of [stop] ended the run, and why."""

    iteration: int
    reason: str


def early_stop(config: RunConfig, layout: RunLayout) -> EarlyStop | None:
    """The first iteration whose evaluation fires a rule of [stop]; None while none did."""
    if config.stop == StopSection():
        return None
    for t in range(config.run.iterations):
        manifest = manifests.read_manifest(layout.evaluate(t))
        if manifest is None:
            return None
        reason = _fired(config.stop, manifest.summary)
        if reason is not None:
            return EarlyStop(t, f"after iteration {t}: {reason}")
    return None


def _fired(rules: StopSection, numbers: Mapping[str, Any]) -> str | None:
    """The rule that an evaluation's numbers fire, in words; a number that is not finite, kept as text, fires its rule."""
    increase, drop = float(numbers["nll_real"]) - float(numbers["nll_real_reference"]), -float(numbers["logp_real_drift"])
    gain, least = float(numbers["ln2_minus_loss"]), rules.min_ln2_minus_loss
    if least is not None and not gain >= least:
        return f"ln 2 - held-out loss = {gain:.4g} is below stop.min_ln2_minus_loss={least}: the opponent's answers pass for human ones"
    if rules.max_nll_increase is not None and not increase <= rules.max_nll_increase:
        return f"the NLL of the human answers rose by {increase:.4g} nats a token, beyond stop.max_nll_increase={rules.max_nll_increase}"
    if rules.max_logp_drop is not None and not drop <= rules.max_logp_drop:
        return f"log p(y) of the human answers fell by {drop:.4g} nats an answer, beyond stop.max_logp_drop={rules.max_logp_drop}"
    return None


def missing_stages(config: RunConfig, layout: RunLayout) -> list[StageRef]:
    """The stages that are not done, up to where a rule of [stop] ended the run, if one did."""
    stop = early_stop(config, layout)
    wanted = [ref for ref in line(config) if stop is None or made_in(ref) <= stop.iteration]
    return [ref for ref in wanted if manifests.read_manifest(folder_of(layout, ref)) is None]


def still_read(config: RunConfig, layout: RunLayout) -> set[StageRef]:
    """The stages whose files are still of use: those that a missing stage reads, and the newest theta, which is what the run is for.

    The others' may be deleted, all but the manifests: an engine and trained weights are as large as a theta.
    """
    needs = (need for ref in missing_stages(config, layout) for need in STAGES[ref.name].needs(config, ref.iteration))
    return {*needs, StageRef("export", newest_theta(config, layout))}


def newest_theta(config: RunConfig, layout: RunLayout) -> int:
    """The number of the theta that the run ends with, as far as is known now."""
    stop = early_stop(config, layout)
    return config.run.iterations if stop is None else stop.iteration + 1


def inputs_of(config: RunConfig, layout: RunLayout, ref: StageRef) -> dict[str, str]:
    """Name -> content digest of every stage this one reads, and for prepare of the local data set.

    Raises:
        StageIncomplete: one of them is not done; the message is the command that completes it.
    """
    inputs = _source_digest(config, layout) if ref.name == "prepare" else {}
    for need in STAGES[ref.name].needs(config, ref.iteration):
        manifest = manifests.read_manifest(folder_of(layout, need))
        if manifest is None:
            raise StageIncomplete(f"{ref} needs {need}, which is not complete; run: {need.command(layout)}")
        inputs[str(need)] = manifests.digest_values([manifest.key, [(output.path, output.sha256) for output in manifest.outputs]])
    return inputs


def _source_digest(config: RunConfig, layout: RunLayout) -> dict[str, str]:
    """What a local data.source holds: an edited file is another data set. A pinned revision says it for one of the hub.

    Once prepare is done its manifest says it: for a source that is gone, which is no longer needed, and for one whose files have the
    sizes and times that prepare found, which are not read again.
    """
    source, manifest = Path(config.data.source), manifests.read_manifest(layout.data)
    if manifest is not None and (not source.exists() or manifest.stamps == _stamps(config)):
        return {name: digest for name, digest in manifest.inputs.items() if name == SOURCE_INPUT}
    return {SOURCE_INPUT: manifests.digest_tree(source)} if source.exists() else {}


def _stamps(config: RunConfig) -> dict[str, str]:
    source = Path(config.data.source)
    return {SOURCE_INPUT: manifests.stamp_tree(source)} if source.exists() else {}


def state_of(config: RunConfig, layout: RunLayout, ref: StageRef) -> State:
    """done, stale (done from other settings or inputs), ready (may run now) or waiting (for what it needs)."""
    manifest = manifests.read_manifest(folder_of(layout, ref))
    if manifest is not None:
        return "stale" if stale_because(config, layout, ref, manifest) else "done"
    try:
        inputs_of(config, layout, ref)
    except StageIncomplete:
        return "waiting"
    return "ready"


def stale_because(config: RunConfig, layout: RunLayout, ref: StageRef, manifest: Manifest) -> list[str]:
    """What a finished stage was made from and what it would be made from now, a line each difference; none: it is current."""
    try:
        return _differences(config, layout, ref, manifest)
    except StageIncomplete as error:
        return [str(error)]


def _differences(config: RunConfig, layout: RunLayout, ref: StageRef, manifest: Manifest) -> list[str]:
    inputs = inputs_of(config, layout, ref)
    settings = manifests.difference(manifest.settings, settings_of(config, ref), defaults=default_settings())
    lines = [f"{name}: {change}" for name, change in settings.items()]
    changes = manifests.difference(manifest.inputs, inputs)
    causes = {SOURCE_INPUT: _changed_files(config, manifest)} if SOURCE_INPUT in changes else {}
    for need in STAGES[ref.name].needs(config, ref.iteration):
        if str(need) in changes and (made := manifests.read_manifest(folder_of(layout, need))) is not None:
            causes[str(need)] = f"made at {made.finished_at}"
    return lines + [f"input {name}: {change}" + (f", {causes[name]}" if name in causes else "") for name, change in changes.items()]


def _changed_files(config: RunConfig, manifest: Manifest) -> str:
    """Which files of data.source are younger than what prepare made of it, in words."""
    source, since = Path(config.data.source), datetime.fromisoformat(manifest.started_at).timestamp()
    younger = [str(path) for path in manifests.files_of(source) if path.stat().st_mtime > since]
    more = f" and {len(younger) - _NAMED_FILES} more" if len(younger) > _NAMED_FILES else ""
    return f"changed since: {', '.join(younger[:_NAMED_FILES])}{more}" if younger else f"files of {source} were removed or replaced"


def require_current(config: RunConfig, layout: RunLayout, ref: StageRef, manifest: Manifest, *, needs_files: bool = True) -> None:
    """Check that a finished stage was made from these settings and inputs and that its files, where they are needed, are still there.

    Raises:
        StageIncomplete: what it was made from is not there any more.
        StaleStage: it was made from other settings or inputs; the message is the difference, field by field.
        ValueError: a file that its manifest vouches for is missing or changed in size.
    """
    redo = ref.redo_command(layout)
    if differences := _differences(config, layout, ref, manifest):
        lines = "\n  ".join(differences)
        raise StaleStage(
            f"{ref} was finished with other settings or inputs:\n  {lines}\nRestore them, or move it and what follows aside with: {redo}"
        )
    problems = manifests.verify_outputs(folder_of(layout, ref), manifest) if needs_files else []
    if problems:
        raise ValueError(f"{ref} is finished, but " + "; ".join(problems) + f". Restore the file, or make it anew with: {redo}")


def require_all_current(config: RunConfig, layout: RunLayout, refs: Sequence[StageRef]) -> None:
    """`require_current` for those of the stages that are finished. Raises what it raises."""
    needed = still_read(config, layout)
    for ref in refs:
        if (manifest := manifests.read_manifest(folder_of(layout, ref))) is not None:
            require_current(config, layout, ref, manifest, needs_files=ref in needed)


def execute(
    config: RunConfig,
    layout: RunLayout,
    ref: StageRef,
    *,
    rank: int,
    stop_requested: Callable[[], bool],
    owner: Owner | None = None,
    wait_seconds: float = 0.0,
) -> bool:
    """Run one stage in this process (on every rank of a distributed stage) and, on rank 0, write its manifest.

    Args:
        owner: who holds the stage's lock; this process when absent.
        wait_seconds: how long to wait for another owner's lock, which may be that of a job that died.

    Returns:
        True when the stage is done, False when it saved its state and left on request.

    Raises:
        StageIncomplete, StaleStage, ValueError: as above, and whatever the stage raises.
    """
    folder = folder_of(layout, ref)
    if manifests.read_manifest(folder) is not None:
        require_all_current(config, layout, [ref])
        return True
    # The stamps first: files that change from here on are read again.
    stamps = _stamps(config) if ref.name == "prepare" else {}
    settings, inputs = settings_of(config, ref), inputs_of(config, layout, ref)
    # Imported here: stages need torch, this module must not.
    from spin_megatron.stages.context import StageContext

    module = importlib.import_module(STAGES[ref.name].module)
    context = StageContext(config, layout, ref.iteration, ref.shard, show=rank == 0, stop_requested=stop_requested)
    if rank != 0:
        if module.run(context).stopped:
            return False
        # srun ends a step a minute after its first rank left, and rank 0 may hash 140 GB before the manifest is there.
        while manifests.read_manifest(folder) is None:
            time.sleep(MANIFEST_POLL_SECONDS)
        return True
    holder = owner or Owner.this_process()
    with held(_lock(layout, ref), holder, what=str(ref), stale_seconds=LOCK_STALE_SECONDS, wait_seconds=wait_seconds):
        if manifests.read_manifest(folder) is not None:  # another owner finished it while this one waited
            return True
        if not STAGES[ref.name].resumes and folder.exists():  # what is unfinished of a stage that starts over is garbage
            shutil.rmtree(folder)
        started_at = _now()
        output = module.run(context)
        if output.stopped:
            return False
        manifest = Manifest(
            stage=ref.name,
            iteration=ref.iteration,
            shard=ref.shard,
            key=manifests.stage_key(ref.name, settings, inputs),
            settings=settings,
            inputs=inputs,
            outputs=_described(ref, folder, output.files),
            stamps=stamps,
            summary=dict(output.summary),
            versions=manifests.installed_versions(),
            git=manifests.git_revision(),
            host=socket.gethostname(),
            started_at=started_at,
            finished_at=_now(),
        )
        manifests.write_manifest(folder, manifest)
    return True


def _described(ref: StageRef, folder: Path, files: Mapping[Path, int | None]) -> tuple[OutputFile, ...]:
    """A stage's files with their digests; a large model is long in reading, so it has a bar."""
    mebibytes = sum(-(-path.stat().st_size // manifests.MEBIBYTE) for path in files)
    with progress_bar(f"{ref}: digests (MiB)", mebibytes, show=mebibytes >= DIGEST_BAR_MEBIBYTES) as advance:
        return tuple(manifests.output_file(folder, path, num_rows, advance) for path, num_rows in files.items())


def redo(config: RunConfig, layout: RunLayout, chosen: StageRef) -> dict[StageRef, Path]:
    """Move what is there of a stage and of all that is made from it aside; returns where each now lies. Nothing is deleted."""
    affected: list[StageRef] = []
    for ref in line(config):
        same = (ref.name, ref.iteration) == (chosen.name, chosen.iteration) and chosen.shard in (None, ref.shard)
        if same or any(need in affected for need in STAGES[ref.name].needs(config, ref.iteration)):
            affected.append(ref)
    if not affected:
        raise ValueError(f"--redo: this run has no stage {chosen}; its stages are {', '.join(map(str, line(config)))}.")
    running = [str(ref) for ref in affected if is_running(layout, ref)]
    if running:
        raise StageIncomplete(f"--redo {chosen} would move {', '.join(running)} aside while it runs; stop it first, then run this again.")
    aside = layout.redone(time.strftime("%Y%m%d-%H%M%S"))
    folders = {ref: folder_of(layout, ref) for ref in affected}
    moved = {ref: aside / folder.relative_to(layout.root) for ref, folder in folders.items() if folder.exists()}
    for ref, target in moved.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folders[ref], target)
        logger.info("%s is moved aside, to %s", ref, target)
    return moved


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_running(layout: RunLayout, ref: StageRef) -> bool:
    """Whether a living process holds the stage's lock."""
    return is_held(_lock(layout, ref), stale_seconds=LOCK_STALE_SECONDS)


def _lock(layout: RunLayout, ref: StageRef) -> Path:
    return layout.stage_lock(ref.name, made_in(ref), ref.shard)
