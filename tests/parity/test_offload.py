"""The optimizer's state in the host's memory: the same updates and the same checkpoints, wherever it lies. The GPU is a stand-in."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spin_megatron.data.progress import Progress
from spin_megatron.mcore.checkpoint import load_training, save_training
from spin_megatron.mcore.model import build_model
from spin_megatron.mcore.optimizer import UpdateRule, apply_gradients, build_trainer, clear_gradients, parts
from spin_megatron.mcore.optimizer_state import Slot, slots
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.plan.memory import TrainSettings, state_bytes
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from tests.gpu import bodies
from tests.parity.fake_ranks import fake_rank
from tests.parity.gloo import meeting_ports, run_ranks
from tests.parity.offloading import HostTensor, a_gpu_and_a_host
from tests.parity.tiny_models import make_tiny_model
from tests.parity.updates import Bench, make_bench, make_steps, numbers_of, weight_bits

RULES = {
    "adamw": UpdateRule("adamw", weight_decay=0.1, max_grad_norm=1.0, is_distributed=True),
    "rmsprop": UpdateRule("rmsprop", is_distributed=True),
}


def _bench(model: Path, name: str, fraction: float, runtime: Runtime) -> Bench:
    return make_bench(model, replace(RULES[name], offload_fraction=fraction), runtime, dtype=torch.bfloat16)


def assert_close(found: list[tuple[float, float]], expected: list[tuple[float, float]], *, rtol: float) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=rtol, atol=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama2", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", RULES)
def test_the_same_updates_are_made_wherever_the_state_lies(name: str, model: Path) -> None:
    found = {}
    for fraction in (0.0, 0.4, 1.0):
        with a_gpu_and_a_host():
            rule = replace(RULES[name], offload_fraction=fraction)
            found[fraction] = bodies.updates_of(model, "cpu", rule, lambda main: isinstance(main, HostTensor))
    assert [found[fraction].num_in_host for fraction in (0.0, 1.0)] == [0, found[1.0].num_elements]
    # Whole parameters are offloaded, until the share is reached.
    assert 0.4 * found[0.4].num_elements <= found[0.4].num_in_host < 0.4 * found[0.4].num_elements + found[0.4].largest
    for fraction in (0.4, 1.0):
        assert_close(found[fraction].numbers, found[0.0].numbers, rtol=1e-5)
        for main, expected in zip(found[fraction].mains, found[0.0].mains, strict=True):
            # torch's fused AdamW on the host sums in another order than its plain one; its RMSprop is the same.
            torch.testing.assert_close(main.as_subclass(torch.Tensor), expected, rtol=1e-6, atol=3e-8)


def _save_and_go_on(model: Path, root: Path, ports: list[int]) -> dict[str, tuple]:
    """Two updates, save, two more; then load elsewhere and make the last two again. On two ranks."""
    wholly, elsewhere = ParallelLayout(data=2), ParallelLayout(tensor=2)
    cases = [(name, layout, fraction) for name in RULES for layout, fraction in ((wholly, 1.0), (wholly, 0.0), (elsewhere, 0.5))]
    found = {}
    for (name, layout, fraction), port in zip(cases, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with running(layout, device="cpu", seed=1) as runtime, a_gpu_and_a_host():
            if (layout, fraction) == (wholly, 1.0):
                bench = _bench(model, name, fraction, runtime)
                make_steps(bench, (0, 1))
                save_training(root / name, bench.trainer, Progress(step=2, packs_consumed=8), runtime, recipe={}, keep=1)
                found[name, "undisturbed"] = numbers_of(make_steps(bench, (2, 3))), weight_bits(bench.trainer)
            bench = _bench(model, name, fraction, runtime)
            with torch.no_grad():
                for parameter in bench.trainer.chunks[0].parameters():
                    parameter.fill_(0.5)
            bench.trainer.optimizer.reload_model_params()
            load_training(root / name / "step_00000002", bench.trainer, runtime, recipe={})
            found[name, layout, fraction] = numbers_of(make_steps(bench, (2, 3))), weight_bits(bench.trainer)
    return found


@pytest.mark.timeout(200)
def test_a_checkpoint_is_resumed_bit_for_bit_and_goes_on_with_and_without_offload_at_any_layout(model: Path, tmp_path: Path) -> None:
    with meeting_ports(6) as ports:
        results = run_ranks(_save_and_go_on, 2, model, tmp_path, ports, timeout=180)
    for found in results:
        for name in RULES:
            numbers, bits = found[name, "undisturbed"]
            assert found[name, ParallelLayout(data=2), 1.0] == (numbers, bits)
            # Other kernels, and at tensor 2 other sums of bf16 products.
            assert_close(found[name, ParallelLayout(data=2), 0.0][0], numbers, rtol=1e-3)
            assert_close(found[name, ParallelLayout(tensor=2), 0.5][0], numbers, rtol=3e-2)


def _updates_with_and_without(model: Path, layouts: list[ParallelLayout], ports: list[int]) -> list[list[list[tuple[float, float]]]]:
    """By layout: loss and gradient norm of three updates with the state in the host's memory, and with it on the GPU."""
    found = []
    for layout, port, other in zip(layouts, ports[::2], ports[1::2], strict=True):
        pair = []
        for fraction, number in ((1.0, port), (0.0, other)):
            os.environ["MASTER_PORT"] = str(number)
            with running(layout, device="cpu", seed=1) as runtime, a_gpu_and_a_host():
                pair.append(numbers_of(make_steps(_bench(model, "adamw", fraction, runtime), (0, 1, 2))))
        found.append(pair)
    return found


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        (
            "llama2",
            [
                ParallelLayout(pipeline=2, virtual_pipeline=2),
                ParallelLayout(context=2),
                ParallelLayout(tensor=2, sequence=True),
            ],
        ),
        ("mixtral", [ParallelLayout(data=2, expert=2)]),
    ],
    ids=["virtual stages, context, sequence", "experts"],
)
def test_any_layout_updates_in_the_host_s_memory_as_on_the_gpu(name: str, layouts: list[ParallelLayout], tmp_path: Path) -> None:
    folder = make_tiny_model(name, tmp_path, num_hidden_layers=4)
    with meeting_ports(2 * len(layouts)) as ports:
        for by_layout in run_ranks(_updates_with_and_without, 2, folder, layouts, ports, timeout=180):
            for in_host, on_gpu in by_layout:
                assert_close(in_host, on_gpu, rtol=1e-5)


