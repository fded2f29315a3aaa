"""Convert between a Hugging Face folder and a torch_dist checkpoint: streaming, without a model or a process group.

Neither side is ever held. Hugging Face tensors are mapped files, of which planned pieces (at most PIECE_BYTES) go into
torch_dist archives as they are asked for; on the way back rows go from mapped archives to their planned place in
safetensors files. torch_dist stores whole tensors stacked over layers, so no TP or PP appears anywhere, and Megatron Core loads
the result at any layout. Both directions go on where they were interrupted, and are finished only when they say so.
"""

import json
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from math import inf, prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spin_megatron.convert.adapters import MergedCheckpoint
from spin_megatron.convert.families import WholeParameter, cut_rows, parameters, row_blocks
from spin_megatron.convert.hf_io import DTYPES, HfFolder, check_tensors, copy_tokenizer_files, is_carried, write_config_both_dialects
from spin_megatron.convert.read_ahead import ahead
from spin_megatron.convert.safetensors_writer import PlannedFile, PlannedTensor, open_file, plan_files, write_index
from spin_megatron.convert.saved_checkpoint import COMMIT_NAME, INDEX_NAME, SavedCheckpoint, SavedTensor
from spin_megatron.convert.torch_dist_writer import FilePlan, Piece, TorchDistWriter, no_archive_checksums
from spin_megatron.convert.work_folder import begin, default_workers, finish, metered, over_files
from spin_megatron.plan.shape import SOURCE_FOLDER, ModelShape
from spin_megatron.run.manifest import (
    Manifest,
    atomic_path,
    git_revision,
    installed_versions,
    output_file,
    stage_key,
    write_json,
    write_manifest,
)

# What one thread holds at most: the copy of interleaved or cast rows.
PIECE_BYTES = 64 * 2**20
# torch_dist files are only ever read by programs; Hugging Face's are what a hub shows.
TORCH_DIST_FILE_BYTES = 2_000_000_000
HUGGINGFACE_FILE_BYTES = 5_000_000_000
TENSORS_NAME = "tensors.json"
COMMON_NAME = "common.pt"
SavedDtype = Literal["stored", "source", "float32", "bfloat16", "float16"]
_CASTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LAYER = re.compile(r"(?<=^model\.layers\.)\d+")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


def hf_to_torch_dist(
    source: Path, destination: Path, *, max_file_bytes: int = TORCH_DIST_FILE_BYTES, workers: int | None = None, show: bool = True
) -> None:
    """Write a Hugging Face folder as a torch_dist checkpoint that Megatron Core loads at any TP, PP, VPP and EP.

    Args:
        source: config.json, safetensors, tokenizer files.
        destination: a new or empty folder, or one this conversion left unfinished.
        max_file_bytes: largest `.distcp` file; workers: files written at once.

    Raises:
        ValueError: anything about the source that `check_tensors` or `ModelShape.from_huggingface` refuses, or a destination that
            holds something else.
        OSError: the disk is full.
    """
    started = _now()
    shape, folder = ModelShape.from_huggingface(source), HfFolder(source)
    check_tensors(folder, shape)
    if shape.tied_embeddings and _HEAD in folder.entries:
        _refuse_untied(folder)
    settings = {"max_file_bytes": max_file_bytes, "piece_bytes": PIECE_BYTES}
    key = stage_key("hf-to-megatron", settings, {"source": folder.identity()})
    writer = TorchDistWriter(destination, list(_pieces(folder, shape)), max_file_bytes=max_file_bytes)
    done = [file for file in writer.files if writer.is_written(file)]
    begin(destination, key, sum(file.num_bytes for file in writer.files if file not in done))
    with metered("hf-to-megatron", writer.parameter_bytes, done=sum(file.num_bytes for file in done), show=show) as meter:
        for file in done:
            for piece in writer.pieces_of(file):
                meter.forget(piece.parameter, piece.num_bytes)

        def write(file: FilePlan) -> None:
            writer.write(file, lambda piece: meter.count(piece.parameter, piece.num_bytes))

        with no_archive_checksums():
            over_files([file for file in writer.files if file not in done], write, workers=workers or default_workers(), stop=meter.stop)
    writer.finish()
    _write_source_facts(source, folder, destination / SOURCE_FOLDER)
    _commit(destination, key, settings, {"source": folder.identity()}, started)


