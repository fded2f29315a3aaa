"""Every layout of a model on a number of GPUs: which fit and how fast each is, which do not and why.

A layout is refused when it does not divide the model or the GPUs, when an update would hold far more pairs than asked for, or
when a rank's memory does not fit. The rest are ranked by pairs trained a second.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from spin_megatron.plan.duration import Batch, Workload, plan_batch, with_workload
from spin_megatron.plan.hardware import GIGA, Gpu
from spin_megatron.plan.memory import USABLE_SHARE, RankMemory, Recompute, TrainSettings, rank_memory
from spin_megatron.plan.precision import check_precision
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.plan.speed import StepTime, head_time, layer_time, step_time

# From fastest to smallest: the first that fits is the fastest that fits.
RECOMPUTE_ORDER: tuple[Recompute, ...] = ("none", "selective", "full")
# An update may hold this many times the pairs of train.global_batch_pairs before the layout is refused: it would be another recipe.
MAX_BATCH_GROWTH = 1.25
# Context ranks are tried where each keeps so many tokens of a pack: of shorter packs data ranks take whole ones, and exchange nothing.
MIN_CONTEXT_TOKENS = 4096
# Uneven stages are proposed where they are this much faster than equal ones: a list of numbers in a config is to be worth reading.
MIN_SPLIT_GAIN = 1.01


@dataclass(frozen=True)
class Question:
    """What is to be trained: everything but the layout. settings: micro_batches and lengths in it are taken from workload."""

    shape: ModelShape
    gpu: Gpu
    settings: TrainSettings
    workload: Workload
    global_batch_pairs: int
    share_prompt: bool


@dataclass(frozen=True)
class Candidate:
    """A layout that fits. memory: of the pipeline rank that needs most."""

    layout: ParallelLayout
    settings: TrainSettings
    batch: Batch
    memory: RankMemory
    step: StepTime

    @property
    def pairs_per_second(self) -> float:
        return self.batch.pairs_per_step / self.step.total


@dataclass(frozen=True)
class Refusal:
    """A layout that was refused: why, in a word for programs and in a sentence for a person."""

    layout: ParallelLayout
    kind: Literal["shape", "batch", "memory"]
    reason: str


@dataclass(frozen=True)
class Search:
    """candidates: fastest first."""

    candidates: list[Candidate]
    refusals: list[Refusal]


def search(question: Question, num_gpus: int, *, recompute: Recompute | None = None) -> Search:
    """Try every layout of the GPUs.

    Args:
        recompute: only this mode; None: the fastest that fits.

    Raises:
        ValueError: num_gpus is not positive.
    """
    if num_gpus < 1:
        raise ValueError(f"--gpus {num_gpus} must be at least 1.")
    candidates: list[Candidate] = []
    refusals: list[Refusal] = []
    for layout in enumerate_layouts(question.shape, num_gpus, question.gpu, pack_tokens=question.settings.pack_tokens):
        outcome, *others = (try_layout(question, variant, recompute=recompute) for variant in stage_variants(question, layout))
        for other in others:
            if isinstance(other, Candidate) and _is_worth_a_split(other, outcome):
                outcome = other
        (candidates if isinstance(outcome, Candidate) else refusals).append(outcome)  # type: ignore[arg-type]
    candidates.sort(key=lambda candidate: (-candidate.pairs_per_second, candidate.memory.total))
    return Search(candidates, refusals)


def _is_worth_a_split(uneven: Candidate, even: Candidate | Refusal) -> bool:
    return isinstance(even, Refusal) or uneven.pairs_per_second > MIN_SPLIT_GAIN * even.pairs_per_second


def enumerate_layouts(shape: ModelShape, num_gpus: int, gpu: Gpu, *, pack_tokens: int) -> Iterator[ParallelLayout]:
    """Layouts whose ranks are num_gpus: tensor ranks within a server, stages of at least a layer, context ranks of long packs, data
    ranks for the rest.

    Sequence parallelism goes with tensor parallelism: it moves as many bytes and stores fewer. Virtual stages: the divisors of a rank's
    layers.
    """
    for tensor in _divisors(num_gpus):
        if tensor > min(gpu.gpus_per_node, shape.num_heads):
            continue
        for pipeline in _divisors(num_gpus // tensor):
            if pipeline > shape.num_layers:
                continue
            copies = num_gpus // tensor // pipeline
            layers = shape.num_layers // pipeline
            virtual = _divisors(layers) if pipeline > 1 and shape.num_layers % pipeline == 0 else [1]
            experts = [1] if shape.num_experts is None else [n for n in _divisors(copies) if shape.num_experts % n == 0]
            contexts = [n for n in _divisors(copies) if n == 1 or pack_tokens >= n * MIN_CONTEXT_TOKENS]
            for context, virtual_pipeline, expert in itertools.product(contexts, virtual, experts):
                yield ParallelLayout(tensor, pipeline, copies // context, tensor > 1, context, expert, virtual_pipeline)


def stage_variants(question: Question, layout: ParallelLayout) -> Iterator[ParallelLayout]:
    """The layout with equal stages, where they divide the layers, and with stages that make up for the head, where those differ."""
    is_even = question.shape.num_layers % (layout.pipeline * layout.virtual_pipeline) == 0
    if is_even:
        yield layout
    if layout.pipeline == 1:
        return
    settings = with_workload(question.settings, question.workload, _batch(question, layout), share_prompt=question.share_prompt)
    head, layer = (time(question.shape, layout, settings, question.gpu).total for time in (head_time, layer_time))
    split = balanced_stages(question.shape.num_layers, layout, head_layers=head / layer)
    if not is_even or len(set(split)) > 1:
        yield replace(layout, stage_layers=split)


def balanced_stages(num_layers: int, layout: ParallelLayout, *, head_layers: float) -> tuple[int, ...]:
    """Layers of each stage that keep the slowest pipeline rank as fast as it can be (ParallelLayout.stage_layers).

    Args:
        num_layers: at least one a stage.
        head_layers: time of the head in units of a layer's; the last rank computes it besides its layers.
    """
    last, virtual = layout.pipeline - 1, layout.virtual_pipeline
    counts = [virtual] * layout.pipeline
    for _ in range(num_layers - layout.pipeline * virtual):
        # The least loaded rank; among equals the last, which holds fewer micro-batches' activations.
        rank = min(range(layout.pipeline), key=lambda rank: (counts[rank] + head_layers * (rank == last), -rank))
        counts[rank] += 1
    return tuple(count // virtual + (chunk < count % virtual) for chunk in range(virtual) for count in counts)


def try_layout(question: Question, layout: ParallelLayout, *, recompute: Recompute | None = None) -> Candidate | Refusal:
    """Check one layout; with its rates when it fits, with the reason when it does not."""
    try:
        layout.check_training(question.shape, question.settings.pack_tokens)
        check_precision(question.settings.precision, question.shape, layout, pack_tokens=question.settings.pack_tokens)
    except ValueError as error:
        return Refusal(layout, "shape", str(error))
    batch = _batch(question, layout)
    reason = _batch_reason(question, layout, batch)
    if reason is not None:
        return Refusal(layout, "batch", reason)
    settings = with_workload(question.settings, question.workload, batch, share_prompt=question.share_prompt)
    worst: RankMemory | None = None
    for mode in RECOMPUTE_ORDER if recompute is None else (recompute,):
        chosen = _with_recompute(settings, mode)
        worst = largest_rank(question.shape, layout, chosen)
        if worst.total <= usable_bytes(question.gpu):
            return Candidate(layout, chosen, batch, worst, step_time(question.shape, layout, chosen, question.gpu))
    assert worst is not None
    return Refusal(layout, "memory", memory_reason(worst, question.gpu, recompute or RECOMPUTE_ORDER[-1]))


def _with_recompute(settings: TrainSettings, mode: Recompute) -> TrainSettings:
    """The settings with a mode; train.recompute_layers belongs to the mode it was set with."""
    return replace(settings, recompute=mode, recompute_layers=settings.recompute_layers if mode == settings.recompute else None)


def _batch(question: Question, layout: ParallelLayout) -> Batch:
    return plan_batch(
        question.workload,
        pack_tokens=question.settings.pack_tokens,
        global_batch_pairs=question.global_batch_pairs,
        data_parallel=layout.data,
        share_prompt=question.share_prompt,
    )


def by_recompute(question: Question, candidate: Candidate) -> list[Candidate]:
    """A candidate's layout in every recompute mode, whether it fits in it or not."""
    found = []
    for mode in RECOMPUTE_ORDER:
        settings = _with_recompute(candidate.settings, mode)
        memory = largest_rank(question.shape, candidate.layout, settings)
        step = step_time(question.shape, candidate.layout, settings, question.gpu)
        found.append(replace(candidate, settings=settings, memory=memory, step=step))
    return found


