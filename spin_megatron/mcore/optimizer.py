"""Gradients and updates: Megatron Core's data-parallel wrapper, AdamW and the paper's RMSProp.

The wrapper keeps gradients in fp32 buffers whatever the weights' type. Megatron Core's optimizers keep fp32 main
parameters for bf16 weights and, with the distributed optimizer, only this rank's share of them. Which rule updates those
main parameters is the inner `torch.optim.Optimizer`. Megatron Core's factory knows adam and sgd, and its
DistributedOptimizer insists on Adam when it is built; it reads nothing of it but the parameter groups, so RMSProp takes
the finished optimizer's groups over. Adam's own state is allocated by its first step, which never comes. A share of all that can
lie in the host's memory (mcore/offload.py).
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from spin_megatron.mcore.cpu_shim import without_triton
from spin_megatron.mcore.fused import add_to_main_gradients, update_kernels
from spin_megatron.mcore.offload import ask_for_offload, inner_optimizers, over_shards, require_gpu

logger = logging.getLogger(__name__)

OptimizerName = Literal["adamw", "rmsprop"]


@dataclass(frozen=True)
class UpdateRule:
    """How gradients change weights; torch's definitions of AdamW and RMSprop.

    name: "adamw" (decoupled decay) or "rmsprop" (v = alpha v + (1 - alpha) g^2, w -= lr g / (sqrt(v) + epsilon); no momentum).
    weight_decay: of matrices; biases and norm weights are not decayed.
    max_grad_norm: global L2 norm to clip to; None: no clipping.
    is_distributed: each data-parallel rank holds and updates only its share of the optimizer's state.
    offload_fraction: share of the state that lies in the host's memory and is updated there; needs bf16 weights and is_distributed.
    """

    name: OptimizerName
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    rmsprop_alpha: float = 0.99
    epsilon: float = 1e-8
    max_grad_norm: float | None = None
    is_distributed: bool = False
    offload_fraction: float = 0.0

    @property
    def state_names(self) -> tuple[str, ...]:
        """The per-parameter tensors the rule keeps, by torch's names."""
        return ("exp_avg", "exp_avg_sq") if self.name == "adamw" else ("square_avg",)

    def rmsprop_settings(self) -> dict[str, Any] | None:
        """Arguments of torch's RMSprop; None for AdamW."""
        # One parameter at a time: on CUDA torch would take all at once, with a square root of every state beside it, 4 bytes a parameter.
        settings = {"lr": 0.0, "alpha": self.rmsprop_alpha, "eps": self.epsilon, "foreach": False}
        return settings if self.name == "rmsprop" else None


