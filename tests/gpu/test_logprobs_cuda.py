"""The head on a GPU: cuBLAS and the compiled Triton epilogues, against float64 on the same device."""

import pytest
import torch
from torch import Tensor

from spin_megatron.objective.logprobs import IGNORED, sequence_sums, vocab_parallel_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _inputs(rows: int, hidden: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    hidden_RH = torch.randn(rows, hidden, generator=generator)
    weight_VH = torch.randn(vocab, hidden, generator=generator).mul_(3.0 / hidden**0.5)
    targets_R = torch.randint(0, vocab, (rows,), generator=generator)
    targets_R[::5] = IGNORED
    gradient_R = torch.randn(rows, generator=generator)
    return hidden_RH.to("cuda", dtype), weight_VH.to("cuda", dtype), targets_R.cuda(), gradient_R.cuda()


def _ours(inputs: tuple[Tensor, Tensor, Tensor, Tensor], vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden_RH, weight_VH, targets_R, gradient_R = inputs
    hidden, weight = hidden_RH.clone().requires_grad_(), torch.nn.Parameter(weight_VH.clone())
    weight.main_grad = torch.zeros(weight.shape, device="cuda")  # type: ignore[attr-defined]
    logp_R = vocab_parallel_logprobs(hidden, weight, targets_R, group=None, vocab_start=0, vocab_size=vocab_size)
    logp_R.backward(gradient_R)
    assert hidden.grad is not None
    return logp_R.detach(), hidden.grad, weight.main_grad  # type: ignore[return-value]


# 8193 columns: a panel and one column; 9000 rows: a panel and a part of a tile.
@pytest.mark.parametrize(("rows", "vocab", "vocab_size"), [(37, 1009, 1009), (300, 16032, 16032), (2100, 8193, 8192), (9000, 5000, 4999)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_float64(rows: int, vocab: int, vocab_size: int, dtype: torch.dtype) -> None:
    inputs = _inputs(rows, 256, vocab, dtype)
    inputs[2].clamp_(max=vocab_size - 1)
    logp_R, hidden_grad, weight_grad = _ours(inputs, vocab_size)
    hidden, weight = inputs[0].double().requires_grad_(), inputs[1].double().requires_grad_()
    all_RV = (hidden @ weight[:vocab_size].t()).log_softmax(-1)
    exact_R = torch.where(inputs[2] < 0, 0.0, all_RV.gather(1, inputs[2].clamp(min=0)[:, None])[:, 0])
    exact_R.backward(inputs[3].double())
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (logp_R.double() - exact_R.detach()).abs().max() < 1e-4  # fp32 logits in both dtypes
    relative = 1e-5 if dtype == torch.float32 else 2**-7
    for found, exact in ((hidden_grad, hidden.grad), (weight_grad, weight.grad)):
        assert (found.double() - exact).abs().max() <= relative * exact.abs().max()
    assert hidden_grad[inputs[2] == IGNORED].eq(0).all()


def test_the_same_inputs_give_the_same_bits_with_and_without_gradients() -> None:
    inputs = _inputs(1500, 256, 9001, torch.bfloat16)
    first, second = _ours(inputs, 9001), _ours(inputs, 9001)
    with torch.no_grad():
        scored_R = vocab_parallel_logprobs(*inputs[:3], group=None, vocab_start=0, vocab_size=9001)
    assert torch.equal(first[0], scored_R)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_a_micro_batch_of_the_head_never_waits_for_the_gpu() -> None:
    inputs = _inputs(600, 256, 9001, torch.bfloat16)
    lengths_Q = torch.tensor([200, 400], device="cuda")
    _ours(inputs, 9001)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        logp_R, _, _ = _ours(inputs, 9001)
        sequence_sums(logp_R, lengths_Q)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_scoring_needs_a_tile_not_the_logits() -> None:
    inputs = _inputs(16384, 256, 32000, torch.bfloat16)
    with torch.no_grad():
        vocab_parallel_logprobs(*inputs[:3], group=None, vocab_start=0, vocab_size=32000)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        vocab_parallel_logprobs(*inputs[:3], group=None, vocab_start=0, vocab_size=32000)
    assert torch.cuda.max_memory_allocated() - before < 2**25  # tile 16 MiB and rows; the fp32 logits would be 2 GiB
