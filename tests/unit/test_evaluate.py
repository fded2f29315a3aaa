"""The numbers of evaluate by hand, and its warnings."""

import json
import math

import pytest

from spin_megatron.config_sections import EvaluateSection
from spin_megatron.run.records import ReferenceScore
from spin_megatron.stages.evaluate import compare, judge_evaluation

# Two pairs of 4 + 5 and 1 + 2 tokens. Log-ratios: pair a +1 and -2 (margin 3), pair b -2 and -1 (margin -1).
REFERENCES = [ReferenceScore("b", -3.0, -4.0, 1, 2), ReferenceScore("a", -10.0, -20.0, 4, 5)]
SCORES = [ReferenceScore("a", -9.0, -22.0, 4, 5), ReferenceScore("b", -5.0, -5.0, 1, 2)]
TRAITS = {"length_accuracy": 0.6, "eos_accuracy": 0.91, "first_token_accuracy": 0.55}
BETA = 0.5


def logistic(t: float) -> float:
    return math.log(1 + math.exp(-t))


def test_numbers_of_two_pairs_worked_out_by_hand() -> None:
    found = compare(SCORES, REFERENCES, loss="logistic", beta=BETA)
    loss = (logistic(1.5) + logistic(-0.5)) / 2
    assert found == pytest.approx(
        {
            "num_pairs": 2,
            "loss": loss,
            "ln2_minus_loss": math.log(2) - loss,
            "margin": (3 - 1) / 2,
            "accuracy": 0.5,
            "reward_real": BETA * (1 - 2) / 2,
            "reward_generated": BETA * (-2 - 1) / 2,
            "nll_real": (9 + 5) / 5,  # 14 nats over 4 + 1 tokens
            "nll_real_reference": (10 + 3) / 5,
            "logp_real": -7.0,
            "logp_real_drift": -7.0 - -6.5,
            "logp_generated": -13.5,
            "logp_generated_drift": -13.5 - -12.0,
        },
        rel=1e-12,
    )


def test_the_bound_is_that_of_the_logistic_loss_whatever_was_trained() -> None:
    hinge, trained = compare(SCORES, REFERENCES, loss="hinge", beta=BETA), compare(SCORES, REFERENCES, loss="logistic", beta=BETA)
    assert hinge["loss"] == pytest.approx((0.0 + 1.5) / 2)
    assert hinge["ln2_minus_loss"] == trained["ln2_minus_loss"]


def test_swapping_the_answers_turns_the_margin_round() -> None:
    def swapped(scores: list[ReferenceScore]) -> list[ReferenceScore]:
        return [ReferenceScore(s.pair_id, s.logp_generated, s.logp_real, s.num_generated, s.num_real) for s in scores]

    assert compare(swapped(SCORES), swapped(REFERENCES), loss="logistic", beta=BETA)["margin"] == -1.0


def test_the_same_model_has_loss_ln_2_and_nothing_to_warn_of() -> None:
    found = compare(REFERENCES, REFERENCES, loss="logistic", beta=BETA)
    assert found["loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert found["logp_real_drift"] == found["logp_generated_drift"] == 0.0
    assert judge_evaluation(found, EvaluateSection(), TRAITS) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"nll_real": 2.8}, "evaluate.max_nll_increase=0.1"),
        ({"nll_real": math.nan}, "evaluate.max_nll_increase=0.1"),
        ({"logp_real_drift": -51.0}, "evaluate.max_logp_drop=50.0"),
        ({"accuracy": 0.995}, "evaluate.max_accuracy=0.99"),
    ],
)
def test_each_threshold_warns_by_name(changes: dict[str, float], named: str) -> None:
    healthy = compare(REFERENCES, REFERENCES, loss="logistic", beta=BETA)
    (warning,) = judge_evaluation(healthy | changes, EvaluateSection(), TRAITS)
    assert named in warning


def test_separable_pairs_are_told_together_with_what_gives_them_away() -> None:
    healthy = compare(REFERENCES, REFERENCES, loss="logistic", beta=BETA)
    (warning,) = judge_evaluation(healthy | {"accuracy": 1.0}, EvaluateSection(), TRAITS)
    assert "length alone told 60% of the answers apart, EOS 91%, the first token 55%" in warning


def test_results_are_plain_json() -> None:
    json.dumps(compare(SCORES, REFERENCES, loss="logistic", beta=BETA), allow_nan=False)
