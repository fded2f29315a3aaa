"""generate: shard k of N answers its range of the prompts and held-out prompts with theta_t.

A shard's rows are a contiguous range of prompts + held_out, in parts of rows_per_part. A part file is written, whole, as
soon as its last row finishes; an interrupted shard keeps its parts and answers the rest. Seeds belong to rows, so neither
the shard, nor the part, nor an interruption changes an answer.
"""

import logging
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_megatron.generation.engine import Engine, Prompt, Sampling, eos_token_ids, provider
from spin_megatron.generation.quality import AnswerQuality, judge_answers
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import StageIncomplete, digest_values, read_manifest, write_json
from spin_megatron.run.records import GeneratedRow, PromptRow, num_rows, read_all, read_rows, write_rows
from spin_megatron.run.seeds import row_seed
from spin_megatron.run.telemetry import progress_bar
from spin_megatron.stage_table import StageRef
from spin_megatron.stages.build_engine import engine_spec
from spin_megatron.stages.context import StageContext, StageOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a shard that share a file."""

    path: Path
    prompts: tuple[Prompt, ...]


@dataclass
class _Counts:
    """What one attempt did, for the throughput report."""

    num_responses: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_truncated: int = 0


def shard_range(num_rows: int, num_shards: int, shard: int) -> range:
    """The rows of shard k of N: contiguous, sizes differ by at most one, together every row once.

    Raises:
        ValueError: there is no such shard.
    """
    if not 0 <= shard < num_shards:
        raise ValueError(f"shard {shard} does not exist: generate.num_shards={num_shards}; use 0 to {num_shards - 1}.")
    return range(num_rows * shard // num_shards, num_rows * (shard + 1) // num_shards)


def run(context: StageContext) -> StageOutput:
    """Answer what is missing of this shard."""
    layout, shard = context.layout, context.shard or 0
    sampling = _sampling(context)
    parts = _plan_parts(context, shard)
    identity_path = _claim_folder(context, shard, sampling, parts)
    finished = {part.path: read_part(part) for part in parts if part.path.exists()}
    missing = [part for part in parts if part.path not in finished]
    attempt: dict[str, Any] = {}
    if missing:
        generate = context.config.generate
        spec, load = engine_spec(context), provider(generate.engine).load
        work = layout.shard_work(context.iteration, shard)
        with closing(load(spec, layout.engine(context.iteration), work)) as engine:
            attempt = _answer(engine, missing, sampling, context, num_done=sum(map(len, finished.values())))
    if attempt.pop("stopped", False):
        return StageOutput(files={}, stopped=True)
    shutil.rmtree(layout.shard_work(context.iteration, shard), ignore_errors=True)
    rows = [row for part in parts for row in read_part(part)]
    quality = judged(rows, sampling.eos_ids, context, layout.shard(context.iteration, shard))
    files: dict[Path, int | None] = {identity_path: None} | {part.path: len(part.prompts) for part in parts}
    return StageOutput(files=files, summary=_response_summary(rows) | {"quality": vars(quality)} | attempt)


def _sampling(context: StageContext) -> Sampling:
    generate = context.config.generate
    return Sampling(
        temperature=generate.temperature,
        top_k=generate.top_k,
        top_p=generate.top_p,
        max_new_tokens=context.config.data.max_response_tokens,
        eos_ids=eos_token_ids(context.layout.theta(context.iteration)),
    )


def _plan_parts(context: StageContext, shard: int) -> list[Part]:
    """This shard's prompts with their seeds, cut into parts."""
    layout, config = context.layout, context.config
    files = (layout.prompts, layout.held_out)
    wanted = shard_range(sum(num_rows(path) for path in files), config.generate.num_shards, shard)
    prompts = [
        Prompt(row.example_id, row.prompt_ids, row_seed(config.run.seed, "generate", context.iteration, row.example_id))
        for row in read_all(files, PromptRow, wanted)
    ]
    size = config.generate.rows_per_part
    starts = range(0, len(prompts), size)
    return [
        Part(layout.part(context.iteration, shard, number), tuple(prompts[start : start + size])) for number, start in enumerate(starts)
    ]


def _claim_folder(context: StageContext, shard: int, sampling: Sampling, parts: Sequence[Part]) -> Path:
    """Keep the parts of an earlier attempt only if it had the same engine, sampling and prompts; returns the identity file.

    Raises:
        StageIncomplete: the engine is not built.
    """
    layout, t = context.layout, context.iteration
    engine = read_manifest(layout.engine(t))
    if engine is None:
        builder = StageRef("build-engine", t)
        raise StageIncomplete(f"generate {t} needs {builder}, which is not complete; run: {builder.command(layout)}")
    prompts = [(prompt.example_id, prompt.token_ids, prompt.seed) for part in parts for prompt in part.prompts]
    identity = digest_values([engine.key, vars(sampling), context.config.generate.rows_per_part, prompts])
    path = layout.shard_identity(t, shard)
    if not path.exists() or path.read_text(encoding="utf-8").strip() != f'"{identity}"':
        _remove_leftovers(layout, t, shard)
        write_json(path, identity)
    return path


