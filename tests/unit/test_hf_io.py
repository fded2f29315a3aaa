"""Hugging Face folders are read by slice, refused by name when they are not whole, and written for both transformers majors."""

import json
import os
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spin_megatron.convert.families import FAMILIES
from spin_megatron.convert.hf_io import HfFolder, both_dialects, check_tensors, copy_tokenizer_files, model_card
from spin_megatron.convert.safetensors_writer import PlannedTensor, open_file, plan_files, write_index
from spin_megatron.plan.model_config import Family
from spin_megatron.plan.shape import ModelShape
from tests.unit.tiny_models import LLAMA3_SCALING, config_of_transformers_4, config_of_transformers_5, tiny_shape, write_model

SHAPE = tiny_shape("llama")


@pytest.mark.parametrize("num_files", [1, 3])
def test_slices_are_those_of_the_tensors_that_were_stored(tmp_path: Path, num_files: int) -> None:
    weights = write_model(tmp_path, SHAPE, num_files=num_files)
    folder = HfFolder(tmp_path)
    assert len(folder.files) == num_files
    assert set(folder.names) == set(weights)
    assert folder.num_bytes == sum(weight.nbytes for weight in weights.values())
    name = "model.layers.2.mlp.down_proj.weight"
    assert folder.shape(name) == (48, 32)
    assert folder.dtype(name) == torch.bfloat16
    assert torch.equal(folder.get_slice(name, 0, 5, 17), weights[name][5:17])
    assert torch.equal(folder.get_slice(name, 1, 5, 17), weights[name][:, 5:17])
    assert torch.equal(folder.get_tensor("model.norm.weight"), weights["model.norm.weight"])
    check_tensors(folder, SHAPE)


def test_a_truncated_file_is_refused_by_name_and_size(tmp_path: Path) -> None:
    write_model(tmp_path, SHAPE, num_files=3)
    path = tmp_path / "model-00002-of-00003.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ValueError, match=rf"model-00002-of-00003.safetensors has {size - 1} bytes, its header promises {size}"):
        HfFolder(tmp_path)
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors \(100 bytes\) is truncated within its header"):
        HfFolder(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00003.safetensors, which model.safetensors.index.json names"):
        HfFolder(tmp_path)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, SHAPE)
    path = tmp_path / "model.safetensors"
    text = json.dumps({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 6]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"123456")
    with pytest.raises(ValueError, match=r"a \(BF16, shape \(4,\)\) does not fill bytes 0 to 6"):
        HfFolder(tmp_path)
    path.write_bytes(struct.pack("<Q", 4) + b"{]{]")
    with pytest.raises(ValueError, match="broken safetensors header"):
        HfFolder(tmp_path)


def test_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    with pytest.raises(ValueError, match=r"only as pickles \(pytorch_model.bin\), which run code"):
        HfFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        HfFolder(tmp_path)


def test_an_index_that_disagrees_or_points_outside_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, SHAPE, num_files=2)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"disagree on where model.norm.weight lies"):
        HfFolder(tmp_path)
    values["weight_map"]["model.norm.weight"] = "../model.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="names files outside of its folder"):
        HfFolder(tmp_path)


def changed(folder: Path, weights: dict[str, Any]) -> HfFolder:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return HfFolder(folder)


def test_missing_surplus_and_wrongly_shaped_tensors_are_refused_by_name(tmp_path: Path) -> None:
    weights = write_model(tmp_path, SHAPE)
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=rf"lacks {name}, which config.json's llama model needs"):
        check_tensors(changed(tmp_path, {key: value for key, value in weights.items() if key != name}), SHAPE)
    with pytest.raises(ValueError, match=r"holds model.layers.1.self_attn.k_proj.bias, which no llama model has"):
        check_tensors(changed(tmp_path, {**weights, "model.layers.1.self_attn.k_proj.bias": torch.zeros(12)}), SHAPE)
    with pytest.raises(ValueError, match=rf"{name} has shape \(12, 47\), config.json asks for \(12, 48\)"):
        check_tensors(changed(tmp_path, {**weights, name: weights[name][:, :47].contiguous()}), SHAPE)
    with pytest.raises(ValueError, match=r"model.norm.weight is I32; only F32, F16, BF16 weights are read"):
        check_tensors(changed(tmp_path, {**weights, "model.norm.weight": torch.zeros(48, dtype=torch.int32)}), SHAPE)
    with pytest.raises(ValueError, match=r"k_proj.weight.* differ in dtype"):
        check_tensors(changed(tmp_path, {**weights, name: weights[name].float()}), SHAPE)


