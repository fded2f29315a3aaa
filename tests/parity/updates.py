"""What tests of updates share: a tiny model in training on a few fixed steps, and layouts held to one process."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

from spin_megatron.data.batches import pair_tokens
from spin_megatron.data.packing import plan_packs
from spin_megatron.mcore.lora import Lora, add_adapters
from spin_megatron.mcore.model import Recompute, build_model, load_huggingface
from spin_megatron.mcore.optimizer import Trainer, UpdateRule, build_trainer, gather_weights
from spin_megatron.mcore.reference import PackedPairs, score_pairs
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.mcore.training import Judge, Objective, StepOutcome, train_step
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.run.records import Pack, ReferenceScore
from tests.parity.gloo import meeting_ports, run_ranks
from tests.parity.tiny_models import make_pairs

PACK_TOKENS = 96
PACKS_PER_STEP = 4  # divides among 1, 2 and 4 data-parallel ranks
LEARNING_RATE = 1e-3
NUM_STEPS = 3


@dataclass(frozen=True)
class Bench:
    """A model in training, its packs and the reference sums of theta_t."""

    runtime: Runtime
    trainer: Trainer
    packed: PackedPairs
    references: dict[str, ReferenceScore]

    def batches(self, packs: Sequence[Pack]) -> list:
        return [self.packed.batch(pack) for pack in self.packed.share_of(packs, self.runtime.layout.data, self.runtime.data_rank)]


def packed_pairs(*, pack_tokens: int = PACK_TOKENS, num_pairs: int = 40) -> PackedPairs:
    """The same pairs whatever the packs; every pack holds one pair at least."""
    pairs = make_pairs(1, num_pairs=num_pairs, longest=50)
    lengths = [(pair.pair_id, pair_tokens(pair, share_prompt=True)) for pair in pairs]
    packs = plan_packs(lengths, pack_tokens=pack_tokens, max_pairs_per_pack=None, seed=0)
    return PackedPairs({pair.pair_id: pair for pair in pairs}, tuple(packs), pack_tokens, share_prompt=True)


def make_bench(
    folder: Path,
    rule: UpdateRule,
    runtime: Runtime,
    *,
    dtype: torch.dtype = torch.float32,
    packed: PackedPairs | None = None,
    overlap: bool = False,
    lora: Lora | None = None,
    recompute: Recompute = "none",
    recompute_layers: int | None = None,
) -> Bench:
    """Load the model, score the reference and build the optimizer."""
    shape = ModelShape.from_huggingface(folder)
    chunks = build_model(shape, runtime, dtype=dtype, recompute=recompute, recompute_layers=recompute_layers)
    load_huggingface(chunks, folder, shape, runtime, show=False)
    if lora is not None:
        add_adapters(chunks, lora, runtime)
    packed = packed or packed_pairs()
    steps = [packed.packs[start : start + PACKS_PER_STEP] for start in range(0, len(packed.packs), PACKS_PER_STEP)]
    scores: list = [score_pairs(chunks, packed, steps, runtime)]
    torch.distributed.broadcast_object_list(scores, src=0)
    # Small enough that the head of a tiny model has a bucket of its own, as a real one has.
    trainer = build_trainer(chunks, rule, overlap=overlap, bucket_elements=8_000 if overlap else None)
    return Bench(runtime, trainer, packed, {score.pair_id: score for score in scores[0]})


def load_weights(folder: Path, chunks: Sequence[nn.Module]) -> None:
    """Fill bare chunks with a checkpoint's weights as Megatron Core alone reads them, under its own model's keys. Collective."""
    wanted = {
        f"model{index}": {name: value for name, value in chunk.sharded_state_dict().items() if not isinstance(value, ShardedObject)}
        for index, chunk in enumerate(chunks)
    }
    loaded = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        assert not unexpected
        assert dict(chunk.named_parameters()).keys().isdisjoint(missing)


def make_steps(
    bench: Bench, numbers: Sequence[int], *, objective: Objective | None = None, judge: Judge | None = None
) -> list[StepOutcome]:
    """Updates number 0, 1, ..., each on the next PACKS_PER_STEP packs."""
    outcomes = []
    for number in numbers:
        packs = bench.packed.packs[number * PACKS_PER_STEP : (number + 1) * PACKS_PER_STEP]
        assert len(packs) == PACKS_PER_STEP
        outcome = train_step(
            bench.trainer,
            bench.batches(packs),
            bench.references,
            objective or Objective("logistic", beta=0.1),
            bench.runtime,
            num_pairs=sum(len(pack.pair_ids) for pack in packs),
            learning_rate=LEARNING_RATE,
            must_start_at_zero=number == 0,
            judge=judge,
        )
        outcomes.append(outcome)
    return outcomes


def numbers_of(outcomes: Sequence[StepOutcome]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    return [(outcome.metrics["loss"], outcome.grad_norm) for outcome in outcomes]


def weight_bits(trainer: Trainer) -> dict[str, str]:
    """A digest of each of this rank's parameters. Collective."""
    gather_weights(trainer)
    return {
        f"{index}.{name}": hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for index, chunk in enumerate(trainer.chunks)
        for name, parameter in chunk.module.named_parameters()
    }


@dataclass(frozen=True)
class Subject:
    """What is trained on every layout."""

    folder: Path
    rule: UpdateRule
    lora: Lora | None = None


@dataclass(frozen=True)
class Case:
    """A layout, how it is run, and the names of the subjects it is tried on."""

    layout: ParallelLayout
    names: tuple[str, ...]
    is_distributed: bool = False
    overlap: bool = False
    recompute: Recompute = "none"
    recompute_layers: int | None = None


def _updates(subject: Subject, case: Case, runtime: Runtime) -> list[tuple[float, float]]:
    rule = replace(subject.rule, is_distributed=case.is_distributed)
    again = {"recompute": case.recompute, "recompute_layers": case.recompute_layers}
    bench = make_bench(subject.folder, rule, runtime, overlap=case.overlap, lora=subject.lora, **again)
    return numbers_of(make_steps(bench, range(NUM_STEPS)))


def _on_all_layouts(
    subjects: dict[str, Subject], cases: dict[str, Case], ports: list[int]
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    found = {}
    for (title, case), port in zip(cases.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with running(case.layout, device="cpu", seed=1) as runtime:
            for name in case.names:
                found[title, name] = _updates(subjects[name], case, runtime)
    return found


def assert_layouts_agree(subjects: Mapping[str, Subject], cases: Mapping[str, Case], *, world_size: int = 4) -> None:
    """Loss and gradient norm of every update are one process's within 1e-5, and all ranks say the same.

    One set of processes runs all cases. Margins of the first update are exactly 0 besides (train_step).
    """
    expected = {}
    with running(ParallelLayout(), device="cpu", seed=1) as runtime:
        for name in {name for case in cases.values() for name in case.names}:
            expected[name] = _updates(subjects[name], Case(ParallelLayout(), (name,)), runtime)
    with meeting_ports(len(cases)) as ports:
        results = run_ranks(_on_all_layouts, world_size, dict(subjects), dict(cases), ports, timeout=500)
    assert all(result == results[0] for result in results), "all ranks are told the same numbers"
    for (title, name), steps in results[0].items():
        # Summed in another order: 1e-7 a step.
        for number, (found, wanted) in enumerate(zip(steps, expected[name], strict=True)):
            assert found == pytest.approx(wanted, rel=1e-5), f"{title}, {name}, step {number}: {found}, one process has {wanted}"
