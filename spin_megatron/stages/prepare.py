"""prepare: the supervised set becomes prompts and human answers as token ids, once a run.

Reads the source and theta_0's tokenizer; writes prompts.parquet (trained on), held_out.parquet (never trained on) and
report.json, which accounts for every row of the source:

    rows_read = empty + duplicates + special_token_text + boundary + over_long_prompt + over_long_response
                + prompt_in_held_out + train + held_out + not_needed
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from spin_megatron.config import RunConfig
from spin_megatron.config_sections import DataSection
from spin_megatron.data.leaks import length_statistics
from spin_megatron.data.render import Limits, Remark, Rendered, Renderer
from spin_megatron.data.selection import CleanExamples, Selection, clean, in_split_order, select
from spin_megatron.data.sources import load_examples
from spin_megatron.generation.engine import eos_token_ids
from spin_megatron.plan.shape import ModelShape, model_folder
from spin_megatron.run.manifest import write_json
from spin_megatron.run.records import PromptRow, SftExample, write_rows
from spin_megatron.run.telemetry import progress_bar
from spin_megatron.stages.context import StageContext, StageOutput

logger = logging.getLogger(__name__)

_BATCH_EXAMPLES = 256


def run(context: StageContext) -> StageOutput:
    """Read, clean, order, render, split, report."""
    data, layout = context.config.data, context.layout
    examples = _load(data, show=context.show)
    cleaned = clean(examples, deduplicate=data.deduplicate)
    ordered = in_split_order(cleaned.examples, context.config.run.seed)
    folder = layout.theta(0)
    renderer = Renderer(folder, eos_ids=eos_token_ids(folder), system=data.system)
    if renderer.writes_the_time:
        logger.warning("the chat template in %s writes the time of rendering: prepared on another day, the prompts are others", folder)
    limits = Limits(data.max_prompt_tokens, data.max_response_tokens, data.over_long)
    wanted = None if data.num_examples is None else data.num_held_out + data.num_examples
    rendered = _render(renderer, ordered, limits, total=min(wanted or len(ordered), len(ordered)), show=context.show)
    selection = select(rendered, num_held_out=data.num_held_out, num_examples=data.num_examples)
    _require_vocabulary([*selection.held_out, *selection.train], folder)
    write_rows(layout.prompts, selection.train, PromptRow)
    write_rows(layout.held_out, selection.held_out, PromptRow)
    counts = _counts(len(examples), cleaned, selection)
    write_json(layout.data_report, counts | _facts(context, renderer, selection))
    logger.info("%s", ", ".join(f"{name} {count}" for name, count in counts.items() if count))
    files = {layout.prompts: len(selection.train), layout.held_out: len(selection.held_out), layout.data_report: None}
    return StageOutput(files=files, summary=counts)


def preview(config: RunConfig) -> tuple[str, str]:
    """Prompt and human answer of the source's first usable example, as text, by a local base model's own template.

    Raises:
        ValueError: a row breaks, the tokenizer has no chat template or is another model's, none of the first rows can be used, or too few
            of a small set.
    """
    data, folder = config.data, model_folder(Path(config.model.path))
    examples = _load(data, limit=_BATCH_EXAMPLES)
    renderer = Renderer(folder, eos_ids=eos_token_ids(folder), system=data.system)
    limits = Limits(data.max_prompt_tokens, data.max_response_tokens, data.over_long)
    cleaned = clean(examples, deduplicate=data.deduplicate).examples
    outcomes = renderer.render(cleaned, limits)
    shown = next((outcome.row for outcome in outcomes if outcome.row is not None), None)
    if shown is None:
        remarks = sorted({remark for outcome in outcomes for remark in outcome.remarks})
        raise ValueError(
            f"none of the first {len(examples)} rows of data.source={data.source} can be used ({', '.join(remarks) or 'all are empty'}); "
            "raise data.max_prompt_tokens and data.max_response_tokens, or look at the rows."
        )
    if len(examples) < _BATCH_EXAMPLES:  # that is all there are: whether enough can be used is known now
        outcome_of = {example.example_id: outcome for example, outcome in zip(cleaned, outcomes, strict=True)}
        ordered = in_split_order(cleaned, config.run.seed)
        select((outcome_of[example.example_id] for example in ordered), num_held_out=data.num_held_out, num_examples=data.num_examples)
    _require_vocabulary([shown], folder)
    return renderer.decode(shown.prompt_ids), renderer.decode(shown.real_ids)


def _require_vocabulary(rows: Sequence[PromptRow], folder: Path) -> None:
    """Check that the model in the folder knows every token id of its tokenizer that occurs. Raises ValueError when it does not."""
    largest, vocab_size = max(max(*row.prompt_ids, *row.real_ids) for row in rows), ModelShape.from_huggingface(folder).vocab_size
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} gives token {largest}, but the model beside it knows 0 to {vocab_size - 1}: it is another model's. "
            "Put the tokenizer files of this model there."
        )


def _load(data: DataSection, *, limit: int | None = None, show: bool = False) -> list[SftExample]:
    return load_examples(
        data.source,
        split=data.split,
        subset=data.subset,
        revision=data.revision,
        row_format=data.format,
        columns=data.columns.model_dump(exclude_none=True),
        turns=data.turns,
        limit=limit,
        show=show,
    )


def _render(renderer: Renderer, examples: Sequence[SftExample], limits: Limits, *, total: int, show: bool) -> Iterator[Rendered]:
    """Outcomes in order, batch by batch, no batch before it is asked for."""
    with progress_bar("render (examples)", total, show=show) as advance:
        for start in range(0, len(examples), _BATCH_EXAMPLES):
            for outcome in renderer.render(examples[start : start + _BATCH_EXAMPLES], limits):
                yield outcome
                advance()


def _counts(num_read: int, cleaned: CleanExamples, selection: Selection) -> dict[str, int]:
    return {
        "rows_read": num_read,
        "train": len(selection.train),
        "held_out": len(selection.held_out),
        "empty": cleaned.num_empty,
        "duplicates": cleaned.num_duplicates,
        **{remark: selection.remarks[remark] for remark in get_args(Remark)},
        "prompt_in_held_out": selection.num_prompts_in_held_out,
        "not_needed": len(cleaned.examples) - selection.num_rendered,
    }


def _facts(context: StageContext, renderer: Renderer, selection: Selection) -> dict[str, Any]:
    """Where the rows come from, how long they are and how they begin and end."""
    data = context.config.data
    rows = selection.train
    return {
        "source": data.source,
        "subset": data.subset,
        "split": data.split,
        "revision": data.revision,
        "eos_ids": sorted(renderer.eos_ids),
        "prompts_with_bos": sum(row.prompt_ids[0] == renderer.bos_id for row in rows) / len(rows),
        "answers_without_eos": sum(row.truncated for row in rows) / len(rows),
        "prompt_tokens": dataclasses.asdict(length_statistics([len(row.prompt_ids) for row in rows])),
        "response_tokens": dataclasses.asdict(length_statistics([len(row.real_ids) for row in rows])),
    }
