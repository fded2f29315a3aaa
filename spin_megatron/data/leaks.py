"""Compare both sides of the pairs before any training: what tells y from y' besides what they say?

SPIN trains the model to tell human answers from its own. Where length, a missing EOS or the first token already tells
them apart, the loss falls by learning just that. Each test below is a classifier that sees one such trait only; its accuracy
is 0.5 where the trait tells nothing. Everything here is computed from token ids.

- `best_length_accuracy`: the exact best balanced accuracy of one threshold on the length, in sample. It equals
  (1 + K) / 2 with K the Kolmogorov-Smirnov distance of the two length distributions, and is above 0.5 by chance, by about
  0.6 / sqrt(pairs).
- `length_accuracy`: the same threshold, chosen on one half of the pairs and scored on the other, both ways: no such bias.
  The warning is about this one.
- `eos_accuracy`: "ends with EOS", exact: (1 + |difference of the rates|) / 2.
- `first_token_accuracy`: guess by the first token, counted on one half and scored on the other. It sees a space, a newline or a
  template's words that only one side begins with.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from spin_megatron.run.records import SpinPair, TokenIds

Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class LeakThresholds:
    """Values above which a number becomes a warning; shares of 1."""

    length_accuracy: float = 0.75
    eos_accuracy: float = 0.6
    first_token_accuracy: float = 0.9
    generated_without_eos: float = 0.25
    duplicates: float = 0.1
    identical: float = 0.1
    empty: float = 0.01


_ADVICE = {
    "length_accuracy": "answers are told apart by length alone, so the model will learn lengths; "
    "check data.max_response_tokens, and that theta_t was fine-tuned on this kind of data",
    "eos_accuracy": "answers are told apart by whether they end with EOS alone; "
    'raise data.max_response_tokens, or set data.over_long = "truncate"',
    "first_token_accuracy": "answers are told apart by their first token alone; "
    "look at the samples for white space or a set phrase that only one side begins with",
    "generated_without_eos": "generated answers reach the cap without an end; "
    "raise data.max_response_tokens, or check that the chat template is the model's own",
    "duplicates": "generated answers repeat another one; the opponent is collapsing, or generate.temperature is too low",
    "identical": "generated answers equal the human one and were dropped; theta_t knows this data by heart",
    "empty": "generated answers are empty and were dropped; check the chat template and the EOS ids",
}


@dataclass(frozen=True)
class LengthStatistics:
    """Of lengths in tokens; percentiles are values that occur (the nearest below)."""

    mean: float
    minimum: int
    percentile_10: int
    median: int
    percentile_90: int
    maximum: int


@dataclass(frozen=True)
class SideReport:
    """One side's answers, of the pairs that are kept.

    without_eos: share that does not end with EOS (cut at the cap). at_cap: share as long as the cap.
    duplicates: share whose tokens were another answer's before.
    """

    lengths: LengthStatistics
    without_eos: float
    at_cap: float
    duplicates: float


@dataclass(frozen=True)
class LeakReport:
    """Both sides and what tells them apart. empty and identical: shares of all pairs before those were dropped."""

    num_pairs: int
    num_empty: int
    num_identical: int
    empty: float
    identical: float
    real: SideReport
    generated: SideReport
    best_length_accuracy: float
    length_accuracy: float
    longer_is_real: float
    eos_accuracy: float
    first_token_accuracy: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A pair as text, special tokens spelled out."""

    pair_id: str
    prompt: str
    real: str
    generated: str


def leak_report(
    pairs: Sequence[SpinPair],
    *,
    eos_ids: Collection[int],
    max_response_tokens: int,
    num_empty: int,
    num_identical: int,
    thresholds: LeakThresholds | None = None,
) -> LeakReport:
    """Measure the kept pairs of one iteration.

    Args:
        pairs: at least one, without empty and identical ones.
        eos_ids: every id that ends an answer.
        max_response_tokens: the cap of both sides.
        num_empty, num_identical: pairs dropped before because y' was empty, or equal to y.
    """
    assert pairs, "nothing to report on"
    real = [pair.real_ids for pair in pairs]
    generated = [pair.generated_ids for pair in pairs]
    real_lengths, generated_lengths = _lengths(real), _lengths(generated)
    total = len(pairs) + num_empty + num_identical
    sides = [_side(answers, eos_ids=eos_ids, cap=max_response_tokens) for answers in (real, generated)]
    numbers = {
        "empty": num_empty / total,
        "identical": num_identical / total,
        "length_accuracy": cross_validated_length_accuracy(real_lengths, generated_lengths),
        "eos_accuracy": (1 + abs(sides[0].without_eos - sides[1].without_eos)) / 2,
        "first_token_accuracy": first_token_accuracy(real, generated),
    }
    measured = numbers | {"generated_without_eos": sides[1].without_eos, "duplicates": sides[1].duplicates}
    return LeakReport(
        num_pairs=len(pairs),
        num_empty=num_empty,
        num_identical=num_identical,
        real=sides[0],
        generated=sides[1],
        best_length_accuracy=best_length_accuracy(real_lengths, generated_lengths),
        longer_is_real=float(np.mean((real_lengths > generated_lengths) + 0.5 * (real_lengths == generated_lengths))),
        warnings=_warnings(measured, thresholds or LeakThresholds()),
        **numbers,
    )


