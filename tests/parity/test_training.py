"""Updates: the same loss and gradient norm on every layout, the optimizers by hand, and what happens to numbers that are not finite."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spin_megatron.mcore.optimizer import UpdateRule, apply_gradients, clear_gradients
from spin_megatron.mcore.optimizer_state import slots
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.mcore.training import Objective, train_step
from spin_megatron.plan.shape import ParallelLayout
from tests.parity.tiny_models import make_tiny_model
from tests.parity.updates import (
    LEARNING_RATE,
    NUM_STEPS,
    Bench,
    Case,
    Subject,
    assert_layouts_agree,
    make_bench,
    make_steps,
    packed_pairs,
    weight_bits,
)

ADAMW = UpdateRule("adamw", weight_decay=0.1, max_grad_norm=1.0)
RMSPROP = UpdateRule("rmsprop")
# The first update of either rule is learning rate x g / (|g| + epsilon): with a tiny epsilon a gradient that is 0 but for rounding
# moves its weight as far as any other, and layouts drift apart by 3e-5 in a step. The root mean square of g is 0.02 here.
LAYOUT_EPSILON = 1e-3
# name -> (kind of tiny model, layers, rule)
MODELS = {
    "llama2": ("llama2", 4, ADAMW),
    "tied": ("qwen3_tied", 6, RMSPROP),
    "deep": ("qwen3_tied", 9, ADAMW),
    "mixtral": ("mixtral", 4, ADAMW),
}
LLAMA, TIED, DEEP, EXPERTS = (("llama2",), ("tied",), ("deep",), ("mixtral",))
DENSE = (*LLAMA, *TIED)
PIPELINED = ParallelLayout(pipeline=2, data=2, virtual_pipeline=2)
UNEVEN = (2, 2, 1, 1)  # layers of the tied model's virtual stages
# Inner ranks have neither embedding nor head, and the last stage, with the head, has fewer layers than the first.
DEEP_PIPELINE = ParallelLayout(pipeline=4, virtual_pipeline=2, stage_layers=(2, 1, 1, 1, 1, 1, 1, 1))

CASES = {
    "dp": Case(ParallelLayout(data=4), DENSE),
    "dp, distributed optimizer": Case(ParallelLayout(data=4), DENSE, is_distributed=True),
    "dp, overlapped": Case(ParallelLayout(data=4), DENSE, overlap=True),
    "dp, distributed optimizer, overlapped": Case(ParallelLayout(data=4), DENSE, is_distributed=True, overlap=True),
    "tp": Case(ParallelLayout(tensor=2, data=2), DENSE, is_distributed=True),
    "tp, sequence parallel": Case(ParallelLayout(tensor=2, data=2, sequence=True), DENSE),
    "tp, sequence parallel, overlapped, recomputed": Case(
        ParallelLayout(tensor=2, data=2, sequence=True), TIED, is_distributed=True, overlap=True, recompute="selective"
    ),
    "pp": Case(ParallelLayout(pipeline=2, data=2), DENSE, is_distributed=True),
    "pp, uneven stages": Case(ParallelLayout(pipeline=2, data=2, stage_layers=(3, 1)), LLAMA),
    # Four micro-batches: only then does a stage send an activation and a gradient to the same rank at a time.
    "tp, pp, virtual stages": Case(ParallelLayout(tensor=2, pipeline=2, virtual_pipeline=2), LLAMA),
    "pp, uneven virtual stages": Case(ParallelLayout(pipeline=2, data=2, virtual_pipeline=2, stage_layers=UNEVEN), TIED),
    "pp of four ranks": Case(ParallelLayout(pipeline=4), LLAMA, is_distributed=True),
    "pp of four ranks, uneven virtual stages": Case(DEEP_PIPELINE, DEEP),
    "pp, virtual stages, recomputed": Case(PIPELINED, LLAMA, is_distributed=True, recompute="full"),
    "tp and pp, one layer of a stage recomputed": Case(
        ParallelLayout(tensor=2, pipeline=2), DENSE, recompute="full", recompute_layers=1
    ),
    "pp, virtual stages, overlapped": Case(PIPELINED, LLAMA, is_distributed=True, overlap=True),
    "cp": Case(ParallelLayout(context=4), DENSE),
    "cp and dp, overlapped": Case(ParallelLayout(data=2, context=2), LLAMA, is_distributed=True, overlap=True),
    "cp, tp, sequence parallel": Case(ParallelLayout(tensor=2, context=2, sequence=True), DENSE),
    "cp, tp, recomputed": Case(ParallelLayout(tensor=2, context=2, sequence=True), LLAMA, is_distributed=True, recompute="full"),
    "cp, pp, uneven virtual stages": Case(
        ParallelLayout(pipeline=2, context=2, virtual_pipeline=2, stage_layers=UNEVEN), TIED, is_distributed=True
    ),
    "cp and ep": Case(ParallelLayout(context=2, data=2, expert=2), EXPERTS),
    "ep": Case(ParallelLayout(tensor=2, data=2, expert=2, sequence=True), EXPERTS, is_distributed=True),
    "ep, overlapped": Case(ParallelLayout(data=4, expert=2), EXPERTS, is_distributed=True, overlap=True),
    "ep over all ranks, recomputed": Case(ParallelLayout(data=4, expert=4), EXPERTS, recompute="selective"),
    "ep and pp, virtual stages": Case(replace(PIPELINED, expert=2), EXPERTS, is_distributed=True, recompute="full"),
}
# Three kinds at a time, as large runs have them.
CASES_OF_8 = {
    "tp, pp, dp": Case(ParallelLayout(tensor=2, pipeline=2, data=2, sequence=True), LLAMA, is_distributed=True),
    "tp, pp of four ranks, uneven virtual stages": Case(
        replace(DEEP_PIPELINE, tensor=2, sequence=True), DEEP, is_distributed=True, recompute="selective"
    ),
    # Two packs a data rank: empty ones fill the schedule up to four.
    "dp, pp of four ranks, uneven virtual stages, overlapped": Case(
        replace(DEEP_PIPELINE, data=2), DEEP, is_distributed=True, overlap=True
    ),
    "tp, cp, dp": Case(ParallelLayout(tensor=2, context=2, data=2, sequence=True), LLAMA, is_distributed=True, overlap=True),
    "tp, pp, ep": Case(
        ParallelLayout(tensor=2, pipeline=2, data=2, virtual_pipeline=2, expert=2, sequence=True),
        EXPERTS,
        is_distributed=True,
        recompute="selective",
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_tiny_model(kind, tmp_path_factory.mktemp(name), num_hidden_layers=num_layers)
        for name, (kind, num_layers, _) in MODELS.items()
    }


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with running(ParallelLayout(), device="cpu", seed=1) as started:
        yield started


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world_size", "cases"), [(4, CASES), (8, CASES_OF_8)], ids=["4 ranks", "8 ranks"])
def test_loss_and_gradient_norm_equal_one_process_on_every_layout(models: dict[str, Path], world_size: int, cases: dict[str, Case]) -> None:
    subjects = {name: Subject(models[name], replace(rule, epsilon=LAYOUT_EPSILON)) for name, (_, _, rule) in MODELS.items()}
    assert_layouts_agree(subjects, cases, world_size=world_size)


def test_one_big_micro_batch_gives_the_loss_and_gradients_of_many_small_ones(models: dict[str, Path], runtime: Runtime) -> None:
    found = []
    for pack_tokens in (96, 2048):
        packed = packed_pairs(pack_tokens=pack_tokens, num_pairs=8)
        bench = make_bench(models["llama2"], RMSPROP, runtime, packed=packed)
        # Moved references: at margin 0 every pair has the same weight, which would hide a wrong one.
        references = {
            pair_id: replace(score, logp_real=score.logp_real + 3.0 * number)
            for number, (pair_id, score) in enumerate(sorted(bench.references.items()))
        }
        objective = Objective("logistic", beta=0.5, nll_weight=0.3)
        outcome = train_step(
            bench.trainer, bench.batches(packed.packs), references, objective, runtime, num_pairs=8, learning_rate=LEARNING_RATE
        )
        gradients = {name: parameter.main_grad.clone() for name, parameter in bench.trainer.chunks[0].module.named_parameters()}
        found.append((len(packed.packs), outcome.metrics["loss"], gradients))
    (many, loss, gradients), (one, big_loss, big_gradients) = found
    assert many > 1
    assert one == 1
    assert loss == pytest.approx(big_loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, big_gradients[name], rtol=1e-4, atol=1e-6)


def test_rmsprop_is_the_papers_formula(models: dict[str, Path], runtime: Runtime) -> None:
    bench = make_bench(models["llama2"], RMSPROP, runtime)
    parameters = dict(bench.trainer.chunks[0].module.named_parameters())
    weights = {name: parameter.detach().double() for name, parameter in parameters.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for number in range(NUM_STEPS):
        make_steps(bench, [number])
        for name, parameter in parameters.items():
            gradient = parameter.main_grad.double()
            squares[name] = 0.99 * squares[name] + 0.01 * gradient**2
            weights[name] = weights[name] - LEARNING_RATE * gradient / (squares[name].sqrt() + 1e-8)
            # float64 by hand against fp32 weights of order 1.
            torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=1e-6, atol=1e-6)


def test_adamw_is_that_of_torch_in_float64(models: dict[str, Path], runtime: Runtime) -> None:
    bench = make_bench(models["llama2"], UpdateRule("adamw", weight_decay=0.1), runtime)
    parameters = dict(bench.trainer.chunks[0].module.named_parameters())
    twins = {name: torch.nn.Parameter(parameter.detach().double()) for name, parameter in parameters.items()}
    groups: list[dict] = [{"params": [twin for twin in twins.values() if twin.dim() > 1], "weight_decay": 0.1}]
    groups.append({"params": [twin for twin in twins.values() if twin.dim() == 1], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    for number in range(NUM_STEPS):
        make_steps(bench, [number])
        for name, parameter in parameters.items():
            twins[name].grad = parameter.main_grad.double()
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach().double(), twins[name].detach(), rtol=1e-6, atol=1e-6)


def test_weight_decay_shrinks_matrices_and_leaves_norms_and_biases(tmp_path: Path, runtime: Runtime) -> None:
    bench = make_bench(make_tiny_model("qwen2_tied", tmp_path), UpdateRule("adamw", weight_decay=0.5), runtime)
    parameters = dict(bench.trainer.chunks[0].module.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    clear_gradients(bench.trainer)  # without gradients only the decay is left: w <- w (1 - lr * decay) = 0.95 w
    assert apply_gradients(bench.trainer, learning_rate=0.1).grad_norm == 0.0
    for name, parameter in parameters.items():
        factor = 0.95 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_clipping_scales_the_gradients_to_the_norm_asked_for(models: dict[str, Path], runtime: Runtime) -> None:
    bench = make_bench(models["llama2"], UpdateRule("rmsprop", max_grad_norm=0.01), runtime)
    (outcome,) = make_steps(bench, [0])
    assert outcome.grad_norm > 1.0, "what is reported is the norm before clipping"
    squares = sum(float(slot.main.grad.double().square().sum()) for slot in slots(bench.trainer.optimizer))
    assert math.sqrt(squares) == pytest.approx(0.01, rel=1e-4)


def test_bf16_weights_are_the_rounding_of_fp32_main_parameters_that_keep_small_updates(models: dict[str, Path], runtime: Runtime) -> None:
    bench = make_bench(models["llama2"], RMSPROP, runtime, dtype=torch.bfloat16)
    outcomes = make_steps(bench, range(2))
    assert all(outcome.is_applied for outcome in outcomes)
    assert outcomes[0].metrics["margin_abs"] == 0.0
    has_more_digits = False
    for parameter in bench.trainer.chunks[0].module.parameters():
        assert parameter.main_grad.dtype == torch.float32
        assert torch.equal(parameter.detach(), parameter.main_param.bfloat16())
        has_more_digits |= not torch.equal(parameter.detach().float(), parameter.main_param)
    assert has_more_digits


def _bench_and_bits(folder: Path, runtime: Runtime) -> tuple[Bench, dict[str, str]]:
    bench = make_bench(folder, ADAMW, runtime)
    return bench, weight_bits(bench.trainer)


def test_a_loss_that_is_not_finite_skips_the_step_and_names_the_pairs(models: dict[str, Path], runtime: Runtime) -> None:
    bench, before = _bench_and_bits(models["llama2"], runtime)
    broken = bench.packed.packs[5].pair_ids[0]
    bench.references[broken] = replace(bench.references[broken], logp_real=math.nan)
    (outcome,) = make_steps(bench, [1])
    assert not outcome.is_applied
    assert set(outcome.suspects) == set(bench.packed.packs[5].pair_ids)
    assert weight_bits(bench.trainer) == before
    assert make_steps(bench, [2])[0].is_applied, "the next step is made"
    assert weight_bits(bench.trainer) != before


def test_a_gradient_that_is_not_finite_skips_the_step(models: dict[str, Path], runtime: Runtime) -> None:
    bench, before = _bench_and_bits(models["llama2"], runtime)
    hook = bench.trainer.chunks[0].module.decoder.final_layernorm.weight.register_hook(lambda gradient: gradient * math.inf)
    (outcome,) = make_steps(bench, [0])
    assert math.isfinite(outcome.metrics["loss"])
    assert not outcome.is_applied
    assert weight_bits(bench.trainer) == before
    hook.remove()
    assert make_steps(bench, [1])[0].is_applied


def test_a_reference_that_is_off_by_a_thousandth_of_a_nat_stops_the_first_update(models: dict[str, Path], runtime: Runtime) -> None:
    bench, before = _bench_and_bits(models["llama2"], runtime)
    moved = bench.packed.packs[0].pair_ids[0]
    bench.references[moved] = replace(bench.references[moved], logp_generated=bench.references[moved].logp_generated + 1e-3)
    with pytest.raises(ValueError, match=r"expected exactly 0.*reference cache was made by other weights"):
        make_steps(bench, [0])
    assert weight_bits(bench.trainer) == before
