"""Memory of one GPU while it trains, part by part, for every pipeline rank.

Exact (held equal to Megatron Core's by tests): weights, gradients and optimizer shards. Modelled: activations, head,
communication buffers, CUDA context. Formulas and their sources, with measured runs beside them: docs/planner.md.
"""

from dataclasses import dataclass, replace
from typing import Literal

from spin_megatron.plan.adapters import ROW_PARALLEL, AdapterShape
from spin_megatron.plan.hardware import GIB
from spin_megatron.plan.parameters import RankParameter, adapter_parameters, build_buffer, padded_vocab, rank_parameters, split_by_kind
from spin_megatron.plan.precision import PRECISIONS, PrecisionName
from spin_megatron.plan.shape import ModelShape, ParallelLayout

Recompute = Literal["none", "selective", "full"]
OptimizerName = Literal["adamw", "rmsprop"]

FLOAT32_BYTES = 4
# Moments a parameter has: AdamW m and v (arXiv 1711.05101), RMSProp the mean square.
_MOMENTS: dict[OptimizerName, int] = {"adamw": 2, "rmsprop": 1}

# CUDA context, cuBLAS and cuDNN workspaces of a training process. Megatron Core's own CI runs allocate 0.1 to 0.4 GB beyond their
# tensors (docs/planner.md); the context itself, outside torch's allocator, is 0.5 GB on Hopper.
CONTEXT_BYTES = int(1.0 * GIB)
# NCCL keeps 4 MiB (NCCL_BUFFSIZE) a channel and direction plus the LL and LL128 buffers, up to 32 channels: per communicator.
NCCL_COMMUNICATOR_BYTES = int(0.35 * GIB)
# What the caching allocator cannot hand out again, as a share of the memory that comes and goes within a step.
FRAGMENTATION = 0.05
# A layout is refused above this share of the GPU's memory: the rest is the model error of the parts that are not exact.
USABLE_SHARE = 0.96
# What is multiplied in FP8: Transformer Engine's linear layers.
_FP8_MATRICES = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
# Flash attention's backward leaves so many rows of its fp32 sums between branches, and rounds heads up to a multiple of so many columns.
_FLASH_ROWS, _FLASH_COLUMNS = 128, 32
# objective/logprobs_triton.py makes fp32 logits in tiles, and their gradient in the model's dtype in panels of 8 x 2 tiles.
_TILE_ROWS, _TILE_COLUMNS, _PANEL_ROWS, _PANEL_COLUMNS = 1024, 4096, 8192, 8192


@dataclass(frozen=True)
class TrainSettings:
    """What decides a training step's memory and time, as plain values.

    pack_tokens: tokens of a micro-batch. micro_batches: packs a data rank computes per update.
    head_rows: share of a pack's tokens that predict a response token (the head runs on these rows only).
    shared_prefix: prompt tokens a pack's answers look back at, as a share of its tokens: their keys and values are copied.
    branches: runs of tokens of a pack that attend by themselves (data/batches.py): flash attention's backward keeps them apart.
    gradient_bytes: of the gradient that is reduced over data ranks; 4, fp32, is what this project trains with.
    keys_per_token: keys a token attends to on average; half a sequence where sequences are packed whole.
    fused_gradients: products of the backward add to the fp32 gradient buffer themselves, as Transformer Engine's and apex's do.
    recompute_logits: the head's backward makes the logits again instead of keeping them, as objective/logprobs.py does.
    recompute_layers: of each stage's layers those that are made again; None: all.
    kept_logit_bytes: fp32 logits that it keeps all the same, at most.
    adapters: LoRA beside frozen weights; None: every weight is trained.
    offload_fraction: share of the optimizer's state in the host's memory, updated there by host_threads a rank.
    overlap_*: collectives run beside computation. Tensor: Transformer Engine's user buffers; context: its ring.
    """

    pack_tokens: int
    micro_batches: int
    precision: PrecisionName = "bf16"
    recompute: Recompute = "none"
    recompute_layers: int | None = None
    optimizer: OptimizerName = "adamw"
    distributed_optimizer: bool = True
    head_rows: float = 1.0
    shared_prefix: float = 0.0
    branches: float = 0.0
    gradient_bytes: int = FLOAT32_BYTES
    keys_per_token: float = 512.0
    fused_gradients: bool = True
    recompute_logits: bool = True
    kept_logit_bytes: int = 128 * 2**20
    adapters: AdapterShape | None = None
    offload_fraction: float = 0.0
    host_threads: int = 8
    overlap_tensor: bool = False
    overlap_context: bool = False
    overlap_pipeline: bool = False
    overlap_data: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes a weight element takes; with FP8 the bf16 weights stay (Transformer Engine casts them as it goes)."""
        return FLOAT32_BYTES if self.precision == "fp32" else 2

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state an element takes: an fp32 copy of a bf16 weight, and the moments."""
        return FLOAT32_BYTES * (_MOMENTS[self.optimizer] + (self.precision != "fp32"))

    @property
    def saved_bytes(self) -> int:
        """Bytes a trained element takes in a training checkpoint (mcore/optimizer_state.py)."""
        return self.weight_bytes + self.optimizer_bytes

    @property
    def is_fp8(self) -> bool:
        return PRECISIONS[self.precision].fp8_recipe is not None


