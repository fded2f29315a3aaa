"""Hugging Face -> torch_dist -> Hugging Face, bit for bit, interrupted, out of space, damaged and from strangers."""

import copyreg
import itertools
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from spin_megatron.convert import torch_dist, torch_dist_writer
from spin_megatron.convert.families import FAMILIES
from spin_megatron.convert.hf_io import HfFolder
from spin_megatron.convert.saved_checkpoint import SavedCheckpoint, is_vouched_for
from spin_megatron.convert.torch_dist import hf_to_torch_dist, torch_dist_to_hf
from spin_megatron.plan.model_config import Family
from spin_megatron.plan.shape import ModelShape
from tests.unit.tiny_models import tiny_shape, write_model

SHAPE = tiny_shape("llama")
SMALL_FILES = 60_000  # bytes: the tiny models are spread over several files a side


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that every matrix is cut into several, at places that respect no head."""
    monkeypatch.setattr(torch_dist, "PIECE_BYTES", 1000)


def to_megatron(source: Path, destination: Path, **options: Any) -> None:
    hf_to_torch_dist(source, destination, max_file_bytes=SMALL_FILES, show=False, **options)


def to_huggingface(checkpoint: Path, source: Path | None, destination: Path, **options: Any) -> None:
    torch_dist_to_hf(checkpoint, source, destination, max_file_bytes=SMALL_FILES, show=False, **options)


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Read by the safetensors library, file by file."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_bit_for_bit_with_its_tokenizer(tmp_path: Path, family: Family, tied: bool) -> None:
    weights = write_model(tmp_path / "source", tiny_shape(family, tied=tied), num_files=3)
    to_megatron(tmp_path / "source", tmp_path / "megatron")
    to_huggingface(tmp_path / "megatron", None, tmp_path / "back")
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 1
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert_same_weights(weights_of(tmp_path / "back"), weights)
    assert ModelShape.from_huggingface(tmp_path / "back") == ModelShape.from_huggingface(tmp_path / "source")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    HfFolder(tmp_path / "back")  # index and files agree
    leftovers = [path.name for folder in ("megatron", "back") for path in (tmp_path / folder).iterdir() if "tmp" in path.name]
    assert leftovers == []


def test_the_checkpoint_holds_what_torch_itself_reads_stacked_over_layers(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "source", SHAPE)
    to_megatron(tmp_path / "source", tmp_path / "megatron")
    keys = {
        "decoder.layers.mlp.linear_fc1.weight": (4, 64, 48),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (4, 48),
        "decoder.layers.self_attention.linear_qkv.weight": (4, (8 + 2 * 2) * 6, 48),
        "embedding.word_embeddings.weight": (259, 48),
    }
    state = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in keys.items()}
    dcp.load(state, checkpoint_id=tmp_path / "megatron", no_dist=True)
    layers = range(4)
    gate_up = [torch.cat([weights[f"model.layers.{n}.mlp.{half}_proj.weight"] for half in ("gate", "up")]) for n in layers]
    assert torch.equal(state["decoder.layers.mlp.linear_fc1.weight"], torch.stack(gate_up))
    norms = [weights[f"model.layers.{n}.input_layernorm.weight"] for n in layers]
    assert torch.equal(state["decoder.layers.self_attention.linear_qkv.layer_norm_weight"], torch.stack(norms))
    assert torch.equal(state["embedding.word_embeddings.weight"], weights["model.embed_tokens.weight"])
    q, k, v = (weights[f"model.layers.3.self_attn.{name}_proj.weight"] for name in "qkv")
    # Two groups of 4 query heads, 1 key and 1 value head of 6 rows.
    interleaved = torch.cat([q[:24], k[:6], v[:6], q[24:], k[6:], v[6:]])
    assert torch.equal(state["decoder.layers.self_attention.linear_qkv.weight"][3], interleaved)


def test_the_norm_before_experts_is_found_under_the_keys_of_both_layer_specs(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "source", tiny_shape("mixtral"))
    to_megatron(tmp_path / "source", tmp_path / "megatron")
    saved = SavedCheckpoint(tmp_path / "megatron")
    for key in ("decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"):
        assert torch.equal(saved.read_rows(key, (2,), 0, 48), weights["model.layers.2.post_attention_layernorm.weight"])
    expert = saved.read_rows("decoder.layers.mlp.experts.experts.linear_fc2.weight", (1, 3), 0, 48)
    assert torch.equal(expert, weights["model.layers.1.block_sparse_moe.experts.3.w2.weight"])


def test_a_head_that_a_tied_source_stores_is_stored_again_and_a_foreign_one_refused(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "source", tiny_shape("llama", tied=True))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    to_megatron(tmp_path / "source", tmp_path / "megatron")
    to_huggingface(tmp_path / "megatron", None, tmp_path / "back")
    assert_same_weights(weights_of(tmp_path / "back"), weights)
    weights["lm_head.weight"][258, 47] += 1
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tie_word_embeddings=true, but lm_head.weight is not model.embed_tokens.weight"):
        to_megatron(tmp_path / "source", tmp_path / "other")


def stacked(weights: dict[str, Tensor], tensor_parallel: int) -> dict[str, Tensor]:
    """A llama checkpoint as Megatron Core stores it, from Hugging Face tensors, by hand; vocabulary padded."""
    layers = range(4)

    def layer(name: str, n: int) -> Tensor:
        return weights[f"model.layers.{n}.{name}.weight"]

    def qkv(n: int) -> Tensor:
        q, k, v = (layer(f"self_attn.{name}_proj", n) for name in "qkv")
        return torch.cat([q[:24], k[:6], v[:6], q[24:], k[6:], v[6:]])

    pad = torch.zeros(-259 % tensor_parallel, 48, dtype=weights["lm_head.weight"].dtype)
    norm_2 = torch.stack([layer("post_attention_layernorm", n) for n in layers])
    return {
        "embedding.word_embeddings.weight": torch.cat([weights["model.embed_tokens.weight"], pad]),
        "output_layer.weight": torch.cat([weights["lm_head.weight"], pad + 5]),
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": torch.stack([layer("input_layernorm", n) for n in layers]),
        "decoder.layers.self_attention.linear_qkv.weight": torch.stack([qkv(n) for n in layers]),
        "decoder.layers.self_attention.linear_proj.weight": torch.stack([layer("self_attn.o_proj", n) for n in layers]),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": norm_2,
        "decoder.layers.mlp.linear_fc1.weight": torch.stack(
            [torch.cat([layer("mlp.gate_proj", n), layer("mlp.up_proj", n)]) for n in layers]
        ),
        "decoder.layers.mlp.linear_fc2.weight": torch.stack([layer("mlp.down_proj", n) for n in layers]),
    }


def save_as_ranks_would(folder: Path, state: dict[str, Tensor], tensor_parallel: int) -> None:
    """Write with torch's writer: rows of fc1 and qkv, columns of fc2 and proj, cut over tensor ranks; one box a layer."""
    pieces = []
    for key, tensor in state.items():
        columns = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
        dim = tensor.dim() - 1 if columns else int("layers" in key)
        cuts = [range(size) if at == 0 and "layers" in key else [None] for at, size in enumerate(tensor.shape)]
        step = tensor.shape[dim] // tensor_parallel
        for layer, rank in itertools.product(cuts[0], range(tensor_parallel if tensor.dim() > 1 and "norm" not in key else 1)):
            box = [slice(0, size) for size in tensor.shape]
            if layer is not None:
                box[0] = slice(layer, layer + 1)
            if tensor.dim() > 1 and "norm" not in key:
                box[dim] = slice(rank * step, (rank + 1) * step)
            offsets, sizes = tuple(s.start for s in box), tuple(s.stop - s.start for s in box)
            part = tensor[tuple(box)].clone()
            pieces.append(torch_dist_writer.Piece(key, key, tensor.dtype, tuple(tensor.shape), offsets, sizes, lambda part=part: part))
    folder.mkdir()
    writer = torch_dist_writer.TorchDistWriter(folder, pieces, max_file_bytes=SMALL_FILES)
    for file in writer.files:
        writer.write(file, lambda piece: None)
    writer.finish()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_a_training_checkpoint_of_any_layout_is_exported_without_its_optimizer_and_padding(tmp_path: Path, tensor_parallel: int) -> None:
    weights = write_model(tmp_path / "source", SHAPE, dtype=torch.float32)
    state = stacked(weights, tensor_parallel)
    optimizer = {f"optimizer.state.exp_avg.{key}": tensor + 3 for key, tensor in state.items()}
    save_as_ranks_would(tmp_path / "training", {**state, **optimizer}, tensor_parallel)
    to_huggingface(tmp_path / "training", tmp_path / "source", tmp_path / "back", trust=True)
    assert_same_weights(weights_of(tmp_path / "back"), weights)


