# ruff: noqa: N815 (fields carry shape suffixes)
"""Branches as the arguments of a variable-length attention kernel, and the gather of their keys.

Kernels of this kind take queries and keys of many segments end to end, with running sums that say where each begins. A
branch is a segment whose keys are its prefix and then itself; under a causal mask aligned to the bottom right, as
flash-attn (since 2.1), Transformer Engine's padding_causal_bottom_right and torch's varlen_attn draw it, each
query sees the whole prefix and its own past.

Shapes: T tokens of the pack, B branches, G key-value groups (local: G/TP), D head size, K gathered keys.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spin_megatron.data.batches import to_device

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class VarlenPlan:
    """Where a variable-length kernel finds the branches. cu_*: int32 [B + 1] running sums on the device.

    keys: which keys are gathered, None where every branch's keys are its own tokens.
    """

    cu_queries_B1: Tensor
    cu_keys_B1: Tensor
    max_queries: int
    max_keys: int
    keys: "KeyGather | None"


@dataclass(frozen=True)
class KeyGather:
    """A gather of keys whose backward has one order.

    source_K: token of each gathered key. copies: entry n holds (tokens, places) of the n-th copies, each token at most once.
    """

    source_K: Tensor
    copies: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, source_K: Tensor, device: torch.device) -> "KeyGather":
        """Plan the gather of these tokens, int64 on the CPU."""
        copies = tuple((to_device(tokens, device), to_device(places, device)) for tokens, places in _copies(source_K))
        return cls(to_device(source_K, device), copies)


def plan_varlen(branches_B4: Tensor, device: torch.device) -> VarlenPlan:
    """Turn branches into the arguments of a variable-length kernel. Branches must follow each other without a gap."""
    _, prefix_B, start_B, length_B = branches_B4.unbind(1)
    ends_B = length_B.cumsum(0)
    assert torch.equal(start_B, ends_B - length_B), "branches must cover the tokens in order"
    keys_B = prefix_B + length_B

    keys = None
    if int(prefix_B.max()) > 0:
        ranges = branches_B4.reshape(-1, 2).tolist()  # (prefix_start, prefix_length) and (start, length) of each branch in turn
        keys = KeyGather.of(torch.cat([torch.arange(start, start + count) for start, count in ranges]), device)
    return VarlenPlan(
        cu_queries_B1=to_device(F.pad(ends_B, (1, 0)).to(torch.int32), device),
        cu_keys_B1=to_device(F.pad(keys_B.cumsum(0), (1, 0)).to(torch.int32), device),
        max_queries=int(length_B.max()),
        max_keys=int(keys_B.max()),
        keys=keys,
    )


def with_padding(branches_B4: Tensor, num_tokens: int) -> Tensor:
    """The branches of a pack and its padding as one more. A kernel then writes a row of every token, and what it keeps for its backward is
    what the projection reads; padding sees padding, and nothing sees it."""
    used = int(branches_B4[-1, 2:].sum()) if branches_B4.shape[0] else 0
    padding = branches_B4.new_tensor([[used, 0, used, num_tokens - used]])
    return branches_B4 if used == num_tokens else torch.cat((branches_B4, padding))


def _copies(gather_K: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Group the places of gather_K by how often their token stood before: entry n holds (tokens, places) of the n-th copies."""
    if gather_K.numel() == 0:
        return []
    order = torch.argsort(gather_K, stable=True)
    tokens = gather_K[order]
    is_new = torch.ones_like(tokens, dtype=torch.bool)
    is_new[1:] = tokens[1:] != tokens[:-1]
    start_of_run = torch.where(is_new, torch.arange(tokens.numel()), 0).cummax(0).values
    occurrence = torch.arange(tokens.numel()) - start_of_run
    return [(tokens[occurrence == n], order[occurrence == n]) for n in range(int(occurrence.max()) + 1)]


class PlanCache(Generic[Plan]):
    """Plans of the packs in flight, so that the layers of a model (and their recomputation) share one.

    Found by content: a recomputed layer is given another tensor object with the same branches.
    """

    def __init__(self, capacity: int = 64, make: Callable[..., Plan] = plan_varlen) -> None:  # type: ignore[assignment]
        self._capacity = capacity
        self._make = make
        self._plans: OrderedDict[tuple[bytes, str, tuple[int, ...]], Plan] = OrderedDict()

    def get(self, branches_B4: Tensor, device: torch.device, *sizes: int) -> Plan:
        """The plan of these branches, made now or found; the least recently used one goes when there are too many."""
        key = (branches_B4.numpy().tobytes(), str(device), sizes)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make(branches_B4, device, *sizes)
            while len(self._plans) > self._capacity:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return plan


def branch_keys(keys_TGD: Tensor, plan: VarlenPlan) -> Tensor:
    """Keys (or values) of all branches one after the other, each with its prefix before it: [K, G, D]."""
    # Values are a part of the projection's whole output, which a kernel that saves the part would keep.
    return keys_TGD.contiguous() if plan.keys is None else gather_keys(keys_TGD, plan.keys)


def gather_keys(keys_TGD: Tensor, gather: KeyGather) -> Tensor:
    """The chosen keys: [K, G, D].

    The backward sums the copies of a token in a fixed order, unlike index_select's, whose atomic adds differ from run to run.
    """
    gathered: Tensor = _GatherKeys.apply(keys_TGD, gather)
    return gathered


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys_TGD: Tensor, gather: KeyGather) -> Tensor:
        ctx.copies, ctx.num_tokens = gather.copies, keys_TGD.shape[0]
        return keys_TGD.index_select(0, gather.source_K)

    @staticmethod
    def backward(ctx: Any, grad_KGD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad_TGD = grad_KGD.new_zeros((ctx.num_tokens, *grad_KGD.shape[1:]))
        for tokens, places in ctx.copies:  # tokens are unique within an entry, so this add has one order
            grad_TGD.index_add_(0, tokens, grad_KGD.index_select(0, places))
        return grad_TGD, None
