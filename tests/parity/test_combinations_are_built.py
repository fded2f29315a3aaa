"""What the rules of tests/unit/combinations.py call legal, the trainer builds: model, adapters, optimizer, an update of nothing.

On the CPU; that losses and gradients are right is shown by layout in test_training.py, test_lora.py and test_offload.py.
"""

import pytest
import torch

from spin_megatron.mcore.lora import Lora, add_adapters
from spin_megatron.mcore.model import build_model
from spin_megatron.mcore.optimizer import UpdateRule, apply_gradients, build_trainer, clear_gradients
from spin_megatron.plan.adapters import AdapterShape
from spin_megatron.plan.shape import ParallelLayout
from tests.parity.fake_ranks import fake_rank
from tests.parity.offloading import a_gpu_and_a_host
from tests.unit.combinations import SHAPES, VALUES, Settings, drawn, faults, overrides


def layout_of(settings: Settings) -> ParallelLayout:
    names = ("tensor", "pipeline", "data", "sequence", "context", "expert", "virtual_pipeline", "stage_layers")
    return ParallelLayout(**{name: settings[f"parallel.{name}"] for name in names})


def sample() -> list[Settings]:
    """Of combinations that `check` takes and a CPU computes, those with a setting that none before them had, on two ranks and more."""
    chosen, seen = [], set()
    for settings in drawn(20_000, seed=1):
        is_fp8 = settings["train.precision"].startswith(("fp8", "mxfp8"))
        if faults(settings) or is_fp8 or layout_of(settings).world_size == 1 or set(settings.items()) <= seen:
            continue
        chosen.append(settings)
        seen |= set(settings.items())
    return chosen


SAMPLE = sample()


def test_the_sample_holds_every_value_that_can_be_built_here() -> None:
    missing = {item for item in everything() if not any(item in settings.items() for settings in SAMPLE)}
    never = {
        ("parallel.tensor", 3),
        ("parallel.pipeline", 3),
        ("parallel.expert", 3),
        ("lora.dropout", 0.1),
        ("generate.engine", "mistyped"),
    }
    only_fp8 = {("train.num_bf16_end_layers", count) for count in (1, 5)}
    assert missing == never | only_fp8 | {("train.precision", name) for name in ("fp8-blockwise", "fp8-tensorwise", "mxfp8", "fp8-delayed")}


def everything() -> set[tuple[str, object]]:
    return {(name, value) for name, values in VALUES.items() for value in values}


@pytest.mark.parametrize("settings", SAMPLE, ids=lambda settings: " ".join(overrides(settings)[1:]))
def test_a_legal_combination_is_built_and_updated_on_its_first_and_last_rank(settings: Settings) -> None:
    layout, shape = layout_of(settings), SHAPES[settings["model"]]
    fraction, has_copies = settings["optimizer.offload_fraction"], layout.data * layout.context > 1
    rule = UpdateRule(
        settings["optimizer.name"],
        is_distributed=settings["train.distributed_optimizer"] and (has_copies or fraction > 0),
        offload_fraction=fraction,
    )
    dtype = torch.float32 if settings["train.precision"] == "fp32" else torch.bfloat16
    for rank in (0, layout.world_size - 1):
        with fake_rank(layout, rank, device="cpu") as runtime, a_gpu_and_a_host():
            chunks = build_model(shape, runtime, dtype=dtype, recompute=settings["train.recompute"])
            with torch.no_grad():
                for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                    parameter.fill_(0.5)
            if settings["lora.rank"]:
                add_adapters(chunks, Lora(AdapterShape(settings["lora.rank"], settings["lora.targets"]), 1.0, 0, 0), runtime)
            trainer = build_trainer(chunks, rule, overlap=settings["parallel.overlap"] == "on")
            layers = layout.layers_of_rank(shape.num_layers, runtime.pipeline_rank)
            assert sum(len(chunk.module.decoder.layers) for chunk in trainer.chunks) == layers
            clear_gradients(trainer)
            outcome = apply_gradients(trainer, learning_rate=1e-3)
            assert (outcome.grad_norm, outcome.is_applied) == (0.0, True)