@dataclass(frozen=True)
class StateBytes:
    """Bytes a rank holds from the first step to the last. host: in the host's memory, beside the GPU's `total`."""

    num_parameters: int
    weights: int
    gradients: int
    optimizer: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class RankMemory:
    """Peak bytes of the ranks of one pipeline position; all its tensor and data ranks are alike.

    activations: what the micro-batches in flight left. head, backward: what the head, and after it the backward of a layer, takes besides.
    """

    pipeline_rank: int
    state: StateBytes
    activations: int
    head: int
    backward: int
    communication: int
    context: int

    @property
    def passing(self) -> int:
        return max(self.head, self.backward)

    @property
    def total(self) -> int:
        return self.state.total + int((self.activations + self.passing) * (1 + FRAGMENTATION)) + self.communication + self.context


def state_bytes(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, pipeline_rank: int, data_rank: int = 0) -> StateBytes:
    """Weights, gradients and optimizer state of one rank, equal to what Megatron Core allocates.

    Weights and gradients lie in one buffer a chunk (padded when sharded); the optimizer keeps an fp32 copy of bf16 weights and the
    moments, of the whole buffer or of this rank's 1/data share. Experts have their own buffer, shared by fewer ranks. Frozen weights
    lie outside and have nothing besides.
    """
    num_parameters = weights = gradients = held = 0
    if settings.adapters is not None:
        num_parameters = sum(parameter.numel for chunk in rank_parameters(shape, layout, pipeline_rank) for parameter in chunk)
        weights = num_parameters * settings.weight_bytes
    for index, chunk in enumerate(trained_parameters(shape, layout, settings, pipeline_rank)):
        bucket_elements = _bucket_elements(layout, settings) if pipeline_rank == index == 0 else None
        for parameters, num_ranks in zip(split_by_kind(chunk), (layout.data * layout.context, expert_data_ranks(layout)), strict=True):
            if not parameters:
                continue
            numel = sum(parameter.numel for parameter in parameters)
            buffer = build_buffer(
                parameters, num_ranks=num_ranks, is_sharded=settings.distributed_optimizer, bucket_elements=bucket_elements
            )
            # Neighbouring data ranks hold different experts (Megatron Core's order tp-cp-ep-dp-pp).
            rank = data_rank // (layout.data * layout.context // num_ranks)
            held += buffer.shard_elements(rank, num_ranks) if settings.distributed_optimizer else numel
            num_parameters += numel
            weights += buffer.num_elements * settings.weight_bytes
            gradients += buffer.num_elements * settings.gradient_bytes
    offloaded = int(held * settings.offload_fraction)  # whole tensors are: up to one more than this
    host = offloaded * (settings.optimizer_bytes + FLOAT32_BYTES)  # and their gradients
    return StateBytes(num_parameters, weights, gradients, (held - offloaded) * settings.optimizer_bytes, host)


def _bucket_elements(layout: ParallelLayout, settings: TrainSettings) -> int | None:
    """What Megatron Core reduces at a time beside the backward (distributed_data_parallel.py), on the first stage's first chunk alone."""
    return max(40_000_000, 1_000_000 * layout.data) if settings.overlap_data and layout.data * layout.context > 1 else None


def trained_parameters(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, pipeline_rank: int) -> list[list[RankParameter]]:
    """What of a rank has gradients, chunk by chunk: everything, or the adapters alone."""
    chunks = rank_parameters(shape, layout, pipeline_rank)
    if settings.adapters is None:
        return chunks
    return [adapter_parameters(chunk, shape, layout, settings.adapters) for chunk in chunks]


def expert_data_ranks(layout: ParallelLayout) -> int:
    """Ranks that hold the same experts: data and context ranks less those the experts are spread over."""
    return layout.data * layout.context // layout.expert


