"""LoRA: trained low-rank updates beside frozen weights (arXiv 2106.09685), split over tensor ranks as the weights are.

`add_adapters` freezes a loaded model and gives each chosen linear layer a submodule `adapter` whose output a forward hook adds to the
layer's own. The layers stay Megatron Core's or Transformer Engine's; frozen, they make no weight gradient, and Megatron Core keeps
neither gradient buffers nor optimizer state for them. B starts as 0, so theta_{t+1} is theta_t before its first update, and the
reference theta_t needs nothing besides: the adapters it was trained with were merged into its weights on export.

    column-parallel W (qkv, fc1)   x -> A -> (gather tokens | copy) -> B        A replicated, B split over rows
    row-parallel W (proj, fc2)     x -> A -> (scatter tokens | sum) -> B        A split over columns, B replicated

Only [T, R] crosses ranks. With sequence parallelism the replicated factor sees a rank's own tokens alone and is marked, so that
Megatron Core sums its gradient over tensor ranks; without, its gradient is whole on every rank.

Shapes: T tokens (a sequence-parallel rank holds T/TP of them), I inputs, O outputs of a linear layer (local: one of them /TP), R rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from spin_megatron.mcore.model import SpinModel, unwrapped
from spin_megatron.mcore.runtime import Runtime
from spin_megatron.plan.adapters import MODULES, ROW_PARALLEL, AdapterShape, Target
from spin_megatron.run.seeds import row_seed


@dataclass(frozen=True)
class Lora:
    """Adapters to be made. scale: alpha / rank. seed, iteration: A is drawn from them and from its name, at any layout the same."""

    shape: AdapterShape
    scale: float
    seed: int
    iteration: int


class Adapter(nn.Module):
    """scale * B A x for one linear layer.

    lora_a: [R, I] (local: I/TP beside a row-parallel layer). lora_b: [O, R] (local: O/TP beside a column-parallel layer).
    """

    def __init__(self, lora_a: Tensor, lora_b: Tensor, *, scale: float, is_row_parallel: bool, has_split_tokens: bool, group: Any) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)
        split, replicated = (self.lora_a, self.lora_b) if is_row_parallel else (self.lora_b, self.lora_a)
        split.tensor_model_parallel = True  # type: ignore[attr-defined]  # counts on every rank in the gradient norm
        replicated.sequence_parallel = has_split_tokens  # type: ignore[attr-defined]
        self.scale = scale
        self._exchange = _exchange(is_row_parallel=is_row_parallel, has_split_tokens=has_split_tokens, group=group)

    def forward(self, input_TI: Tensor) -> Tensor:
        """[T, ..., I] as the linear layer gets it -> [T, ..., O] as the layer gives it, same dtype.

        Gradient to both factors and to the input, which is complete as the layer's own is. Collectives: one of [T, R] a direction.
        """
        low_TR = self._exchange(F.linear(input_TI, self.lora_a))
        return F.linear(low_TR * self.scale, self.lora_b)


def _exchange(*, is_row_parallel: bool, has_split_tokens: bool, group: Any) -> Callable[[Tensor], Tensor]:
    """What happens to A x between tensor ranks: makes what B needs of what A gave, and its backward the reverse."""
    if is_row_parallel:
        if has_split_tokens:
            return lambda low_TR: tensor_parallel.reduce_scatter_to_sequence_parallel_region(low_TR, group=group)
        return lambda low_TR: tensor_parallel.reduce_from_tensor_model_parallel_region(low_TR, group=group)
    if has_split_tokens:
        return lambda low_TR: tensor_parallel.gather_from_sequence_parallel_region(low_TR, tensor_parallel_output_grad=True, group=group)
    return lambda low_TR: tensor_parallel.copy_to_tensor_model_parallel_region(low_TR, group=group)


def add_adapters(chunks: Sequence[SpinModel], lora: Lora, runtime: Runtime) -> None:
    """Freeze loaded chunks and put adapters beside the chosen layers, B = 0."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        for layer in chunk.decoder.layers:
            for target in lora.shape.targets:
                _add_adapter(layer.get_submodule(MODULES[target]), target, layer.layer_number - 1, lora, runtime)
        if chunk.pre_process:
            # Recomputed layers are differentiated only where an input asks for it, and a frozen embedding's output does not.
            chunk.embedding.register_forward_hook(_ask_for_gradient)


