"""What tells y from y': accuracies worked out by hand, and the exact threshold against brute force."""

import math
import random

import numpy as np
import pytest

from spin_megatron.data.leaks import (
    LeakReport,
    LeakThresholds,
    best_length_accuracy,
    cross_validated_length_accuracy,
    first_token_accuracy,
    leak_report,
    length_statistics,
    take_samples,
)
from spin_megatron.run.records import SpinPair

EOS = 1


def make_pairs(*answers: tuple[list[int], list[int]]) -> list[SpinPair]:
    return [SpinPair(str(number), (9,), tuple(real), tuple(generated), 0) for number, (real, generated) in enumerate(answers)]


def report_on(pairs: list[SpinPair], **options: object) -> LeakReport:
    settings: dict = {"eos_ids": {EOS}, "max_response_tokens": 100, "num_empty": 0, "num_identical": 0} | options
    return leak_report(pairs, **settings)


def of(*lengths: int) -> np.ndarray:
    return np.array(lengths, dtype=np.int64)


def test_the_best_threshold_by_hand() -> None:
    # Lengths above 3 are real: 4 of 4 real (4, 5, 6, 9) are right, 3 of 4 generated (1, 2, 3) are right: (1 + 3/4) / 2.
    assert best_length_accuracy(of(4, 5, 6, 9), of(1, 2, 3, 7)) == 0.875
    # The other way round the same rule is turned over.
    assert best_length_accuracy(of(1, 2, 3, 7), of(4, 5, 6, 9)) == 0.875
    assert best_length_accuracy(of(2, 3), of(2, 3)) == 0.5
    assert best_length_accuracy(of(5, 6), of(1, 1)) == 1.0


def test_the_best_threshold_equals_a_search_over_all_rules() -> None:
    generator = random.Random(0)
    for _ in range(50):
        real = of(*(generator.randint(1, 12) for _ in range(9)))
        generated = of(*(generator.randint(1, 15) for _ in range(9)))
        rules = [
            sum((length > threshold) == longer_is_real for length in real)
            + sum((length > threshold) != longer_is_real for length in generated)
            for threshold in range(17)
            for longer_is_real in (True, False)
        ]
        assert best_length_accuracy(real, generated) == pytest.approx(max(rules) / 18, abs=1e-12)


def test_the_cross_validated_threshold_by_hand() -> None:
    # Fit on pairs 0 and 2 (real 5, 6; generated 1, 2): longer than 2 is real. Pairs 1 and 3 (real 4, 2; generated 3, 1): real 1 of 2
    # right, generated 1 of 2 right: 0.5. Fit on 1 and 3: the shares at most 1, 2, 3, 4 long are real 0, .5, .5, 1 and generated
    # .5, .5, 1, 1, so longer than 1 is real (a tie with 3, the smaller is taken). Pairs 0 and 2: real 2 of 2, generated 1 of 2: 0.75.
    assert cross_validated_length_accuracy(of(5, 4, 6, 2), of(1, 3, 2, 1)) == pytest.approx((0.5 + 0.75) / 2)
    assert cross_validated_length_accuracy(of(5), of(1)) == 0.5


def test_without_a_leak_the_cross_validated_accuracy_is_a_coin_and_the_best_one_is_above_it_by_chance() -> None:
    generator = np.random.default_rng(0)
    draws = [(generator.integers(1, 500, 400), generator.integers(1, 500, 400)) for _ in range(200)]
    honest = np.mean([cross_validated_length_accuracy(real, generated) for real, generated in draws])
    best = np.mean([best_length_accuracy(real, generated) for real, generated in draws])
    # One accuracy of 2 x 400 guesses has standard deviation 0.018 (each half's score uses 400), the mean of 200 draws 0.0013.
    assert honest == pytest.approx(0.5, abs=0.005)
    # Expected Kolmogorov-Smirnov distance: 0.8687 sqrt(2 / n) = 0.0614; half of it is 0.031 (less a little, lengths being whole).
    assert best == pytest.approx(0.5 + 0.8687 * math.sqrt(2 / 400) / 2, abs=0.003)