def _pieces(folder: HfFolder, shape: ModelShape) -> Iterator[Piece]:
    """Everything a checkpoint of this shape holds, in the order of layers, in which sources are usually stored."""
    entries = sorted(parameters(shape), key=lambda entry: _order(entry.sources[0].name))
    dtypes: dict[str, torch.dtype] = {}
    for entry in entries:
        name = entry.sources[0].name
        dtype = folder.dtype(name)
        if dtypes.setdefault(entry.saved[0], dtype) != dtype:
            others = _dtype_name(dtypes[entry.saved[0]])
            raise ValueError(f"{folder.path}: {name} is {_dtype_name(dtype)}, the same tensor of other layers {others}; store them in one.")
        stack = ((shape.num_layers, shape.num_experts or 0))[: len(entry.indices)]
        for start, stop in _row_ranges(entry, dtype):
            sizes = (*(1 for _ in stack), stop - start, *entry.shape[1:])
            offsets = (*entry.indices, start, *(0 for _ in entry.shape[1:]))
            blocks = _source_rows(entry, shape, start, stop)
            read, read_ahead = partial(_read_rows, folder, blocks, sizes), partial(_read_rows_ahead, folder, blocks)
            for key in entry.saved:
                yield Piece(f"{key} {entry.indices}", key, dtype, (*stack, *entry.shape), offsets, sizes, read, read_ahead)


def _row_ranges(entry: WholeParameter, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Row ranges of a whole parameter of at most PIECE_BYTES each; of gate_up none lies in both halves, so none is copied."""
    step = max(1, PIECE_BYTES // (prod(entry.shape[1:]) * dtype.itemsize))
    bounds = [0, entry.shape[0] // 2, entry.shape[0]] if entry.kind == "gate_up" else [0, entry.shape[0]]
    for first, last in pairwise(bounds):
        for start in range(first, last, step):
            yield start, min(start + step, last)


def _source_rows(entry: WholeParameter, shape: ModelShape, start: int, stop: int) -> list[tuple[str, int, int]]:
    """(Hugging Face name, first row, last row) of what makes rows [start, stop) of a Megatron parameter."""
    return [(entry.sources[block.source].name, block.start, block.stop) for block in cut_rows(row_blocks(entry, shape), start, stop)]


def _read_rows(folder: HfFolder, blocks: list[tuple[str, int, int]], sizes: tuple[int, ...]) -> Tensor:
    rows = [folder.get_slice(name, 0, start, stop) for name, start, stop in blocks]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).view(sizes)


def _read_rows_ahead(folder: HfFolder, blocks: list[tuple[str, int, int]]) -> None:
    for name, start, stop in blocks:
        folder.read_ahead(name, start, stop)


def _refuse_untied(folder: HfFolder) -> None:
    """Refuse a tied model whose stored head is not its embedding: every reader would drop the head."""
    step = max(1, PIECE_BYTES // (folder.shape(_HEAD)[1] * 4))
    for start in range(0, folder.shape(_HEAD)[0], step):
        stop = min(start + step, folder.shape(_HEAD)[0])
        if not torch.equal(folder.get_slice(_HEAD, 0, start, stop), folder.get_slice(_EMBEDDING, 0, start, stop)):
            raise ValueError(
                f"{folder.path}: config.json says tie_word_embeddings=true, but {_HEAD} is not {_EMBEDDING}; set it to false to keep "
                f"the head, or remove {_HEAD}."
            )


def _write_source_facts(source: Path, folder: HfFolder, target: Path) -> None:
    """Keep what the way back needs besides the weights: config, tokenizer, and which tensors there were in which dtype."""
    target.mkdir(exist_ok=True)
    with atomic_path(target / "config.json") as aside:
        aside.write_bytes((source / "config.json").read_bytes())
    copy_tokenizer_files(source, target)
    write_json(target / TENSORS_NAME, {name: entry.dtype for name, entry in folder.entries.items() if is_carried(name)})


def _commit(destination: Path, key: str, settings: dict[str, int], inputs: dict[str, str], started: str) -> None:
    """Write Megatron Core's two files and the manifest that vouches for the pickled index; then the folder is whole."""
    with atomic_path(destination / COMMON_NAME) as aside:
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, aside)
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
    write_json(destination / COMMIT_NAME, backends)
    # Data files are not listed: their digests would cost as much as the conversion. Their sizes follow from the index.
    outputs = tuple(output_file(destination, destination / name) for name in (INDEX_NAME, COMMON_NAME, COMMIT_NAME))
    manifest = Manifest(
        stage="hf-to-megatron",
        iteration=None,
        shard=None,
        key=key,
        settings=settings,
        inputs=inputs,
        outputs=outputs,
        versions=installed_versions(),
        git=git_revision(),
        host=socket.gethostname(),
        started_at=started,
        finished_at=_now(),
    )
    write_manifest(destination, manifest)
    finish(destination)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _order(name: str) -> tuple[float, str]:
    """Embedding, layers by number, then norm and head."""
    layer = _LAYER.search(name)
    return (-1.0 if name == _EMBEDDING else inf if layer is None else int(layer.group()), name)


