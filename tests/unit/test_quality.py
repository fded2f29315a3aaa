"""Rates of unusable answers, counted by hand."""

import pytest

from spin_megatron.generation.quality import AnswerQuality, answer_quality, ends_in_a_loop, excesses
from spin_megatron.run.records import FinishReason, GeneratedRow

EOS = (2, 3)


def row(number: int, *token_ids: int, reason: FinishReason = "stop") -> GeneratedRow:
    return GeneratedRow(f"ex-{number}", token_ids, reason, 0)


def test_each_rate_is_the_share_of_its_answers() -> None:
    rows = [
        row(0, 2),  # empty
        row(1, 3),  # empty, by the other EOS
        row(2, 5, 6, 2),  # the same words as row 3
        row(3, 5, 6, 3),
        row(4, *range(10, 40), reason="length"),
        row(5, *[9] * 24, 2),  # a loop of one token
        row(6, 7, 8, 2),
        row(7, 4, 2),
    ]
    assert answer_quality(rows, EOS) == AnswerQuality(empty=2 / 8, repeated=1 / 8, truncated=1 / 8, identical=2 / 8)


def test_no_answers_have_no_rates() -> None:
    assert answer_quality([], EOS) == AnswerQuality(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("token_ids", "loops"),
    [
        ([1] * 23, False),  # one token short of 24
        ([1] * 24, True),
        ([5, 6, 7] + [1, 2] * 12, True),
        ([1, 2] * 12 + [5], False),  # the loop has ended
        (list(range(16)) * 4, True),
        (list(range(16)) * 3 + list(range(1, 17)), False),
        (list(range(17)) * 4, False),  # longer blocks are style, not a loop
        (list(range(100)), False),
        ([], False),
    ],
)
def test_a_loop_is_at_least_four_copies_of_a_short_block(token_ids: list[int], loops: bool) -> None:
    assert ends_in_a_loop(token_ids) is loops


def test_an_excess_names_the_rate_the_limit_and_the_setting() -> None:
    lines = excesses(AnswerQuality(0.1, 0.2, 0.3, 0.0), AnswerQuality(0.1, 0.05, 0.5, 0.0))
    assert lines == ["20.0% of the answers are repeated, more than quality.max_repeated=0.05"]