def _batch_reason(question: Question, layout: ParallelLayout, batch: Batch) -> str | None:
    if batch.pairs_per_step > MAX_BATCH_GROWTH * question.global_batch_pairs and batch.micro_batches == 1 and layout.data > 1:
        return (
            f"parallel.data={layout.data} packs of {batch.pairs_per_pack:.1f} pairs make {batch.pairs_per_step:.0f} pairs an update, "
            f"train.global_batch_pairs={question.global_batch_pairs} was asked for; raise it, lower train.pack_tokens or parallel.data."
        )
    return None


def largest_rank(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings) -> RankMemory:
    """The pipeline rank that needs most memory."""
    # Of equal stages it is the first, the second (like all inner ones, with more in flight) or the last.
    ranks = range(layout.pipeline) if layout.stage_layers else sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})
    return max((rank_memory(shape, layout, settings, rank) for rank in ranks), key=lambda memory: memory.total)


def usable_bytes(gpu: Gpu) -> float:
    """What a rank may need: the GPU's memory less the margin for what the model of memory does not know."""
    return USABLE_SHARE * gpu.memory_bytes


def memory_reason(memory: RankMemory, gpu: Gpu, recompute: Recompute) -> str:
    """Why a layout does not fit, with the largest parts."""
    state = memory.state
    return (
        f"pipeline rank {memory.pipeline_rank} needs {memory.total / GIGA:.1f} GB (weights {state.weights / GIGA:.1f}, "
        f"gradients {state.gradients / GIGA:.1f}, optimizer {state.optimizer / GIGA:.1f}, activations {memory.activations / GIGA:.1f} "
        f"with train.recompute={recompute}, rest {(memory.total - state.total - memory.activations) / GIGA:.1f}), "
        f"{gpu.name} has {usable_bytes(gpu) / GIGA:.1f} GB to use"
    )


