"""How long each stage of a run takes, and its GPU-hours: reference pass, training, engine build, generation, files.

Training comes from plan.speed. Generation is a roofline of the decode loop, held to within 20% of TensorRT-LLM's published
throughput by tests/unit/test_plan_published.py. Files are bytes over the storage's rate, which only the user knows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from spin_megatron.plan.hardware import GIGA, Gpu
from spin_megatron.plan.memory import TrainSettings, trained_parameters
from spin_megatron.plan.parameters import count_parameters
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.plan.speed import NVLINK_SHARE, forward_only_seconds, step_time

EngineKind = Literal["eager", "compiled"]

# Decoding reads weights and key-value cache once a token; share of the memory's rate that compiled engines reach.
DECODE_MEMORY_SHARE = 0.90
# Share of the matrix peak that its products of a few hundred rows, and the prompts in between, reach.
DECODE_GEMM_SHARE = 0.58
# Host time of a decode step beside its kernels. Compiled: sampling and scheduling, and a tensor-parallel reduction twice a layer.
# Eager: about 20 kernel launches a layer from Python.
COMPILED_STEP_SECONDS = 0.003
REDUCTION_SECONDS = 15e-6
EAGER_LAYER_SECONDS = 0.7e-3
# What an engine may use for weights and cache (TensorRT-LLM's kv_cache_free_gpu_memory_fraction and vLLM's default are 0.9).
ENGINE_MEMORY_SHARE = 0.9
MAX_ENGINE_BATCH = 2048
# TensorRT-LLM build logs: Llama-3 8B bf16 (16 GB) 55 to 129 s, Command-R 35B fp16 (70 GB) 107 s on one GPU; 70B in parts 5 to 15 min.
BUILD_SECONDS = 60.0
BUILD_SECONDS_PER_GB = 2.0
# Export scores so many held-out pairs with what it wrote, by transformers on the host. Assumed: a core with AVX-512 does half as much more
# in fp32, one without bf16 instructions less in bf16, and more threads less each.
NUM_PROBE_PAIRS = 4
HOST_THREAD_FLOPS = 100e9
# Starting processes, importing, opening communicators: once a stage.
STAGE_START_SECONDS = 60.0


@dataclass(frozen=True)
class Workload:
    """What a run trains on. Lengths are means in tokens; train_pairs and epochs have one entry an iteration.

    prompts: questions answered anew in each iteration. train_pairs: pairs trained on (new ones and those of the window).
    """

    prompts: int
    prompt_tokens: float
    real_tokens: float
    generated_tokens: float
    train_pairs: tuple[int, ...]
    epochs: tuple[int, ...]
    held_out: int = 256

    def tokens_per_pair(self, *, share_prompt: bool) -> float:
        """Tokens a pair takes in a pack: the last token of an answer predicts nothing and is not computed (data/batches.py)."""
        return self.prompt_tokens * (1 if share_prompt else 2) + self.real_tokens + self.generated_tokens - 2

    def keys_per_token(self, *, share_prompt: bool) -> float:
        """Mean number of keys a token of a pack attends to; an answer sees its whole prompt."""
        prompt, answers = self.prompt_tokens, (self.real_tokens - 1, self.generated_tokens - 1)
        own = (1 if share_prompt else 2) * prompt**2 / 2
        return (own + sum(answer * (prompt + answer / 2) for answer in answers)) / self.tokens_per_pair(share_prompt=share_prompt)


# Share of a pack that best-fit packing fills at 8192 tokens on chat data (data/packing.py: padding at most 2%).
PACK_FILL = 0.985


@dataclass(frozen=True)
class Batch:
    """How a step's pairs become packs: pairs of a mean pack, packs of a data rank and update, pairs of an update."""

    pairs_per_pack: float
    micro_batches: int
    pairs_per_step: float


def plan_batch(workload: Workload, *, pack_tokens: int, global_batch_pairs: int, data_parallel: int, share_prompt: bool) -> Batch:
    """Packs an update takes: the multiple of data_parallel nearest to global_batch_pairs (data/packing.py, packs_per_step)."""
    pairs_per_pack = max(PACK_FILL * pack_tokens / workload.tokens_per_pair(share_prompt=share_prompt), 1.0)
    micro_batches = max(1, int(global_batch_pairs / pairs_per_pack / data_parallel + 0.5))
    return Batch(pairs_per_pack, micro_batches, micro_batches * data_parallel * pairs_per_pack)