def test_a_cpu_has_nothing_to_offload_from(model: Path) -> None:
    with (
        running(ParallelLayout(), device="cpu", seed=1) as runtime,
        pytest.raises(ValueError, match=r"offload_fraction=1: on a CPU .* use 0"),
    ):
        _bench(model, "adamw", 1.0, runtime)


@pytest.mark.parametrize("name", RULES)
def test_what_is_planned_for_the_host_is_what_lies_there(name: str) -> None:
    layout, shape = ParallelLayout(data=2), ModelShape("qwen3", 2, 72, 88, 6, 2, 12, 257, 64, 1e-6, 1e4, qk_norm=True)
    settings = TrainSettings(64, 1, optimizer=RULES[name].name, offload_fraction=1.0)
    for rank in range(layout.data):
        with fake_rank(layout, rank, device="cpu") as runtime, a_gpu_and_a_host():
            chunks = build_model(shape, runtime, dtype=torch.bfloat16)
            for parameter in chunks[0].parameters():
                torch.nn.init.zeros_(parameter)
            trainer = build_trainer(chunks, replace(RULES[name], offload_fraction=1.0))
            clear_gradients(trainer)
            apply_gradients(trainer, learning_rate=1e-3)
            (hybrid,) = (part.optimizer for part in parts(trainer.optimizer))
            held = [tensor for slot in slots(trainer.optimizer) if slot.main is not None for tensor in _of(slot, RULES[name])]
            assert all(isinstance(tensor, HostTensor) for tensor in held)
            in_host = sum(tensor.nbytes for tensor in (*held, *hybrid.cpu_copy_map_grad.values()))
        planned = state_bytes(shape, layout, settings, 0, rank)
        assert (planned.host, planned.optimizer) == (in_host, 0)


def _of(slot: Slot, rule: UpdateRule) -> list[torch.Tensor]:
    return [slot.main, *(slot.inner.state[slot.main][name] for name in rule.state_names)]
