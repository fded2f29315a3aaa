"""The parts of a transformer layer that are ours, and the layer spec they go into.

Megatron Core's local spec (no Transformer Engine) has two faults here: its norm refuses sequence parallelism, and its norm and
gated activation keep every intermediate for the backward. `RmsNorm` and `Swiglu` keep their input and nothing of its size
besides, and what they give is not kept either: the products that read it free it and have it made again in the backward, which takes
no matrix product. A layer then keeps its input, queries, keys, values, the attention's output, the MLP's input and its first product.

Shapes: T tokens, H hidden, F FFN (local: F/TP).
"""

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spin_megatron.mcore.attention import Backend, BranchAttention
from spin_megatron.mcore.context import plan_context
from spin_megatron.mcore.rotary import rotary_table
from spin_megatron.mcore.varlen import PlanCache
from spin_megatron.objective.cache_blocks import cache_blocks

SpecKind = Literal["local", "transformer_engine"]


@dataclass(frozen=True)
class LayerSpec:
    """Which layer modules a model is built from, and why."""

    kind: SpecKind
    reason: str


def choose_layer_spec(device: torch.device) -> LayerSpec:
    """Transformer Engine's modules on CUDA where they are installed, else Megatron Core's local ones."""
    if device.type != "cuda":
        return LayerSpec("local", f"Transformer Engine computes on CUDA only, and this is {device.type}")
    if importlib.util.find_spec("transformer_engine") is None:
        return LayerSpec("local", "Transformer Engine is not installed (tools/cuda_environment.sh)")
    return LayerSpec("transformer_engine", "Transformer Engine is installed")


def layer_submodules(
    kind: SpecKind, *, num_experts: int | None, qk_norm: bool, attention: Backend, inv_freq: Tensor
) -> tuple[Any, type]:
    """Megatron Core's spec of one decoder layer with our attention in it, and the class of the final norm.

    Args:
        inv_freq: of the rotary positions; local layers rotate in our attention, with one table for all of them.

    Returns:
        (ModuleSpec of a TransformerLayer, norm class).
    """
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.identity_op import IdentityOp

    norm: type
    if kind == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=num_experts is not None, qk_layernorm=qk_norm
        )
    else:
        norm = RmsNorm
        spec = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=num_experts, qk_layernorm=qk_norm, normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RmsNorm
        attention_norm = RmsNorm if qk_norm else IdentityOp
        spec.submodules.self_attention.submodules.q_layernorm = attention_norm
        spec.submodules.self_attention.submodules.k_layernorm = attention_norm
        mlp = _submodules(spec.submodules.mlp)
        (mlp if num_experts is None else _submodules(mlp.experts)).activation_func = Swiglu
        if num_experts is not None:
            # Saved as if it were fused into linear_fc1, which of an expert layer not even Transformer Engine's spec does: under its own
            # name a checkpoint of one spec loads into the other.
            del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    # One plan cache for all layers: they see the same pack.
    core_attention = functools.partial(
        BranchAttention,
        backend=attention,
        plans=PlanCache(),
        shares=PlanCache(make=plan_context),
        rotary=PlanCache(4, functools.partial(rotary_table, inv_freq=inv_freq)) if kind == "local" else None,
    )
    spec.submodules.self_attention.submodules.core_attention = core_attention
    return spec, norm


def _submodules(spec: Any) -> Any:
    """The submodules a spec holds: a ModuleSpec up to 0.16, a functools.partial from 0.19 on."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def make_inputs_again(model: torch.nn.Module) -> None:
    """Let the products of local layers keep no input that a norm or an activation of this file makes: it is made again in the backward."""
    from megatron.core.transformer.mlp import MLP

    for name, module in model.named_modules():
        if isinstance(module, MLP) and ".local_experts." in name:
            module.forward = functools.partial(_weighted_expert, module)
        if name.endswith(("linear_qkv", "linear_fc1", "linear_fc2")):
            module.register_forward_hook(_make_input_again)


def _make_input_again(_linear: torch.nn.Module, inputs: tuple[Any, ...], outputs: tuple[Any, Any]) -> None:
    """Free what the product saved of its input, and fill it again when the gradient of the product's output is there.

    Megatron Core's CheckpointWithoutOutput does so for norms, but needs Transformer Engine, runs a graph in the backward's graph and
    copies what it made.
    """
    made, product = inputs[0], outputs[0]
    node = made.grad_fn
    fill = getattr(getattr(node, "_forward_cls", None), "fill", None)
    if fill is None or not product.requires_grad:  # made by something else, or nothing is kept anyway
        return
    # `data` has a version of its own: autograd is not to take the filling for a change.
    waiting, num_bytes = [(made.data, node)], made.untyped_storage().nbytes()
    made.untyped_storage().resize_(0)

    def refill(_grad: Tensor) -> None:
        while waiting:  # once; a hook that went on holding the content would keep it longer than the product does
            content, node = waiting.pop()
            content.untyped_storage().resize_(num_bytes)
            with torch.no_grad():
                fill(content, *node.saved_tensors)

    product.register_hook(refill)


def _weighted_expert(expert: Any, hidden_NH: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor | None]:
    """What MLP.forward computes of N tokens, bit for bit; but that weighs what was activated apart, and keeps it and the result."""
    gate_up, _ = expert.linear_fc1(hidden_NH)
    output: tuple[Tensor, Tensor | None] = expert.linear_fc2(_Swiglu.apply(gate_up, weights_N[:, None]))
    return output


class RmsNorm(torch.nn.Module):
    """Root-mean-square norm of the last dimension, computed in fp32: weight * x / sqrt(mean(x**2) + eps).

    Rounded to x's dtype before the weight is applied, as transformers' LlamaRMSNorm does. Under sequence parallelism the weight is
    marked, so that Megatron Core sums its gradient over tensor ranks (each sees its own tokens).
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H], same dtype."""
        normed: Tensor = _RmsNorm.apply(hidden, self.weight, self.eps)
        return normed


class _RmsNorm(torch.autograd.Function):
    """Saves x and one fp32 number a row; the backward forms the normed x again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        hidden = hidden.contiguous()  # keys are a view of the projection's whole output, which saving the view would keep
        scale = hidden.new_empty((*hidden.shape[:-1], 1), dtype=_at_least_float32(hidden[:0]).dtype)
        for hidden_rows, scale_rows in cache_blocks(hidden, scale):
            scale_rows.copy_(_at_least_float32(hidden_rows).square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_())
        ctx.save_for_backward(hidden, weight_H, scale)
        normed = torch.empty_like(hidden)
        _RmsNorm.fill(normed, hidden, weight_H, scale)
        return normed

    @staticmethod
    def fill(normed: Tensor, hidden: Tensor, weight_H: Tensor, scale: Tensor) -> None:
        """Write the output from what forward saved."""
        for hidden_rows, scale_rows, normed_rows in cache_blocks(hidden, scale, normed):
            torch.mul(hidden_rows, scale_rows, out=normed_rows).mul_(weight_H)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        hidden, weight_H, scale = ctx.saved_tensors
        wide_weight_H = weight_H.to(scale.dtype)
        dhidden, dweight_H = torch.empty_like(hidden), torch.zeros_like(wide_weight_H)
        for hidden_rows, scale_rows, grad_rows, dhidden_rows in cache_blocks(hidden, scale, grad, dhidden):
            normed = hidden_rows * scale_rows
            product = grad_rows * normed
            if ctx.needs_input_grad[1]:  # beside LoRA adapters the weight is frozen
                dweight_H += product.flatten(0, -2).sum(dim=0)
            shared = (product @ wide_weight_H)[..., None] / normed.shape[-1]
            grad_normed = torch.mul(grad_rows, wide_weight_H, out=product)
            torch.mul(grad_normed.addcmul_(normed, shared, value=-1), scale_rows, out=dhidden_rows)
        return dhidden, dweight_H.to(weight_H.dtype) if ctx.needs_input_grad[1] else None, None


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Fp32 for bf16 and fp16 inputs; fp64 (tests) stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Swiglu(torch.nn.Module):
    """silu(gate) * up, of [..., 2F] with the gate's half first; stands in an MLP as its activation module."""

    def __init__(self, config: Any) -> None:  # noqa: ARG002 (Megatron Core gives it)
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        """[..., 2F] -> [..., F], same dtype."""
        activated: Tensor = _Swiglu.apply(gate_up, None)
        return activated

    def sharded_state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """Nothing to save; Megatron Core's MLP asks each of its modules."""
        return {}


class _Swiglu(torch.autograd.Function):
    """Saves its input alone. weights: of each row, [N, 1]; multiplied in the wider dtype, then rounded."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        activated = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
        _Swiglu.fill(activated, gate_up, weights)
        return activated

    @staticmethod
    def fill(activated: Tensor, gate_up: Tensor, weights: Tensor | None) -> None:
        """Write the output from what forward saved."""
        for gate, up, activated_rows in cache_blocks(*gate_up.chunk(2, dim=-1), activated):
            torch.ops.aten.silu.out(gate, out=activated_rows).mul_(up)
        if weights is not None:
            activated.mul_(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        gate_up, weights = ctx.saved_tensors
        dweights = None
        if weights is not None:
            activated = torch.empty_like(grad)
            _Swiglu.fill(activated, gate_up, None)
            dweights = (grad * activated.to(weights.dtype)).sum(dim=-1, keepdim=True)
            grad = activated.copy_(grad * weights)
        dgate_up = torch.empty_like(gate_up)
        for gate, up, grad_rows, dgate, dup in cache_blocks(*gate_up.chunk(2, dim=-1), grad, *dgate_up.chunk(2, dim=-1)):
            torch.mul(grad_rows, F.silu(gate), out=dup)
            torch.ops.aten.silu_backward.grad_input(grad_rows * up, gate, grad_input=dgate)
        return dgate_up, dweights
