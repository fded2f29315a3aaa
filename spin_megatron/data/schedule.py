"""The learning rate of a step, from the step alone: nothing to save, nothing to drift on resume.

Warm-up rises linearly and reaches the peak with its last step; unlike transformers' schedule the first update is not made
with a learning rate of 0. From there `linear` and `cosine` fall to 0 at `num_steps`, `constant` stays. A run that stops
early (stop_epoch before schedule_epochs) leaves the schedule where it then is: 2 of 6 linear epochs end at 74% of the peak.
"""

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class Schedule:
    """peak: highest learning rate; num_steps: steps of schedule_epochs epochs; warmup_fraction: share of them that warms up."""

    name: ScheduleName
    peak: float
    num_steps: int
    warmup_fraction: float

    @property
    def num_warmup_steps(self) -> int:
        """Rounded up, as transformers does; rounding first keeps 0.1 * 30 from being a little more than 3."""
        return math.ceil(round(self.num_steps * self.warmup_fraction, 6))

    def at(self, step: int) -> float:
        """Learning rate of the update with this number, from 0. Beyond num_steps: that of the end of the schedule."""
        warmup = self.num_warmup_steps
        if step < warmup:
            return self.peak * (step + 1) / warmup
        if self.name == "constant":
            return self.peak
        progress = min(1.0, (step - warmup) / max(1, self.num_steps - warmup))
        if self.name == "linear":
            return self.peak * (1.0 - progress)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
