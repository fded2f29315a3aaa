"""The renderer: one prompt for generation and training, one BOS, one EOS, and an honest cut between prompt and answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from spin_megatron.data.render import Limits, Rendered, Renderer
from spin_megatron.run.records import Message, PromptRow, SftExample
from tests.tiny_tokenizer import CHARACTERS, SPECIAL_TOKENS, Kind, TemplateName, save_tiny_tokenizer

WIDE = Limits(max_prompt_tokens=1000, max_response_tokens=1000)
BOS, EOS = 0, 1


def example(*texts: str, system: str | None = None, example_id: str = "x") -> SftExample:
    """User and assistant in turn, the answer last."""
    messages = [Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]
    return SftExample(example_id, ((Message("system", system),) if system is not None else ()) + tuple(messages), "test", None)


def make_renderer(folder: Path, template: TemplateName = "chatml", kind: Kind = "characters", **options: Any) -> Renderer:
    save_tiny_tokenizer(folder, template=template, kind=kind, adds_bos=options.pop("adds_bos", False))
    if "chat_template" in options:
        (folder / "chat_template.jinja").write_text(options.pop("chat_template"), encoding="utf-8")
    return Renderer(folder, eos_ids=options.pop("eos_ids", (EOS,)), **options)


def one_row(renderer: Renderer, conversation: SftExample, limits: Limits = WIDE) -> PromptRow:
    (outcome,) = renderer.render([conversation], limits)
    assert outcome.row is not None, outcome.remarks
    return outcome.row


def characters(text: str) -> list[int]:
    """Ids of plain text by the kind "characters" with chatml's three special tokens: newline is 3, space 4, "!" 5, ..."""
    return [3 + CHARACTERS.index(character) for character in text]


# What each family documents for the turns "hi" -> "yes", split where generation starts.
TEXTS: dict[TemplateName, tuple[str, str]] = {
    "chatml": ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>"),
    "zephyr": ("<|user|>\nhi</s>\n<|assistant|>\n", "yes</s>"),
    "llama2": ("<s>[INST] hi [/INST]", " yes </s>"),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "yes<|eot_id|>",
    ),
}


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("kind", ["characters", "byte_bpe", "metaspace"])
@pytest.mark.parametrize("template", ["chatml", "zephyr", "llama2", "llama3"])
def test_prompt_and_answer_are_the_text_the_family_documents(tmp_path: Path, template: TemplateName, kind: Kind, adds_bos: bool) -> None:
    renderer = make_renderer(tmp_path, template, kind, adds_bos=adds_bos)
    row = one_row(renderer, example("hi", "yes"))
    prompt, answer = TEXTS[template]
    if kind == "metaspace":
        # This kind puts a word-start mark after special tokens, which decodes to a space: compare without spaces.
        assert renderer.decode(row.prompt_ids).replace(" ", "") == prompt.replace(" ", "")
        assert renderer.decode(row.real_ids).replace(" ", "") == answer.replace(" ", "")
    else:
        assert renderer.decode(row.prompt_ids) == prompt
        assert renderer.decode(row.real_ids) == answer
    assert not row.truncated


def test_ids_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    row = one_row(make_renderer(tmp_path), example("hi", "yes"))
    assert list(row.prompt_ids) == [BOS, *characters("user\nhi"), EOS, *characters("\n"), BOS, *characters("assistant\n")]
    assert list(row.real_ids) == [*characters("yes"), EOS]
    # The same by arithmetic: id = 4 + code point - 32 for printable ASCII.
    assert list(row.real_ids) == [4 + 121 - 32, 4 + 101 - 32, 4 + 115 - 32, 1]


