"""Hugging Face model folders: read tensors slice by slice, and write all that is not a weight.

`HfFolder` reads the headers of safetensors files, refuses what is truncated, missing or pickled before a weight is touched,
and then hands out slices that are views of the mapped files. `write_config_both_dialects` starts from the source's own
config.json and only adds fields, because a config written by transformers 5 (`rope_parameters`, `dtype`) is read by 4.x
without an error and with wrong logits; tokenizer files are copied byte for byte for the same reason.
"""

import json
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from spin_megatron.convert.families import expected_huggingface_names, parameters
from spin_megatron.convert.read_ahead import advise
from spin_megatron.convert.safetensors_writer import DTYPE_NAMES, INDEX_NAME, SINGLE_NAME
from spin_megatron.plan.model_config import RopeScaling
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.manifest import atomic_path, digest_values, write_json

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_ITEM_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}
_ITEM_BITS |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 8)
# Larger headers are refused by the safetensors library as well.
_MAX_HEADER_BYTES = 100_000_000
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# A buffer that files of 2023 still hold; every reader computes it from the config instead.
_IGNORED = re.compile(r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")
# Everything of a model folder that is carried over unread: tokenizer, chat templates, generation defaults, licence.
CARRIED_FILES = (
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its bytes are [start, start + num_bytes) of the file. dtype is safetensors' name of it ("BF16")."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class HfFolder:
    """A Hugging Face folder's safetensors, opened by header.

    Raises:
        ValueError: no safetensors (only pickles), a missing, truncated or broken file, or an index that disagrees with them.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder)
        self.files = _weight_files(self.path)
        self.entries = _read_entries(self.path, self.files)
        self._open: dict[Path, Any] = {}
        self._advised: dict[Path, BinaryIO] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, in the order of the files."""
        return tuple(self.entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def identity(self) -> str:
        """A digest that changes with the files: names, sizes, times of change, headers."""
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        headers = [(name, entry.dtype, entry.shape) for name, entry in self.entries.items()]
        return digest_values([files, headers, (self.path / "config.json").read_text(encoding="utf-8")])

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies; a name the folder lacks raises ValueError."""
        if name not in self.entries:
            raise ValueError(f"{self.path} lacks {name}; is config.json that of these weights?")
        return self.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entry(name).dtype]

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Read [start, stop) along one dimension (0 or 1): a view of the mapped file, so copy it before changing it."""
        # A range of columns touches every row.
        self.read_ahead(name, *((start, stop) if dim == 0 else (0, self.shape(name)[0])))
        view = self._handle(self.entry(name).file).get_slice(name)
        found: Tensor = view[start:stop] if dim == 0 else view[:, start:stop]
        return found

    def read_ahead(self, name: str, start: int, stop: int) -> None:
        """Have the system read rows [start, stop) into its cache; see `read_ahead.advise`."""
        entry = self.entry(name)
        row_bytes = entry.num_bytes // max(1, entry.shape[0])
        if entry.file not in self._advised:
            self._advised[entry.file] = open(entry.file, "rb")  # noqa: SIM115 (as long as the maps)
        advise(self._advised[entry.file], entry.start + start * row_bytes, (stop - start) * row_bytes)

    def get_tensor(self, name: str) -> Tensor:
        """Read a whole tensor: a view of the mapped file, so copy it before changing it."""
        self.read_ahead(name, 0, self.shape(name)[0])
        found: Tensor = self._handle(self.entry(name).file).get_tensor(name)
        return found

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        return self._open[file]


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights: those of the index, else the single one."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a local Hugging Face model folder.")
    index = folder / INDEX_NAME
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index} names files outside of its folder; fetch the model again.")
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX_NAME} names; the download or copy is incomplete.")
        return tuple(folder / name for name in names)
    if (folder / SINGLE_NAME).exists():
        return (folder / SINGLE_NAME,)
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder} holds weights only as pickles ({', '.join(pickled[:3])}), which run code when they are read; convert them to "
            "safetensors where you trust them (transformers: save_pretrained)."
        )
    raise ValueError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; give a Hugging Face model folder.")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a readable index ({error!r}); fetch the model again.") from error