def _remove_leftovers(layout: RunLayout, iteration: int, shard: int) -> None:
    leftovers = sorted(layout.shard(iteration, shard).glob("part_*.parquet"))
    if leftovers:
        logger.warning("%d part files of an unfinished attempt with another engine, sampling or prompts are dropped", len(leftovers))
    for path in leftovers:
        path.unlink()
    shutil.rmtree(layout.shard_work(iteration, shard), ignore_errors=True)


def read_part(part: Part) -> list[GeneratedRow]:
    """The rows of a finished part.

    Raises:
        ValueError: the file is corrupt, or its examples or seeds are not the part's.
    """
    rows = read_rows(part.path, GeneratedRow)
    expected = [(prompt.example_id, prompt.seed) for prompt in part.prompts]
    found = [(row.example_id, row.seed) for row in rows]
    if found != expected:
        raise ValueError(
            f"{part.path} holds {len(found)} rows that are not, in order, the {len(expected)} examples this part is for; "
            "remove it and rerun."
        )
    return rows


def _answer(engine: Engine, parts: Sequence[Part], sampling: Sampling, context: StageContext, *, num_done: int) -> dict[str, Any]:
    """Answer all rows of the missing parts in one stream, write each part when it is whole; the attempt's throughput."""
    prompts = [prompt for part in parts for prompt in part.prompts]
    counts = _Counts()
    started = time.monotonic()
    description = f"generate {context.iteration} shard {context.shard or 0} (responses)"
    with progress_bar(description, num_done + len(prompts), done=num_done, show=context.show) as advance:
        for _row in _write_parts(engine.generate(prompts, sampling, context.stop_requested), parts, counts):
            advance(1, f"{counts.num_generated_tokens / (time.monotonic() - started):.0f} tokens/s")
            if context.stop_requested():
                break
    unanswered = len(prompts) - counts.num_responses
    if unanswered and context.stop_requested():
        kept = num_done + sum(len(part.prompts) for part in parts if part.path.exists())
        logger.info("stopped on request: %d of %d answers are kept, in whole parts", kept, num_done + len(prompts))
        return {"stopped": True}
    if unanswered:
        raise RuntimeError(f"the engine left {unanswered} prompts unanswered.")
    described = engine.describe()
    throughput = _throughput(counts, time.monotonic() - started, described["in_flight_use"])
    told = "%.1f requests/s, %.0f prompt and %.0f generated tokens/s, engine %.0f%% full, %.1f%% of the answers truncated"
    rates = ("requests_per_second", "prompt_tokens_per_second", "generated_tokens_per_second")
    shares = 100 * throughput["in_flight_use"], 100 * throughput["truncated_share"]
    logger.info("%s: " + told, description, *(throughput[name] for name in rates), *shares)
    return {"throughput": throughput, "engine": described}


def _throughput(counts: _Counts, seconds: float, in_flight_use: float) -> dict[str, float]:
    """The report of what this attempt answered; an earlier attempt's answers are not in it."""
    return {
        "requests": counts.num_responses,
        "seconds": seconds,
        "requests_per_second": counts.num_responses / seconds,
        "prompt_tokens_per_second": counts.num_prompt_tokens / seconds,
        "generated_tokens_per_second": counts.num_generated_tokens / seconds,
        "in_flight_use": in_flight_use,
        "truncated_share": counts.num_truncated / max(1, counts.num_responses),
    }


def _write_parts(rows: Iterator[GeneratedRow], parts: Sequence[Part], counts: _Counts) -> Iterator[GeneratedRow]:
    """Pass rows on as they come, in any order, and write every part that became whole."""
    part_of = {prompt.example_id: part for part in parts for prompt in part.prompts}
    prompt_tokens = {prompt.example_id: len(prompt.token_ids) for part in parts for prompt in part.prompts}
    arrived: dict[Path, dict[str, GeneratedRow]] = {part.path: {} for part in parts}
    for row in rows:
        part = part_of[row.example_id]
        arrived[part.path][row.example_id] = row
        counts.num_responses += 1
        counts.num_prompt_tokens += prompt_tokens[row.example_id]
        counts.num_generated_tokens += len(row.token_ids)
        counts.num_truncated += row.finish_reason == "length"
        if len(arrived[part.path]) == len(part.prompts):
            ordered = arrived.pop(part.path)
            write_rows(part.path, [ordered[prompt.example_id] for prompt in part.prompts], GeneratedRow)
        yield row


def judged(rows: Sequence[GeneratedRow], eos_ids: Collection[int], context: StageContext, where: Path) -> AnswerQuality:
    """The quality of answers against [quality]; see quality.judge_answers."""
    settings = context.config.quality
    limits = AnswerQuality(settings.max_empty, settings.max_repeated, settings.max_truncated, settings.max_identical)
    return judge_answers(rows, eos_ids, limits, stop=settings.on_excess == "stop", where=where)


def _response_summary(rows: Sequence[GeneratedRow]) -> dict[str, Any]:
    """Facts about the whole shard's answers."""
    num_rows = max(1, len(rows))
    return {
        "responses": len(rows),
        "generated_tokens": sum(len(row.token_ids) for row in rows),
        "mean_response_tokens": sum(len(row.token_ids) for row in rows) / num_rows,
    }
