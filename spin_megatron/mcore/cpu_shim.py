"""The one place where Megatron Core is made to run on CPU: a context manager that restores all it changed.

Megatron Core (0.16.1 and 0.19.2) computes correctly on CPU with gloo; what stops it are literal `device="cuda"` arguments
and calls into `torch.cuda` that initialise a driver. Each `Patch` names the functions that need it, and
tests/parity/test_cpu_shim.py fails when one is no longer needed. Nothing stays patched when the context, or the import below, is over.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version
from torch.utils._device import _device_constructors

_MISSING = object()


@dataclass(frozen=True)
class Replacement:
    """owner.attribute is `value` while the context is open."""

    owner: Any
    attribute: str
    value: Any


@dataclass(frozen=True)
class Patch:
    """One reason Megatron Core fails on CPU.

    needed_by: the Megatron Core functions that fail without it.
    replacements: makes the replacements when the context opens (they wrap what is there at that time).
    """

    name: str
    needed_by: str
    replacements: Callable[[], list[Replacement]]


def import_without_compilers() -> None:
    """Import Megatron Core without torch's compiler and Triton, which take 140 MB and a second of each rank and are of use on CUDA only.

    Its `jit_fuser` is torch.compile, which imports the compiler to decorate the first function; Triton it imports to see that it is there.
    """

    def leave(function: Any = None, **_options: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    put_back = _set(Replacement(torch, "compile", leave))
    try:
        with without_triton():
            # Of the modules that are used here, those that know torch.compile or Triton.
            importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    finally:
        put_back()


@contextlib.contextmanager
def without_triton() -> Iterator[None]:
    """Let imports find no Triton while the context is open, where there is no GPU and Megatron Core (before 0.19) can do without.

    torch remembers what it found: a process that imported torch._dynamo in here compiles nothing for Triton.
    """
    needs_it = Version(importlib.metadata.version("megatron-core")) >= Version("0.19.dev0")
    if needs_it or torch.cuda.is_available() or "triton" in sys.modules:
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment] # which makes `import triton` raise ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules["triton"]


@contextlib.contextmanager
def megatron_on_cpu(patches: Sequence[Patch] | None = None) -> Iterator[None]:
    """Let Megatron Core run on CPU tensors while the context is open; on exit every attribute is what it was.

    Args:
        patches: all of PATCHES unless a test leaves one out.
    """
    with contextlib.ExitStack() as changed:
        for patch in PATCHES if patches is None else patches:
            for replacement in patch.replacements():
                changed.callback(_set(replacement))
        yield


def _set(replacement: Replacement) -> Callable[[], None]:
    """Set the attribute; return what puts the old one back (or removes it where it was inherited)."""
    owner, attribute = replacement.owner, replacement.attribute
    previous = vars(owner).get(attribute, _MISSING)
    setattr(owner, attribute, replacement.value)
    if previous is _MISSING:
        return functools.partial(delattr, owner, attribute)
    return functools.partial(setattr, owner, attribute, previous)


def _is_cuda(device: object) -> bool:
    return device is not None and str(device).startswith("cuda")


def _factory_on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The tensor factory, with device="cuda" read as "cpu"."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return on_cpu


def _cuda_device_arguments() -> list[Replacement]:
    # torch.device("meta") as a context knows the factories by identity, from a set it makes once: it must not be of ours, or models
    # that transformers builds on the meta device keep uninitialised buffers, even after this context is closed.
    _device_constructors()
    return [Replacement(torch, name, _factory_on_cpu(getattr(torch, name))) for name in ("tensor", "zeros", "empty", "empty_like")]


def _current_device() -> list[Replacement]:
    return [Replacement(torch.cuda, "current_device", lambda: torch.device("cpu"))]


def _tensor_cuda() -> list[Replacement]:
    def stay(tensor: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return tensor

    return [Replacement(torch.Tensor, "cuda", stay)]


def _tensor_type() -> list[Replacement]:
    original = torch.Tensor.type

    def type_as_on_cuda(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(tensor, dtype, *args, **kwargs)
        return original(tensor).replace("torch.", "torch.cuda.", 1)

    return [Replacement(torch.Tensor, "type", type_as_on_cuda)]


def _synchronize() -> list[Replacement]:
    def return_at_once(*_args: Any) -> None:
        """The CPU has run what was asked of it when the call returns."""

    return [Replacement(torch.cuda, "synchronize", return_at_once)]


class _InertEvent:
    """An event that is always past: work on the CPU is done when its call returns."""

    def record(self, *_args: Any) -> None: ...

    def wait(self, *_args: Any) -> None: ...

    def synchronize(self) -> None: ...


class _InertStream:
    """A stream without queue: everything on it is finished."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, *_args: Any) -> None: ...

    def wait_event(self, *_args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_args: Any) -> _InertEvent:
        return _InertEvent()


