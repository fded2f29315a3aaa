"""Run packs through the pipeline with Megatron Core's schedules: the forward step all passes share, and forward-only scoring.

Every rank of a model copy walks through the same list of packs; data-parallel copies walk through different lists of the same
length. What a pass yields is on the pipeline's last stage (equal on all tensor ranks); `gather_over_data` brings it to rank 0.

Shapes: T tokens of a pack (the same in all packs of a run), R rows of one pack.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from spin_megatron.data.batches import PackBatch, make_batch
from spin_megatron.mcore.runtime import Runtime
from spin_megatron.run.telemetry import Advance

# What a pass does with one pack's log-probs on the last stage: (batch, logp_R) -> what the schedule collects or differentiates.
Finish = Callable[..., Any]
ForwardStep = Callable[[Iterator[PackBatch], torch.nn.Module], tuple[Tensor, Callable[..., Any]]]


def forward_step(finish: Finish, *, on_pack: Callable[[], None] | None = None) -> ForwardStep:
    """The forward step of Megatron Core's schedules for packs.

    Args:
        finish: called as finish(batch, logp_R) on the last stage; with forward-only passes that collect data Megatron Core
            adds non_loss_data=True. For training it returns (loss, numbers to collect); the schedule divides the loss in place.
        on_pack: called after each pack that this rank computed.
    """

    def step(batches: Iterator[PackBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        output = model(batch.tokens_T[None], batch.positions_T[None], batch.branches_B4, batch.rows_R, batch.targets_R)
        if on_pack is not None:
            on_pack()
        return output, functools.partial(finish, batch)

    return step


def run_schedule(
    step: ForwardStep, chunks: Sequence[torch.nn.Module], batches: Sequence[PackBatch], runtime: Runtime, *, forward_only: bool
) -> list[Any]:
    """Run one forward(-backward) pass over the packs; what `finish` collected, by pack, on the last stage, else [].

    With virtual pipeline stages the number of packs must be a multiple of parallel.pipeline (see `fill_schedule`).

    Raises:
        ValueError: sequence or context parallelism does not divide the packs.
    """
    layout, pack_tokens = runtime.layout, batches[0].tokens_T.shape[0]
    unit = layout.check_pack(pack_tokens)
    if runtime.device.type == "cpu" and layout.pipeline == layout.expert == 1:
        # Pipeline stages and experts' ranks exchange packs of one length, and a GPU's allocator and kernels want one. A CPU gains.
        batches = [batch.without_padding(unit) for batch in batches]
    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[on_device(batches, runtime.device) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=pack_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return collected


def fill_schedule(batches: Sequence[PackBatch], runtime: Runtime) -> list[PackBatch]:
    """The packs, and after them as many empty ones as the interleaved schedule needs: a multiple of the pipeline's stages."""
    multiple = runtime.layout.pipeline if runtime.layout.virtual_pipeline > 1 else 1
    missing = -len(batches) % multiple
    return [*batches, *(empty_batch(batches[0].tokens_T.shape[0]) for _ in range(missing))]


def empty_batch(pack_tokens: int) -> PackBatch:
    """A pack of padding: no rows, loss and gradient 0."""
    return make_batch([], pack_tokens=pack_tokens, pad_id=0, share_prompt=True)


def on_device(batches: Iterable[PackBatch], device: torch.device) -> Iterator[PackBatch]:
    """The packs on the device, each copied (from page-locked memory) while the one before it computes."""
    if device.type == "cpu":
        yield from batches
        return
    ahead: PackBatch | None = None
    for batch in batches:
        coming = batch.to(device)
        if ahead is not None:
            yield ahead
        ahead = coming
    if ahead is not None:
        yield ahead


def score_packs(
    chunks: Sequence[torch.nn.Module], batches: Sequence[PackBatch], runtime: Runtime, *, advance: Advance | None = None
) -> list[Tensor]:
    """Log-probabilities of every pack's targets without gradients.

    Args:
        batches: this data-parallel rank's packs, all of one length; other data-parallel ranks may have other numbers of packs.
        advance: called once a pack on each rank (a progress bar on the first).

    Returns:
        On the last pipeline stage one fp32 logp_R a pack, on the device; on other stages [].
    """
    if not batches:
        return []

    def keep(_batch: PackBatch, logp_R: Tensor, **_non_loss_data: bool) -> Tensor:
        return logp_R.detach()

    filled = fill_schedule(batches, runtime)
    # A virtual stage is one of several visits of the same pack.
    remaining = iter(range(len(batches) * len(chunks)))

    def count() -> None:
        visit = next(remaining, None)
        if advance is not None and visit is not None and visit % len(chunks) == 0:
            advance(1)

    with torch.no_grad(), evaluation_mode(chunks):
        collected = run_schedule(forward_step(keep, on_pack=count), chunks, filled, runtime, forward_only=True)
    return collected[: len(batches)]


@contextlib.contextmanager
def evaluation_mode(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Switch off what only training needs (activation recompute) and switch it on again."""
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, was_training, strict=True):
            chunk.train(mode)


def gather_over_data(value: Any, runtime: Runtime) -> list[Any] | None:
    """What each data-parallel copy's loss rank holds, by data rank, on rank 0; None on other ranks.

    Args:
        value: picklable, on the CPU; only that of loss ranks is used. One collective over all ranks.
    """
    mine = (runtime.data_rank, value) if runtime.is_loss_rank else None
    gathered: list[Any] | None = [None] * runtime.world_size if runtime.rank == 0 else None
    dist.gather_object(mine, gathered, dst=0)
    if gathered is None:
        return None
    return [value for _, value in sorted((item for item in gathered if item is not None), key=lambda item: item[0])]