def test_dtypes_change_only_when_asked_and_the_config_says_so(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "source", SHAPE, dtype=torch.bfloat16)
    trained = {name: weight.float() + 1e-4 for name, weight in weights.items()}
    save_as_ranks_would(tmp_path / "training", stacked(trained, 1), 1)
    for dtype, expected, stated in [
        ("stored", trained, "float32"),
        ("float32", trained, "float32"),
        ("source", {name: weight.bfloat16() for name, weight in trained.items()}, "bfloat16"),
        ("float16", {name: weight.half() for name, weight in trained.items()}, "float16"),
    ]:
        back = tmp_path / f"as_{dtype}"
        to_huggingface(tmp_path / "training", tmp_path / "source", back, dtype=dtype, trust=True)
        assert_same_weights(weights_of(back), expected)
        config = json.loads((back / "config.json").read_text())
        assert (config["torch_dtype"], config["dtype"]) == (stated, stated)


def test_missing_surplus_and_misshaped_keys_are_refused_by_name(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "source", SHAPE)
    state = stacked(weights, 1)
    fc2 = "decoder.layers.mlp.linear_fc2.weight"
    cases = {
        "missing": ({key: tensor for key, tensor in state.items() if key != fc2}, rf"lacks {fc2}, which config.json's llama model needs"),
        "surplus": ({**state, "decoder.layers.mlp.linear_fc2.bias": torch.zeros(4, 48)}, r"holds decoder.layers.mlp.linear_fc2.bias"),
        "layers": ({key: t[:3] if "layers" in key else t for key, t in state.items()}, r"has shape \(3, .*asks for \(4, "),
        "vocab": ({**state, "output_layer.weight": state["output_layer.weight"][:258]}, r"output_layer.weight has shape \(258, 48\)"),
    }
    for name, (changed, message) in cases.items():
        save_as_ranks_would(tmp_path / name, changed, 1)
        with pytest.raises(ValueError, match=message):
            to_huggingface(tmp_path / name, tmp_path / "source", tmp_path / f"{name}_back", trust=True)
        assert not (tmp_path / f"{name}_back").exists()


