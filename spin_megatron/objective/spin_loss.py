"""The SPIN objective on one number a sequence: the summed log-probability of its response.

SPIN (arXiv 2401.01335, equation 4.7) trains theta against the opponent theta_t by

    L(theta) = E[ l( beta * (log p_theta(y|x)/p_theta_t(y|x) - log p_theta(y'|x)/p_theta_t(y'|x)) ) ],   y' ~ p_theta_t(.|x)

for a convex decreasing l with l'(0) < 0. The four of the paper's section 4 stand in `LOSSES`, each a function of
t = beta * margin; a new loss is one function and one entry.

Shapes: P pairs; the 2 of `_P2` is (real y, generated y'). Log-probabilities are sums over response tokens in nats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["logistic", "hinge", "exponential", "correlation"]

# Beyond exp(20) the exponential loss goes on as its tangent line: still convex, decreasing and once differentiable (all that the
# theory asks of l), while one hopeless pair can no longer turn a step into inf.
EXPONENTIAL_TANGENT_FROM = 20.0

METRIC_NAMES = (
    "num_pairs",
    "loss",
    "spin_loss",
    "nll",
    "margin",
    "margin_abs",
    "accuracy",
    "reward_real",
    "reward_generated",
    "logp_real",
    "logp_generated",
)


def logistic(t_P: Tensor) -> Tensor:
    """l(t) = log(1 + exp(-t)), the paper's default; softplus does not overflow for large -t."""
    return functional.softplus(-t_P)


def hinge(t_P: Tensor) -> Tensor:
    """l(t) = max(0, 1 - t)."""
    return functional.relu(1.0 - t_P)


def exponential(t_P: Tensor) -> Tensor:
    """l(t) = exp(-t), continued by its tangent where -t > EXPONENTIAL_TANGENT_FROM."""
    exponent_P = (-t_P).clamp(max=EXPONENTIAL_TANGENT_FROM)
    return torch.exp(exponent_P) * (1.0 + (-t_P - exponent_P))


def correlation(t_P: Tensor) -> Tensor:
    """l(t) = 1 - t: linear, hence unbounded below; the paper names it but warns of just that."""
    return 1.0 - t_P


LOSSES: Mapping[LossName, Callable[[Tensor], Tensor]] = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "correlation": correlation,
}
assert set(LOSSES) == set(get_args(LossName))


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar to differentiate, already divided by the caller's divisor.

    metrics: scalars under METRIC_NAMES, each a SUM over this call's pairs (of the loss without the divisor), detached and cloned
    because Megatron Core's schedules divide the returned loss in place. Sums add up over micro-batches and data-parallel ranks;
    `mean_metrics` divides them by num_pairs.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def spin_margins(
    logp_P2: Tensor, reference_P2: Tensor, *, lengths_P2: Tensor | None = None, length_normalised: bool = False
) -> tuple[Tensor, Tensor]:
    """Per sequence log-ratios [P, 2] and per pair margins [P] = ratio of y minus ratio of y', in nats (per token if normalised).

    The policy and its reference are subtracted first, sequence by sequence: with equal inputs (step 0) every margin is exactly 0.
    """
    ratio_P2 = logp_P2 - reference_P2
    if length_normalised:
        ratio_P2 = ratio_P2 / _token_counts(lengths_P2, ratio_P2)
    return ratio_P2, ratio_P2[:, 0] - ratio_P2[:, 1]


