"""`spin-megatron status`: stage x iteration, what the manifests say beside what Slurm's queue says, and why something failed.

Works wherever the run directory can be read; without Slurm's programs only the queue's column is missing.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spin_megatron.config import RunConfig
from spin_megatron.launch.failures import last_logged_error, read_failures, slurms_reason, stop_reason, submission_name
from spin_megatron.launch.slurm import ADVANCE, SubmittedJob, active_jobs, read_jobs
from spin_megatron.launch.started_run import open_as_changed
from spin_megatron.pipeline import early_stop, is_running, missing_stages, stale_because, state_of, still_read
from spin_megatron.report.overview import benchmarks, warnings
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import Manifest, plain, read_manifest, verify_outputs
from spin_megatron.run.telemetry import counted
from spin_megatron.stage_table import STAGES, StageRef, folder_of, line, log_folder, made_in

_COLUMNS = tuple(STAGES)
_STYLES = {"done": "green", "running": "cyan", "ready": "yellow", "stale": "red", "damaged": "red", "waiting": "dim", "not needed": "dim"}
_NAMED_PROBLEMS = 5
ENDED = "ended"
NOT_NEEDED = "not needed"  # a rule of [stop] ended the run before


@dataclass(frozen=True)
class Queue:
    """What Slurm says of the run's jobs. states: element id -> state; problem: why that is not known."""

    jobs: tuple[SubmittedJob, ...] = ()
    states: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def command(arguments: argparse.Namespace) -> int:
    """Handle the verb."""
    config, layout = open_as_changed(arguments.run_dir)
    if arguments.json:
        queue = read_queue(layout)
        answer = {
            "run": config.run.name,
            "stages": stage_rows(config, layout, queue),
            "stopped": why_stopped(config, layout),
            "queue_problem": queue.problem or None,
        }
        print(json.dumps(plain(answer), indent=2))  # noqa: T201
    elif arguments.watch is None:
        Console().print(_view(config, layout))
    else:
        _watch(config, layout, every_seconds=arguments.watch)
    return 0


def _watch(config: RunConfig, layout: RunLayout, *, every_seconds: float) -> None:
    """Redraw until the run, which may be given another end meanwhile, is complete, or Ctrl-C."""
    with Live(_view(config, layout), auto_refresh=False) as live:
        try:
            while missing_stages(config, layout):
                time.sleep(every_seconds)
                config, _ = open_as_changed(layout.root)
                live.update(_view(config, layout), refresh=True)
        except KeyboardInterrupt:
            return


def why_stopped(config: RunConfig, layout: RunLayout) -> str | None:
    """The rule of [stop] or the failure cap that ended the run; None while it goes on."""
    stop = early_stop(config, layout)
    return stop.reason if stop is not None else stop_reason(config, layout)


def read_queue(layout: RunLayout) -> Queue:
    """The run's jobs and their states; without Slurm's programs, or where they fail, the reason instead."""
    jobs = tuple(job for path in layout.all_slurm_jobs() for job in read_jobs(path))
    if not jobs:
        return Queue()
    if shutil.which("squeue") is None:
        return Queue(jobs, problem="squeue is not on PATH here: the states of jobs are unknown")
    try:
        return Queue(jobs, active_jobs(layout, is_patient=False))
    except ValueError as error:  # a view still shows what the files say
        return Queue(jobs, problem=str(error))


def stage_rows(config: RunConfig, layout: RunLayout, queue: Queue | None = None) -> list[dict[str, Any]]:
    """One row a stage: its names, state, what is wrong with it, jobs, attempts, last error, when it finished, its summary."""
    queue = queue or Queue()
    failures = read_failures(layout)
    rows, stop, needed = [], early_stop(config, layout), still_read(config, layout)
    for ref in line(config):
        manifest = read_manifest(folder_of(layout, ref))
        state, problems = _state(config, layout, ref, manifest, needs_files=ref in needed)
        if manifest is None and stop is not None and made_in(ref) > stop.iteration:
            state = NOT_NEEDED
        logs = log_folder(layout, ref)
        error = None if manifest else failures[str(ref)].reason or slurms_reason(layout, ref) or last_logged_error(logs / "latest")
        rows.append(
            {
                "stage": ref.name,
                "iteration": ref.iteration,
                "shard": ref.shard,
                "state": state,
                "problems": problems,
                "jobs": _elements(ref, queue),
                "attempts": sum(1 for _ in logs.glob("attempt_*")),
                "failures_in_a_row": 0 if manifest else failures[str(ref)].in_a_row,
                "last_error": error,
                "finished_at": manifest.finished_at if manifest else None,
                "summary": manifest.summary if manifest else {},
            }
        )
    return rows


def _state(config: RunConfig, layout: RunLayout, ref: StageRef, manifest: Manifest | None, *, needs_files: bool) -> tuple[str, list[str]]:
    """A stage's state and, where `run` would refuse to go on from it, why."""
    if manifest is None:
        return "running" if is_running(layout, ref) else state_of(config, layout, ref), []
    if differences := stale_because(config, layout, ref, manifest):
        return "stale", differences
    missing = verify_outputs(folder_of(layout, ref), manifest) if needs_files else []
    return "damaged" if missing else "done", missing


