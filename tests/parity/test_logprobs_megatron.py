"""The head and the embedding under Megatron Core's own DistributedDataParallel: its gradient buffer must receive each part exactly once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spin_megatron.mcore.embedding import look_up, share_with_head
from spin_megatron.mcore.runtime import running
from spin_megatron.objective.logprobs import vocab_parallel_logprobs
from spin_megatron.plan.shape import ParallelLayout
from tests.parity.gloo import run_ranks

VOCAB, HIDDEN = 30, 8
TOKENS = torch.tensor([3, 7, 7, 1, 29])
TARGETS = torch.tensor([7, 7, 1, 29, -1])


class TinyLanguageModel(torch.nn.Module):
    """Embedding, one matrix, head; the head's weight may be the embedding's."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.embedding = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator))
        self.body = torch.nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator))
        self.head = self.embedding if is_tied else torch.nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator))
        if is_tied:
            share_with_head(self.head)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = torch.tanh(look_up(self.embedding, tokens) @ self.body)
        return vocab_parallel_logprobs(hidden, self.head, targets, group=None, vocab_start=0, vocab_size=VOCAB, vocab_chunk=7)


def _expected(is_tied: bool) -> dict[str, Tensor]:
    """Gradients of minus the summed log-probs by plain autograd in float64."""
    model = TinyLanguageModel(is_tied).double()
    hidden = torch.tanh(torch.nn.functional.embedding(TOKENS, model.embedding) @ model.body)
    logp = (hidden @ model.head.t()).log_softmax(-1)[:-1]  # the last row is ignored
    (-logp.gather(1, TARGETS[:-1, None]).sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _buffers(cases: list[tuple[bool, bool]]) -> list[dict[str, Tensor]]:
    return [_buffer_after_two_micro_batches(*case) for case in cases]


def _buffer_after_two_micro_batches(is_tied: bool, overlap: bool) -> dict[str, Tensor]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    with running(ParallelLayout(), device="cpu", seed=1):
        config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, bf16=False)
        options: dict[str, Any] = {"grad_reduce_in_fp32": True, "overlap_grad_reduce": overlap}
        wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(**options), TinyLanguageModel(is_tied))
        wrapped.zero_grad_buffer()
        with wrapped.no_sync():
            (-wrapped(TOKENS, TARGETS).sum()).backward()
        (-wrapped(TOKENS, TARGETS).sum()).backward()
        wrapped.finish_grad_sync()
        return {name: parameter.main_grad.clone() for name, parameter in wrapped.module.named_parameters()}


@pytest.fixture(scope="module")
def buffers() -> dict[tuple[bool, bool], dict[str, Tensor]]:
    """Of every (is_tied, overlap), made in one process: Megatron Core takes seconds to import."""
    cases = [(is_tied, overlap) for is_tied in (False, True) for overlap in (False, True)]
    return dict(zip(cases, run_ranks(_buffers, 1, cases)[0], strict=True))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_megatrons_buffer_holds_head_and_embedding_gradients_once_each(
    buffers: dict[tuple[bool, bool], dict[str, Tensor]], is_tied: bool, overlap: bool
) -> None:
    buffer, expected = buffers[is_tied, overlap], _expected(is_tied)
    assert buffer.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(buffer[name].double(), 2 * gradient, rtol=1e-5, atol=1e-5), name
