"""The SPIN objective against numbers worked out by hand."""

import math

import pytest
import torch

from spin_megatron.objective.spin_loss import (
    EXPONENTIAL_TANGENT_FROM,
    LOSSES,
    METRIC_NAMES,
    loss_at_zero,
    mean_metrics,
    metrics_vector,
    spin_loss,
)

# Two pairs. Log-ratios against the reference: real +2 and -1, generated -1 and +1; margins 3 and -2.
LOGP = [[-10.0, -21.0], [-31.0, -39.0]]
REFERENCE = [[-12.0, -20.0], [-30.0, -40.0]]
LENGTHS = torch.tensor([[4, 2], [5, 10]])


def _loss(loss="logistic", *, logp=LOGP, reference=REFERENCE, beta=0.5, divisor=2, dtype=torch.float32, **options):
    logp_P2 = torch.tensor(logp, dtype=dtype).reshape(-1, 2).requires_grad_()
    reference_P2 = torch.tensor(reference, dtype=dtype).reshape(-1, 2)
    return logp_P2, spin_loss(logp_P2, reference_P2, loss=loss, beta=beta, divisor=divisor, **options)


# At beta 1/2 the two arguments are t = 1.5 and t = -1.
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("logistic", (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(1.0))) / 2),  # (0.201413 + 1.313262) / 2
        ("hinge", (0.0 + 2.0) / 2),
        ("exponential", (math.exp(-1.5) + math.exp(1.0)) / 2),
        ("correlation", (-0.5 + 2.0) / 2),
    ],
)
def test_each_loss_of_two_pairs_equals_the_hand_computed_mean(loss, expected):
    assert _loss(loss)[1].loss.item() == pytest.approx(expected, rel=1e-6)


# d loss / d logp_real of a pair = beta * l'(t) / divisor, and its opposite for the generated response.
@pytest.mark.parametrize(
    ("loss", "slopes"),
    [
        ("logistic", (-1 / (1 + math.exp(1.5)), -1 / (1 + math.exp(-1.0)))),
        ("hinge", (0.0, -1.0)),
        ("exponential", (-math.exp(-1.5), -math.exp(1.0))),
        ("correlation", (-1.0, -1.0)),
    ],
)
def test_the_gradient_is_beta_times_the_slope_with_opposite_signs(loss, slopes):
    logp_P2, output = _loss(loss)
    output.loss.backward()
    for row, slope in zip(logp_P2.grad.tolist(), slopes, strict=True):
        assert row == pytest.approx([0.5 * slope / 2, -0.5 * slope / 2], rel=1e-6)


def test_metrics_are_the_hand_computed_sums():
    metrics = {name: value.item() for name, value in _loss("hinge", lengths_P2=LENGTHS)[1].metrics.items()}
    assert metrics.pop("nll") == pytest.approx(10 / 4 + 31 / 5, rel=1e-6)  # also where it is no part of the loss
    assert metrics == {
        "num_pairs": 2.0,
        "loss": 2.0,  # hinge 0 + 2: the sum, without the divisor
        "spin_loss": 2.0,
        "margin": 1.0,  # 3 - 2
        "margin_abs": 5.0,
        "accuracy": 1.0,  # one of the two margins is positive
        "reward_real": 0.5,  # beta * (2 - 1)
        "reward_generated": 0.0,  # beta * (-1 + 1)
        "logp_real": -41.0,
        "logp_generated": -60.0,
    }


def test_the_nll_of_answers_of_unknown_length_is_unknown_and_no_part_of_the_loss():
    output = _loss("hinge")[1]
    assert math.isnan(output.metrics["nll"])
    assert output.loss.item() == output.metrics["loss"].item() / 2 == 1.0


def test_swapping_real_and_generated_flips_the_margin():
    swapped = _loss(logp=[row[::-1] for row in LOGP], reference=[row[::-1] for row in REFERENCE])[1]
    assert swapped.metrics["margin"].item() == -_loss()[1].metrics["margin"].item()


@pytest.mark.parametrize(("loss", "expected"), [("logistic", math.log(2)), ("hinge", 1.0), ("exponential", 1.0), ("correlation", 1.0)])
def test_equal_policy_and_reference_give_exactly_zero_margins_and_the_loss_at_zero(loss, expected):
    output = _loss(loss, logp=REFERENCE)[1]
    assert output.metrics["margin_abs"].item() == 0.0
    assert output.metrics["accuracy"].item() == 0.0  # a tie is not a win
    assert loss_at_zero(loss) == pytest.approx(expected, rel=1e-15)
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)


def test_micro_batches_of_any_size_add_up_to_the_whole_batch():
    whole, whole_output = _loss(divisor=2, lengths_P2=LENGTHS)
    whole_output.loss.backward()
    totals_K = torch.zeros(len(METRIC_NAMES), dtype=torch.float64)
    loss, gradients = 0.0, []
    for part in (slice(0, 1), slice(1, 1), slice(1, 2)):  # one pair, an empty pack, one pair
        logp_P2, output = _loss(logp=LOGP[part], reference=REFERENCE[part], divisor=2, lengths_P2=LENGTHS[part])
        output.loss.backward()
        loss += output.loss.item()
        gradients.append(logp_P2.grad)
        totals_K += metrics_vector(output.metrics)
    assert loss == pytest.approx(whole_output.loss.item(), rel=1e-6)
    assert torch.equal(torch.cat(gradients), whole.grad)
    assert mean_metrics(totals_K) == pytest.approx(mean_metrics(metrics_vector(whole_output.metrics)), rel=1e-6)


