"""With Transformer Engine the share of the optimizer that stays on the GPU is its FusedAdam; its one kernel is torch's here."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spin_megatron.data.progress import Progress
from spin_megatron.mcore.checkpoint import load_training, save_training
from spin_megatron.mcore.offload import inner_optimizers
from spin_megatron.mcore.optimizer import UpdateRule, parts
from spin_megatron.mcore.runtime import running
from spin_megatron.plan.shape import ParallelLayout
from tests.parity.offloading import a_gpu_and_a_host
from tests.parity.tiny_models import make_tiny_model
from tests.parity.updates import make_bench, make_steps, numbers_of, weight_bits


def adamw_kernel(
    _chunk: int,
    _noop: Tensor,
    lists: Sequence[Sequence[Tensor]],
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    is_adamw: int,
    has_bias_correction: int,
    decay: float,
) -> None:
    """transformer_engine_torch.multi_tensor_adam: gradients, parameters and both moments, all fp32 here."""
    assert (is_adamw, has_bias_correction) == (1, 1)
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        parameter.mul_(1 - rate * decay)
        root = square.sqrt() / math.sqrt(1 - beta2**step) + epsilon
        parameter.addcdiv_(mean, root, value=-rate / (1 - beta1**step))


def test_its_adam_updates_what_stays_on_the_gpu_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformer_engine.pytorch.optimizers.fused_adam.tex.multi_tensor_adam", adamw_kernel)
    folder = make_tiny_model("llama2", tmp_path / "model")
    settings = {"weight_decay": 0.1, "max_grad_norm": 1.0, "is_distributed": True}
    with running(ParallelLayout(), device="cpu", seed=1) as runtime:
        bench = make_bench(folder, UpdateRule("adamw", **settings), runtime, dtype=torch.bfloat16)
        expected = numbers_of(make_steps(bench, range(4)))
        rule = UpdateRule("adamw", offload_fraction=0.4, **settings)
        with a_gpu_and_a_host():
            bench, again = (make_bench(folder, rule, runtime, dtype=torch.bfloat16) for _ in range(2))
            makers = {
                type(inner).__module__.partition(".")[0] for inner in inner_optimizers(next(parts(bench.trainer.optimizer)).optimizer)
            }
            assert makers == {"torch", "transformer_engine"}
            found = numbers_of(make_steps(bench, (0, 1)))
            saved = save_training(tmp_path / "saved", bench.trainer, Progress(step=2, packs_consumed=8), runtime, recipe={}, keep=1)
            found += numbers_of(make_steps(bench, (2, 3)))
            load_training(saved, again.trainer, runtime, recipe={})
            assert numbers_of(make_steps(again, (2, 3))) == found[2:]
            assert weight_bits(again.trainer) == weight_bits(bench.trainer)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=0.0)
