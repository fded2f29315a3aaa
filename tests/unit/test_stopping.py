"""`run` and the sections that a started run may change; no stage runs."""

import argparse
import json
import math
import shlex
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from spin_megatron.cli import main
from spin_megatron.launch import loop, started_run
from spin_megatron.launch.started_run import changes, open_as_changed, open_or_start, open_run, remember_changes
from spin_megatron.report.overview import evaluations, print_iterations
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import Manifest, read_manifest, write_json, write_manifest
from spin_megatron.stage_table import StageRef, folder_of, line, log_folder, made_in, settings_of

PINNED = "0123456789" * 4
CONFIG = f'[run]\niterations = 3\n[model]\npath = "org/m"\nrevision = "{PINNED}"\n[data]\nsource = "org/d"\nrevision = "{PINNED}"\n'


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[StageRef]:
    """Stages are finished by a manifest alone; the gain of iteration t's evaluation is 0.5 / 10**t. Returns what ran."""
    done: list[StageRef] = []

    def finish(_launcher: object, _config: object, layout: RunLayout, group: list[StageRef], _position: str) -> int:
        for ref in group:
            done.append(ref)
            numbers = {
                "ln2_minus_loss": 0.5 / 10**ref.iteration,
                "nll_real": 2.0,
                "nll_real_reference": 2.0,
                "logp_real_drift": 0.0,
                "metrics": {},
            }
            outcome = Manifest(ref.name, ref.iteration, ref.shard, key="", settings={}, inputs={}, outputs=(), summary=numbers)
            write_manifest(folder_of(layout, ref), outcome)
        return 0

    monkeypatch.setattr(loop, "_run_group", finish)
    monkeypatch.setattr(started_run, "check_started", lambda config, layout: None)  # theta_0 is a manifest and no model
    monkeypatch.setattr("spin_megatron.report.overview.evaluations", lambda config, layout: {})
    return done


