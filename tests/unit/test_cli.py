"""What the command line says, and its exit code, when a verb ends otherwise than by itself."""

import argparse
import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spin_megatron import cli
from spin_megatron.cli import main
from spin_megatron.launch.failures import last_logged_error
from spin_megatron.run.telemetry import configure_logging


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 75, "stopped by Ctrl-C"),
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), 1, "train.recompute=full"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/a b.jsonl"), 2, "/data/a b.jsonl: Permission denied"),
        (RuntimeError("a defect"), 1, "RuntimeError: a defect"),
    ],
)
def test_what_ends_a_verb_decides_code_and_last_words(
    raised: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(_arguments: argparse.Namespace) -> int:
        raise raised

    monkeypatch.setattr("spin_megatron.report.settings.command", end)
    assert main(["settings"]) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert ("Traceback" in shown) == (code == 1), "of a defect alone"


@pytest.mark.parametrize(("text", "threads"), [("3", 3), (" 4,2", 4), ("", 1), ("0", 1), ("many", 1)])
def test_threads_are_those_that_openmp_would_take(text: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert cli._threads() == threads


def test_a_stage_looks_for_a_stop_and_beats_once_a_second_however_short_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_file, heartbeat, now, signals = tmp_path / "locks" / "stop", tmp_path / "locks" / "heartbeat", [0.0], []
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    stop_requested = cli._stop_question(lambda: bool(signals), stop_file, heartbeat)
    assert not stop_requested()
    heartbeat.unlink()
    stop_file.touch()
    now[0] = 0.9
    assert not stop_requested() and not heartbeat.exists()
    now[0] = 1.0
    assert stop_requested() and heartbeat.exists()
    stop_file.unlink()
    now[0] = 2.5
    assert stop_requested(), "what was asked for once is not taken back"
    signals.append(15)
    assert cli._stop_question(lambda: bool(signals), stop_file, heartbeat)(), "a signal waits for nothing"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *((f"status RUN --watch {text}", f"argument --watch: '{text}' is no number above 0") for text in ("0", "-1", "nan", "inf", "soon")),
        ("plan CONFIG --gpus 0", "argument --gpus: '0' is no whole number of at least 1"),
        ("plan CONFIG --gpus 8 --examples -5", "argument --examples: '-5' is no whole number of at least 1"),
        ("plan CONFIG --gpus 8 --read-gb 0", "argument --read-gb: '0' is no number above 0"),
        ("convert hf-to-megatron A B --workers 1.5", "argument --workers: '1.5' is no whole number of at least 1"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_with_its_option(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["run"]], ids=["more than a pipe's buffer", "less"])
def test_a_reader_that_has_read_enough_ends_a_verb_quietly(arguments: list[str]) -> None:
    words = [sys.executable, "-m", "spin_megatron.cli", "settings", *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == ("", 0)


def test_where_an_input_was_refused_stands_in_the_log_file_and_not_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--run-dir", str(tmp_path), "--log-file", str(tmp_path / "logs" / "rank_0.log")]
    try:
        assert main(words) == 2
    finally:
        configure_logging(None)
    shown, written = capsys.readouterr().err, (tmp_path / "logs" / "rank_0.log").read_text(encoding="utf-8")
    assert "is not a run directory" in shown and "Traceback" not in shown
    assert "Traceback" in written and "in open_run" in written
    assert last_logged_error(tmp_path / "logs") == f"spin_megatron: {shown.partition('ERROR')[2].strip()}", "the message comes last"
