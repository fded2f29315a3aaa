"""Transformer Engine's kernels computed by torch on the CPU, behind the real modules.

The modules, their parameters, state dicts, recipes and the autocast are Transformer Engine's own; only the `forward` of those that call
CUDA is replaced, after its arguments were bound to the real signature. Every call is noted with the recipe it would have run under.
Nothing is quantised: numbers say whether names, layouts and arguments are right, not how FP8 rounds.
"""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from megatron.core import tensor_parallel
from torch import Tensor
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

from spin_megatron.data.batches import PackBatch


@dataclass(frozen=True)
class Call:
    """One linear layer's forward. recipe: the class's name, None where the autocast is off."""

    module: torch.nn.Module
    recipe: str | None
    is_first_microbatch: bool | None
    has_gradients: bool
    num_rows: int


@dataclass
class Calls:
    """What was called since the last `clear`."""

    linear: list[Call] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def note(self, module: Any, rows_TH: Tensor, is_first_microbatch: bool | None) -> None:
        recipe = type(FP8GlobalStateManager.get_fp8_recipe()).__name__ if FP8GlobalStateManager.is_fp8_enabled() else None
        self.linear.append(Call(module, recipe, is_first_microbatch, torch.is_grad_enabled(), rows_TH[..., 0].numel()))


