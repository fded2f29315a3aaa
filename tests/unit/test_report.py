"""The pictures of a run: what is drawn is read from the figures, before they become files."""

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from spin_megatron.config_file import validate_config
from spin_megatron.report import curves
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import write_json
from spin_megatron.run.telemetry import MetricsWriter

CONFIG = validate_config({"model": {"path": "m"}, "data": {"source": "d"}, "run": {"iterations": 3}}, origin="a test")


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    return RunLayout(tmp_path / "a run")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by the name of the file they are saved as; the files are made as well."""
    figures: dict[str, Figure] = {}
    save = curves._save

    def keep(figure: Figure, path: Path) -> Path:
        figures[path.name] = figure
        return save(figure, path)

    monkeypatch.setattr(curves, "_save", keep)
    return figures


def write_steps(layout: RunLayout, iteration: int, losses: list[float]) -> None:
    names = ("margin", "accuracy", "logp_real", "logp_generated", "grad_norm", "learning_rate")
    writer = MetricsWriter(layout.metrics(iteration), layout.train_events(iteration))
    for step, loss in enumerate(losses):
        writer.write(step, {"spin_loss": loss, **dict.fromkeys(names, 0.5)})
    writer.close()


def points(figure: Figure, panel: int) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[panel].lines]


def test_updates_of_an_iteration_follow_those_before_and_what_was_not_finite_is_a_gap(layout: RunLayout, drawn: dict[str, Figure]) -> None:
    write_steps(layout, 0, [0.69, 0.5, 0.4])
    write_steps(layout, 1, [0.7, math.nan])
    assert curves.write_report(CONFIG, layout) == [layout.report / "training.png"], "nothing is evaluated yet"
    first, second, at_zero = points(drawn["training.png"], 0)
    assert first == ([0, 1, 2], [0.69, 0.5, 0.4])
    assert second[0] == [3, 4]
    assert second[1][0] == 0.7 and math.isnan(second[1][1])
    assert at_zero[1] == pytest.approx([math.log(2)] * 2)
    labels = [line.get_label() for line in drawn["training.png"].axes[3].lines]
    assert labels == ["iteration 0 y", "iteration 0 y'", "iteration 1 y", "iteration 1 y'"]


def test_each_evaluated_iteration_is_a_point_beside_its_opponent_s(layout: RunLayout, drawn: dict[str, Figure]) -> None:
    write_steps(layout, 0, [0.69])
    for t, loss in enumerate((0.6, 0.65)):
        numbers = {"loss": loss, "accuracy": 0.9 - t / 10, "nll_real": 2.0 - t, "nll_real_reference": 3.0 - t}
        write_json(layout.evaluation(t), numbers)
        write_json(layout.manifest(layout.evaluate(t)), {})
    assert (layout.report / "iterations.png") in curves.write_report(CONFIG, layout)
    figure = drawn["iterations.png"]
    assert points(figure, 0)[0] == ([0, 1], [0.6, 0.65])
    assert points(figure, 1) == [([0, 1], [0.9, 0.8])]
    assert points(figure, 2) == [([0, 1], [2.0, 1.0]), ([0, 1], [3.0, 2.0])]


def test_a_run_that_made_no_update_has_nothing_to_draw(layout: RunLayout) -> None:
    with pytest.raises(ValueError, match=r"has no training metrics yet; run it first: spin-megatron run '.*a run'"):
        curves.write_report(CONFIG, layout)
