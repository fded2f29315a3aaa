"""merge: the answers of all shards become the pairs that iteration t trains on, and their frozen packs.

Reads the prompts, this iteration's shards and, for a window of more than one iteration, the pairs that earlier merges made.
Writes train and held-out pairs, a pack plan for each, and report.json: what was dropped, both sides' lengths, what tells them
apart (data.leaks), and samples to read.

Every prompt must be answered exactly once. Pairs stand in the order of the prompts, so the number of shards changes nothing.
Held-out pairs are this iteration's alone: they measure theta_{t+1} against its own opponent.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from spin_megatron.data.batches import pair_tokens
from spin_megatron.data.leaks import LeakReport, Sample, leak_report, take_samples
from spin_megatron.data.packing import padding_share, plan_packs
from spin_megatron.data.render import Renderer
from spin_megatron.generation.engine import eos_token_ids
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import StageIncomplete, read_manifest, verify_outputs, write_json
from spin_megatron.run.records import GeneratedRow, Pack, PromptRow, SpinPair, read_rows, write_rows
from spin_megatron.run.seeds import row_seed
from spin_megatron.run.telemetry import console, progress_bar
from spin_megatron.stage_table import StageRef
from spin_megatron.stages.context import StageContext, StageOutput
from spin_megatron.stages.generate import judged, shard_range

logger = logging.getLogger(__name__)

_REPORTED_SAMPLES = 20
_SHOWN_SAMPLES = 4
_SHOWN_CHARACTERS = 240
_NAMED_IDS = 3


@dataclass(frozen=True)
class FreshPairs:
    """This iteration's pairs of one side of the split, and how many were dropped."""

    pairs: tuple[SpinPair, ...]
    num_empty: int
    num_identical: int


def run(context: StageContext) -> StageOutput:
    """Collect, pair, drop, add the window, pack, report."""
    layout, t = context.layout, context.iteration
    eos_ids = eos_token_ids(layout.theta(t))
    prompts, held_out_prompts = (read_rows(path, PromptRow) for path in (layout.prompts, layout.held_out))
    answers = collect_answers(context, [*prompts, *held_out_prompts], eos_ids)
    # A shard may be too small to be judged, and one bad shard of many is no bad iteration: this is the iteration's verdict.
    quality = judged(list(answers.values()), eos_ids, context, layout.generate(t))
    fresh = make_pairs(prompts, answers, iteration=t, eos_ids=eos_ids)
    held_out = make_pairs(held_out_prompts, answers, iteration=t, eos_ids=eos_ids)
    for side, name in ((fresh, "training"), (held_out, "held-out")):
        _refuse_none_left(side, name, t)
    train = [*_earlier_pairs(layout, t, context.scalars.window), *fresh.pairs]
    write_rows(layout.train_pairs(t), train, SpinPair)
    write_rows(layout.held_out_pairs(t), held_out.pairs, SpinPair)
    packs = {
        path: _write_packs(context, pairs, path)
        for path, pairs in ((layout.train_packs(t), train), (layout.held_out_packs(t), held_out.pairs))
    }
    report = {"quality": vars(quality)} | _report(context, train, fresh, held_out, packs[layout.train_packs(t)], eos_ids)
    write_json(layout.pairs_report(t), report)
    files = {layout.train_pairs(t): len(train), layout.held_out_pairs(t): len(held_out.pairs), layout.pairs_report(t): None}
    return StageOutput(files=files | {path: len(plan) for path, plan in packs.items()}, summary=_summary(report))


