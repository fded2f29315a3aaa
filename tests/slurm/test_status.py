"""What `status` says of a run's jobs, from files alone and from a queue; no Slurm is needed."""

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from spin_megatron.cli import main
from spin_megatron.config import RunConfig
from spin_megatron.launch.failures import failures_in_a_row, last_error, last_logged_error, progress_of, stop_reason
from spin_megatron.launch.slurm import SubmittedJob
from spin_megatron.launch.started_run import remember_changes
from spin_megatron.report import status
from spin_megatron.report.status import Queue, stage_rows
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import output_file, read_manifest, write_json, write_manifest
from spin_megatron.run.records import GeneratedRow, PromptRow, write_rows
from spin_megatron.stage_table import StageRef, line, log_folder
from tests.slurm.test_commands import finish, make_config


def row_of(rows: list[dict], stage: str, shard: int | None = None) -> dict:
    return next(row for row in rows if (row["stage"], row["shard"], row["iteration"]) == (stage, shard, 0))


def some_run(root: Path) -> tuple[RunConfig, RunLayout]:
    """Three shards of which the second is done, with one attempt of the first that failed."""
    config, layout = make_config(), RunLayout(root)
    done = [StageRef("export", 0), StageRef("prepare"), StageRef("build-engine", 0), StageRef("generate", 0, 1)]
    finish(layout, *done, config=config, is_current=True)
    attempt = log_folder(layout, StageRef("generate", 0, 0)) / "attempt_1"
    attempt.mkdir(parents=True)
    log = "2026-01-01 10:00:00,000 INFO spin_megatron: began\n2026-01-01 10:00:01,000 ERROR spin_megatron: failed\n"
    traceback = 'Traceback (most recent call last):\n  File "x.py", line 1, in run\nMemoryError: no room for 4 GB\n'
    (attempt / "rank_0_n1.log").write_text(log + traceback, encoding="utf-8")
    attempt.with_name("latest").symlink_to(attempt.name)
    return config, layout


def fail(layout: RunLayout, ref: str, reason: str, progress: str = "") -> None:
    layout.slurm.mkdir(exist_ok=True)
    with open(layout.slurm_failures, "a", encoding="utf-8") as events:
        events.write(json.dumps({"event": "failed", "ref": ref, "reason": reason, "progress": progress}) + "\n")


def test_the_queue_stands_beside_the_manifests(tmp_path: Path) -> None:
    config, layout = some_run(tmp_path)
    jobs = (SubmittedJob("7", "generate", 0, "0,2%8"), SubmittedJob("8", "merge", 0, "0-0"), SubmittedJob("3", "prepare", 0, "0-0"))
    queue = Queue(jobs, {"7_0": "RUNNING", "7_2": "PENDING", "8_0": "PENDING"})
    rows = stage_rows(config, layout, queue)
    assert row_of(rows, "generate", 0)["jobs"] == [{"id": "7_0", "state": "RUNNING"}]
    assert row_of(rows, "generate", 2)["jobs"] == [{"id": "7_2", "state": "PENDING"}]
    assert row_of(rows, "merge")["jobs"] == [{"id": "8_0", "state": "PENDING"}]
    assert row_of(rows, "prepare")["jobs"] == [{"id": "3", "state": "ended"}]
    assert row_of(rows, "train")["jobs"] == []


def test_without_a_queue_the_states_are_unknown_and_the_files_still_speak(tmp_path: Path) -> None:
    config, layout = some_run(tmp_path)
    queue = Queue((SubmittedJob("7", "generate", 0, "0,2%8"),), problem="squeue is not on PATH here")
    row = row_of(stage_rows(config, layout, queue), "generate", 0)
    assert row["jobs"] == [{"id": "7_0", "state": "unknown"}]
    assert (row["state"], row["attempts"], row["last_error"]) == ("ready", 1, "MemoryError: no room for 4 GB")


def test_a_controller_that_is_away_is_asked_once_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layout = some_run(tmp_path)
    write_json(layout.slurm_jobs(0), [{"job_id": "7", "link": "generate", "iteration": 0, "array": "0,2%8"}])
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\necho asked >> {shlex.quote(str(tmp_path / 'asked'))}\necho no controller >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    assert status.read_queue(layout).problem == "squeue failed: no controller; is this a host of the cluster?"
    assert (tmp_path / "asked").read_text() == "asked\n", "a view does not wait for it"


def test_the_exception_below_an_error_line_is_the_error(tmp_path: Path) -> None:
    _, layout = some_run(tmp_path)
    assert last_logged_error(log_folder(layout, StageRef("generate", 0, 0)) / "latest") == "MemoryError: no room for 4 GB"
    assert last_logged_error(tmp_path / "nothing there") is None