def take_samples(pairs: Sequence[SpinPair], decode: Callable[[TokenIds], str], *, count: int) -> list[Sample]:
    """The first pairs, decoded; pairs lie in hash order, so they are a random choice that stays the same from iteration to iteration."""
    return [Sample(pair.pair_id, *map(decode, (pair.prompt_ids, pair.real_ids, pair.generated_ids))) for pair in pairs[:count]]


def length_statistics(lengths: Sequence[int] | Lengths) -> LengthStatistics:
    """Mean, extremes and percentiles of at least one length."""
    values = np.asarray(lengths, dtype=np.int64)
    low, middle, high = (int(value) for value in np.percentile(values, [10, 50, 90], method="lower"))
    return LengthStatistics(float(values.mean()), int(values.min()), low, middle, high, int(values.max()))


def best_length_accuracy(real: Lengths, generated: Lengths) -> float:
    """Balanced accuracy of the best rule "length > threshold" or its opposite, over all thresholds."""
    threshold, longer_is_real = _best_threshold(real, generated)
    return _threshold_accuracy(real, generated, threshold, longer_is_real)


def cross_validated_length_accuracy(real: Lengths, generated: Lengths) -> float:
    """Balanced accuracy of a threshold chosen on one half of the pairs and scored on the other, mean of both ways.

    The halves are every other pair. 0.5 when there are fewer than two pairs.
    """
    if len(real) < 2:
        return 0.5
    halves = [(real[start::2], generated[start::2]) for start in (0, 1)]
    accuracies = []
    for fit, score in (halves, halves[::-1]):
        accuracies.append(_threshold_accuracy(*score, *_best_threshold(*fit)))
    return float(np.mean(accuracies))


def first_token_accuracy(real: Sequence[TokenIds], generated: Sequence[TokenIds]) -> float:
    """Accuracy of guessing the side by the first token, counted on every other pair and scored on the rest, mean of both ways.

    A token seen equally often on both sides, or never, is a guess by coin.
    """
    if len(real) < 2:
        return 0.5
    accuracies = []
    for fit, score in ((0, 1), (1, 0)):
        lead: Counter[int] = Counter(answer[0] for answer in real[fit::2])
        lead.subtract(answer[0] for answer in generated[fit::2])
        right = [0.5 + 0.5 * np.sign(lead[answer[0]]) for answer in real[score::2]]
        right += [0.5 - 0.5 * np.sign(lead[answer[0]]) for answer in generated[score::2]]
        accuracies.append(np.mean(right))
    return float(np.mean(accuracies))


def _lengths(answers: Sequence[TokenIds]) -> Lengths:
    return np.array([len(answer) for answer in answers], dtype=np.int64)


def _best_threshold(real: Lengths, generated: Lengths) -> tuple[int, bool]:
    """(threshold, whether longer is real) of the best rule; on a tie the smallest threshold."""
    thresholds = np.unique(np.concatenate([real, generated]))
    shares = [np.searchsorted(np.sort(side), thresholds, side="right") / len(side) for side in (real, generated)]
    distance = shares[1] - shares[0]  # positive where more generated answers are at most this long
    best = int(np.argmax(np.abs(distance)))
    return int(thresholds[best]), bool(distance[best] >= 0)


def _threshold_accuracy(real: Lengths, generated: Lengths, threshold: int, longer_is_real: bool) -> float:
    right = (np.mean(real > threshold) + np.mean(generated <= threshold)) / 2
    return float(right if longer_is_real else 1 - right)


def _side(answers: Sequence[TokenIds], *, eos_ids: Collection[int], cap: int) -> SideReport:
    return SideReport(
        lengths=length_statistics(_lengths(answers)),
        without_eos=sum(answer[-1] not in eos_ids for answer in answers) / len(answers),
        at_cap=sum(len(answer) >= cap for answer in answers) / len(answers),
        duplicates=1 - len(set(answers)) / len(answers),
    )


def _warnings(measured: Mapping[str, float], thresholds: LeakThresholds) -> tuple[str, ...]:
    limits = asdict(thresholds)
    return tuple(
        f"{measured[name]:.1%} of {advice} (warns above {limits[name]:.0%})."
        for name, advice in _ADVICE.items()
        if measured[name] > limits[name]
    )
