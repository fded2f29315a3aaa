"""LoRA: nothing changes before the first update, gradients equal an independent implementation's, and layouts agree."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spin_megatron.convert.families import parameter, row_blocks
from spin_megatron.mcore.lora import Lora, add_adapters
from spin_megatron.mcore.model import Recompute, build_model, load_huggingface
from spin_megatron.mcore.optimizer import UpdateRule
from spin_megatron.mcore.reference import score_pairs
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.mcore.training import Objective, train_step
from spin_megatron.objective import logprobs
from spin_megatron.plan.adapters import MODULES, AdapterShape
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from tests.parity.tiny_models import make_tiny_model, response_logps
from tests.parity.updates import LEARNING_RATE, Bench, Case, Subject, assert_layouts_agree, make_bench, make_steps, packed_pairs

ALL = AdapterShape(4, ("qkv", "proj", "fc1", "fc2"))
LORA = Lora(ALL, scale=2.0, seed=3, iteration=0)
ATTENTION = replace(LORA, shape=AdapterShape(4, ("qkv", "proj")))
RULE = UpdateRule("adamw", weight_decay=0.1, max_grad_norm=1.0)
MODELS = {"llama2": LORA, "qwen3_tied": replace(LORA, shape=AdapterShape(3, ("qkv", "fc2"))), "mixtral": ATTENTION}
DENSE, EXPERTS = ("llama2", "qwen3_tied"), ("mixtral",)
CASES = {
    "dp": Case(ParallelLayout(data=4), DENSE, is_distributed=True),
    "tp": Case(ParallelLayout(tensor=2, data=2), DENSE, is_distributed=True),
    "tp beyond the kv heads": Case(ParallelLayout(tensor=4), ("qwen3_tied",)),
    "tp, sequence parallel": Case(ParallelLayout(tensor=2, data=2, sequence=True), DENSE),
    "tp, sequence parallel, overlapped, recomputed": Case(
        ParallelLayout(tensor=2, data=2, sequence=True), ("llama2",), is_distributed=True, overlap=True, recompute="selective"
    ),
    "pp": Case(ParallelLayout(pipeline=2, data=2), DENSE, is_distributed=True),
    "pp, virtual stages": Case(ParallelLayout(pipeline=2, data=2, virtual_pipeline=2), DENSE),
    "tp, sequence parallel and pp": Case(ParallelLayout(tensor=2, pipeline=2, sequence=True), DENSE, recompute="full"),
    "cp": Case(ParallelLayout(data=2, context=2), ("llama2",), is_distributed=True),
    "ep": Case(ParallelLayout(tensor=2, data=2, expert=2, sequence=True), EXPERTS, is_distributed=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_tiny_model(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with running(ParallelLayout(), device="cpu", seed=1) as started:
        yield started


@pytest.mark.timeout(600)
def test_loss_and_gradient_norm_equal_one_process_on_every_layout(models: dict[str, Path]) -> None:
    assert_layouts_agree({name: Subject(models[name], RULE, lora) for name, lora in MODELS.items()}, CASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adapters_change_no_bit_before_the_first_update(models: dict[str, Path], runtime: Runtime, dtype: torch.dtype) -> None:
    shape, packed = ModelShape.from_huggingface(models["llama2"]), packed_pairs()
    chunks = build_model(shape, runtime, dtype=dtype)
    load_huggingface(chunks, models["llama2"], shape, runtime, show=False)
    without = score_pairs(chunks, packed, [packed.packs], runtime)
    add_adapters(chunks, LORA, runtime)
    assert score_pairs(chunks, packed, [packed.packs], runtime) == without


def _fill_b(bench: Bench) -> dict[str, torch.Tensor]:
    """Make every B other than 0, so that A has a gradient; the adapters by name."""
    generator, found = torch.Generator().manual_seed(7), {}
    for name, tensor in bench.trainer.chunks[0].module.named_parameters():
        if name.endswith("lora_b"):
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        if tensor.requires_grad:
            found[name] = tensor
    return found


def _step(bench: Bench, objective: Objective) -> float:
    packs = bench.packed.packs
    num_pairs = sum(len(pack.pair_ids) for pack in packs)
    batches = bench.batches(packs)
    return train_step(
        bench.trainer, batches, bench.references, objective, bench.runtime, num_pairs=num_pairs, learning_rate=LEARNING_RATE
    ).metrics["loss"]


def _independent(folder: Path, adapters: dict[str, torch.Tensor], bench: Bench, objective: Objective) -> tuple[float, dict[str, Any]]:
    """Loss and gradients in float64: transformers' model with W + scale B A as weights, a sequence at a time, by autograd."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    shape, weights = ModelShape.from_huggingface(folder), {name: tensor.detach() for name, tensor in model.named_parameters()}
    factors = {name: tensor.detach().double().requires_grad_() for name, tensor in adapters.items()}
    for name, lora_b in factors.items():
        if name.endswith("lora_a"):
            continue
        linear = name.removesuffix(".adapter.lora_b")
        entry, delta = parameter(f"{linear}.weight", shape), LORA.scale * lora_b @ factors[f"{linear}.adapter.lora_a"]
        sizes = [block.stop - block.start for block in row_blocks(entry, shape)]
        for block, rows in zip(row_blocks(entry, shape), delta.split(sizes), strict=True):
            source = entry.sources[block.source].name
            padded = F.pad(rows, (0, 0, block.start, weights[source].shape[0] - block.stop))
            weights[source] = weights[source] + padded

    def logp(prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
        output = torch.func.functional_call(model, weights, (torch.tensor([[*prompt, *response]]),))
        return response_logps(output.logits[0], prompt, response).sum()

    losses = []
    for pair_id, pair in bench.packed.pairs.items():
        reference = bench.references[pair_id]
        margin = (logp(pair.prompt_ids, pair.real_ids) - reference.logp_real) - (
            logp(pair.prompt_ids, pair.generated_ids) - reference.logp_generated
        )
        losses.append(F.softplus(-objective.beta * margin))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: tensor.grad for name, tensor in factors.items()}