def _elements(ref: StageRef, queue: Queue) -> list[dict[str, str]]:
    """Elements of the stage's jobs that the queue shows; when it shows none, the last job, which has ended."""
    jobs = [job.job_id for job in queue.jobs if (job.link, job.iteration) == (ref.name, ref.iteration)]
    found = []
    for name, state in queue.states.items():
        job, _, element = name.partition("_")
        if job in jobs and ref.shard in (None, int(element) if element.isdigit() else None):
            found.append({"id": name, "state": state})
    if found or not jobs:
        return found
    return [{"id": jobs[-1] if ref.shard is None else f"{jobs[-1]}_{ref.shard}", "state": "unknown" if queue.problem else ENDED}]


def _view(config: RunConfig, layout: RunLayout) -> Group:
    """The table, and below it what needs a person's eye."""
    queue = read_queue(layout)
    rows = stage_rows(config, layout, queue)
    notes = warnings(config, layout)
    notes += [Text(f"{_name(row)}: {_times(row)}, last error: {row['last_error']}", style="yellow") for row in rows if row["last_error"]]
    notes += [_problem_note(layout, row) for row in rows if row["problems"]]
    ids = {job.job_id for job in queue.jobs if job.link == ADVANCE}
    waiting = [f"{name} {state}" for name, state in queue.states.items() if name.partition("_")[0] in ids]
    if waiting:
        notes.append(Text(f"goes on with: {', '.join(waiting)}", style="dim"))
    missing = missing_stages(config, layout)
    if missing and (failures := read_failures(layout)[name := submission_name(missing)]).in_a_row:
        notes.append(Text(f"{name}: {failures.in_a_row} failed submissions in a row, last error: {failures.reason}", style="yellow"))
    if queue.problem:
        notes.append(Text(queue.problem, style="yellow"))
    if (reason := why_stopped(config, layout)) is not None:
        notes.append(Text(f"stopped: {reason}", style="bold red"))
    scores = benchmarks(config, layout)
    return Group(_table(config, rows), *_answer_bars(config, layout, rows), *notes, *([scores] if scores.row_count else []))


def _answer_bars(config: RunConfig, layout: RunLayout, rows: Sequence[dict[str, Any]]) -> list[Table]:
    """A bar over the shards of each iteration that is being answered."""
    from spin_megatron.launch.loop import num_answered
    from spin_megatron.run.records import num_rows_so_far

    bars = []
    for t in range(config.run.iterations):
        states = [row["state"] for row in rows if (row["stage"], row["iteration"]) == ("generate", t)]
        if all(state == "done" for state in states) or not (answered := num_answered(config, layout, t)):
            continue
        total = sum(num_rows_so_far(path) for path in (layout.prompts, layout.held_out))
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            f"generate {t}", ProgressBar(total, answered, width=40), f"{answered} of {total} answers, {counted(len(states), 'shard')}"
        )
        bars.append(bar)
    return bars


def _name(row: Mapping[str, Any]) -> str:
    return str(StageRef(row["stage"], row["iteration"], row["shard"]))


def _problem_note(layout: RunLayout, row: Mapping[str, Any]) -> Text:
    redo, problems = StageRef(row["stage"], row["iteration"], row["shard"]).redo_command(layout), row["problems"]
    more = f" and {len(problems) - _NAMED_PROBLEMS} more" if len(problems) > _NAMED_PROBLEMS else ""
    told = "; ".join(problems[:_NAMED_PROBLEMS]) + more
    return Text(f"{_name(row)} is {row['state']}: {told}. Restore that, or make it anew: {redo}", style="red")


def _times(row: Mapping[str, Any]) -> str:
    in_a_row = f", {row['failures_in_a_row']} failures in a row" if row["failures_in_a_row"] else ""
    return f"{row['attempts']} attempts{in_a_row}"


def _table(config: RunConfig, rows: Sequence[dict[str, Any]]) -> Table:
    """Without padding all stages stand side by side in a terminal of 80 columns."""
    table = Table(title=escape(f"{config.run.name}: stage by iteration t (export t makes theta_t)"), show_lines=True, padding=0)
    table.add_column("t")
    columns = [stage for stage in _COLUMNS if any(row["stage"] == stage for row in rows)]
    for stage in columns:
        table.add_column(stage.replace("-", "-\n"))
    for iteration in range(config.run.iterations + 1):
        cells = [_cell([row for row in rows if row["stage"] == stage and row["iteration"] == iteration]) for stage in columns]
        table.add_row(str(iteration), *cells)
    return table


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    """State, attempts if there was more than one, warnings, and the jobs that are not over (or the one that made it)."""
    if not rows:
        return ""
    states = {row["state"] for row in rows}
    shown = next(state for state in ("stale", "damaged", "running", "ready", "waiting", NOT_NEEDED, "done") if state in states)
    done = sum(row["state"] == "done" for row in rows)
    lines = [f"[{_STYLES[shown]}]{shown if len(rows) == 1 else f'{done} of {len(rows)} done'}[/]"]
    attempts = sum(row["attempts"] for row in rows)
    if attempts > len(rows):
        lines.append(f"{attempts} attempts")
    if num_warnings := sum(len(row["summary"].get("warnings", [])) for row in rows):
        lines.append(f"[yellow]{counted(num_warnings, 'warning')}[/]")
    jobs = {job["id"]: job["state"] for row in rows for job in row["jobs"]}
    live = {name: state for name, state in jobs.items() if state not in (ENDED, "unknown")}
    if live:
        lines += [escape(f"{name} {state}") for name, state in list(live.items())[:4]]
        if len(live) > 4:
            lines.append(f"and {len(live) - 4} more")
    elif jobs:
        lines.append(escape(f"job {list(jobs)[-1].partition('_')[0]}"))
    return "\n".join(lines)
