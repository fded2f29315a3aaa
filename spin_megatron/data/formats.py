"""Turn one row of a supervised set into a conversation that ends with the human answer.

Four formats, by what a row holds:

    messages         a list of {"role": ..., "content": ...}
    sharegpt         a list of {"from": "human" | "gpt" | "system", "value": ...}
    alpaca           instruction, optional input, output
    prompt_response  prompt (text, or a list of messages) and response

A row that does not fit is an error, never skipped: a silent skip would change the set without a trace. The functions here
raise ValueError about the row's content; the reader adds the file and the line.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spin_megatron.run.records import Message

FormatName = Literal["messages", "prompt_response", "alpaca", "sharegpt"]
Turns = Literal["first", "last"]

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}

# Format -> what it reads -> column names tried in this order. `system` is optional everywhere, `input` in alpaca.
_USUAL_NAMES: dict[FormatName, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages", "conversations", "conversation"), "system": ("system",)},
    "sharegpt": {"messages": ("conversations", "conversation", "messages"), "system": ("system",)},
    "alpaca": {"prompt": ("instruction",), "response": ("output",), "input": ("input",), "system": ("system",)},
    "prompt_response": {
        "prompt": ("prompt", "question"),
        "response": ("response", "completion", "answer"),
        "system": ("system",),
    },
}
_OPTIONAL = ("system", "input")
_ITEM_KEYS: dict[FormatName, tuple[str, str]] = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
# A set like UltraChat has both "messages" and "prompt": the conversation is the richer one.
_DETECTION_ORDER: tuple[FormatName, ...] = ("messages", "sharegpt", "alpaca", "prompt_response")


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one source are read: a format, and for each thing it reads the column that has it.

    id_column: the column that names an example; None: the id is made from the conversation.
    """

    name: FormatName
    columns: Mapping[str, str]
    id_column: str | None = None


def choose_format(
    row: Mapping[str, Any],
    *,
    name: FormatName | Literal["auto"] = "auto",
    columns: Mapping[str, str] | None = None,
) -> RowFormat:
    """Decide from a source's first row how all of its rows are read.

    Args:
        name: a format, or "auto" for the first of messages, sharegpt, alpaca, prompt_response that the row fits.
        columns: column names given by the user, keys id, messages, system, prompt, input, response; they go before the usual ones.

    Raises:
        ValueError: no format fits, or a named column does not belong to the format or is not in the row.
    """
    given = dict(columns or {})
    id_column = given.pop("id", None)
    missing = sorted(column for column in [*given.values(), id_column] if column is not None and column not in row)
    if missing:
        raise ValueError(f"data.columns names {missing}, but the columns are {sorted(row)}; correct the names.")
    candidates = _DETECTION_ORDER if name == "auto" else (name,)
    for candidate in candidates:
        found = _fit(row, candidate, given, strict=name != "auto")
        if found is not None:
            return RowFormat(candidate, found, id_column)
    wanted = "; ".join(f"{candidate}: {' + '.join(_needed(candidate))}" for candidate in candidates)
    raise ValueError(
        f'the columns {sorted(row)} fit no format ({wanted}); name the columns in [data.columns], e.g. prompt = "..." and response = "...".'
    )


def _fit(row: Mapping[str, Any], name: FormatName, given: Mapping[str, str], *, strict: bool) -> dict[str, str] | None:
    """The columns of a format in this row, or None where it does not fit."""
    usual = _USUAL_NAMES[name]
    foreign = sorted(set(given) - set(usual))
    if foreign and strict:
        raise ValueError(f"data.columns.{foreign[0]} is nothing that data.format={name!r} reads; it reads {', '.join(usual)}.")
    if foreign:
        return None
    found = {}
    for what, names in usual.items():
        column = given.get(what) or next((usual_name for usual_name in names if usual_name in row), None)
        if column is not None:
            found[what] = column
        elif what not in _OPTIONAL:
            return None
    if name in _ITEM_KEYS and not strict and not _has_items(row[found["messages"]], _ITEM_KEYS[name]):
        return None
    return found


def _has_items(value: Any, keys: tuple[str, str]) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Mapping) and all(key in value[0] for key in keys)


def _needed(name: FormatName) -> list[str]:
    return ["/".join(names) for what, names in _USUAL_NAMES[name].items() if what not in _OPTIONAL]


