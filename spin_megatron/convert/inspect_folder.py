"""Say what a checkpoint folder holds, of any format, without running anything it holds."""

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from spin_megatron.convert.hf_io import HfFolder, check_tensors, read_header
from spin_megatron.convert.safetensors_writer import DTYPE_NAMES, SINGLE_NAME
from spin_megatron.convert.safetensors_writer import INDEX_NAME as HUGGINGFACE_INDEX_NAME
from spin_megatron.convert.saved_checkpoint import COMMIT_NAME, INDEX_NAME, SavedCheckpoint, SavedTensor, is_vouched_for
from spin_megatron.convert.torch_dist import StoredWeights, source_dtypes
from spin_megatron.convert.work_folder import STATE_NAME
from spin_megatron.plan.shape import SOURCE_FOLDER, ModelShape
from spin_megatron.run.manifest import read_manifest


def inspect_folder(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """Describe a file or folder: format, model, tensors, parameters, bytes, and what is wrong with it.

    Args:
        trust: open a torch_dist folder's pickled index although no manifest of ours vouches for it.

    Returns:
        Name -> value, JSON-serialisable, in the order in which a person would read it; "problems" lists what is wrong.

    Raises:
        ValueError: there is nothing at `path`.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a model or checkpoint folder.")
    if path.is_file():
        return _file(path)
    if (path / STATE_NAME).exists():
        return {"format": "an unfinished conversion", "problems": ["the command that began it goes on with it"]}
    if (path / COMMIT_NAME).exists() or (path / INDEX_NAME).exists():
        return _torch_dist(path, trust=trust)
    if (path / SINGLE_NAME).exists() or (path / HUGGINGFACE_INDEX_NAME).exists():
        return _huggingface(path)
    return _other(path)


def _file(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return {"format": f"a file ({path.suffix or 'no suffix'})", "bytes": path.stat().st_size, "problems": ["only safetensors is read"]}
    entries = read_header(path)
    sizes = [(entry.dtype, prod(entry.shape), entry.num_bytes) for entry in entries.values()]
    return {"format": "one safetensors file", **_totals(sizes), "problems": []}


def _huggingface(path: Path) -> dict[str, Any]:
    problems: list[str] = []
    facts: dict[str, Any] = {"format": "Hugging Face folder, safetensors"}
    try:
        folder = HfFolder(path)
        facts |= {"files": len(folder.files)}
        facts |= _totals((entry.dtype, prod(entry.shape), entry.num_bytes) for entry in folder.entries.values())
        shape = ModelShape.from_huggingface(path)
        facts |= {"model": _model(shape)}
        check_tensors(folder, shape)
    except ValueError as error:
        problems.append(str(error))
    return {**facts, "problems": problems}


def _torch_dist(path: Path, *, trust: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"format": "Megatron Core distributed checkpoint, torch_dist"}
    problems: list[str] = []
    files = sorted(path.glob("*.distcp"))
    facts |= {"files": len(files), "bytes on disk": sum(file.stat().st_size for file in files), "vouched for": is_vouched_for(path)}
    manifest = read_manifest(path)
    if manifest is not None:
        facts |= {"made by": manifest.stage, "finished": manifest.finished_at}
    if not trust and not facts["vouched for"]:
        problems.append(f"{INDEX_NAME} is a pickle that no manifest of ours vouches for; --trust opens it, if you know its origin")
        return {**facts, "problems": problems}
    try:
        saved = SavedCheckpoint(path, trust=trust)
        for kind, tensors in _by_kind(saved.tensors).items():
            names = [DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)) for tensor in tensors]
            counts = [prod(tensor.shape) for tensor in tensors]
            sizes = [count * tensor.dtype.itemsize for count, tensor in zip(counts, tensors, strict=True)]
            facts[kind] = _totals(zip(names, counts, sizes, strict=True))
        if (path / SOURCE_FOLDER / "config.json").exists():
            shape = ModelShape.from_huggingface(path / SOURCE_FOLDER)
            facts |= {"of model": _model(shape)}
            StoredWeights(saved, shape, source_dtypes(path / SOURCE_FOLDER), "stored")
    except ValueError as error:
        problems.append(str(error))
    return {**facts, "problems": problems}


def _other(path: Path) -> dict[str, Any]:
    steps = sorted(folder.parent.name for folder in path.glob(f"*/{COMMIT_NAME}"))
    if steps:
        return {"format": "a folder of distributed checkpoints", "checkpoints": steps, "problems": []}
    if list(path.glob("mp_rank_*/*.pt")) or list(path.glob("*/mp_rank_*/*.pt")):
        problem = "pickled a rank at a time, which is not opened: load it in Megatron-LM and save it with --ckpt-format torch_dist"
        return {"format": "Megatron-LM checkpoint, legacy", "problems": [problem]}
    pickled = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in path.glob(f"*.{suffix}"))
    if pickled:
        return {"format": "pickled weights", "files": pickled, "problems": ["pickles can run code and are not opened: use safetensors"]}
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    if gguf:
        return {"format": "GGUF", "files": gguf, "problems": ["load it with transformers (gguf_file=...) and save it as safetensors"]}
    return {"format": "unknown", "problems": [f"neither {COMMIT_NAME} nor safetensors here"]}


def _by_kind(tensors: Mapping[str, SavedTensor]) -> dict[str, list[SavedTensor]]:
    """Model, optimizer and other tensors of a checkpoint, as far as there are any."""
    kinds: dict[str, list[SavedTensor]] = {}
    for key, tensor in tensors.items():
        kind = "model" if key.startswith(("embedding.", "decoder.", "output_layer.")) else key.split(".")[0]
        kinds.setdefault(kind, []).append(tensor)
    return kinds


def _totals(tensors: Iterable[tuple[str, int, int]]) -> dict[str, Any]:
    """Tensors, parameters, bytes and dtypes of (dtype, elements, bytes)."""
    rows = list(tensors)
    dtypes: dict[str, int] = {}
    for dtype, _, _ in rows:
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    return {"tensors": len(rows), "parameters": sum(row[1] for row in rows), "bytes": sum(row[2] for row in rows), "dtypes": dtypes}


def _model(shape: ModelShape) -> str:
    experts = f", {shape.num_experts} experts ({shape.experts_per_token} a token)" if shape.num_experts else ""
    tied = ", tied embeddings" if shape.tied_embeddings else ""
    heads = f"{shape.num_heads} heads ({shape.num_kv_heads} key-value) of {shape.head_dim}"
    return f"{shape.family}: {shape.num_layers} layers, hidden {shape.hidden_size}, {heads}, vocabulary {shape.vocab_size}{experts}{tied}"