def test_a_pickled_index_is_opened_only_when_a_manifest_vouches_for_it(tmp_path: Path) -> None:
    write_model(tmp_path / "source", SHAPE)
    to_megatron(tmp_path / "source", tmp_path / "megatron")
    assert is_vouched_for(tmp_path / "megatron")
    (tmp_path / "megatron" / "MANIFEST.json").rename(tmp_path / "MANIFEST.json")
    with pytest.raises(ValueError, match=r"is a pickle and no MANIFEST.json of this project vouches for it; .*--trust"):
        to_huggingface(tmp_path / "megatron", None, tmp_path / "back")
    # A manifest further up vouches as well, when it lists the file from where it lies.
    values = json.loads((tmp_path / "MANIFEST.json").read_text())
    for output in values["outputs"]:
        output["path"] = f"megatron/{output['path']}"
    (tmp_path / "MANIFEST.json").write_text(json.dumps(values))
    to_huggingface(tmp_path / "megatron", None, tmp_path / "back")
    with open(tmp_path / "megatron" / ".metadata", "ab") as handle:
        handle.write(b"x")
    assert not is_vouched_for(tmp_path / "megatron")


class Exploit:
    """What an attacker's index would hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/spin_megatron_was_here",))


def test_even_a_trusted_index_cannot_run_code(tmp_path: Path) -> None:
    marker = Path("/tmp/spin_megatron_was_here")
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(ValueError, match=r"not a torch_dist index that is understood here \(posix.system has no place"):
        SavedCheckpoint(tmp_path, trust=True)
    assert not marker.exists()


class Reach:
    """getattr on anything but the one enum of an index leads out of it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (torch.Size, "__class__"))


