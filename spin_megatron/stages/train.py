"""train: theta_{t+1} from theta_t and the pairs, in two phases on the same modules.

1. Reference: every train and held-out pair is scored under theta_t, forward-only, with the packs, their order in the first epoch,
   the layout and the precision of phase 2; the sums are cached.
2. Updates: the SPIN loss against the cached sums, epoch after epoch over the frozen packs in a new order. Before the first
   update all margins must be exactly 0.

Resumes from the newest whole checkpoint; the order of packs, the learning rate and the optimizer's step count all follow
from `Progress`, so a killed run ends with the weights of an undisturbed one, bit for bit in fp32 at the same layout. Ends
with a weights-only checkpoint, which export reads, and the scores of a few probe pairs under it.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from spin_megatron.config import OPERATIONAL, PER_ITERATION, default_settings, flat_settings
from spin_megatron.data.progress import PlannedStep, Progress, StepPlan
from spin_megatron.data.schedule import Schedule
from spin_megatron.mcore import checkpoint
from spin_megatron.mcore.lora import Lora, add_adapters
from spin_megatron.mcore.model import SpinModel, build_model, load_huggingface
from spin_megatron.mcore.optimizer import Trainer, UpdateRule, build_trainer, gather_weights, overlaps
from spin_megatron.mcore.precision import Fp8
from spin_megatron.mcore.reference import PackedPairs, cached_scores, claim_cache, numerics, score_pairs
from spin_megatron.mcore.runtime import Runtime, default_device, running
from spin_megatron.mcore.training import Objective, StepOutcome, agreed_by_first_rank, train_step
from spin_megatron.objective.guard import Guard, Limits
from spin_megatron.plan.duration import NUM_PROBE_PAIRS
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.manifest import StageIncomplete, digest_values, read_manifest
from spin_megatron.run.records import ReferenceScore, write_rows
from spin_megatron.run.seeds import row_seed
from spin_megatron.run.telemetry import MetricsWriter, progress_bar, read_metrics
from spin_megatron.stages.context import StageContext, StageOutput

logger = logging.getLogger(__name__)

NUM_NAMED_PAIRS = 20


@dataclass(frozen=True)
class _Job:
    """What all parts of this stage need."""

    context: StageContext
    runtime: Runtime
    train: PackedPairs
    held_out: PackedPairs
    inputs: dict[str, str]
    recipe: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.context.config.train.dtype)
        return dtype

    @property
    def fp8(self) -> Fp8 | None:
        return Fp8.chosen(self.context.config.train.precision, self.context.config.train.num_bf16_end_layers)

    def stop_requested(self) -> bool:
        """Whether to save and leave, the same on all ranks. Collective."""
        return agreed_by_first_rank(self.context.stop_requested(), self.runtime)


def run(context: StageContext) -> StageOutput:
    """Train theta_{context.iteration + 1}; every rank calls it."""
    layout, t, settings = context.layout, context.iteration, context.config.train
    inputs = {"theta": _content_digest(layout.theta(t)), "pairs": _content_digest(layout.pairs(t))}
    read = partial(PackedPairs.read, pack_tokens=settings.pack_tokens, share_prompt=settings.share_prompt)
    train = read(layout.train_pairs(t), layout.train_packs(t))
    held_out = read(layout.held_out_pairs(t), layout.held_out_packs(t))
    if not train.packs:
        raise ValueError(f"{layout.train_pairs(t)} holds no pair to train on; see {layout.pairs_report(t)} for what was dropped.")
    with running(context.config.parallel.layout(), device=default_device(), seed=context.config.run.seed) as runtime:
        job = _Job(context, runtime, train, held_out, inputs, _recipe(context, inputs))
        is_done = _is_finished(job) or _train(job)
    if runtime.rank != 0:
        return StageOutput(files={}, stopped=not is_done)
    if not is_done:
        return StageOutput(files={}, stopped=True)
    checkpoint.remove_training(layout.checkpoints(t))  # the optimizer's state is of no use to anyone any more
    return StageOutput(files=_files(context), summary=_summary(context))


def _content_digest(folder: Path) -> str:
    """Digest of what a finished stage's folder holds."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise StageIncomplete(f"{folder} is not complete; run the stage that makes it first (spin-megatron status shows the line).")
    return digest_values([(output.path, output.sha256) for output in manifest.outputs])