def _read_entries(folder: Path, files: tuple[Path, ...]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise ValueError(f"{name} is both in {entries[name].file.name} and in {file.name} of {folder}; fetch the model again.")
            entries[name] = entry
    index = folder / INDEX_NAME
    if index.exists():
        weight_map = _weight_map(index)
        wrong = sorted(name for name in {*weight_map, *entries} if name not in entries or weight_map.get(name) != entries[name].file.name)
        if wrong:
            raise ValueError(f"{index} and the files disagree on where {_some(wrong)} lies; fetch the model again.")
    return entries


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        ValueError: the file is truncated or is no safetensors file.
    """
    size = file.stat().st_size
    with open(file, "rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{file} ({size} bytes) is truncated within its header or no safetensors file; fetch it again.")
        text = handle.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans = sorted((*entry["data_offsets"], name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a broken safetensors header ({error!r}); fetch it again.") from error
    position, entries = 0, {}
    for begin, end, name, dtype, shape in spans:
        if begin != position or 8 * (end - begin) != prod(shape) * _ITEM_BITS.get(dtype, -1):
            raise ValueError(f"{file}: {name} ({dtype}, shape {shape}) does not fill bytes {begin} to {end}; fetch the file again.")
        entries[name] = TensorEntry(file, dtype, shape, 8 + length + begin, end - begin)
        position = end
    if size != 8 + length + position:
        promised = 8 + length + position
        raise ValueError(f"{file} has {size} bytes, its header promises {promised}: it is truncated or damaged; fetch it again.")
    return entries


def check_tensors(folder: HfFolder, shape: ModelShape) -> None:
    """Compare a folder's tensors with those its config asks for.

    Raises:
        ValueError: a missing, surplus or wrongly shaped tensor, a dtype that is no plain float, or two in one parameter, by name.
    """
    expected = expected_huggingface_names(shape)
    allowed = set(expected)
    if shape.tied_embeddings:
        allowed.add("lm_head.weight")  # some files hold the copy as well
    missing = sorted(set(expected) - set(folder.entries))
    surplus = sorted(name for name in folder.entries if name not in allowed and is_carried(name))
    if missing:
        raise ValueError(f"{folder.path} lacks {_some(missing)}, which config.json's {shape.family} model needs; fetch the model again.")
    if surplus:
        raise ValueError(f"{folder.path} holds {_some(surplus)}, which no {shape.family} model has; is config.json that of these weights?")
    for name in sorted(allowed & set(folder.entries)):
        needed = expected.get(name, expected["model.embed_tokens.weight"])
        if folder.shape(name) != needed:
            raise ValueError(f"{folder.path}: {name} has shape {folder.shape(name)}, config.json asks for {needed}; one of them is wrong.")
        if folder.entries[name].dtype not in DTYPES:
            raise ValueError(f"{folder.path}: {name} is {folder.entries[name].dtype}; only {', '.join(DTYPES)} weights are read.")
    for entry in parameters(shape):
        if len({folder.dtype(source.name) for source in entry.sources}) > 1:
            raise ValueError(f"{folder.path}: {', '.join(source.name for source in entry.sources)} differ in dtype; store them in one.")


def is_carried(name: str) -> bool:
    """Whether a tensor is part of the model and not one of the buffers that old files hold."""
    return _IGNORED.match(name) is None


def _some(names: list[str]) -> str:
    """Name the first few of many."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def both_dialects(config: Mapping[str, Any], *, dtype: str | None = None) -> dict[str, Any]:
    """A config.json for transformers 4.x and 5.x alike: the source's values, with what either of them lacks added.

    Args:
        config: the source's config.json.
        dtype: name of the weights' dtype when it is not the source's ("float32", ...); replaces torch_dtype and dtype.

    Raises:
        ValueError: as ModelShape.from_config does.
    """
    shape = ModelShape.from_config(config)
    scaling = _scaling_entry(shape.rope_scaling)
    added: dict[str, Any] = {
        "head_dim": shape.head_dim,
        "num_key_value_heads": shape.num_kv_heads,
        "tie_word_embeddings": shape.tied_embeddings,
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta, **scaling},
    }
    if shape.family == "qwen3_moe":
        added |= {"num_experts": shape.num_experts, "num_local_experts": shape.num_experts}
    stored = dtype or config.get("dtype") or config.get("torch_dtype")
    if stored is not None:
        added |= {"dtype": stored, "torch_dtype": stored}
    result = {**added, **{name: value for name, value in config.items() if value is not None or name not in added}}
    result["rope_parameters"] = {**added["rope_parameters"], **result["rope_parameters"]}
    if dtype is not None:
        result |= {"dtype": dtype, "torch_dtype": dtype}
    return {name: result[name] for name in (*config, *(name for name in added if name not in config))}


def _scaling_entry(scaling: RopeScaling | None) -> dict[str, Any]:
    """RoPE scaling under the names both dialects share."""
    if scaling is None:
        return {}
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return values


def write_config_both_dialects(source: Path, destination: Path, *, dtype: str | None = None) -> None:
    """Write destination/config.json from source/config.json; see `both_dialects`."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(destination / "config.json", both_dialects(config, dtype=dtype))


def carried_files(source: Path) -> list[Path]:
    """Tokenizer, chat templates, generation config and licence of a model folder."""
    return sorted({path for pattern in CARRIED_FILES for path in source.glob(pattern) if path.is_file()})


def model_files(folder: Path) -> list[Path]:
    """All that makes a folder the model it is: config, weights, and what is carried over; not the pickles or originals beside them."""
    index = folder / INDEX_NAME
    return [folder / "config.json", *([index] if index.exists() else []), *_weight_files(folder), *carried_files(folder)]


def copy_tokenizer_files(source: Path, destination: Path) -> list[Path]:
    """Copy what `carried_files` names byte for byte; returns the new paths."""
    copied = []
    for path in carried_files(source):
        target = destination / path.relative_to(source)
        with atomic_path(target) as aside:
            shutil.copyfile(path, aside)
        copied.append(target)
    return copied


def model_card(facts: Mapping[str, Any]) -> str:
    """README.md of an exported model: what was trained, from what, with which settings (name -> value, in the order given)."""
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            "- spin-megatron",
            "---",
            "",
            "# Model card",
            "",
            "Written by spin_megatron when it exported these weights.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            "`config.json` is readable by transformers 4.x and 5.x. Tokenizer, chat template and generation settings are those of the",
            "base model, byte for byte; so are its licence and its limits.",
            "",
        ]
    )


def _cell(value: object) -> str:
    """A value inside a markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
