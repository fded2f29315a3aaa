"""`spin-megatron status`: stage x iteration, from the manifests alone."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from spin_megatron.config import RunConfig
from spin_megatron.pipeline import STAGES, folder_of, is_running, line, log_folder, state_of
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import read_manifest

_COLUMNS = tuple(STAGES)
_STYLES = {"done": "green", "running": "cyan", "ready": "yellow", "stale": "red", "waiting": "dim"}


def command(arguments: argparse.Namespace) -> int:
    """Handle the verb."""
    from spin_megatron.launch.loop import open_run

    config, layout = open_run(arguments.run_dir)
    rows = stage_rows(config, layout)
    if arguments.json:
        print(json.dumps({"run": config.run.name, "stages": rows}, indent=2))  # noqa: T201
    else:
        Console().print(_table(config, rows))
    return 0


def stage_rows(config: RunConfig, layout: RunLayout) -> list[dict[str, Any]]:
    """One row a stage: name, iteration, shard, state, attempts, when it finished, its summary."""
    rows = []
    for ref in line(config):
        manifest = read_manifest(folder_of(layout, ref))
        state = "running" if manifest is None and is_running(layout, ref) else state_of(config, layout, ref)
        rows.append(
            {
                "stage": ref.name,
                "iteration": ref.iteration,
                "shard": ref.shard,
                "state": state,
                "attempts": sum(1 for _ in log_folder(layout, ref).glob("attempt_*")),
                "finished_at": manifest.finished_at if manifest else None,
                "summary": manifest.summary if manifest else {},
            }
        )
    return rows


def _table(config: RunConfig, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"{config.run.name}: stage by iteration (export t makes theta_t)")
    table.add_column("iteration")
    for stage in _COLUMNS:
        table.add_column(stage)
    for iteration in range(config.run.iterations + 1):
        cells = [_cell([row for row in rows if row["stage"] == stage and row["iteration"] == iteration]) for stage in _COLUMNS]
        table.add_row(str(iteration), *cells)
    return table


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    if len(rows) == 1:
        state = rows[0]["state"]
        return f"[{_STYLES[state]}]{state}[/]"
    done = sum(row["state"] == "done" for row in rows)
    states = {row["state"] for row in rows}
    shown = next(state for state in ("stale", "running", "ready", "waiting", "done") if state in states)
    return f"[{_STYLES[shown]}]{done} of {len(rows)} done[/]"
