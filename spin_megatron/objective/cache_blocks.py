"""How a CPU works through tensors that are larger than its cache: a few rows at a time."""

from collections.abc import Iterator

from torch import Tensor

BLOCK_NUMBERS = 2**17  # half a megabyte of fp32


def cache_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor, a block at a time: on a CPU so few of the first that what lies between operators stays in the cache."""
    first, num_rows = tensors[0], max(1, tensors[0].shape[0])
    block = max(1, BLOCK_NUMBERS * num_rows // max(1, first.numel())) if first.device.type == "cpu" else num_rows
    # Views are made in one call a tensor: slices of slices for each operator took as long as the operators of a small block.
    return zip(*(tensor.split(block) for tensor in tensors), strict=True)