def _streams() -> list[Replacement]:
    the_stream = _InertStream()
    return [
        Replacement(torch.cuda, "Stream", _InertStream),
        Replacement(torch.cuda, "Event", _InertEvent),
        Replacement(torch.cuda, "current_stream", lambda *_args: the_stream),
        Replacement(torch.cuda, "default_stream", lambda *_args: the_stream),
        Replacement(torch.cuda, "stream", lambda *_args: contextlib.nullcontext()),
    ]


def _random_state() -> list[Replacement]:
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    return [
        Replacement(torch.cuda, "get_rng_state", get_state),
        Replacement(torch.cuda.random, "get_rng_state", get_state),
        Replacement(torch.cuda, "manual_seed", torch.manual_seed),
        # Without a driver it queues the change for a later initialisation of CUDA, which never comes.
        Replacement(megatron_random, "_set_cuda_rng_state", set_state),
    ]


def _expert_router() -> list[Replacement]:
    from megatron.core.transformer.moe import moe_utils

    # 0.16.1 reads a name that only Transformer Engine's import defines; None is what that module means by "not there".
    return [] if getattr(moe_utils, "te_general_gemm", _MISSING) is None else [Replacement(moe_utils, "te_general_gemm", None)]


def _fused_kernels() -> list[Replacement]:
    if all(importlib.util.find_spec(package) is None for package in ("transformer_engine", "apex")):
        return []
    from megatron.core import optimizer as factory
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    plain = [
        Replacement(module, name, value)
        for module in (clip_grads, optimizer)
        for name, value in (
            ("multi_tensor_applier", utils.local_multi_tensor_applier),
            ("multi_tensor_scale_impl", utils.local_multi_tensor_scale),
        )
    ]
    return [
        *plain,
        Replacement(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm),
        Replacement(clip_grads, "multi_tensor_scale_tensor_impl", None),
        Replacement(factory, "USING_PYTORCH_OPTIMIZER", True),
    ]


def _weight_gradient_kernel() -> list[Replacement]:
    from megatron.core.tensor_parallel import layers

    def add_weight_gradient(input_TI: torch.Tensor, grad_TO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
        if input_TI.dtype == main_grad_OI.dtype:
            main_grad_OI.addmm_(grad_TO.t(), input_TI)
        else:  # bf16 weights, whose product has no fp32 result on a CPU
            main_grad_OI.add_(grad_TO.t() @ input_TI)

    kernels = types.SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
    return [Replacement(layers, "fused_weight_gradient_mlp_cuda", kernels)]


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="device arguments",
        needed_by="pipeline_parallel.schedules.forward_backward_* (token counter), optimizer.clip_grads.get_grad_norm_fp32",
        replacements=_cuda_device_arguments,
    ),
    Patch(
        name="current device",
        needed_by="distributed.param_and_grad_buffer, tensor_parallel.mappings, pipeline_parallel.p2p_communication",
        replacements=_current_device,
    ),
    Patch(
        name="Tensor.cuda",
        needed_by="LanguageModule.setup_embeddings_and_output_layer (tied embeddings, pipeline > 1)",
        replacements=_tensor_cuda,
    ),
    Patch(
        name="Tensor.type",
        needed_by="optimizer.Float16OptimizerWithFloat16Params, DistributedOptimizer, clip_grads (they compare with a name)",
        replacements=_tensor_type,
    ),
    Patch(
        name="synchronize",
        needed_by="pipeline_parallel.p2p_communication.P2PCommunicator, dist_checkpointing (writers)",
        replacements=_synchronize,
    ),
    Patch(
        name="streams",
        needed_by="moe.token_dispatcher.MoEAlltoAllTokenDispatcher; from 0.19 distributed.param_and_grad_buffer too",
        replacements=_streams,
    ),
    Patch(
        name="random state",
        needed_by="tensor_parallel.random: model_parallel_cuda_manual_seed, CudaRNGStatesTracker, CheckpointFunction",
        replacements=_random_state,
    ),
    Patch(
        name="expert router",
        needed_by="moe.moe_utils.RouterGatingLinearFunction: of 0.16 without Transformer Engine, of any release with it",
        replacements=_expert_router,
    ),
    Patch(
        name="weight gradient kernel",
        needed_by="tensor_parallel.layers.LinearWithGradAccumulationAndAsyncCommunication (told by mcore.fused to add to main_grad)",
        replacements=_weight_gradient_kernel,
    ),
    Patch(
        name="fused kernels",
        needed_by="optimizer.clip_grads, optimizer.optimizer and the optimizer factory, where Transformer Engine or apex is installed",
        replacements=_fused_kernels,
    ),
)
