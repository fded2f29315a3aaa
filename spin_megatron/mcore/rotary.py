"""Rotary positions of packs (arXiv 2104.09864).

Megatron Core rotates with a table that each layer makes and keeps for queries and for keys, in a dozen passes over them. Here the
positions follow from a pack's branches, one table serves all layers, and a rotation takes four passes and keeps nothing else.

Shapes: T tokens of the pack (a context rank holds some of them), B branches, N heads, D head size.
"""

import math
from typing import Any

import torch
from torch import Tensor

from spin_megatron.data.batches import to_device
from spin_megatron.mcore.context import own_tokens
from spin_megatron.objective.cache_blocks import cache_blocks
from spin_megatron.plan.shape import ModelShape


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Rotary angle of each pair of head dimensions per position: [D/2] fp32.

    theta**(-2i/D); "linear" scaling divides it by factor; "llama3" divides only long wavelengths, keeps short ones and blends between
    (Llama 3.1's rule, with the constants of the model's own config).
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    frequencies = 1.0 / (shape.rope_theta**exponents)
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions
    assert low is not None
    assert high is not None
    assert original is not None
    # How many turns a pair makes over the original context: fewer than `low` is long, more than `high` is short.
    turns = original * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rotary_angles(positions_T: Tensor, inv_freq: Tensor) -> Tensor:
    """Angles for Megatron Core's apply_rotary_pos_emb, which rotates half-split heads: [T, 1, 1, D] fp32."""
    angles = positions_T.float()[:, None] * inv_freq[None, :]
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def rotary_table(branches_B4: Tensor, device: torch.device, num_tokens: int, size: int, rank: int, *, inv_freq: Tensor) -> Tensor:
    """Cosines and sines of a context rank's tokens: fp32 [2, T/C, 1, D/2]. Padding stands at position 0.

    Args:
        num_tokens: of the whole pack. size, rank: of the context ranks C; 1 and 0 without context parallelism.
    """
    positions_T = torch.zeros(num_tokens)
    for _, prefix, start, length in branches_B4.tolist():
        positions_T[start : start + length] = torch.arange(prefix, prefix + length)
    own_T = own_tokens(num_tokens, size, rank) if size > 1 else slice(None)
    angles = to_device(positions_T[own_T, None, None], device) * to_device(inv_freq, device)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(heads_TND: Tensor, table_2T1D: Tensor) -> Tensor:
    """Rotate each head's two halves against each other: [T, N, D], in its own dtype as transformers' apply_rotary_pos_emb computes."""
    rotated: Tensor = _Rotate.apply(heads_TND, table_2T1D)
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads_TND: Tensor, table_2T1D: Tensor) -> Tensor:
        ctx.save_for_backward(table_2T1D)
        return _rotated(heads_TND, table_2T1D, 1)

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (table_2T1D,) = ctx.saved_tensors
        return _rotated(grad_TND, table_2T1D, -1), None


def _rotated(heads_TND: Tensor, table_2T1D: Tensor, sign: int) -> Tensor:
    rotated_TND = torch.empty(heads_TND.shape, dtype=heads_TND.dtype, device=heads_TND.device)
    for heads, rotated, cosine, sine in cache_blocks(heads_TND, rotated_TND, *table_2T1D.to(heads_TND.dtype)):
        first, second = heads.chunk(2, dim=-1)
        rotated_first, rotated_second = rotated.chunk(2, dim=-1)
        torch.mul(first, cosine, out=rotated_first).addcmul_(second, sine, value=-sign)
        torch.mul(second, cosine, out=rotated_second).addcmul_(first, sine, value=sign)
    return rotated_TND
