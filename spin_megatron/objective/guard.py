"""Signs of a training that goes wrong, judged from a step's numbers before its update: spikes, collapse, saturation.

The SPIN loss sees differences only, so it can fall while the human answers themselves become unlikely (collapse), and once
every margin is large its gradient is nothing but rounding (saturation). A spike is measured by the median of the last updates, which
one outlier does not move. The judgement depends on numbers that metrics.jsonl keeps, so a run that is killed decides the same again.
"""

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

logger = logging.getLogger(__name__)

Action = Literal["warn", "skip", "stop"]

# A median of fewer updates says little: at the start every loss is l(0) and every step a large one.
MIN_UPDATES = 8


@dataclass(frozen=True)
class Limits:
    """What is judged; None: not judged. The names are those of the settings in [guard].

    max_loss_rise: of the loss over the median, in nats. max_grad_norm_ratio: of the gradient norm to the median.
    max_logp_drop: nats an answer (a token with length normalisation), mean drop of log p(y) of the step's human answers from theta_t's.
    max_margin: nats, beta times the step's mean margin.
    """

    max_loss_rise: float | None = None
    max_grad_norm_ratio: float | None = None
    max_logp_drop: float | None = None
    max_margin: float | None = None


@dataclass(frozen=True)
class Excess:
    """A limit that was passed, and the sentence that says so."""

    limit: str
    message: str


class Guard:
    """The recent updates of one iteration, and the limits a next one is held to.

    on_excess: "warn" lets the update be made; "skip" and "stop" do not. window: updates whose median is the usual.
    past: rows of metrics.jsonl so far, oldest first; a resumed run gives them again.
    """

    def __init__(
        self, limits: Limits, *, on_excess: Action, window: int, beta: float, past: Iterable[Mapping[str, float | str]] = ()
    ) -> None:
        self._limits, self._on_excess, self._beta = limits, on_excess, beta
        self._found: tuple[Excess, ...] = ()
        self._losses: deque[float] = deque(maxlen=window)
        self._grad_norms: deque[float] = deque(maxlen=window)
        for row in past:
            if not float(row["skipped"]):
                self._remember(float(row["loss"]), float(row["grad_norm"]))

    def judge(self, metrics: Mapping[str, float], grad_norm: float) -> bool:
        """Whether a step's update may be made; called once a step with finite numbers. A limit is logged when it begins to be passed.

        Args:
            metrics: objective.spin_loss.METRIC_NAMES, means over the step's pairs.
        """
        before = {excess.limit for excess in self._found}
        self._found = self._excesses(metrics, grad_norm)
        for excess in self._found:
            if excess.limit not in before:
                logger.warning("%s", excess.message)
        is_allowed = not self._found or self._on_excess == "warn"
        if is_allowed:
            self._remember(metrics["loss"], grad_norm)
        return is_allowed

    @property
    def found(self) -> tuple[Excess, ...]:
        """The limits that the last judged step passed."""
        return self._found

    def _remember(self, loss: float, grad_norm: float) -> None:
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)

    def _excesses(self, metrics: Mapping[str, float], grad_norm: float) -> tuple[Excess, ...]:
        usual_loss, usual_norm = (median(past) if len(past) >= MIN_UPDATES else math.nan for past in (self._losses, self._grad_norms))
        past = f"the median of {len(self._losses)} updates"
        # A comparison with NaN, the median of too few, is False.
        measured = (
            ("max_loss_rise", metrics["loss"] - usual_loss, f"loss {metrics['loss']:.4g}, {usual_loss:.4g} is {past}"),
            ("max_grad_norm_ratio", grad_norm / (usual_norm or math.nan), f"gradient norm {grad_norm:.4g}, {usual_norm:.4g} is {past}"),
            ("max_logp_drop", -metrics["reward_real"] / self._beta, "log p(y) of the human answers fell (nats)"),
            ("max_margin", self._beta * metrics["margin"], "beta times the mean margin, where the loss is flat"),
        )
        return tuple(
            Excess(name, f"{what}: {value:.4g} (guard.{name}={limit:g})")
            for name, value, what in measured
            if (limit := getattr(self._limits, name)) is not None and value > limit
        )