def spin_loss(
    logp_P2: Tensor,
    reference_P2: Tensor,
    *,
    loss: LossName,
    beta: float,
    divisor: float,
    lengths_P2: Tensor | None = None,
    length_normalised: bool = False,
    nll_weight: float = 0.0,
) -> LossOutput:
    """SPIN loss of P pairs: sum over pairs of l(beta * margin) + nll_weight * NLL(y), divided by `divisor`.

    logp_P2, reference_P2: fp32 (fp64 in tests) log-prob sums in nats, columns (real, generated); gradient flows into logp_P2 only.
    divisor: what one optimizer step's pairs are divided by, the same for each of its micro-batches and ranks, so that their
        gradients simply add up (a mean per micro-batch would weigh pairs by how they were packed).
    lengths_P2: response tokens of each sequence; needed by length_normalised (log-ratios per token) and by nll_weight. Without, the
        metric nll is NaN.
    nll_weight: adds -log p(y|x) / |y|, the per-token negative log-likelihood of the human answer.
    P = 0 (a pack of padding) gives exactly 0, still connected to the graph so that backward runs its collectives on every rank.
    No collectives. Raises ValueError for an unknown loss, a divisor that is not positive, or missing lengths.
    """
    if loss not in LOSSES:
        raise ValueError(f"objective.loss={loss!r} is unknown; use one of {', '.join(LOSSES)}.")
    if not divisor > 0:
        raise ValueError(f"divisor={divisor!r} of the SPIN loss must be positive: the number of pairs in one optimizer step.")
    assert logp_P2.shape == reference_P2.shape == (logp_P2.shape[0], 2), (logp_P2.shape, reference_P2.shape)
    assert logp_P2.dtype in (torch.float32, torch.float64), f"log-probs in {logp_P2.dtype} lose whole tenths of a nat"
    reference_P2 = reference_P2.detach()  # the opponent is a constant: caching it must not differ from recomputing it
    ratio_P2, margin_P = spin_margins(logp_P2, reference_P2, lengths_P2=lengths_P2, length_normalised=length_normalised)
    spin_P = LOSSES[loss](beta * margin_P)
    if lengths_P2 is None and nll_weight == 0.0:
        nll_P = torch.full_like(spin_P, torch.nan)
    else:
        nll_P = -logp_P2[:, 0] / _token_counts(lengths_P2, logp_P2)[:, 0]
    total_P = spin_P + nll_weight * nll_P if nll_weight != 0.0 else spin_P
    per_pair = {
        "num_pairs": torch.ones_like(spin_P),
        "loss": total_P,
        "spin_loss": spin_P,
        "nll": nll_P,
        "margin": margin_P,
        "margin_abs": margin_P.abs(),
        "accuracy": (margin_P > 0).to(margin_P.dtype),
        "reward_real": beta * ratio_P2[:, 0],
        "reward_generated": beta * ratio_P2[:, 1],
        "logp_real": logp_P2[:, 0],
        "logp_generated": logp_P2[:, 1],
    }
    metrics = {name: values_P.detach().sum().clone() for name, values_P in per_pair.items()}
    return LossOutput(loss=total_P.sum() / divisor, metrics=metrics)


def loss_at_zero(loss: LossName) -> float:
    """l(0): what the SPIN loss must be before the first step of an iteration (ln 2 for logistic, 1 for the others)."""
    return float(LOSSES[loss](torch.zeros((), dtype=torch.float64)))


def metrics_vector(metrics: Mapping[str, Tensor]) -> Tensor:
    """One call's metric sums as a [K] fp64 tensor in METRIC_NAMES order: one addition, one all-reduce for all of them."""
    return torch.stack([metrics[name] for name in METRIC_NAMES]).double()  # fp64: sums over a whole epoch


def mean_metrics(totals_K: Tensor) -> dict[str, float]:
    """Means per pair of summed `metrics_vector`s; num_pairs stays a count. No pairs at all gives NaN means, never a false 0."""
    totals = dict(zip(METRIC_NAMES, totals_K.tolist(), strict=True))
    num_pairs = totals.pop("num_pairs")
    return {"num_pairs": num_pairs} | {name: total / num_pairs if num_pairs else float("nan") for name, total in totals.items()}


def _token_counts(lengths_P2: Tensor | None, like_P2: Tensor) -> Tensor:
    """Response lengths as a float divisor on the device of `like_P2`; an empty response has log-prob 0 and counts as one token."""
    if lengths_P2 is None:
        raise ValueError("objective.length_normalised and objective.nll_weight divide by response lengths: pass lengths_P2.")
    assert lengths_P2.shape == like_P2.shape, (lengths_P2.shape, like_P2.shape)
    # Converted there: a copy made here would not be page-locked.
    return lengths_P2.to(like_P2.device, non_blocking=True).to(like_P2.dtype).clamp(min=1)
