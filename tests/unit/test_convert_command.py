"""`convert` on the command line: both directions, verify, probe and inspect, and what each says of bad input."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spin_megatron.cli import main
from spin_megatron.convert.hf_io import HfFolder
from spin_megatron.convert.inspect_folder import inspect_folder
from spin_megatron.convert.probe import probe
from spin_megatron.convert.torch_dist import hf_to_torch_dist, torch_dist_to_hf
from spin_megatron.convert.verify import open_weights, verify_tensors
from tests.unit.tiny_models import tiny_shape, write_model

SHAPE = tiny_shape("qwen3")
TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def test_there_and_back_with_verify_leaves_equal_tensors_and_their_digests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write_model(tmp_path / "source", SHAPE)
    source, megatron, back = (str(tmp_path / name) for name in ("source", "megatron", "back"))
    assert main(["convert", "hf-to-megatron", source, megatron, "--verify", "--file-size", "0.00006"]) == 0
    assert main(["convert", "megatron-to-hf", megatron, back, "--verify", "--file-size", "0.00006"]) == 0
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 1
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    found = {name: tensor for file in (tmp_path / "back").glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    digests = json.loads((tmp_path / "back" / "tensor_digests.json").read_text())["sha256"]
    assert digests == json.loads((tmp_path / "megatron" / "tensor_digests.json").read_text())["sha256"]
    norm = weights["model.norm.weight"].view(torch.uint8).numpy().tobytes()
    assert digests["model.norm.weight"] == hashlib.sha256(norm).hexdigest()
    assert main(["convert", "inspect", megatron, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["parameters"] == sum(weight.numel() for weight in weights.values())
    assert facts["vouched for"] is True
    assert facts["problems"] == []


def test_the_model_card_states_the_settings_a_training_checkpoint_records(tmp_path: Path) -> None:
    write_model(tmp_path / "source", SHAPE)
    source, megatron = str(tmp_path / "source"), tmp_path / "step_00000012"
    assert main(["convert", "hf-to-megatron", source, str(megatron)]) == 0
    assert main(["convert", "megatron-to-hf", str(megatron), str(tmp_path / "untrained")]) == 0
    assert "| training | none that this checkpoint records |" in (tmp_path / "untrained" / "README.md").read_text()
    recipe = {"objective.loss": "hinge", "objective.beta": 0.1, "run.seed": 42}
    facts = {"schema": 1, "kind": "training", "recipe": recipe, "progress": {"step": 12}, "versions": {"torch": "2.13.0"}}
    (megatron / "COMPLETE.json").write_text(json.dumps(facts))
    assert main(["convert", "megatron-to-hf", str(megatron), str(tmp_path / "trained")]) == 0
    card = (tmp_path / "trained" / "README.md").read_text()
    rows = ("converted from | step_00000012 (torch_dist)", "progress: step | 12", "objective.loss | hinge", "objective.beta | 0.1")
    assert [row for row in (*rows, "run.seed | 42", "software | torch 2.13.0") if f"| {row} |" not in card] == []


def test_verify_finds_a_single_changed_bit(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "source", SHAPE)
    hf_to_torch_dist(tmp_path / "source", tmp_path / "megatron", show=False)
    name = "model.layers.3.self_attn.v_proj.weight"
    weights[name].view(torch.int16)[5, 7] ^= 1
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"is not the same model: {name} has other values on the two sides \(1 in all\)"):
        verify_tensors(HfFolder(tmp_path / "source"), open_weights(tmp_path / "megatron", None), show=False)


def test_verify_names_tensors_of_one_side_and_of_other_dtypes(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "source", SHAPE)
    hf_to_torch_dist(tmp_path / "source", tmp_path / "megatron", show=False)
    opened = open_weights(tmp_path / "megatron", None, dtype="float32")
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is \(259, 48\) torch.float32 in the checkpoint"):
        verify_tensors(HfFolder(tmp_path / "source"), opened, show=False)
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.norm.weight is on one side only"):
        verify_tensors(HfFolder(tmp_path / "source"), open_weights(tmp_path / "megatron", None), show=False)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_probe_passes_equal_models_and_stops_at_a_wrong_head_order(tmp_path: Path, family: str) -> None:
    shape = tiny_shape(family, tied=family == "llama")  # type: ignore[arg-type]
    weights = write_model(tmp_path / "source", shape)
    hf_to_torch_dist(tmp_path / "source", tmp_path / "megatron", show=False)
    torch_dist_to_hf(tmp_path / "megatron", None, tmp_path / "back", show=False)
    result = probe(tmp_path / "back", tmp_path / "megatron")
    assert result.largest_difference < 1e-4  # fp32 on both sides, logits of size 1
    assert result.standard_deviation > 0.1
    # The two key heads swapped: what a wrong interleaving would do.
    name = "model.layers.0.self_attn.k_proj.weight"
    weights[name] = weights[name].roll(shape.head_dim, 0)
    save_file(weights, tmp_path / "back" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not compute the same model"):
        probe(tmp_path / "back", tmp_path / "megatron")


def test_bad_input_ends_with_code_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    assert main(["convert", "hf-to-megatron", str(tmp_path / "pickled"), str(tmp_path / "out")]) == 2
    assert main(["convert", "megatron-to-hf", str(tmp_path / "pickled"), str(tmp_path / "out")]) == 2
    assert "is no torch_dist checkpoint that keeps the Hugging Face folder of its model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["convert", "inspect", str(tmp_path / "nowhere")]) == 2
    with pytest.raises(SystemExit):
        main(["convert", "hf-to-megatron", "a", "b", "--file-size", "-1"])
    assert "is no number above 0" in capsys.readouterr().err


def test_inspect_says_what_is_there_and_opens_no_pickle(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SHAPE, num_files=2)
    facts = inspect_folder(tmp_path / "model")
    assert (facts["format"], facts["files"], facts["dtypes"]) == ("Hugging Face folder, safetensors", 2, {"BF16": 47})
    assert facts["model"].startswith("qwen3: 4 layers, hidden 48, 8 heads (2 key-value) of 8, vocabulary 259")
    one = inspect_folder(tmp_path / "model" / "model-00001-of-00002.safetensors")
    assert 0 < one["tensors"] < 47
    (tmp_path / "model" / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors" in inspect_folder(tmp_path / "model")["problems"][0]
    cases = {
        "legacy/mp_rank_00/model_optim_rng.pt": ("Megatron-LM checkpoint, legacy", "--ckpt-format torch_dist"),
        "bin/pytorch_model.bin": ("pickled weights", "not opened"),
        "gguf/model.gguf": ("GGUF", "safetensors"),
        "empty/readme": ("unknown", "neither metadata.json nor safetensors"),
    }
    for path, (name, problem) in cases.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"\x80never read")
        facts = inspect_folder(tmp_path / path.split("/")[0])
        assert main(["convert", "inspect", str(tmp_path / path.split("/")[0])]) == 2, "a script need not read what is wrong"
        assert facts["format"] == name
        assert problem in facts["problems"][0]


def test_inspect_says_for_people_how_many_tensors_are_of_which_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(2000, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    write_model(tmp_path / "source", SHAPE)
    hf_to_torch_dist(tmp_path / "source", tmp_path / "megatron", show=False)
    capsys.readouterr()
    assert main(["convert", "inspect", str(tmp_path / "x.safetensors")]) == 0
    facts = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert {name: facts[name].strip() for name in ("tensors", "parameters", "dtypes")} == {
        "tensors": "3",
        "parameters": "2,010",  # 6 + 4 + 2000
        "dtypes": "2 F32, 1 BF16",
    }
    assert main(["convert", "inspect", str(tmp_path / "megatron")]) == 0
    facts = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert facts["vouched for"].strip() == "yes"
    assert facts["model"].strip() == "11 tensors, 74,512 parameters, 149,024 bytes, dtypes: 11 BF16"


def test_inspect_asks_for_trust_before_it_opens_a_foreign_index(tmp_path: Path) -> None:
    write_model(tmp_path / "source", SHAPE)
    hf_to_torch_dist(tmp_path / "source", tmp_path / "run" / "megatron", show=False)
    (tmp_path / "run" / "megatron" / "MANIFEST.json").unlink()
    facts = inspect_folder(tmp_path / "run" / "megatron")
    assert "model" not in facts
    assert "--trust opens it" in facts["problems"][0]
    assert inspect_folder(tmp_path / "run" / "megatron", trust=True)["model"]["tensors"] == 11
    several = inspect_folder(tmp_path / "run")
    assert several == {"format": "a folder of distributed checkpoints", "checkpoints": ["megatron"], "problems": []}
    (tmp_path / "run" / "megatron" / "UNFINISHED.json").write_text("{}")
    assert inspect_folder(tmp_path / "run" / "megatron")["format"] == "an unfinished conversion"
    assert main(["convert", "inspect", str(tmp_path / "run" / "megatron"), "--json"]) == 2


def test_the_tool_is_the_same_command(tmp_path: Path) -> None:
    write_model(tmp_path / "source", SHAPE)
    command = [sys.executable, str(TOOL), "inspect", str(tmp_path / "source"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(inspect_folder(tmp_path / "source")))