def _recipe(context: StageContext, inputs: dict[str, str]) -> dict[str, Any]:
    """What decides the result, per-iteration settings as this iteration's scalars."""
    flat = flat_settings(context.config, ("objective", "optimizer", "train", "lora"))
    chosen = {name: value for name, value in flat.items() if name not in OPERATIONAL}
    scalars = {name: getattr(context.scalars, name.partition(".")[2]) for name in PER_ITERATION if name in chosen}
    return {"run.seed": context.config.run.seed, **chosen, **scalars, **{f"input.{name}": digest for name, digest in inputs.items()}}


def _is_finished(job: _Job) -> bool:
    """Whether an attempt that was killed before its manifest had made everything. Collective."""
    layout, t = job.context.layout, job.context.iteration
    is_finished = checkpoint.is_complete(layout.final_weights(t)) and layout.probe(t).exists()
    if not agreed_by_first_rank(is_finished, job.runtime):
        return False
    checkpoint.require_recipe(layout.final_weights(t), job.recipe, defaults=default_settings())
    return True


def _train(job: _Job) -> bool:
    """Both phases, to the final weights; False when it saved and left on request."""
    context, runtime, config = job.context, job.runtime, job.context.config
    theta = context.layout.theta(context.iteration)
    shape = ModelShape.from_huggingface(theta)
    chunks = build_model(
        shape,
        runtime,
        dtype=job.dtype,
        recompute=config.train.recompute,
        recompute_layers=config.train.recompute_layers,
        kept_logit_bytes=config.train.kept_logit_bytes,
        fp8=job.fp8,
    )
    load_huggingface(chunks, theta, shape, runtime, show=context.show)
    _add_adapters(job, chunks, shape)
    has_copies = runtime.layout.data * runtime.layout.context > 1
    rule = UpdateRule(
        name=config.optimizer.name,
        weight_decay=config.optimizer.weight_decay,
        adam_beta1=config.optimizer.adam_beta1,
        adam_beta2=config.optimizer.adam_beta2,
        rmsprop_alpha=config.optimizer.rmsprop_alpha,
        epsilon=config.optimizer.epsilon,
        max_grad_norm=config.optimizer.max_grad_norm,
        # On one copy of the model there is nothing to distribute; offload takes its shards all the same.
        is_distributed=config.train.distributed_optimizer and (has_copies or config.optimizer.offload_fraction > 0),
        offload_fraction=config.optimizer.offload_fraction,
    )
    trainer = build_trainer(chunks, rule, overlap=has_copies and overlaps(config.parallel.overlap, runtime.device))
    # After the trainer: the distributed optimizer moves the weights into a buffer of its own, and the GPU's matrix library chooses
    # kernels by the alignment of what it is given. The reference is scored from where the weights lie when they are trained.
    references = _reference_phase(job, chunks)
    if references is None:
        return False
    if not _update_phase(job, trainer, references):
        return False
    gather_weights(trainer)
    _finish(job, chunks)
    return True


def _add_adapters(job: _Job, chunks: Sequence[SpinModel], shape: ModelShape) -> None:
    """With [lora]: freeze theta_t and train adapters beside it; they are there, and 0, when the reference is scored."""
    settings, runtime = job.context.config.lora, job.runtime
    adapters = settings.shape()
    if adapters is None:
        return
    adapters.check(shape)
    add_adapters(chunks, Lora(adapters, settings.alpha / settings.rank, job.context.config.run.seed, job.context.iteration), runtime)
    if runtime.rank == 0:
        trained = sum(tensor.numel() for chunk in chunks for tensor in chunk.parameters() if tensor.requires_grad)
        logger.info("LoRA of rank %d beside %s: %d trained parameters on rank 0", settings.rank, ", ".join(settings.targets), trained)


