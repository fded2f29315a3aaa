"""Attention over branches against plain float64 softmax attention of each sequence on its own."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spin_megatron.mcore import attention as attention_module
from spin_megatron.mcore.attention import Backend, BackendName, BranchAttention, choose_backend
from spin_megatron.mcore.varlen import PlanCache, VarlenPlan

NUM_HEADS, NUM_GROUPS, HEAD_DIM, NUM_TOKENS = 6, 2, 8, 40
# x of 9 tokens with answers of 5 and 7, a sequence of 6, one of 1, a second pair; 4 tokens of padding.
BRANCHES = [[0, 0, 0, 9], [0, 9, 9, 5], [0, 9, 14, 7], [21, 0, 21, 6], [27, 0, 27, 1], [28, 0, 28, 3], [28, 3, 31, 1], [28, 3, 32, 4]]


def _attention(backend: BackendName, window: int | None = None) -> BranchAttention:
    config = SimpleNamespace(
        context_parallel_size=1,
        attention_dropout=0.0,
        kv_channels=HEAD_DIM,
        window_size=None if window is None else (window - 1, 0),
    )
    return BranchAttention(config, 1, None, "self", backend=Backend(backend, "test"), plans=PlanCache())


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Strided like Megatron Core's: query, key and value are views into one projection.
    widths = (NUM_HEADS, NUM_GROUPS, NUM_GROUPS)
    mixed = torch.randn(NUM_TOKENS, 1, sum(widths), HEAD_DIM, dtype=torch.float64, generator=generator).to(dtype)
    query, key, value = (part.detach().requires_grad_() for part in mixed.split(widths, dim=2))
    return query, key, value


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Float64, sequence by sequence, the softmax written out; padding is 0."""
    context = torch.zeros(NUM_TOKENS, NUM_HEADS, HEAD_DIM, dtype=torch.float64)
    query, key, value = (tensor.double().squeeze(1) for tensor in (query, key, value))
    repeated = [tensor.repeat_interleave(NUM_HEADS // NUM_GROUPS, dim=1) for tensor in (key, value)]
    for prefix_start, prefix, start, length in BRANCHES:
        tokens = [*range(prefix_start, prefix_start + prefix), *range(start, start + length)]
        for place in range(prefix, prefix + length):
            first = 0 if window is None else max(0, place - window + 1)
            seen = tokens[first : place + 1]
            scores = torch.einsum("nd,snd->ns", query[tokens[place]], repeated[0][seen]) / math.sqrt(HEAD_DIM)
            context[tokens[place]] = torch.einsum("ns,snd->nd", scores.softmax(-1), repeated[1][seen])
    return context.reshape(NUM_TOKENS, 1, -1)


def _segment_kernel(window: int | None) -> Callable[[BranchAttention, VarlenPlan], Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What a variable-length kernel promises (bottom-right causal), as plain torch, in place of the CUDA ones."""

    def for_plan(_module: BranchAttention, plan: VarlenPlan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            assert plan.max_queries == max(branch[3] for branch in BRANCHES)  # and of 4 tokens of padding
            assert plan.max_keys == max(branch[1] + branch[3] for branch in BRANCHES)
            contexts = []
            bounds = torch.stack((plan.cu_queries_B1, plan.cu_keys_B1), dim=1).tolist()
            for (first_query, first_key), (last_query, last_key) in itertools.pairwise(bounds):
                segment_query = query[first_query:last_query]
                keys, values = (tensor[first_key:last_key].repeat_interleave(NUM_HEADS // NUM_GROUPS, dim=1) for tensor in (key, value))
                num_queries, num_keys = len(segment_query), len(keys)
                distance = torch.arange(num_queries)[:, None] + (num_keys - num_queries) - torch.arange(num_keys)[None]
                hidden = (distance < 0) | (distance >= (window or num_keys + 1))
                scores = torch.einsum("qnd,knd->nqk", segment_query, keys) / math.sqrt(HEAD_DIM)
                contexts.append(torch.einsum("nqk,knd->qnd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values))
            return torch.cat(contexts)

        return kernel

    return for_plan


@pytest.mark.parametrize("window", [None, 4, 10, 64], ids=lambda window: f"window_{window}")
@pytest.mark.parametrize(("backend", "num_threads"), [("cpu_flash", 2), ("cpu_flash", 3), ("sdpa", 1), ("torch_varlen", 1)])
def test_values_and_gradients_equal_plain_attention_of_each_sequence(
    backend: BackendName, num_threads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BranchAttention, "_varlen_kernel", _segment_kernel(window))
    # Three threads cannot share two key-value heads evenly, so the CPU backward takes the heads of a group as a batch.
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    query, key, value = _inputs()
    upstream = torch.randn(NUM_TOKENS, 1, NUM_HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1))
    found = _attention(backend, window)(query, key, value, torch.tensor(BRANCHES))
    expected = _plain_attention(query, key, value, window)
    # fp32 against float64: a few units in the last place of values of order 1.
    torch.testing.assert_close(found[:36].double(), expected[:36], atol=2e-6, rtol=0)
    if backend != "torch_varlen":
        assert torch.equal(found[36:], torch.zeros(4, 1, NUM_HEADS * HEAD_DIM))
    upstream[36:] = 0.0  # nothing reads padding
    gradients = torch.autograd.grad(found, (query, key, value), upstream)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), upstream.double())
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=5e-6, rtol=0)


@pytest.mark.parametrize("backend", ["cpu_flash", "sdpa"])
def test_bfloat16_stays_within_its_rounding(backend: BackendName) -> None:
    query, key, value = _inputs(torch.bfloat16)
    found = _attention(backend)(query, key, value, torch.tensor(BRANCHES))
    assert found.dtype == torch.bfloat16
    # bf16 keeps 8 bits: values up to about 2.5 are rounded by at most 2**-8 * 2, probabilities and values once more each.
    torch.testing.assert_close(found.double(), _plain_attention(query, key, value, None), atol=0.03, rtol=0)


def test_a_sequence_does_not_feel_its_neighbours_in_the_pack() -> None:
    query, key, value = (tensor.detach() for tensor in _inputs())
    attention = _attention("cpu_flash")
    whole = attention(query, key, value, torch.tensor(BRANCHES))
    alone = attention(query[28:], key[28:], value[28:], torch.tensor([[0, 0, 0, 3], [0, 3, 3, 1], [0, 3, 4, 4]]))
    assert torch.equal(whole[28:], alone)


@pytest.mark.parametrize("backend", ["cpu_flash", "sdpa"])
def test_a_pack_of_padding_gives_zeros_and_zero_gradients(backend: BackendName) -> None:
    query, key, value = _inputs()
    context = _attention(backend)(query, key, value, torch.zeros(0, 4, dtype=torch.int64))
    assert torch.equal(context, torch.zeros(NUM_TOKENS, 1, NUM_HEADS * HEAD_DIM))
    context.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_without_shared_prompts_values_are_copied_out_of_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(NUM_TOKENS, 1, NUM_HEADS + 2 * NUM_GROUPS, HEAD_DIM)
    query, key, value = whole.split([NUM_HEADS, NUM_GROUPS, NUM_GROUPS], dim=2)
    given: list[Tensor] = []

    def kernel(*tensors: Tensor) -> Tensor:
        given.extend(tensors)
        return tensors[0]

    monkeypatch.setattr(BranchAttention, "_varlen_kernel", lambda _self, _plan: kernel)
    _attention("torch_varlen")(query, key, value, torch.tensor([[0, 0, 0, 25], [25, 0, 25, 10]]))
    assert [tensor.shape[0] for tensor in given] == [NUM_TOKENS] * 3
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in given[1:])  # queries come as a copy


def test_layers_share_one_plan_found_by_content() -> None:
    plans = PlanCache(capacity=2)
    first, device = torch.tensor(BRANCHES), torch.device("cpu")
    plan = plans.get(first, device)
    assert plans.get(first.clone(), device) is plan
    other, third = torch.tensor([[0, 0, 0, 3]]), torch.tensor([[0, 0, 0, 4]])
    assert plans.get(other, device).keys is None
    assert plans.get(first, device) is plan
    plans.get(third, device)
    assert plans.get(first, device) is plan  # used more recently than `other`, which had to go


def test_the_backend_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(dtype: torch.dtype, installed: set[str], head_dim: int = 64) -> tuple[str, str]:
        monkeypatch.setattr(attention_module, "is_installed", lambda module: module in installed)
        backend = choose_backend(torch.device("cuda"), dtype, head_dim=head_dim, sliding_window=None)
        return backend.name, backend.reason

    everything = {"flash_attn", "transformer_engine", "torch.nn.attention.varlen"}
    assert choose_backend(torch.device("cpu"), torch.float32, head_dim=64, sliding_window=8).name == "cpu_flash"
    assert reason(torch.bfloat16, everything) == ("flash_attn", "flash-attn is installed")
    assert reason(torch.bfloat16, everything - {"flash_attn"})[0] == "torch_varlen"
    assert reason(torch.bfloat16, {"transformer_engine"})[0] == "transformer_engine"
    assert reason(torch.bfloat16, set())[0] == "sdpa"
    assert reason(torch.float32, everything) == ("sdpa", "variable-length kernels compute bfloat16 and float16, not torch.float32")
    assert reason(torch.bfloat16, everything, head_dim=320)[1].endswith("at most 256, not 320")


def test_the_backward_of_torch_varlen_alone_adds_in_one_order() -> None:
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    found: dict[str, tuple[bool, bool]] = {}

    def settings() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found[str(operator)] = settings()
            return operator(*args, **(kwargs or {}))

    # The real operators, which on the meta device compute nothing.
    shapes = [(10, 8, 16), (12, 2, 16), (12, 2, 16)]
    query, key, value = (torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes)
    sums_B1 = torch.empty(3, dtype=torch.int32, device="meta")
    plan = VarlenPlan(sums_B1, sums_B1, max_queries=5, max_keys=6, keys=None)
    context = attention_module._torch_varlen(query * 2, key, value, plan, scale=0.25, window=None)
    with Watch():
        context.sum().backward()
    # Nor is memory filled that the kernel writes anyway.
    assert found["torch_attn._varlen_attn_backward.default"] == (True, False)
    assert found["aten.mul.Tensor"] == settings() == (False, True)  # of the queries, after it


@pytest.mark.parametrize(("window", "pair"), [(None, (-1, 0)), (5, (4, 0))])
def test_torch_varlen_is_asked_for_a_causal_window_and_grouped_queries(
    window: int | None, pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    calls = []

    @functools.wraps(varlen.varlen_attn)
    def record(*args: object, **kwargs: object) -> Tensor:
        calls.append(inspect.signature(varlen.varlen_attn).bind(*args, **kwargs).arguments)
        return torch.zeros(NUM_TOKENS, NUM_HEADS, HEAD_DIM)

    monkeypatch.setattr(varlen, "varlen_attn", record)
    query, key, value = _inputs()
    _attention("torch_varlen", window)(query, key, value, torch.tensor(BRANCHES))
    arguments = calls[0]
    assert arguments["cu_seq_q"].tolist() == [0, 9, 14, 21, 27, 28, 31, 32, 36, 40]
    # Each answer brings its prefix along: 9, 9 + 5, 9 + 7, 6, 1, 3, 3 + 1, 3 + 4; the padding stands alone.
    assert arguments["cu_seq_k"].tolist() == [0, 9, 23, 39, 45, 46, 49, 53, 60, 64]
    assert (arguments["max_q"], arguments["max_k"]) == (9, 16)
    # Before torch had that argument (2.11), its kernel took grouped queries as they are.
    assert arguments.get("enable_gqa", True) is True
    assert "enable_gqa" in arguments or "enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters
    assert arguments["scale"] == pytest.approx(1 / math.sqrt(HEAD_DIM))
    assert arguments["window_size"] == pair
