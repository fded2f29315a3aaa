"""Compare what a conversion read with what it wrote: digests of every tensor, bit for bit."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from spin_megatron.convert.hf_io import HfFolder, is_carried
from spin_megatron.convert.read_ahead import ahead
from spin_megatron.convert.saved_checkpoint import SavedCheckpoint
from spin_megatron.convert.torch_dist import Band, SavedDtype, StoredWeights, source_dtypes
from spin_megatron.convert.work_folder import default_workers, metered, over_files
from spin_megatron.plan.shape import SOURCE_FOLDER, ModelShape


def open_weights(checkpoint: Path, source: Path | None, *, dtype: SavedDtype = "stored", trust: bool = False) -> StoredWeights:
    """Open the weights of a torch_dist checkpoint under their Hugging Face names; see `torch_dist_to_hf` for the arguments."""
    source = checkpoint / SOURCE_FOLDER if source is None else source
    shape = ModelShape.from_huggingface(source)
    return StoredWeights(SavedCheckpoint(checkpoint, trust=trust), shape, source_dtypes(source), dtype)


def verify_tensors(folder: HfFolder, weights: StoredWeights, *, show: bool = True, workers: int | None = None) -> dict[str, str]:
    """Read both sides again and compare every tensor, bit for bit.

    Args:
        folder: the Hugging Face side, as source or as result.
        weights: the torch_dist side, in the dtype in which it was or would be written.

    Returns:
        sha256 (hex) of every tensor's bytes, by Hugging Face name.

    Raises:
        ValueError: names, shapes, dtypes or bytes differ; names the tensors.
    """
    planned = {tensor.name: tensor for tensor in weights.planned()}
    one_sided = set(planned) ^ {name for name in folder.names if is_carried(name)}
    wrong = [f"{name} is on one side only" for name in sorted(one_sided)]
    wrong += [
        f"{name} is {tensor.shape} {tensor.dtype} in the checkpoint, {folder.shape(name)} {folder.dtype(name)} in the folder"
        for name, tensor in planned.items()
        if name not in one_sided and (tensor.shape, tensor.dtype) != (folder.shape(name), folder.dtype(name))
    ]
    digests: dict[str, str] = {}
    with metered("verify", {name: 2 * tensor.num_bytes for name, tensor in planned.items()}, show=show and not wrong) as meter:

        def read_ahead(band: Band) -> None:
            weights.read_ahead(band)
            folder.read_ahead(band.name, band.first_row, band.last_row)

        def compare(name: str) -> None:
            here, there = hashlib.sha256(), hashlib.sha256()
            for band in ahead(list(weights.bands(name)), lambda band: 2 * band.num_bytes, read_ahead):
                there.update(_bytes(weights.read(band)))
                here.update(_bytes(folder.get_slice(name, 0, band.first_row, band.last_row)))
                meter.count(name, 2 * band.num_bytes)
            digests[name] = here.hexdigest()
            if here.digest() != there.digest():
                wrong.append(f"{name} has other values on the two sides")

        if not wrong:
            over_files(list(planned), compare, workers=workers or default_workers(), stop=meter.stop)
    if wrong:
        raise ValueError(f"{folder.path} is not the same model: {'; '.join(wrong[:5])} ({len(wrong)} in all). Convert again.")
    return {name: digests[name] for name in planned}


def _bytes(rows: Tensor) -> memoryview:
    return rows.contiguous().view(-1).view(torch.uint8).numpy().data
