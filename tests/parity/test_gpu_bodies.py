"""What tests/gpu does on a GPU, here on the CPU: fp32, and a slice of 70B cut until it fits."""

import json
import math
from pathlib import Path

import pytest

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


def test_a_slice_of_70b_makes_a_step_in_the_planned_memory() -> None:
    """Its width and heads, one layer, a quarter of its FFN and few words: 4 GiB of weights, gradients and squares in fp32."""
    shape = bodies.wide_shape(num_layers=1, ffn=7168, vocab_size=1024)
    found = bodies.steps_of_a_slice(shape, "cpu", "fp32", num_packs=1, pairs_per_pack=3, pack_tokens=256, num_steps=1)
    measured, planned = found.measured_bytes, found.planned_bytes
    assert found.steps.margins == [0.0]
    assert found.steps.are_applied == [True]
    assert found.steps.losses == [pytest.approx(math.log(2), abs=1e-6)]
    assert measured < 8 * 2**30
    assert measured == pytest.approx(planned, rel=0.1), f"{measured / 2**30:.2f} GiB measured, {planned / 2**30:.2f} GiB planned"