def bound(real: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments by the names of the real signature, defaults filled in; TypeError where they do not fit."""
    arguments = inspect.signature(real).bind(*args, **kwargs)
    arguments.apply_defaults()
    return dict(arguments.arguments)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = hidden.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(hidden.dtype)


def believe_in(patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Let Transformer Engine see a GPU of that compute capability."""
    patch.setattr("transformer_engine.pytorch.quantization.get_device_compute_capability", lambda: capability)
    for answer in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
        patch.setattr(f"transformer_engine.pytorch.quantization.{answer}", None)  # asked again


def install(patch: pytest.MonkeyPatch) -> Calls:
    """Let Transformer Engine believe in a Hopper GPU and compute on the CPU until the patch is undone."""
    calls = Calls()
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # torch's optimizers ask where there is a GPU
    believe_in(patch, (9, 0))
    patch.setattr(PackBatch, "without_padding", lambda batch, unit: batch)  # packs lose their padding on a CPU only
    linear, fused, grouped = te.Linear.forward, te.LayerNormLinear.forward, te.GroupedLinear.forward
    norm, pad, unpad = te.RMSNorm.forward, te.Fp8Padding.forward, te.Fp8Unpadding.forward

    def linear_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = bound(linear, self, *args, **kwargs)
        calls.note(self, given["inp"], given["is_first_microbatch"])
        return _with_bias(self, _over_tensor_ranks(self, given["inp"]))

    def fused_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = bound(fused, self, *args, **kwargs)
        calls.note(self, given["inp"], given["is_first_microbatch"])
        assert self.normalization == "RMSNorm"
        assert not self.zero_centered_gamma
        normed = rms_norm(given["inp"], self.layer_norm_weight, self.eps)
        out = _with_bias(self, _over_tensor_ranks(self, normed))
        if not self.return_layernorm_output:
            return out
        assert not self.return_layernorm_output_gathered
        return (*out, normed) if self.return_bias else (out, normed)

    def grouped_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = bound(grouped, self, *args, **kwargs)
        calls.note(self, given["inp"], given["is_first_microbatch"])
        splits = [int(count) for count in given["m_splits"]]
        parts = given["inp"].split(splits)
        out = torch.cat([F.linear(part, getattr(self, f"weight{index}")) for index, part in enumerate(parts)])
        return (out, None) if self.return_bias else out

    def norm_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = bound(norm, self, *args, **kwargs)
        calls.others.append("RMSNorm")
        return rms_norm(given["input"], self.weight, self.eps)

    def pad_forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, list[int]]:
        given = bound(pad, self, *args, **kwargs)
        calls.others.append("Fp8Padding")
        splits, wanted = given["m_splits"], [-(-count // 16) * 16 for count in given["m_splits"]]
        parts = given["inp"].split(splits)
        return torch.cat([F.pad(part, (0, 0, 0, size - len(part))) for part, size in zip(parts, wanted, strict=True)]), wanted

    def unpad_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = bound(unpad, self, *args, **kwargs)
        padded = [-(-count // 16) * 16 for count in given["m_splits"]]
        return torch.cat([part[:size] for part, size in zip(given["inp"].split(padded), given["m_splits"], strict=True)])

    for module, forward in (
        (te.Linear, linear_forward),
        (te.LayerNormLinear, fused_forward),
        (te.GroupedLinear, grouped_forward),
        (te.RMSNorm, norm_forward),
        (te.Fp8Padding, pad_forward),
        (te.Fp8Unpadding, unpad_forward),
    ):
        patch.setattr(module, "forward", forward)
    _install_rotary(patch, calls)
    _install_attention(patch, calls)
    _install_router(patch, calls)
    _install_permutation(patch, calls)
    _install_random_states(patch)
    return calls


def _over_tensor_ranks(module: Any, rows: Tensor) -> Tensor:
    """The layer's product between the collectives of its parallel_mode."""
    column, row = (module.tp_size > 1 and module.parallel_mode == mode for mode in ("column", "row"))
    group = module.tp_group
    if column and module.sequence_parallel:
        rows = tensor_parallel.gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=True, group=group)
    elif column:
        rows = tensor_parallel.copy_to_tensor_model_parallel_region(rows, group=group)
    out = F.linear(rows, module.weight)
    if row and module.sequence_parallel:
        out = tensor_parallel.reduce_scatter_to_sequence_parallel_region(out, group=group)
    elif row:
        out = tensor_parallel.reduce_from_tensor_model_parallel_region(out, group=group)
    return out


def _with_bias(module: Any, out: Tensor) -> Any:
    bias = module.bias if module.use_bias else None
    if module.return_bias:
        return out, bias
    return out if bias is None else out + bias


def _install_rotary(patch: pytest.MonkeyPatch, calls: Calls) -> None:
    from megatron.core.extensions import transformer_engine as extension

    real = extension.apply_rotary_pos_emb

    def rotate(*args: Any, **kwargs: Any) -> Tensor:
        given = bound(real, *args, **kwargs)
        calls.others.append("apply_rotary_pos_emb")
        assert given["tensor_format"] == "sbhd"
        t, angles = given["t"], given["freqs"]
        first, second = t.float().chunk(2, dim=-1)
        return (t.float() * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()).to(t.dtype)

    patch.setattr(extension, "apply_rotary_pos_emb", rotate)


def _install_attention(patch: pytest.MonkeyPatch, calls: Calls) -> None:
    """DotProductAttention over variable lengths: a real module is made, its call computed segment by segment."""
    real, forward = te.DotProductAttention, te.DotProductAttention.forward

    def attend(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = bound(forward, self, *args, **kwargs)
        calls.others.append("DotProductAttention")
        query, key, value = (given[f"{name}_layer"] for name in ("query", "key", "value"))
        assert given["attn_mask_type"] == self.attn_mask_type == "padding_causal_bottom_right"
        assert given["qkv_format"] == self.qkv_format == "thd"
        left, right = given["window_size"]
        assert right == 0
        starts_q, starts_kv = given["cu_seqlens_q"].tolist(), given["cu_seqlens_kv"].tolist()
        assert given["max_seqlen_q"] == max(b - a for a, b in itertools.pairwise(starts_q))
        assert given["max_seqlen_kv"] == max(b - a for a, b in itertools.pairwise(starts_kv))
        contexts = []
        for index in range(len(starts_q) - 1):
            queries = query[starts_q[index] : starts_q[index + 1]]
            keys, values = (tensor[starts_kv[index] : starts_kv[index + 1]] for tensor in (key, value))
            # Bottom right: the last query sees the last key.
            place_L1 = torch.arange(len(keys) - len(queries), len(keys))[:, None]
            distance_LK = place_L1 - torch.arange(len(keys))[None, :]
            seen_LK = (distance_LK >= 0) if left < 0 else (distance_LK >= 0) & (distance_LK <= left)
            heads = [tensor.transpose(0, 1)[None] for tensor in (queries, keys, values)]
            context = F.scaled_dot_product_attention(*heads, attn_mask=seen_LK, scale=self.softmax_scale, enable_gqa=True)
            contexts.append(context[0].transpose(0, 1))
        return torch.cat(contexts).flatten(1)

    patch.setattr(real, "forward", attend)


def _install_router(patch: pytest.MonkeyPatch, calls: Calls) -> None:
    """Megatron Core's router multiplies with Transformer Engine's general_gemm in all three layouts."""
    from megatron.core.extensions import transformer_engine as extension

    real = extension.general_gemm

    def multiply(*args: Any, **kwargs: Any) -> list[Tensor]:
        given = bound(real, *args, **kwargs)
        calls.others.append(f"general_gemm {given['layout']}")
        weight, rows = given["A"].to(given["out_dtype"]), given["B"].to(given["out_dtype"])
        # Column-major names: TN is rows @ weight', NN rows @ weight, NT rows' @ weight.
        return [rows.t() @ weight if given["layout"] == "NT" else rows @ (weight.t() if given["layout"] == "TN" else weight)]

    patch.setattr(extension, "general_gemm", multiply)


def _install_permutation(patch: pytest.MonkeyPatch, calls: Calls) -> None:
    """Tokens go to their experts and back by Megatron Core's own torch code."""
    from megatron.core.transformer.moe import moe_utils

    plain, probs, back = moe_utils.fused_permute, moe_utils.fused_permute_with_probs, moe_utils.fused_unpermute
    sort, sort_probs = moe_utils.fused_sort_chunks_by_index, moe_utils.fused_sort_chunks_by_index_with_probs

    def permute(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = bound(plain, *args, **kwargs)
        calls.others.append("moe_permute")
        rows, _, order, *_ = moe_utils.permute(given["inp"], given["routing_map"], num_out_tokens=given["num_out_tokens"])
        return rows, order

    def permute_with_probs(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = bound(probs, *args, **kwargs)
        calls.others.append("moe_permute")
        rows, permuted, order, *_ = moe_utils.permute(
            given["inp"], given["routing_map"], probs=given["probs"], num_out_tokens=given["num_out_tokens"]
        )
        return rows, permuted, order

    def unpermute(*args: Any, **kwargs: Any) -> Tensor:
        given = bound(back, *args, **kwargs)
        calls.others.append("moe_unpermute")
        assert given["merging_probs"] is None
        assert given["pad_offsets"] is None
        return moe_utils.unpermute(given["inp"], given["row_id_map"], given["restore_shape"])

    def sort_chunks(*args: Any, **kwargs: Any) -> Tensor:
        given = bound(sort, *args, **kwargs)
        calls.others.append("moe_sort_chunks")
        return moe_utils.sort_chunks_by_idxs(given["inp"], given["split_sizes"], given["sorted_index"])[0]

    def sort_chunks_with_probs(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = bound(sort_probs, *args, **kwargs)
        calls.others.append("moe_sort_chunks")
        return moe_utils.sort_chunks_by_idxs(given["inp"], given["split_sizes"], given["sorted_index"], probs=given["probs"])

    patch.setattr(moe_utils, "fused_sort_chunks_by_index", sort_chunks)
    patch.setattr(moe_utils, "fused_sort_chunks_by_index_with_probs", sort_chunks_with_probs)
    patch.setattr(moe_utils, "fused_permute", permute)
    patch.setattr(moe_utils, "fused_permute_with_probs", permute_with_probs)
    patch.setattr(moe_utils, "fused_unpermute", unpermute)


def _install_random_states(patch: pytest.MonkeyPatch) -> None:
    """Random states of checkpointed layers come from the CPU's generator; Megatron Core's own are the CPU shim's work."""
    patch.setattr("transformer_engine.pytorch.distributed._get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    patch.setattr("transformer_engine.pytorch.distributed._set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