def torch_dist_to_hf(
    checkpoint: Path,
    source: Path | None,
    destination: Path,
    *,
    dtype: SavedDtype = "stored",
    max_file_bytes: int = HUGGINGFACE_FILE_BYTES,
    workers: int | None = None,
    trust: bool = False,
    lora_alpha: float | None = None,
    show: bool = True,
) -> None:
    """Write the weights of a torch_dist checkpoint, of ours or of training, as a Hugging Face folder.

    Of a training checkpoint only the model's keys are read. Padded vocabulary rows are cut, tied embeddings stay tied, and the
    set of tensors is the source's.

    Args:
        checkpoint: the torch_dist folder.
        source: the Hugging Face folder the model came from (config, tokenizer, tensor names); None: what a converted
            checkpoint keeps of it.
        destination: a new or empty folder, or one this conversion left unfinished.
        dtype: of the tensors written: as stored in the checkpoint, as in the source, or one for all.
        trust: open the checkpoint's pickled index although no manifest of ours vouches for it.
        lora_alpha: the checkpoint holds LoRA adapters alone; what is written is source's weights with them merged in, in `dtype`.

    Raises:
        ValueError: the checkpoint is not whole, lacks or adds tensors, or has them in other shapes than config.json asks for; a
            destination that holds something else.
        OSError: the disk is full.
    """
    if source is None:
        source = checkpoint / SOURCE_FOLDER
        if not source.is_dir():
            raise ValueError(
                f"{checkpoint} is no torch_dist checkpoint that keeps the Hugging Face folder of its model, as conversions do; give one "
                "that does, or name that folder with --model."
            )
    shape, names = ModelShape.from_huggingface(source), source_dtypes(source)
    settings: dict[str, Any] = {"dtype": dtype, "max_file_bytes": max_file_bytes}
    if lora_alpha is None:
        saved = SavedCheckpoint(checkpoint, trust=trust)
    else:
        saved = MergedCheckpoint(checkpoint, source, alpha=lora_alpha, dtype=_CASTS[dtype], trust=trust)
        settings["lora_alpha"] = lora_alpha
    weights = StoredWeights(saved, shape, names, dtype)
    files = plan_files(weights.planned(), max_file_bytes)
    key = stage_key("megatron-to-hf", settings, {"checkpoint": saved.identity(), "config": (source / "config.json").read_text("utf-8")})
    done = [file for file in files if (destination / file.name).exists()]
    begin(destination, key, sum(file.num_bytes for file in files if file not in done))
    sizes = {tensor.name: tensor.num_bytes for file in files for tensor in file.tensors}
    with metered("megatron-to-hf", sizes, done=sum(file.num_bytes for file in done), show=show) as meter:
        for tensor in [tensor for file in done for tensor in file.tensors]:
            meter.forget(tensor.name, tensor.num_bytes)

        def write(file: PlannedFile) -> None:
            bands = [band for tensor in file.tensors for band in weights.bands(tensor.name)]
            with open_file(destination, file) as handle:
                for band in ahead(bands, lambda band: band.num_bytes, weights.read_ahead):
                    meter.count(band.name, band.num_bytes)
                    handle.write_rows(band.name, band.first_row, weights.read(band))

        over_files([file for file in files if file not in done], write, workers=workers or default_workers(), stop=meter.stop)
    copy_tokenizer_files(source, destination)
    write_config_both_dialects(source, destination, dtype=weights.changed_dtype())
    write_index(destination, files)
    finish(destination)


def source_dtypes(source: Path) -> dict[str, torch.dtype]:
    """Names and dtypes of the tensors of a Hugging Face folder, or of what a converted checkpoint keeps of one."""
    if (source / TENSORS_NAME).exists():
        return {name: DTYPES[dtype] for name, dtype in json.loads((source / TENSORS_NAME).read_text(encoding="utf-8")).items()}
    folder = HfFolder(source)
    return {name: folder.dtype(name) for name in folder.names if is_carried(name)}


@dataclass(frozen=True)
class Band:
    """Rows [first_row, last_row) of a Hugging Face tensor, which are rows [start, ...) at `indices` of a checkpoint's `key`."""

    name: str
    first_row: int
    last_row: int
    num_bytes: int
    key: str
    indices: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.last_row - self.first_row


