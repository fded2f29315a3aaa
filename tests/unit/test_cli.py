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


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_pause_that_is_none_is_refused(seconds: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["status", str(tmp_path), "--watch", seconds])


@pytest.mark.parametrize("arguments", [[], ["run"]], ids=["more than a pipe's buffer", "less"])
def test_a_reader_that_has_read_enough_ends_a_verb_quietly(arguments: list[str]) -> None:
    words = [sys.executable, "-m", "spin_megatron.cli", "settings", *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == ("", 0)
