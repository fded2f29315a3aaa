"""Time of a training step and of a forward-only pass, from the shapes, the layout and the GPU's rates.

Everything is built from five rates: matrix products, attention, memory-bound kernels, NVLink and network collectives. Each is the
data sheet's peak times one share; the shares are fitted once to published runs of Llama 2 and 3 (7B to 405B, bf16 and FP8),
which tests/unit/test_plan_published.py holds within 20%. Formulas, sources and the table: docs/planner.md.
"""

from dataclasses import astuple, dataclass, replace

from spin_megatron.plan.hardware import Gpu
from spin_megatron.plan.memory import (
    FLOAT32_BYTES,
    OptimizerName,
    Recompute,
    StateBytes,
    TrainSettings,
    expert_data_ranks,
    recomputed_share,
    scheduled_batches,
    state_bytes,
    trained_parameters,
)
from spin_megatron.plan.parameters import chunk_parameters, padded_vocab, split_by_kind
from spin_megatron.plan.shape import ModelShape, ParallelLayout

# Shares of the data sheet's peak, fitted to the published runs.
GEMM_SHARE = 0.68
GEMM_SHARE_FP8 = 0.58
ATTENTION_SHARE = 0.50
HEAD_SHARE = 0.65
MEMORY_SHARE = 0.75
NVLINK_SHARE = 0.70
NETWORK_SHARE = 0.80
# Products of a token's experts are narrow: their rate is the dense one times width / (width + this).
EXPERT_HALF_WIDTH = 2200
# All-to-all messages are small and uneven: share of the link they reach, on top of the link's own.
ALL_TO_ALL_SHARE = 0.85
# Share of a collective's time that still shows when it is overlapped with computation.
EXPOSED_TENSOR = 0.45
EXPOSED_DATA = 0.15
# Eager PyTorch launches a layer's kernels (about 25 forward) no faster than this, whatever the model's size.
LAYER_LAUNCH_SECONDS = 150e-6
# An offloaded optimizer. Bytes of host memory an element's update moves: torch's fused AdamW reads and writes everything once, its RMSProp
# in five passes; besides, the gradient arrives and the weight is made bf16. A core streams so much, all of them this share of the memory's
# rate; weights go up from memory that is not pinned. None of this was measured with a GPU.
HOST_UPDATE_BYTES: dict[OptimizerName, int] = {"adamw": 28 + 10, "rmsprop": 52 + 10}
HOST_THREAD_BANDWIDTH = 10e9
HOST_MEMORY_SHARE = 0.75
PCIE_SHARE, PAGEABLE_SHARE = 0.80, 0.25
# Without fused kernels a matrix's gradient is written in bf16, read again and added to the fp32 buffer: 2 + 2 + 8 bytes an element.
UNFUSED_GRADIENT_BYTES = 12
# Gradient norm, logging and the synchronisations of a step.
STEP_OVERHEAD_SECONDS = 0.02
# Backward work in units of forward: two products for one; flash attention computes its scores again (arXiv 2307.08691, section 3.1).
GEMM_BACKWARD = 2.0
ATTENTION_BACKWARD = 2.5
# Times a layer's collectives run in one direction for a forward and a backward, with what recompute repeats.
_EXCHANGES: dict[Recompute, float] = {"none": 2.0, "selective": 2.5, "full": 3.0}