@pytest.mark.parametrize("name", ["llama2", "qwen3_tied"])
def test_gradients_of_both_factors_are_those_of_merged_weights_in_float64(models: dict[str, Path], runtime: Runtime, name: str) -> None:
    bench = make_bench(models[name], UpdateRule("adamw"), runtime, packed=packed_pairs(num_pairs=4), lora=LORA)
    objective, adapters = Objective("logistic", beta=0.1), _fill_b(bench)
    assert len(adapters) == 2 * len(MODULES) * 4
    expected_loss, expected = _independent(models[name], adapters, bench, objective)
    assert _step(bench, objective) == pytest.approx(expected_loss, rel=1e-5)
    for factor, tensor in adapters.items():
        # fp32 against float64; gradients of one tensor are of one order, so its largest sets the scale.
        largest = float(expected[factor].abs().max())
        assert largest > 1e-6, factor
        torch.testing.assert_close(tensor.main_grad.double(), expected[factor], rtol=1e-4, atol=2e-5 * largest)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_layers_give_the_same_gradients(models: dict[str, Path], runtime: Runtime, recompute: Recompute) -> None:
    """The first layer's input asks for no gradient by itself: recomputed in blocks it would get none."""
    found = []
    for mode in ("none", recompute):
        bench = make_bench(models["llama2"], RULE, runtime, packed=packed_pairs(num_pairs=4), lora=LORA, recompute=mode)
        adapters = _fill_b(bench)
        _step(bench, Objective("logistic", beta=0.1))
        found.append({name: tensor.main_grad.clone() for name, tensor in adapters.items()})
    for name, gradient in found[0].items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_frozen_weights_have_no_gradient_and_the_head_computes_none(
    models: dict[str, Path], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(models["llama2"], RULE, runtime, lora=LORA)
    monkeypatch.setattr(logprobs.WeightGradient, "of", None)
    before = {name: tensor.detach().clone() for name, tensor in bench.trainer.chunks[0].module.named_parameters()}
    make_steps(bench, range(2))
    for name, tensor in bench.trainer.chunks[0].module.named_parameters():
        is_adapter = ".adapter." in name
        assert hasattr(tensor, "main_grad") == is_adapter, name
        assert is_adapter or tensor.grad is None, name
        assert torch.equal(tensor.detach(), before[name]) != is_adapter, name


def test_a_is_drawn_alike_at_every_layout_and_anew_in_every_iteration(models: dict[str, Path], runtime: Runtime) -> None:
    def drawn(lora: Lora) -> torch.Tensor:
        bench = make_bench(models["llama2"], RULE, runtime, packed=packed_pairs(num_pairs=4), lora=lora)
        return bench.trainer.chunks[0].module.get_parameter("decoder.layers.1.mlp.linear_fc2.adapter.lora_a")

    first = drawn(LORA)
    assert torch.equal(first, drawn(LORA))
    assert not torch.equal(first, drawn(replace(LORA, iteration=1)))
    # Uniform over +-1/sqrt(inputs): 48 inputs; the spread of a uniform is its bound / sqrt(3).
    assert float(first.detach().abs().max()) <= 48**-0.5
    assert float(first.detach().std()) == pytest.approx(48**-0.5 / 3**0.5, rel=0.2)