@dataclass(frozen=True)
class LayerWidths:
    """Elements that one token leaves in one layer of one rank for the backward pass.

    residual: inputs and outputs of both norms. attention: query, key, value and the attention's output, and what norms of heads read.
    mlp: output of the first projection and of the activation. statistics: fp32 log-sum-exps of the attention, scales of norms of heads.
    checkpoint: the layer's input, all that full recompute keeps.
    """

    residual: float
    attention: float
    mlp: float
    statistics: float
    checkpoint: float

    def token_bytes(self, element_bytes: int, recompute: Recompute) -> float:
        """Bytes a token leaves in a layer. Selective recompute drops what is inside the MLP or the experts (mcore/model.py)."""
        if recompute == "full":
            return self.checkpoint * element_bytes
        kept = (self.residual + self.attention) * element_bytes + self.statistics * FLOAT32_BYTES
        return kept if recompute == "selective" else kept + self.mlp * element_bytes

    def recomputed_bytes(self, element_bytes: int, recompute: Recompute) -> float:
        """Bytes a token takes in the one layer that is being computed again."""
        return 0.0 if recompute == "none" else self.token_bytes(element_bytes, "none") - self.token_bytes(element_bytes, recompute)


def layer_widths(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings) -> LayerWidths:
    """Widths of a layer with flash attention, fused SwiGLU and no dropout (after arXiv 2205.05198, equation 2, without its dropout
    masks and score matrices; GQA and the gated MLP counted as they are).

    Sequence parallelism splits the norms' tensors over tensor ranks, tensor parallelism all others, context parallelism the tokens; keys
    and values of the whole pack are gathered on every context rank (mcore/context.py).
    """
    sequence_split = layout.tensor if layout.sequence else 1
    hidden = shape.hidden_size / sequence_split
    kv_heads = max(shape.num_kv_heads, layout.tensor)  # shared by ranks where there are fewer
    key_value = 2 * kv_heads * (layout.context + settings.shared_prefix)
    attention = (2 * shape.num_heads + key_value) * shape.head_dim / layout.tensor
    statistics = shape.num_heads / layout.tensor
    if shape.qk_norm:  # queries and keys before their norms, which TE's keep beside one number a head
        heads = (shape.num_heads + kv_heads) / layout.tensor
        attention, statistics = attention + heads * shape.head_dim, statistics + heads
    residual = 4 * hidden
    if shape.num_experts is None:
        mlp = 3 * shape.ffn_hidden_size / layout.tensor
    else:
        mlp = _moe_width(shape, layout)
    if settings.is_fp8:
        # The inputs of products are kept in FP8, half an element: of the norms' outputs and the activation instead of them, of the
        # attention's output besides it, which its own backward reads in bf16.
        attention += shape.num_heads * shape.head_dim / layout.tensor / 2
        if shape.num_experts is None:
            residual, mlp = 3 * hidden, 2.5 * shape.ffn_hidden_size / layout.tensor
    widths = LayerWidths(residual, attention, mlp, statistics, hidden)
    return widths if settings.adapters is None else _adapted(widths, shape, layout, settings, settings.adapters)


def _adapted(
    widths: LayerWidths, shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, adapters: AdapterShape
) -> LayerWidths:
    """With LoRA: a frozen linear layer keeps no input for its weight's gradient, an adapter keeps its own and A x.

    The attention's output is kept by the attention itself, the MLP's input also by its recomputation; experts have no adapters and,
    frozen, are counted as if trained. Beside FP8 layers an adapter's input is in bf16.
    """
    split = layout.tensor if layout.sequence else 1
    keeps_mlp_input = "fc1" in adapters.targets or settings.recompute == "selective" or shape.num_experts is not None
    norms = ("qkv" in adapters.targets) + keeps_mlp_input
    low = {target: adapters.rank / (split if target in ROW_PARALLEL else 1) for target in adapters.targets}
    residual = (2 + norms) * widths.checkpoint + low.get("qkv", 0) + low.get("proj", 0)
    mlp = widths.mlp
    if shape.num_experts is None:
        mlp = (2 + ("fc2" in adapters.targets)) * shape.ffn_hidden_size / layout.tensor + low.get("fc1", 0) + low.get("fc2", 0)
    return replace(widths, residual=residual, mlp=mlp)


def _moe_width(shape: ModelShape, layout: ParallelLayout) -> float:
    """A token goes to experts_per_token experts: its copy, and there the gated projection and the weighted activation. The answers are
    added up and not kept, since they were weighted before.

    Routing is taken as even; expert ranks then hold as many copies as they sent. With tensor parallelism inside the experts every
    tensor rank holds all copies and its share of the expert's columns.
    """
    assert shape.experts_per_token is not None
    assert shape.expert_ffn_hidden_size is not None
    router_logits = 2 * (shape.num_experts or 0)  # fp32 logits and probabilities, in elements of 2 bytes
    per_copy = shape.hidden_size + 3 * shape.expert_ffn_hidden_size / layout.tensor
    return shape.experts_per_token * per_copy + router_logits


