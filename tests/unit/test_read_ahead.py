"""Both converters ask the system for every byte they will read, in pieces that no kernel shortens, and not too early."""

import os
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from spin_megatron.convert import read_ahead, torch_dist
from spin_megatron.convert.hf_io import HfFolder
from spin_megatron.convert.read_ahead import ahead
from spin_megatron.convert.saved_checkpoint import SavedCheckpoint
from spin_megatron.convert.torch_dist import hf_to_torch_dist, torch_dist_to_hf
from tests.unit.tiny_models import tiny_shape, write_model


class Advice:
    """Stands in for os.posix_fadvise and keeps which bytes of which file were asked for."""

    def __init__(self) -> None:
        self.ranges: dict[str, list[tuple[int, int]]] = {}

    def __call__(self, descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        assert 0 < length <= 128 * 1024  # Linux's smallest window: more in one call is dropped without a word
        self.ranges.setdefault(os.readlink(f"/proc/self/fd/{descriptor}"), []).append((offset, offset + length))

    def covers(self, file: Path, start: int, stop: int) -> bool:
        position = start
        for begin, end in sorted(self.ranges.get(str(file.resolve()), [])):
            position = end if begin <= position < end else position
        return position >= stop


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> Advice:
    found = Advice()
    monkeypatch.setattr(os, "posix_fadvise", found)
    monkeypatch.setattr(torch_dist, "PIECE_BYTES", 1000)
    return found


def test_every_byte_of_the_source_is_asked_for(tmp_path: Path, advice: Advice) -> None:
    write_model(tmp_path / "source", tiny_shape("qwen3_moe"), num_files=2)
    hf_to_torch_dist(tmp_path / "source", tmp_path / "megatron", max_file_bytes=60_000, show=False)
    for name, entry in HfFolder(tmp_path / "source").entries.items():
        assert advice.covers(entry.file, entry.start, entry.start + entry.num_bytes), name
    advice.ranges.clear()
    torch_dist_to_hf(tmp_path / "megatron", None, tmp_path / "back", show=False)
    # One of the two keys of the norm before experts is enough.
    left_out = "decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    for key, tensor in SavedCheckpoint(tmp_path / "megatron").tensors.items():
        for chunk in tensor.all_chunks():
            asked = advice.covers(tmp_path / "megatron" / chunk.file, chunk.start, chunk.start + chunk.num_bytes)
            assert asked or key in left_out, (key, chunk)


def test_columns_are_asked_for_with_all_their_rows(tmp_path: Path, advice: Advice) -> None:
    write_model(tmp_path, tiny_shape("llama"))
    folder = HfFolder(tmp_path)
    entry = folder.entry("model.layers.2.mlp.down_proj.weight")
    folder.get_slice("model.layers.2.mlp.down_proj.weight", 1, 5, 17)
    assert advice.covers(entry.file, entry.start, entry.start + entry.num_bytes)


def test_large_ranges_are_asked_for_in_small_calls(tmp_path: Path, advice: Advice) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with open(tmp_path / "file", "rb") as file:
        read_ahead.advise(file, 7, 1_000_000)
    assert advice.covers(tmp_path / "file", 7, 1_000_007)
    assert len(advice.ranges[str((tmp_path / "file").resolve())]) == 8  # 7 x 128 KiB and a rest


def test_items_are_asked_for_before_their_turn_and_a_bounded_number_of_bytes_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 10)
    events: list[str] = []
    for item in ahead([4, 5, 6, 30, 1], lambda size: size, lambda size: events.append(f"ask {size}")):
        events.append(f"use {item}")
    # 4 + 5 are below 10, with 6 it is 15; after the 4 it is 11; after the 5 it is 6; then 30 alone; then 1.
    assert events == ["ask 4", "ask 5", "ask 6", "use 4", "use 5", "ask 30", "use 6", "use 30", "ask 1", "use 1"]


def test_threads_write_archives_without_the_checksums_that_nobody_reads(tmp_path: Path) -> None:
    write_model(tmp_path / "source", tiny_shape("llama"))
    hf_to_torch_dist(tmp_path / "source", tmp_path / "megatron", show=False, workers=2)
    saved = SavedCheckpoint(tmp_path / "megatron")
    (chunk,) = saved.tensors["decoder.final_layernorm.weight"].all_chunks()
    data = (tmp_path / "megatron" / chunk.file).read_bytes()[chunk.start : chunk.start + chunk.num_bytes]
    with zipfile.ZipFile(BytesIO(data)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data/0"))
        assert archive.getinfo(name).file_size == 48 * 2
        with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
            archive.read(name)