class StoredWeights:
    """A checkpoint's weights under their Hugging Face names, row by row.

    Raises:
        ValueError: the checkpoint lacks a tensor of the model, holds one it has no place for, or has one in another shape.
    """

    def __init__(self, saved: SavedCheckpoint, shape: ModelShape, source: dict[str, torch.dtype], dtype: SavedDtype) -> None:
        self._saved, self._shape, self._source, self._dtype = saved, shape, source, dtype
        self._entries = {entry.sources[n].name: (entry, n) for entry in parameters(shape) for n in range(len(entry.sources))}
        if shape.tied_embeddings and _HEAD in source:  # a copy the source stores, and so do we
            self._entries[_HEAD] = self._entries[_EMBEDDING]
        self._keys = {entry.name: self._key(entry) for entry in parameters(shape)}
        used = set(self._keys.values()) | {key for entry in parameters(shape) for key in entry.saved}
        surplus = sorted(key for key in saved.tensors if key.startswith(_MODEL_KEYS) and key not in used)
        if surplus:
            raise ValueError(f"{saved.path} holds {', '.join(surplus[:4])}, which no {shape.family} model has; is config.json its own?")

    def planned(self) -> list[PlannedTensor]:
        """The tensors to be written, embedding first, then layer by layer."""
        return [PlannedTensor(name, self.dtype(name), self._sized(name)) for name in sorted(self._entries, key=_order)]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which a tensor is given."""
        if self._dtype == "stored":
            return self._saved.tensors[self._keys[self._entries[name][0].name]].dtype
        return self._source.get(name, self._source[_EMBEDDING]) if self._dtype == "source" else _CASTS[self._dtype]

    def changed_dtype(self) -> str | None:
        """Name of the dtype when it is not the source's, else None."""
        dtype = self.dtype(_EMBEDDING)
        return None if dtype == self._source.get(_EMBEDDING) else _dtype_name(dtype)

    def bands(self, name: str) -> Iterator[Band]:
        """The parts of one tensor in order, at most PIECE_BYTES each: what `read` gives at once."""
        entry, source = self._entries[name]
        key, dtype = self._keys[entry.name], self.dtype(name)
        width = prod(entry.shape[1:])
        step = max(1, PIECE_BYTES // (width * max(dtype.itemsize, self._saved.tensors[key].dtype.itemsize)))
        position = 0
        for block in row_blocks(entry, self._shape):
            for start in range(block.start, block.stop, step) if block.source == source else ():
                stop = min(start + step, block.stop)
                num_bytes = (stop - start) * width * dtype.itemsize
                yield Band(name, start, stop, num_bytes, key, entry.indices, position + start - block.start)
            position += block.stop - block.start

    def read(self, band: Band) -> Tensor:
        """The rows of a band, in the dtype asked for; a view of a mapped file where that is the stored one."""
        return self._saved.read_rows(band.key, band.indices, band.start, band.stop).to(self.dtype(band.name))

    def read_ahead(self, band: Band) -> None:
        """Have the system read a band into its cache."""
        self._saved.read_ahead(band.key, band.indices, band.start, band.stop)

    def _sized(self, name: str) -> tuple[int, ...]:
        entry, source = self._entries[name]
        return entry.sources[source].shape

    def _key(self, entry: WholeParameter) -> str:
        """The key under which the checkpoint holds a parameter, after checking its shape."""
        key = next((key for key in entry.saved if key in self._saved.tensors), None)
        if key is None:
            raise ValueError(
                f"{self._saved.path} lacks {' and '.join(entry.saved)}, which config.json's {self._shape.family} model needs (a checkpoint "
                "saved layer by layer, with non_homogeneous_layers, is not read)."
            )
        found = self._saved.tensors[key]
        stack = (self._shape.num_layers, self._shape.num_experts or 0)[: len(entry.indices)]
        if not _fits(found, stack, entry):
            raise ValueError(f"{self._saved.path}: {key} has shape {found.shape}, config.json asks for {(*stack, *entry.shape)}.")
        return key


def _fits(found: SavedTensor, stack: Sequence[int], entry: WholeParameter) -> bool:
    expected = (*stack, *entry.shape)
    if entry.kind == "vocab":  # padded to a multiple of the tensor ranks that saved it
        return len(found.shape) == 2 and found.shape[0] >= expected[0] and found.shape[1] == expected[1]
    return found.shape == expected
