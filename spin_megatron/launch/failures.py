"""What went wrong so far, kept on disk: each failure of an element, how many came in a row, and whether the run is given up.

Failures of a stage count only while it gets no further: one that leaves a new part or checkpoint behind starts the row anew.
"""

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spin_megatron.config import RunConfig
from spin_megatron.pipeline import missing_stages
from spin_megatron.run import manifest as manifests
from spin_megatron.run.layout import RunLayout
from spin_megatron.stage_table import STAGES, StageRef, folder_of, log_folder, made_in

# `advance` comes back to a queue that takes no more jobs, or to a controller that is away, for hours.
MAX_SUBMISSION_FAILURES = 50
# What Slurm writes into a job's log when it ends the job for a reason that settings cure; whoever would have told it then dies with it.
_ENDED_BY_SLURM = re.compile(r"error: (.*(?:DUE TO TIME LIMIT|oom.kill).*)", re.IGNORECASE)
# What else a job's log says of a rank that did not get to a log of its own (no container, no module), or was killed.
_ERROR = re.compile(r"^(?!.*Exited with exit code).*error.*$", re.IGNORECASE | re.MULTILINE)


def record_failure(layout: RunLayout, ref: StageRef | str, *, job: str, restart: int, reason: str) -> None:
    """Keep a failed try of a stage, or of a submission, for the cap and for `status`."""
    progress = progress_of(layout, ref) if isinstance(ref, StageRef) else ""
    _append(layout, {"event": "failed", "ref": str(ref), "job": job, "restart": restart, "reason": reason, "progress": progress})


def record_stop(layout: RunLayout, ref: StageRef) -> None:
    """A planned stop ends a row of failures."""
    _append(layout, {"event": "stopped", "ref": str(ref)})


def record_submission(layout: RunLayout, missing: Sequence[StageRef]) -> None:
    """A person who submits starts all counts anew. missing: the stages that are not done."""
    _append(layout, {"event": "submitted", "ref": ""})
    manifests.write_json(layout.slurm_progress, {"progress": _progress_of_all(layout, missing), "barren": 0, "chain": ""})


def submission_name(missing: Sequence[StageRef]) -> str:
    """What failures of `advance` are kept under."""
    return f"advance {min(made_in(ref) for ref in missing)}"


def _append(layout: RunLayout, event: Mapping[str, str | int]) -> None:
    text = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **event}) + "\n"
    layout.slurm.mkdir(parents=True, exist_ok=True)
    with manifests.exclusive(layout.lock), open(layout.slurm_failures, "a", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def count_barren(layout: RunLayout, missing: Sequence[StageRef], *, chain: str) -> None:
    """Count a chain that is over, once, if no stage got further by it: none finished, no new part, no new checkpoint.

    Args:
        chain: the job of its last link, which may come back several times.
    """
    progress, seen = _progress_of_all(layout, missing), _read_progress(layout)
    if chain != seen.get("chain"):
        barren = int(seen["barren"]) + 1 if progress == seen["progress"] else 0
        manifests.write_json(layout.slurm_progress, {"progress": progress, "barren": barren, "chain": chain})


def _progress_of_all(layout: RunLayout, missing: Sequence[StageRef]) -> str:
    return manifests.digest_values([(str(ref), progress_of(layout, ref)) for ref in missing])


def _read_progress(layout: RunLayout) -> dict[str, Any]:
    if not layout.slurm_progress.exists():
        return {"progress": "", "barren": 0}
    found: dict[str, Any] = json.loads(layout.slurm_progress.read_text(encoding="utf-8"))
    return found


def progress_of(layout: RunLayout, ref: StageRef) -> str:
    """What a stage that resumes has kept so far (parts, checkpoints), as a digest; it changes only when the stage got further."""
    if not STAGES[ref.name].resumes:
        return ""
    folder = folder_of(layout, ref)
    kept = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if not path.name.startswith(".")]
    return manifests.digest_values(sorted(str(path.relative_to(folder)) for path in kept))


@dataclass(frozen=True)
class Failures:
    """Of a stage (or `advance T`): how often it failed without getting further, since its last planned stop or a person's last submission.

    reason: of the last failure of all, "" while there was none. progress: what the stage had kept then.
    """

    in_a_row: int = 0
    reason: str = ""
    progress: str | None = None


def read_failures(layout: RunLayout) -> defaultdict[str, Failures]:
    """The failures of every stage, by name."""
    found: defaultdict[str, Failures] = defaultdict(Failures)
    for event in read_events(layout):
        before, progress = found[event["ref"]], event.get("progress")
        if event["event"] == "submitted":
            found.update({name: replace(failures, in_a_row=0) for name, failures in found.items()})
        elif event["event"] == "stopped":
            found[event["ref"]] = replace(before, in_a_row=0)
        else:
            found[event["ref"]] = Failures(before.in_a_row + 1 if progress == before.progress else 1, event["reason"], progress)
    return found


def failures_in_a_row(layout: RunLayout, ref: StageRef | str) -> int:
    """Failures.in_a_row of one stage."""
    return read_failures(layout)[str(ref)].in_a_row


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


def last_error(logs: Path, of_job: Path) -> str:
    """The last error in an attempt's logs, else the last lines of errors in its job's, or what their absence means."""
    told = _ERROR.findall(of_job.read_text(encoding="utf-8", errors="replace")) if of_job.exists() else []
    return last_logged_error(logs) or "; ".join(told[-3:]) or "no error was logged: the process was killed from outside, or its node died"


def job_log(layout: RunLayout, ref: StageRef, element: str) -> Path:
    """Where an element of a stage (JOB_TASK, or a pattern) writes what Slurm and srun say, and what its ranks print."""
    return log_folder(layout, replace(ref, shard=None)) / f"slurm_{element}.log"


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


def slurms_reason(layout: RunLayout, ref: StageRef) -> str | None:
    """Why Slurm itself ended a job of the stage last, where that was its time limit or its memory."""
    pattern = job_log(layout, ref, "*" if ref.shard is None else f"*_{ref.shard}")
    oldest_first = sorted(pattern.parent.glob(pattern.name), key=lambda path: path.stat().st_mtime)
    found = [words for path in oldest_first for words in _ENDED_BY_SLURM.findall(path.read_text(encoding="utf-8", errors="replace"))]
    return found[-1] if found else None


def stop_reason(config: RunConfig, layout: RunLayout) -> str | None:
    """Why the run is not tried any further, and what to do; None while it is."""
    missing = missing_stages(config, layout)
    if not missing:
        return None
    caps: dict[StageRef | str, int] = dict.fromkeys(missing, config.slurm.max_failures)
    caps[submission_name(missing)] = MAX_SUBMISSION_FAILURES
    advice = f"mend the cause, then: bash slurm/spin_iter.sh {layout.quoted}"
    failures = read_failures(layout)
    for ref, cap in caps.items():
        if failures[str(ref)].in_a_row >= cap:
            return f"{ref} failed {cap} times in a row, last: {failures[str(ref)].reason}; {advice}"
    barren = _read_progress(layout)["barren"]
    if barren < config.slurm.max_failures:
        return None
    told = next((f" ({ref}: {words})" for ref in missing if (words := slurms_reason(layout, ref))), "")
    return f"{barren} chains of jobs in a row got nothing further{told}; {advice}"
