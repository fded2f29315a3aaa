"""Packing: nothing lost, little padding, plans that depend on the seed alone, balanced ranks."""

import pytest

from spin_megatron.data.batches import attention_cost, pair_tokens
from spin_megatron.data.packing import EMPTY_PACK, assign_ranks, padding_share, plan_packs, plan_steps
from spin_megatron.mcore.reference import PackedPairs
from spin_megatron.run.records import Pack, SpinPair
from tools.benchmarks.problem import ultrachat_like_lengths


def pairs_of(count: int, seed: int) -> list[tuple[str, int]]:
    """Ids and tokens of x, y and y' together."""
    return [(f"pair_{n}", x.prompt + x.real + x.generated) for n, x in enumerate(ultrachat_like_lengths(count, seed))]


def test_an_ultrachat_like_mix_is_packed_with_at_most_two_percent_padding_at_8192() -> None:
    packs = plan_packs(pairs_of(4000, seed=5), pack_tokens=8192, max_pairs_per_pack=None, seed=1)
    assert padding_share(packs, 8192) <= 0.02


def test_every_pair_is_in_exactly_one_pack_and_no_pack_overflows() -> None:
    lengths = pairs_of(500, seed=2)
    packs = plan_packs(lengths, pack_tokens=4096, max_pairs_per_pack=7, seed=1)
    assert sorted(pair_id for pack in packs for pair_id in pack.pair_ids) == sorted(pair_id for pair_id, _ in lengths)
    tokens_of = dict(lengths)
    for pack in packs:
        assert pack.num_tokens == sum(tokens_of[pair_id] for pair_id in pack.pair_ids) <= 4096
        assert len(pack.pair_ids) <= 7
    assert max(len(pack.pair_ids) for pack in packs) == 7
    assert [pack.pack_id for pack in packs] == list(range(len(packs)))


def test_a_pair_goes_where_the_least_room_is_left() -> None:
    # Whatever the order, 6 and 5 open packs of their own (6 + 5 > 10), 4 fits only best into the 6 and 5 into the 5.
    packs = plan_packs([("six", 6), ("five", 5), ("other_five", 5), ("four", 4)], pack_tokens=10, max_pairs_per_pack=None, seed=0)
    assert sorted(sorted(pack.pair_ids) for pack in packs) == [["five", "other_five"], ["four", "six"]]


def test_the_plan_depends_on_the_seed_but_not_on_the_order_of_the_pairs() -> None:
    lengths = pairs_of(200, seed=3)
    plan = plan_packs(lengths, pack_tokens=4096, max_pairs_per_pack=None, seed=9)
    assert plan_packs(lengths[::-1], pack_tokens=4096, max_pairs_per_pack=None, seed=9) == plan
    assert plan_packs(lengths, pack_tokens=4096, max_pairs_per_pack=None, seed=10) != plan


def test_a_plan_made_on_another_machine_is_the_same() -> None:
    # Written down once: random.Random with a string seed does not depend on the platform or on PYTHONHASHSEED.
    packs = plan_packs([(name, 3) for name in "abcdef"], pack_tokens=6, max_pairs_per_pack=None, seed=1)
    assert [pack.pair_ids for pack in packs] == [("f", "b"), ("d", "a"), ("e", "c")]


def test_a_pair_longer_than_a_pack_is_named_with_the_length_that_would_do() -> None:
    message = r"train\.pack_tokens=10 is too short for 2 pairs, the longest 'b' with 12 tokens; set .* to 12 or more"
    with pytest.raises(ValueError, match=message):
        plan_packs([("a", 11), ("b", 12), ("c", 3)], pack_tokens=10, max_pairs_per_pack=None, seed=0)


def test_a_pair_listed_twice_is_named() -> None:
    with pytest.raises(ValueError, match="'b' is listed twice"):
        plan_packs([("a", 1), ("b", 1), ("b", 1)], pack_tokens=10, max_pairs_per_pack=None, seed=0)