def test_an_index_whose_enums_were_pickled_by_getattr_is_read_and_getattr_reaches_nothing_else(tmp_path: Path) -> None:
    write_model(tmp_path / "source", SHAPE)
    to_megatron(tmp_path / "source", tmp_path / "megatron")
    expected = SavedCheckpoint(tmp_path / "megatron").tensors
    index = tmp_path / "megatron" / ".metadata"
    with open(index, "rb") as handle:
        values = pickle.load(handle)
    with open(index, "wb") as handle:
        pickler = pickle.Pickler(handle)
        # As Python 3.11.0 to 3.11.3 do it by themselves.
        by_name = {_MEM_FORMAT_ENCODING: lambda member: (getattr, (_MEM_FORMAT_ENCODING, member.name))}
        pickler.dispatch_table = {**copyreg.dispatch_table, **by_name}
        pickler.dump(values)
    assert b"getattr" in index.read_bytes()
    assert SavedCheckpoint(tmp_path / "megatron", trust=True).tensors == expected
    index.write_bytes(pickle.dumps(Reach()))
    with pytest.raises(ValueError, match=r"getattr\(<class 'torch.Size'>, '__class__'\) has no place in a checkpoint's index"):
        SavedCheckpoint(tmp_path / "megatron", trust=True)


def test_unfinished_foreign_and_truncated_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path / "source", SHAPE)
    to_megatron(tmp_path / "source", tmp_path / "megatron")
    checkpoint = tmp_path / "megatron"
    path = checkpoint / "__1_0.distcp"
    size = path.stat().st_size
    os.truncate(path, size - 10)
    with pytest.raises(ValueError, match=rf"__1_0.distcp has {size - 10} bytes, the index needs {size}: it is truncated"):
        SavedCheckpoint(checkpoint)
    path.unlink()
    with pytest.raises(ValueError, match=r"__1_0.distcp is missing"):
        SavedCheckpoint(checkpoint)
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ValueError, match="is stored as 'zarr'"):
        SavedCheckpoint(checkpoint)
    (checkpoint / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"has no metadata.json: it is no torch_dist checkpoint, or one whose saving did not finish"):
        SavedCheckpoint(checkpoint)


def test_a_chunk_stored_transposed_is_refused_and_not_misread(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4)
    writer = FileSystemWriter(tmp_path)
    dcp.save({"decoder.x": tensor.t()}, storage_writer=writer, planner=DefaultSavePlanner(), no_dist=True)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert FileSystemReader(tmp_path).read_metadata().state_dict_metadata["decoder.x"].size == torch.Size([4, 3])
    saved = SavedCheckpoint(tmp_path, trust=True)
    with pytest.raises(ValueError, match="not what the index says"):
        saved.read_rows("decoder.x", (), 0, 4)