def test_buffers_of_old_files_and_the_copy_of_a_tied_head_are_no_surplus(tmp_path: Path) -> None:
    weights = write_model(tmp_path, SHAPE)
    check_tensors(changed(tmp_path, {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}), SHAPE)
    tied = tiny_shape("llama", tied=True)
    check_tensors(changed(tmp_path, weights), tied)  # holds lm_head.weight as well


def test_rows_written_in_any_order_are_read_back_by_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7, 3), "b": torch.randn(5, 4).bfloat16(), "c": torch.randn(6), "d": torch.randn(11, 2).half()}
    planned = plan_files([PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()], 130)
    # a 84 bytes + b 40 = 124 fit; c 24 + d 44 go to a second file.
    assert [[tensor.name for tensor in file.tensors] for file in planned] == [["a", "b"], ["c", "d"]]
    for file in planned:
        with open_file(tmp_path, file) as handle:
            for tensor in reversed(file.tensors):
                for row in reversed(range(tensor.shape[0])):
                    handle.write_rows(tensor.name, row, tensors[tensor.name][row : row + 1])
    write_index(tmp_path, planned)
    found = {name: tensor for file in planned for name, tensor in load_file(tmp_path / file.name).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 84 + 40 + 24 + 44
    assert index["weight_map"]["d"] == "model-00002-of-00002.safetensors"
    with safe_open(tmp_path / planned[0].name, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_written_files_honour_the_umask(tmp_path: Path) -> None:
    (planned,) = plan_files([PlannedTensor("a", torch.float32, (2,))], 100)
    before = os.umask(0o027)
    try:
        with open_file(tmp_path, planned) as handle:
            handle.write_rows("a", 0, torch.zeros(2))
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_file_with_unwritten_rows_never_gets_its_name(tmp_path: Path) -> None:
    (planned,) = plan_files([PlannedTensor("a", torch.float32, (2,))], 100)
    with pytest.raises(AssertionError, match=r"rows of \['a'\] were not written"), open_file(tmp_path, planned) as handle:
        handle.write_rows("a", 0, torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (planned,) = plan_files([PlannedTensor("a", torch.float32, (5000,))], 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        message = r"model.safetensors .* could not be written: the file size limit .*run the same command again"
        with pytest.raises(OSError, match=message), open_file(tmp_path, planned) as handle:
            handle.write_rows("a", 0, torch.zeros(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_either_dialect_becomes_one_that_both_read(family: Family) -> None:
    shape = tiny_shape(family, tied=family == "qwen2", scaling=LLAMA3_SCALING if family == "llama" else None)
    old, new = config_of_transformers_4(shape), config_of_transformers_5(shape)
    for source in (old, new):
        both = both_dialects(source)
        assert {name: both[name] for name in source if source[name] is not None} == {k: v for k, v in source.items() if v is not None}
        assert ModelShape.from_config(both) == shape
        # What a reader of one dialect alone sees is the whole model.
        only_old = {name: value for name, value in both.items() if name not in ("rope_parameters", "dtype", "num_local_experts")}
        only_new = {name: value for name, value in both.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype", "num_experts")}
        if family == "mixtral":
            only_old["num_local_experts"] = both["num_local_experts"]
        assert ModelShape.from_config(only_old) == ModelShape.from_config(only_new) == shape
        assert (only_old["torch_dtype"], only_new["dtype"]) == ("bfloat16", "bfloat16")


def test_an_explicit_cast_is_the_only_thing_that_changes_a_field() -> None:
    source = {**config_of_transformers_4(SHAPE), "my_field": {"kept": [1]}, "transformers_version": "4.40.0"}
    both = both_dialects(source, dtype="float32")
    assert both == {**both_dialects(source), "dtype": "float32", "torch_dtype": "float32"}
    assert both["my_field"] == {"kept": [1]}
    assert list(both)[: len(source)] == list(source)


def test_tokenizer_files_are_carried_byte_for_byte_and_code_is_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    contents = {
        "tokenizer.json": b'{"a":\r\n1}',
        "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer"}',
        "tokenizer.model": bytes(range(256)),
        "chat_template.jinja": b"{{ x }}\n",
        "additional_chat_templates/tool_use.jinja": b"{{ y }}",
        "generation_config.json": b'{"eos_token_id": [1, 2]}',
        "LICENSE.txt": b"terms",
    }
    for name, content in {**contents, "modeling_x.py": b"print()", "model.safetensors": b"", "config.json": b"{}"}.items():
        (source / name).write_bytes(content)
    copied = copy_tokenizer_files(source, target)
    assert {str(path.relative_to(target)): path.read_bytes() for path in copied} == contents
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == set(contents)


def test_the_model_card_states_each_fact_in_its_row() -> None:
    card = model_card({"loss": "logistic, beta 0.1", "data": "a|b\nc"})
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| loss | logistic, beta 0.1 |\n| data | a\\|b c |\n" in card
