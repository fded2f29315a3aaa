"""What a pass refuses and how it fills its schedule, without a model."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from spin_megatron.data.batches import make_batch
from spin_megatron.mcore import steps
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.mcore.steps import empty_batch, fill_schedule, forward_step, gather_over_data, on_device, run_schedule, score_packs
from spin_megatron.plan.shape import ParallelLayout
from spin_megatron.run.records import SpinPair


class _LayoutOnly:
    """Stands for a Runtime where only the layout is read."""

    def __init__(self, layout: ParallelLayout) -> None:
        self.layout = layout


def _at(layout: ParallelLayout) -> Runtime:
    return cast(Runtime, _LayoutOnly(layout))


@pytest.mark.parametrize(("num_packs", "filled"), [(1, 4), (4, 4), (5, 8)])
def test_virtual_stages_get_a_multiple_of_the_pipeline_s_packs(num_packs: int, filled: int) -> None:
    batches = [empty_batch(8) for _ in range(num_packs)]
    found = fill_schedule(batches, _at(ParallelLayout(pipeline=4, virtual_pipeline=2)))
    assert len(found) == filled
    assert all(mine is batch for mine, batch in zip(found, batches, strict=False))
    assert {batch.tokens_T.shape[0] for batch in found} == {8}
    assert all(batch.rows_R.numel() == 0 for batch in found[num_packs:])
    assert fill_schedule(batches, _at(ParallelLayout(pipeline=4))) == batches


def test_a_pack_length_that_sequence_parallelism_cannot_split_is_refused_with_one_that_it_can() -> None:
    layout = ParallelLayout(tensor=4, sequence=True)
    with pytest.raises(ValueError, match=r"train\.pack_tokens=10 is not a multiple of 4, .*parallel\.tensor=4 parts.*use 12\."):
        run_schedule(lambda *_: (torch.zeros(()), print), [torch.nn.Identity()], [empty_batch(10)], _at(layout), forward_only=True)


@pytest.mark.parametrize(
    ("layout", "device", "computed"),
    [
        (ParallelLayout(), "cpu", [3, 1]),
        (ParallelLayout(tensor=2, sequence=True), "cpu", [4, 2]),
        (ParallelLayout(pipeline=2), "cpu", [16, 16]),
        (ParallelLayout(), "meta", [16, 16]),
    ],
)
def test_a_cpu_leaves_padding_out_where_no_rank_waits_for_packs_of_one_length(
    layout: ParallelLayout, device: str, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "on_device", lambda batches, _device: batches)
    monkeypatch.setattr(
        steps, "get_forward_backward_func", lambda: lambda **given: [batch.tokens_T.shape[0] for batch in given["data_iterator"][0]]
    )
    pair = SpinPair("p", prompt_ids=(1,), real_ids=(2, 3), generated_ids=(4, 5), made_in_iteration=0)
    batches = [make_batch([pair], pack_tokens=16, pad_id=0, share_prompt=True), empty_batch(16)]
    runtime = cast(Runtime, SimpleNamespace(layout=layout, device=torch.device(device)))
    assert run_schedule(forward_step(print), [torch.nn.Identity()], batches, runtime, forward_only=True) == computed


def test_on_the_cpu_batches_pass_as_they_are() -> None:
    batches = [empty_batch(4), empty_batch(4)]
    assert all(found is batch for found, batch in zip(on_device(batches, torch.device("cpu")), batches, strict=True))


def test_no_packs_give_no_scores() -> None:
    with running(ParallelLayout(), device="cpu", seed=1) as runtime:
        assert score_packs([], [], runtime) == []
        assert gather_over_data("mine", runtime) == ["mine"]
