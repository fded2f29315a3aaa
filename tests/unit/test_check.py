"""`spin-megatron check` refuses, before anything runs, what a stage would refuse hours later."""

import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spin_megatron.cli import main
from spin_megatron.launch.started_run import open_or_start
from spin_megatron.pipeline import execute
from spin_megatron.stage_table import StageRef
from tests.tiny_run import make_tiny_run, spin_megatron

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("tiny run"))


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on standard error, without the line breaks and columns of the terminal."""
    return " ".join(capsys.readouterr().err.split())


def truncate(model: Path) -> None:
    with open(model / "model.safetensors", "rb+") as file:
        file.truncate(100_000)


def drop_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def drop_the_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def pickle_the_weights(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    drop_the_weights(model)


def drop_the_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors has 100000 bytes, its header promises"),
        (drop_a_tensor, "lacks model.layers.2.mlp.up_proj.weight"),
        (drop_the_weights, "safetensors"),
        (pickle_the_weights, "safetensors"),
        (drop_the_template, "has no chat template"),
    ],
)
def test_a_damaged_model_is_refused(
    damage: Callable[[Path], None], message: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_run.parent / "model", model)
    damage(model)
    assert main(["check", str(tiny_run), "--set", f"model.path={model}"]) == 2
    assert message in errors(capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.source=mistyped.jsonl"], "data.source=mistyped.jsonl does not exist"),
        (["model.path=/nowhere/model"], "model.path=/nowhere/model does not exist"),
        (["model.path=conversations.jsonl"], "conversations.jsonl is a file; give the Hugging Face folder"),
        (["model.path=org/model"], "model.revision=None does not pin it"),
        (["model.path=org/model", "model.revision=main"], "model.revision='main' does not pin it"),
        (["data.source=org/data", "data.revision=v1.0"], "data.revision='v1.0' does not pin it"),
        (["parallel.tensor=3"], "parallel.tensor=3 does not divide model.num_heads=4"),
        (["data.max_response_tokens=250", "train.pack_tokens=1024"], "is beyond the model's 256 positions"),
        (["train.epoks=3"], "train.epoks: unknown key"),
        (["slurm.stages.train.nodes=4"], "slurm.stages.train: nodes=4 x ranks_per_node=1 must be 2 (the ranks of [parallel])"),
        (["data.num_held_out=40"], "has too few rows, 40 of 41 for data.num_held_out=40 and one training example"),
        (["data.num_examples=33"], "has too few rows, 40 of 41 for data.num_held_out=8 and data.num_examples=33"),
    ],
)
def test_a_wrong_setting_is_refused(changes: list[str], message: str, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [option for change in changes for option in ("--set", change)]
    assert main(["check", str(tiny_run), *options]) == 2
    assert message in errors(capsys)


@pytest.mark.parametrize("words", [["run"], ["submit"], ["submit", "--dry-run"]])
def test_a_split_that_the_data_is_too_small_for_is_refused_before_a_run_is_started(
    words: list[str], tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    too_large = ["--set", "data.num_held_out=40"]
    assert main([words[0], str(tiny_run), "--run-dir", str(tmp_path / "run"), *words[1:], *too_large]) == 2
    assert "conversations.jsonl has too few rows, 40 of 41 for data.num_held_out=40" in errors(capsys)
    assert not (tmp_path / "run").exists()


def test_a_folder_s_rows_are_counted_where_its_reader_is_installed(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(tiny_run.parent / "conversations.jsonl", tmp_path / "data" / "train.jsonl")
    words = ["submit", str(tiny_run), "--run-dir", str(tmp_path / "run"), "--dry-run", "--set", "parallel.pipeline=1"]
    words += ["--set", f"data.source={tmp_path / 'data'}", "--set", "data.num_held_out=40"]
    assert main(words) == 2
    assert "data has too few rows, 40 of 41 for data.num_held_out=40" in errors(capsys)
    monkeypatch.setattr("spin_megatron.launch.check.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as on a host that has pydantic, rich and pyarrow
    assert main(words) == 0


def test_a_layout_that_does_not_fit_a_started_run_is_refused_before_anything_runs(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    config, layout = open_or_start(Namespace(target=tiny_run, run_dir=root, overrides=[]))
    assert execute(config, layout, StageRef("export", 0), rank=0, stop_requested=lambda: False)
    for words in (["run", str(root)], ["run", str(tiny_run), "--run-dir", str(root)]):
        assert main([*words, "--set", "parallel.tensor=3"]) == 2
        assert "parallel.tensor=3 does not divide model.num_heads=4" in errors(capsys)
    assert not layout.changes_json.exists(), "what was refused is not remembered"


def test_a_started_run_is_checked_against_the_newest_theta_that_is_there(tmp_path: Path) -> None:
    root = tmp_path / "run"
    config, layout = open_or_start(Namespace(target=make_tiny_run(tmp_path / "tiny"), run_dir=root, overrides=[]))
    too_many = Namespace(target=root, run_dir=None, overrides=["parallel.tensor=3"])
    with pytest.raises(ValueError, match=r"parallel\.tensor=3 does not divide model\.num_heads=4"):
        open_or_start(too_many)  # the base model, before there is a theta
    assert execute(config, layout, StageRef("export", 0), rank=0, stop_requested=lambda: False)
    layout.theta(1).mkdir()
    shutil.copy(layout.theta(0) / "config.json", layout.theta(1))
    shutil.rmtree(config.model.path)  # with it theta_0's files are gone, which link to it
    assert not (layout.theta(0) / "config.json").exists()
    assert open_or_start(Namespace(target=root, run_dir=None, overrides=[]))[0] == config
    with pytest.raises(ValueError, match=r"parallel\.tensor=3 does not divide model\.num_heads=4"):
        open_or_start(too_many)


def test_a_hub_model_is_found_where_the_hub_s_client_keeps_it(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / COMMIT
    shutil.copytree(tiny_run.parent / "model", snapshot)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    changes = ("--set", "model.path=org/model", "--set", f"model.revision={COMMIT}", "--set", "parallel.tensor=3")
    checked = spin_megatron("check", tiny_run, *changes, timeout=60)
    assert checked.returncode == 2
    assert "parallel.tensor=3 does not divide model.num_heads=4" in checked.stderr


def test_what_is_in_the_current_folder_alone_is_no_path(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run.parent / "model", tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(tiny_run), "--set", "model.path=here/model"]) == 2
    assert f"relative paths count from the config file's folder; give '{tmp_path}/here/model'" in errors(capsys)


def test_a_good_config_and_a_pinned_hub_model_pass(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny_run), "--set", "data.num_held_out=39"]) == 0  # and one of the 40 rows to train on
    assert "tiny: 2 iterations on 2 ranks" in capsys.readouterr().out
    assert main(["check", str(tiny_run), "--set", "run.iterations=1", "--set", "parallel.pipeline=1"]) == 0
    assert "tiny: 1 iteration on 1 rank\n" in re.sub(" +\n", "\n", capsys.readouterr().out)
    assert main(["check", str(tiny_run), "--set", "model.path=org/model", "--set", f"model.revision={COMMIT}"]) == 0