def read_conversation(row: Mapping[str, Any], row_format: RowFormat, *, turns: Turns) -> tuple[Message, ...]:
    """The conversation of a row, cut to end with the first or the last assistant turn.

    Returns:
        An optional system turn, then user and assistant in turn; the last message is the human answer. Text is as it stands
        in the row: nothing is stripped, since what is stripped from one side only tells the sides apart.

    Raises:
        ValueError: a column is missing or of the wrong type, a role is unknown, or the turns do not alternate.
    """
    columns = row_format.columns
    if row_format.name in _ITEM_KEYS:
        messages = _parse_messages(_cell(row, columns["messages"]), columns["messages"], _ITEM_KEYS[row_format.name])
    else:
        prompt = _as_messages(_cell(row, columns["prompt"]), columns["prompt"], role="user")
        extra = _optional_text(row, columns.get("input"))
        if extra:
            prompt = [*prompt[:-1], Message("user", f"{prompt[-1].content}\n\n{extra}")]
        messages = [*prompt, *_as_messages(_cell(row, columns["response"]), columns["response"], role="assistant")]
    system = _optional_text(row, columns.get("system"))
    if system and messages and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    return _cut(messages, turns)


def read_id(row: Mapping[str, Any], row_format: RowFormat, messages: Sequence[Message]) -> str:
    """The example's id: its id column's value as text, else the digest of its conversation.

    Raises:
        ValueError: the id column is empty in this row.
    """
    if row_format.id_column is None:
        return content_id(messages)
    value = row.get(row_format.id_column)
    if not isinstance(value, str | int) or value == "":
        raise ValueError(f"column {row_format.id_column!r} (data.columns.id) has {value!r}, expected text or a whole number.")
    return str(value)


def content_id(messages: Sequence[Message]) -> str:
    """128 bits, hex, of sha256 over the conversation's roles and texts: the same conversation has the same id everywhere."""
    text = json.dumps([[message.role, message.content] for message in messages], separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise ValueError(f"column {column!r} is missing; this row has {sorted(row)}.")
    return row[column]


def _optional_text(row: Mapping[str, Any], column: str | None) -> str:
    value = row.get(column) if column else None
    return "" if value is None else _text(value, column or "")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {_shown(value)}, expected text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half of a surrogate pair ({error.reason}), which is no character; correct the text.") from error
    return value


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _as_messages(value: Any, column: str, *, role: str) -> list[Message]:
    """A prompt or a response: a text of this role, or a list of messages that ends with it."""
    if not isinstance(value, list):
        return [Message(role, _text(value, f"column {column!r}"))]
    messages = _parse_messages(value, column, _ITEM_KEYS["messages"])
    if not messages or messages[-1].role != role:
        raise ValueError(f"column {column!r} must end with a message of role {role!r}.")
    return messages


def _parse_messages(value: Any, column: str, keys: tuple[str, str]) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"column {column!r} is {_shown(value)}, expected a list of messages.")
    messages = []
    for number, item in enumerate(value, start=1):
        where = f"{column}[{number}]"
        if not isinstance(item, Mapping) or any(key not in item for key in keys):
            raise ValueError(f"{where} is {_shown(item)}, expected an object with {keys[0]!r} and {keys[1]!r}.")
        role = _ROLES.get(item[keys[0]]) if isinstance(item[keys[0]], str) else None
        if role is None:
            raise ValueError(f"{where} has {keys[0]} {_shown(item[keys[0]])}; known are {', '.join(_ROLES)}. Remove rows with other turns.")
        messages.append(Message(role, _text(item[keys[1]], f"{where}.{keys[1]}")))
    return messages


def _cut(messages: Sequence[Message], turns: Turns) -> tuple[Message, ...]:
    """End the conversation with its first or last assistant turn, and check that what is kept alternates."""
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise ValueError(f"the conversation has no assistant turn (roles: {', '.join(message.role for message in messages) or 'none'}).")
    kept = tuple(messages[: answers[0 if turns == "first" else -1] + 1])
    spoken = kept[1:] if kept[0].role == "system" else kept
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if [message.role for message in spoken] != expected:
        roles = ", ".join(message.role for message in kept)
        raise ValueError(f"the turns must be an optional system turn, then user and assistant in turn; found {roles}.")
    return kept
