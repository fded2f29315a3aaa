"""The plan as tables for a person."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spin_megatron.plan.duration import IterationTime, gpu_hours
from spin_megatron.plan.hardware import GIGA
from spin_megatron.plan.layouts import Candidate, Refusal, best_with_offload, by_recompute, describe, usable_bytes
from spin_megatron.plan.memory import RankMemory, chunks_in_flight
from spin_megatron.plan.parameters import count_parameters
from spin_megatron.plan.run_plan import Plan
from spin_megatron.plan.shape import ParallelLayout
from spin_megatron.run.telemetry import counted

# Wide enough for every column, so that a plan in a file or a pipe is not cut.
_WIDTH = 132
_HOST_WIDTH = 10
_REFUSED_SHOWN = 8
_LAYOUT_COLUMNS = ("TP", "PP", "VP", "CP", "DP", "EP", "recompute", "GB/GPU")
_RATE_COLUMNS = ("pairs/update", "s/update", "tokens/s/GPU", "MFU", "bubble", "pairs/s")
_STATE_COLUMNS = ("G parameters", "weights", "gradients", "optimizer")
_MEMORY_COLUMNS = (*_STATE_COLUMNS, "activations", "passing", "buffers", "context", "total", "of usable")
_STAGE_COLUMNS = ("engine", "generate", "reference", "train", "checkpoints", "export", "evaluate", "total")


def print_plan(plan: Plan, *, examples_from: str, top: int, show_refused: bool) -> None:
    """Print layouts, the best one's memory and time, the run's stages, and the refused layouts."""
    console = Console(width=_WIDTH + (_HOST_WIDTH if plan.question.settings.offload_fraction else 0), highlight=False)
    console.print(_headline(plan, examples_from))
    candidates = plan.search.candidates
    if candidates:
        console.print(_layouts_table(plan, top))
        best = candidates[0]
        console.print(f"[bold]Best:[/bold] {describe(best)}", soft_wrap=True)
        console.print(_own_line(plan), soft_wrap=True)
        console.print(_memory_table(plan))
        console.print(_recompute_line(best, plan))
        console.print(_step_line(best, plan))
        console.print(_run_table(plan.iterations, plan.num_gpus))
        for warning in plan.warnings:
            console.print(f"[bold]Note:[/bold] {escape(warning)}", soft_wrap=True)
    else:
        found = best_with_offload(plan.question, plan.num_gpus)
        cure = "" if found is None else f" With optimizer.offload_fraction=1 this does: {describe(found)}."
        console.print(f"[bold]No layout of {plan.num_gpus} {plan.question.gpu.name} fits.[/bold]{cure}", soft_wrap=True)
    _print_refusals(console, plan.search.refusals, everything=show_refused or not candidates)


def _headline(plan: Plan, examples_from: str) -> str:
    question, workload = plan.question, plan.question.workload
    shape = question.shape
    tensor = plan.engine_gpus
    return (
        f"{shape.family}, {count_parameters(shape) / GIGA:.2f} G parameters, {question.settings.precision}, "
        f"{question.settings.optimizer}; {plan.num_gpus} x {question.gpu.name}\n"
        f"{workload.prompts} prompts ({examples_from}); mean tokens: prompt {workload.prompt_tokens:g}, answer {workload.real_tokens:g}, "
        f"generated {workload.generated_tokens:g}; packs of {question.settings.pack_tokens}; {question.global_batch_pairs} pairs an update"
        f"; generation with {counted(max(plan.num_gpus // tensor, 1), 'engine')} of {counted(tensor, 'GPU')}"
    )


def _layouts_table(plan: Plan, top: int) -> Table:
    candidates = plan.search.candidates
    table = Table(title=f"{len(candidates)} layouts fit, {len(plan.search.refusals)} are refused; the {min(top, len(candidates))} fastest")
    for name in (*_LAYOUT_COLUMNS, *_RATE_COLUMNS):
        table.add_column(name, justify="right")
    for candidate in candidates[:top]:
        layout, step = candidate.layout, candidate.step
        table.add_row(
            f"{layout.tensor}{' SP' if layout.sequence else ''}",
            f"{layout.pipeline}{' uneven' if layout.stage_layers else ''}",
            str(layout.virtual_pipeline),
            str(layout.context),
            str(layout.data),
            str(layout.expert),
            candidate.settings.recompute,
            f"{candidate.memory.total / GIGA:.1f}",
            f"{candidate.batch.pairs_per_step:.0f}",
            f"{step.total:.2f}",
            f"{step.tokens_per_second(plan.num_gpus):,.0f}",
            f"{step.utilisation(plan.num_gpus, plan.question.gpu):.1%}",
            f"{step.bubble_share:.1%}",
            f"{candidate.pairs_per_second:.1f}",
        )
    return table


def _own_line(plan: Plan) -> str:
    """What becomes of the layout that the config asks for."""
    own, name = plan.own, "[bold]The config's own layout[/bold]"
    if own is None:
        return f"{name} is for another number of GPUs."
    if isinstance(own, Refusal):
        return f"{name} is refused: {escape(own.reason)}"
    faster = sum(candidate.pairs_per_second > own.pairs_per_second for candidate in plan.search.candidates)
    place = "the best" if faster == 0 else f"{faster} of {len(plan.search.candidates)} are faster"
    return f"{name}: {describe(own)}: {own.memory.total / GIGA:.1f} GB a GPU, {own.step.total:.2f} s an update; {place}"


def _memory_table(plan: Plan) -> Table:
    """GB of the first, an inner and the last pipeline rank."""
    usable = usable_bytes(plan.question.gpu)
    table = Table(title=f"Memory, GB a GPU; {usable / GIGA:.1f} may be used of {plan.question.gpu.name}")
    table.add_column("pipeline rank")
    has_host = any(memory.state.host for memory in plan.ranks)
    for name in (*_MEMORY_COLUMNS, *(["host"] if has_host else [])):
        table.add_column(name, justify="right")
    for label, memory in _chosen_ranks(plan.ranks):
        state = memory.state
        parts = (state.weights, state.gradients, state.optimizer, memory.activations, memory.passing, memory.communication, memory.context)
        cells = [f"{part / GIGA:.2f}" for part in parts]
        cells += [f"{memory.total / GIGA:.2f}", f"{memory.total / usable:.0%}", *([f"{state.host / GIGA:.2f}"] if has_host else [])]
        table.add_row(label, f"{state.num_parameters / GIGA:.3f}", *cells)
    return table


def _chosen_ranks(ranks: list[RankMemory]) -> list[tuple[str, RankMemory]]:
    if len(ranks) == 1:
        return [("0 (only)", ranks[0])]
    inner = [(f"1 to {len(ranks) - 2} (inner)", ranks[1])] if len(ranks) > 2 else []
    return [("0 (first)", ranks[0]), *inner, (f"{len(ranks) - 1} (last)", ranks[-1])]


def _recompute_line(best: Candidate, plan: Plan) -> str:
    """What the other recompute modes would take and cost, and how much is in flight at the first stage."""
    modes = []
    for mode in by_recompute(plan.question, best):
        activations = f"activations {mode.memory.activations / GIGA:.1f}"
        modes.append(f"{mode.settings.recompute} {mode.memory.total / GIGA:.1f} GB ({activations}), {mode.step.total:.2f} s")
    chunks = chunks_in_flight(best.layout, 0, best.settings.micro_batches)
    layers = best.layout.layers_of_rank(plan.question.shape.num_layers, 0) // best.layout.virtual_pipeline
    return f"By recompute: {'; '.join(modes)}. In flight on rank 0: {chunks} chunks of {layers} layers"


def _step_line(best: Candidate, plan: Plan) -> str:
    step = best.step
    parts = {
        "layers and head": step.compute,
        "tensor collectives": step.tensor,
        "bubble": step.bubble,
        "stage to stage": step.pipeline,
        "data ranks": step.data,
        "optimizer": step.optimizer,
    }
    named = ", ".join(f"{name} {seconds / step.total:.0%}" for name, seconds in parts.items() if seconds / step.total >= 0.005)
    return (
        f"Update: {step.total:.2f} s for {best.batch.pairs_per_step:.0f} pairs in {best.batch.micro_batches} packs a data rank ({named}); "
        f"slowest stage {step.imbalance - 1:.0%} above the mean; {step.utilisation(plan.num_gpus, plan.question.gpu):.1%} MFU"
    )


def _run_table(iterations: list[IterationTime], num_gpus: int) -> Table:
    table = Table(title=f"Whole run: {gpu_hours(iterations, num_gpus):,.0f} GPU-hours; hours by stage")
    for name in ("iteration", "updates", *_STAGE_COLUMNS, "GPU-hours"):
        table.add_column(name, justify="right")
    for number, time in enumerate(iterations):
        stages = (time.engine, time.generate, time.reference, time.train, time.checkpoint, time.export, time.evaluate, time.total)
        hours = [f"{seconds / 3600:.2f}" for seconds in stages]
        table.add_row(str(number), str(time.steps), *hours, f"{time.total * num_gpus / 3600:,.0f}")
    return table


def _print_refusals(console: Console, refusals: list[Refusal], *, everything: bool) -> None:
    """One row a reason with the layouts it holds for; a layout too large for memory takes its virtual stages with it."""
    rows: dict[str, tuple[str, dict[str, list[str]]]] = {}
    for refusal in refusals:
        name, stages = _short(refusal.layout), f"VP{refusal.layout.virtual_pipeline}"
        _, layouts = rows.setdefault(name if refusal.kind == "memory" else refusal.reason, (refusal.reason, {}))
        layouts.setdefault(name, []).append(stages)
    shown = list(rows.values()) if everything else list(rows.values())[:_REFUSED_SHOWN]
    if not shown:
        return
    table = Table(title="Refused")
    table.add_column("layouts", max_width=36)
    table.add_column("reason")
    for reason, layouts in shown:
        table.add_row("; ".join(f"{name} {' '.join(stages)}" for name, stages in layouts.items()), escape(reason))
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"{len(rows) - len(shown)} more rows: --refused shows them.")


def _short(layout: ParallelLayout) -> str:
    """A layout without its virtual stages."""
    more = "".join(f" {name}{size}" for name, size in (("CP", layout.context), ("EP", layout.expert)) if size > 1)
    return f"TP{layout.tensor} PP{layout.pipeline} DP{layout.data}{more}"
