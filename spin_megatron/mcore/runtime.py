"""Process groups of a rank: who it is, where it stands in the layout, and which device it computes on.

`start_runtime` reads what a launcher sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), starts
torch.distributed (gloo on CPU, NCCL on CUDA) and Megatron Core's groups. On CPU it also opens `cpu_shim.megatron_on_cpu`
until `stop_runtime`. Everything downstream takes groups, device and coordinates from the frozen `Runtime`.
"""

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from spin_megatron.mcore.cpu_shim import megatron_on_cpu
from spin_megatron.plan.shape import ParallelLayout

logger = logging.getLogger(__name__)

Group = dist.ProcessGroup
DeviceKind = Literal["cpu", "cuda"]
# launch/local.py sets it: the descriptor in rank 0 of a socket that listens already.
_MEETING_SOCKET = "SPIN_MEGATRON_MEETING_SOCKET"
# How long a collective waits for a rank that is gone. No rank works alone for as long between two.
_TIMEOUT_MINUTES = 30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Groups:
    """The process groups this rank is in. Sizes multiply: tensor x pipeline x data x context = world.

    model: tensor x pipeline, one whole copy of the model.
    megatron: Megatron Core's collection of all groups, for its own constructors.
    """

    tensor: Group
    pipeline: Group
    data: Group
    context: Group
    model: Group
    megatron: Any


@dataclass(frozen=True)
class Runtime:
    """A started rank.

    is_first_stage, is_last_stage: of the pipeline (of its last virtual stage, where stages are virtual).
    is_loss_rank: holds log-probs and losses of its data-parallel share: last stage, first tensor and context rank.
    """

    rank: int
    world_size: int
    layout: ParallelLayout
    device: torch.device
    seed: int
    groups: Groups
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    context_rank: int
    expert_rank: int
    is_first_stage: bool
    is_last_stage: bool
    opened: contextlib.ExitStack = field(repr=False, compare=False)

    @property
    def is_loss_rank(self) -> bool:
        return self.is_last_stage and self.tensor_rank == 0 and self.context_rank == 0


def start_runtime(layout: ParallelLayout, *, device: DeviceKind, seed: int) -> Runtime:
    """Start this rank's process groups.

    Args:
        layout: its world_size must be the number of ranks that were started.
        device: "cpu" or "cuda"; with "cuda" each rank takes the GPU of its LOCAL_RANK.
        seed: of Megatron Core's random number trackers; dropout is off, so no result depends on it.

    Raises:
        ValueError: the number of ranks does not fit the layout, or device is "cuda" and there is none.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if layout.world_size != world_size:
        raise ValueError(
            f"parallel.tensor={layout.tensor} x pipeline={layout.pipeline} x data={layout.data} x context={layout.context} needs "
            f"{layout.world_size} ranks, but WORLD_SIZE={world_size}; start {layout.world_size} ranks or change [parallel] in config.toml."
        )
    opened = contextlib.ExitStack()
    try:
        torch_device = _open_device(device, opened)
        _start_torch_distributed(rank, world_size, torch_device)
        opened.callback(dist.destroy_process_group)
        return _start_megatron(layout, rank, world_size, torch_device, seed, opened)
    except BaseException:
        opened.close()
        raise


def stop_runtime(runtime: Runtime) -> None:
    """Close the process groups and undo the CPU shim. The runtime must not be used after."""
    runtime.opened.close()


@contextlib.contextmanager
def running(layout: ParallelLayout, *, device: DeviceKind, seed: int) -> Iterator[Runtime]:
    """start_runtime and, in any case, stop_runtime."""
    runtime = start_runtime(layout, device=device, seed=seed)
    try:
        yield runtime
    finally:
        stop_runtime(runtime)


def default_device() -> DeviceKind:
    """"cuda" where this process sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _open_device(device: DeviceKind, opened: contextlib.ExitStack) -> torch.device:
    if device == "cpu":
        opened.enter_context(megatron_on_cpu())
        _return_freed_memory()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        cure = 'use "cpu", or a machine with a GPU and a CUDA build of torch'
        raise ValueError(f'device="cuda", but torch {torch.__version__} sees no GPU here; {cure}.')
    local_rank, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= visible:
        raise ValueError(f"LOCAL_RANK={local_rank}, but {visible} GPUs are visible on this machine; start at most {visible} ranks on it.")
    torch.cuda.set_device(local_rank)
    # The log-probabilities of the reference and of the first step must be the same bits: of Transformer Engine's kernels, and of cuBLAS',
    # which promises them where its workspace is given. torch's own is as large on Hopper.
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda", local_rank)


def _return_freed_memory() -> None:
    """Let glibc give large tensors memory of their own, which goes back to the system when they do.

    From its heap it would not serve them again (launch/allocator.py): a step of SmolLM2-135M held 7.6 GiB for 5 that were in use. Set in
    the environment, MALLOC_MMAP_THRESHOLD_ decides. Other C libraries, and tcmalloc, have no mallopt or one that ignores this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**25)


def _start_torch_distributed(rank: int, world_size: int, device: torch.device) -> None:
    """Start the default group: gloo, or NCCL with gloo beside it for CPU tensors."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(minutes=_TIMEOUT_MINUTES)
    if world_size == 1:
        # A single rank has nobody to meet: no port is opened, so many can run side by side.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(f"{name} is not set, but WORLD_SIZE={world_size}; start the ranks with spin-megatron, torchrun or srun.")
    listening = os.environ.pop(_MEETING_SOCKET, None)
    if listening is None:
        dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world_size, timeout=timeout)
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, world_size, rank == 0, timeout, master_listen_fd=int(listening) if rank == 0 else None
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _start_megatron(
    layout: ParallelLayout, rank: int, world_size: int, device: torch.device, seed: int, opened: contextlib.ExitStack
) -> Runtime:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        distributed_timeout_minutes=_TIMEOUT_MINUTES,
    )
    opened.callback(parallel_state.destroy_model_parallel)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    pipeline_rank = dist.get_rank(groups.pp)
    return Runtime(
        rank=rank,
        world_size=world_size,
        layout=layout,
        device=device,
        seed=seed,
        groups=Groups(
            tensor=groups.tp,
            pipeline=groups.pp,
            data=groups.dp,
            context=groups.cp,
            model=groups.mp,
            megatron=groups,
        ),
        tensor_rank=dist.get_rank(groups.tp),
        pipeline_rank=pipeline_rank,
        data_rank=dist.get_rank(groups.dp),
        context_rank=dist.get_rank(groups.cp),
        expert_rank=dist.get_rank(groups.ep),
        is_first_stage=pipeline_rank == 0,
        is_last_stage=pipeline_rank == layout.pipeline - 1,
        opened=opened,
    )
