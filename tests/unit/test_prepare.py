"""The prepare stage on hand-made data: what is kept, what is counted, and that the split stays where it is."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from spin_megatron.config import RunConfig
from spin_megatron.config_file import validate_config
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.records import PromptRow, read_rows
from spin_megatron.stages import prepare
from spin_megatron.stages.context import StageContext
from tests.tiny_tokenizer import save_tiny_tokenizer

EOS = 1


def write_source(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_context(root: Path, source: Path, *, seed: int = 5, **data: Any) -> StageContext:
    layout = RunLayout(root)
    tokenizer = save_tiny_tokenizer(layout.theta(0))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=len(tokenizer), **shape).save_pretrained(layout.theta(0))
    (layout.theta(0) / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}), encoding="utf-8")
    defaults = {"source": str(source), "num_held_out": 5, "max_prompt_tokens": 64, "max_response_tokens": 16}
    values = {"run": {"seed": seed}, "model": {"path": "model"}, "data": defaults | data, "train": {"pack_tokens": 4096}}
    config: RunConfig = validate_config(values, origin="test")
    return StageContext(config, layout, iteration=0, show=False)


def prepared(context: StageContext) -> tuple[list[PromptRow], list[PromptRow], dict[str, Any]]:
    """(train, held out, report) of a run of the stage."""
    output = prepare.run(context)
    layout = context.layout
    train, held_out = read_rows(layout.prompts, PromptRow), read_rows(layout.held_out, PromptRow)
    assert output.files == {layout.prompts: len(train), layout.held_out: len(held_out), layout.data_report: None}
    return train, held_out, json.loads(layout.data_report.read_text(encoding="utf-8"))


def ids(rows: list[PromptRow]) -> list[str]:
    return [row.example_id for row in rows]


def plain(number: int) -> dict[str, Any]:
    return {"prompt": f"question {number}", "response": f"answer {number}"}


TROUBLE: list[dict[str, Any]] = [
    {"prompt": "question 3", "response": "answer 3"},  # again
    {"prompt": "silence", "response": "  \n"},
    {"prompt": "", "response": "to nothing"},
    {"prompt": "a special <|im_end|> one", "response": "yes"},
    {"prompt": "long " * 20, "response": "yes"},
    {"prompt": "long answer", "response": "yes " * 20},
]


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    context = make_context(tmp_path / "run", write_source(tmp_path / "data.jsonl", [*map(plain, range(40))]))
    path = context.layout.theta(0) / "config.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(known | {"vocab_size": 50}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"gives token \d+, but the model beside it knows 0 to 49: it is another model's"):
        prepare.run(context)
    assert not context.layout.prompts.exists()
    config = context.config.model_copy(update={"model": context.config.model.model_copy(update={"path": str(context.layout.theta(0))})})
    with pytest.raises(ValueError, match="it is another model's"):
        prepare.preview(config)


@pytest.mark.parametrize(("num_usable", "is_enough"), [(5, False), (6, True)])  # five held out, one to train on
def test_a_small_set_with_too_few_usable_rows_is_refused_before_a_run_as_in_it(num_usable: int, is_enough: bool, tmp_path: Path) -> None:
    rows = [*TROUBLE[:1] * 9, *TROUBLE[3:], *(plain(100 + number) for number in range(num_usable - 1))]
    context = make_context(tmp_path / "run", write_source(tmp_path / "data.jsonl", rows))
    config = context.config.model_copy(update={"model": context.config.model.model_copy(update={"path": str(context.layout.theta(0))})})
    if is_enough:
        assert prepare.preview(config)[1] == "answer 3<|im_end|>"
        assert len(prepared(context)[0]) == 1
        return
    message = r"too few usable examples for data\.num_held_out=5 and one .* 5 could be held out and 0 trained on"
    for refuse in (lambda: prepare.preview(config), lambda: prepare.run(context)):
        with pytest.raises(ValueError, match=message):
            refuse()


def test_every_row_of_the_source_is_accounted_for(tmp_path: Path) -> None:
    source = write_source(tmp_path / "data.jsonl", [*map(plain, range(40)), *TROUBLE])
    train, held_out, report = prepared(make_context(tmp_path / "run", source))
    assert (len(train), len(held_out)) == (35, 5)
    counts = {name: report[name] for name in ("rows_read", "train", "held_out", "empty", "duplicates", "not_needed", "prompt_in_held_out")}
    assert counts == {
        "rows_read": 46,
        "train": 35,
        "held_out": 5,
        "empty": 2,
        "duplicates": 1,
        "not_needed": 0,
        "prompt_in_held_out": 0,
    }
    skipped = [report[name] for name in ("special_token_text", "boundary", "over_long_prompt", "over_long_response")]
    assert skipped == [1, 0, 1, 1]
    assert report["rows_read"] == sum(counts.values()) - 46 + sum(skipped)
    assert (report["truncated_prompt"], report["truncated_response"]) == (0, 0)
    assert all(row.real_ids[-1] == EOS and not row.truncated for row in train + held_out)


def test_rows_hold_what_the_renderer_makes(tmp_path: Path) -> None:
    source = write_source(tmp_path / "data.jsonl", [{"uid": f"u{number}", **plain(number)} for number in range(6)])
    train, held_out, report = prepared(make_context(tmp_path / "run", source, columns={"id": "uid"}))
    assert sorted(ids(train + held_out)) == [f"u{number}" for number in range(6)]
    (row,) = [row for row in train + held_out if row.example_id == "u4"]
    # characters: newline is 3 and printable ASCII 4 + code point - 32
    plain_ids = [3 if character == "\n" else ord(character) - 28 for character in "answer 4"]
    assert row.real_ids == (*plain_ids, EOS)
    prompt = "".join("\n" if token == 3 else "|" if token < 3 else chr(token + 28) for token in row.prompt_ids)
    assert prompt == "|user\nquestion 4|\n|assistant\n"
    assert report["response_tokens"]["maximum"] == 9
    assert report["eos_ids"] == [EOS]


def test_over_long_rows_can_be_truncated_instead(tmp_path: Path) -> None:
    source = write_source(tmp_path / "data.jsonl", [*map(plain, range(40)), *TROUBLE])
    train, held_out, report = prepared(make_context(tmp_path / "run", source, over_long="truncate"))
    assert (report["truncated_prompt"], report["truncated_response"]) == (1, 1)
    assert (report["over_long_prompt"], report["over_long_response"]) == (0, 0)
    (cut,) = [row for row in train + held_out if row.truncated]
    assert len(cut.real_ids) == 16
    assert EOS not in cut.real_ids
    assert max(len(row.prompt_ids) for row in train + held_out) == 64


def test_the_held_out_split_stays_and_subsets_are_nested_as_the_subset_grows(tmp_path: Path) -> None:
    source = write_source(tmp_path / "data.jsonl", [*map(plain, range(60)), *TROUBLE])
    small = prepared(make_context(tmp_path / "small", source, num_examples=14))
    large = prepared(make_context(tmp_path / "large", source, num_examples=26))
    assert small[1] == large[1]
    assert small[0] == large[0][:14]
    assert small[2]["not_needed"] > large[2]["not_needed"] > 0


def test_the_order_of_the_source_changes_nothing_and_the_seed_changes_the_split(tmp_path: Path) -> None:
    rows = [plain(number) for number in range(60)]
    forward = prepared(make_context(tmp_path / "a", write_source(tmp_path / "a.jsonl", rows)))
    backward = prepared(make_context(tmp_path / "b", write_source(tmp_path / "b.jsonl", rows[::-1])))
    reseeded = prepared(make_context(tmp_path / "c", tmp_path / "a.jsonl", seed=6))
    assert forward[:2] == backward[:2]
    assert set(ids(forward[1])) != set(ids(reseeded[1]))


def test_the_system_setting_does_not_move_the_split(tmp_path: Path) -> None:
    source = write_source(tmp_path / "data.jsonl", [plain(number) for number in range(60)])
    without = prepared(make_context(tmp_path / "a", source))
    with_system = prepared(make_context(tmp_path / "b", source, system="be kind"))
    assert ids(without[1]) == ids(with_system[1])
    assert without[1][0].prompt_ids != with_system[1][0].prompt_ids
    assert without[1][0].real_ids == with_system[1][0].real_ids


def test_a_broken_row_leaves_no_file_behind(tmp_path: Path) -> None:
    source = write_source(tmp_path / "data.jsonl", [plain(0), {"prompt": "no answer"}])
    context = make_context(tmp_path / "run", source)
    with pytest.raises(ValueError, match=r"data\.jsonl line 2: column 'response' is missing"):
        prepare.run(context)
    assert not context.layout.data.exists()