@dataclass(frozen=True)
class Trainer:
    """What an update needs of the model: its wrapped chunks, the optimizer over them, and the rule it follows."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    rule: UpdateRule


@dataclass(frozen=True)
class UpdateOutcome:
    """grad_norm: global L2 norm before clipping, the same on all ranks. is_applied: False when it was not finite or not allowed."""

    grad_norm: float
    is_applied: bool


def build_trainer(chunks: Sequence[nn.Module], rule: UpdateRule, *, overlap: bool = False, bucket_elements: int | None = None) -> Trainer:
    """Wrap the model's chunks for training and build the optimizer over their parameters.

    The weights must be loaded: fp32 main parameters are copied from them here. Collective over all ranks.

    Args:
        chunks: this rank's GPTModel chunks (more than one with virtual pipeline stages).
        overlap: reduce gradients over data-parallel ranks while the last micro-batch's backward goes on and, with the distributed
            optimizer, gather the new weights while the next forward goes on: read them only after `gather_weights`.
        bucket_elements: what is reduced at a time with overlap; None: Megatron Core's choice, 40 million and more.
    """
    require_gpu(chunks[0], rule.offload_fraction)
    for chunk in chunks:
        _mark_tensor_parallel(chunk)
    wrapped = [_wrap(chunk, index, rule, overlap=overlap, bucket_elements=bucket_elements) for index, chunk in enumerate(chunks)]
    config: Any = wrapped[0].config
    if overlap:
        # The schedules let only the last micro-batch reduce. They take one function, or one a virtual stage.
        config.no_sync_func, config.grad_sync_func = (
            functions if len(wrapped) > 1 else functions[0]
            for functions in ([chunk.no_sync for chunk in wrapped], [chunk.start_grad_sync for chunk in wrapped])
        )
    # Sums gradients over data-parallel ranks, over tensor-parallel ranks where sequence parallelism or q/k norms split their
    # input, and over the first and the last pipeline stage for tied embeddings.
    config.finalize_model_grads_func = finalize_model_grads
    settings = OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        weight_decay=rule.weight_decay,
        adam_beta1=rule.adam_beta1,
        adam_beta2=rule.adam_beta2,
        adam_eps=rule.epsilon,
        decoupled_weight_decay=True,
        bf16=config.params_dtype == torch.bfloat16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=rule.is_distributed,
        clip_grad=rule.max_grad_norm or 0.0,
    )
    if rule.offload_fraction:
        ask_for_offload(settings)
    # The distributed optimizer's shards are views of fp32 weights: with a graph they would be no leaves. torch's first optimizer imports
    # torch's compiler, and that Triton.
    with torch.no_grad(), without_triton():
        optimizer = get_megatron_optimizer(settings, wrapped, use_gloo_process_groups=False)
    for part in parts(optimizer):
        if part.optimizer is not None:
            part.optimizer = _follow(part.optimizer, rule)
        for group in part.param_groups:
            # Megatron Core's scheduler would do this each step; ours only sets the learning rate.
            group["weight_decay"] = rule.weight_decay * group["wd_mult"]
    for chunk in wrapped:
        add_to_main_gradients(chunk)
    _log_kernels(optimizer, rule)
    trainer = Trainer(wrapped, optimizer, rule)
    gather_weights(trainer)  # so that no forward pass before the first update begins a gather
    return trainer


def _follow(made: torch.optim.Optimizer, rule: UpdateRule) -> Any:
    """The optimizer that the factory made, or torch's RMSprop over the same groups with Megatron Core's marks on them."""
    settings = rule.rmsprop_settings()
    if rule.offload_fraction:
        return over_shards(made, rule.offload_fraction, settings)
    if settings is None:
        for group in made.param_groups:
            if not any(parameter.is_cuda for parameter in group["params"]):
                group["fused"] = True  # torch's one pass over weights, gradients and moments; it would make seven
        return made
    groups = [{name: value for name, value in group.items() if name not in made.defaults} for group in made.param_groups]
    return torch.optim.RMSprop(groups, **settings)


def _log_kernels(optimizer: MegatronOptimizer, rule: UpdateRule) -> None:
    if dist.get_rank() != 0:
        return
    made = [part.optimizer for part in parts(optimizer) if part.optimizer is not None]
    for used in {update_kernels(inner) for whole in made for inner in inner_optimizers(whole)}:
        logger.info("optimizer: %s (%s)", used.maker, used.reason)
    if rule.offload_fraction:
        share, threads = f"{rule.offload_fraction:.0%}", torch.get_num_threads()
        logger.info("optimizer: %s of its state is in the host's memory, updated by %d threads a rank", share, threads)


def overlaps(setting: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Whether collectives over data ranks run beside computation; on a CPU they would share its cores."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def _mark_tensor_parallel(chunk: nn.Module) -> None:
    """Say which weights are shards: of the others only the first tensor rank's gradients count in the norm.

    Megatron Core's layers do so together with drawing initial values, which is switched off here since weights are loaded.
    Transformer Engine's layers do so always.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            module.weight.tensor_model_parallel = True


def _wrap(chunk: nn.Module, index: int, rule: UpdateRule, *, overlap: bool, bucket_elements: int | None) -> DistributedDataParallel:
    config: Any = chunk.config
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=rule.is_distributed,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and rule.is_distributed,
        bucket_size=bucket_elements,
        # A gradient that is not finite is found after the reduction, so that all ranks skip the step together.
        check_for_nan_in_grad=False,
    )
    return DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)


def parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """The optimizers behind a chain (dense and expert parameters have one each) that hold parameters on this rank."""
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    yield from (part for part in chained if not part.is_stub_optimizer)


def gather_weights(trainer: Trainer) -> None:
    """Give every rank the weights of the last update; call it before they are read other than by a forward pass. Collective."""
    for chunk in trainer.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def clear_gradients(trainer: Trainer) -> None:
    """Zero the gradient buffers; call it before each step's first backward pass."""
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()


def apply_gradients(trainer: Trainer, *, learning_rate: float, is_allowed: Callable[[float], bool] | None = None) -> UpdateOutcome:
    """Clip and apply the reduced gradients in the buffers; leave weights and state alone when their norm is not finite.

    Collective over all ranks; every rank returns the same.

    Args:
        is_allowed: asked with the norm before weights change; its answer must be the same on all ranks.
    """
    optimizer = trainer.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm) or (is_allowed is not None and not is_allowed(grad_norm)):
        return UpdateOutcome(grad_norm, is_applied=False)
    if trainer.rule.max_grad_norm is not None:
        for part in parts(optimizer):
            parameters = part.get_parameters()
            if parameters:
                is_decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(parameters, trainer.rule.max_grad_norm, grad_norm, is_decoupled)
    optimizer.step_with_ready_grads()
    return UpdateOutcome(grad_norm, is_applied=True)