def check_fits(question: Question, layout: ParallelLayout, recompute: Recompute) -> Candidate:
    """The layout's candidate.

    Raises:
        ValueError: the layout cannot run or does not fit. The message says why and names a layout of the same GPUs that fits.
    """
    outcome = try_layout(question, layout, recompute=recompute)
    if isinstance(outcome, Candidate):
        return outcome
    found = search(question, layout.world_size).candidates
    if found:
        cure = f"on {layout.world_size} GPUs this fits: {describe(found[0])}."
    else:
        cure = f"no layout of {layout.world_size} GPUs fits; use more or larger GPUs, or a smaller train.pack_tokens"
        with_offload = best_with_offload(question, layout.world_size)
        cure += "." if with_offload is None else f", or optimizer.offload_fraction=1, with which this fits: {describe(with_offload)}."
    raise ValueError(f"[parallel] {_fields(layout)}: {outcome.reason.rstrip('.')}; {cure}")


def best_with_offload(question: Question, num_gpus: int) -> Candidate | None:
    """The fastest layout with the optimizer in the host's memory; None where none fits, or where it is there or cannot be."""
    settings = question.settings
    if settings.offload_fraction or settings.precision == "fp32" or settings.adapters is not None or not settings.distributed_optimizer:
        return None
    return next(iter(search(replace(question, settings=replace(settings, offload_fraction=1.0)), num_gpus).candidates), None)


def describe(candidate: Candidate) -> str:
    """A candidate as the config fields that ask for it."""
    settings = candidate.settings
    layers = "" if settings.recompute_layers is None else f" train.recompute_layers={settings.recompute_layers}"
    return f"{_fields(candidate.layout)} train.recompute={settings.recompute}{layers}"


def _fields(layout: ParallelLayout) -> str:
    fields = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "data": layout.data,
        "virtual_pipeline": layout.virtual_pipeline,
        "expert": layout.expert,
        "context": layout.context,
    }
    shown = [f"{name}={value}" for name, value in fields.items() if value > 1 or name in ("tensor", "pipeline", "data")]
    split = [f"stage_layers=[{','.join(map(str, layout.stage_layers))}]"] if layout.stage_layers else []
    return " ".join([*shown, f"sequence={str(layout.sequence).lower()}", *split])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
