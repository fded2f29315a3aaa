"""The planner's parameters are Megatron Core's, name by name, and so are the checkpoint tables', for every rank up to 70B."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import pytest

from spin_megatron.convert.families import megatron_shape, parameter, parameters
from spin_megatron.mcore.model import global_parameters
from spin_megatron.plan.parameters import count_parameters, rank_parameters
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from tests.parity.fake_ranks import meta_model

LLAMA2_7B = ModelShape("llama", 32, 4096, 11008, 32, 32, 128, 32000, 4096, 1e-5, 1e4)
LLAMA3_8B = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, 5e5)
LLAMA3_70B = replace(LLAMA3_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_heads=64)
LLAMA3_1B = replace(LLAMA3_8B, num_layers=16, hidden_size=2048, ffn_hidden_size=8192, head_dim=64, tied_embeddings=True)
# Two key-value heads (fewer than four tensor ranks), biases, and a vocabulary that three ranks do not divide.
QWEN2_05B = ModelShape("qwen2", 24, 896, 4864, 14, 2, 64, 151936, 32768, 1e-6, 1e6, tied_embeddings=True, qkv_bias=True)
QWEN3_8B = ModelShape("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 40960, 1e-6, 1e6, qk_norm=True)
MIXTRAL = ModelShape(
    "mixtral", 32, 4096, 14336, 32, 8, 128, 32000, 32768, 1e-5, 1e6, num_experts=8, experts_per_token=2, expert_ffn_hidden_size=14336
)
QWEN3_MOE = replace(  # Qwen3-30B-A3B, cut from 48 to 8 layers: 128 experts a layer take their time
    QWEN3_8B,
    family="qwen3_moe",
    num_layers=8,
    hidden_size=2048,
    num_kv_heads=4,
    num_experts=128,
    experts_per_token=8,
    expert_ffn_hidden_size=768,
)
CASES = [
    pytest.param(LLAMA2_7B, ParallelLayout(tensor=2, pipeline=2), id="Llama-2-7B TP2 PP2"),
    pytest.param(LLAMA3_8B, ParallelLayout(), id="Llama-3-8B one rank"),
    pytest.param(
        LLAMA3_8B,
        ParallelLayout(tensor=4, pipeline=2, sequence=True, virtual_pipeline=4, stage_layers=(5, 4, 4, 4, 4, 4, 4, 3)),
        id="Llama-3-8B TP4 PP2 VP4, uneven",
    ),
    pytest.param(LLAMA3_70B, ParallelLayout(tensor=4, pipeline=4, data=2, sequence=True, virtual_pipeline=5), id="Llama-3-70B TP4 PP4 VP5"),
    pytest.param(LLAMA3_1B, ParallelLayout(tensor=2), id="tied, one stage"),
    pytest.param(LLAMA3_1B, ParallelLayout(tensor=2, pipeline=4, stage_layers=(4, 5, 4, 3)), id="tied, four uneven stages"),
    pytest.param(QWEN2_05B, ParallelLayout(tensor=2, pipeline=2), id="Qwen2 biases"),
    pytest.param(QWEN3_8B, ParallelLayout(tensor=8, pipeline=3), id="Qwen3 norms of heads"),
    pytest.param(MIXTRAL, ParallelLayout(tensor=2, pipeline=2, data=4, expert=4), id="Mixtral TP2 EP4"),
    pytest.param(QWEN3_MOE, ParallelLayout(pipeline=2, data=8, expert=8), id="Qwen3-MoE EP8"),
]


def ranks_of_one_replica(layout: ParallelLayout) -> Iterator[int]:
    """Ranks that differ in what they hold: all tensor and pipeline ranks, and of the data ranks those with other experts."""
    per_stage = layout.tensor * layout.data * layout.context
    for pipeline_rank in range(layout.pipeline):
        for rank in range(layout.tensor * layout.expert):
            yield pipeline_rank * per_stage + rank


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_planned_parameters_are_those_of_megatron_core_by_name_and_size(shape: ModelShape, layout: ParallelLayout) -> None:
    for rank in ranks_of_one_replica(layout):
        with meta_model(shape, layout, rank) as (chunks, runtime):
            built = [[(name, parameter.numel()) for name, parameter in chunk.named_parameters()] for chunk in chunks]
            planned = rank_parameters(shape, layout, runtime.pipeline_rank)
            assert [[(entry.name, entry.numel) for entry in chunk] for chunk in planned] == built
            experts = {entry.name for chunk in planned for entry in chunk if entry.is_expert}
            # Megatron Core marks what the data-parallel wrapper reduces over all data ranks.
            assert experts == {
                name for chunk in chunks for name, parameter in chunk.named_parameters() if not getattr(parameter, "allreduce", True)
            }


@pytest.mark.parametrize(("shape", "billions"), [(LLAMA2_7B, 6.738415616), (LLAMA3_8B, 8.030261248), (LLAMA3_70B, 70.553706496)])
def test_whole_models_have_their_published_number_of_parameters(shape: ModelShape, billions: float) -> None:
    # The numbers of the model cards' safetensors (metadata.total_size / 2 bytes).
    assert count_parameters(shape) == round(billions * 1e9)


def test_all_32_ranks_of_llama3_70b_make_up_the_checkpoint_tables_exactly_once() -> None:
    """TP8 x PP4 on the meta device: names, shapes and the sharded state dict of every rank against convert/families.py."""
    layout = ParallelLayout(tensor=8, pipeline=4, sequence=True)
    covered: dict[str, int] = {}
    for rank in range(layout.world_size):
        with meta_model(LLAMA3_70B, layout, rank) as (chunks, runtime):
            parts_by_key: dict[str, list[Any]] = {}
            for part in _sharded_tensors(chunks[0].sharded_state_dict()):
                parts_by_key.setdefault(part.key, []).append(part)
                if part.replica_id in (0, (0, 0, 0)):
                    covered[part.key] = covered.get(part.key, 0) + prod(part.local_shape)
            for name, tensor in global_parameters(chunks[0], LLAMA3_70B, runtime):
                assert tuple(tensor.shape) == megatron_shape(name, LLAMA3_70B, layout.tensor), (rank, name)
                _check_place(name, tensor.numel(), parts_by_key, runtime.tensor_rank)
    # Elements saved once each: a checkpoint holds the whole of every table row (the vocabulary, 128256, divides by 8).
    expected: dict[str, int] = {}
    for entry in parameters(LLAMA3_70B):
        expected[entry.saved[0]] = expected.get(entry.saved[0], 0) + prod(entry.shape)
    assert covered == expected


def _check_place(name: str, numel: int, parts_by_key: dict[str, list[Any]], tensor_rank: int) -> None:
    """A parameter lies in the checkpoint under the table's key, at its layer, and there at its tensor rank's rows or columns."""
    entry = parameter(name, LLAMA3_70B)
    held = [part for part in parts_by_key[entry.saved[0]] if tuple(part.global_offset[: part.prepend_axis_num]) == entry.indices]
    assert sum(prod(part.local_shape) for part in held) == numel, name
    for part in held:
        assert tuple(part.global_shape[part.prepend_axis_num :]) == entry.shape, name
        assert part.global_offset[part.prepend_axis_num :] == _offset(part, entry.kind, tensor_rank), name


def _offset(part: Any, kind: str, tensor_rank: int) -> tuple[int, ...]:
    """Where a tensor rank's part begins: columns for `input`, each half's rows for gate_up, rows otherwise."""
    shape, offset = part.local_shape, part.global_offset[part.prepend_axis_num :]
    if kind == "replicated":
        return tuple(0 for _ in shape)
    if kind == "input":
        return (0, tensor_rank * shape[1])
    if kind == "gate_up":
        half = part.global_shape[part.prepend_axis_num] // 2
        return (offset[0] // half * half + tensor_rank * shape[0], 0)
    return (tensor_rank * shape[0], *(0 for _ in shape[1:]))


def _sharded_tensors(state: dict[str, Any]) -> Iterator[Any]:
    """All ShardedTensors of a sharded state dict; factories (the gated projection) are asked for theirs."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for value in state.values():
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, ShardedTensorFactory):
            built = value.build()
            yield from built.values() if isinstance(built, dict) else built
