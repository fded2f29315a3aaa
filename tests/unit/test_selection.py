"""Cleaning, the held-out split and nested subsets."""

import random
from collections import Counter

import pytest

from spin_megatron.data.formats import content_id
from spin_megatron.data.render import Rendered
from spin_megatron.data.selection import CleanExamples, clean, in_split_order, select
from spin_megatron.run.records import Message, PromptRow, SftExample


def example(question: str, answer: str, example_id: str | None = None) -> SftExample:
    messages = (Message("user", question), Message("assistant", answer))
    return SftExample(example_id or content_id(messages), messages, "test", None)


def row(number: int, prompt: int | None = None) -> Rendered:
    return Rendered(PromptRow(f"e{number}", (number if prompt is None else prompt,), (number, 1), False))


def ids(rows: tuple[PromptRow, ...]) -> list[str]:
    return [row.example_id for row in rows]


def test_empty_and_repeated_examples_are_dropped_and_counted() -> None:
    examples = [example("a", "b"), example("a", " \n"), example("", "b"), example("a", "b"), example("a", "b "), example("a", "b")]
    cleaned = clean(examples, deduplicate=True)
    assert [item.messages[-1].content for item in cleaned.examples] == ["b", "b "], "text is compared as it is"
    assert (cleaned.num_empty, cleaned.num_duplicates) == (2, 2)


def test_equal_conversations_are_duplicates_whatever_their_ids() -> None:
    cleaned = clean([example("a", "b", "1"), example("a", "b", "2")], deduplicate=True)
    assert [item.example_id for item in cleaned.examples] == ["1"]


def test_without_deduplication_repetitions_are_numbered() -> None:
    cleaned = clean([example("a", "b", "x"), example("c", "d", "y"), example("a", "b", "x"), example("a", "b", "x")], deduplicate=False)
    assert [item.example_id for item in cleaned.examples] == ["x", "y", "x#2", "x#3"]
    assert cleaned.num_duplicates == 0


def test_the_split_order_depends_on_seed_and_ids_alone() -> None:
    examples = [example(f"q{number}", "a") for number in range(200)]
    shuffled = examples.copy()
    random.Random(1).shuffle(shuffled)
    assert in_split_order(shuffled, 42) == in_split_order(examples, 42)
    assert in_split_order(examples, 43) != in_split_order(examples, 42)
    # Examples that are added change nobody else's relative place.
    known = {item.example_id for item in examples}
    grown = in_split_order([*examples, *(example(f"new{number}", "a") for number in range(100))], 42)
    assert [item for item in grown if item.example_id in known] == in_split_order(examples, 42)


def test_a_smaller_set_lies_inside_a_larger_one_and_the_held_out_split_does_not_move() -> None:
    rendered = [row(number) for number in range(100)]
    small, large, everything = (select(rendered, num_held_out=10, num_examples=size) for size in (14, 26, None))
    assert ids(small.held_out) == ids(large.held_out) == ids(everything.held_out) == [f"e{number}" for number in range(10)]
    assert ids(small.train) == ids(large.train)[:14] == ids(everything.train)[:14]
    assert (len(small.train), len(large.train), len(everything.train)) == (14, 26, 90)


def test_a_prompt_that_is_held_out_is_not_trained_on() -> None:
    selection = select([row(0, 7), row(1, 8), row(2, 7), row(3, 9), row(4, 9)], num_held_out=2, num_examples=None)
    assert ids(selection.held_out) == ["e0", "e1"]
    assert ids(selection.train) == ["e3", "e4"], "a prompt may have several answers within the training set"
    assert selection.num_prompts_in_held_out == 1


def test_skipped_rows_are_replaced_by_later_ones_and_no_more_is_rendered_than_needed() -> None:
    rendered = iter([row(0), Rendered(None, ("over_long_prompt",)), row(2), Rendered(row(3).row, ("truncated_response",)), row(4), row(5)])
    selection = select(rendered, num_held_out=1, num_examples=2)
    assert (ids(selection.held_out), ids(selection.train)) == (["e0"], ["e2", "e3"])
    assert selection.remarks == Counter({"over_long_prompt": 1, "truncated_response": 1})
    assert selection.num_rendered == 4
    assert [outcome.row and outcome.row.example_id for outcome in rendered] == ["e4", "e5"]


@pytest.mark.parametrize(("num_held_out", "num_examples", "asked"), [(2, 3, "data.num_examples=3"), (4, None, "one training example")])
def test_too_few_examples_are_refused_with_what_became_of_them(num_held_out: int, num_examples: int | None, asked: str) -> None:
    rendered = [row(0), row(1), row(2), Rendered(None, ("over_long_response",)), row(3)]
    with pytest.raises(ValueError, match=rf"data.num_held_out={num_held_out} and {asked}: of 5 .*skipped: over_long_response 1;"):
        select(rendered, num_held_out=num_held_out, num_examples=num_examples)


def test_nothing_is_left_of_nothing() -> None:
    assert clean([], deduplicate=True) == CleanExamples((), 0, 0)
