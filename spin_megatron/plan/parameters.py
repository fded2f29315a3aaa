"""The parameters a rank holds, one by one, as Megatron Core 0.16 and 0.19 create them, and how the optimizer shards them.

tests/parity/test_plan_counts.py compares every name and size with a GPTModel on the meta device. Sources, all in
megatron/core: `transformer/transformer_block.py` (layers of a stage), `transformer/attention.py` and `mlp.py` (projections),
`transformer/moe/experts.py`, `models/gpt/gpt_model.py` (embedding and head), `distributed/param_and_grad_buffer.py`
(padding), `optimizer/distrib_optimizer.py` (ranges).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spin_megatron.plan.adapters import FACTOR_A, FACTOR_B, MODULES, AdapterShape
from spin_megatron.plan.shape import ModelShape, ParallelLayout

# param_and_grad_buffer.py: a parameter starts at a multiple of 64 elements, a bucket ends at one of 128 (both only when sharded).
_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class RankParameter:
    """One tensor of one rank.

    name: as in `named_parameters()` of the local layer spec, layers counted from 0 within the chunk.
    numel: elements on this rank.
    is_expert: sharded by the optimizer over the expert-data ranks instead of all data ranks.
    is_shared: the embedding of a model with tied embeddings and several stages; it gets a bucket of its own.
    """

    name: str
    numel: int
    is_expert: bool = False
    is_shared: bool = False


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """Rows of embedding and head over all tensor ranks: the vocabulary, rounded up so that every rank holds as many."""
    return _round_up(vocab_size, tensor)


def chunk_parameters(shape: ModelShape, layout: ParallelLayout, pipeline_rank: int, chunk: int = 0) -> list[RankParameter]:
    """Parameters of one model chunk of a rank, in the order of `named_parameters()`. All tensor ranks hold the same sizes.

    Args:
        pipeline_rank: 0 ... layout.pipeline - 1.
        chunk: 0 ... layout.virtual_pipeline - 1; the first chunk of the first rank embeds, the last of the last has the head.
    """
    is_first = pipeline_rank == 0 and chunk == 0
    is_last = pipeline_rank == layout.pipeline - 1 and chunk == layout.virtual_pipeline - 1
    is_shared = shape.tied_embeddings and layout.pipeline > 1
    vocab_numel = padded_vocab(shape.vocab_size, layout.tensor) // layout.tensor * shape.hidden_size
    parameters = []
    if is_first:
        parameters.append(RankParameter("embedding.word_embeddings.weight", vocab_numel, is_shared=is_shared))
    for layer in range(layout.layers_of_chunk(shape.num_layers, pipeline_rank, chunk)):
        parameters += _layer(shape, layout, f"decoder.layers.{layer}")
    if is_last:
        parameters.append(RankParameter("decoder.final_layernorm.weight", shape.hidden_size))
        if is_shared or not shape.tied_embeddings:
            parameters.append(RankParameter("output_layer.weight", vocab_numel, is_shared=is_shared))
    return parameters


def _layer(shape: ModelShape, layout: ParallelLayout, prefix: str) -> list[RankParameter]:
    hidden = shape.hidden_size
    attention = f"{prefix}.self_attention"
    qkv_rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // layout.tensor
    parameters = [
        RankParameter(f"{prefix}.input_layernorm.weight", hidden),
        RankParameter(f"{attention}.linear_proj.weight", hidden * shape.num_heads * shape.head_dim // layout.tensor),
        RankParameter(f"{attention}.linear_qkv.weight", qkv_rows * hidden),
    ]
    if shape.qkv_bias:
        parameters.append(RankParameter(f"{attention}.linear_qkv.bias", qkv_rows))
    if shape.qk_norm:
        parameters += [RankParameter(f"{attention}.{name}_layernorm.weight", shape.head_dim) for name in ("q", "k")]
    parameters.append(RankParameter(f"{prefix}.pre_mlp_layernorm.weight", hidden))
    return parameters + (_dense_mlp(shape, layout, prefix) if shape.num_experts is None else _experts(shape, layout, prefix))


def _dense_mlp(shape: ModelShape, layout: ParallelLayout, prefix: str) -> list[RankParameter]:
    numel = shape.hidden_size * shape.ffn_hidden_size // layout.tensor
    return [RankParameter(f"{prefix}.mlp.linear_fc1.weight", 2 * numel), RankParameter(f"{prefix}.mlp.linear_fc2.weight", numel)]


def _experts(shape: ModelShape, layout: ParallelLayout, prefix: str) -> list[RankParameter]:
    assert shape.num_experts is not None
    assert shape.expert_ffn_hidden_size is not None
    numel = shape.hidden_size * shape.expert_ffn_hidden_size // layout.tensor
    parameters = [RankParameter(f"{prefix}.mlp.router.weight", shape.num_experts * shape.hidden_size)]
    for expert in range(shape.num_experts // layout.expert):
        name = f"{prefix}.mlp.experts.local_experts.{expert}"
        parameters.append(RankParameter(f"{name}.linear_fc1.weight", 2 * numel, is_expert=True))
        parameters.append(RankParameter(f"{name}.linear_fc2.weight", numel, is_expert=True))
    return parameters


def rank_parameters(shape: ModelShape, layout: ParallelLayout, pipeline_rank: int) -> list[list[RankParameter]]:
    """Parameters of all model chunks of a rank, chunk by chunk."""
    return [chunk_parameters(shape, layout, pipeline_rank, chunk) for chunk in range(layout.virtual_pipeline)]


def adapter_parameters(
    parameters: Iterable[RankParameter], shape: ModelShape, layout: ParallelLayout, adapters: AdapterShape
) -> list[RankParameter]:
    """The LoRA factors beside a chunk's parameters, in the order of `named_parameters()`: all that is trained then."""
    inputs = {
        "qkv": shape.hidden_size,
        "proj": shape.num_heads * shape.head_dim // layout.tensor,
        "fc1": shape.hidden_size,
        "fc2": shape.ffn_hidden_size // layout.tensor,
    }
    suffixes = {f".{MODULES[target]}.weight": inputs[target] for target in adapters.targets}
    found = []
    for parameter in parameters:
        for suffix, columns in suffixes.items():
            if parameter.name.endswith(suffix):
                linear = parameter.name.removesuffix("weight")
                found.append(RankParameter(f"{linear}{FACTOR_A}", adapters.rank * columns))
                found.append(RankParameter(f"{linear}{FACTOR_B}", parameter.numel // columns * adapters.rank))
    return found


def count_parameters(shape: ModelShape, *, active: bool = False) -> int:
    """Parameters of the whole model; `active`: only those a token passes through (experts_per_token of num_experts)."""
    parameters = chunk_parameters(shape, ParallelLayout(), 0)
    experts = sum(parameter.numel for parameter in parameters if parameter.is_expert)
    total = sum(parameter.numel for parameter in parameters)
    if not active or shape.num_experts is None or shape.experts_per_token is None:
        return total
    return total - experts + experts * shape.experts_per_token // shape.num_experts


@dataclass(frozen=True)
class Buffer:
    """A contiguous gradient (and, sharded, weight) buffer of one chunk: element ranges of its buckets and parameters."""

    num_elements: int
    buckets: tuple[tuple[int, int], ...]
    parameters: tuple[tuple[int, int], ...]

    def shard_elements(self, rank: int, num_ranks: int) -> int:
        """Parameter elements (padding not counted) whose optimizer state the given data rank holds."""
        held = 0
        for start, end in self.buckets:
            size = (end - start) // num_ranks
            first, last = start + rank * size, start + (rank + 1) * size
            held += sum(max(min(last, stop) - max(first, begin), 0) for begin, stop in self.parameters if begin < last and stop > first)
        return held


def build_buffer(parameters: Sequence[RankParameter], *, num_ranks: int, is_sharded: bool, bucket_elements: int | None = None) -> Buffer:
    """Lay a chunk's parameters out as Megatron Core's `_ParamAndGradBuffer` does: last parameter first.

    Args:
        parameters: of one chunk and one kind (experts or not); at least one.
        num_ranks: data ranks (times context ranks) that share the buffer.
        is_sharded: the distributed optimizer is on, so starts and ends are aligned.
        bucket_elements: a bucket is closed when it has that many; None: one bucket (gradients are reduced without overlap).
    """
    align = _PARAMETER_ALIGNMENT if is_sharded else 1
    bucket_align = math.lcm(num_ranks, _BUCKET_ALIGNMENT) if is_sharded else 1
    position = bucket_start = 0
    buckets: list[tuple[int, int]] = []
    ranges: list[tuple[int, int]] = []

    def close_bucket(end: int) -> int:
        nonlocal bucket_start
        padded = _round_up(end, bucket_align)
        buckets.append((bucket_start, padded))
        bucket_start = padded
        return padded

    for parameter in reversed(parameters):
        position = _round_up(position, align)
        own_bucket = parameter.is_shared and is_sharded
        if own_bucket and position > bucket_start:
            position = close_bucket(position)
        ranges.append((position, position + parameter.numel))
        position += parameter.numel
        if own_bucket or (bucket_elements is not None and position - bucket_start >= bucket_elements):
            position = close_bucket(position)
    if position > bucket_start:
        position = close_bucket(position)
    return Buffer(position, tuple(buckets), tuple(ranges))


def split_by_kind(parameters: Iterable[RankParameter]) -> tuple[list[RankParameter], list[RankParameter]]:
    """(dense, expert) parameters: Megatron Core keeps them in separate buffers."""
    dense: list[RankParameter] = []
    expert: list[RankParameter] = []
    for parameter in parameters:
        (expert if parameter.is_expert else dense).append(parameter)
    return dense, expert


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
