"""The embedding's lookup, whose gradient goes row by row into the weight's fp32 gradient buffer.

Torch's own backward makes a whole [vocabulary, hidden] gradient of each pack, nearly all of it zeros, which the data-parallel wrapper
then adds to the buffer; where the head has the same weight, a second one of zeros waits for it through the whole backward. At
SmolLM2-135M's size each is as large as a fourth of a pack's activations.

Shapes: T tokens, H hidden, V local rows of the vocabulary (padded V/TP).
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor


def embed(embedding: VocabParallelEmbedding, tokens_1T: Tensor) -> Tensor:
    """What VocabParallelEmbedding.forward gives: [1, T, H], or [T/TP, 1, H] where it scatters the tokens for sequence parallelism."""
    rows_1TH = look_up(embedding.weight, tokens_1T - embedding.vocab_start_index)
    if embedding.reduce_scatter_embeddings:
        scattered: Tensor = reduce_scatter_to_sequence_parallel_region(rows_1TH.transpose(0, 1).contiguous(), group=embedding.tp_group)
        return scattered
    reduced: Tensor = reduce_from_tensor_model_parallel_region(rows_1TH, group=embedding.tp_group)
    return reduced


def look_up(weight_VH: Tensor, local_1T: Tensor) -> Tensor:
    """Rows of the weight, [1, T, H]; 0 for tokens that other tensor ranks hold, which lie outside 0 .. V."""
    rows_1TH: Tensor = _LookUp.apply(weight_VH, local_1T)
    return rows_1TH


def share_with_head(weight_VH: Tensor) -> None:
    """Tell the head that the lookup of the same weight follows it in the backward and returns the gradient for both."""
    weight_VH.lookup_follows = True  # type: ignore[attr-defined]
    # Megatron Core's mark for an embedding that returns a gradient to be added; both parts are in the buffer already.
    weight_VH.zero_out_wgrad = False  # type: ignore[attr-defined]


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, local_1T: Tensor) -> Tensor:
        is_here_1T = (local_1T >= 0) & (local_1T < weight_VH.shape[0])
        ctx.save_for_backward(weight_VH, local_1T, is_here_1T)
        rows_1TH = weight_VH[torch.where(is_here_1T, local_1T, 0)]
        return rows_1TH.masked_fill_(~is_here_1T[..., None], 0.0)

    @staticmethod
    def backward(ctx: Any, grad_1TH: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        weight_VH, local_1T, is_here_1T = ctx.saved_tensors
        main_grad_VH = getattr(weight_VH, "main_grad", None)
        total_VH = torch.zeros_like(weight_VH) if main_grad_VH is None else main_grad_VH
        rows_T = torch.where(is_here_1T, local_1T, 0).flatten()
        grad_TH = grad_1TH.masked_fill(~is_here_1T[..., None], 0.0).flatten(0, -2).to(total_VH.dtype)
        # A token occurs many times, and its rows are to be added in one order: each device has one operator that does so.
        if total_VH.is_cuda:
            total_VH.index_put_((rows_T,), grad_TH, accumulate=True)
        else:
            total_VH.index_add_(0, rows_T, grad_TH)
        if main_grad_VH is None:
            return total_VH, None
        if not hasattr(weight_VH, "grad_added_to_main_grad"):
            return None, None
        weight_VH.grad_added_to_main_grad = True
        return torch.empty_like(weight_VH), None  # Megatron Core's wrapper wants to see a gradient, and drops it
