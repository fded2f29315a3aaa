"""Write safetensors files slice by slice, in any order, without holding a tensor.

All shapes are known before a weight is read, so files are planned first (`plan_files`), their headers written, and rows
put at their place as they come (`open_file`). A file is written aside and renamed when every byte of it is there; the index
comes last (`write_index`): a folder without it (or, with one file, without `model.safetensors`) is no model to any reader.

The format: 8 bytes little-endian header length, a JSON header padded with spaces to 8 bytes, then the tensors' bytes
without gaps (https://github.com/huggingface/safetensors, README).
"""

import errno
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from spin_megatron.run.manifest import write_json

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_DISK_FULL = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file size limit (ulimit -f) is reached",
}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """One file: its header's bytes and, for each tensor, the offset of its first byte in the file."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    header: bytes
    offsets: dict[str, int]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


class Sized(Protocol):
    """What takes so many bytes of a file."""

    @property
    def num_bytes(self) -> int: ...


SizedT = TypeVar("SizedT", bound=Sized)


def into_files(items: Sequence[SizedT], max_file_bytes: int) -> list[list[SizedT]]:
    """Group items, in the order given, into files of at most max_file_bytes (a larger item gets a file of its own)."""
    groups: list[list[SizedT]] = []
    room = 0
    for item in items:
        if not groups or item.num_bytes > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(item)
        room -= item.num_bytes
    return groups


def plan_files(tensors: Sequence[PlannedTensor], max_file_bytes: int) -> tuple[PlannedFile, ...]:
    """Plan the files of `into_files`."""
    groups = into_files(tensors, max_file_bytes)
    if len(groups) == 1:
        return (_planned_file(SINGLE_NAME, groups[0]),)
    return tuple(_planned_file(f"model-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, 1))


def _planned_file(name: str, tensors: Sequence[PlannedTensor]) -> PlannedFile:
    # Wider elements first keeps every tensor aligned to its own element size, as readers that map the file need.
    ordered = tuple(sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize))
    # transformers 4.46 reads metadata["format"] without asking whether it is there.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, positions = 0, {}
    for tensor in ordered:
        span = [position, position + tensor.num_bytes]
        entries[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        positions[tensor.name] = position
        position += tensor.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return PlannedFile(name, ordered, header, {name: len(header) + start for name, start in positions.items()})


class OpenFile:
    """A planned file being filled. `write_rows` may be called in any order, every row once."""

    def __init__(self, planned: PlannedFile, descriptor: int) -> None:
        self._planned = planned
        self._descriptor = descriptor
        self._tensors = {tensor.name: tensor for tensor in planned.tensors}
        self._missing = {tensor.name: tensor.num_bytes for tensor in planned.tensors}

    def write_rows(self, name: str, first_row: int, rows: Tensor) -> None:
        """Put rows [first_row, first_row + len(rows)) of a tensor in place; dtype and width must be the planned ones."""
        tensor = self._tensors[name]
        assert rows.dtype == tensor.dtype and tuple(rows.shape[1:]) == tensor.shape[1:], (name, rows.dtype, rows.shape)
        assert first_row + rows.shape[0] <= tensor.shape[0], (name, first_row, rows.shape)
        offset = self._planned.offsets[name] + first_row * prod(tensor.shape[1:]) * tensor.dtype.itemsize
        data = rows.contiguous().view(-1).view(torch.uint8).numpy().data
        self._missing[name] -= len(data)
        write_at(self._descriptor, data, offset)

    def unwritten(self) -> list[str]:
        """Names of tensors that miss rows (or got some twice)."""
        return [name for name, num_bytes in self._missing.items() if num_bytes]


@contextmanager
def open_file(folder: Path, planned: PlannedFile) -> Iterator[OpenFile]:
    """Yield a planned file to fill; on leaving it is fsynced and renamed, after an exception removed.

    Raises:
        OSError: the disk is full, the quota or the file size limit is reached (errno says which).
    """
    path = folder / planned.name
    aside = folder / f".{planned.name}.tmp"
    with disk_full_is_named(path, planned.num_bytes):
        # Not safetensors' own save_file: it makes files 0600 whatever the umask, so that another user's server cannot read them.
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(descriptor, planned.num_bytes)
            write_at(descriptor, memoryview(planned.header), 0)
            handle = OpenFile(planned, descriptor)
            yield handle
            assert not handle.unwritten(), f"{path}: rows of {handle.unwritten()} were not written"
            os.fsync(descriptor)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at a file offset (one call writes at most 2 GiB on Linux)."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def write_index(folder: Path, files: Sequence[PlannedFile]) -> None:
    """Write the index that makes several files one model; with a single file there is none."""
    if len(files) == 1:
        return
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.num_bytes for file in files for tensor in file.tensors)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


@contextmanager
def disk_full_is_named(path: Path, num_bytes: int) -> Iterator[None]:
    """Give the errors of a full disk a message that says what was written where, and what to do; their errno stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise OSError(
            error.errno,
            f"{path} ({num_bytes / 1e9:.2f} GB) could not be written: {_DISK_FULL[error.errno]}. Nothing unfinished was kept under a "
            "final name; make room and run the same command again: it goes on where it stopped",
        ) from error
