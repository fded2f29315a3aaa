"""A step that one rank finds fault with is left out on all ranks: two pipeline stages, two data-parallel copies, shared optimizer state."""

import math
from dataclasses import replace
from pathlib import Path

from spin_megatron.mcore.optimizer import UpdateRule
from spin_megatron.mcore.runtime import running
from spin_megatron.plan.shape import ParallelLayout
from tests.parity.gloo import run_ranks
from tests.parity.tiny_models import make_tiny_model
from tests.parity.updates import PACKS_PER_STEP, make_bench, make_steps, weight_bits


def _steps(folder: Path) -> list[tuple[bool, bool]]:
    """(the update was made, a weight of this rank changed) of a step with one NaN reference, one that rank 0 refuses, one without fault."""
    found = []
    with running(ParallelLayout(pipeline=2, data=2), device="cpu", seed=1) as runtime:
        bench = make_bench(folder, UpdateRule("rmsprop", is_distributed=True), runtime)
        broken = bench.packed.packs[PACKS_PER_STEP].pair_ids[0]
        whole = bench.references[broken]
        for reference, refuses in ((replace(whole, logp_real=math.nan), False), (whole, True), (whole, False)):
            bench.references[broken] = reference
            before = weight_bits(bench.trainer)
            # Other ranks' judges would say the opposite.
            (outcome,) = make_steps(bench, [1], judge=lambda _metrics, _norm, refuses=refuses: refuses == (runtime.rank != 0))
            found.append((outcome.is_applied, weight_bits(bench.trainer) != before))
    return found


def test_all_ranks_leave_out_what_one_of_them_finds_fault_with(tmp_path: Path) -> None:
    folder = make_tiny_model("llama2", tmp_path)
    assert run_ranks(_steps, 4, folder, timeout=120) == [[(False, False), (False, False), (True, True)]] * 4