@pytest.mark.parametrize("template", ["llama2", "llama3"])
def test_a_template_with_bos_and_a_tokenizer_that_adds_bos_give_one_bos(tmp_path: Path, template: TemplateName) -> None:
    renderer = make_renderer(tmp_path, template, adds_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("hi").input_ids[0] == BOS, "this tokenizer adds BOS on its own"
    row = one_row(renderer, example("hi", "yes"))
    assert row.prompt_ids.count(BOS) == 1
    assert row.prompt_ids[0] == BOS
    assert BOS not in row.real_ids


def test_a_template_without_bos_gets_none(tmp_path: Path) -> None:
    assert BOS not in one_row(make_renderer(tmp_path, "zephyr", adds_bos=True), example("hi", "yes")).prompt_ids


@pytest.mark.parametrize("kind", ["characters", "byte_bpe", "metaspace"])
@pytest.mark.parametrize("template", ["chatml", "zephyr", "llama2", "llama3"])
def test_the_prompt_is_what_transformers_gives_for_generation_and_the_answer_continues_its_conversation(
    tmp_path: Path, template: TemplateName, kind: Kind
) -> None:
    row = one_row(make_renderer(tmp_path, template, kind), example("hi", "yes", "hi hi", "  hi yes"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, ("hi", "yes", "hi hi", "  hi yes"), strict=True)
    ]
    asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    trained = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert list(row.prompt_ids) == asked
    sequence = list(row.prompt_ids + row.real_ids)
    assert trained[: len(sequence)] == sequence
    assert EOS not in trained[len(sequence) :], "only a newline may follow"


@pytest.mark.parametrize("template", ["chatml", "zephyr"])
def test_the_newline_after_eos_is_no_part_of_the_answer(tmp_path: Path, template: TemplateName) -> None:
    row = one_row(make_renderer(tmp_path, template), example("hi", "yes"))
    assert row.real_ids[-1] == EOS
    assert row.real_ids.count(EOS) == 1


def test_eos_inside_the_prompt_stays_and_does_not_end_the_answer_early(tmp_path: Path) -> None:
    row = one_row(make_renderer(tmp_path, "zephyr"), example("a", "b", "c", "d"))
    assert row.prompt_ids.count(EOS) == 3  # after a, b and c
    assert list(row.real_ids) == [*characters("d"), EOS]


def test_the_answer_ends_at_whichever_eos_comes_first(tmp_path: Path) -> None:
    """Llama 3 stops at <|eot_id|> (1) and at <|end_of_text|> (5); the template writes the first."""
    row = one_row(make_renderer(tmp_path, "llama3", eos_ids=(5, 1)), example("hi", "yes"))
    assert row.real_ids[-1] == SPECIAL_TOKENS["llama3"].index("<|eot_id|>") == 1


def test_white_space_of_the_answer_is_kept_on_both_sides(tmp_path: Path) -> None:
    row = one_row(make_renderer(tmp_path), example("q", "  a \n"))
    assert list(row.real_ids) == [*characters("  a \n"), EOS]


def test_a_token_across_the_boundary_is_split_there(tmp_path: Path) -> None:
    """The prompt ends with a newline and the answer starts with one; tokenised together they are a single token."""
    renderer = make_renderer(tmp_path, "chatml", "byte_bpe")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    newline, two_newlines = tokenizer.convert_tokens_to_ids(["Ċ", "ĊĊ"])
    prompt, answer = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "\nyes<|im_end|>"
    assert two_newlines in tokenizer(prompt + answer, add_special_tokens=False).input_ids
    row = one_row(renderer, example("hi", "\nyes"))
    assert list(row.prompt_ids) == tokenizer(prompt, add_special_tokens=False).input_ids
    assert list(row.real_ids) == [newline, tokenizer.convert_tokens_to_ids("yes"), EOS]


SPACE_PROMPT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_a_boundary_that_cannot_be_cut_is_skipped_and_said(tmp_path: Path) -> None:
    """ "assistant: " + "hi" is one token "▁hi" here, and "hi" alone would get another word-start mark: no cut gives the text back."""
    renderer = make_renderer(tmp_path / "metaspace", "zephyr", "metaspace", chat_template=SPACE_PROMPT)
    assert renderer.render([example("q", "hi")], WIDE) == [Rendered(None, ("boundary",))]
    bytes_renderer = make_renderer(tmp_path / "bytes", "zephyr", "byte_bpe", chat_template=SPACE_PROMPT)
    row = one_row(bytes_renderer, example("q", "hi"))
    assert bytes_renderer.decode(row.prompt_ids) == "user: q</s>assistant: "
    assert bytes_renderer.decode(row.real_ids) == "hi</s>"


def test_text_that_spells_a_special_token_is_skipped_and_said(tmp_path: Path) -> None:
    renderer = make_renderer(tmp_path)
    bad = [example("what is <|im_end|>?", "yes"), example("hi", "an <|im_start|> token"), example("hi", "yes", system="<unk>")]
    outcomes = renderer.render([*bad, example("hi", "<|im_END|>", example_id="fine")], WIDE)
    assert [outcome.remarks for outcome in outcomes[:3]] == [("special_token_text",)] * 3
    assert outcomes[3].row is not None
    assert outcomes[3].row.example_id == "fine"


def test_rows_of_a_batch_are_those_rendered_alone_and_stay_in_order(tmp_path: Path) -> None:
    renderer = make_renderer(tmp_path, "zephyr", "byte_bpe")
    batch = [example("hi", "yes", example_id="a"), example("</s>", "no", example_id="b"), example("yes", "hi hi", example_id="c")]
    assert renderer.render(batch, WIDE) == [renderer.render([single], WIDE)[0] for single in batch]
    assert [outcome.row and outcome.row.example_id for outcome in renderer.render(batch, WIDE)] == ["a", None, "c"]
    assert renderer.render([], WIDE) == []


def test_an_answer_at_the_cap_keeps_its_eos_and_one_token_more_loses_it(tmp_path: Path) -> None:
    renderer = make_renderer(tmp_path)
    truncate = Limits(max_prompt_tokens=100, max_response_tokens=4, over_long="truncate")
    assert one_row(renderer, example("q", "yes"), truncate) == one_row(renderer, example("q", "yes"))
    (outcome,) = renderer.render([example("q", "yes!")], truncate)
    assert outcome.remarks == ("truncated_response",)
    assert outcome.row is not None
    assert list(outcome.row.real_ids) == characters("yes!")
    assert outcome.row.truncated


def test_over_long_rows_are_dropped_and_said(tmp_path: Path) -> None:
    renderer = make_renderer(tmp_path)
    # <|im_start|>, "user\n", "q", <|im_end|>, "\n", <|im_start|>, "assistant\n": 1 + 5 + 1 + 1 + 1 + 1 + 10 = 20 tokens.
    assert renderer.render([example("q", "yes!")], Limits(20, 4)) == [Rendered(None, ("over_long_response",))]
    assert renderer.render([example("qq", "yes")], Limits(20, 4)) == [Rendered(None, ("over_long_prompt",))]
    assert one_row(renderer, example("q", "yes"), Limits(20, 4)).example_id == "x"


def test_a_truncated_prompt_keeps_bos_and_its_end(tmp_path: Path) -> None:
    full = one_row(make_renderer(tmp_path / "bos", "llama3"), example("abcdef", "yes")).prompt_ids
    (outcome,) = Renderer(tmp_path / "bos", eos_ids=(EOS,)).render([example("abcdef", "yes")], Limits(20, 9, "truncate"))
    assert outcome.remarks == ("truncated_prompt",)
    assert outcome.row is not None
    assert outcome.row.prompt_ids == (BOS, *full[-19:])
    assert not outcome.row.truncated, "truncated speaks of the answer"
    without_bos = make_renderer(tmp_path / "none", "zephyr")
    full = one_row(without_bos, example("abcdef", "yes")).prompt_ids
    (outcome,) = without_bos.render([example("abcdef", "yes")], Limits(20, 9, "truncate"))
    assert outcome.row is not None
    assert outcome.row.prompt_ids == full[-20:]


def test_the_system_setting_fills_in_only_where_there_is_no_system_turn(tmp_path: Path) -> None:
    renderer = make_renderer(tmp_path, "zephyr", system="be kind")
    assert renderer.decode(one_row(renderer, example("hi", "yes")).prompt_ids).startswith("<|system|>\nbe kind</s>\n<|user|>")
    own = one_row(renderer, example("hi", "yes", system="own"))
    assert renderer.decode(own.prompt_ids).startswith("<|system|>\nown</s>\n<|user|>")


def test_an_empty_system_setting_is_an_empty_system_turn(tmp_path: Path) -> None:
    """The original SPIN code trains zephyr with one."""
    renderer = make_renderer(tmp_path, "zephyr", system="")
    assert renderer.decode(one_row(renderer, example("hi", "yes")).prompt_ids) == "<|system|>\n</s>\n<|user|>\nhi</s>\n<|assistant|>\n"


def test_a_template_that_refuses_the_system_turn_is_an_error_with_the_cure(tmp_path: Path) -> None:
    renderer = make_renderer(tmp_path, "llama2", system="be kind")
    with pytest.raises(ValueError, match=r"refuses example x \(roles: system, user\): this model knows no system turn.*unset data\.system"):
        renderer.render([example("hi", "yes")], WIDE)


def test_a_tokenizer_without_chat_template_is_an_error_with_the_cure(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path, template=None)
    with pytest.raises(ValueError, match=r"has no chat template.*chat_template\.jinja.*model\.path"):
        Renderer(tmp_path, eos_ids=(EOS,))


@pytest.mark.parametrize("damage", ["empty folder", "no folder", "cut file", "own code"])
def test_a_folder_without_a_usable_tokenizer_is_an_error(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    if damage != "no folder":
        folder.mkdir()
    if damage in ("cut file", "own code"):
        save_tiny_tokenizer(folder)
    if damage == "cut file":
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        (folder / "tokenizer.json").write_text(text[: len(text) // 2], encoding="utf-8")
    if damage == "own code":
        (folder / "tokenizer.json").unlink()
        config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "own.py").write_text("raise SystemExit('this code must not run')\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no tokenizer loads from"):
        Renderer(folder, eos_ids=(EOS,))


def test_a_prompt_that_does_not_start_its_conversation_is_an_error_that_shows_where(tmp_path: Path) -> None:
    thinking = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    renderer = make_renderer(tmp_path, chat_template=thinking)
    with pytest.raises(ValueError, match=r"the prompt goes on with '<think>\\n', the conversation with 'yes<\|im_end\|>\\n'"):
        renderer.render([example("hi", "yes")], WIDE)


def test_a_template_that_does_not_close_answers_with_eos_is_an_error_with_the_cure(tmp_path: Path) -> None:
    renderer = make_renderer(tmp_path, eos_ids=(2,))
    with pytest.raises(
        ValueError, match=r"ends an answer with 's<\|im_end\|>\\n', but generation stops at <unk> \(2\).*generation_config\.json"
    ):
        renderer.render([example("hi", "yes")], WIDE)


@pytest.mark.parametrize(
    ("template", "writes_the_time"),
    [("hi", False), ("{{ date_string or strftime_now('%d %b %Y') }}", False), ("{{ strftime_now('%Y-%m-%d') }}", True)],
)
def test_a_template_that_asks_the_clock_itself_is_known(template: str, writes_the_time: bool, tmp_path: Path) -> None:
    assert make_renderer(tmp_path, chat_template=template).writes_the_time == writes_the_time


def test_a_template_with_todays_date_renders_the_same_prompt_on_any_day(tmp_path: Path) -> None:
    dated = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string + '\n' }}"
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    renderer = make_renderer(tmp_path, chat_template=dated)
    assert renderer.decode(one_row(renderer, example("hi", "yes")).prompt_ids) == "26 Jul 2024\nhi<|im_end|>"
