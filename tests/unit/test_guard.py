"""The rules of [guard]: what they judge, by numbers made by hand, and that a resumed guard judges as one that was never interrupted."""

import re
from typing import Any

import pytest

from spin_megatron.objective.guard import MIN_UPDATES, Guard, Limits

BETA = 0.5
# Ten usual steps: losses 0.60 ... 0.69, median 0.645; gradient norms 1.0 ... 1.9, median 1.45.
USUAL = [{"loss": 0.60 + 0.01 * n, "grad_norm": 1.0 + 0.1 * n, "skipped": 0.0} for n in range(10)]


def metrics(**changed: float) -> dict[str, float]:
    return {"loss": 0.65, "reward_real": -1.0, "margin": 3.0} | changed


def make(limits: Limits, *, on_excess: Any = "warn", past: list[dict[str, float]] | None = None) -> Guard:
    return Guard(limits, on_excess=on_excess, window=32, beta=BETA, past=USUAL if past is None else past)


@pytest.mark.parametrize(
    ("limits", "just_under", "just_over", "message"),
    [
        # 0.645 + 0.5
        (Limits(max_loss_rise=0.5), {"loss": 1.144}, {"loss": 1.146}, r"loss 1\.146, 0\.645 is the median of 10 updates: 0\.501"),
        # 50 nats of drop at beta 0.5 are a reward of -25
        (Limits(max_logp_drop=50.0), {"reward_real": -24.9}, {"reward_real": -25.1}, r"fell \(nats\): 50\.2 \(guard\.max_logp_drop=50\)"),
        # beta times 40 nats of margin is 20
        (Limits(max_margin=20.0), {"margin": 39.9}, {"margin": 40.1}, r"mean margin.*: 20\.05 \(guard\.max_margin=20\)"),
    ],
)
def test_a_limit_is_passed_from_its_value_on_and_named(
    limits: Limits, just_under: dict[str, float], just_over: dict[str, float], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert make(limits, on_excess="skip").judge(metrics(**just_under), 1.0)
    assert caplog.text == ""
    assert not make(limits, on_excess="skip").judge(metrics(**just_over), 1.0)
    assert re.search(message, caplog.text)


def test_a_gradient_norm_is_measured_by_the_median() -> None:
    guard = make(Limits(max_grad_norm_ratio=10.0), on_excess="skip")
    assert guard.judge(metrics(), 14.4)
    guard = make(Limits(max_grad_norm_ratio=10.0), on_excess="skip")
    assert not guard.judge(metrics(), 14.6)
    assert [excess.limit for excess in guard.found] == ["max_grad_norm_ratio"]


def test_a_warned_update_is_made_and_a_limit_is_logged_only_when_it_begins_to_be_passed(caplog: pytest.LogCaptureFixture) -> None:
    guard = make(Limits(max_margin=20.0))
    assert [guard.judge(metrics(margin=margin), 1.0) for margin in (50.0, 60.0, 1.0, 70.0)] == [True] * 4
    assert caplog.text.count("guard.max_margin") == 2


def test_spikes_are_not_judged_by_too_few_updates_nor_by_skipped_ones() -> None:
    few = USUAL[: MIN_UPDATES - 1]
    skipped = [{"loss": "nan", "grad_norm": "nan", "skipped": 1.0}] * 5
    limits = Limits(max_loss_rise=0.1, max_grad_norm_ratio=2.0)
    assert make(limits, on_excess="stop", past=[*few, *skipped]).judge(metrics(loss=9.0), 100.0)  # type: ignore[list-item]
    assert not make(limits, on_excess="stop", past=USUAL[:MIN_UPDATES]).judge(metrics(loss=9.0), 100.0)


def test_a_left_out_update_does_not_become_usual_and_a_resumed_guard_judges_as_before() -> None:
    limits = Limits(max_loss_rise=0.5)
    steps = [0.65, 2.0, 2.0, 2.0, 0.66, 1.2, 0.7, 1.16]
    undisturbed, rows = make(limits, on_excess="skip"), [dict(row) for row in USUAL]
    answers = []
    for loss in steps:
        answers.append(undisturbed.judge(metrics(loss=loss), 1.0))
        rows.append({"loss": loss, "grad_norm": 1.0, "skipped": float(not answers[-1])})
    assert answers == [True, False, False, False, True, False, True, False]
    for killed_after in range(len(steps)):
        resumed = make(limits, on_excess="skip", past=rows[: len(USUAL) + killed_after])
        assert [resumed.judge(metrics(loss=loss), 1.0) for loss in steps[killed_after:]] == answers[killed_after:]