def collect_answers(context: StageContext, prompts: Sequence[PromptRow], eos_ids: Collection[int]) -> dict[str, GeneratedRow]:
    """Read every part of every shard: example id -> answer, exactly one for each prompt.

    Raises:
        StageIncomplete: a shard is not finished, or prompts have no answer.
        ValueError: a part file is damaged, an answer breaks the engine's contract, comes twice or belongs to no prompt.
    """
    layout, t, num_shards = context.layout, context.iteration, context.config.generate.num_shards
    shard_of = {prompts[number].example_id: shard for shard in range(num_shards) for number in shard_range(len(prompts), num_shards, shard)}
    answers: dict[str, GeneratedRow] = {}
    found_in: dict[str, Path] = {}
    with progress_bar(f"merge {t} (answers)", len(prompts), show=context.show) as advance:
        for shard in range(num_shards):
            for path, row in _shard_rows(layout, t, shard):
                redo = StageRef("generate", t, shard).redo_command(layout)
                if row.example_id not in shard_of:
                    raise ValueError(
                        f"{path} answers example {row.example_id}, which is no prompt of this run. Make the shard anew: {redo}"
                    )
                if row.example_id in answers:
                    earlier = found_in[row.example_id]
                    raise ValueError(f"example {row.example_id} is answered twice, in {earlier} and in {path}. Make the shard anew: {redo}")
                _check_answer(row, path, eos_ids=eos_ids, cap=context.config.data.max_response_tokens, redo=redo)
                answers[row.example_id], found_in[row.example_id] = row, path
                advance()
    missing = [row.example_id for row in prompts if row.example_id not in answers]
    if missing:
        named = ", ".join(missing[:_NAMED_IDS]) + (f" and {len(missing) - _NAMED_IDS} more" if len(missing) > _NAMED_IDS else "")
        shards = sorted({shard_of[example_id] for example_id in missing})
        commands = "\n  ".join(StageRef("generate", t, shard).redo_command(layout) for shard in shards)
        raise StageIncomplete(f"generate {t} has no answer to {len(missing)} of {len(prompts)} prompts ({named}). Run:\n  {commands}")
    return answers


def _shard_rows(layout: RunLayout, t: int, shard: int) -> Iterator[tuple[Path, GeneratedRow]]:
    """Rows of a finished shard with the file they stand in, part after part."""
    ref, folder = StageRef("generate", t, shard), layout.shard(t, shard)
    manifest = read_manifest(folder)
    if manifest is None:
        raise StageIncomplete(f"merge {t} needs {ref}, which is not complete; run: {ref.command(layout)}")
    problems = verify_outputs(folder, manifest, digests=True)
    if problems:
        raise ValueError(f"{'; '.join(problems)}. Make the shard anew: {ref.redo_command(layout)}")
    for path in sorted(folder.glob("part_*.parquet")):
        for row in read_rows(path, GeneratedRow):
            yield path, row


def _check_answer(row: GeneratedRow, path: Path, *, eos_ids: Collection[int], cap: int, redo: str) -> None:
    """What every engine promises: within the cap, EOS at the end exactly when it stopped by itself, and nowhere else."""
    places = [place for place, token in enumerate(row.token_ids) if token in eos_ids]
    expected = [len(row.token_ids) - 1] if row.finish_reason == "stop" else []
    if len(row.token_ids) > cap:
        problem = f"has {len(row.token_ids)} tokens, more than data.max_response_tokens={cap}"
    elif places != expected or not row.token_ids:
        problem = f"has finish reason {row.finish_reason!r}, {len(row.token_ids)} tokens and EOS at {places}, expected {expected}"
    else:
        return
    raise ValueError(f"the answer to example {row.example_id} in {path} {problem}; the engine is at fault. Change it, then: {redo}")


def make_pairs(
    prompts: Sequence[PromptRow], answers: Mapping[str, GeneratedRow], *, iteration: int, eos_ids: Collection[int]
) -> FreshPairs:
    """Pair the human and the generated answer of each prompt; drop y' that is empty (EOS at once) or equal to y.

    A pair of equal answers has margin 0 for every theta: it adds a constant to the loss and nothing to the gradient.
    """
    pairs: list[SpinPair] = []
    dropped: Counter[str] = Counter()
    for prompt in prompts:
        generated_ids = answers[prompt.example_id].token_ids
        if len(generated_ids) == 1 and generated_ids[0] in eos_ids:
            dropped["empty"] += 1
        elif generated_ids == prompt.real_ids:
            dropped["identical"] += 1
        else:
            pair_id = f"{iteration}:{prompt.example_id}"
            pairs.append(SpinPair(pair_id, prompt.prompt_ids, prompt.real_ids, generated_ids, iteration))
    return FreshPairs(tuple(pairs), dropped["empty"], dropped["identical"])