def scheduled_batches(layout: ParallelLayout, micro_batches: int) -> int:
    """Packs the schedule runs: with virtual stages empty ones are added up to a multiple of the stages (mcore/steps.py, fill_schedule)."""
    return micro_batches if layout.virtual_pipeline == 1 else -(-micro_batches // layout.pipeline) * layout.pipeline


def chunks_in_flight(layout: ParallelLayout, pipeline_rank: int, micro_batches: int) -> int:
    """Model chunks whose activations a rank holds at once, a chunk of one micro-batch counted as one.

    1F1B: stage p starts pipeline - p micro-batches before its first backward. Interleaved: `get_pp_rank_microbatches` of
    megatron/core/pipeline_parallel/schedules.py, warm-up (pipeline - p - 1) x 2 + (virtual - 1) x pipeline, one more at the peak.
    """
    everything = scheduled_batches(layout, micro_batches) * layout.virtual_pipeline
    if layout.virtual_pipeline == 1:
        return min(layout.pipeline - pipeline_rank, everything)
    warm_up = 2 * (layout.pipeline - pipeline_rank - 1) + (layout.virtual_pipeline - 1) * layout.pipeline
    return min(warm_up + 1, everything)


def recomputed_share(settings: TrainSettings, layers_per_chunk: float) -> float:
    """Share of the layers that train.recompute acts on; it counts them in each stage or virtual stage anew."""
    return 1.0 if settings.recompute_layers is None else min(1.0, settings.recompute_layers / layers_per_chunk)


def activation_bytes(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, pipeline_rank: int) -> int:
    """Activations of a rank at the peak: what the micro-batches in flight left, and copies that stay through the backward."""
    tokens, element = settings.pack_tokens / layout.context, settings.weight_bytes
    widths = layer_widths(shape, layout, settings)
    in_flight = chunks_in_flight(layout, pipeline_rank, settings.micro_batches)
    layers_per_chunk = layout.layers_of_rank(shape.num_layers, pipeline_rank) / layout.virtual_pipeline
    share = recomputed_share(settings, layers_per_chunk)
    a_layer = share * widths.token_bytes(element, settings.recompute) + (1 - share) * widths.token_bytes(element, "none")
    kept = in_flight * layers_per_chunk * tokens * a_layer
    kept += gradient_bytes_beside_the_buffer(shape, layout, settings, pipeline_rank)
    kept += fp8_copy_bytes(shape, layout, settings, pipeline_rank)
    if pipeline_rank == 0:
        # The embedding's output, for each micro-batch in flight.
        kept += min(layout.pipeline, settings.micro_batches) * tokens * widths.checkpoint * element
    return int(kept)


def backward_bytes(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings) -> int:
    """What the backward of a layer takes beside what all layers left: the layer made again, and then the larger of two moments.

    First the gradients inside the MLP: of both halves of the projection, while those are still there. Then the attention's backward,
    which finds what the MLP left gone.
    """
    tokens, element = settings.pack_tokens / layout.context, settings.weight_bytes
    widths = layer_widths(shape, layout, settings)
    inner = (shape.experts_per_token or 1) * (shape.expert_ffn_hidden_size or shape.ffn_hidden_size)
    mlp = 2 * inner / layout.tensor * tokens * element
    attention = attention_backward_bytes(shape, layout, settings) - tokens * widths.mlp * element
    return int(tokens * widths.recomputed_bytes(element, settings.recompute) + max(mlp, attention))


def attention_backward_bytes(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings) -> float:
    """What flash attention holds while it goes back, as mha_varlen_bwd of flash-attn 2 and of torch 2.11 allocates it (flash_api.cpp).

    In the model's dtype the gradients of the output, queries, keys and values, and with grouped queries those of keys and values once more
    for every query head. In fp32 the sums of the queries' gradients, whose heads are rounded up to 32 numbers, and one number a query and
    head; both with 128 rows behind each branch. For fewer heads x branches than the GPU has processors the sums are held several times,
    which is not counted.
    """
    heads, kv_heads = shape.num_heads / layout.tensor, max(shape.num_kv_heads, layout.tensor) / layout.tensor
    tokens = settings.pack_tokens / layout.context
    keys = settings.pack_tokens * (1 + settings.shared_prefix / layout.context)
    rows = tokens + _FLASH_ROWS * settings.branches
    gradients = 2 * tokens * heads + 2 * keys * (kv_heads + (heads if heads > kv_heads else 0))
    sums = rows * heads * (-(-shape.head_dim // _FLASH_COLUMNS) * _FLASH_COLUMNS + 1)
    return gradients * shape.head_dim * settings.weight_bytes + sums * FLOAT32_BYTES


def gradient_bytes_beside_the_buffer(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, pipeline_rank: int) -> int:
    """Weight gradients that are not the fp32 buffer: the largest matrix's in bf16 before it is added to it; with fused products a dummy of
    each kind of matrix, which autograd is given and Transformer Engine keeps (module/base.py, get_dummy_wgrad)."""
    trained = trained_parameters(shape, layout, settings, pipeline_rank)[0]
    matrices = [p for p in trained if p.name.startswith("decoder.")]
    if not settings.fused_gradients:
        return max(p.numel for p in matrices) * settings.weight_bytes
    kinds = (max((p.numel for p in matrices if p.name.endswith(kind)), default=0) for kind in _FP8_MATRICES)
    return sum(kinds) * settings.weight_bytes


def fp8_copy_bytes(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, pipeline_rank: int) -> int:
    """What Transformer Engine keeps of the decoder's matrices between a pass's first micro-batch and the next pass: FP8 by rows and by
    columns, two bytes an element and its scales (one fp32 per 128 x 128, one byte per 32)."""
    if not settings.is_fp8:
        return 0
    matrices = (p for chunk in rank_parameters(shape, layout, pipeline_rank) for p in chunk if p.name.endswith(_FP8_MATRICES))
    per_element = 2 * (1 + 1 / 32) if settings.precision == "mxfp8" else 2
    return int(sum(p.numel for p in matrices) * per_element)


def head_bytes(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, pipeline_rank: int) -> int:
    """Final norm, the rows gathered for the head, their fp32 gradient, a tile of logits and a panel of theirs; on the last stage only."""
    if pipeline_rank != layout.pipeline - 1:
        return 0
    element = settings.weight_bytes
    tokens = settings.pack_tokens / layout.context
    rows = tokens * settings.head_rows
    norm = 2 * tokens * shape.hidden_size / (layout.tensor if layout.sequence else 1) * element
    gathered = (tokens if layout.sequence else 0) * shape.hidden_size * element
    selected = rows * shape.hidden_size * (element + FLOAT32_BYTES)
    # Kept logits are those of Megatron Core's own loss: bf16 and their fp32 copy.
    columns = padded_vocab(shape.vocab_size, layout.tensor) / layout.tensor
    if settings.recompute_logits:
        tile, panel = min(rows, _TILE_ROWS) * min(columns, _TILE_COLUMNS), min(rows, _PANEL_ROWS) * min(columns, _PANEL_COLUMNS)
        logits = tile * FLOAT32_BYTES + panel * element + min(settings.kept_logit_bytes, rows * columns * FLOAT32_BYTES)
    else:
        logits = rows * columns * (element + FLOAT32_BYTES)
    return int(norm + gathered + selected + logits)


def communication_bytes(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings) -> int:
    """Buffers of collectives: sequence-parallel gather, pipeline receive, and NCCL's own per communicator."""
    hidden = settings.pack_tokens / layout.context * shape.hidden_size * settings.weight_bytes
    gather = hidden if layout.sequence else 0  # megatron/core/tensor_parallel/layers.py: one global buffer
    received = 0.0 if layout.pipeline == 1 else 4 * hidden / (layout.tensor if layout.sequence else 1)
    sizes = (layout.tensor, layout.pipeline, layout.data * layout.context, layout.context, layout.expert)
    return int(gather + received) + NCCL_COMMUNICATOR_BYTES * sum(size > 1 for size in sizes)


def rank_memory(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, pipeline_rank: int) -> RankMemory:
    """Peak memory of the ranks at one pipeline position."""
    return RankMemory(
        pipeline_rank=pipeline_rank,
        state=state_bytes(shape, layout, settings, pipeline_rank),
        activations=activation_bytes(shape, layout, settings, pipeline_rank),
        head=head_bytes(shape, layout, settings, pipeline_rank),
        backward=backward_bytes(shape, layout, settings),
        communication=communication_bytes(shape, layout, settings),
        context=CONTEXT_BYTES,
    )


def all_ranks(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings) -> list[RankMemory]:
    """Peak memory of every pipeline position."""
    return [rank_memory(shape, layout, settings, rank) for rank in range(layout.pipeline)]
