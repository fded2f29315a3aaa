"""The merge stage on hand-made shards: every id once, the window, what is dropped, frozen packs, the report."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spin_megatron.config import RunConfig
from spin_megatron.config_file import validate_config
from spin_megatron.data.leaks import Sample
from spin_megatron.generation import quality
from spin_megatron.run import manifest as manifests
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import Manifest, StageIncomplete
from spin_megatron.run.records import FinishReason, GeneratedRow, Pack, PromptRow, SpinPair, read_rows, write_rows
from spin_megatron.stages import merge
from spin_megatron.stages.context import StageContext
from tests.tiny_tokenizer import save_tiny_tokenizer

EOS = 1
TRAIN_IDS = ("a", "b", "c", "d", "e")
HELD_OUT_IDS = ("v", "w")


def prompt_row(number: int, example_id: str) -> PromptRow:
    return PromptRow(example_id, (10 + number, 9), (20 + number, 21, EOS), truncated=False)


PROMPTS = [prompt_row(number, example_id) for number, example_id in enumerate(TRAIN_IDS)]
HELD_OUT = [prompt_row(5 + number, example_id) for number, example_id in enumerate(HELD_OUT_IDS)]


def answer(example_id: str, *token_ids: int, finish_reason: FinishReason = "stop") -> GeneratedRow:
    """By default the tokens 30, 31, ..., different for each id, and EOS."""
    tokens = token_ids or (30 + (TRAIN_IDS + HELD_OUT_IDS).index(example_id), 40, 41, EOS)
    return GeneratedRow(example_id, tokens, finish_reason, seed=7)


def answers(**changed: GeneratedRow) -> list[GeneratedRow]:
    return [changed.get(example_id, answer(example_id)) for example_id in TRAIN_IDS + HELD_OUT_IDS]


def make_context(root: Path, *, iteration: int = 0, num_shards: int = 2, window: int | list[int] = 2, **train: Any) -> StageContext:
    layout = RunLayout(root)
    for theta in range(iteration + 1):
        save_tiny_tokenizer(layout.theta(theta))
        (layout.theta(theta) / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS]}), encoding="utf-8")
    write_rows(layout.prompts, PROMPTS, PromptRow)
    write_rows(layout.held_out, HELD_OUT, PromptRow)
    values = {
        "run": {"seed": 3},
        "model": {"path": "model"},
        "data": {"source": "data", "max_prompt_tokens": 4, "max_response_tokens": 6, "window": window},
        "generate": {"num_shards": num_shards},
        "train": {"pack_tokens": 24} | train,
    }
    config: RunConfig = validate_config(values, origin="test")
    return StageContext(config, layout, iteration, show=False)


def write_shards(context: StageContext, *shards: Sequence[GeneratedRow], rows_per_part: int = 2) -> None:
    """Finished shards as the generate stage leaves them: parts and a manifest."""
    layout, t = context.layout, context.iteration
    for shard, rows in enumerate(shards):
        folder = layout.shard(t, shard)
        starts = range(0, len(rows), rows_per_part)
        paths = [layout.part(t, shard, number) for number in range(len(starts))]
        folder.mkdir(parents=True, exist_ok=True)
        for path, start in zip(paths, starts, strict=True):
            write_rows(path, rows[start : start + rows_per_part], GeneratedRow)
        outputs = tuple(manifests.output_file(folder, path) for path in paths)
        manifests.write_manifest(folder, Manifest("generate", t, shard, "key", {}, {}, outputs))


def in_two_shards(rows: list[GeneratedRow]) -> tuple[list[GeneratedRow], list[GeneratedRow]]:
    """Seven rows: shard 0 has rows 0 to 2, shard 1 rows 3 to 6."""
    return rows[:3], rows[3:]


def merged(context: StageContext) -> tuple[list[SpinPair], list[SpinPair], dict[str, Any]]:
    """(train pairs, held-out pairs, report) of a run of the stage."""
    output = merge.run(context)
    layout, t = context.layout, context.iteration
    train, held_out = read_rows(layout.train_pairs(t), SpinPair), read_rows(layout.held_out_pairs(t), SpinPair)
    assert output.files == {
        layout.train_pairs(t): len(train),
        layout.held_out_pairs(t): len(held_out),
        layout.train_packs(t): len(read_rows(layout.train_packs(t), Pack)),
        layout.held_out_packs(t): len(read_rows(layout.held_out_packs(t), Pack)),
        layout.pairs_report(t): None,
    }
    return train, held_out, json.loads(layout.pairs_report(t).read_text(encoding="utf-8"))


def test_each_prompt_is_paired_with_its_own_answer(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    write_shards(context, *in_two_shards(answers()))
    train, held_out, report = merged(context)
    assert train[1] == SpinPair("0:b", (11, 9), (21, 21, EOS), (31, 40, 41, EOS), 0)
    assert held_out[0] == SpinPair("0:v", (15, 9), (25, 21, EOS), (35, 40, 41, EOS), 0)
    assert [pair.pair_id for pair in train] == ["0:a", "0:b", "0:c", "0:d", "0:e"]
    assert [pair.pair_id for pair in held_out] == ["0:v", "0:w"]
    assert (report["train_pairs"], report["held_out_pairs"]) == (5, 2)


def test_one_shard_equals_many_whatever_the_order_of_rows(tmp_path: Path) -> None:
    rows = answers()
    one, three = make_context(tmp_path / "one", num_shards=1), make_context(tmp_path / "three", num_shards=3)
    write_shards(one, rows)
    write_shards(three, rows[5:], [], rows[4::-1], rows_per_part=1)
    first, second = merged(one), merged(three)
    assert first == second
    for path in (RunLayout.train_packs, RunLayout.held_out_packs, RunLayout.train_pairs):
        assert path(one.layout, 0).read_bytes() == path(three.layout, 0).read_bytes()


def test_the_window_takes_the_iteration_before_from_the_second_iteration_on(tmp_path: Path) -> None:
    reports = []
    for t in range(3):
        context = make_context(tmp_path, iteration=t)
        write_shards(context, *in_two_shards(answers(a=answer("a", 50 + t, EOS))))
        train, held_out, report = merged(context)
        reports.append(report["train_pairs_by_iteration"])
        assert {pair.made_in_iteration for pair in held_out} == {t}, "the held-out set measures this opponent alone"
        assert len({pair.pair_id for pair in train}) == len(train)
        assert [pair.generated_ids for pair in train if pair.pair_id.endswith(":a")] == [(50 + u, EOS) for u in range(max(0, t - 1), t + 1)]
    assert reports == [{"0": 5}, {"0": 5, "1": 5}, {"1": 5, "2": 5}]


@pytest.mark.parametrize(
    ("window", "expected"),
    [(1, {"2": 5}), (3, {"0": 5, "1": 5, "2": 5}), (9, {"0": 5, "1": 5, "2": 5}), ([1, 1, 2], {"1": 5, "2": 5})],
)
def test_the_window_is_a_setting(tmp_path: Path, window: int | list[int], expected: dict[str, int]) -> None:
    for t in range(3):
        context = make_context(tmp_path, iteration=t, window=window)
        write_shards(context, *in_two_shards(answers()))
        report = merged(context)[2]
    assert report["train_pairs_by_iteration"] == expected


def test_equal_and_empty_answers_are_dropped_and_counted(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    rows = answers(a=answer("a", 20, 21, EOS), b=answer("b", EOS), c=answer("c", EOS), v=answer("v", 25, 21, EOS))
    write_shards(context, *in_two_shards(rows))
    train, held_out, report = merged(context)
    assert [pair.pair_id for pair in train] == ["0:d", "0:e"]
    assert [pair.pair_id for pair in held_out] == ["0:w"]
    assert (report["train"]["num_identical"], report["train"]["num_empty"]) == (1, 2)
    assert (report["train"]["identical"], report["train"]["empty"]) == (1 / 5, 2 / 5)
    assert (report["held_out"]["num_identical"], report["held_out"]["num_empty"]) == (1, 0)


def test_an_answer_that_only_starts_like_the_human_one_is_kept(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    write_shards(context, *in_two_shards(answers(a=answer("a", 20, 21, finish_reason="length"))))
    assert merged(context)[0][0].generated_ids == (20, 21)


def test_a_missing_shard_names_the_command_that_makes_it(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    first, second = in_two_shards(answers())
    write_shards(context, first, second)
    RunLayout.manifest(context.layout.shard(0, 1)).unlink()
    with pytest.raises(StageIncomplete, match=r"generate 0 shard 1, .*run: spin-megatron generate --run-dir .* --iteration 0 --shard 1"):
        merge.run(context)


def test_missing_answers_are_named_with_the_command_for_their_shards(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    first, second = in_two_shards(answers())
    write_shards(context, first, second[2:])
    with pytest.raises(StageIncomplete) as caught:
        merge.run(context)
    message = str(caught.value)
    assert "generate 0 has no answer to 2 of 7 prompts (d, e)" in message
    assert message.splitlines()[1:] == [f"  spin-megatron run {context.layout.quoted} --redo generate:0:1"]


def test_of_many_missing_answers_some_are_named(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    write_shards(context, [], answers()[6:])
    with pytest.raises(StageIncomplete, match=r"no answer to 6 of 7 prompts \(a, b, c and 3 more\)") as caught:
        merge.run(context)
    assert [line.rpartition(":")[2] for line in str(caught.value).splitlines()[1:]] == ["0", "1"]


def test_a_duplicate_answer_is_refused_with_both_places(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    first, second = in_two_shards(answers())
    write_shards(context, first, [*second, answer("b")])
    with pytest.raises(
        ValueError, match=r"example b is answered twice, in .*shard_00000.part_00000\.parquet and in .*shard_00001.*generate:0:1"
    ):
        merge.run(context)


def test_an_answer_to_no_prompt_of_this_run_is_refused(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    first, second = in_two_shards(answers())
    write_shards(context, [*first, answer("stranger", 30, EOS)], second)
    with pytest.raises(
        ValueError, match=r"shard_00000.part_00001\.parquet answers example stranger, which is no prompt of this run.*generate:0:0"
    ):
        merge.run(context)


def test_a_damaged_part_file_is_refused_by_name(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    write_shards(context, *in_two_shards(answers()))
    path = context.layout.part(0, 1, 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard_00001.part_00000\.parquet does not match the sha256.*--redo generate:0:1"):
        merge.run(context)
    path.unlink()
    with pytest.raises(ValueError, match=r"part_00000\.parquet is missing.*--redo generate:0:1"):
        merge.run(context)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (answer("a", 30, 31), "'stop', 2 tokens and EOS at [], expected [1]"),
        (answer("a", 30, EOS, 31, EOS), "'stop', 4 tokens and EOS at [1, 3], expected [3]"),
        (answer("a", 30, EOS, finish_reason="length"), "'length', 2 tokens and EOS at [1], expected []"),
        (answer("a", 30, 31, 32, 33, 34, 35, EOS), "has 7 tokens, more than data.max_response_tokens=6"),
        (GeneratedRow("a", (), "length", 7), "'length', 0 tokens"),
    ],
)
def test_an_answer_that_breaks_the_engines_promise_is_refused(tmp_path: Path, row: GeneratedRow, problem: str) -> None:
    context = make_context(tmp_path)
    write_shards(context, *in_two_shards(answers(a=row)))
    with pytest.raises(ValueError, match=r"the answer to example a in .*the engine is at fault") as caught:
        merge.run(context)
    assert problem in str(caught.value)


def test_when_every_answer_equals_the_human_one_there_is_nothing_to_learn(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    same = {row.example_id: answer(row.example_id, *row.real_ids) for row in PROMPTS}
    write_shards(context, *in_two_shards(answers(**same)))
    with pytest.raises(ValueError, match=r"iteration 0 has no training pair: 5 generated answers equal the human ones and 0 are empty"):
        merge.run(context)


@pytest.mark.parametrize(("share_prompt", "tokens_of_a_pair"), [(True, 2 + 2 + 3), (False, 2 * 2 + 2 + 3)])
def test_packs_hold_every_pair_once_and_count_its_tokens(tmp_path: Path, share_prompt: bool, tokens_of_a_pair: int) -> None:
    """A pair here: 2 prompt tokens, answers of 3 and 4 tokens of which the last is not computed."""
    context = make_context(tmp_path, share_prompt=share_prompt, max_pairs_per_pack=2)
    write_shards(context, *in_two_shards(answers()))
    train, _, report = merged(context)
    packs = read_rows(context.layout.train_packs(0), Pack)
    assert sorted(pair_id for pack in packs for pair_id in pack.pair_ids) == [pair.pair_id for pair in train]
    assert [(len(pack.pair_ids), pack.num_tokens) for pack in packs] == [
        (2, 2 * tokens_of_a_pair),
        (2, 2 * tokens_of_a_pair),
        (1, tokens_of_a_pair),
    ]
    assert report["packs"] == 3
    assert report["padding_share"] == pytest.approx(1 - 5 * tokens_of_a_pair / (3 * 24))
    assert [pack.pair_ids for pack in read_rows(context.layout.held_out_packs(0), Pack)] in ([("0:v", "0:w")], [("0:w", "0:v")])


def test_the_report_shows_leaks_warnings_and_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("spin_megatron"), "propagate", True)
    context = make_context(tmp_path)
    # Answers of the full 6 tokens without EOS; the human ones have 3 with EOS.
    cut = {row.example_id: answer(row.example_id, 30, 31, 32, 33, 34, 35, finish_reason="length") for row in PROMPTS}
    write_shards(context, *in_two_shards(answers(**cut)))
    with caplog.at_level(logging.WARNING):
        report = merged(context)[2]
    leaks = report["train"]
    assert (leaks["generated"]["without_eos"], leaks["generated"]["at_cap"], leaks["real"]["without_eos"]) == (1.0, 1.0, 0.0)
    assert (leaks["length_accuracy"], leaks["best_length_accuracy"], leaks["eos_accuracy"]) == (1.0, 1.0, 1.0)
    assert leaks["longer_is_real"] == 0.0
    assert "100.0% of answers are told apart by length alone" in caplog.text
    assert any("told apart by length alone" in warning for warning in leaks["warnings"])
    # Characters: id = 4 + code point - 32, so 20 is "0", 21 "1", 30 ":" and so on.
    assert report["samples"][0] == {"pair_id": "0:a", "prompt": "&%", "real": "01<|im_end|>", "generated": ":;<=>?"}
    assert len(report["samples"]) == 5


def test_the_sample_table_shows_brackets_as_they_are_the_end_of_prompts_and_the_start_of_answers() -> None:
    console = Console(record=True, width=200)
    samples = [Sample("0:a", "#" * 300 + "END", "[bold]real[/bold]", "BEGIN\x1b[2J" + "@" * 300)]
    console.print(merge._sample_table(samples, 3))
    text = console.export_text()
    assert "[bold]real[/bold]" in text
    # 240 characters each: "..." and 234 + "END"; "BEGIN" + 4 (clear the screen, were its first not replaced) + 228 and "...".
    assert (text.count("#"), text.count("@")) == (234, 228)
    assert "\x1b" not in text
    assert "END" in text
    assert "BEGIN" in text
    assert "y' (theta_3)" in text


def test_an_iteration_of_unusable_answers_is_stopped_though_every_shard_was_too_small_to_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "MIN_ANSWERS", 7)
    context = make_context(tmp_path)
    empty = {name: answer(name, EOS) for name in ("a", "b")}
    write_shards(context, *in_two_shards(answers(**empty)))
    config = context.config.model_copy(update={"quality": context.config.quality.model_copy(update={"on_excess": "stop"})})
    with pytest.raises(ValueError, match=r"28\.6% of the answers are empty, more than quality\.max_empty=0\.05"):
        merge.run(dataclasses.replace(context, config=config))
    merge.run(context)
    assert json.loads(context.layout.pairs_report(0).read_text())["quality"]["empty"] == 2 / 7
