"""Which step comes next: the order of packs as a function of how far training got.

Nothing of a sampler is saved but three numbers. A run that goes on at another data-parallel size has other step
boundaries in the same order of packs; it makes what is left of the step it is in, and then whole ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from spin_megatron.data.packing import plan_steps
from spin_megatron.run.records import Pack


@dataclass(frozen=True)
class Progress:
    """How far training got. The sampler, the schedule and the optimizer's step count follow from it.

    step: updates made or skipped; epoch: the one that is under way; packs_consumed: of that epoch's order of packs.
    num_skipped: updates left out because loss or gradients were not finite.
    """

    step: int = 0
    epoch: int = 0
    packs_consumed: int = 0
    num_skipped: int = 0

    @property
    def num_updates(self) -> int:
        return self.step - self.num_skipped


@dataclass(frozen=True)
class PlannedStep:
    """packs: of all ranks. position: the step's number in the schedule. after: progress once it is made (num_skipped unchanged)."""

    packs: list[Pack]
    position: int
    after: Progress

    @property
    def num_pairs(self) -> int:
        return sum(len(pack.pair_ids) for pack in self.packs)


@dataclass(frozen=True)
class StepPlan:
    """The steps of all epochs.

    seed: decides each epoch's order of packs. num_epochs: how many are trained.
    """

    packs: tuple[Pack, ...]
    pairs_per_step: int
    data_parallel: int
    seed: int
    num_epochs: int

    def epoch(self, epoch: int) -> list[list[Pack]]:
        """The steps of one epoch, each a list of packs."""
        return plan_steps(
            self.packs, pairs_per_step=self.pairs_per_step, data_parallel=self.data_parallel, seed=self.seed, epoch=epoch
        )

    @cached_property
    def steps_per_epoch(self) -> int:
        return len(self.epoch(0))

    def remaining(self, progress: Progress) -> Iterator[PlannedStep]:
        """The steps after `progress`, to the end of the last epoch."""
        for epoch in range(progress.epoch, self.num_epochs):
            consumed = progress.packs_consumed if epoch == progress.epoch else 0
            steps, end = self.epoch(epoch), 0
            for index, packs in enumerate(steps):
                end += len(packs)
                if end <= consumed:
                    continue
                packs = packs[max(0, consumed - (end - len(packs))) :]
                is_last = index == len(steps) - 1
                progress = replace(
                    progress, step=progress.step + 1, epoch=epoch + 1 if is_last else epoch, packs_consumed=0 if is_last else end
                )
                yield PlannedStep(packs, epoch * len(steps) + index, progress)