def _reference_phase(job: _Job, chunks: Sequence[SpinModel]) -> dict[str, ReferenceScore] | None:
    """Phase 1: log-prob sums of all pairs under theta_t, by pair id, of the train pairs; None when stopped."""
    layout, t = job.context.layout, job.context.iteration
    steps = _step_plan(job, job.train).epoch(0)
    claim_cache(layout.reference(t), {**job.inputs, **numerics(job.runtime, job.dtype, job.fp8, steps=steps)}, job.runtime)
    parts = (
        (layout.held_out_reference_scores(t), job.held_out, "reference log-probs (held-out packs)"),
        (layout.reference_scores(t), job.train, "reference log-probs (packs)"),
    )
    scores: list[ReferenceScore] | None = None
    for path, packed, description in parts:
        scores = cached_scores(
            path,
            packed,
            _step_plan(job, packed).epoch(0),
            chunks,
            job.runtime,
            description=description,
            show=job.context.show,
            stop_requested=job.context.stop_requested,
        )
        if scores is None:
            return None
    assert scores is not None
    _report_unusable(scores, layout.theta(t), is_first_rank=job.runtime.rank == 0)
    return {score.pair_id: score for score in scores}


def _report_unusable(scores: Sequence[ReferenceScore], theta: Path, *, is_first_rank: bool) -> None:
    """Name the pairs that no step can be made with. Raises ValueError when there are no others."""
    unusable = [score.pair_id for score in scores if not math.isfinite(score.logp_real + score.logp_generated)]
    if len(unusable) == len(scores):
        raise ValueError(
            f"the log-probs of all {len(scores)} pairs under theta_t are not finite: the weights in {theta} are damaged, or too large for "
            'their precision; look at the stage that made them, or use train.precision="fp32".'
        )
    if unusable and is_first_rank:
        shown = ", ".join(unusable[:NUM_NAMED_PAIRS]) + (", ..." if len(unusable) > NUM_NAMED_PAIRS else "")
        logger.warning("log-probs under theta_t are not finite, and steps will be skipped, for %d pairs: %s", len(unusable), shown)


def _update_phase(job: _Job, trainer: Trainer, references: dict[str, ReferenceScore]) -> bool:
    """Phase 2, from the newest checkpoint on; False when stopped."""
    context, runtime, scalars = job.context, job.runtime, job.context.scalars
    root, settings = context.layout.checkpoints(context.iteration), context.config.train
    newest = checkpoint.newest_training(root, runtime)
    progress = Progress()
    if newest is not None:
        progress = checkpoint.load_training(newest, trainer, runtime, recipe=job.recipe, defaults=default_settings())
        logger.info("resumed from %s after %d steps", newest, progress.step)
    plan = _step_plan(job, job.train)
    # The steps that the checkpoint holds; later ones were lost with the attempt that made them.
    past = [row for row in read_metrics(context.layout.metrics(context.iteration)) if row["step"] < progress.step]
    guard = _guard(context, past)
    skipped_in_row = sum(1 for _ in takewhile(lambda row: row["skipped"], reversed(past)))
    num_steps = plan.steps_per_epoch * scalars.stop_epoch
    bar = progress_bar("train (steps)", num_steps, done=progress.step, show=context.show)
    with bar as advance, _metrics_writer(job, progress) as writer:
        for step in plan.remaining(progress):
            started = time.perf_counter()
            step = replace(step, after=replace(step.after, num_skipped=progress.num_skipped))
            outcome, learning_rate = _make_step(job, trainer, references, step, plan, guard)
            progress = replace(step.after, num_skipped=step.after.num_skipped + (not outcome.is_applied))
            skipped_in_row = 0 if outcome.is_applied else skipped_in_row + 1
            if writer is not None:
                seconds = time.perf_counter() - started
                numbers = _numbers(step, outcome, learning_rate, progress, seconds)
                passed = guard.found if math.isfinite(outcome.grad_norm) else ()  # only finite steps are judged
                writer.write(progress.step - 1, numbers | {f"guard.{excess.limit}": 1.0 for excess in passed})
            advance(1, note=f"loss {outcome.metrics['loss']:.4f} margin {outcome.metrics['margin']:+.3f}")
            is_refused = not outcome.is_applied and math.isfinite(outcome.grad_norm) and context.config.guard.on_excess == "stop"
            has_failed, has_stopped = is_refused or skipped_in_row >= settings.max_skipped_steps, job.stop_requested()
            if has_failed or has_stopped or progress.step % settings.save_every_steps == 0:
                checkpoint.save_training(root, trainer, progress, runtime, recipe=job.recipe, keep=settings.keep_checkpoints)
            if has_failed:
                raise ValueError(_refusal(guard, progress, root) if is_refused else _failure(skipped_in_row, progress, root))
            if has_stopped:
                logger.info("stopped on request after %d of %d steps; the state is in %s", progress.step, num_steps, root)
                return False
    return True


