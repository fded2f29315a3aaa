"""The printed settings are a config: filled in, they are the defaults."""

import re
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest

from spin_megatron.config_file import load_config
from spin_megatron.report import settings

MINIMAL = '[model]\npath = "org/m"\nrevision = "abc"\n[data]\nsource = "org/d"\nrevision = "abc"\n'


README = Path(__file__).parents[2] / "README.md"


def lines_of(section: str) -> list[str]:
    return [" ".join(line.split()) for line in settings.template(section).splitlines()]


def test_the_printed_settings_with_what_is_required_are_the_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings.command(Namespace(section=None))
    printed = capsys.readouterr().out
    for mark, given in {"# path = ": 'path = "org/m"', "# source = ": 'source = "org/d"', "# revision = ": 'revision = "abc"'}.items():
        assert mark in printed
        printed = printed.replace(mark, f"{given}  # ")
    for name, text in (("filled", printed), ("minimal", MINIMAL)):
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "filled.toml", []) == load_config(tmp_path / "minimal.toml", [])


def test_the_least_config_of_the_readme_loads_with_defaults_for_the_rest(tmp_path: Path) -> None:
    block = re.search(r"^The least config .*:\n\n((?:    .*\n)+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert block is not None
    (tmp_path / "config.toml").write_text(textwrap.dedent(block[1]), encoding="utf-8")
    (tmp_path / "conversations.jsonl").touch()
    config = load_config(tmp_path / "config.toml", [])
    assert config.model.path == "/models/my-sft-model"
    assert config.data.source == str(tmp_path / "conversations.jsonl")
    assert config.model_fields_set == {"model", "data"}


def test_a_line_says_type_and_default_and_what_is_required_absent_or_per_iteration() -> None:
    assert lines_of("objective")[0] == "[objective] # the SPIN loss, equation 4.7 of the paper."
    assert "beta = 0.1 # number or list of number; lambda of the paper; per iteration" in lines_of("objective")
    assert "# stop_epoch = # integer or list of integer; leave after this many epochs of the schedule; per iteration" in lines_of("train")
    assert lines_of("model")[1].startswith("# path = # required; text; a Hugging Face folder")
    assert "# [slurm.stages.NAME] # what one stage asks Slurm for; NAME is a stage's name, e.g. build-engine." in lines_of("slurm")


def test_an_unknown_section_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no section \[trian\]; use one of: run, model, .*train"):
        settings.command(Namespace(section="trian"))
