"""The packed layout, checked against token lists written by hand."""

import pytest
import torch

from spin_megatron.data.batches import ScoringSequence, attention_cost, make_batch, make_scoring_batch, pair_tokens, sequence_tokens
from spin_megatron.mcore.varlen import plan_varlen
from spin_megatron.run.records import SpinPair

PAIR = SpinPair("p", prompt_ids=(11, 12, 13), real_ids=(21, 22), generated_ids=(31, 32, 33), made_in_iteration=0)
SHORT = SpinPair("q", prompt_ids=(14,), real_ids=(24,), generated_ids=(34, 35), made_in_iteration=0)


def test_a_shared_prompt_stands_once_and_both_answers_continue_its_positions() -> None:
    batch = make_batch([PAIR, SHORT], pack_tokens=10, pad_id=0, share_prompt=True)
    #                              x           y   y'      x   y'  padding; the last token of each answer is not computed
    assert batch.tokens_T.tolist() == [11, 12, 13, 21, 31, 32, 14, 34, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 3, 4, 0, 1, 0, 0]
    assert batch.branches_B4.tolist() == [[0, 0, 0, 3], [0, 3, 3, 1], [0, 3, 4, 2], [6, 0, 6, 1], [6, 1, 7, 1]]
    assert batch.rows_R.tolist() == [2, 3, 2, 4, 5, 6, 6, 7]  # the last prompt token predicts y and y'
    assert batch.targets_R.tolist() == [21, 22, 31, 32, 33, 24, 34, 35]
    assert batch.lengths_Q.tolist() == [2, 3, 1, 2]
    assert batch.pair_ids == ("p", "q")


def test_without_sharing_each_answer_has_its_own_copy_of_the_prompt() -> None:
    batch = make_batch([PAIR], pack_tokens=10, pad_id=9, share_prompt=False)
    assert batch.tokens_T.tolist() == [11, 12, 13, 21, 11, 12, 13, 31, 32, 9]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0]
    assert batch.branches_B4.tolist() == [[0, 0, 0, 4], [4, 0, 4, 5]]
    assert batch.rows_R.tolist() == [2, 3, 6, 7, 8]
    assert batch.targets_R.tolist() == [21, 22, 31, 32, 33]
    assert batch.lengths_Q.tolist() == [2, 3]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_planned_length_is_the_length_taken(share_prompt: bool) -> None:
    for pair in (PAIR, SHORT):
        num_tokens = pair_tokens(pair, share_prompt=share_prompt)
        exact = make_batch([pair], pack_tokens=num_tokens, pad_id=0, share_prompt=share_prompt)
        assert int(exact.branches_B4[:, 3].sum()) == num_tokens
        with pytest.raises(ValueError, match=f"take {num_tokens} tokens but a pack has {num_tokens - 1}"):
            make_batch([pair], pack_tokens=num_tokens - 1, pad_id=0, share_prompt=share_prompt)


@pytest.mark.parametrize(("unit", "kept"), [(1, 6), (4, 8)])
def test_only_padding_that_fills_a_unit_is_left(unit: int, kept: int) -> None:
    batch = make_batch([PAIR], pack_tokens=16, pad_id=0, share_prompt=True)
    assert int(batch.branches_B4[-1, 2:].sum()) == 6
    short = batch.without_padding(unit)
    assert (short.tokens_T.tolist(), short.positions_T.tolist()) == (batch.tokens_T[:kept].tolist(), batch.positions_T[:kept].tolist())
    assert make_batch([], pack_tokens=16, pad_id=0, share_prompt=True).without_padding(unit).tokens_T.shape == (unit,)


def test_no_pairs_make_a_batch_of_padding() -> None:
    batch = make_batch([], pack_tokens=4, pad_id=7, share_prompt=True)
    assert batch.tokens_T.tolist() == [7, 7, 7, 7]
    assert batch.branches_B4.shape == (0, 4)
    assert batch.branches_B4.dtype == batch.rows_R.dtype == batch.lengths_Q.dtype == torch.int64
    assert batch.rows_R.numel() == batch.targets_R.numel() == batch.lengths_Q.numel() == 0


def test_scoring_keeps_an_empty_response_as_a_sequence_of_no_rows() -> None:
    sequences = [ScoringSequence("a", (1, 2), ()), ScoringSequence("b", (3,), (4, 5, 6))]
    batch = make_scoring_batch(sequences, pack_tokens=6, pad_id=0)
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 0]
    assert batch.rows_R.tolist() == [2, 3, 4]
    assert batch.targets_R.tolist() == [4, 5, 6]
    assert batch.lengths_Q.tolist() == [0, 3]
    assert [sequence_tokens(sequence) for sequence in sequences] == [2, 3]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_an_empty_prompt_is_refused_by_name(share_prompt: bool) -> None:
    with pytest.raises(ValueError, match="'e' has an empty prompt"):
        make_batch([SpinPair("e", (), (1,), (2,), 0)], pack_tokens=8, pad_id=0, share_prompt=share_prompt)


def test_attention_cost_counts_query_key_products() -> None:
    # shared: x 3 rows: 1+2+3; y 1 row: 3+1; y' 2 rows: (3+1)+(3+2). unshared: 1+2+3+4 and 1+2+3+4+5.
    assert attention_cost(PAIR, share_prompt=True) == 6 + 4 + 9
    assert attention_cost(PAIR, share_prompt=False) == 10 + 15


def test_all_that_an_accelerator_is_given_of_a_pack_is_copied_from_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    copy = torch.Tensor.to

    def copied(tensor: torch.Tensor, target: object, **kwargs: bool) -> torch.Tensor:
        assert target != torch.device("meta") or (kwargs == {"non_blocking": True} and any(tensor is held for held in pinned))
        return copy(tensor, target, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", copied)
    batch = make_batch([PAIR], pack_tokens=16, pad_id=0, share_prompt=True).to(torch.device("meta"))
    assert {tensor.device.type for tensor in (batch.tokens_T, batch.positions_T, batch.rows_R, batch.targets_R)} == {"meta"}
    assert batch.branches_B4.device.type == "cpu"
    assert any(batch.lengths_Q is held for held in pinned)
    plan = plan_varlen(batch.branches_B4, torch.device("meta"))
    assert plan.keys is not None
    assert plan.cu_keys_B1.device == plan.keys.source_K.device == torch.device("meta")
