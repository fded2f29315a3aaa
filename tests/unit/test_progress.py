"""Which packs come next, worked out by hand on small plans."""

from spin_megatron.data.progress import Progress, StepPlan
from spin_megatron.run.records import Pack


def plan(num_packs: int, *, data_parallel: int = 1, pairs_per_step: int = 2, num_epochs: int = 2) -> StepPlan:
    """Packs of one pair each, so that a step has pairs_per_step packs."""
    packs = tuple(Pack(number, (f"pair_{number}",), 10) for number in range(num_packs))
    return StepPlan(packs, pairs_per_step, data_parallel, seed=5, num_epochs=num_epochs)


def ids(steps: StepPlan, progress: Progress) -> list[list[int]]:
    return [[pack.pack_id for pack in step.packs] for step in steps.remaining(progress)]


def test_every_epoch_sees_every_pack_once_in_its_own_order() -> None:
    order = [pack for step in ids(plan(7), Progress()) for pack in step]
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7))
    assert order[:7] != order[7:]


def test_five_packs_two_a_step_make_steps_of_two_two_and_one() -> None:
    steps = list(plan(5).remaining(Progress()))
    assert [len(step.packs) for step in steps] == [2, 2, 1, 2, 2, 1]
    assert [step.position for step in steps] == [0, 1, 2, 3, 4, 5]
    assert [step.num_pairs for step in steps] == [2, 2, 1, 2, 2, 1]
    assert [step.after for step in steps[:4]] == [Progress(1, 0, 2), Progress(2, 0, 4), Progress(3, 1, 0), Progress(4, 1, 2)]


def test_going_on_after_any_step_gives_the_steps_that_were_left() -> None:
    whole = list(plan(7).remaining(Progress()))
    for done in range(len(whole)):
        assert list(plan(7).remaining(whole[done].after)) == whole[done + 1 :]


def test_skipped_updates_are_carried_along() -> None:
    step = next(plan(5).remaining(Progress(step=2, epoch=0, packs_consumed=4, num_skipped=1)))
    assert step.after == Progress(step=3, epoch=1, packs_consumed=0, num_skipped=1)
    assert step.after.num_updates == 2


def test_another_data_parallel_size_goes_on_in_the_same_order_and_repeats_no_pack() -> None:
    # At DP 1 a step has 2 packs; 6 packs were consumed. At DP 4 steps of the same order have 4: [0..4) is done, half of [4..8) too.
    order = [pack for step in ids(plan(10, num_epochs=1), Progress()) for pack in step]
    moved = list(plan(10, data_parallel=4, pairs_per_step=4, num_epochs=1).remaining(Progress(step=3, packs_consumed=6)))
    assert [[pack.pack_id for pack in step.packs] for step in moved] == [order[6:8], order[8:10]]
    assert [step.position for step in moved] == [1, 2]
    assert [step.after.step for step in moved] == [4, 5]


def test_a_finished_run_has_no_step_left() -> None:
    last = list(plan(5).remaining(Progress()))[-1].after
    assert last == Progress(step=6, epoch=2)
    assert list(plan(5).remaining(last)) == []
