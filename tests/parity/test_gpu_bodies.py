"""What tests/gpu does on a GPU, here on the CPU: fp32, and a slice of 70B that fits in 16 GiB."""

import json
import math
from pathlib import Path

import psutil
import pytest

from spin_megatron.plan.adapters import MODULES, AdapterShape
from tests.gpu import bodies
from tests.parity.tiny_models import make_tiny_model
from tests.parity.train_run import make_run


def test_training_starts_at_margins_of_exactly_zero_and_learns(tmp_path: Path) -> None:
    folder = make_tiny_model("llama3", tmp_path / "model", **bodies.ALIGNED)
    steps = bodies.train_from_zero(folder, "cpu", "fp32")
    # bf16 keeps 8 bits: a log-prob of a few nats moves by some hundredths.
    assert 1e-4 < bodies.rms_nats(bodies.train_from_zero(folder, "cpu", "bf16").references, steps.references) < 0.1
    assert steps.margins[0] == 0.0
    assert steps.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(steps.are_applied)
    assert steps.losses[-1] < steps.losses[0]


def test_a_killed_process_s_run_ends_with_the_same_losses(tmp_path: Path) -> None:
    layouts = [make_run(tmp_path / name, pack_tokens=bodies.PACK_TOKENS, num_pairs=80) for name in ("undisturbed", "killed")]
    bodies.run_train(layouts[0], "fp32")
    bodies.kill_and_resume(layouts[1], "fp32")
    losses = [[json.loads(line)["loss"] for line in layout.metrics(0).read_text(encoding="utf-8").splitlines()] for layout in layouts]
    assert len(losses[0]) > 4
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("ffn", "adapters"),
    [
        pytest.param(7168, None, id="all weights, a quarter of its FFN"),
        pytest.param(28672, AdapterShape(16, tuple(MODULES)), id="adapters beside whole layers"),
    ],
)
def test_two_layers_of_70b_make_a_step_in_the_planned_memory(ffn: int, adapters: AdapterShape | None) -> None:
    """Its width, heads and grouped keys, few words, fp32: 0.67 billion trained weights, or 1.7 billion frozen ones. -rP shows the bytes."""
    shape = bodies.wide_shape(ffn=ffn, vocab_size=1024)
    work = bodies.SliceWork(shape, "fp32", num_packs=1, pairs_per_pack=4, pack_tokens=144, num_steps=1, adapters=adapters)
    planned, free = work.planned_bytes("cpu"), psutil.virtual_memory().available
    if free < 1.2 * planned:
        pytest.skip(f"needs {1.2 * planned / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free")
    found = bodies.steps_of_a_slice(work, "cpu")
    print(f"{found.measured_bytes / 2**30:.2f} GiB measured, {planned / 2**30:.2f} GiB planned")
    assert found.steps.margins == [0.0]
    assert found.steps.are_applied == [True]
    assert found.steps.losses == [pytest.approx(math.log(2), abs=1e-6)]
    # B starts as 0: A has no gradient in the first step.
    trained = [name for name in found.changed | found.unchanged if adapters is None or name.endswith("lora_b")]
    assert found.changed == set(trained)
    assert len(trained) == (2 * 6 + 3 if adapters is None else 2 * 4)
    assert found.measured_bytes == pytest.approx(planned, rel=0.1)
