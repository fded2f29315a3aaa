"""export of theta_0: links to the base model, and nothing of another run's bookkeeping."""

import errno
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spin_megatron.config_file import load_config
from spin_megatron.convert.torch_dist import hf_to_torch_dist
from spin_megatron.launch.check import check_config
from spin_megatron.pipeline import execute
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import read_manifest, verify_outputs, write_text
from spin_megatron.run.records import ReferenceScore, SpinPair, write_rows
from spin_megatron.stage_table import StageRef
from spin_megatron.stages.context import StageContext
from spin_megatron.stages.export import _largest_probe_difference, base_folder, training_facts
from spin_megatron.stages.prepare import preview
from tests.tiny_run import make_tiny_run


def export_base_model(tmp_path: Path) -> RunLayout:
    config = load_config(make_tiny_run(tmp_path))
    layout = RunLayout(tmp_path / "run")
    assert execute(config, layout, StageRef("export", 0), rank=0, stop_requested=lambda: False)
    return layout


def test_a_theta_of_another_run_can_be_the_base_model(tmp_path: Path) -> None:
    write_text(tmp_path / "model" / "MANIFEST.json", "the other run's")
    layout = export_base_model(tmp_path)
    manifest = read_manifest(layout.theta(0))
    assert manifest is not None
    assert "model.safetensors" in [output.path for output in manifest.outputs]
    assert verify_outputs(layout.theta(0), manifest, digests=True) == []
    assert (tmp_path / "model" / "MANIFEST.json").read_text(encoding="utf-8") == "the other run's"


def test_a_converted_checkpoint_can_be_the_base_model(tmp_path: Path) -> None:
    config_file = make_tiny_run(tmp_path)
    hf_to_torch_dist(tmp_path / "model", tmp_path / "megatron", show=False)
    config = load_config(config_file, [f"model.path={tmp_path / 'megatron'}"])
    check_config(config)
    assert preview(config) == preview(load_config(config_file))
    layout = RunLayout(tmp_path / "run")
    assert execute(config, layout, StageRef("export", 0), rank=0, stop_requested=lambda: False)
    assert not (layout.theta(0) / "model.safetensors").is_symlink()
    found, expected = (load_file(folder / "model.safetensors") for folder in (layout.theta(0), tmp_path / "model"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (layout.theta(0) / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert ModelShape.from_huggingface(layout.theta(0)) == ModelShape.from_huggingface(tmp_path / "model")


def test_a_trained_model_is_reloaded_for_the_comparison_without_a_bar_of_transformers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, layout = load_config(make_tiny_run(tmp_path)), RunLayout(tmp_path / "run")
    pair = SpinPair("0:a", (5, 6, 7), (8, 9), (10,), 0)
    write_rows(layout.held_out_pairs(0), [pair], SpinPair)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        logp_V = torch.log_softmax(model(torch.tensor([pair.prompt_ids])).logits[0, -1].double(), -1)
        logp_2V = torch.log_softmax(model(torch.tensor([[*pair.prompt_ids, 8]])).logits[0, -2:].double(), -1)
    real, generated = float(logp_2V[0, 8] + logp_2V[1, 9]), float(logp_V[10])
    write_rows(layout.probe(0), [ReferenceScore("0:a", real + 0.5, generated, 2, 1)], ReferenceScore)
    capfd.readouterr()
    # Half a nat over two tokens.
    assert _largest_probe_difference(StageContext(config, layout, 1), tmp_path / "model") == pytest.approx(0.25, abs=1e-5)
    assert capfd.readouterr().err == ""


def test_a_base_model_that_lacks_a_weight_file_is_refused_by_name(tmp_path: Path) -> None:
    config = load_config(make_tiny_run(tmp_path))
    (tmp_path / "model" / "model.safetensors").unlink()
    layout = RunLayout(tmp_path / "run")
    with pytest.raises(ValueError, match=r"model"):
        execute(config, layout, StageRef("export", 0), rank=0, stop_requested=lambda: False)
    assert read_manifest(layout.theta(0)) is None


COMMIT = "0123456789abcdef0123456789abcdef01234567"


IN_A_MODEL = (
    *("config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "NOTICE.md"),
    "additional_chat_templates/tool_use.jinja",
)
BESIDE_A_MODEL = (
    *("pytorch_model.bin", "modeling.py", "README.md", ".gitattributes", "consolidated.safetensors", "original/consolidated.00.pth"),
    *("onnx/model.onnx", "original/model.safetensors"),
)


def test_theta_0_is_the_model_s_own_files_and_nothing_else_that_lies_there(tmp_path: Path) -> None:
    config = load_config(make_tiny_run(tmp_path))
    for name in (*BESIDE_A_MODEL, "LICENSE", "additional_chat_templates/tool_use.jinja"):
        write_text(tmp_path / "model" / name, name)
    layout = RunLayout(tmp_path / "run")
    assert execute(config, layout, StageRef("export", 0), rank=0, stop_requested=lambda: False)
    made = {str(path.relative_to(layout.theta(0))) for path in layout.theta(0).rglob("*") if path.is_file()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "MANIFEST.json"}
    assert made == expected | {"chat_template.jinja", "LICENSE", "additional_chat_templates/tool_use.jinja"}


def test_a_hub_model_is_fetched_at_its_commit_without_pickles_and_second_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.update(options, name=name) or str(tmp_path))
    assert base_folder("org/model", COMMIT) == tmp_path
    assert (asked["name"], asked["revision"]) == ("org/model", COMMIT)
    chosen = filter_repo_objects(
        [*IN_A_MODEL, *BESIDE_A_MODEL], allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert tuple(chosen) == IN_A_MODEL


@pytest.mark.parametrize("error", [FileNotFoundError("Cannot find the requested files.\nmore"), ValueError("Revision Not Found")])
def test_a_hub_model_that_cannot_be_had_says_what_to_check(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_name: str, **_options: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(ValueError, match=rf"'org/model' cannot be fetched at model\.revision={COMMIT}: (Cannot|Revision) .*local copy"):
        base_folder("org/model", COMMIT)


def test_a_full_disk_while_fetching_stays_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_name: str, **_options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(OSError, match="No space left"):
        base_folder("org/model", COMMIT)


def test_the_model_card_states_each_iterations_settings(tmp_path: Path) -> None:
    changes = ["run.iterations=3", "objective.beta=[0.1,5.0]", "optimizer.learning_rate=5e-7"]
    changes += ["data.window=[1,2]", "generate.temperature=0.7"]
    facts = training_facts(load_config(make_tiny_run(tmp_path), changes), 3)
    assert facts["iterations done"] == 3
    assert facts["loss"] == "logistic, beta 0.1, then 5, then 5"
    assert facts["learning rate"].startswith("peak 5e-07, ")
    assert facts["pairs of"] == "the newest 1, then 2, then 2 iterations"
    assert facts["base model"] == str(tmp_path / "model")
    assert "temperature 0.7, " in facts["opponent's answers"]
    assert f"torch {version('torch')}" in facts["software"]  # torch.__version__ may name its CUDA besides
    assert training_facts(load_config(make_tiny_run(tmp_path), changes), 1)["loss"] == "logistic, beta 0.1"