def test_an_empty_pack_costs_exactly_zero_and_stays_connected():
    logp_P2, output = _loss(logp=[], reference=[], nll_weight=1.0, lengths_P2=torch.zeros(0, 2))
    assert output.loss.item() == 0.0
    output.loss.backward()
    assert logp_P2.grad.shape == (0, 2)
    assert metrics_vector(output.metrics).eq(0).all()


def test_means_of_no_pairs_are_nan_not_a_perfect_zero():
    means = mean_metrics(torch.zeros(len(METRIC_NAMES), dtype=torch.float64))
    assert means["num_pairs"] == 0.0
    assert all(math.isnan(value) for name, value in means.items() if name != "num_pairs")


def test_length_normalisation_divides_each_log_ratio_by_its_own_tokens():
    # Ratios 2/4, -1/2 and -1/5, 1/10: margins 1.0 and -0.3.
    output = _loss("correlation", lengths_P2=LENGTHS, length_normalised=True)[1]
    assert output.metrics["margin"].item() == pytest.approx(0.7, rel=1e-6)
    assert output.loss.item() == pytest.approx(1 - 0.5 * 0.7 / 2, rel=1e-6)


def test_the_nll_term_adds_the_per_token_loss_of_the_human_answer_only():
    logp_P2, output = _loss("hinge", lengths_P2=LENGTHS, nll_weight=0.1, beta=1e-9)
    output.loss.backward()
    nll = 10.0 / 4 + 31.0 / 5
    assert output.metrics["nll"].item() == pytest.approx(nll, rel=1e-6)
    assert output.metrics["spin_loss"].item() == pytest.approx(2.0, rel=1e-6)
    assert output.loss.item() == pytest.approx((2.0 + 0.1 * nll) / 2, rel=1e-6)
    assert logp_P2.grad[:, 0].tolist() == pytest.approx([-0.1 / 4 / 2, -0.1 / 5 / 2], rel=1e-6)
    assert logp_P2.grad[:, 1].abs().max() < 1e-9


def test_metrics_survive_the_loss_being_divided_in_place():
    output = _loss(logp=LOGP[:1], reference=REFERENCE[:1], divisor=1, lengths_P2=LENGTHS[:1])[1]
    before = {name: value.item() for name, value in output.metrics.items()}
    with torch.no_grad():
        output.loss.div_(8)  # what Megatron Core's schedules do
    assert {name: value.item() for name, value in output.metrics.items()} == before
    assert not any(value.requires_grad for value in output.metrics.values())


def test_no_gradient_reaches_the_reference():
    logp_P2 = torch.tensor(LOGP, requires_grad=True)
    reference_P2 = torch.tensor(REFERENCE, requires_grad=True)
    spin_loss(logp_P2, reference_P2, loss="logistic", beta=1.0, divisor=2).loss.backward()
    assert reference_P2.grad is None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("margin", [-1e4, -100.0, 100.0, 1e4])
def test_hopeless_and_trivial_pairs_keep_loss_and_gradient_finite(loss, margin):
    logp_P2, output = _loss(loss, logp=[[margin, 0.0]], reference=[[0.0, 0.0]], beta=1.0, divisor=1)
    output.loss.backward()
    assert math.isfinite(output.loss.item())
    assert torch.isfinite(logp_P2.grad).all()
    if loss == "logistic":  # softplus: -t, or 0
        assert output.loss.item() == pytest.approx(max(-margin, 0.0), abs=1e-30)


def test_the_exponential_loss_goes_on_as_its_tangent():
    knot = EXPONENTIAL_TANGENT_FROM
    for excess, expected in ((-1.0, math.exp(knot - 1)), (0.0, math.exp(knot)), (3.0, math.exp(knot) * 4)):
        pair = {"logp": [[-knot - excess, 0.0]], "reference": [[0.0, 0.0]], "dtype": torch.float64}
        logp_P2, output = _loss("exponential", beta=1.0, divisor=1, **pair)
        output.loss.backward()
        assert output.loss.item() == pytest.approx(expected, rel=1e-12)
        assert logp_P2.grad[0, 0].item() == pytest.approx(-math.exp(min(knot, knot + excess)), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_convex_and_does_not_increase(loss):
    values = LOSSES[loss](torch.linspace(-30, 30, 601, dtype=torch.float64))
    slopes = values.diff()
    assert (slopes <= 0).all()
    assert (slopes.diff() >= -1e-9 * values.abs().max()).all()
    assert LOSSES[loss](torch.tensor([-1e-3, 1e-3], dtype=torch.float64)).diff() < 0  # l'(0) < 0


def test_an_unknown_loss_lists_the_known_ones():
    with pytest.raises(ValueError, match="logistic, hinge, exponential, correlation"):
        _loss("sigmoid")


@pytest.mark.parametrize("divisor", [0, -1, float("nan")])
def test_a_divisor_that_is_not_positive_is_refused(divisor):
    with pytest.raises(ValueError, match="must be positive"):
        _loss(divisor=divisor)


@pytest.mark.parametrize("options", [{"length_normalised": True}, {"nll_weight": 0.1}])
def test_options_that_need_lengths_say_so(options):
    with pytest.raises(ValueError, match="pass lengths_P2"):
        _loss(**options)
