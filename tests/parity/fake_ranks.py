"""Any rank of any layout in one process: on the meta device, shapes and names of a 70B model without its memory or its GPUs.

torch's fake process group answers for the other ranks; the model is built by the code that builds it in production.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from spin_megatron.mcore import runtime as runtimes
from spin_megatron.mcore.cpu_shim import megatron_on_cpu
from spin_megatron.mcore.model import SpinModel, build_model
from spin_megatron.mcore.runtime import Runtime
from spin_megatron.plan.shape import ModelShape, ParallelLayout


@contextlib.contextmanager
def fake_rank(layout: ParallelLayout, rank: int, *, device: str = "meta") -> Iterator[Runtime]:
    """This process as one rank of the layout. Collectives do nothing: what they return has the right shape and no meaning."""
    original = parallel_state.initialize_model_parallel
    with contextlib.ExitStack() as opened:
        opened.enter_context(megatron_on_cpu())
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        opened.callback(dist.destroy_process_group)
        # gloo groups beside the fake ones would look for real ranks.
        parallel_state.initialize_model_parallel = functools.partial(original, create_gloo_process_groups=False)
        opened.callback(setattr, parallel_state, "initialize_model_parallel", original)
        yield runtimes._start_megatron(layout, rank, layout.world_size, torch.device(device), 0, opened)


class WeightsOnMeta(TorchFunctionMode):
    """torch.empty, which every weight of Megatron Core starts as, makes meta tensors; tables of a few numbers stay computable."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(function, "__name__", "") == "empty":
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


@contextlib.contextmanager
def meta_model(shape: ModelShape, layout: ParallelLayout, rank: int, **options: Any) -> Iterator[tuple[list[SpinModel], Runtime]]:
    """The chunks of one rank, without storage. options: of build_model."""
    with fake_rank(layout, rank) as runtime:
        with WeightsOnMeta():
            chunks = build_model(shape, runtime, dtype=torch.bfloat16, **options)
        assert all(parameter.is_meta for chunk in chunks for parameter in chunk.parameters())
        yield chunks, runtime
