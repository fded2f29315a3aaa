"""Attention over branches with torch's scaled-dot-product kernels: one call a branch on any device, and the CPU flash kernel itself.

Shapes: T tokens of the pack, B branches, N query heads, G key-value groups, D head size, L queries and K keys of a call.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# prefix_start, prefix, start, length: a row of data.batches' branches_B4.
Branch = tuple[int, int, int, int]


def attend_by_branch(
    query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, branches: list[Branch], *, scale: float, window: int | None
) -> Tensor:
    """Attend with scaled_dot_product_attention, one call a branch; [T, N, D]. Any device and dtype; differentiable."""
    contexts: list[Tensor] = []
    for prefix_start, prefix, start, length in branches:
        own, before = slice(start, start + length), slice(prefix_start, prefix_start + prefix)
        query_1NLD = _heads_first(query_TND[own])
        key_1GLD, value_1GLD = (
            _heads_first(torch.cat((tensor[before], tensor[own])) if prefix else tensor[own]) for tensor in (key_TGD, value_TGD)
        )
        mask = _visible_mask(prefix, length, window, query_TND.device) if prefix or _is_cut(prefix + length, window) else None
        is_grouped = query_1NLD.shape[1] != key_1GLD.shape[1]
        context_1NLD = F.scaled_dot_product_attention(
            query_1NLD, key_1GLD, value_1GLD, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=is_grouped
        )
        contexts.append(context_1NLD.squeeze(0).transpose(0, 1))
    used = branches[-1][2] + branches[-1][3]
    contexts.append(query_TND.new_zeros((query_TND.shape[0] - used, *query_TND.shape[1:])))
    return torch.cat(contexts)


def _visible_mask(prefix: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [length, prefix + length]: which keys of (prefix, itself) each token of a branch sees."""
    query_positions = torch.arange(prefix, prefix + length, device=device)[:, None]
    distance = query_positions - torch.arange(prefix + length, device=device)[None, :]
    return (distance >= 0) & (distance < window) if window is not None else distance >= 0


def _is_cut(length: int, window: int | None) -> bool:
    """Whether the window hides anything in a sequence of this length."""
    return window is not None and length > window


def _heads_first(tensor_LND: Tensor) -> Tensor:
    """[L, N, D] seen as [1, N, L, D]."""
    return tensor_LND.transpose(0, 1).unsqueeze(0)


def attend_with_cpu_flash(
    query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, branches: list[Branch], *, scale: float, window: int | None
) -> Tensor:
    """The same with torch's CPU flash kernel, which neither copies nor repeats keys and values for grouped queries; [T, N, D]."""
    context_TND: Tensor = _CpuFlash.apply(query_TND, key_TGD, value_TGD, branches, scale, window)
    return context_TND


class _CpuFlash(torch.autograd.Function):
    """All branches of a pack with torch's CPU flash kernel; saves query, key, value, output and one log-sum-exp a row and head.

    For a branch with a prefix, softmax over (prefix, itself) is two softmaxes joined: with l = log(exp(l1) + exp(l2)),
    out = exp(l1 - l) out1 + exp(l2 - l) out2. The kernel's backward forms P = exp(S - l) and dS = P (dP - sum(dout * out)), so given the
    joined out and l each part's call returns its exact dK and dV and its share of dQ.
    """

    @staticmethod
    def forward(
        ctx: Any, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, branches: list[Branch], scale: float, window: int | None
    ) -> Tensor:
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 (scaled_dot_product_attention hides the lse)
        context_TND = _for_branches(query_TND, branches)
        lse_TN = torch.empty(query_TND.shape[:2], dtype=torch.promote_types(query_TND.dtype, torch.float32))
        calls = _kernel_calls(branches, window, query_TND.dtype)
        # Turned once: views of views for each call took as long as the kernel takes for a short branch.
        query_1NTD, key_1GTD, value_1GTD, context_1NTD = map(_heads_first, (query_TND, key_TGD, value_TGD, context_TND))
        lse_1NT = lse_TN.t()[None]
        for call in calls:
            key, value = (_taken(tensor, call.keys) for tensor in (key_1GTD, value_1GTD))
            context, lse = forward(query_1NTD[:, :, call.rows], key, value, 0.0, call.is_causal, attn_mask=call.mask, scale=scale)
            if call.is_second:
                own_context, own_lse = context_1NTD[:, :, call.rows], lse_1NT[:, :, call.rows]
                joined = torch.logaddexp(own_lse, lse)
                # The weights are fp32, and so is the sum: rounded once, when it is stored.
                context = own_context * (own_lse - joined).exp_()[..., None] + context * (lse - joined).exp_()[..., None]
                lse = joined
            context_1NTD[:, :, call.rows], lse_1NT[:, :, call.rows] = context, lse
        ctx.save_for_backward(query_TND, key_TGD, value_TGD, context_TND, lse_TN)
        ctx.calls, ctx.branches, ctx.scale = calls, branches, scale
        return context_TND

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query_TND, key_TGD, value_TGD, context_TND, lse_TN = ctx.saved_tensors
        dquery_TND = _for_branches(query_TND, ctx.branches)
        dkey_TGD, dvalue_TGD = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (key_TGD, value_TGD))
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
        # The kernel deals key-value heads out to threads. Where that leaves some idle, the heads of a group go as a batch: more pieces,
        # for the price of as many dK and dV.
        num_groups = key_TGD.shape[1]
        batch = query_TND.shape[1] // num_groups if num_groups % torch.get_num_threads() else 1
        by_query = (_as_batch(tensor, batch, num_groups) for tensor in (grad_TND, query_TND, context_TND, lse_TN[..., None], dquery_TND))
        grad, query, context, lse, dquery = by_query  # [1, N, T, D] or [N/G, G, T, D]
        key_1GTD, value_1GTD, dkey_1GTD, dvalue_1GTD = map(_heads_first, (key_TGD, value_TGD, dkey_TGD, dvalue_TGD))
        for call in ctx.calls:
            rows = (slice(None), slice(None), call.rows)
            key, value = (_taken(tensor, call.keys).expand(batch, -1, -1, -1) for tensor in (key_1GTD, value_1GTD))
            dquery_rows, dkey, dvalue = backward(
                *(grad[rows], query[rows], key, value, context[rows], lse[rows][..., 0], 0.0, call.is_causal),
                attn_mask=call.mask,
                scale=ctx.scale,
            )
            dquery[rows].add_(dquery_rows) if call.is_second else dquery[rows].copy_(dquery_rows)
            _add_back(dkey_1GTD, call.keys, dkey)
            _add_back(dvalue_1GTD, call.keys, dvalue)
        return dquery_TND, dkey_TGD, dvalue_TGD, None, None, None