def with_workload(settings: TrainSettings, workload: Workload, batch: Batch, *, share_prompt: bool) -> TrainSettings:
    """The settings with what the workload decides: packs a step, rows of the head, keys a token sees, keys that are copied, branches."""
    tokens = workload.tokens_per_pair(share_prompt=share_prompt)
    return replace(
        settings,
        micro_batches=batch.micro_batches,
        head_rows=min((workload.real_tokens + workload.generated_tokens) / tokens, 1.0),
        shared_prefix=2 * workload.prompt_tokens / tokens if share_prompt else 0.0,
        branches=batch.pairs_per_pack * (3 if share_prompt else 2),
        keys_per_token=workload.keys_per_token(share_prompt=share_prompt),
    )


@dataclass(frozen=True)
class Generation:
    """tensor: GPUs of one engine. batch: sequences it decodes at a time. tokens_per_second: of one engine, answers only."""

    tensor: int
    batch: int
    tokens_per_second: float


def generation(
    shape: ModelShape,
    gpu: Gpu,
    *,
    prompt_tokens: float,
    new_tokens: float,
    kind: EngineKind,
    tensor: int,
    max_batch: int = MAX_ENGINE_BATCH,
    element_bytes: int = 2,
) -> Generation | None:
    """Steady output rate of one engine on `tensor` GPUs; None where its weights leave no room for one sequence.

    A step decodes one token of each running sequence: all weights and the sequences' keys and values are read (on average half of
    an answer is there), prompts are computed in between. A mixture's weights are all read: a large batch reaches every expert.
    """
    weights = count_parameters(shape) * element_bytes
    cache_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * element_bytes
    context = prompt_tokens + new_tokens / 2
    room = ENGINE_MEMORY_SHARE * gpu.memory_bytes * tensor - weights
    batch = min(int(room / (cache_bytes * context)), max_batch)
    if batch < 1:
        return None
    read = (weights + batch * context * cache_bytes) / tensor / (gpu.memory_bandwidth * DECODE_MEMORY_SHARE)
    peak = gpu.fp8_flops if element_bytes == 1 and gpu.fp8_flops is not None else gpu.bf16_flops / max(element_bytes / 2, 1)  # fp32: TF32
    rate = peak * DECODE_GEMM_SHARE * tensor
    active = count_parameters(shape, active=True)
    computed = 2 * active * batch / rate
    prefill = computed * prompt_tokens / new_tokens
    host = shape.num_layers * EAGER_LAYER_SECONDS if kind == "eager" else COMPILED_STEP_SECONDS
    exchange = 0.0
    if tensor > 1:
        reduced = 2 * batch * (1 + prompt_tokens / new_tokens) * shape.hidden_size * 2
        exchange = 2 * shape.num_layers * (REDUCTION_SECONDS + reduced / (gpu.nvlink_bandwidth * NVLINK_SHARE))
    return Generation(tensor, batch, batch / (read + computed + prefill + exchange + host))


def engine_tensor(shape: ModelShape, gpu: Gpu, *, element_bytes: int = 2) -> int:
    """Fewest GPUs (a power of two) of one engine whose weights take at most 60% of their memory, so that batches are worthwhile."""
    weights = count_parameters(shape) * element_bytes
    tensor = 1
    while weights > 0.6 * gpu.memory_bytes * tensor:
        tensor *= 2
    return tensor


def replica_tensor(
    shape: ModelShape, gpu: Gpu, *, prompt_tokens: float, new_tokens: float, max_batch: int = MAX_ENGINE_BATCH, element_bytes: int = 2
) -> int:
    """GPUs of one compiled engine with the highest output rate a GPU, within a server: several small ones rather than one large."""
    fewest = engine_tensor(shape, gpu, element_bytes=element_bytes)
    rates: dict[int, float] = {}
    for tensor in (2**power for power in range(gpu.gpus_per_node.bit_length())):
        if tensor < fewest or shape.num_heads % tensor:
            continue
        request = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        made = generation(shape, gpu, kind="compiled", tensor=tensor, max_batch=max_batch, element_bytes=element_bytes, **request)
        rates[tensor] = made.tokens_per_second / tensor if made is not None else 0.0
    return max(rates, key=lambda tensor: rates[tensor], default=fewest)


@dataclass(frozen=True)
class Storage:
    """read_rate, write_rate: bytes/s of the shared file system, all ranks together."""

    read_rate: float = 5 * GIGA
    write_rate: float = 2 * GIGA


@dataclass(frozen=True)
class IterationTime:
    """Seconds of the stages of one SPIN iteration; checkpoint: all saves within training, the trained weights at its end included."""

    engine: float
    generate: float
    reference: float
    train: float
    checkpoint: float
    export: float
    evaluate: float
    steps: int

    @property
    def total(self) -> float:
        return self.engine + self.generate + self.reference + self.train + self.checkpoint + self.export + self.evaluate