def test_a_full_disk_is_named_keeps_what_is_whole_and_the_same_command_goes_on(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "source", SHAPE, num_files=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"distcp .*could not be written: the file size limit"):
            to_megatron(tmp_path / "source", tmp_path / "megatron", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "megatron" / "metadata.json").exists()
    with pytest.raises(ValueError, match="did not finish"):
        SavedCheckpoint(tmp_path / "megatron", trust=True)
    to_megatron(tmp_path / "source", tmp_path / "megatron")
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"safetensors .*could not be written: the file size limit"):
            to_huggingface(tmp_path / "megatron", None, tmp_path / "back", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()
    to_huggingface(tmp_path / "megatron", None, tmp_path / "back")
    assert_same_weights(weights_of(tmp_path / "back"), weights)


def test_a_destination_too_small_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "source", SHAPE)
    num_bytes = HfFolder(tmp_path / "source").num_bytes
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": num_bytes - 1}))
    with pytest.raises(OSError, match=r"GB free and .* GB are to be written; make room first"):
        to_megatron(tmp_path / "source", tmp_path / "megatron")


def test_other_folders_and_other_conversions_are_left_alone(tmp_path: Path) -> None:
    write_model(tmp_path / "source", SHAPE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine exists and is not empty; give a new folder"):
        to_megatron(tmp_path / "source", tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "UNFINISHED.json").write_text('{"key": "that of another source"}')
    with pytest.raises(ValueError, match="holds an unfinished conversion of another source or with other settings"):
        to_megatron(tmp_path / "source", tmp_path / "other")


KILLED = """
import sys, time
from pathlib import Path
from spin_megatron.convert import torch_dist
from spin_megatron.convert.work_folder import Meter
count = Meter.count
def slowly(self, name, num_bytes):
    print("piece", flush=True)
    time.sleep(0.02)
    count(self, name, num_bytes)
Meter.count = slowly
source, destination = map(Path, sys.argv[2:])
if sys.argv[1] == "hf_to_torch_dist":
    torch_dist.hf_to_torch_dist(source, destination, max_file_bytes=20_000, workers=1, show=False)
else:
    torch_dist.torch_dist_to_hf(source, None, destination, max_file_bytes=20_000, workers=1, show=False)
"""


@pytest.mark.parametrize("direction", ["hf_to_torch_dist", "torch_dist_to_hf"])
def test_killed_in_the_middle_it_goes_on_and_does_not_write_finished_files_again(tmp_path: Path, direction: str) -> None:
    weights = write_model(tmp_path / "source", SHAPE)
    source, destination, pattern = tmp_path / "source", tmp_path / "destination", "*.distcp"
    if direction == "torch_dist_to_hf":
        hf_to_torch_dist(source, tmp_path / "megatron", show=False)
        source, pattern = tmp_path / "megatron", "*.safetensors"
    process = subprocess.Popen([sys.executable, "-c", KILLED, direction, str(source), str(destination)], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(destination.glob(pattern))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in sorted(destination.glob(pattern))[:2]}
    torch_dist.PIECE_BYTES = 64 * 2**20  # as in the killed process: the plan must be the same
    if direction == "hf_to_torch_dist":
        assert not (destination / "metadata.json").exists()
        hf_to_torch_dist(source, destination, max_file_bytes=20_000, show=False)
        to_huggingface(destination, None, tmp_path / "back")
        assert_same_weights(weights_of(tmp_path / "back"), weights)
    else:
        assert not (destination / "model.safetensors.index.json").exists()
        torch_dist_to_hf(source, None, destination, max_file_bytes=20_000, show=False)
        assert_same_weights(weights_of(destination), weights)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not list(destination.glob("UNFINISHED.json"))
    assert not list(destination.glob(".*.tmp"))


def test_a_source_changed_since_the_interruption_is_not_mixed_in(tmp_path: Path) -> None:
    write_model(tmp_path / "source", SHAPE, num_files=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match="file size limit"):
            to_megatron(tmp_path / "source", tmp_path / "megatron", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write_model(tmp_path / "source", SHAPE, num_files=2, seed=8)
    with pytest.raises(ValueError, match="unfinished conversion of another source"):
        to_megatron(tmp_path / "source", tmp_path / "megatron")


def test_mixed_dtypes_within_a_stacked_tensor_are_refused(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "source", replace(SHAPE, num_layers=2))
    weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"].float()
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.weight is float32, the same tensor of other layers bfloat16"):
        to_megatron(tmp_path / "source", tmp_path / "megatron")
