"""A micro-batch of training gives the host no reason to wait for an accelerator.

Without one, reads of tensors are caught where Python asks for them (item, tolist, bool, blocking copies to a device) and filed by the
function that asks. What a step reads once is fine; what grows with the number of packs would stop the stream each time. Allowed are
reads of what lives on the CPU in any case (branches, lengths) and checks that are made on the CPU only.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from spin_megatron.mcore import training
from spin_megatron.mcore.optimizer import UpdateRule
from spin_megatron.mcore.reference import score_pairs
from spin_megatron.mcore.runtime import running
from spin_megatron.mcore.training import Objective, train_step
from spin_megatron.plan.shape import ParallelLayout
from tests.parity.tiny_models import make_tiny_model
from tests.parity.updates import LEARNING_RATE, Bench, make_bench

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
ON_THE_CPU = {
    ("attention.py", "forward"),  # branches_B4.tolist(); variable-length kernels read the plan of varlen.py, made of branches_B4 too
    ("varlen.py", "get"),  # branches_B4, by which a pack's plans and tables are found
    ("rotary.py", "rotary_table"),  # branches_B4
    ("batches.py", "without_padding"),  # branches_B4, on the CPU only
    ("logprobs.py", "vocab_parallel_logprobs"),  # the range of the targets, checked on the CPU only
    ("logprobs.py", "sequence_sums"),  # the sum of the lengths, which live on the CPU
}


class HostReads(TorchFunctionMode):
    """Counts reads by (file, function)."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> "HostReads":
        super().__enter__()
        return self

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        to_device = name == "to" and any(isinstance(value, torch.device | str) for value in (*args[1:2], kwargs.get("device")))
        if name in READS or (to_device and not kwargs.get("non_blocking")):
            self.found[_asked_by()] += 1
        return func(*args, **kwargs)


def _asked_by() -> tuple[str, str]:
    frame = sys._getframe(2)
    while frame is not None and not any(part in frame.f_code.co_filename for part in ("spin_megatron/", "megatron/core/")):
        frame = frame.f_back
    return (Path(frame.f_code.co_filename).name, frame.f_code.co_name) if frame is not None else ("", "")


def reads_of_a_step(bench: Bench, num_packs: int, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Reads during the forward and backward passes of one step; the update after them is one a step."""
    packs, reads, run_schedule = bench.packed.packs[:num_packs], HostReads(), training.run_schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        with reads:
            return run_schedule(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_schedule", watched)
        train_step(
            bench.trainer,
            bench.batches(packs),
            bench.references,
            Objective("logistic", beta=0.1, nll_weight=0.1, length_normalised=True),
            bench.runtime,
            num_pairs=sum(len(pack.pair_ids) for pack in packs),
            learning_rate=LEARNING_RATE,
        )
    return reads.found


def test_the_reference_s_sums_are_read_once(tmp_path: Path) -> None:
    with running(ParallelLayout(), device="cpu", seed=1) as runtime:
        bench = make_bench(make_tiny_model("llama2", tmp_path), UpdateRule("adamw"), runtime)

        def reads(num_packs: int) -> Counter[tuple[str, str]]:
            with HostReads() as found:
                assert score_pairs(bench.trainer.chunks, bench.packed, [bench.packed.packs[:num_packs]], runtime)
            return found.found

        few, many = reads(2), reads(6)
        assert set(many - few) <= ON_THE_CPU
        assert few["reference.py", "_scores"] == 2  # the sums, and the lengths, which live on the CPU


def test_what_the_host_reads_does_not_grow_with_the_number_of_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(ParallelLayout(), device="cpu", seed=1) as runtime:
        bench = make_bench(make_tiny_model("llama2", tmp_path), UpdateRule("adamw", max_grad_norm=1.0), runtime)
        few, many = (reads_of_a_step(bench, number, monkeypatch) for number in (2, 6))
        assert set(many - few) <= ON_THE_CPU
        assert many["attention.py", "forward"] == 3 * few["attention.py", "forward"] > 0  # such reads are seen at all

        # A loss that looks at its value would be found.
        spin_loss = training.spin_loss

        def curious(*args: Any, **kwargs: Any) -> Any:
            output = spin_loss(*args, **kwargs)
            output.loss.item()
            return output

        monkeypatch.setattr(training, "spin_loss", curious)
        few, many = (reads_of_a_step(bench, number, monkeypatch) for number in (2, 6))
        assert set(many - few) - ON_THE_CPU == {("training.py", "finish")}
