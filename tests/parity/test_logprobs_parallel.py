"""The head over 2 and 4 tensor-parallel ranks (gloo): the same bits on every rank, the same numbers as one process."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spin_megatron.objective.logprobs import IGNORED, sequence_sums, vocab_parallel_logprobs
from tests.parity.gloo import run_ranks

ROWS, HIDDEN = 23, 12
CASES: dict[str, dict[str, Any]] = {
    # padded: rows of the whole padded weight, a multiple of 4; vocab: how many of them are true.
    "padded tail inside the last shard": {"vocab": 109, "padded": 112},
    "a prime number of columns on each of four ranks": {"vocab": 124, "padded": 124},
    "last ranks without a true column": {"vocab": 40, "padded": 112},
    "small tiles": {"vocab": 109, "padded": 112, "vocab_chunk": 5, "row_block": 4},
    "temperature": {"vocab": 109, "padded": 112, "temperature": 0.5},
    "all logits far below zero": {"vocab": 109, "padded": 112, "shift": -500.0},
    "bf16": {"vocab": 109, "padded": 112, "dtype": torch.bfloat16},
    "no rows": {"vocab": 109, "padded": 112, "rows": 0},
}


class CollectiveCounter(TorchDispatchMode):
    """Names of the collectives that reach torch's dispatcher, whichever function called them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def _inputs(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    rows, dtype = case.get("rows", ROWS), case.get("dtype", torch.float32)
    hidden_RH = torch.randn(rows, HIDDEN, generator=generator)
    weight_VH = torch.randn(case["padded"], HIDDEN, generator=generator)
    if "shift" in case:
        hidden_RH[:, 0], weight_VH[:, 0] = 1.0, case["shift"]
    targets_R = torch.randint(0, case["vocab"], (rows,), generator=generator)
    targets_R[::4] = IGNORED
    return hidden_RH.to(dtype), weight_VH.to(dtype), targets_R, torch.randn(rows, generator=generator)


def _forward_backward(case: dict[str, Any], shard: slice, **options: Any) -> dict[str, Any]:
    hidden_RH, weight_VH, targets_R, gradient_R = _inputs(case)
    hidden_RH.requires_grad_()
    weight = torch.nn.Parameter(weight_VH[shard].clone())
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    options |= {name: case[name] for name in ("vocab_chunk", "row_block", "temperature") if name in case}
    with CollectiveCounter() as forward:
        logp_R = vocab_parallel_logprobs(hidden_RH, weight, targets_R, vocab_start=shard.start, vocab_size=case["vocab"], **options)
    with CollectiveCounter() as backward:
        logp_R.backward(gradient_R)
    return {
        "logp": logp_R.detach(),
        "hidden_grad": hidden_RH.grad,
        "weight_grad": weight.main_grad,
        "forward": forward.names,
        "backward": backward.names,
    }


def _rank(cases: dict[str, dict[str, Any]], reduce_hidden_grad: bool) -> dict[str, dict[str, Any]]:
    dist.init_process_group("gloo")
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        results = {}
        for name, case in cases.items():
            part = case["padded"] // size
            shard = slice(rank * part, (rank + 1) * part)
            results[name] = _forward_backward(case, shard, group=dist.group.WORLD, reduce_hidden_grad=reduce_hidden_grad)
        return results
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(_rank, request.param, CASES, True)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_hold_the_same_bits(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    for other in ranks[1:]:
        assert torch.equal(other[name]["logp"], ranks[0][name]["logp"])
        assert torch.equal(other[name]["hidden_grad"], ranks[0][name]["hidden_grad"])


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_equal_one_process(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    case = CASES[name]
    single = _forward_backward(case, slice(0, case["padded"]), group=None)
    weight_grad = torch.cat([rank[name]["weight_grad"] for rank in ranks])
    # fp32 sums in another order; at logits of -500 the fp32 spacing is 3e-5.
    tolerance = 2e-4 if "shift" in case else 3e-6
    assert torch.allclose(ranks[0][name]["logp"], single["logp"], rtol=0, atol=tolerance)
    assert torch.allclose(weight_grad, single["weight_grad"], rtol=0, atol=4 * tolerance)
    # dHidden sums weights that are -500 in the shifted case and cancel; in bf16 each rank's part is rounded before the addition.
    hidden_tolerance = 500 * 1e-6 if "shift" in case else 2**-7 * 4 if "dtype" in case else 4 * tolerance
    assert torch.allclose(ranks[0][name]["hidden_grad"], single["hidden_grad"], rtol=0, atol=hidden_tolerance)


@pytest.mark.parametrize("name", CASES)
def test_the_head_costs_one_all_gather_forward_and_one_all_reduce_backward(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    for rank in ranks:
        assert rank[name]["forward"] == ["_allgather_base_"]
        assert rank[name]["backward"] == ["allreduce_"]


def test_unreduced_hidden_gradients_are_parts_of_the_whole() -> None:
    cases = {"plain": CASES["padded tail inside the last shard"]}
    parts = run_ranks(_rank, 2, cases, False)
    single = _forward_backward(cases["plain"], slice(0, 112), group=None)
    assert [rank["plain"]["backward"] for rank in parts] == [[], []]
    total = parts[0]["plain"]["hidden_grad"] + parts[1]["plain"]["hidden_grad"]
    assert torch.allclose(total, single["hidden_grad"], rtol=0, atol=1e-5)


def test_one_rank_without_a_group_makes_no_collective_at_all() -> None:
    single = _forward_backward(CASES["temperature"], slice(0, 112), group=None)
    assert single["forward"] == single["backward"] == []


def _training_minus_reference() -> list[float]:
    """A pair scored twice, with and without gradients: the difference that step 0 asserts to be zero."""
    dist.init_process_group("gloo")
    try:
        case = CASES["small tiles"]
        hidden_RH, weight_VH, targets_R, _ = _inputs(case)
        part = case["padded"] // dist.get_world_size()
        start = dist.get_rank() * part
        options = {"group": dist.group.WORLD, "vocab_start": start, "vocab_size": case["vocab"], "vocab_chunk": 5, "row_block": 4}
        weight = torch.nn.Parameter(weight_VH[start : start + part])
        with torch.no_grad():
            reference_R = vocab_parallel_logprobs(hidden_RH, weight, targets_R, **options)
        logp_R = vocab_parallel_logprobs(hidden_RH.requires_grad_(), weight, targets_R, **options)
        lengths_Q = torch.tensor([10, ROWS - 10])
        difference_Q = sequence_sums(logp_R.detach(), lengths_Q) - sequence_sums(reference_R, lengths_Q)
        return [float(value) for value in difference_Q]
    finally:
        dist.destroy_process_group()


def test_a_sequence_scored_for_reference_and_for_training_differs_by_exactly_zero() -> None:
    assert run_ranks(_training_minus_reference, 2) == [[0.0, 0.0], [0.0, 0.0]]
