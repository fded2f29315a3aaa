"""The paper's theorems, exact: the population loss (4.7) enumerated over every pair of responses of a small softmax table.

One prompt, 8 responses, float64, no sampling. Probabilities are whole counts over 20, so a list in which each response stands as often
as its count is the distribution itself, and the 20 x 20 pairs of the two lists give the expectation through `spin_loss` exactly.
"""

import math

import pytest
import torch
from torch import Tensor

from spin_megatron.objective.spin_loss import LOSSES, LossName, spin_loss

DATA = [1, 1, 1, 2, 2, 3, 4, 6]  # counts of p_data, of 20
OPPONENT = [5, 1, 2, 3, 1, 4, 3, 1]  # counts of p_t, of 20
SLOPE_AT_ZERO = {"logistic": 0.5, "hinge": 1.0, "exponential": 1.0, "correlation": 1.0}  # |l'(0)|


def _distribution(counts: list[int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.float64) / sum(counts)


def _population_loss(theta: Tensor, opponent: list[int], data: list[int], loss: LossName, beta: float) -> Tensor:
    """Equation 4.7 at the table of logits `theta`: E over y ~ p_data and y' ~ p_t of l(beta * margin)."""
    real = torch.arange(len(data)).repeat_interleave(torch.tensor(data))
    generated = torch.arange(len(opponent)).repeat_interleave(torch.tensor(opponent))
    pairs_P2 = torch.cartesian_prod(real, generated)
    logp, reference = theta.log_softmax(0), _distribution(opponent).log()
    return spin_loss(logp[pairs_P2], reference[pairs_P2], loss=loss, beta=beta, divisor=len(pairs_P2)).loss


def _gradient(theta: Tensor, opponent: list[int], data: list[int], loss: LossName, beta: float) -> Tensor:
    theta = theta.clone().requires_grad_()
    _population_loss(theta, opponent, data, loss, beta).backward()
    assert theta.grad is not None
    return theta.grad


@pytest.mark.parametrize("beta", [0.3, 0.5, 1.0, 2.0, 5.0])
def test_the_minimiser_of_the_logistic_loss_is_the_opponent_times_a_power_of_the_ratio(beta: float) -> None:
    """Theorem 5.4: p_{t+1} is p_t (p_data / p_t)^(1/beta) / Z."""
    theta = _distribution(OPPONENT).log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _population_loss(theta, OPPONENT, DATA, "logistic", beta)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    expected = _distribution(OPPONENT) * (_distribution(DATA) / _distribution(OPPONENT)) ** (1 / beta)
    expected /= expected.sum()
    assert (theta.detach().softmax(0) - expected).abs().max() < 1e-6  # quadratic at the minimum: loss exact to 1e-13


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_the_gradient_vanishes_exactly_at_that_minimiser(beta: float) -> None:
    """Theorem 5.4 without an optimiser, hence to rounding."""
    theta = (1 - 1 / beta) * _distribution(OPPONENT).log() + (1 / beta) * _distribution(DATA).log()
    assert _gradient(theta, OPPONENT, DATA, "logistic", beta).abs().max() < 1e-15


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_a_model_equal_to_the_data_is_stationary_for_every_loss(loss: LossName, beta: float) -> None:
    """Theorem 5.2: once p_t = p_data, no loss moves theta away from it."""
    assert _gradient(_distribution(DATA).log(), DATA, DATA, loss, beta).abs().max() < 1e-15


@pytest.mark.parametrize("loss", LOSSES)
def test_any_other_opponent_is_not_stationary(loss: LossName) -> None:
    assert _gradient(_distribution(OPPONENT).log(), OPPONENT, DATA, loss, 1.0).abs().max() > 0.05


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [0.1, 0.7, 5.0])
def test_at_the_opponent_the_expected_gradient_is_a_multiple_of_supervised_fine_tuning(loss: LossName, beta: float) -> None:
    """With theta = theta_t every margin is 0, so E[gradient] = beta |l'(0)| * gradient of -E_data[log p_theta(y)]."""
    theta = _distribution(OPPONENT).log()
    sft = _distribution(OPPONENT) - _distribution(DATA)  # gradient of the cross-entropy by the logits: softmax - target
    expected = beta * SLOPE_AT_ZERO[loss] * sft
    assert torch.allclose(_gradient(theta, OPPONENT, DATA, loss, beta), expected, rtol=1e-12, atol=1e-15)


def test_the_least_logistic_loss_is_ln_two_minus_the_jensen_shannon_divergence() -> None:
    """Lemma C.2, at beta 1 where the minimiser is p_data: ln 2 - loss bounds how far data and opponent are apart."""
    data, opponent = _distribution(DATA), _distribution(OPPONENT)
    pair_data = data[:, None] * opponent[None, :]  # p+(y, y') and its mirror p-
    pair_mixed = (pair_data + pair_data.t()) / 2
    divergence = (pair_data * (pair_data / pair_mixed).log()).sum()
    loss = _population_loss(data.log(), OPPONENT, DATA, "logistic", 1.0)
    assert loss.item() == pytest.approx(math.log(2) - divergence.item(), abs=1e-14)


@pytest.mark.parametrize(("beta", "factor"), [(2.0, 0.5), (1.0, 0.0), (0.4, -1.5)])
def test_iterating_to_optimality_contracts_only_above_beta_one_half(beta: float, factor: float) -> None:
    """The centred log-ratio log p_t - log p_data is multiplied by 1 - 1/beta each iteration: it grows for beta below 1/2."""
    data, opponent = _distribution(DATA).log(), _distribution(OPPONENT).log()
    minimiser = (1 - 1 / beta) * opponent + (1 / beta) * data  # stationary by the test above
    before, after = opponent - data, minimiser - data
    assert torch.allclose(after - after.mean(), factor * (before - before.mean()), rtol=0, atol=1e-14)
    assert _gradient(minimiser, OPPONENT, DATA, "logistic", beta).abs().max() < 1e-15
