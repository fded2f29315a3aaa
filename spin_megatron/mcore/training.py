"""One update of SPIN: forward and backward over a step's packs, the loss against cached reference sums, one optimizer step.

The step's loss is sum over all pairs of the step / number of these pairs, whatever micro-batches and ranks they were dealt
to. Megatron Core's schedules divide each micro-batch's loss by their number and its data-parallel wrapper averages gradients
over ranks; both are undone in the loss's divisor. A loss or a gradient that is not finite leaves weights and optimizer
state untouched on every rank.

Shapes: R rows of a pack, P pairs of a pack, K metrics of `objective.spin_loss.METRIC_NAMES`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spin_megatron.data.batches import PackBatch
from spin_megatron.mcore.optimizer import Trainer, apply_gradients, clear_gradients
from spin_megatron.mcore.runtime import Runtime
from spin_megatron.mcore.steps import fill_schedule, forward_step, run_schedule
from spin_megatron.objective.logprobs import sequence_sums
from spin_megatron.objective.spin_loss import METRIC_NAMES, LossName, loss_at_zero, mean_metrics, metrics_vector, spin_loss
from spin_megatron.run.records import ReferenceScore

# Whether an update may be made, from the step's metrics and gradient norm.
Judge = Callable[[Mapping[str, float], float], bool]


@dataclass(frozen=True)
class Objective:
    """The loss and its settings; see objective.spin_loss.spin_loss."""

    loss: LossName
    beta: float
    nll_weight: float = 0.0
    length_normalised: bool = False


@dataclass(frozen=True)
class StepOutcome:
    """What one step did. The same on all ranks but for suspects.

    metrics: means over the step's pairs (METRIC_NAMES).
    is_applied: False when loss or gradients were not finite, or the judge refused the update.
    suspects: pair ids of this rank's packs whose loss was not finite; empty where it was, and on ranks without losses.
    """

    metrics: dict[str, float]
    grad_norm: float
    is_applied: bool
    suspects: tuple[str, ...] = ()


def train_step(
    trainer: Trainer,
    batches: Sequence[PackBatch],
    references: Mapping[str, ReferenceScore],
    objective: Objective,
    runtime: Runtime,
    *,
    num_pairs: int,
    learning_rate: float,
    must_start_at_zero: bool = False,
    judge: Judge | None = None,
) -> StepOutcome:
    """Make one update. Collective over all ranks.

    Args:
        batches: this data-parallel rank's packs; every rank has the same number (PackedPairs.share_of).
        references: pair_id -> log-prob sums under theta_t, for the pairs of these packs at least.
        num_pairs: pairs of the step on all ranks.
        must_start_at_zero: no update of this iteration was made yet: check, before the weights change, that theta is theta_t.
        judge: given on all ranks or on none; rank 0's is asked whether the update may be made, and all ranks follow.

    Raises:
        ValueError: with must_start_at_zero, when a margin is not exactly 0 or the loss is not l(0).
    """
    batches = fill_schedule(batches, runtime)
    divisor = num_pairs / (len(batches) * runtime.layout.data)
    # Copied to the device here, once: a copy a micro-batch would make the host wait for each of them.
    sums_P2 = torch.cat([reference_sums(batch, references) for batch in batches]).to(runtime.device)
    reference_of = dict(zip((batch.pair_ids for batch in batches), sums_P2.split([len(batch.pair_ids) for batch in batches]), strict=True))

    def finish(batch: PackBatch, logp_R: Tensor) -> tuple[Tensor, Tensor]:
        logp_P2 = sequence_sums(logp_R, batch.lengths_Q).view(-1, 2)
        output = spin_loss(
            logp_P2,
            reference_of[batch.pair_ids],
            loss=objective.loss,
            beta=objective.beta,
            divisor=divisor,
            lengths_P2=batch.lengths_Q.view(-1, 2),
            length_normalised=objective.length_normalised,
            nll_weight=objective.nll_weight,
        )
        return output.loss, metrics_vector(output.metrics)

    clear_gradients(trainer)
    by_pack: list[Tensor] = run_schedule(forward_step(finish), trainer.chunks, batches, runtime, forward_only=False)
    metrics = mean_metrics(sum_over_packs(by_pack, runtime))
    if not math.isfinite(metrics["loss"]):
        return StepOutcome(metrics, math.nan, is_applied=False, suspects=_suspects(batches, by_pack))
    if must_start_at_zero:
        check_start(metrics, objective)

    def is_allowed(grad_norm: float) -> bool:
        assert judge is not None
        return agreed_by_first_rank(runtime.rank != 0 or judge(metrics, grad_norm), runtime)

    update = apply_gradients(trainer, learning_rate=learning_rate, is_allowed=is_allowed if judge else None)
    return StepOutcome(metrics, update.grad_norm, update.is_applied)


def reference_sums(batch: PackBatch, references: Mapping[str, ReferenceScore]) -> Tensor:
    """[P, 2] fp32 reference log-prob sums of a pack's pairs: real, generated."""
    rows = [(references[pair_id].logp_real, references[pair_id].logp_generated) for pair_id in batch.pair_ids]
    return torch.tensor(rows, dtype=torch.float32).view(-1, 2)


def sum_over_packs(by_pack: Sequence[Tensor], runtime: Runtime) -> Tensor:
    """Total of the packs' metric sums over all data-parallel ranks: [K] fp64 on the CPU, the same on all ranks. Collective."""
    totals_K = torch.zeros(len(METRIC_NAMES), dtype=torch.float64, device=runtime.device)
    if runtime.is_loss_rank:  # the other ranks of the last stage hold the same numbers, the other stages none
        for metrics_K in by_pack:
            totals_K += metrics_K
    dist.all_reduce(totals_K)
    return totals_K.cpu()


def check_start(metrics: Mapping[str, float], objective: Objective) -> None:
    """Before the first update theta is theta_t: every margin must be exactly 0, and the SPIN loss l(0).

    Raises:
        ValueError: they are not.
    """
    at_zero = loss_at_zero(objective.loss)
    # All losses are the same fp32 number, so their mean differs from l(0) by that number's rounding only.
    if metrics["margin_abs"] == 0.0 and math.isclose(metrics["spin_loss"], at_zero, rel_tol=1e-6):
        return
    raise ValueError(
        f"before the first update the mean |margin| is {metrics['margin_abs']:.3g} nats (expected exactly 0) and the loss "
        f"{metrics['spin_loss']:.7g} (expected {at_zero:.7g}): the cached reference log-probs are not those of the model in training. "
        "Likely causes: the reference cache was made by other weights, packs, precision, library versions or hardware (remove the "
        "train stage's reference folder and run again), or a kernel that gives other bits in each run (set "
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 and CUBLAS_WORKSPACE_CONFIG=:4096:8; with more than two experts a token, install "
        "Transformer Engine, which sums them in one order). No update was made."
    )


def agreed_by_first_rank(answer: bool, runtime: Runtime) -> bool:
    """Rank 0's answer, on every rank. Collective."""
    flag = torch.tensor([int(answer)], dtype=torch.int32, device=runtime.device)
    dist.broadcast(flag, src=0)
    return bool(flag.item())


def _suspects(batches: Sequence[PackBatch], by_pack: Sequence[Any]) -> tuple[str, ...]:
    loss = METRIC_NAMES.index("loss")
    failed = (batch for batch, metrics_K in zip(batches, by_pack, strict=False) if not math.isfinite(metrics_K[loss]))
    return tuple(pair_id for batch in failed for pair_id in batch.pair_ids)