@dataclass(frozen=True)
class RunSettings:
    """What decides the stages around training. save_every_steps: as [train]; max_batch: the engine's; built: it is compiled first.

    engine_bytes: of an element of the engine's weights and cache. export_threads: of the process that writes theta_{t+1}.
    """

    engine_kind: EngineKind
    engine_is_built: bool
    max_batch: int
    save_every_steps: int
    engine_bytes: int = 2
    export_threads: int = 1
    storage: Storage = Storage()


def run_time(
    shape: ModelShape, layout: ParallelLayout, settings: TrainSettings, gpu: Gpu, *, workload: Workload, batch: Batch, run: RunSettings
) -> list[IterationTime]:
    """The stages of every iteration on layout.world_size GPUs. `settings` must hold the workload (see with_workload)."""
    step_seconds = step_time(shape, layout, settings, gpu).total
    forward_per_pair = forward_only_seconds(shape, layout, settings, gpu) / batch.pairs_per_step
    generate_seconds = _generate_seconds(shape, layout, gpu, workload, run)
    num_parameters = count_parameters(shape)
    weights = settings.weight_bytes * num_parameters
    final_weights = settings.weight_bytes * _num_trained(shape, settings)
    load = STAGE_START_SECONDS + weights / run.storage.read_rate
    build = BUILD_SECONDS + BUILD_SECONDS_PER_GB * run.engine_bytes * num_parameters / GIGA
    export = load + weights / run.storage.write_rate + weights / run.storage.read_rate + _probe_seconds(shape, workload, run)
    iterations = []
    for pairs, epochs in zip(workload.train_pairs, workload.epochs, strict=True):
        steps = math.ceil(pairs / batch.pairs_per_step) * epochs
        saved = steps // run.save_every_steps * checkpoint_bytes(shape, settings) + final_weights
        iterations.append(
            IterationTime(
                engine=load + build if run.engine_is_built else 0.0,
                generate=load + generate_seconds,
                reference=load + pairs * forward_per_pair,
                train=steps * step_seconds,
                checkpoint=saved / run.storage.write_rate,
                export=export,
                evaluate=load + workload.held_out * forward_per_pair,
                steps=steps,
            )
        )
    return iterations


def engine_gpus(shape: ModelShape, gpu: Gpu, workload: Workload, run: RunSettings) -> int:
    """GPUs of one of the engines that answer side by side."""
    if run.engine_kind == "eager":
        return 1
    prompt_tokens, new_tokens = workload.prompt_tokens, workload.generated_tokens
    limits = {"max_batch": run.max_batch, "element_bytes": run.engine_bytes}
    return replica_tensor(shape, gpu, prompt_tokens=prompt_tokens, new_tokens=new_tokens, **limits)


def _generate_seconds(shape: ModelShape, layout: ParallelLayout, gpu: Gpu, workload: Workload, run: RunSettings) -> float:
    """All GPUs answer: as many engines as fit side by side. Infinite where no engine fits."""
    tensor = min(engine_gpus(shape, gpu, workload, run), layout.world_size)
    made = generation(
        shape,
        gpu,
        element_bytes=run.engine_bytes,
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.generated_tokens,
        kind=run.engine_kind,
        tensor=tensor,
        max_batch=run.max_batch,
    )
    if made is None:
        return math.inf
    engines = layout.world_size // tensor
    return (workload.prompts + workload.held_out) * workload.generated_tokens / (engines * made.tokens_per_second)


def _probe_seconds(shape: ModelShape, workload: Workload, run: RunSettings) -> float:
    """The products of a few pairs on the host: each answer by itself, after its prompt."""
    tokens = NUM_PROBE_PAIRS * (2 * workload.prompt_tokens + workload.real_tokens + workload.generated_tokens)
    return 2 * count_parameters(shape, active=True) * tokens / (run.export_threads * HOST_THREAD_FLOPS)


def checkpoint_bytes(shape: ModelShape, settings: TrainSettings) -> int:
    """A training checkpoint: of all that is trained the weights, the main weights where they are others, and the moments."""
    return _num_trained(shape, settings) * settings.saved_bytes


def _num_trained(shape: ModelShape, settings: TrainSettings) -> int:
    """Elements of the whole model that have gradients: all, or the adapters'."""
    (chunk,) = trained_parameters(shape, ParallelLayout(), settings, 0)
    return sum(parameter.numel for parameter in chunk)


def gpu_hours(iterations: Sequence[IterationTime], num_gpus: int) -> float:
    """GPUs are held from the first stage to the last."""
    return sum(iteration.total for iteration in iterations) * num_gpus / 3600