def test_what_kept_a_rank_from_a_log_of_its_own_is_found_in_its_jobs(tmp_path: Path) -> None:
    job_log = tmp_path / "slurm_7_0.log"
    assert last_error(tmp_path, job_log).startswith("no error was logged: the process was killed")
    refused = "slurmstepd-n1: error: pyxis: failed to import docker image: megatron.sqsh"
    job_log.write_text(f"pyxis: importing\n{refused}\nsrun: error: n1: task 0: Exited with exit code 1\n", encoding="utf-8")
    assert last_error(tmp_path, job_log) == refused


def test_a_run_at_its_failure_cap_says_which_stage_and_why(tmp_path: Path) -> None:
    config, layout = some_run(tmp_path)
    fail(layout, "generate 0 shard 0", "no room")
    fail(layout, "generate 0 shard 0", "no room")
    assert stop_reason(config, layout) is None
    fail(layout, "generate 0 shard 0", "no room for 4 GB")
    reason = stop_reason(config, layout)
    assert reason is not None
    assert reason.startswith("generate 0 shard 0 failed 3 times in a row, last: no room for 4 GB; mend the cause")


def test_failures_between_which_a_stage_got_further_are_not_in_a_row(tmp_path: Path) -> None:
    _, layout = some_run(tmp_path)
    ref = StageRef("generate", 0, 0)
    layout.shard(0, 0).mkdir(parents=True)
    for part in range(4):
        fail(layout, str(ref), "its node died", progress_of(layout, ref))
        assert failures_in_a_row(layout, ref) == 1
        layout.part(0, 0, part).touch()
    fail(layout, str(ref), "its node died", progress_of(layout, ref))
    fail(layout, str(ref), "its node died", progress_of(layout, ref))
    assert failures_in_a_row(layout, ref) == 2


def test_the_view_holds_job_ids_errors_and_the_reason_of_a_stop(tmp_path: Path) -> None:
    config, layout = some_run(tmp_path)
    for _ in range(3):
        fail(layout, "generate 0 shard 0", "no [bold]room[/bold]")
    layout.iteration(0).mkdir(exist_ok=True)
    layout.slurm_jobs(0).write_text(json.dumps([{"job_id": "7", "link": "generate", "iteration": 0, "array": "0,2%8"}]), encoding="utf-8")
    console = Console(width=200, record=True)
    console.print(status._view(config, layout))
    text = " ".join(console.export_text().split())
    assert "1 of 3 done" in text
    assert "job 7" in text
    assert "generate 0 shard 0: 1 attempts, 3 failures in a row, last error: no [bold]room[/bold]" in text
    assert "stopped: generate 0 shard 0 failed 3 times in a row" in text
    assert len(line(config)) == len(stage_rows(config, layout))


def test_a_stale_stage_says_which_setting_changed_and_how(tmp_path: Path) -> None:
    config, layout = some_run(tmp_path)
    other = make_config(generate={"num_shards": 3, "temperature": 0.5})
    console = Console(width=300, record=True)
    console.print(status._view(other, layout))
    text = " ".join(console.export_text().split())
    assert "generate 0 shard 1 is stale: generate.temperature: 1.0 -> 0.5. Restore that, or make it anew: spin-megatron run" in text
    assert "--redo generate:0:1" in text
    assert row_of(stage_rows(other, layout), "generate", 1)["problems"] == ["generate.temperature: 1.0 -> 0.5"]
    assert [row["problems"] for row in stage_rows(config, layout) if row["problems"]] == []


def test_a_finished_stage_whose_files_are_gone_is_damaged_where_they_are_still_read(tmp_path: Path) -> None:
    config, layout = some_run(tmp_path)
    answers = layout.part(0, 1, 0)
    answers.write_bytes(b"seven b")
    manifest = read_manifest(layout.shard(0, 1))
    assert manifest is not None
    write_manifest(layout.shard(0, 1), replace(manifest, outputs=(output_file(layout.shard(0, 1), answers),)))
    assert row_of(stage_rows(config, layout), "generate", 1)["state"] == "done"
    answers.write_bytes(b"six by")
    row = row_of(stage_rows(config, layout), "generate", 1)
    assert (row["state"], row["problems"]) == ("damaged", [f"{answers} has 6 bytes, its manifest says 7"])
    finish(layout, StageRef("generate", 0, 0), StageRef("generate", 0, 2), config=config, is_current=True)
    finish(layout, StageRef("merge", 0), config=config, is_current=True)
    answers.unlink()
    assert row_of(stage_rows(config, layout), "generate", 1)["state"] == "done", "merge has read it, and no one reads it again"


