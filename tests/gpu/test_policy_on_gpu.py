"""The policy on a GPU against the CPU: attention kernels by branch, and log-probs of whole tiny models."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from spin_megatron.data.batches import make_batch
from spin_megatron.mcore.attention import Backend, BackendName, BranchAttention
from spin_megatron.mcore.layers import choose_layer_spec
from spin_megatron.mcore.optimizer import UpdateRule
from spin_megatron.mcore.runtime import running
from spin_megatron.mcore.sdpa import attend_by_branch
from spin_megatron.mcore.training import Objective, train_step
from spin_megatron.mcore.varlen import PlanCache
from spin_megatron.objective.logprobs import sequence_sums
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from tests.parity.tiny_models import huggingface_logits, make_pairs, make_tiny_model, response_logps
from tests.parity.updates import make_bench

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NUM_HEADS, NUM_GROUPS, HEAD_DIM, NUM_TOKENS = 8, 2, 64, 512
BRANCHES = [[0, 0, 0, 90], [0, 90, 90, 130], [0, 90, 220, 71], [291, 0, 291, 33], [291, 33, 324, 1], [291, 33, 325, 100]]
NUM_USED = 425
_MODULES = {"flash_attn": "flash_attn", "transformer_engine": "transformer_engine.pytorch", "torch_varlen": "torch.nn.attention.varlen"}


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(NUM_TOKENS, 1, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_GROUPS, NUM_GROUPS)]
    query, key, value = (torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("name", ["flash_attn", "transformer_engine", "torch_varlen"])
def test_each_kernel_sees_the_whole_prefix_and_the_own_past(name: BackendName, window: int | None) -> None:
    pytest.importorskip(_MODULES[name], reason=f"{name} is not installed")
    config = SimpleNamespace(
        context_parallel_size=1,
        attention_dropout=0.0,
        kv_channels=HEAD_DIM,
        window_size=None if window is None else (window - 1, 0),
    )
    attention = BranchAttention(config, 1, None, "self", backend=Backend(name, "test"), plans=PlanCache())
    query, key, value = _inputs(torch.bfloat16)
    upstream = torch.randn(NUM_TOKENS, 1, NUM_HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1)).to("cuda")
    upstream[NUM_USED:] = 0.0  # nothing reads padding
    found = attention(query, key, value, torch.tensor(BRANCHES))
    gradients = torch.autograd.grad(found, (query, key, value), upstream.to(torch.bfloat16))

    wide = [tensor.detach().float().requires_grad_() for tensor in (query, key, value)]
    branches = [(first, count, start, length) for first, count, start, length in BRANCHES]
    expected = attend_by_branch(*(tensor.squeeze(1) for tensor in wide), branches, scale=HEAD_DIM**-0.5, window=window)
    expected_gradients = torch.autograd.grad(expected.reshape(upstream.shape), wide, upstream)
    # bf16 against fp32: 8 bits of mantissa, values up to about 4, gradients of prefix keys summed over 300 queries.
    torch.testing.assert_close(found[:NUM_USED].float(), expected.detach().reshape(found.shape)[:NUM_USED], atol=0.03, rtol=0)
    for gradient, wide_gradient in zip(gradients, expected_gradients, strict=True):
        assert float((gradient.float() - wide_gradient).norm() / wide_gradient.norm()) < 0.02
    again = attention(query, key, value, torch.tensor(BRANCHES))
    assert torch.equal(found, again), "two forward passes must give the same bits"
    for gradient, other in zip(gradients, torch.autograd.grad(again, (query, key, value), upstream.to(torch.bfloat16)), strict=True):
        assert torch.equal(gradient, other), "and so must two backward passes"


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3_tied"])
def test_log_probs_on_the_gpu_agree_with_transformers_on_the_cpu(family: str, tmp_path: Path) -> None:
    from spin_megatron.mcore.model import build_model, load_huggingface
    from spin_megatron.mcore.steps import score_packs

    folder = make_tiny_model(family, tmp_path / family)
    pairs = make_pairs()
    sequences = [(pair.prompt_ids, response) for pair in pairs for response in (pair.real_ids, pair.generated_ids)]
    all_logits = huggingface_logits(folder, sequences)
    expected_Q = torch.tensor(
        [float(response_logps(logits, *sequence).sum()) for logits, sequence in zip(all_logits, sequences, strict=True)]
    )
    shape = ModelShape.from_huggingface(folder)
    batch = make_batch(pairs, pack_tokens=256, pad_id=0, share_prompt=True)
    with running(ParallelLayout(), device="cuda", seed=1) as runtime:
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            chunks = build_model(shape, runtime, dtype=dtype)
            load_huggingface(chunks, folder, shape, runtime, show=False)
            first, second = (score_packs(chunks, [batch], runtime)[0] for _ in range(2))
            assert torch.equal(first, second), "the cached reference must be what the first step computes"
            found[dtype] = sequence_sums(first, batch.lengths_Q).cpu()
    # Transformer Engine multiplies fp32 in TF32: with operands rounded to 10 bits transformers' own sums move by up to 0.024.
    atol = 0.08 if choose_layer_spec(torch.device("cuda")).kind == "transformer_engine" else 2e-3
    torch.testing.assert_close(found[torch.float32], expected_Q, atol=atol, rtol=0)
    lengths_Q = batch.lengths_Q.float()
    assert float(((found[torch.bfloat16] - expected_Q).abs() / lengths_Q.sqrt()).max()) < 0.3  # about 0.05 nat rms a token


def test_the_host_waits_no_more_often_for_many_packs_than_for_few(tmp_path: Path) -> None:
    with running(ParallelLayout(), device="cuda", seed=1) as runtime:
        bench = make_bench(make_tiny_model("llama2", tmp_path), UpdateRule("adamw", max_grad_norm=1.0), runtime, dtype=torch.bfloat16)

        def waits(num_packs: int) -> int:
            packs = bench.packed.packs[:num_packs]
            batches = bench.batches(packs)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as found:
                    warnings.simplefilter("always")
                    train_step(
                        bench.trainer,
                        batches,
                        bench.references,
                        Objective("logistic", beta=0.1),
                        runtime,
                        num_pairs=sum(len(pack.pair_ids) for pack in packs),
                        learning_rate=1e-5,
                    )
            finally:
                torch.cuda.set_sync_debug_mode("default")
            return sum("synchroniz" in str(warning.message) for warning in found)

        waits(2)  # compiles kernels and makes the optimizer's state
        assert waits(6) == waits(2)