@dataclass(frozen=True)
class _KernelCall:
    """One call of the CPU flash kernel: a range of queries and the keys they meet.

    mask: additive [1, 1, L, K] in the queries' dtype where a window hides keys. is_second: an earlier call had these queries meet others.
    """

    rows: slice
    keys: list[slice]
    is_causal: bool = False
    mask: Tensor | None = None
    is_second: bool = False


def _kernel_calls(branches: list[Branch], window: int | None, dtype: torch.dtype) -> list[_KernelCall]:
    """Each branch on itself (on its prefix too where a window cuts), then neighbours that share a prefix together on that prefix."""
    calls: list[_KernelCall] = []
    for prefix_start, prefix, start, length in branches:
        before, own = slice(prefix_start, prefix_start + prefix), slice(start, start + length)
        if _is_cut(prefix + length, window):
            visible = _visible_mask(prefix, length, window, torch.device("cpu"))
            mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
            calls.append(_KernelCall(own, [before, own], mask=mask[None, None]))
        else:
            calls.append(_KernelCall(own, [own], is_causal=True))
    # Neighbours: a branch that a window cuts parts those around it.
    for (prefix_start, prefix, is_cut), neighbours in itertools.groupby(
        branches, key=lambda branch: (branch[0], branch[1], _is_cut(branch[1] + branch[3], window))
    ):
        if prefix and not is_cut:
            ranges = [(start, start + length) for _, _, start, length in neighbours]
            rows = slice(ranges[0][0], ranges[-1][1])
            calls.append(_KernelCall(rows, [slice(prefix_start, prefix_start + prefix)], is_second=True))
    return calls


def _for_branches(like_TND: Tensor, branches: list[Branch]) -> Tensor:
    """Room for what every branch writes, 0 behind the last one (branches follow each other without a gap)."""
    made = torch.empty(like_TND.shape, dtype=like_TND.dtype, device=like_TND.device)
    made[branches[-1][2] + branches[-1][3] :].zero_()
    return made


def _as_batch(tensor_LND: Tensor, batch: int, num_groups: int) -> Tensor:
    """[L, N, D] seen as [1, N, L, D] (batch 1), or with the heads of each group as a batch: [N/G, G, L, D]."""
    if batch == 1:
        return _heads_first(tensor_LND)
    by_group_LGBD: Tensor = tensor_LND.unflatten(1, (num_groups, batch))  # type: ignore[no-untyped-call]
    return by_group_LGBD.permute(2, 1, 0, 3)


def _taken(tensor_1GTD: Tensor, keys: list[slice]) -> Tensor:
    """The tokens of the ranges; a view where there is only one."""
    parts = [tensor_1GTD[:, :, part] for part in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _add_back(gradient_1GTD: Tensor, keys: list[slice], gradient_BGLD: Tensor) -> None:
    """Add a call's gradient, summed over its batch, to that of the ranges it read."""
    made, offset = gradient_BGLD if gradient_BGLD.shape[0] == 1 else gradient_BGLD.sum(0, keepdim=True), 0
    for part in keys:
        count = part.stop - part.start
        gradient_1GTD[:, :, part] += made.narrow(2, offset, count)
        offset += count