def _add_adapter(linear: Any, target: Target, layer: int, lora: Lora, runtime: Runtime) -> None:
    outputs, inputs = linear.weight.shape
    is_row_parallel, rank, tensor = target in ROW_PARALLEL, lora.shape.rank, runtime.layout.tensor
    generator = torch.Generator().manual_seed(row_seed(lora.seed, "lora", lora.iteration, f"{layer}.{target}"))
    all_inputs = inputs * tensor if is_row_parallel else inputs
    # Kaiming's uniform with a = sqrt(5), as PEFT draws A: bounds +-1/sqrt(I).
    whole_RI = (torch.rand(rank, all_inputs, generator=generator) * 2 - 1) / all_inputs**0.5
    lora_a = whole_RI.chunk(tensor, dim=1)[runtime.tensor_rank] if is_row_parallel else whole_RI
    linear.adapter = Adapter(
        lora_a.to(linear.weight, copy=True).contiguous(),
        linear.weight.new_zeros(outputs, rank),
        scale=lora.scale,
        is_row_parallel=is_row_parallel,
        has_split_tokens=runtime.layout.sequence,
        group=runtime.groups.tensor,
    )
    if hasattr(linear, "return_layernorm_output"):
        # Transformer Engine's norm and projection in one (TELayerNormColumnParallelLinear): the adapter reads what lies between.
        linear.return_layernorm_output = True
    linear.register_forward_hook(_add_output, prepend=True)  # before the one that frees the input (mcore.layers)


def _add_output(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Any, Any]) -> tuple[Tensor, Any]:
    """Forward hook of a linear layer, which gives (output, bias or None)."""
    own, bias = output
    # With return_layernorm_output Megatron Core's wrapper passes Transformer Engine's (output, normed input) on as one.
    own_TO, input_TI = own if isinstance(own, tuple) else (own, inputs[0])
    return own_TO + linear.adapter(input_TI), bias


def _ask_for_gradient(_embedding: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(torch.is_grad_enabled())


def has_adapters(chunk: nn.Module) -> bool:
    """Whether `add_adapters` froze this chunk, wrapped in DDP or not."""
    return any(isinstance(module, Adapter) for module in chunk.modules())


def sharded_adapters(chunk: nn.Module) -> dict[str, Any]:
    """The adapters alone as sharded tensors by local parameter name, stacked over layers as Megatron Core stacks their linear layers."""
    inner = unwrapped(chunk)
    state: dict[str, Any] = {}
    for index, layer in enumerate(inner.decoder.layers):
        modules, offsets = dict(layer.named_modules()), ((0, layer.layer_number - 1, inner.config.num_layers),)
        for target, linear in MODULES.items():
            adapter = modules.get(f"{linear}.adapter")
            if adapter is None:
                continue
            axes = {"lora_a": 1} if target in ROW_PARALLEL else {"lora_b": 0}
            sharded = make_sharded_tensors_for_checkpoint(
                dict(adapter.named_parameters()), f"decoder.layers.{linear}.adapter.", axes, offsets
            )
            for key, tensor in sharded.items():
                # Gate rows, then up rows, on each rank: as Megatron Core saves the weight itself.
                is_gate_up = target == "fc1" and key.endswith("lora_b")
                name = key.replace("decoder.layers.", f"decoder.layers.{index}.")
                state[name] = apply_swiglu_sharded_factory(tensor, offsets) if is_gate_up else tensor
    return state
