"""What `check` and `run` print: the line that will run, and a table of the iterations."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spin_megatron.config import RunConfig
from spin_megatron.pipeline import early_stop, newest_theta
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import read_manifest
from spin_megatron.run.telemetry import counted
from spin_megatron.stage_table import folder_of, line, made_in

# (column, key in evaluate's metrics.json, format)
EVALUATION_COLUMNS = (
    ("held-out loss", "loss", ".4f"),
    ("ln 2 - loss", "ln2_minus_loss", "+.4f"),
    ("margin", "margin", "+.4f"),
    ("accuracy", "accuracy", ".3f"),
    ("NLL of y (nats a token)", "nll_real", ".4f"),
    ("before", "nll_real_reference", ".4f"),
)


def print_line(config: RunConfig) -> None:
    """Print the per-iteration settings of a run and its number of ranks."""
    iterations, ranks = counted(config.run.iterations, "iteration"), counted(config.parallel.layout().world_size, "rank")
    table = Table(title=f"{config.run.name}: {iterations} on {ranks}")
    for column in ("iteration", "pairs of iterations", "beta", "learning rate", "epochs (of schedule)"):
        table.add_column(column)
    for t in range(config.run.iterations):
        scalars = config.at(t)
        oldest = max(0, t - scalars.window + 1)
        window = str(t) if oldest == t else f"{oldest} to {t}"
        epochs = f"{scalars.stop_epoch} ({scalars.schedule_epochs})"
        table.add_row(str(t), window, f"{scalars.beta:g}", f"{scalars.learning_rate:g}", epochs)
    console = Console()
    console.print(table)
    more = f", {counted(len(config.evaluate.lm_eval_tasks), 'benchmark')}" if config.evaluate.lm_eval_tasks else ""
    console.print(f"The config is valid. Each iteration runs: build-engine, generate, merge, train, export, evaluate{more}.")


def print_example(prompt: str, answer: str) -> None:
    """Print how the first example of the data is rendered, special tokens included."""
    table = Table(title="the first example, as the model sees it", show_lines=True)
    table.add_column("prompt x")
    table.add_column("human answer y")
    table.add_row(Text(prompt), Text(answer))
    Console().print(table)


def evaluations(config: RunConfig, layout: RunLayout) -> dict[int, dict[str, Any]]:
    """The evaluation of every iteration that has one."""
    found = {}
    for t in range(config.run.iterations):
        path = layout.evaluation(t)
        if layout.manifest(layout.evaluate(t)).exists():
            found[t] = json.loads(path.read_text(encoding="utf-8"))
    return found


def print_iterations(config: RunConfig, layout: RunLayout) -> None:
    """Print a row for each evaluated iteration, its warnings, and where the newest model lies."""
    table = Table(title=f"{config.run.name}: theta_{{t+1}} against its opponent theta_t on held-out pairs")
    table.add_column("iteration")
    for column, _, _ in EVALUATION_COLUMNS:
        table.add_column(column, justify="right")
    for t, evaluation in evaluations(config, layout).items():
        table.add_row(str(t), *(format(float(evaluation[key]), pattern) for _, key, pattern in EVALUATION_COLUMNS))
    console = Console()
    console.print(table)
    for warning in warnings(config, layout):
        console.print(warning)
    if (scores := benchmarks(config, layout)).row_count:
        console.print(scores)
    if (stop := early_stop(config, layout)) is not None:
        console.print(Text(f"stopped {stop.reason}"))
    console.print(f"The new Hugging Face model: {layout.theta(newest_theta(config, layout))}", soft_wrap=True)


def warnings(config: RunConfig, layout: RunLayout) -> list[Text]:
    """What merge, train and evaluate of each iteration say a person should look at."""
    done = ((ref, read_manifest(folder_of(layout, ref))) for ref in line(config) if ref.name in ("merge", "train", "evaluate"))
    found = [(made_in(ref), text) for ref, manifest in done if manifest for text in manifest.summary.get("warnings", [])]
    return [Text.assemble(("warning", "yellow"), f" iteration {t}: {text}") for t, text in found]


def benchmarks(config: RunConfig, layout: RunLayout) -> Table:
    """The scores of every benchmark that is done."""
    table = Table(title=f"{config.run.name}: benchmarks")
    for column in ("theta", "task", "metric", "score", "standard error"):
        table.add_column(column)
    for ref in line(config):
        if ref.name != "benchmark" or (manifest := read_manifest(folder_of(layout, ref))) is None:
            continue
        metrics = {name: value for name, value in manifest.summary["metrics"].items() if isinstance(value, int | float)}
        for name, value in metrics.items():
            if "_stderr" not in name:
                error = metrics.get(name.replace(",", "_stderr,", 1))  # the harness's names are metric,filter
                numbers = (f"{value:.4f}", "" if error is None else f"{error:.4f}")
                table.add_row(str(ref.iteration + 1), manifest.summary["task"], name, *numbers)
    return table
