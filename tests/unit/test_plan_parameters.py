"""Parameters of a rank and their buffers, from sizes worked out by hand. Megatron Core's own are in tests/parity."""

from dataclasses import replace

import pytest

from spin_megatron.plan.parameters import (
    RankParameter,
    build_buffer,
    chunk_parameters,
    count_parameters,
    padded_vocab,
    rank_parameters,
    split_by_kind,
)
from spin_megatron.plan.shape import ModelShape, ParallelLayout

SMALL = ModelShape("llama", 4, 8, 12, 4, 2, 2, 10, 64, 1e-5, 1e4)
LLAMA3_70B = ModelShape("llama", 80, 8192, 28672, 64, 8, 128, 128256, 8192, 1e-5, 5e5)


def test_a_small_model_counts_as_by_hand() -> None:
    # Layer: norms 2 x 8; qkv (4 + 2 x 2) x 2 = 16 rows x 8; proj 8 x 8; fc1 2 x 12 x 8; fc2 8 x 12 -> 16 + 128 + 64 + 192 + 96 = 496.
    # Model: 4 x 496 + embedding 10 x 8 + head 10 x 8 + final norm 8 = 1984 + 168.
    assert count_parameters(SMALL) == 2152
    assert count_parameters(replace(SMALL, tied_embeddings=True)) == 2152 - 80


def test_ranks_of_llama3_70b_hold_what_its_sizes_say() -> None:
    layout = ParallelLayout(tensor=8, pipeline=4)
    # Layer on one of 8 tensor ranks: norms 2 x 8192 whole; qkv (64 + 16) x 128 / 8 = 1280 rows x 8192; proj 8192 x 1024;
    # fc1 7168 x 8192; fc2 8192 x 3584.
    layer = 2 * 8192 + 8192 * (1280 + 1024 + 7168 + 3584)
    vocabulary = 128256 // 8 * 8192
    held = [sum(p.numel for chunk in rank_parameters(LLAMA3_70B, layout, rank) for p in chunk) for rank in range(4)]
    assert held == [20 * layer + vocabulary, 20 * layer, 20 * layer, 20 * layer + vocabulary + 8192]


def test_a_tied_head_is_counted_once_in_one_stage_and_twice_in_two() -> None:
    tied = replace(SMALL, tied_embeddings=True)
    assert "output_layer.weight" not in [p.name for p in chunk_parameters(tied, ParallelLayout(), 0)]
    two = [p for rank in (0, 1) for p in chunk_parameters(tied, ParallelLayout(pipeline=2), rank)]
    assert sum(p.numel for p in two) == count_parameters(tied) + 80
    assert [p.name for p in two if p.is_shared] == ["embedding.word_embeddings.weight", "output_layer.weight"]


def test_virtual_stages_put_the_embedding_first_and_the_head_last() -> None:
    layout = ParallelLayout(pipeline=2, virtual_pipeline=2)
    assert layout.layers_of_chunk(SMALL.num_layers, 0) == 1
    chunks = [chunk for rank in (0, 1) for chunk in rank_parameters(SMALL, layout, rank)]
    ends = [[p.name for p in chunk if not p.name.startswith("decoder.layers")] for chunk in chunks]
    assert ends == [["embedding.word_embeddings.weight"], [], [], ["decoder.final_layernorm.weight", "output_layer.weight"]]


@pytest.mark.parametrize(("vocab_size", "tensor", "rows"), [(10, 1, 10), (10, 4, 12), (128256, 8, 128256), (32001, 8, 32008), (7, 8, 8)])
def test_the_vocabulary_is_padded_to_as_many_rows_a_rank(vocab_size: int, tensor: int, rows: int) -> None:
    assert padded_vocab(vocab_size, tensor) == rows


def test_experts_are_split_over_expert_ranks_and_routers_are_not() -> None:
    mixture = replace(SMALL, family="mixtral", num_experts=4, experts_per_token=2, expert_ffn_hidden_size=6)
    # An expert: 3 x 6 x 8 = 144. Layer: norms 16, qkv 128, proj 64, router 32, four experts 576 -> 816.
    assert count_parameters(mixture) == 4 * 816 + 168
    assert count_parameters(mixture, active=True) == 4 * (816 - 2 * 144) + 168
    dense, experts = split_by_kind(chunk_parameters(mixture, ParallelLayout(data=2, expert=2), 0))
    assert sum(p.numel for p in experts) == 4 * 2 * 144
    assert sum(p.numel for p in dense) == 4 * 240 + 168


def test_an_unsharded_buffer_has_no_padding_and_runs_backwards() -> None:
    buffer = build_buffer([RankParameter("a", 100), RankParameter("b", 30)], num_ranks=2, is_sharded=False)
    assert buffer.parameters == ((0, 30), (30, 130))
    assert (buffer.num_elements, buffer.buckets) == (130, ((0, 130),))


def test_a_sharded_buffer_aligns_starts_to_64_and_its_end_to_the_ranks() -> None:
    buffer = build_buffer([RankParameter("a", 100), RankParameter("b", 30)], num_ranks=3, is_sharded=True)
    # b at 0..30, a from the next multiple of 64, 64..164; the end is a multiple of lcm(3, 128) = 384.
    assert buffer.parameters == ((0, 30), (64, 164))
    assert buffer.num_elements == 384
    # Rank 0 holds 0..128: 30 of b and 64 of a; rank 1 holds 128..256: the other 36; rank 2 only padding.
    assert [buffer.shard_elements(rank, 3) for rank in range(3)] == [94, 36, 0]


def test_buckets_close_when_they_are_full_and_are_sharded_one_by_one() -> None:
    parameters = [RankParameter("a", 64), RankParameter("b", 64), RankParameter("c", 128)]
    buffer = build_buffer(parameters, num_ranks=2, is_sharded=True, bucket_elements=128)
    assert buffer.buckets == ((0, 128), (128, 256))
    # c fills the first bucket, b and a the second: each rank holds half of either.
    assert [buffer.shard_elements(rank, 2) for rank in range(2)] == [128, 128]


def test_a_shared_embedding_stands_in_a_bucket_of_its_own() -> None:
    parameters = [RankParameter("embedding", 70, is_shared=True), RankParameter("layer", 40)]
    buffer = build_buffer(parameters, num_ranks=2, is_sharded=True)
    # The layer's bucket ends at 128, the embedding's starts there and is padded to 256.
    assert buffer.buckets == ((0, 128), (128, 256))