def _refuse_none_left(side: FreshPairs, name: str, t: int) -> None:
    if not side.pairs:
        raise ValueError(
            f"iteration {t} has no {name} pair: {side.num_identical} generated answers equal the human ones and {side.num_empty} are "
            "empty. Where they are equal, theta_t has learnt this data by heart: stop here, or use other data (data.source, more "
            "data.num_held_out). Where they are empty, check the chat template and the EOS ids of the model."
        )


def _earlier_pairs(layout: RunLayout, t: int, window: int) -> Iterator[SpinPair]:
    """Pairs that the earlier iterations of the window made themselves, oldest first."""
    for earlier in range(max(0, t - window + 1), t):
        yield from (pair for pair in read_rows(layout.train_pairs(earlier), SpinPair) if pair.made_in_iteration == earlier)


def _write_packs(context: StageContext, pairs: Sequence[SpinPair], path: Path) -> list[Pack]:
    train = context.config.train
    plan = plan_packs(
        [(pair.pair_id, pair_tokens(pair, share_prompt=train.share_prompt)) for pair in pairs],
        pack_tokens=train.pack_tokens,
        max_pairs_per_pack=train.max_pairs_per_pack,
        seed=row_seed(context.config.run.seed, "packs", context.iteration, path.stem),
    )
    write_rows(path, plan, Pack)
    return plan


def _report(
    context: StageContext,
    train: Sequence[SpinPair],
    fresh: FreshPairs,
    held_out: FreshPairs,
    packs: Sequence[Pack],
    eos_ids: Collection[int],
) -> dict[str, Any]:
    t, layout = context.iteration, context.layout
    renderer = Renderer(layout.theta(t), eos_ids=sorted(eos_ids))
    samples = take_samples(fresh.pairs, renderer.decode, count=_REPORTED_SAMPLES)
    leaks = {name: _leaks(context, side, eos_ids) for name, side in (("train", fresh), ("held_out", held_out))}
    for warning in leaks["train"].warnings:
        logger.warning("%s", warning)
    if context.show:
        console.print(_sample_table(samples[:_SHOWN_SAMPLES], t))
    made_in = Counter(pair.made_in_iteration for pair in train)
    return {
        "iteration": t,
        "train_pairs": len(train),
        "train_pairs_by_iteration": {str(iteration): made_in[iteration] for iteration in sorted(made_in)},
        "held_out_pairs": len(held_out.pairs),
        "packs": len(packs),
        "padding_share": padding_share(packs, context.config.train.pack_tokens),
        **{name: dataclasses.asdict(report) for name, report in leaks.items()},
        "samples": [dataclasses.asdict(sample) for sample in samples],
    }


def _leaks(context: StageContext, side: FreshPairs, eos_ids: Collection[int]) -> LeakReport:
    return leak_report(
        side.pairs,
        eos_ids=eos_ids,
        max_response_tokens=context.config.data.max_response_tokens,
        num_empty=side.num_empty,
        num_identical=side.num_identical,
    )


def _summary(report: Mapping[str, Any]) -> dict[str, Any]:
    fresh = report["train"]
    names = ("num_empty", "num_identical", "length_accuracy", "eos_accuracy", "first_token_accuracy", "warnings")
    return {name: report[name] for name in ("train_pairs", "held_out_pairs", "packs", "padding_share")} | {
        name: fresh[name] for name in names
    }


def _sample_table(samples: Sequence[Sample], t: int) -> Table:
    table = Table(title=f"iteration {t}: human answers y and theta_{t}'s answers y'", show_lines=True)
    for column in ("prompt", "y (human)", f"y' (theta_{t})"):
        table.add_column(column, overflow="fold", ratio=1)
    for sample in samples:
        table.add_row(_shown(sample.prompt, end=True), _shown(sample.real), _shown(sample.generated))
    return table


def _shown(text: str, *, end: bool = False) -> Text:
    """The start (or end) of a text for the terminal: brackets are no markup, and control characters of a model command nothing."""
    if len(text) > _SHOWN_CHARACTERS:
        kept = _SHOWN_CHARACTERS - len("...")
        text = f"...{text[-kept:]}" if end else f"{text[:kept]}..."
    return Text("".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text))
