"""Rows of every format become the same conversations; rows that do not fit are errors."""

from typing import Any

import pytest

from spin_megatron.data.formats import Turns, choose_format, content_id, read_conversation, read_id
from spin_megatron.run.records import Message

HELLO = (Message("user", "hi"), Message("assistant", "hello"))


def conversation(row: dict[str, Any], turns: Turns = "first", **options: Any) -> tuple[Message, ...]:
    return read_conversation(row, choose_format(row, **options), turns=turns)


def roles_and_texts(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("row", "format_name"),
    [
        ({"messages": roles_and_texts(("user", "hi"), ("assistant", "hello"))}, "messages"),
        ({"conversations": roles_and_texts(("user", "hi"), ("assistant", "hello"))}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "sharegpt"),
        ({"instruction": "hi", "input": "", "output": "hello"}, "alpaca"),
        ({"instruction": "hi", "input": None, "output": "hello"}, "alpaca"),
        ({"prompt": "hi", "response": "hello"}, "prompt_response"),
        ({"question": "hi", "answer": "hello"}, "prompt_response"),
        ({"prompt": roles_and_texts(("user", "hi")), "completion": roles_and_texts(("assistant", "hello"))}, "prompt_response"),
    ],
)
def test_each_format_is_recognised_and_gives_the_same_conversation(row: dict[str, Any], format_name: str) -> None:
    assert choose_format(row).name == format_name
    assert conversation(row) == HELLO


def test_a_conversation_is_preferred_to_the_prompt_beside_it() -> None:
    """UltraChat has both, and its prompt column is the first user turn without the answer."""
    row = {"prompt": "hi", "prompt_id": "f0", "messages": roles_and_texts(("user", "hi"), ("assistant", "hello"))}
    assert conversation(row) == HELLO


def test_the_input_of_alpaca_follows_the_instruction_after_an_empty_line() -> None:
    row = {"instruction": "Translate.", "input": "oui", "output": "yes"}
    assert conversation(row) == (Message("user", "Translate.\n\noui"), Message("assistant", "yes"))


def test_named_columns_go_before_the_usual_ones() -> None:
    row = {"prompt": "not this", "ask": "hi", "say": "hello", "sys": "be kind"}
    found = conversation(row, columns={"prompt": "ask", "response": "say", "system": "sys"})
    assert found == (Message("system", "be kind"), *HELLO)


def test_a_system_column_gives_way_to_a_system_turn_of_the_conversation() -> None:
    row = {"system": "column", "messages": roles_and_texts(("system", "turn"), ("user", "hi"), ("assistant", "hello"))}
    assert conversation(row) == (Message("system", "turn"), *HELLO)


def test_the_first_or_the_last_assistant_turn_is_the_human_answer() -> None:
    row = {
        "messages": roles_and_texts(
            ("system", "s"), ("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two"), ("user", "thanks")
        )
    }
    first, last = conversation(row, "first"), conversation(row, "last")
    assert [message.content for message in first] == ["s", "1", "one"]
    assert [message.content for message in last] == ["s", "1", "one", "2", "two"]


def test_text_is_kept_as_it_is_with_its_white_space() -> None:
    assert conversation({"prompt": " hi\n", "response": "\n hello "}) == (Message("user", " hi\n"), Message("assistant", "\n hello "))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "no assistant turn"),
        ({"messages": None}, "column 'messages' is null, expected a list"),
        ({"messages": roles_and_texts(("user", "hi"))}, r"no assistant turn \(roles: user\)"),
        ({"messages": roles_and_texts(("assistant", "hello"))}, "found assistant"),
        ({"messages": roles_and_texts(("user", "a"), ("user", "b"), ("assistant", "c"))}, "found user, user, assistant"),
        ({"messages": roles_and_texts(("user", "a"), ("system", "b"), ("assistant", "c"))}, "found user, system, assistant"),
        ({"messages": roles_and_texts(("tool", "a"), ("assistant", "c"))}, r"messages\[1\] has role 'tool'; known are system, user"),
        ({"messages": [{"role": "user"}]}, r"messages\[1\] is \{'role': 'user'\}, expected an object with 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]}, r"messages\[1\].content is null"),
        ({"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]}, "surrogate"),
    ],
)
def test_a_broken_conversation_is_an_error_that_says_what_is_wrong(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversation(row, name="messages")


def test_a_missing_or_empty_cell_is_named() -> None:
    row_format = choose_format({"prompt": "a", "response": "b"})
    with pytest.raises(ValueError, match=r"column 'response' is missing; this row has \['prompt'\]"):
        read_conversation({"prompt": "a"}, row_format, turns="first")
    with pytest.raises(ValueError, match="column 'response' is null, expected text"):
        read_conversation({"prompt": "a", "response": None}, row_format, turns="first")


def test_columns_that_fit_no_format_are_listed_with_what_is_wanted() -> None:
    with pytest.raises(ValueError, match=r"\['text'\] fit no format .*alpaca: instruction \+ output.*\[data.columns\]"):
        choose_format({"text": "hi"})


def test_a_column_that_is_not_there_or_that_the_format_does_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.columns names \['ask'\]"):
        choose_format({"prompt": "a", "response": "b"}, columns={"prompt": "ask"})
    with pytest.raises(ValueError, match=r"data\.columns\.input is nothing that data.format='prompt_response' reads"):
        choose_format({"prompt": "a", "response": "b", "x": "c"}, name="prompt_response", columns={"input": "x"})


def test_the_id_of_an_example_is_its_content_or_its_id_column() -> None:
    row = {"prompt": "hi", "response": "hello", "uid": 7}
    # sha256 of '[["user","hi"],["assistant","hello"]]', first 32 hex digits (sha256sum of that text).
    assert read_id(row, choose_format(row), HELLO) == content_id(HELLO) == "8ba09e74ddca9dcb8953c08cc0f30bfd"
    assert content_id((Message("user", "hi"), Message("assistant", "hello "))) != content_id(HELLO)
    with_id = choose_format(row, columns={"id": "uid"})
    assert read_id(row, with_id, HELLO) == "7"
    with pytest.raises(ValueError, match=r"column 'uid' \(data.columns.id\) has None"):
        read_id({"prompt": "hi", "response": "hello", "uid": None}, with_id, HELLO)