def test_a_first_token_that_only_one_side_has_gives_it_away() -> None:
    # 7 begins every real answer, 8 every generated one: all right. With the same tokens on both sides: a coin.
    assert first_token_accuracy([(7, 1)] * 4, [(8, 1)] * 4) == 1.0
    assert first_token_accuracy([(7, 1)] * 4, [(7, 1)] * 4) == 0.5
    # Fit on pairs 0, 2: 7 -> real (2:0), 8 -> generated (0:1), 9 -> generated (0:1). Pairs 1, 3: real 7, 8: right, wrong; generated
    # 7, 6: wrong, coin: 1.5 of 4. Fit on 1, 3: 7 a coin (1:1), 8 real, 6 generated. Pairs 0, 2: real 7, 7: coin, coin; generated
    # 8, 9: wrong, coin: 1.5 of 4.
    assert first_token_accuracy([(7,), (7,), (7,), (8,)], [(8,), (7,), (9,), (6,)]) == pytest.approx(1.5 / 4)


def test_the_report_counts_both_sides() -> None:
    pairs = make_pairs(
        ([5, 6, EOS], [5, 6, 7, 8]),
        ([5, EOS], [5, 6, 7, 8]),
        ([6, 6, 6, 6], [5, EOS]),
        ([7, EOS], [6, EOS]),
    )
    report = report_on(pairs, max_response_tokens=4, num_empty=1, num_identical=3)
    assert (report.real.without_eos, report.generated.without_eos) == (0.25, 0.5)
    assert (report.real.at_cap, report.generated.at_cap) == (0.25, 0.5)
    assert (report.real.duplicates, report.generated.duplicates) == (0.0, 0.25)
    assert (report.empty, report.identical) == (1 / 8, 3 / 8)
    assert report.eos_accuracy == (1 + 0.25) / 2
    # Lengths 3:4, 2:4, 4:2, 2:2: longer is real in one pair and, by half, in the last.
    assert report.longer_is_real == 1.5 / 4
    assert report.real.lengths == length_statistics([3, 2, 4, 2])
    assert report.num_pairs == 4


def test_length_statistics_by_hand() -> None:
    statistics = length_statistics([*range(1, 11), 100])  # 1 ... 10, 100: 11 values, so the percentiles 10, 50, 90 are the 2nd, 6th, 10th
    assert (statistics.minimum, statistics.percentile_10, statistics.median, statistics.percentile_90, statistics.maximum) == (
        1,
        2,
        6,
        10,
        100,
    )
    assert statistics.mean == pytest.approx(155 / 11)


def test_each_trait_warns_above_its_threshold_and_only_there() -> None:
    quiet = LeakThresholds(1, 1, 1, 1, 1, 1, 1)
    pairs = make_pairs(*([[5 + number, 6, EOS], [5 + number, *range(20, 40)]] for number in range(8)))
    noisy = report_on(pairs, thresholds=quiet)
    assert noisy.length_accuracy == 1.0
    assert noisy.eos_accuracy == 1.0
    assert noisy.generated.without_eos == 1.0
    assert noisy.warnings == ()
    warned = report_on(pairs).warnings
    assert [warning.split(";")[0].split(",")[0] for warning in warned] == [
        "100.0% of answers are told apart by length alone",
        "100.0% of answers are told apart by whether they end with EOS alone",
        "100.0% of generated answers reach the cap without an end",
    ]
    repeated = make_pairs(*([[5 + number, EOS], [4, EOS]] for number in range(8)))
    warned = report_on(repeated, num_empty=2, num_identical=2).warnings
    # 8 kept of 12; the 7 repetitions of 8 generated answers; 2 of 12 dropped for each reason. The first token 4 is always generated, and
    # a real answer's first token never seen before is a coin: (0.5 + 1) / 2 = 0.75.
    assert [warning.split()[0] for warning in warned] == ["87.5%", "16.7%", "16.7%"]
    assert "repeat another one" in warned[0]
    assert "equal the human one" in warned[1]
    assert "are empty" in warned[2]


def test_samples_are_the_first_pairs_as_text() -> None:
    pairs = make_pairs(([65, 66], [67]), ([68], [69]))
    samples = take_samples(pairs, lambda token_ids: "".join(map(chr, token_ids)), count=1)
    assert [(sample.pair_id, sample.prompt, sample.real, sample.generated) for sample in samples] == [("0", "\t", "AB", "C")]
