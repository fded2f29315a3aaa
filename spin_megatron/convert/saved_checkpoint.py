"""Read a torch_dist checkpoint without a model, a process group or Megatron Core: any part of any tensor, from mapped files.

A torch_dist folder holds `metadata.json` (written last: its commit marker), `.metadata` (torch distributed checkpoint's index,
a pickle) and `*.distcp` files, in which each chunk of a tensor is one `torch.save` archive. Unpickling runs code, so:
`.metadata` is opened only when a manifest of ours vouches for it or the caller trusts the folder, and even then by an unpickler
that knows the handful of plain types the index is made of and refuses every other name.
"""

import io
import json
import mmap
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from spin_megatron.convert.read_ahead import advise
from spin_megatron.run.manifest import MANIFEST_NAME, digest_file, digest_values, read_manifest

COMMIT_NAME = "metadata.json"
INDEX_NAME = ".metadata"
# Beside those, in the checkpoints of this project's training: layout, settings, progress, versions; written last of all.
COMPLETE_NAME = "COMPLETE.json"
# How far above a checkpoint folder a manifest may lie: iter_0/train/MANIFEST.json vouches for iter_0/train/weights.
_MANIFEST_LEVELS = 3


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and where its archive lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    num_bytes: int


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of the checkpoint; chunks by the index of their first row when that is one layer, else under -1."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: dict[int, tuple[Chunk, ...]]

    def all_chunks(self) -> Iterator[Chunk]:
        for group in self.chunks.values():
            yield from group


