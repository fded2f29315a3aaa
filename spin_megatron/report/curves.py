"""`spin-megatron report RUN_DIR`: the run as pictures, for people who would rather look than read.

Writes report/training.png (what each update did) and report/iterations.png (held-out numbers of each iteration) from
metrics.jsonl and the evaluations, as far as the run has come.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from spin_megatron.config import RunConfig
from spin_megatron.report.overview import evaluations
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import atomic_path
from spin_megatron.run.telemetry import read_metrics

# Each panel: its title and the metrics it shows.
_TRAINING_PANELS = (
    ("SPIN loss", ("spin_loss",)),
    ("margin (nats a pair)", ("margin",)),
    ("accuracy", ("accuracy",)),
    ("log-probabilities (nats an answer)", ("logp_real", "logp_generated")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
)


def command(arguments: argparse.Namespace) -> int:
    """Handle the verb."""
    from spin_megatron.launch.started_run import open_as_changed

    config, layout = open_as_changed(arguments.run_dir)
    for path in write_report(config, layout):
        Console().print(f"wrote {path}", soft_wrap=True)
    return 0


def write_report(config: RunConfig, layout: RunLayout) -> list[Path]:
    """Draw what there is; returns the files made.

    Raises:
        ValueError: no update was made yet.
    """
    steps = {t: rows for t in range(config.run.iterations) if (rows := read_metrics(layout.metrics(t)))}
    if not steps:
        raise ValueError(f"{layout.root} has no training metrics yet; run it first: spin-megatron run {layout.quoted}")
    from spin_megatron.objective.spin_loss import loss_at_zero  # with torch, which the other verbs of this layer do without

    at_zero = loss_at_zero(config.objective.loss)
    written = [_save(_training_figure(config, steps, at_zero), layout.report / "training.png")]
    evaluated = evaluations(config, layout)
    if evaluated:
        written.append(_save(_iterations_figure(config, evaluated, at_zero), layout.report / "iterations.png"))
    return written


def _training_figure(config: RunConfig, steps: dict[int, list[dict[str, Any]]], loss_at_zero: float) -> Figure:
    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle(f"{config.run.name}: updates, iteration after iteration")
    axes = figure.subplots(2, 3).flatten()
    for axis, (title, keys) in zip(axes, _TRAINING_PANELS, strict=True):
        start = 0
        for t, rows in steps.items():
            for key, style in zip(keys, ("-", "--"), strict=False):
                values = [float(row[key]) for row in rows]  # what was not finite is a gap in the curve
                axis.plot(range(start, start + len(rows)), values, style, color=f"C{t % 10}", label=f"iteration {t} {_side(key)}".rstrip())
            start += len(rows)
        axis.set_title(title)
        axis.set_xlabel("update")
    axes[0].axhline(loss_at_zero, color="grey", linewidth=0.8, linestyle=":")
    axes[3].legend(fontsize="small")
    return figure


def _iterations_figure(config: RunConfig, evaluated: dict[int, dict[str, Any]], loss_at_zero: float) -> Figure:
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    figure.suptitle(f"{config.run.name}: theta_(t+1) on held-out pairs")
    left, middle, right = figure.subplots(1, 3)
    iterations = list(evaluated)
    _points(left, iterations, evaluated, (("loss", "SPIN loss"),), "held-out loss")
    left.axhline(loss_at_zero, color="grey", linewidth=0.8, linestyle=":", label="l(0)")
    _points(middle, iterations, evaluated, (("accuracy", "accuracy"),), "accuracy")
    _points(
        right,
        iterations,
        evaluated,
        (("nll_real", "theta_(t+1)"), ("nll_real_reference", "theta_t")),
        "NLL of the human answers (nats a token)",
    )
    for axis in (left, right):
        axis.legend(fontsize="small")
    return figure


def _points(
    axis: Axes, iterations: Sequence[int], evaluated: dict[int, dict[str, Any]], keys: Sequence[tuple[str, str]], title: str
) -> None:
    for key, label in keys:
        axis.plot(iterations, [float(evaluated[t][key]) for t in iterations], "o-", label=label)
    axis.set_title(title)
    axis.set_xlabel("iteration")
    axis.set_xticks(list(iterations))


def _side(key: str) -> str:
    return {"logp_real": "y", "logp_generated": "y'"}.get(key, "")


def _save(figure: Figure, path: Path) -> Path:
    with atomic_path(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    return path
