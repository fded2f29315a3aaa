# ruff: noqa: N815 (fields carry shape suffixes)
"""Context parallelism of packs: the tokens of one pack over several ranks, with the keys and values of all of them on each.

The pack is cut into two chunks a rank; rank r of C holds chunks r and 2C - 1 - r, so that early tokens, which see few keys, go with
late ones. Attention gathers keys and values over the ranks (arXiv 2407.21783, section 3.3.2, does so too) and each rank computes its
own queries: a piece of a branch is a branch itself, whose prefix is the branch's prefix and the branch's tokens before the piece. So
every attention backend serves it unchanged. Everything but attention and the head's sums is local to a token.

Shapes: T tokens of the pack, C context ranks, B branches, S pieces of branches on this rank, R rows of the head.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spin_megatron.mcore.varlen import KeyGather

Group = dist.ProcessGroup


def own_tokens(num_tokens: int, size: int, rank: int) -> Tensor:
    """Which tokens of the pack a context rank holds, in its order: int64 [T/C] on the CPU. 2 C must divide num_tokens."""
    return torch.cat([torch.arange(start, stop) for start, stop in _chunks(num_tokens, size, rank)])


def _chunks(num_tokens: int, size: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    length, last = num_tokens // (2 * size), 2 * size - 1 - rank
    return (rank * length, (rank + 1) * length), (last * length, (last + 1) * length)


@dataclass(frozen=True)
class ContextPlan:
    """What a rank computes of a pack: its pieces of branches, and which of the pack's keys they see."""

    branches_S4: Tensor
    keys: KeyGather


def plan_context(branches_B4: Tensor, device: torch.device, num_tokens: int, size: int, rank: int) -> ContextPlan:
    """The share of context rank `rank` of `size` in a pack of num_tokens."""
    branches_S4, keys_K = split_branches(branches_B4, num_tokens, size, rank)
    return ContextPlan(branches_S4, KeyGather.of(keys_K, device))


def split_branches(branches_B4: Tensor, num_tokens: int, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """What a rank computes of a pack.

    Returns:
        branches_S4: as data.batches has them, but with `start` among this rank's tokens and `prefix_start` among its keys;
        keys_K: int64, the pack's token of each of these keys: first the rank's own tokens that are in a branch, then the prefixes.
    """
    pieces: list[tuple[int, int, int, int]] = []
    own: list[Tensor] = []
    prefixes: list[Tensor] = []
    num_own, num_before = 0, 0
    for chunk_start, chunk_stop in _chunks(num_tokens, size, rank):
        for prefix_start, prefix, start, length in branches_B4.tolist():
            first, stop = max(start, chunk_start), min(start + length, chunk_stop)
            if first >= stop:
                continue
            before = prefix + first - start
            pieces.append((num_before, before, num_own, stop - first))
            prefixes += [torch.arange(prefix_start, prefix_start + prefix), torch.arange(start, first)]
            own.append(torch.arange(first, stop))
            num_own, num_before = num_own + stop - first, num_before + before
    branches_S4 = torch.tensor(pieces, dtype=torch.int64).reshape(-1, 4)
    branches_S4[:, 0] += num_own  # the prefixes' keys stand behind the own ones
    return branches_S4, torch.cat([*own, *prefixes, torch.zeros(0, dtype=torch.int64)])


def gather_pack(local: Tensor, group: Group) -> Tensor:
    """All ranks' tokens in the pack's order: [T/C, ...] -> [T, ...]. The backward sums what the ranks give back, in fp32."""
    gathered: Tensor = _GatherPack.apply(local, group)
    return gathered


class _GatherPack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        halves = [part.chunk(2) for part in parts]
        return torch.cat([early for early, _ in halves] + [late for _, late in reversed(halves)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        group: Group = ctx.group
        # A prompt's keys collect gradients of several ranks: bf16 sums would lose the small ones.
        chunks = grad.float().chunk(2 * group.size())
        by_rank = torch.cat([part for rank in range(group.size()) for part in (chunks[rank], chunks[-1 - rank])])
        own = by_rank.new_empty((by_rank.shape[0] // group.size(), *by_rank.shape[1:]))
        dist.reduce_scatter_tensor(own, by_rank, group=group)
        return own.to(grad.dtype), None


def sum_rows(logp_own: Tensor, places: Tensor, num_rows: int, group: Group) -> Tensor:
    """Every rank's log-probs in their places: [R], the same bits on all context ranks, since each place is filled by one.

    All ranks go on to compute the same loss of it, so the backward hands each rank the gradient of its own rows.

    Args:
        logp_own: of this rank's rows. places: int64, where they stand among the R rows.
    """
    summed: Tensor = _SumRows.apply(logp_own, places, num_rows, group)
    return summed


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp_own: Tensor, places: Tensor, num_rows: int, group: Group) -> Tensor:
        ctx.save_for_backward(places)
        logp_R = logp_own.new_zeros(num_rows).index_copy_(0, places, logp_own)
        dist.all_reduce(logp_R, group=group)
        return logp_R

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return grad_R.index_select(0, places), None, None, None