def _guard(context: StageContext, past: Sequence[dict[str, Any]]) -> Guard:
    settings, beta = context.config.guard, context.scalars.beta
    limits = Limits(**settings.model_dump(exclude={"on_excess", "window"}))
    return Guard(limits, on_excess=settings.on_excess, window=settings.window, beta=beta, past=past)


def _step_plan(job: _Job, packed: PackedPairs) -> StepPlan:
    context = job.context
    return StepPlan(
        packs=packed.packs,
        pairs_per_step=context.config.train.global_batch_pairs,
        data_parallel=job.runtime.layout.data,
        seed=row_seed(context.config.run.seed, "train", context.iteration, "order of packs"),
        num_epochs=context.scalars.stop_epoch,
    )


def _metrics_writer(job: _Job, progress: Progress) -> Any:
    """A context: metrics.jsonl and TensorBoard on rank 0, None on the others."""
    if job.runtime.rank != 0:
        return nullcontext()
    layout, t = job.context.layout, job.context.iteration
    return closing(MetricsWriter(layout.metrics(t), layout.train_events(t), resume_step=progress.step))


def _make_step(
    job: _Job, trainer: Trainer, references: dict[str, ReferenceScore], step: PlannedStep, plan: StepPlan, guard: Guard
) -> tuple[StepOutcome, float]:
    """One update of this rank's packs; logs what was skipped. Returns the outcome and the learning rate."""
    config, scalars, runtime = job.context.config, job.context.scalars, job.runtime
    objective = Objective(config.objective.loss, scalars.beta, config.objective.nll_weight, config.objective.length_normalised)
    num_steps = plan.steps_per_epoch * scalars.schedule_epochs
    schedule = Schedule(config.optimizer.schedule, scalars.learning_rate, num_steps, config.optimizer.warmup_fraction)
    learning_rate = schedule.at(step.position)
    outcome = train_step(
        trainer,
        [job.train.batch(pack) for pack in job.train.share_of(step.packs, runtime.layout.data, runtime.data_rank)],
        references,
        objective,
        runtime,
        num_pairs=step.num_pairs,
        learning_rate=learning_rate,
        must_start_at_zero=step.after.num_updates == 1,
        judge=guard.judge,
    )
    if outcome.suspects:
        logger.warning("step %d: the loss is not finite in the packs of the pairs %s", step.after.step - 1, ", ".join(outcome.suspects))
    if not outcome.is_applied and runtime.rank == 0:
        packs = ", ".join(str(pack.pack_id) for pack in step.packs)
        numbers = f"loss {outcome.metrics['loss']}, gradient norm {outcome.grad_norm}"
        logger.warning("step %d is skipped: %s; packs %s", step.after.step - 1, numbers, packs)
    return outcome, learning_rate