def _enum_member(kind: type, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 (Debian 12's) pickle the member of an enum as, getattr(kind, name), for the one enum of an index."""
    if kind is not metadata._MEM_FORMAT_ENCODING:  # noqa: SLF001 (pickled by torch)
        raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) has no place in a checkpoint's index")
    return metadata._MEM_FORMAT_ENCODING[name]  # noqa: SLF001


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles a torch_dist index: plain containers and the types below, nothing that could run code."""

    _TYPES: ClassVar[dict[tuple[str, str], Any]] = {
        **{
            ("torch.distributed.checkpoint.metadata", kind.__name__): kind
            for kind in (
                metadata.Metadata,
                metadata.TensorStorageMetadata,
                metadata.BytesStorageMetadata,
                metadata.ChunkStorageMetadata,
                metadata.TensorProperties,
                metadata.MetadataIndex,
                metadata.StorageMeta,
                metadata._MEM_FORMAT_ENCODING,  # noqa: SLF001 (pickled by torch under this name)
            )
        },
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,  # noqa: SLF001 (pickled by torch)
        ("torch.serialization", "_get_layout"): lambda name: {"torch.strided": torch.strided}[name],
        ("torch", "Size"): torch.Size,
        ("builtins", "getattr"): _enum_member,
        ("collections", "OrderedDict"): dict,
        ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
        ("pathlib._local", "PosixPath"): lambda *parts: "/".join(parts),  # Python 3.13
    }

    def find_class(self, module: str, name: str) -> Any:
        """Give the type a pickle names, if it is one an index is made of."""
        if (module, name) in self._TYPES:
            return self._TYPES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


class SavedCheckpoint:
    """A torch_dist folder, opened by its index.

    Args:
        folder: holds metadata.json, .metadata and *.distcp.
        trust: open the pickled index although no manifest of ours vouches for it.

    Raises:
        ValueError: not a finished torch_dist folder, one that nobody vouches for, or missing or truncated files.
    """

    def __init__(self, folder: Path, *, trust: bool = False) -> None:
        self.path = Path(folder)
        _refuse_unfinished(self.path)
        if not trust and not is_vouched_for(self.path):
            raise ValueError(
                f"{self.path / INDEX_NAME} is a pickle and no {MANIFEST_NAME} of this project vouches for it; if you know where the folder "
                "comes from, pass --trust (trust=True)."
            )
        self.tensors = _read_index(self.path)
        self._files: dict[str, BinaryIO] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._views: dict[tuple[str, int], Tensor] = {}
        self._refuse_short_files()

    @property
    def num_bytes(self) -> int:
        """Bytes of all archives, optimizer and all."""
        return sum(chunk.num_bytes for tensor in self.tensors.values() for chunk in tensor.all_chunks())

    def identity(self) -> str:
        """A digest that changes with the checkpoint: its index (which has an id of its own save) and the files' sizes."""
        files = sorted({chunk.file for tensor in self.tensors.values() for chunk in tensor.all_chunks()})
        return digest_values([digest_file(self.path / INDEX_NAME), [(file, (self.path / file).stat().st_size) for file in files]])

    def read_rows(self, key: str, indices: Sequence[int], start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the matrix (or vector) that lies at `indices` (layer, expert) of a stacked tensor.

        Returns:
            A view of the mapped file where one chunk holds all of it, else a copy put together from several.

        Raises:
            ValueError: chunks are missing from the index, or an archive is not what the index says.
        """
        tensor, lead = self.tensors[key], len(indices)
        offsets, sizes = _box(tensor, indices, start, stop)
        parts = _parts(tensor, offsets, sizes)
        if sum(prod(end - begin for begin, end in box) for _, box in parts) != prod(sizes):
            raise ValueError(f"{self.path}: the index lacks part of {key} at {offsets}; the checkpoint is damaged, use another.")
        if len(parts) == 1:
            return self._cut(tensor, *parts[0]).reshape(sizes[lead:])
        whole = torch.empty(sizes, dtype=tensor.dtype)
        for chunk, box in parts:
            inside = tuple(slice(begin - offset, end - offset) for (begin, end), offset in zip(box, offsets, strict=True))
            whole[inside] = self._cut(tensor, chunk, box)
        return whole.reshape(sizes[lead:])

    def read_ahead(self, key: str, indices: Sequence[int], start: int, stop: int) -> None:
        """Have the system read these rows into its cache; see `read_ahead.advise`."""
        tensor = self.tensors[key]
        for chunk, box in _parts(tensor, *_box(tensor, indices, start, stop)):
            first, last = _span(chunk, box)
            # The archive's own head and tail, a few hundred bytes.
            overhead = chunk.num_bytes - prod(chunk.sizes) * tensor.dtype.itemsize
            advise(self._opened(chunk.file), chunk.start + first * tensor.dtype.itemsize, (last - first) * tensor.dtype.itemsize + overhead)

    def _cut(self, tensor: SavedTensor, chunk: Chunk, box: tuple[tuple[int, int], ...]) -> Tensor:
        """The part of a chunk that is `box` in the tensor's coordinates."""
        inside = tuple(slice(begin - offset, end - offset) for (begin, end), offset in zip(box, chunk.offsets, strict=True))
        return self._chunk(tensor, chunk)[inside]

    def _chunk(self, tensor: SavedTensor, chunk: Chunk) -> Tensor:
        """A chunk as a view of its file, kept for the next rows of it."""
        if (chunk.file, chunk.start) not in self._views:
            self._views[chunk.file, chunk.start] = self._open_chunk(tensor, chunk)
        return self._views[chunk.file, chunk.start]

    def _open_chunk(self, tensor: SavedTensor, chunk: Chunk) -> Tensor:
        """The archive is opened on the meta device, which gives dtype, strides and the place of its bytes, and reads none."""
        mapped = self._mapped(chunk.file)
        archive = cast(IO[bytes], _Window(mapped, chunk.start, chunk.num_bytes))
        found: Tensor = torch.load(archive, map_location="meta", weights_only=True)
        if found.dtype != tensor.dtype or found.numel() != prod(chunk.sizes) or not found.is_contiguous():
            where = f"{self.path / chunk.file}: {tensor.key} at {chunk.offsets}"
            raise ValueError(f"{where} is {tuple(found.shape)} {found.dtype}, not what the index says; use another checkpoint.")
        # torch keeps the place of a storage's bytes within the archive (docs, "Serialization semantics", FakeTensorMode).
        place = int(found.untyped_storage()._checkpoint_offset or 0) + int(found.storage_offset()) * found.itemsize  # noqa: SLF001
        return torch.frombuffer(mapped, dtype=found.dtype, count=found.numel(), offset=chunk.start + place).view(chunk.sizes)

    def _mapped(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            # A private copy-on-write map: torch warns about read-only buffers, and nothing here writes.
            self._maps[file] = mmap.mmap(self._opened(file).fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def _opened(self, file: str) -> BinaryIO:
        if file not in self._files:
            self._files[file] = open(self.path / file, "rb")  # noqa: SIM115 (as long as the maps)
        return self._files[file]

    def _refuse_short_files(self) -> None:
        needed: dict[str, int] = {}
        for tensor in self.tensors.values():
            for chunk in tensor.all_chunks():
                needed[chunk.file] = max(needed.get(chunk.file, 0), chunk.start + chunk.num_bytes)
        for file, num_bytes in needed.items():
            path = self.path / file
            if Path(file).name != file:
                raise ValueError(f"{self.path / INDEX_NAME} names {file!r}, outside of its folder; use another checkpoint.")
            size = path.stat().st_size if path.exists() else None
            if size is None or size < num_bytes:
                found = "is missing" if size is None else f"has {size} bytes, the index needs {num_bytes}: it is truncated"
                raise ValueError(f"{path} {found}; copy or save the checkpoint again.")


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a mapped file as a file of their own, without a copy."""

    def __init__(self, mapped: mmap.mmap, start: int, length: int) -> None:
        super().__init__()
        self._view = memoryview(mapped)[start : start + length]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


def _box(tensor: SavedTensor, indices: Sequence[int], start: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of rows [start, stop) of what lies at `indices`, in the stacked tensor's coordinates."""
    columns = tensor.shape[len(indices) + 1 :]
    return (*indices, start, *(0 for _ in columns)), (*(1 for _ in indices), stop - start, *columns)


def _parts(tensor: SavedTensor, offsets: Sequence[int], sizes: Sequence[int]) -> list[tuple[Chunk, tuple[tuple[int, int], ...]]]:
    """The chunks that hold some of a box, with what they hold of it."""
    candidates = tensor.chunks.get(offsets[0], ()) + tensor.chunks.get(-1, ())
    return [(chunk, box) for chunk in candidates if (box := _overlap(chunk, offsets, sizes)) is not None]


def _span(chunk: Chunk, box: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First and one past the last element of a box (in the tensor's coordinates) in the row-major order of the chunk."""
    first = last = 0
    for (begin, end), offset, size in zip(box, chunk.offsets, chunk.sizes, strict=True):
        first, last = first * size + begin - offset, last * size + end - 1 - offset
    return first, last + 1


def _overlap(chunk: Chunk, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[tuple[int, int], ...] | None:
    """The common part of a chunk and a box, as (begin, end) a dimension; None when there is none."""
    box = tuple(
        (max(mine, theirs), min(mine + size, theirs + length))
        for mine, size, theirs, length in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)
    )
    return box if all(begin < end for begin, end in box) else None


def _refuse_unfinished(folder: Path) -> None:
    try:
        backend = json.loads((folder / COMMIT_NAME).read_text(encoding="utf-8"))["sharded_backend"]
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {COMMIT_NAME}: it is no torch_dist checkpoint, or one whose saving did not finish.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / COMMIT_NAME} is not a checkpoint's ({error!r}); copy or save the checkpoint again.") from error
    if backend != "torch_dist":
        raise ValueError(f"{folder} is stored as {backend!r}; only 'torch_dist' is read. Save it again with --ckpt-format torch_dist.")
    if not (folder / INDEX_NAME).exists():
        raise ValueError(f"{folder} lacks {INDEX_NAME} (a hidden file: was it left out of a copy?); copy the checkpoint again.")


def is_vouched_for(folder: Path) -> bool:
    """Whether a manifest of ours, in the folder or above it, or what training wrote last, has the digest that the index has."""
    index = Path(folder).resolve() / INDEX_NAME
    complete = index.with_name(COMPLETE_NAME)
    if complete.exists() and index.exists():
        recorded = json.loads(complete.read_text(encoding="utf-8")).get("pickles", {})
        if recorded.get(INDEX_NAME) == digest_file(index):
            return True
    for parent in [index.parent, *index.parents[1 : 1 + _MANIFEST_LEVELS]]:
        manifest = read_manifest(parent)
        for output in manifest.outputs if manifest is not None else ():
            if parent / output.path == index and output.sha256 == digest_file(index):
                return True
    return False


def _read_index(folder: Path) -> dict[str, SavedTensor]:
    try:
        with open(folder / INDEX_NAME, "rb") as handle:
            index = _IndexUnpickler(handle).load()
        return dict(_tensors(index))
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / INDEX_NAME} is not a torch_dist index that is understood here ({error}).") from error


def _tensors(index: metadata.Metadata) -> Iterator[tuple[str, SavedTensor]]:
    places = {(at.fqn, tuple(at.offset)): info for at, info in index.storage_data.items() if at.offset is not None}
    for key, stored in index.state_dict_metadata.items():
        if not isinstance(stored, metadata.TensorStorageMetadata):
            continue
        groups: dict[int, list[Chunk]] = {}
        for chunk in stored.chunks:
            info = places[key, tuple(chunk.offsets)]
            if getattr(info, "transform_descriptors", None):
                raise ValueError(f"{key} is stored compressed, by {info.transform_descriptors}")
            is_one_layer = len(chunk.sizes) > 0 and chunk.sizes[0] == 1
            group = groups.setdefault(chunk.offsets[0] if is_one_layer else -1, [])
            group.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length))
        yield key, SavedTensor(key, stored.properties.dtype, tuple(stored.size), {at: tuple(group) for at, group in groups.items()})