def test_run_ends_after_the_iteration_that_fires_a_rule_and_says_so(
    config_path: Path, finished: list[StageRef], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    assert main(["run", str(config_path), "--run-dir", str(root), "--set", "stop.min_ln2_minus_loss=0.1"]) == 0
    assert {made_in(ref) for ref in finished} == {0, 1}, "0.5, then 0.05"
    assert finished[-1] == StageRef("evaluate", 1), "the iteration that fires is finished"
    shown = " ".join(capsys.readouterr().out.split())
    assert "stopped after iteration 1: ln 2 - held-out loss = 0.05 is below stop.min_ln2_minus_loss=0.1" in shown
    assert "models/theta_2" in shown
    assert main(["status", str(root), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["stopped"].startswith("after iteration 1: ln 2 - held-out loss = 0.05")
    assert {row["state"] for row in answer["stages"] if row["iteration"] == 2 and row["stage"] != "export"} == {"not needed"}
    finished.clear()
    assert main(["run", str(root), "--set", "stop.min_ln2_minus_loss=-1.0"]) == 0, "a lower bound lets it go on"
    assert StageRef("evaluate", 2) in finished


def test_numbers_that_are_none_are_texts_in_every_json_and_end_the_run(
    config_path: Path, finished: list[StageRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    assert main(["run", str(config_path), "--run-dir", str(root), "--set", "run.iterations=1"]) == 0
    layout = RunLayout(root)
    path = layout.manifest(layout.evaluate(0))
    lost = dict.fromkeys(("ln2_minus_loss", "nll_real", "nll_real_reference", "logp_real_drift", "loss", "margin", "accuracy"), math.nan)
    write_manifest(layout.evaluate(0), replace(read_manifest(layout.evaluate(0)), summary=lost))
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)["summary"]["loss"] == "nan"
    # As files of earlier versions have them: Python reads NaN where no other program does.
    path.write_text(path.read_text(encoding="utf-8").replace('"loss": "nan"', '"loss": NaN'), encoding="utf-8")
    write_json(layout.evaluation(0), lost)
    monkeypatch.setattr("spin_megatron.report.overview.evaluations", evaluations)
    capsys.readouterr()
    print_iterations(*open_run(root, ["stop.max_logp_drop=5.0"]))
    assert "fell by nan nats an answer, beyond stop.max_logp_drop=5.0" in " ".join(capsys.readouterr().out.split())
    assert main(["status", str(root), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["stages"]
    assert next(row for row in rows if row["stage"] == "evaluate")["summary"] == dict.fromkeys(lost, "nan")


def test_sections_that_may_change_are_those_of_the_last_run_or_submit(config_path: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    arguments = argparse.Namespace(target=config_path, run_dir=root, overrides=["slurm.signal_seconds=60"])
    config, layout = open_or_start(arguments)
    assert open_as_changed(root)[0] == config, "as started, while nothing was changed"
    config_path.write_text(CONFIG + "[stop]\nmax_nll_increase = 0.5\n[slurm.stages.generate]\ngpus_per_node = 4\n", encoding="utf-8")
    changed, _ = open_or_start(argparse.Namespace(target=config_path, run_dir=root, overrides=[]))
    remember_changes(changed, layout)
    assert open_as_changed(root)[0] == changed
    assert (changed.stop.max_nll_increase, changed.slurm.of("generate").gpus_per_node) == (0.5, 4)
    assert open_run(root)[0].slurm.signal_seconds == 60, "run.json is never edited"


def test_a_finished_run_goes_on_for_more_iterations_and_stays_with_them(
    config_path: Path, finished: list[StageRef], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    assert main(["run", str(config_path), "--run-dir", str(root)]) == 0
    assert made_in(finished[-1]) == 2
    assert main(["run", str(root), "--set", "run.iterations=4", "--set", "launch.threads_per_process=2"]) == 0
    assert finished[-1] == StageRef("evaluate", 3)
    assert main(["run", str(root)]) == 0, "the folder is the run, as it was last started"
    config, layout = open_as_changed(root)
    assert (config.run.iterations, config.launch.threads_per_process) == (4, 2)
    frozen, _ = open_run(root)
    assert frozen.run.iterations == 3, "run.json is never edited"
    assert open_run(root, changes(config, layout))[0] == config, "what a stage's process is told"
    capsys.readouterr()
    assert main(["run", str(root), "--set", "run.seed=1"]) == 2
    assert "only run.iterations, parallel, launch, slurm" in capsys.readouterr().err


def test_benchmarks_are_added_to_a_finished_run_and_nothing_else_runs_again(
    config_path: Path, finished: list[StageRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    (tmp_path / "my tasks").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(config_path), "--run-dir", str(root), "--set", "run.iterations=1"]) == 0
    monkeypatch.setattr("spin_megatron.stages.benchmark.version", lambda package: "0.4.9")
    added = ['evaluate.lm_eval_tasks=["arc", "gsm8k"]', "evaluate.lm_eval_model_args.parallelize=true", "evaluate.lm_eval_include=my tasks"]
    assert main(["run", str(root), *(word for setting in added for word in ("--set", setting))]) == 0
    assert finished[-2:] == [StageRef("benchmark", 0, 0), StageRef("benchmark", 0, 1)]
    config, layout = open_as_changed(root)
    assert config.evaluate.lm_eval_include == str(tmp_path / "my tasks"), "a stage may run in another folder"
    assert open_run(root, changes(config, layout))[0] == config, "what a stage's process is told"
    frozen, _ = open_run(root)
    for ref in line(config):
        assert ref.name == "benchmark" or settings_of(config, ref) == settings_of(frozen, ref), f"{ref} became stale"


def test_a_harness_or_its_tasks_that_are_missing_are_missed_before_anything_runs(
    config_path: Path, finished: list[StageRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("spin_megatron.stages.benchmark.version", missing)
    config_path.write_text(CONFIG + '[evaluate]\nlm_eval_tasks = ["arc"]\n', encoding="utf-8")
    for words in (["check", str(config_path)], ["run", str(config_path), "--run-dir", str(tmp_path / "run")]):
        assert main(words) == 2
        assert "pip install 'spin-megatron[eval]'" in capsys.readouterr().err
        monkeypatch.setattr("spin_megatron.stages.benchmark.version", lambda package: "0.4.9")
        assert main([*words, "--set", "evaluate.lm_eval_include=taks"]) == 2
        assert "evaluate.lm_eval_include=taks is no folder" in " ".join(capsys.readouterr().err.split())
        monkeypatch.setattr("spin_megatron.stages.benchmark.version", missing)
    assert finished == []


def test_of_many_shards_the_first_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="spin_megatron")
    monkeypatch.setattr(loop, "launch_stage", lambda *_arguments: 0)
    for count, more in ((4, ""), (500, " and 496 more")):
        group = [StageRef("benchmark", 0, task) for task in range(count)]
        assert loop._run_group(None, None, RunLayout(tmp_path), group, "[1/9]") == 0  # type: ignore[arg-type]
        assert caplog.messages[-1] == "[1/9] " + ", ".join(f"benchmark 0 shard {task}" for task in range(4)) + more


def test_what_was_stopped_is_no_error_and_names_no_log_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = [StageRef("benchmark", 0, task) for task in range(3)]
    monkeypatch.setattr(loop, "launch_stage", lambda _launcher, _config, _layout, ref: 1 if ref.shard == 0 else 75)
    layout = RunLayout(tmp_path)
    (log_folder(layout, group[1]) / "latest").mkdir(parents=True)
    (log_folder(layout, group[1]) / "latest" / "rank_0.log").touch()
    assert loop._run_group(None, None, layout, group, "[1/1]") == 1  # type: ignore[arg-type]
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told[-3] == ("ERROR", "benchmark 0 shard 0 failed (exit code 1)")
    assert told[-2][0] == "WARNING" and told[-2][1].endswith("rank_0.log")
    assert told[-1] == ("WARNING", "benchmark 0 shard 2 was stopped, and the same command goes on with it (exit code 75)")


def test_a_stage_that_cannot_be_made_anew_is_refused_before_anything_is_kept(
    config_path: Path, finished: list[StageRef], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    assert main(["run", str(config_path), "--run-dir", str(root), "--redo", "train"]) == 2
    assert not root.exists()
    assert main(["run", str(config_path), "--run-dir", str(root)]) == 0
    assert main(["run", str(root), "--redo", "train:7", "--set", "slurm.signal_seconds=60"]) == 2
    assert open_as_changed(root)[0].slurm.signal_seconds == 300


def test_a_run_directory_beside_a_run_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path), "--run-dir", str(tmp_path / "other")]) == 2
    assert "leave --run-dir out" in capsys.readouterr().err


def test_where_no_run_can_be_started_is_said(config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for root in (config_path, config_path / "below"):
        assert main(["run", str(config_path), "--run-dir", str(root)]) == 2
        assert f"the run directory {root} cannot be made" in capsys.readouterr().err


def test_a_dry_run_prints_every_line_and_starts_nothing(config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "a run"
    assert main(["submit", str(config_path), "--run-dir", str(root), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(words)[-2] for words in lines] == [
        "export", "prepare", "build-engine", "generate", "merge", "train", "export", "evaluate", "advance",
    ]  # fmt: skip
    assert not root.exists()