def _packs(count: int, pairs_each: int) -> list[Pack]:
    return [Pack(number, tuple(f"{number}.{k}" for k in range(pairs_each)), 100) for number in range(count)]


@pytest.mark.parametrize(
    ("pairs_per_step", "data_parallel", "size"),
    [
        (64, 1, 16),  # 64 / 4 pairs a pack
        (10, 1, 3),  # 2.5 goes up
        (9, 1, 2),  # 2.25 goes down
        (1, 1, 1),  # at least one pack
        (1, 8, 8),  # at least one a rank
        (64, 3, 15),  # 16 is between 15 and 18, nearer to 15
    ],
)
def test_a_step_has_the_multiple_of_the_ranks_nearest_to_the_wanted_pairs(pairs_per_step: int, data_parallel: int, size: int) -> None:
    steps = plan_steps(_packs(40, pairs_each=4), pairs_per_step=pairs_per_step, data_parallel=data_parallel, seed=0, epoch=0)
    assert [len(step) for step in steps[:-1]] == [size] * (len(steps) - 1)
    assert 0 < len(steps[-1]) <= size
    assert sorted(pack.pack_id for step in steps for pack in step) == list(range(40))


def test_each_epoch_has_its_own_order_and_an_epoch_repeats_itself() -> None:
    packs = _packs(20, pairs_each=2)

    def order(seed: int, epoch: int) -> list[int]:
        steps = plan_steps(packs, pairs_per_step=8, data_parallel=1, seed=seed, epoch=epoch)
        return [pack.pack_id for step in steps for pack in step]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_no_packs_make_no_steps() -> None:
    assert plan_steps([], pairs_per_step=4, data_parallel=2, seed=0, epoch=0) == []


def test_ranks_get_equally_many_packs_and_equal_cost() -> None:
    packs = _packs(6, pairs_each=1)
    ranks = assign_ranks(packs, 2, costs={0: 9, 1: 7, 2: 6, 3: 5, 4: 4, 5: 3})
    # Longest first: 9 | 7, then 6 to the 7, 5 to the 9, 4 to the 13, and 3 to the only rank with a free place.
    assert [[pack.pack_id for pack in rank] for rank in ranks] == [[0, 3, 5], [1, 2, 4]]


def test_a_step_that_does_not_divide_is_filled_with_empty_packs() -> None:
    ranks = assign_ranks(_packs(5, pairs_each=1), 4, costs=dict.fromkeys(range(5), 1))
    assert [len(rank) for rank in ranks] == [2, 2, 2, 2]
    assert sum(pack is EMPTY_PACK for rank in ranks for pack in rank) == 3
    assert sorted(pack.pack_id for rank in ranks for pack in rank if pack is not EMPTY_PACK) == [0, 1, 2, 3, 4]


def test_attention_of_an_ultrachat_like_step_is_spread_within_a_hundredth() -> None:
    lengths = ultrachat_like_lengths(4000, seed=5)
    pairs = {f"pair_{n}": SpinPair(f"pair_{n}", (1,) * x.prompt, (1,) * x.real, (1,) * x.generated, 0) for n, x in enumerate(lengths)}
    sizes = [(pair_id, pair_tokens(pair, share_prompt=True)) for pair_id, pair in pairs.items()]
    packed = PackedPairs(pairs, tuple(plan_packs(sizes, pack_tokens=8192, max_pairs_per_pack=None, seed=1)), 8192, share_prompt=True)
    step = plan_steps(packed.packs, pairs_per_step=256, data_parallel=4, seed=0, epoch=0)[0]
    totals = [
        sum(attention_cost(pairs[pair_id], share_prompt=True) for pack in packed.share_of(step, 4, rank) for pair_id in pack.pair_ids)
        for rank in range(4)
    ]
    assert len(step) == 24  # 6 packs a rank
    assert max(totals) <= 1.01 * sum(totals) / 4
    in_order = [sum(attention_cost(pairs[i], share_prompt=True) for pack in step[r::4] for i in pack.pair_ids) for r in range(4)]
    assert max(totals) - min(totals) < max(in_order) - min(in_order)
