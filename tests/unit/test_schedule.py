"""The learning rate, against numbers worked out by hand."""

import math

import pytest

from spin_megatron.data.schedule import Schedule


def test_linear_rises_to_the_peak_and_falls_to_zero() -> None:
    # 10 steps, 20% warm-up: 2 steps up (1/2, 2/2), then 8 equal steps down: 8/8, 7/8, ... 1/8.
    schedule = Schedule("linear", peak=8.0, num_steps=10, warmup_fraction=0.2)
    assert [schedule.at(step) for step in range(11)] == pytest.approx([4, 8, 8, 7, 6, 5, 4, 3, 2, 1, 0])


def test_cosine_is_half_the_peak_half_way_down() -> None:
    # 2 warm-up steps leave 8; after 2 of 8, 4 of 8 and 6 of 8: (1 + cos 45°) / 2, 1/2, (1 - cos 45°) / 2.
    schedule = Schedule("cosine", peak=1.0, num_steps=10, warmup_fraction=0.2)
    quarter = (1 + math.sqrt(0.5)) / 2
    assert [schedule.at(step) for step in (0, 1, 2, 4, 6, 8, 10)] == pytest.approx([0.5, 1.0, 1.0, quarter, 0.5, 1 - quarter, 0.0])


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    schedule = Schedule("constant", peak=3.0, num_steps=6, warmup_fraction=0.5)
    assert [schedule.at(step) for step in range(6)] == pytest.approx([1, 2, 3, 3, 3, 3])


def test_stopping_after_two_of_six_epochs_leaves_the_rate_at_74_percent() -> None:
    # The original scripts: 778 steps an epoch, 6 epochs, 10% warm-up; (6 - 2) / (6 - 0.6) = 0.7407.
    schedule = Schedule("linear", peak=5e-7, num_steps=6 * 778, warmup_fraction=0.1)
    assert schedule.at(2 * 778) / 5e-7 == pytest.approx(4 / 5.4, abs=1e-4)


def test_two_epochs_of_a_two_epoch_schedule_end_at_zero() -> None:
    assert Schedule("linear", peak=5e-7, num_steps=2 * 778, warmup_fraction=0.1).at(2 * 778) == 0.0


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert Schedule("linear", peak=2.0, num_steps=4, warmup_fraction=0.0).at(0) == 2.0


def test_warm_up_steps_are_rounded_up_but_not_by_float_noise() -> None:
    assert Schedule("linear", 1.0, 11, 0.1).num_warmup_steps == 2  # 1.1 steps
    assert Schedule("linear", 1.0, 3, 0.1).num_warmup_steps == 1  # 0.30000000000000004 of Python
    assert Schedule("linear", 1.0, 70, 0.1).num_warmup_steps == 7  # 7.000000000000001 of Python


def test_a_schedule_of_one_step_is_made_at_the_peak() -> None:
    assert Schedule("cosine", 5.0, 1, 0.1).at(0) == 5.0