@dataclass(frozen=True)
class PassTime:
    """Seconds of one micro-batch in a part of the model on one rank.

    communication: exposed collectives of both directions; forward_communication: those of a forward pass alone.
    """

    forward: float
    backward: float
    communication: float
    forward_communication: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.communication

    def times(self, count: int) -> "PassTime":
        """So many parts alike."""
        return PassTime(*(count * seconds for seconds in astuple(self)))

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(*(own + others for own, others in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update and where they go; the parts add up to `total`.

    compute: layers and head of the slowest stage over all micro-batches. tensor: exposed collectives inside layers. bubble: waiting
    for the pipeline to fill and drain. pipeline, data: exposed sends between stages; gradient reduction and weight gathering.
    imbalance: the slowest stage's time over the mean of the stages (1.0: even).
    num_tokens: processed by all data ranks. model_flops: of the update, nothing recomputed, attention over the keys it sees.
    """

    compute: float
    tensor: float
    bubble: float
    pipeline: float
    data: float
    optimizer: float
    imbalance: float
    num_tokens: int
    model_flops: float

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.bubble + self.pipeline + self.data + self.optimizer

    @property
    def bubble_share(self) -> float:
        return self.bubble / self.total

    def tokens_per_second(self, num_gpus: int) -> float:
        """Processed tokens per second and GPU."""
        return self.num_tokens / self.total / num_gpus

    def utilisation(self, num_gpus: int, gpu: Gpu) -> float:
        """Model FLOPs utilisation against the dense bf16 peak (arXiv 2204.02311, appendix B)."""
        return self.model_flops / self.total / num_gpus / gpu.bf16_flops


def layer_matrix_elements(shape: ModelShape) -> tuple[int, int]:
    """(dense, expert) elements of the matrices one token passes in one layer; of the experts, those it is routed to."""
    attention = 2 * shape.hidden_size * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    if shape.num_experts is None:
        return attention + 3 * shape.hidden_size * shape.ffn_hidden_size, 0
    assert shape.experts_per_token is not None
    assert shape.expert_ffn_hidden_size is not None
    expert = 3 * shape.hidden_size * shape.expert_ffn_hidden_size
    return attention + shape.num_experts * shape.hidden_size, shape.experts_per_token * expert


def forward_flops(shape: ModelShape, settings: TrainSettings, num_tokens: float) -> float:
    """FLOPs of one forward pass over num_tokens: two a matrix element, the attention's two products, the head on its rows."""
    layer = 2 * sum(layer_matrix_elements(shape)) + 4 * shape.num_heads * shape.head_dim * settings.keys_per_token
    head = 2 * shape.hidden_size * shape.vocab_size * settings.head_rows
    return num_tokens * (shape.num_layers * layer + head)


def layer_time(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, gpu: Gpu) -> PassTime:
    """One layer, one micro-batch, one rank. Recomputation adds its part of the forward to the backward."""
    tokens = settings.pack_tokens / layout.context
    attention_matrices, mlp_matrices = _layer_work(shape)
    rate = _matrix_rate(gpu, settings)
    products, mlp_products = (2 * tokens * work / layout.tensor / rate for work in (attention_matrices + mlp_matrices, mlp_matrices))
    scores = 4 * tokens * settings.keys_per_token * shape.num_heads * shape.head_dim / layout.tensor
    attention = scores / (gpu.bf16_flops * ATTENTION_SHARE)
    elementwise = tokens * _elementwise_bytes(shape, layout, settings) / (gpu.memory_bandwidth * MEMORY_SHARE)
    forward = max(products + attention + elementwise, LAYER_LAUNCH_SECONDS)
    backward = max(_backward_products(settings) * products + ATTENTION_BACKWARD * attention + 2 * elementwise, 2 * LAYER_LAUNCH_SECONDS)
    if not settings.fused_gradients and settings.adapters is None:
        matrices = _held_matrix_elements(shape, layout)
        backward += matrices * UNFUSED_GRADIENT_BYTES / (gpu.memory_bandwidth * MEMORY_SHARE)
    # Selective: the MLP's products, half of the elementwise work and one of the two exchanges once more.
    share = recomputed_share(settings, shape.num_layers / layout.pipeline / layout.virtual_pipeline)
    repeated = share * {"none": 0.0, "selective": mlp_products + elementwise / 2, "full": forward}[settings.recompute]
    exchange, (gather, scatter) = _exchange_seconds(shape, layout, settings, gpu), _context_seconds(shape, layout, settings, gpu)
    exchanges = _EXCHANGES["none"] + share * (_EXCHANGES[settings.recompute] - _EXCHANGES["none"])
    communication = exchanges * exchange + (1 + share * (settings.recompute == "full")) * gather + scatter
    return PassTime(forward, backward + repeated, communication, exchange + gather)


def _backward_products(settings: TrainSettings) -> float:
    """Frozen matrices have no weight gradient, which is one of the backward's two products; the adapters' own are too narrow to count."""
    return GEMM_BACKWARD - (settings.adapters is not None)


def _layer_work(shape: ModelShape) -> tuple[float, float]:
    """(attention, MLP) elements of matrices a token is multiplied with; narrow experts count for the lower rate they run at."""
    attention = 2 * shape.hidden_size * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    dense, expert = layer_matrix_elements(shape)
    width = shape.expert_ffn_hidden_size or 1
    return attention, dense - attention + expert * (width + EXPERT_HALF_WIDTH) / width


def _held_matrix_elements(shape: ModelShape, layout: ParallelLayout) -> float:
    """Elements of one layer's matrices on a rank: their gradients are added to the buffer each micro-batch."""
    one_layer = replace(layout, pipeline=shape.num_layers, virtual_pipeline=1, stage_layers=())
    return sum(p.numel for p in chunk_parameters(shape, one_layer, 0) if p.name.startswith("decoder.layers"))


def _matrix_rate(gpu: Gpu, settings: TrainSettings) -> float:
    if settings.is_fp8 and gpu.fp8_flops is not None:
        return gpu.fp8_flops * GEMM_SHARE_FP8
    # fp32 products use TF32, half the bf16 rate (A100 and H100 data sheets).
    return gpu.bf16_flops * GEMM_SHARE * (0.5 if settings.precision == "fp32" else 1.0)


def _elementwise_bytes(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings) -> float:
    """Bytes a token makes memory-bound kernels move, forward: norms and residual sums, rotary, SwiGLU; with FP8, the casts."""
    hidden = shape.hidden_size / (layout.tensor if layout.sequence else 1)
    rotary = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim / layout.tensor
    copies = 1 if shape.experts_per_token is None else shape.experts_per_token
    ffn = copies * (shape.ffn_hidden_size if shape.expert_ffn_hidden_size is None else shape.expert_ffn_hidden_size) / layout.tensor
    moved = 2 * (2 * hidden + 3 * hidden) + rotary + 3 * ffn
    if shape.experts_per_token is not None:
        moved += 4 * copies * shape.hidden_size  # permuted to the experts and back
    casts = 0.0
    if settings.is_fp8:
        # Every input of a product is read, and written in FP8 as it is and transposed (for the weight's gradient).
        casts = 4 * (2 * shape.hidden_size + shape.num_heads * shape.head_dim / layout.tensor + ffn)
    return moved * settings.weight_bytes + casts


def _exchange_seconds(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, gpu: Gpu) -> float:
    """Exposed collectives of tensor and expert ranks in one direction through one layer.

    Tensor parallelism: two all-reduces of [tokens, hidden], or with sequence parallelism as many bytes in gathers and scatters
    (arXiv 2205.05198, section 4.2.2). Experts: tokens go out and come back.
    """
    hidden_bytes = settings.pack_tokens / layout.context * shape.hidden_size * settings.weight_bytes
    seconds = 0.0
    if layout.tensor > 1:
        ring = 4 * hidden_bytes * (layout.tensor - 1) / layout.tensor
        exposed = EXPOSED_TENSOR if settings.overlap_tensor else 1.0
        seconds += exposed * ring / _link(gpu, layout.tensor, layout.tensor)
    if layout.expert > 1 and shape.experts_per_token is not None:
        sent = 2 * shape.experts_per_token * hidden_bytes * (layout.expert - 1) / layout.expert
        seconds += sent / (_link(gpu, layout.tensor * layout.expert, layout.expert) * ALL_TO_ALL_SHARE)
    return seconds


def _context_seconds(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, gpu: Gpu) -> tuple[float, float]:
    """(forward, backward) collectives of context ranks in one layer, before the attention and after its backward (mcore/context.py).

    Keys and values of the whole pack are gathered; their gradients are scattered in fp32. With overlap_context both go round a ring
    beside the attention, in the weights' type.
    """
    if layout.context == 1:
        return 0.0, 0.0
    elements = 2 * settings.pack_tokens / layout.context * shape.num_kv_heads * shape.head_dim / layout.tensor
    seconds = (layout.context - 1) * elements / _link(gpu, layout.tensor * layout.context, layout.context)
    if settings.overlap_context:
        return (EXPOSED_TENSOR * seconds * settings.weight_bytes,) * 2
    return seconds * settings.weight_bytes, seconds * FLOAT32_BYTES


def _link(gpu: Gpu, span: int, members: int) -> float:
    """Bytes/s one rank moves in a ring of `members` ranks that lie within `span` neighbouring GPUs.

    Inside a server it is NVLink. Beyond, every GPU of the group in a server brings its NIC (NCCL stripes a ring over them).
    """
    if span <= gpu.gpus_per_node:
        return gpu.nvlink_bandwidth * NVLINK_SHARE
    stride = max(span // members, 1)
    in_node = max(gpu.gpus_per_node // stride, 1)
    return min(gpu.nvlink_bandwidth * NVLINK_SHARE, in_node * gpu.network_bandwidth * NETWORK_SHARE)


def head_time(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, gpu: Gpu) -> PassTime:
    """The vocab-parallel head on its rows; its backward computes the logits again unless they are kept (logprobs.py: 8 not 6 RHV)."""
    tokens = settings.pack_tokens / layout.context
    columns = padded_vocab(shape.vocab_size, layout.tensor) / layout.tensor
    rows = tokens * settings.head_rows
    products = 2 * rows * shape.hidden_size * columns / (gpu.bf16_flops * HEAD_SHARE)
    epilogue = rows * columns * FLOAT32_BYTES / (gpu.memory_bandwidth * MEMORY_SHARE)
    hidden_bytes = tokens * shape.hidden_size * settings.weight_bytes
    exchange = 2 * hidden_bytes / _link(gpu, layout.tensor, layout.tensor) if layout.tensor > 1 else 0.0
    repeated = 1 if settings.recompute_logits else 0
    return PassTime(products + 2 * epilogue, (_backward_products(settings) + repeated) * products + 2 * epilogue, exchange, exchange / 2)


def stage_times(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, gpu: Gpu) -> list[PassTime]:
    """One micro-batch on each pipeline rank: its layers, and on the last rank the head."""
    layer = layer_time(shape, layout, settings, gpu)
    *others, last = (layer.times(layout.layers_of_rank(shape.num_layers, rank)) for rank in range(layout.pipeline))
    return [*others, last + head_time(shape, layout, settings, gpu)]


def step_time(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, gpu: Gpu) -> StepTime:
    """One update: micro_batches packs on each data rank, then the reduction and the optimizer."""
    stages = stage_times(shape, layout, settings, gpu)
    totals = [stage.total for stage in stages]
    slowest = max(range(layout.pipeline), key=lambda rank: totals[rank])
    # 1F1B: the slowest stage works through all micro-batches, the others' time of one is waited for once, a virtual_pipeline-th of it
    # when chunks are interleaved (arXiv 2104.04473, section 2.2).
    bubble = (sum(totals) - totals[slowest]) / layout.virtual_pipeline
    num_tokens = settings.micro_batches * settings.pack_tokens * layout.data
    scheduled = scheduled_batches(layout, settings.micro_batches)
    return StepTime(
        compute=scheduled * (stages[slowest].forward + stages[slowest].backward),
        tensor=scheduled * stages[slowest].communication,
        bubble=bubble,
        pipeline=_pipeline_seconds(shape, layout, settings, gpu),
        data=_data_seconds(shape, layout, settings, gpu),
        optimizer=_optimizer_seconds(shape, layout, settings, gpu) + STEP_OVERHEAD_SECONDS,
        imbalance=totals[slowest] * layout.pipeline / sum(totals),
        num_tokens=num_tokens,
        model_flops=(1 + _backward_products(settings)) * forward_flops(shape, settings, num_tokens),
    )


def forward_only_seconds(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, gpu: Gpu) -> float:
    """A forward-only pass of the same packs: the reference phase and scoring."""
    stages = stage_times(shape, layout, settings, gpu)
    totals = [stage.forward + stage.forward_communication for stage in stages]
    sends = _pipeline_seconds(shape, layout, settings, gpu) / 2
    return scheduled_batches(layout, settings.micro_batches) * max(totals) + (sum(totals) - max(totals)) / layout.virtual_pipeline + sends


def _pipeline_seconds(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, gpu: Gpu) -> float:
    """Sends of activations and gradients between stages; hidden behind computation where interleaved and overlapped."""
    if layout.pipeline == 1 or (settings.overlap_pipeline and layout.virtual_pipeline > 1):
        return 0.0
    split = layout.tensor if layout.sequence else 1
    sent = settings.pack_tokens / layout.context * shape.hidden_size * settings.weight_bytes / split
    bandwidth = _link(gpu, layout.world_size, layout.pipeline)
    return 2 * layout.virtual_pipeline * scheduled_batches(layout, settings.micro_batches) * sent / bandwidth


def _data_seconds(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, gpu: Gpu) -> float:
    """Reduction of the gradients and gathering of the weights over data ranks, after the last backward or overlapped with it."""
    seconds = 0.0
    span = layout.tensor * layout.data * layout.context
    for kind, num_ranks in enumerate((layout.data * layout.context, expert_data_ranks(layout))):
        numel = max(_elements(shape, layout, settings, rank, kind) for rank in range(layout.pipeline))
        per_element = settings.gradient_bytes + (settings.weight_bytes if settings.distributed_optimizer else settings.gradient_bytes)
        seconds += numel * per_element * (num_ranks - 1) / num_ranks / _link(gpu, span, num_ranks)
    return seconds * (EXPOSED_DATA if settings.overlap_data else 1.0)


def _elements(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, pipeline_rank: int, kind: int) -> int:
    trained = trained_parameters(shape, layout, settings, pipeline_rank)
    return sum(p.numel for chunk in trained for p in split_by_kind(chunk)[kind])


def _optimizer_seconds(shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, gpu: Gpu) -> float:
    """The update reads and writes its state once, and reads the gradients twice (norm, update); memory-bound. What is offloaded follows."""
    seconds = 0.0
    for rank in (0, layout.pipeline - 1):
        state = state_bytes(shape, layout, settings, rank)
        updated = state.gradients * settings.weight_bytes // settings.gradient_bytes
        moved = 2 * state.optimizer + 2 * state.gradients + updated
        seconds = max(seconds, moved / (gpu.memory_bandwidth * MEMORY_SHARE) + _host_seconds(state, settings, gpu))
    return seconds


def _host_seconds(state: StateBytes, settings: TrainSettings, gpu: Gpu) -> float:
    """The update of what is offloaded: gradients come down beside it, tensor after tensor; a tensor's weights go up after its own."""
    elements = state.host / (settings.optimizer_bytes + FLOAT32_BYTES)
    rate = min(gpu.host_memory_bandwidth * HOST_MEMORY_SHARE, settings.host_threads * HOST_THREAD_BANDWIDTH)
    down = elements * FLOAT32_BYTES / (gpu.host_bandwidth * PCIE_SHARE)
    up = elements * settings.weight_bytes / (gpu.host_bandwidth * PAGEABLE_SHARE)
    return max(elements * HOST_UPDATE_BYTES[settings.optimizer] / rate, down) + up