def test_an_iteration_that_is_being_answered_has_a_bar_over_its_shards(tmp_path: Path) -> None:
    config, layout = some_run(tmp_path)
    write_rows(layout.prompts, [PromptRow(f"ex-{i}", (5,), (6,), False) for i in range(9)], PromptRow)
    write_rows(layout.held_out, [PromptRow("held", (5,), (6,), False)], PromptRow)
    console = Console(record=True, width=160)
    console.print(status._view(config, layout))
    assert "answers" not in console.export_text()
    for shard, number in ((1, 0), (2, 0), (2, 1)):
        write_rows(layout.part(0, shard, number), [GeneratedRow("x", (7, 2), "stop", 1)] * 2, GeneratedRow)
    console.print(status._view(config, layout))
    assert "6 of 10 answers, 3 shards" in console.export_text()


def test_warnings_of_every_stage_stand_in_its_cell_and_below_the_table(tmp_path: Path) -> None:
    config, layout = some_run(tmp_path)
    finish(layout, StageRef("merge", 0), config=config, summary={"warnings": ["55.0% of the [answers] end otherwise."]})
    finish(layout, StageRef("train", 0), config=config, summary={"warnings": ["guard.margin was passed", "2 steps were skipped"]})
    console = Console(width=200, record=True)
    console.print(status._view(config, layout))
    text = " ".join(console.export_text().split())
    assert ("1 warning│" in text, "2 warnings│" in text) == (True, True)
    below = (
        "warning iteration 0: 55.0% of the [answers] end otherwise. warning iteration 0: guard.margin was passed warning iteration 0: 2 "
    )
    assert below in text


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("slurmstepd: error: *** JOB 31 ON n2 CANCELLED AT 2026-01-01T10:00:00 DUE TO TIME LIMIT ***", "*** JOB 31 ON n2 CANCELLED AT"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=31.0.", "Detected 1 oom_kill event in StepId=31.0."),
        ("slurmstepd: error: *** JOB 31 ON n2 CANCELLED AT 2026-01-01T10:00:00 DUE TO JOB REQUEUE ***", None),
    ],
)
def test_a_job_that_slurm_ended_for_its_time_or_memory_says_so(written: str, shown: str | None, tmp_path: Path) -> None:
    config, layout = some_run(tmp_path)
    logs = log_folder(layout, StageRef("generate", 0))
    (logs / "slurm_31_2.log").write_text(f"began\n{written}\nsrun: error: n2: task 0: Killed\n", encoding="utf-8")
    error = row_of(stage_rows(config, layout), "generate", 2)["last_error"]
    assert error is None if shown is None else error.startswith(shown)
    assert row_of(stage_rows(config, layout), "generate", 0)["last_error"] == "MemoryError: no room for 4 GB"
    write_json(layout.slurm_progress, {"progress": "", "barren": config.slurm.max_failures})
    told = "" if shown is None else f" (generate 0 shard 2: {error})"
    reason = stop_reason(config, layout)
    assert reason is not None
    assert reason.startswith(f"3 chains of jobs in a row got nothing further{told}; mend the cause")


def test_watching_redraws_until_the_run_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout = some_run(tmp_path)
    layout.run_json.write_text(config.model_dump_json(), encoding="utf-8")
    longer = config.model_copy(update={"run": config.run.model_copy(update={"iterations": 3})})
    remaining = [[StageRef("generate", 0, 0)], [StageRef("generate", 0, 2)], line(config), line(longer)]
    paused: list[float] = []

    def work(seconds: float) -> None:
        paused.append(seconds)
        finish(layout, *remaining.pop(0), config=longer, is_current=True)
        if len(remaining) == 1:  # on its last stages it is given an iteration more
            remember_changes(longer, layout)

    monkeypatch.setattr(status.time, "sleep", work)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["status", str(tmp_path), "--watch", "7"]) == 0
    assert paused == [7.0, 7.0, 7.0, 7.0]
    shown = capsys.readouterr().out
    assert "3 of 3 done" in shown, "what is drawn last is how it ended"
    assert re.search(r"^│3│done", shown, re.MULTILINE), "theta_3 has its row"


def test_no_word_of_the_table_is_cut_short_in_80_columns(tmp_path: Path) -> None:
    config, layout = make_config(), RunLayout(tmp_path)
    done = [ref for ref in line(config) if ref.iteration == 0 and ref.name not in ("train", "evaluate")]
    finish(layout, *done, config=config, is_current=True, summary={"warnings": ["one", "two"]})
    jobs = [{"job_id": f"1234567{number}", "link": name, "iteration": 0, "array": "0-0"} for number, name in enumerate(("merge", "train"))]
    write_json(layout.slurm_jobs(0), jobs)
    queue = Queue(tuple(SubmittedJob(**job) for job in jobs), {"12345671_0": "RUNNING", "12345671_1": "PENDING"})
    console = Console(width=80, record=True)
    console.print(status._table(config, stage_rows(config, layout, queue)))
    text = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert {"evaluate", "warnings", "12345671_0", "RUNNING"} <= set(re.split(r"[\s│┃]+", text))
