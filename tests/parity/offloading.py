"""A GPU and a host on one CPU, as far as Megatron Core's HybridDeviceOptimizer tells them apart.

It asks a parameter `is_cuda`, copies what it offloads by `cpu().pin_memory()`, and keeps pinned gradients. While its methods do so here,
`cpu()` gives a HostTensor, which every copy made of it stays, and all other tensors say that they are on a GPU. All of its code, and the
optimizers', runs as it is.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


class HostTensor(torch.Tensor):
    """A tensor in the host's memory."""


def _pretending(method: Callable[..., Any], **of_tensor: Any) -> Callable[..., Any]:
    """The method, with tensors that answer as given while it runs."""
    empty = torch.empty

    def not_pinned(*args: Any, pin_memory: bool, **kwargs: Any) -> torch.Tensor:
        del pin_memory
        return empty(*args, **kwargs)

    @functools.wraps(method)
    def pretending(*args: Any) -> Any:
        with ExitStack() as stack:
            for name, value in of_tensor.items():
                stack.enter_context(mock.patch.object(torch.Tensor, name, value))
            stack.enter_context(mock.patch.object(torch, "empty", not_pinned))
            return method(*args)

    return pretending


@contextmanager
def a_gpu_and_a_host() -> Iterator[None]:
    """Let optimizers that are built meanwhile offload, and make their steps."""
    host = {
        "is_cuda": property(lambda tensor: not isinstance(tensor, HostTensor)),
        "cpu": lambda tensor: tensor.as_subclass(HostTensor),
        "pin_memory": lambda tensor: tensor,
    }
    split, copy = HybridDeviceOptimizer._get_sub_optimizer_param_groups, HybridDeviceOptimizer._set_sub_optimizer_grads
    with (
        mock.patch.object(HybridDeviceOptimizer, split.__name__, _pretending(split, **host)),
        mock.patch.object(HybridDeviceOptimizer, copy.__name__, _pretending(copy)),
        mock.patch("spin_megatron.mcore.optimizer.require_gpu"),
    ):
        yield