def _numbers(step: PlannedStep, outcome: StepOutcome, learning_rate: float, progress: Progress, seconds: float) -> dict[str, float]:
    """What metrics.jsonl keeps of a step."""
    return {
        **outcome.metrics,
        "grad_norm": outcome.grad_norm,
        "learning_rate": learning_rate,
        "skipped": float(not outcome.is_applied),
        "num_skipped": progress.num_skipped,
        "seconds": seconds,
        "pairs_per_second": step.num_pairs / seconds,
        "tokens_per_second": sum(pack.num_tokens for pack in step.packs) / seconds,
    }


def _refusal(guard: Guard, progress: Progress, root: Path) -> str:
    found = "; ".join(excess.message for excess in guard.found) or "a limit of [guard] was passed (rank 0 names it)"
    return (
        f"step {progress.step - 1}: {found}. Its update was not made (guard.on_excess=stop); the state is kept in {root}. Look at "
        'metrics.jsonl. To go on from here: the same command with --set guard.on_excess="warn" or another limit; to mend it: a lower '
        "optimizer.learning_rate or fewer epochs, and train anew."
    )


def _failure(skipped_in_row: int, progress: Progress, root: Path) -> str:
    return (
        f"loss or gradients were not finite in {skipped_in_row} steps in a row (train.max_skipped_steps), or passed a limit of [guard]; "
        f"the last is step {progress.step - 1}. None of them changed the weights. The log names their packs and pairs. The state is kept "
        f"in {root}: the same command goes on after these steps. If it fails again, lower optimizer.learning_rate, set "
        'optimizer.max_grad_norm, or use train.precision = "fp32", and train anew.'
    )


def _finish(job: _Job, chunks: Sequence[SpinModel]) -> None:
    """Write the final weights and what they say of a few held-out pairs."""
    layout, t = job.context.layout, job.context.iteration
    checkpoint.save_weights(layout.final_weights(t), chunks, job.runtime, recipe=job.recipe)
    scores = score_pairs(chunks, job.held_out, [job.held_out.packs[:1]], job.runtime)
    if scores is not None:
        write_rows(layout.probe(t), scores[:NUM_PROBE_PAIRS], ReferenceScore)


def _files(context: StageContext) -> dict[Path, int | None]:
    layout, t = context.layout, context.iteration
    files = [path for path in sorted(layout.final_weights(t).iterdir()) if path.is_file()]
    files += [layout.metrics(t), layout.probe(t), layout.reference_scores(t), layout.held_out_reference_scores(t)]
    return dict.fromkeys(files)


def _summary(context: StageContext) -> dict[str, Any]:
    """First and last step of metrics.jsonl, and the run as a whole; over all attempts."""
    lines = read_metrics(context.layout.metrics(context.iteration))
    first, last = lines[0], lines[-1]
    seconds = sum(line["seconds"] for line in lines)
    return {
        "steps": len(lines),
        "skipped_steps": last["num_skipped"],
        "warnings": _warnings(lines),
        "first_loss": first["loss"],
        "last_loss": last["loss"],
        "last_margin": last["margin"],
        "last_accuracy": last["accuracy"],
        "update_seconds": round(seconds, 3),
        "pairs_per_second": round(sum(line["num_pairs"] for line in lines) / seconds, 3),
    }


def _warnings(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What [guard] found and what was left out, for status and for the end of a run."""
    passed = Counter(name for line in lines for name in line if name.startswith("guard."))
    found = [f"{name} was passed in {count} of {len(lines)} steps, see metrics.jsonl" for name, count in sorted(passed.items())]
    if skipped := int(lines[-1]["num_skipped"]):
        found.append(f"{skipped} of {len(lines)} steps were skipped, see the log")
    return found
