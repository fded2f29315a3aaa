"""build-engine and generate: shards, parts and interruptions change no answer."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spin_megatron.config import RunConfig
from spin_megatron.config_file import validate_config
from spin_megatron.generation import hf_loop, quality
from spin_megatron.generation.hf_loop import HfLoop
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import Manifest, StageIncomplete, write_manifest
from spin_megatron.run.records import GeneratedRow, PromptRow, read_rows, write_rows
from spin_megatron.run.seeds import row_seed
from spin_megatron.stages import build_engine, generate
from spin_megatron.stages.context import StageContext, StageOutput
from spin_megatron.stages.generate import shard_range
from tests.unit.tiny_models import TINY, write_model

NUM_PROMPTS, NUM_HELD_OUT = 11, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theta")
    write_model(folder, TINY, dtype=torch.float32)
    return folder


def make_config(*, quality: dict[str, object] | None = None, **settings: object) -> RunConfig:
    generate_section = {"dtype": "float32", "batch_size": 3, "rows_per_part": 4, **settings}
    data = {"source": "org/d", "revision": "b", "max_prompt_tokens": 20, "max_response_tokens": 10, "num_held_out": NUM_HELD_OUT}
    return validate_config(
        {
            "run": {"seed": 5},
            "model": {"path": "org/m", "revision": "a"},
            "data": data,
            "generate": generate_section,
            "train": {"pack_tokens": 64},
            "quality": quality or {},
        },
        origin="test",
    )


def make_run(folder: Path, base: Path, config: RunConfig) -> StageContext:
    """A run directory in which everything before build-engine is done."""
    layout = RunLayout(folder)
    layout.theta(0).parent.mkdir(parents=True)
    layout.theta(0).symlink_to(base)
    prompts = [tuple(4 + (7 * i + j) % 200 for j in range(1 + i)) for i in range(NUM_PROMPTS + NUM_HELD_OUT)]
    rows = [PromptRow(f"ex-{i}", prompt, (5, 2), False) for i, prompt in enumerate(prompts)]
    write_rows(layout.prompts, rows[:NUM_PROMPTS], PromptRow)
    write_rows(layout.held_out, rows[NUM_PROMPTS:], PromptRow)
    context = StageContext(config, layout, iteration=0, show=False)
    finish_engine(context, key="engine-key")
    return context


def finish_engine(context: StageContext, key: str) -> StageOutput:
    """What the pipeline does: run build-engine, then write its manifest."""
    output = build_engine.run(context)
    write_manifest(context.layout.engine(0), Manifest("build-engine", 0, None, key, {}, {}, ()))
    return output


def answers(output: StageOutput) -> list[GeneratedRow]:
    return [row for path in output.files if path.suffix == ".parquet" for row in read_rows(path, GeneratedRow)]


def run_all_shards(folder: Path, base: Path, **settings: object) -> list[GeneratedRow]:
    context = make_run(folder, base, make_config(**settings))
    shards = range(context.config.generate.num_shards)
    return [row for shard in shards for row in answers(generate.run(replace(context, shard=shard)))]


@pytest.fixture(scope="module")
def expected(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[GeneratedRow]:
    return run_all_shards(tmp_path_factory.mktemp("run") / "one", base)


@pytest.mark.parametrize(("num_rows", "num_shards"), [(10, 1), (10, 3), (3, 7), (0, 2), (1000, 7)])
def test_shards_are_contiguous_even_and_cover_every_row_once(num_rows: int, num_shards: int) -> None:
    shards = [shard_range(num_rows, num_shards, shard) for shard in range(num_shards)]
    assert [row for shard in shards for row in shard] == list(range(num_rows))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_a_shard_outside_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="num_shards=2"):
        shard_range(10, 2, 2)


def test_one_shard_answers_prompts_then_held_out_with_the_row_seeds(expected: list[GeneratedRow]) -> None:
    ids = [f"ex-{i}" for i in range(NUM_PROMPTS + NUM_HELD_OUT)]
    assert [(row.example_id, row.seed) for row in expected] == [(name, row_seed(5, "generate", 0, name)) for name in ids]
    assert len({row.token_ids for row in expected}) > 12


@pytest.mark.parametrize("settings", [{"num_shards": 4}, {"num_shards": 4, "batch_size": 16, "rows_per_part": 1}, {"num_shards": 30}])
def test_one_shard_equals_many(settings: dict[str, int], base: Path, expected: list[GeneratedRow], tmp_path: Path) -> None:
    assert run_all_shards(tmp_path / "run", base, **settings) == expected


def test_a_shard_makes_no_row_of_another(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_run(tmp_path / "run", base, make_config(num_shards=4))
    made: list[str] = []
    create = PromptRow.__init__
    monkeypatch.setattr(PromptRow, "__init__", lambda row, *values: made.append(values[0]) or create(row, *values))
    ids = [row.example_id for row in answers(generate.run(replace(context, shard=3)))]
    assert ids == ["ex-11", "ex-12", "ex-13", "ex-14"]
    assert made == ids


def test_a_shard_s_files_are_the_same_bytes_on_every_run(base: Path, tmp_path: Path) -> None:
    contents = []
    for name, batch_size in (("a", 3), ("b", 9)):
        context = make_run(tmp_path / name, base, make_config(batch_size=batch_size))
        parts = [path for path in generate.run(context).files if path.suffix == ".parquet"]
        contents.append([path.read_bytes() for path in parts])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4  # 15 rows in parts of 4


def test_a_shard_that_was_stopped_keeps_its_parts_and_answers_the_rest(
    base: Path, expected: list[GeneratedRow], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="spin_megatron")
    context = make_run(tmp_path / "run", base, make_config())
    first = context.layout.part(0, 0, 0)
    stopped = generate.run(replace(context, stop_requested=first.exists))
    assert stopped.stopped
    kept = {path: path.stat().st_mtime_ns for path in context.layout.shard(0, 0).glob("part_*.parquet")}
    assert 1 <= len(kept) < 4
    assert f"stopped on request: {4 * len(kept)} of 15 answers are kept, in whole parts" in caplog.text
    output = generate.run(context)
    assert answers(output) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert output.summary["throughput"]["requests"] == 15 - 4 * len(kept)


def test_a_crash_in_the_middle_leaves_whole_parts_and_the_rest_is_answered(
    base: Path, expected: list[GeneratedRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_run(tmp_path / "run", base, make_config())
    decode, steps = HfLoop._decode, iter(range(100))

    def failing(self: HfLoop, rows: list) -> torch.Tensor:
        if next(steps) == 25:
            raise MemoryError("out of memory")
        return decode(self, rows)

    monkeypatch.setattr(HfLoop, "_decode", failing)
    with pytest.raises(MemoryError):
        generate.run(context)
    monkeypatch.setattr(HfLoop, "_decode", decode)
    names = sorted(os.listdir(context.layout.shard(0, 0)))
    assert "part_00000.parquet" in names
    assert "part_00003.parquet" not in names
    assert answers(generate.run(context)) == expected


def test_a_finished_shard_loads_no_engine(
    base: Path, expected: list[GeneratedRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_run(tmp_path / "run", base, make_config())
    generate.run(context)
    monkeypatch.setattr(hf_loop, "load", None)
    assert answers(generate.run(context)) == expected


@pytest.mark.parametrize("change", ["engine", "temperature", "prompts"])
def test_parts_of_another_engine_sampling_or_prompts_are_not_continued(change: str, base: Path, tmp_path: Path) -> None:
    context = make_run(tmp_path / "run", base, make_config())
    before = answers(generate.run(context))
    if change == "engine":
        finish_engine(context, key="another")
    elif change == "temperature":
        context = replace(context, config=make_config(temperature=0.3))
    else:
        rows = read_rows(context.layout.held_out, PromptRow)
        write_rows(context.layout.held_out, [replace(rows[0], prompt_ids=(9, 9)), *rows[1:]], PromptRow)
    output = generate.run(context)
    assert output.summary["throughput"]["requests"] == 15
    assert (answers(output) == before) == (change == "engine")


def test_a_part_with_other_examples_is_refused(base: Path, tmp_path: Path) -> None:
    context = make_run(tmp_path / "run", base, make_config())
    generate.run(context)
    first, second = context.layout.part(0, 0, 0), context.layout.part(0, 0, 1)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"part_00000\.parquet holds 4 rows that are not"):
        generate.run(context)


def test_a_corrupt_part_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    context = make_run(tmp_path / "run", base, make_config())
    generate.run(context)
    context.layout.part(0, 0, 2).write_bytes(b"PAR1 cut short")
    with pytest.raises(ValueError, match=r"part_00002\.parquet cannot be read"):
        generate.run(context)


def test_generate_without_an_engine_names_the_command_that_builds_it(base: Path, tmp_path: Path) -> None:
    context = make_run(tmp_path / "run", base, make_config())
    context.layout.manifest(context.layout.engine(0)).unlink()
    with pytest.raises(StageIncomplete, match="spin-megatron build-engine"):
        generate.run(context)


def test_build_engine_says_what_will_run_even_where_nothing_is_built(base: Path, tmp_path: Path) -> None:
    context = make_run(tmp_path / "run", base, make_config())
    context.layout.manifest(context.layout.engine(0)).unlink()
    output = build_engine.run(context)
    record = json.loads(context.layout.engine_record(0).read_text())
    assert list(output.files) == [context.layout.engine_record(0)]
    assert (record["engine"], record["needs_build"], record["dtype"]) == ("builtin", False, "float32")
    assert record["eos_ids"] == [2, 3]
    assert record["limits"] == {"max_prompt_tokens": 20, "max_new_tokens": 10}


def test_build_engine_refuses_an_unknown_engine_with_the_valid_choices(base: Path, tmp_path: Path) -> None:
    context = make_run(tmp_path / "run", base, make_config())
    with pytest.raises(ValueError, match=r"generate\.engine='vlm'.*builtin"):
        build_engine.run(replace(context, config=make_config(engine="vlm")))


def test_the_summary_counts_what_was_answered(base: Path, tmp_path: Path) -> None:
    output = generate.run(make_run(tmp_path / "run", base, make_config()))
    rows = answers(output)
    tokens = sum(len(row.token_ids) for row in rows)
    assert output.summary["responses"] == 15
    assert output.summary["generated_tokens"] == tokens
    assert output.summary["mean_response_tokens"] == tokens / 15
    assert output.summary["quality"]["truncated"] == sum(len(row.token_ids) == 10 and row.token_ids[-1] not in (2, 3) for row in rows) / 15
    throughput = output.summary["throughput"]
    assert throughput["requests_per_second"] * throughput["seconds"] == pytest.approx(15)
    assert throughput["generated_tokens_per_second"] * throughput["seconds"] == pytest.approx(tokens)
    assert throughput["prompt_tokens_per_second"] * throughput["seconds"] == pytest.approx(sum(range(1, 16)))
    assert throughput["truncated_share"] == output.summary["quality"]["truncated"]
    assert 0 < throughput["in_flight_use"] <= 1
    assert output.summary["engine"]["rows_independent"] is True


def test_answers_that_end_in_nothing_usable_stop_the_shard_where_asked_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quality, "MIN_ANSWERS", 15)
    context = make_run(tmp_path / "run", base, make_config(quality={"max_truncated": 0.01, "on_excess": "stop"}))
    with pytest.raises(ValueError, match=r"truncated, more than quality\.max_truncated=0\.01.*quality\.on_excess=warn"):
        generate.run(context)
    assert len(list(context.layout.shard(0, 0).glob("part_*.parquet"))) == 4  # nothing is thrown away
    warned = replace(context, config=make_config(quality={"max_truncated": 0.01}))
    with caplog.at_level("WARNING", logger="spin_megatron"):
        assert len(answers(generate.run(warned))) == 15
    assert "quality.max_truncated=0.01" in caplog.text


def test_a_shard_too_small_for_a_rate_is_not_judged(base: Path, tmp_path: Path) -> None:
    context = make_run(tmp_path / "run", base, make_config(quality={"max_truncated": 0.0, "on_excess": "stop"}))
    assert len(answers(generate.run(context))) == 15
