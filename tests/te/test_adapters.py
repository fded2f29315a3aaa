"""LoRA beside Transformer Engine's layers: the checkpoint keys, numbers and gradients of adapters beside Megatron Core's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_megatron.data.batches import make_batch
from spin_megatron.mcore.layers import SpecKind
from spin_megatron.mcore.lora import Adapter, Lora, add_adapters, sharded_adapters
from spin_megatron.mcore.model import Recompute, SpinModel, build_model, load_huggingface
from spin_megatron.mcore.optimizer import UpdateRule
from spin_megatron.mcore.precision import Fp8
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.plan.adapters import MODULES, AdapterShape
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from tests.parity.gloo import run_ranks
from tests.parity.tiny_models import make_pairs
from tests.parity.updates import make_bench, make_steps, numbers_of
from tests.te.kinds import FAMILIES, KINDS, PACK_TOKENS, layouts_of, on_meta, reference_and_step, saved_keys, use


def lora_of(shape: ModelShape) -> Lora:
    """Adapters beside every layer that can have them."""
    targets = AdapterShape(4, ("qkv", "proj") if shape.num_experts else ("qkv", "proj", "fc1", "fc2"))
    targets.check(shape)
    return Lora(targets, scale=2.0, seed=3, iteration=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_beside_both_kinds_of_layers_save_the_same_keys(
    name: str, folders: dict[str, Path], calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ModelShape.from_huggingface(folders[name])
    lora = lora_of(shape)
    for layout, rank in layouts_of(shape):
        found = []
        for kind, fp8 in KINDS:
            use(monkeypatch, kind)
            with on_meta(shape, layout, rank, fp8) as (chunks, runtime):
                add_adapters(chunks, lora, runtime)
                found.append(saved_keys(sharded_adapters(chunk) for chunk in chunks))
        assert found[0] == found[1]
        linears = [MODULES[target] for target in lora.shape.targets]
        assert set(found[0]) == {f"decoder.layers.{linear}.adapter.lora_{factor}" for linear in linears for factor in "ab"}


def _fill_b(chunks: list[SpinModel]) -> None:
    """Make every B other than 0, the same beside both kinds of layers, so that adapters show and A has a gradient."""
    generator = torch.Generator().manual_seed(7)
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Adapter):
                with torch.no_grad():
                    module.lora_b.copy_(torch.randn(module.lora_b.shape, generator=generator) * 0.1)


def _scores_and_gradients(folder: Path, shape: ModelShape, runtime: Runtime) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of a pack and what their sum's gradient is to each trained parameter."""
    chunks = build_model(shape, runtime, dtype=torch.float32)
    load_huggingface(chunks, folder, shape, runtime, show=False)
    add_adapters(chunks, lora_of(shape), runtime)
    _fill_b(chunks)
    batch = make_batch(make_pairs(), pack_tokens=PACK_TOKENS, pad_id=0, share_prompt=True)
    logp_R = chunks[0](batch.tokens_T[None], batch.positions_T[None], batch.branches_B4, batch.rows_R, batch.targets_R)
    trained = {name: tensor for name, tensor in chunks[0].named_parameters() if tensor.requires_grad}
    return logp_R.detach(), dict(zip(trained, torch.autograd.grad(logp_R.sum(), list(trained.values())), strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_beside_transformer_engine_s_layers_compute_what_they_do_beside_local_ones(
    name: str, folders: dict[str, Path], runtime: Runtime, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ModelShape.from_huggingface(folders[name])
    found = {}
    for kind in ("local", "transformer_engine"):
        use(monkeypatch, kind)  # type: ignore[arg-type]
        found[kind] = _scores_and_gradients(folders[name], shape, runtime)
    (logp_R, gradients), (expected_R, expected) = found["transformer_engine"], found["local"]
    torch.testing.assert_close(logp_R, expected_R, atol=2e-4, rtol=0)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 2 * len(lora_of(shape).shape.targets) * shape.num_layers
    for factor, gradient in gradients.items():
        largest = float(expected[factor].abs().max())
        assert largest > 1e-3, factor
        torch.testing.assert_close(gradient, expected[factor], rtol=1e-3, atol=1e-4 * largest)
    # The layer with the norm in it gives what it normed; the adapters do not call it a second time.
    assert len(calls.linear) == 4 * shape.num_layers


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_under_fp8_adapters_stay_bf16_start_at_0_and_are_all_that_is_trained(
    recompute: Recompute, folders: dict[str, Path], runtime: Runtime, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "transformer_engine")
    shape = ModelShape.from_huggingface(folders["llama3"])
    chunks = build_model(shape, runtime, dtype=torch.bfloat16, recompute=recompute, fp8=Fp8("fp8-blockwise"))
    load_huggingface(chunks, folders["llama3"], shape, runtime, show=False)
    add_adapters(chunks, lora_of(shape), runtime)
    _fill_b(chunks)
    before = {name: tensor.detach().clone() for name, tensor in chunks[0].named_parameters()}
    reference, step = reference_and_step(chunks, runtime, calls)
    assert {call.recipe for call in (*reference, *step)} == {"Float8BlockScaling"}
    for name, tensor in chunks[0].named_parameters():
        is_adapter = ".adapter." in name
        assert tensor.dtype == torch.bfloat16
        assert hasattr(tensor, "main_grad") == is_adapter, name
        assert torch.equal(tensor.detach(), before[name]) != is_adapter, name


def _train(folder: Path, kind: SpecKind, layout: ParallelLayout) -> list[tuple[float, float]]:
    """Loss and gradient norm of three updates; this process is one rank."""
    from tests.te.standins import install

    shape = ModelShape.from_huggingface(folder)
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        install(patch)
        use(patch, kind)
        with running(layout, device="cpu", seed=1) as runtime:
            bench = make_bench(folder, UpdateRule("rmsprop", epsilon=1e-3), runtime, lora=lora_of(shape))
            return numbers_of(make_steps(bench, range(3)))


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp, sequence parallel"])
def test_over_tensor_ranks_transformer_engine_s_layers_train_adapters_as_one_process_does(
    sequence: bool, folders: dict[str, Path]
) -> None:
    expected = _train(folders["llama3"], "local", ParallelLayout())
    layout = ParallelLayout(tensor=2, sequence=sequence)
    for found in run_ranks(_train, 2, folders["llama3"], "transformer_engine", layout, timeout=200):
        for numbers, wanted in zip(found, expected, strict=True):
            # The stand-in's norm rounds otherwise than the local one.
            assert numbers == pytest.approx(wanted, rel=1e-4)
