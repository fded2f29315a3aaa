"""What the command line says, and its exit code, when a verb ends otherwise than by itself."""

import argparse

import pytest
import torch

from spin_megatron.cli import main


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 75, "stopped by Ctrl-C"),
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), 1, "train.recompute=full"),
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
