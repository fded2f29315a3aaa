"""The optimizer in the host's memory: Megatron Core's HybridDeviceOptimizer (0.16 and 0.19) under both update rules.

fp32 main weights and the rule's state of a share of the parameters lie in host memory and are updated there by torch's optimizer; a
step copies their gradients down, and the new weights up, in streams of their own. The rest is updated on the GPU. Megatron Core reaches
it through the path of its precision-aware optimizer: the distributed optimizer then leaves the main weights to it, and gradients stand
in `decoupled_grad`. It tells what can be offloaded by `is_cuda`; on a CPU there is nothing to offload.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import nn


def ask_for_offload(settings: OptimizerConfig) -> None:
    """Let Megatron Core's factory make a HybridDeviceOptimizer.

    It makes it over whole parameters first and over this rank's shards then. All of it goes to the host at first, or main weights that
    are not sharded yet would take 4 bytes a parameter of the GPU; `over_shards` takes the share that was asked for.
    """
    # Not when the settings are made: 0.16 would then compare the version of a Transformer Engine that need not be there.
    settings.optimizer_cpu_offload, settings.optimizer_offload_fraction = True, 1.0
    settings.use_precision_aware_optimizer = settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    settings.overlap_cpu_optimizer_d2h_h2d = True


def over_shards(made: HybridDeviceOptimizer, fraction: float, rmsprop: Mapping[str, Any] | None) -> HybridDeviceOptimizer:
    """The factory's optimizer with the share that is to be offloaded and, given RMSprop's settings, with torch's RMSprop in it."""
    settings: dict[str, Any] = {**made.defaults}
    if rmsprop is not None:
        kept = {
            name: settings[name] for name in ("param_update_in_fp32", "pin_cpu_grads", "pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d")
        }
        settings = {**kept, **rmsprop, "cpu_optimizer_cls": torch.optim.RMSprop, "gpu_optimizer_cls": torch.optim.RMSprop}
    settings["offload_fraction"] = fraction
    # What the first one wrote into its groups would win over these settings.
    groups = [{name: value for name, value in group.items() if name not in made.defaults} for group in made.param_groups]
    return HybridDeviceOptimizer(groups, **settings)


def inner_optimizers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers whose step changes main weights."""
    if isinstance(optimizer, HybridDeviceOptimizer):
        inner: list[torch.optim.Optimizer] = optimizer.sub_optimizers
        return inner
    return [optimizer]


def holders(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, tuple[torch.Tensor, torch.optim.Optimizer]]:
    """Each parameter of the optimizer's groups -> (its main weight, the optimizer whose `state` belongs to that)."""
    of_main = {main: inner for inner in inner_optimizers(optimizer) for group in inner.param_groups for main in group["params"]}
    if not isinstance(optimizer, HybridDeviceOptimizer):
        return {main: (main, inner) for main, inner in of_main.items()}
    mains: dict[torch.Tensor, torch.Tensor] = optimizer.param_to_inner_param
    return {parameter: (main, of_main[main]) for parameter, main in mains.items()}


def require_gpu(chunk: nn.Module, fraction: float) -> None:
    """Refuse to offload from where nothing can be offloaded.

    Raises:
        ValueError: the weights are on a CPU.
    """
    if fraction and not next(chunk.parameters()).is_cuda:
        raise ValueError(f"optimizer.offload_fraction={fraction:g}: on a CPU the optimizer is in the host's memory as it is; use 0.")
