"""Pieces of branches on context ranks: together they compute what one rank computes of the whole pack."""

import pytest
import torch

from spin_megatron.mcore.context import own_tokens, plan_context
from spin_megatron.mcore.sdpa import attend_by_branch
from spin_megatron.mcore.varlen import gather_keys

# Two pairs and a sequence; tokens 29, 30 and 31 are padding.
BRANCHES = torch.tensor([[0, 0, 0, 5], [0, 5, 5, 6], [0, 5, 11, 2], [13, 0, 13, 3], [13, 3, 16, 1], [13, 3, 17, 5], [22, 0, 22, 7]])
NUM_TOKENS, CPU = 32, torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_token_is_on_one_rank_and_early_tokens_go_with_late_ones(size: int) -> None:
    ranks = [own_tokens(NUM_TOKENS, size, rank).tolist() for rank in range(size)]
    assert sorted(token for tokens in ranks for token in tokens) == list(range(NUM_TOKENS))
    assert all(sum(tokens) == sum(range(NUM_TOKENS)) // size for tokens in ranks)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_ranks_queries_attend_as_in_the_whole_pack(size: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(NUM_TOKENS, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    upstream = torch.randn(NUM_TOKENS, 4, 8, generator=generator, dtype=torch.float64)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
        return attend_by_branch(query, key, value, [tuple(row) for row in branches.tolist()], scale=0.3, window=window)

    whole = attend(query, key, value, BRANCHES)
    expected = torch.autograd.grad(whole, leaves, upstream)
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for rank in range(size):
        own, plan = own_tokens(NUM_TOKENS, size, rank), plan_context(BRANCHES, CPU, NUM_TOKENS, size, rank)
        if not plan.branches_S4.shape[0]:
            assert (own >= 29).all(), "only padding"
            continue
        found = attend(query[own], gather_keys(key, plan.keys), gather_keys(value, plan.keys), plan.branches_S4)
        torch.testing.assert_close(found, whole[own], atol=1e-12, rtol=0)
        for sum_, part in zip(total, torch.autograd.grad(found, leaves, upstream[own]), strict=True):
            sum_ += part
    for found_gradient, gradient in zip(total, expected, strict=True):
        torch.testing.assert_close(found_gradient, gradient, atol=1e-12, rtol=0)
