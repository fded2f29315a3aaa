"""Fused kernels of the backward and of the update: Transformer Engine's where its layers are, NVIDIA apex's where they are the only ones.

Weight gradients: a linear layer's backward can add its product to the fp32 gradient buffer in the matrix product itself. Transformer
Engine's layers do so with their own kernels when told to; Megatron Core's need apex's extension, and refuse to be built without it once
`gradient_accumulation_fusion` is set, the head included. So that setting stays off with Transformer Engine's layers and on a CPU (where
mcore.cpu_shim puts torch's product in the extension's place), and they are told one by one. The head and the embedding of this project
never run Megatron Core's product.

AdamW: Megatron Core takes Transformer Engine's, else apex's, else torch's. RMSProp is torch's in any case.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch

from spin_megatron.mcore.layers import LayerSpec

Maker = Literal["transformer_engine", "apex", "torch"]


@dataclass(frozen=True)
class Kernels:
    """Whose kernels run, and why."""

    maker: Maker
    reason: str


def choose_weight_gradients(spec: LayerSpec, device: torch.device) -> Kernels:
    """How the linear layers' weight gradients reach their fp32 buffer."""
    if device.type != "cuda":
        return Kernels("torch", f"fused kernels compute on CUDA only, and this is {device.type}: torch's product adds to the fp32 buffer")
    if spec.kind == "transformer_engine":
        return Kernels("transformer_engine", "products of Transformer Engine's layers add to the fp32 buffer")
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return Kernels("apex", "the layers are Megatron Core's own, and NVIDIA apex's fused_weight_gradient_mlp_cuda is installed")
    return Kernels("torch", "neither Transformer Engine nor NVIDIA apex's fused_weight_gradient_mlp_cuda is installed")


def add_to_main_gradients(chunk: torch.nn.Module) -> None:
    """Let Transformer Engine's layers, and any on a CPU, add weight gradients to `main_grad`; call it once the buffers are there."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
        elif isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.weight is not None and not module.weight.is_cuda:
            module.gradient_accumulation_fusion = True


def update_kernels(optimizer: Any) -> Kernels:
    """Whose kernels a torch.optim.Optimizer's step runs, by where its class is from."""
    kind = type(optimizer)
    package = kind.__module__.partition(".")[0]
    if package == "transformer_engine":
        return Kernels("transformer_engine", f"{kind.__name__} over all parameters at once")
    if package == "apex":
        return Kernels("apex", f"{kind.__name__} over all parameters at once; Transformer Engine is not installed")
    return Kernels("torch", f"torch's {kind.__name__}")
