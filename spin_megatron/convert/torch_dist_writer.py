"""Write a torch_dist checkpoint without a model or a process group: planned pieces, read only when they are written.

The pieces go through torch's own FileSystemWriter, one `SavePlan` a file, as if every file came from a rank of its own. A
finished file's places are kept in a note beside it, so that an interrupted conversion goes on with the next file; the index
(`.metadata`) is made from all notes at the end.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization.config import save as save_options

from spin_megatron.convert.read_ahead import ahead
from spin_megatron.convert.safetensors_writer import disk_full_is_named, into_files
from spin_megatron.run.manifest import write_json


@dataclass(frozen=True)
class Piece:
    """A box of a stacked tensor: `sizes` elements at `offsets` of tensor `key`, whose whole shape is `shape`.

    parameter: what it is a part of, for counting.
    read: gives the piece, of shape `sizes` and `dtype`; called when it is written.
    read_ahead: has the system read the bytes of the piece; called some pieces earlier.
    """

    parameter: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    read: Callable[[], Tensor]
    read_ahead: Callable[[], None] = lambda: None

    @property
    def num_bytes(self) -> int:
        return prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class FilePlan:
    """What goes into one `.distcp` file."""

    name: str
    plan: SavePlan
    num_bytes: int


class TorchDistWriter:
    """Writes planned pieces into files of a folder, in any order and from several threads.

    Args:
        folder: exists already.
        pieces: everything the checkpoint will hold.
        max_file_bytes: a file is closed before it would grow beyond this; one piece may be larger.
    """

    def __init__(self, folder: Path, pieces: Sequence[Piece], *, max_file_bytes: int) -> None:
        self._folder = folder
        self._pieces = {(piece.key, piece.offsets): piece for piece in pieces}
        self._writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        plans = [SavePlan([_write_item(piece) for piece in group]) for group in into_files(pieces, max_file_bytes)]
        plans, self._index = create_default_global_save_plan(plans)
        plans = self._writer.prepare_global_plan(plans)
        # FileSystemWriter names a plan's only file by its prefix and 0.
        sizes = [sum(self._piece(item).num_bytes for item in plan.items) for plan in plans]
        names = [f"{plan.storage_data.prefix}0.distcp" for plan in plans]
        self.files = tuple(FilePlan(*file) for file in zip(names, plans, sizes, strict=True))

    @property
    def parameter_bytes(self) -> dict[str, int]:
        """Bytes of every parameter over all its pieces."""
        sizes: dict[str, int] = {}
        for piece in self._pieces.values():
            sizes[piece.parameter] = sizes.get(piece.parameter, 0) + piece.num_bytes
        return sizes

    def pieces_of(self, file: FilePlan) -> list[Piece]:
        """The pieces of one file, in the order in which they are written."""
        return [self._piece(item) for item in file.plan.items]

    def is_written(self, file: FilePlan) -> bool:
        """Whether an earlier run finished this file."""
        note = self._note(file)
        if not note.exists() or not (self._folder / file.name).exists():
            return False
        places = json.loads(note.read_text(encoding="utf-8"))
        return bool((self._folder / file.name).stat().st_size == max(start + length for *_, start, length in places))

    def write(self, file: FilePlan, on_piece: Callable[[Piece], None]) -> None:
        """Write and fsync one file; on_piece is called as each of its pieces is read.

        Raises:
            OSError: the disk is full.
        """
        path = self._folder / file.name
        pieces = ahead(self.pieces_of(file), lambda piece: piece.num_bytes, lambda piece: piece.read_ahead())

        def read(item: WriteItem) -> Tensor:
            piece = next(pieces)
            assert (piece.key, piece.offsets) == (item.index.fqn, tuple(item.index.offset or ())), "the writer keeps the plan's order"
            on_piece(piece)
            return _alone(piece.read())

        with disk_full_is_named(path, file.num_bytes), _removed_on_error(path):
            results = self._writer.write_data(file.plan, _Planner(read)).value()
        places = [[at.index.fqn, [*(at.index.offset or ())], at.storage_data.offset, at.storage_data.length] for at in results]
        write_json(self._note(file), places)

    def finish(self) -> None:
        """Write the index over all files, which must all be written, then drop the notes."""
        places = [(file, place) for file in self.files for place in json.loads(self._note(file).read_text(encoding="utf-8"))]
        results = [
            WriteResult(MetadataIndex(key, torch.Size(offsets)), length, _StorageInfo(file.name, start, length))
            for file, (key, offsets, start, length) in places
        ]
        self._writer.finish(self._index, [results])
        for file in self.files:
            self._note(file).unlink()

    def _piece(self, item: WriteItem) -> Piece:
        return self._pieces[item.index.fqn, tuple(item.index.offset or ())]

    def _note(self, file: FilePlan) -> Path:
        return self._folder / f".{file.name}.places.json"


class _Planner(DefaultSavePlanner):
    """Gives the writer a planned piece's bytes when it asks for them."""

    def __init__(self, read: Callable[[WriteItem], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Read the tensor of one item."""
        return self._read(write_item)


def _write_item(piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.shape))
    return WriteItem(MetadataIndex(piece.key, torch.Size(piece.offsets)), WriteItemType.SHARD, tensor_data=data)


def _alone(tensor: Tensor) -> Tensor:
    """The same contiguous tensor over a storage of exactly its bytes, which torch.save then writes without a copy.

    torch.save writes whole storages, and a slice's storage is the whole mapped file.
    """
    tensor = tensor.contiguous()
    start = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage).view(tensor.shape)


@contextlib.contextmanager
def no_archive_checksums() -> Iterator[None]:
    """Leave out the CRC32 of torch.save's archives, which torch.load never reads; `--verify` compares digests of tensors.

    It costs more than the writing: 1.6 against 3.8 GB/s from and to the page cache on one core.
    """
    before = save_options.compute_crc32
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    """Remove a half-written file; give the system's own error where torch.save hides it behind a RuntimeError."""
    try:
        yield
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise
