"""The parts of a transformer layer that are ours, and the layer spec they go into.

Megatron Core's local spec (no Transformer Engine) has two faults here: its norm refuses sequence parallelism, and its norm and
gated activation keep every intermediate for the backward. `RmsNorm` and `Swiglu` keep their input and nothing of its size
besides: for SmolLM2-135M and 1024 tokens that is 497 MiB of activations less, in no more time.

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
from spin_megatron.mcore.varlen import PlanCache

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


def layer_submodules(kind: SpecKind, *, num_experts: int | None, qk_norm: bool, attention: Backend) -> tuple[Any, type]:
    """Megatron Core's spec of one decoder layer with our attention in it, and the class of the final norm.

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
        if num_experts is None:
            _submodules(spec.submodules.mlp).activation_func = Swiglu
        else:
            # Saved as if it were fused into linear_fc1, which of an expert layer not even Transformer Engine's spec does: under its own
            # name a checkpoint of one spec loads into the other.
            del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    # One plan cache for all layers: they see the same pack.
    core_attention = functools.partial(BranchAttention, backend=attention, plans=PlanCache(), shares=PlanCache(make=plan_context))
    spec.submodules.self_attention.submodules.core_attention = core_attention
    return spec, norm


def _submodules(spec: Any) -> Any:
    """The submodules a spec holds: a ModuleSpec up to 0.16, a functools.partial from 0.19 on."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


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
        wide = _at_least_float32(hidden)
        scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight_H, scale)
        return weight_H * (wide * scale).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        hidden, weight_H, scale = ctx.saved_tensors
        normed = _at_least_float32(hidden) * scale
        wide_grad = _at_least_float32(grad)
        dweight_H = None  # beside LoRA adapters the weight is frozen
        if ctx.needs_input_grad[1]:
            dweight_H = (wide_grad * normed).flatten(0, -2).sum(dim=0).to(weight_H.dtype)
        grad_normed = wide_grad * weight_H.to(normed.dtype)
        shared = (grad_normed * normed).mean(dim=-1, keepdim=True)
        dhidden = torch.addcmul(grad_normed, normed, shared, value=-1).mul_(scale)
        return dhidden.to(hidden.dtype), dweight_H, None


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Fp32 for bf16 and fp16 inputs; fp64 (tests) stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Swiglu(torch.nn.Module):
    """silu(gate) * up, of [..., 2F] with the gate's half first; stands in an MLP as its activation module."""

    def __init__(self, config: Any) -> None:  # noqa: ARG002 (Megatron Core gives it)
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        """[..., 2F] -> [..., F], same dtype."""
        activated: Tensor = _Swiglu.apply(gate_up)
        return activated

    def sharded_state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """Nothing to save; Megatron Core's MLP asks each of its modules."""
        return {}


class _Swiglu(torch.autograd.Function):
    """Saves its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=dgate)
        return dgate_up
