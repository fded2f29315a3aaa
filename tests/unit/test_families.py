"""The tables of every family: parts of every tensor rank against a layout written out by hand, and the way back, bit for bit."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spin_megatron.convert.families import (
    FAMILIES,
    expected_huggingface_names,
    global_name,
    megatron_shape,
    megatron_shard,
    normalised_name,
    parameter,
    parameters,
    row_blocks,
)
from spin_megatron.plan.model_config import Family
from spin_megatron.plan.shape import ModelShape

TINY = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=32,
    num_heads=8,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=259,
    max_positions=64,
    norm_epsilon=1e-5,
    rope_theta=1e4,
)
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_hidden_size": 16}


def tiny(family: Family, tied: bool = False) -> ModelShape:
    experts = EXPERTS if family in ("mixtral", "qwen3_moe") else {}
    return replace(TINY, family=family, tied_embeddings=tied, qkv_bias=family == "qwen2", qk_norm=family.startswith("qwen3"), **experts)


def random_weights(shape: ModelShape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(size, generator=generator).bfloat16() for name, size in expected_huggingface_names(shape).items()}


def fetch_from(weights: dict[str, Tensor]):
    def fetch(name: str, dim: int, start: int, stop: int) -> Tensor:
        assert stop <= weights[name].shape[dim], f"{name} read past its end"
        return weights[name].narrow(dim, start, stop - start)

    return fetch


def stage_names(shape: ModelShape, pipeline: int, stage: int, expert_parallel: int) -> list[str]:
    """Parameter names of one rank's chunk as Megatron Core numbers them: layers and experts from 0."""
    chunk = replace(shape, num_layers=shape.num_layers // pipeline, num_experts=shape.num_experts and shape.num_experts // expert_parallel)
    names = [entry.name for entry in parameters(chunk)]
    if shape.tied_embeddings and pipeline > 1:
        names.append("output_layer.weight")  # the last stage's own copy
    not_here = {"embedding.word_embeddings.weight"} if stage else set()
    if stage < pipeline - 1:
        not_here |= {"decoder.final_layernorm.weight", "output_layer.weight"}
    return [name for name in names if name not in not_here]


def collected(name: str, shape: ModelShape, shards: Sequence[Tensor]) -> dict[str, Tensor]:
    """The Hugging Face tensors that all tensor ranks' parts of a parameter hold together: the way back of `megatron_shard`."""
    entry = parameter(name, shape)
    if name == "output_layer.weight" and shape.tied_embeddings:
        return {}
    if entry.kind == "replicated":
        whole = shards[0]
    elif entry.kind == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        whole = torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    else:
        whole = torch.cat(list(shards), dim=1 if entry.kind == "input" else 0)
    rows: dict[str, list[Tensor]] = {source.name: [] for source in entry.sources}
    position = 0
    for block in row_blocks(entry, shape):
        stop = position + block.stop - block.start
        rows[entry.sources[block.source].name].append(whole[position:stop])
        position = stop
    return {source: torch.cat(pieces) for source, pieces in rows.items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("expert_parallel", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_spread_over_all_ranks_and_collected_every_family_is_bit_equal(
    family: Family, tied: bool, tensor: int, pipeline: int, expert_parallel: int
) -> None:
    shape = tiny(family, tied)
    weights = random_weights(shape)
    per_stage, per_rank = shape.num_layers // pipeline, (shape.num_experts or 0) // expert_parallel
    back: dict[str, Tensor] = {}
    for stage in range(pipeline):
        layers = range(stage * per_stage, (stage + 1) * per_stage)
        for expert_rank in range(expert_parallel):
            for local in stage_names(shape, pipeline, stage, expert_parallel):
                name = global_name(local, layers=layers, first_expert=expert_rank * per_rank)
                assert name is not None
                shards = [megatron_shard(name, shape, fetch_from(weights), tensor, rank) for rank in range(tensor)]
                assert [tuple(shard.shape) for shard in shards] == [megatron_shape(name, shape, tensor)] * tensor
                back |= collected(name, shape, shards)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name


def test_query_key_and_value_heads_are_interleaved_by_group() -> None:
    # 4 query heads, 2 key heads of size 2, hidden 1. Row values: q head h row r -> 10 h + r; k: 100 + ..., v: 200 + ...
    shape = replace(TINY, num_heads=4, num_kv_heads=2, head_dim=2, hidden_size=1)
    q = torch.tensor([[0.0], [1], [10], [11], [20], [21], [30], [31]])
    k = torch.tensor([[100.0], [101], [110], [111]])
    v = torch.tensor([[200.0], [201], [210], [211]])
    prefix = "model.layers.3.self_attn."
    fetch = fetch_from({f"{prefix}q_proj.weight": q, f"{prefix}k_proj.weight": k, f"{prefix}v_proj.weight": v})
    name = "decoder.layers.3.self_attention.linear_qkv.weight"
    first, second = [0.0, 1, 10, 11, 100, 101, 200, 201], [20.0, 21, 30, 31, 110, 111, 210, 211]
    assert megatron_shard(name, shape, fetch).flatten().tolist() == first + second
    assert megatron_shard(name, shape, fetch, 2, 1).flatten().tolist() == second
    # More ranks than key heads: a rank holds a plain fourth, here half a group.
    assert megatron_shard(name, shape, fetch, 4, 1).flatten().tolist() == first[4:]


def test_a_rank_holds_matching_gate_and_up_rows() -> None:
    shape = replace(TINY, ffn_hidden_size=4, hidden_size=1)
    gate, up = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11], [12], [13]])
    fetch = fetch_from({"model.layers.0.mlp.gate_proj.weight": gate, "model.layers.0.mlp.up_proj.weight": up})
    assert megatron_shard("decoder.layers.0.mlp.linear_fc1.weight", shape, fetch, 2, 1).flatten().tolist() == [2.0, 3, 12, 13]


def test_a_row_parallel_weight_is_split_over_its_input() -> None:
    shape = replace(TINY, hidden_size=2, num_heads=2, num_kv_heads=1, head_dim=2)
    weight = torch.arange(8.0).view(2, 4)
    fetch = fetch_from({"model.layers.0.self_attn.o_proj.weight": weight})
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    assert megatron_shard(name, shape, fetch, 2, 1).tolist() == [[2.0, 3], [6, 7]]


def test_the_vocabulary_is_padded_with_zero_rows() -> None:
    shape = replace(TINY, vocab_size=5, hidden_size=1)
    weights = {"model.embed_tokens.weight": torch.tensor([[1.0], [2], [3], [4], [5]])}
    name = "embedding.word_embeddings.weight"
    shards = [megatron_shard(name, shape, fetch_from(weights), 4, rank) for rank in range(4)]
    assert [shard.flatten().tolist() for shard in shards] == [[1, 2], [3, 4], [5, 0], [0, 0]]


def test_the_head_of_a_tied_model_reads_the_embedding() -> None:
    shape = tiny("qwen2", tied=True)
    weights = random_weights(shape)
    shard = megatron_shard("output_layer.weight", shape, fetch_from(weights), 2, 1)
    assert torch.equal(shard[:129], weights["model.embed_tokens.weight"][130:])
    assert "lm_head.weight" not in weights


def test_names_of_both_layer_specs_mean_the_same_parameter() -> None:
    fused = "module.module.decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    assert normalised_name(fused) == "decoder.layers.1.input_layernorm.weight"
    assert normalised_name("decoder.layers.1.mlp.linear_fc1.layer_norm_weight") == "decoder.layers.1.pre_mlp_layernorm.weight"
    grouped = normalised_name("decoder.layers.1.mlp.experts.linear_fc2.weight12")
    assert grouped == "decoder.layers.1.mlp.experts.local_experts.12.linear_fc2.weight"
    assert normalised_name("decoder.layers.1.self_attention.core_attention._extra_state") is None
    assert global_name("decoder.layers.1.mlp.experts.linear_fc1.weight0", layers=[2, 6], first_expert=8) == (
        "decoder.layers.6.mlp.experts.local_experts.8.linear_fc1.weight"
    )


def test_unknown_names_and_wrong_shards_are_refused_by_name() -> None:
    fetch = fetch_from({})
    for name in ("decoder.layers.4.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc1.bias", "decoder.layers.0.mlp.router.weight"):
        with pytest.raises(ValueError, match=f"{name}' is not in the table of family llama"):
            megatron_shard(name, TINY, fetch)
    with pytest.raises(ValueError, match=r"parallel.tensor=3 does not divide the 32 of decoder.layers.0.mlp.linear_fc1.weight"):
        megatron_shape("decoder.layers.0.mlp.linear_fc1.weight", TINY, 3)


def test_keys_of_a_checkpoint_are_stacked_over_layers_and_experts() -> None:
    found = {entry.name: (entry.saved, entry.indices) for entry in parameters(tiny("mixtral"))}
    expert = found["decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight"]
    assert expert == (("decoder.layers.mlp.experts.experts.linear_fc1.weight",), (2, 3))
    assert found["decoder.layers.2.input_layernorm.weight"] == (("decoder.layers.self_attention.linear_qkv.layer_norm_weight",), (2,))
    assert found["output_layer.weight"] == (("output_layer.weight",), ())
