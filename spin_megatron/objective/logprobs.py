"""Log-probabilities of target tokens straight from hidden states, vocab-parallel, without ever holding [rows, vocab] logits.

    logp_r = z_r[target_r] - log sum_v exp(z_r[v]),      z_r = hidden_r . weight^T / temperature

Forward walks over tiles of (vocab chunk x row block) with an online log-sum-exp, which leaves three numbers a row and tensor-parallel
rank: running maximum, sum of exponentials, target logit. One all-gather brings the ranks' [R, 3] together and every rank merges them in
rank order, so that all ranks hold the same bits. Backward recomputes each tile's logits, turns them into softmax probabilities and
multiplies by an arbitrary gradient per row. Recomputing costs a fourth product on top of three; a few tiles, as many as fit in
`kept_bytes`, are kept from forward instead, which buys back its share of that product (and all of it where all tiles fit).

Why not Megatron Core's cross-entropy: it needs the [rows, vocab/TP] logits and its fused form rounds gradients to bf16. Logits are
fp32 here whatever the model's dtype: bf16 logits would cost 0.2 nat on a 300-token response.

Shapes: R rows (tokens with a target), H hidden, V local vocabulary columns (padded vocab / TP), Q sequences.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from spin_megatron.objective.cache_blocks import cache_blocks

IGNORED = -1  # target of a row that has none: value and gradient are exactly 0
ROW_BLOCK = 1024
VOCAB_CHUNK = 4096
KEPT_BYTES = 128 * 2**20

# fp32 logits [B, C] kept from forward, by the tile's first row and first local column.
KeptTiles = dict[tuple[int, int], Tensor]


@dataclass(frozen=True)
class HeadSpec:
    """What the head's two passes share. num_columns: local columns inside the true vocabulary, the padded tail is behind them."""

    group: dist.ProcessGroup | None
    vocab_start: int
    num_columns: int
    temperature: float
    vocab_chunk: int
    row_block: int
    kept_bytes: int
    reduce_hidden_grad: bool

    @property
    def group_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)


class HeadKernels(NamedTuple):
    """The two device-dependent halves of the head; `local_statistics` and `head_gradients` below state their contract."""

    local_statistics: Callable[[Tensor, Tensor, Tensor, HeadSpec], tuple[Tensor, KeptTiles]]
    head_gradients: Callable[[Tensor, Tensor, "RowData", KeptTiles, "WeightGradient | None", HeadSpec], Tensor]


@dataclass(frozen=True)
class RowData:
    """What backward knows of each row [R]: its target, log-sum-exp over the whole vocabulary, and d loss / d logp / temperature."""

    target: Tensor
    lse: Tensor
    coefficient: Tensor

    def at(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The three of some rows."""
        return self.target[rows], self.lse[rows], self.coefficient[rows]


def vocab_parallel_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,  # local: V/TP
    targets_R: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    temperature: float = 1.0,
    vocab_chunk: int = VOCAB_CHUNK,
    row_block: int = ROW_BLOCK,
    kept_bytes: int = KEPT_BYTES,
    reduce_hidden_grad: bool = True,
) -> Tensor:
    """Log-probability of each row's target, fp32 [R] in nats (fp64 for fp64 inputs), identical bits on all ranks of `group`.

    hidden_RH: replicated over the group. weight_VH: rows vocab_start .. vocab_start+V of the padded vocabulary; those from
    `vocab_size` on are excluded. targets_R: int64 token ids, the same on all ranks; IGNORED (-1) gives value 0 and gradient 0.
    group: tensor-parallel process group, None for a single process.

    Gradient: any gradient per row. dWeight is added to the fp32 `weight.main_grad` where Megatron's DDP made one (then a dummy is
    returned and `grad_added_to_main_grad` set, as Megatron Core's own linear layers do), else returned in the weight's dtype.
    dHidden is summed over the group, or left as this rank's part with reduce_hidden_grad=False, for a caller whose
    sequence-parallel gather reduce-scatters it.
    Collectives: one all-gather of [R, 3] forward; one all-reduce of [R, H] backward. R = 0 does them too.
    Extra memory: one tile of row_block x vocab_chunk numbers, and kept_bytes between forward and backward; under no_grad nothing is
    kept. Keeping changes no bit of the result; the tiling does (another product, another rounding), so it must not change in a run.
    Raises ValueError for targets outside the vocabulary (checked on CPU only: on an accelerator that would stop the stream).
    """
    assert hidden_RH.shape == (targets_R.shape[0], weight_VH.shape[1]), (hidden_RH.shape, weight_VH.shape, targets_R.shape)
    assert targets_R.dtype == torch.int64, targets_R.dtype
    assert min(vocab_chunk, row_block, temperature) > 0, (vocab_chunk, row_block, temperature)
    if targets_R.device.type == "cpu" and targets_R.numel():
        low, high = int(targets_R.min()), int(targets_R.max())
        if low < IGNORED or high >= vocab_size:
            raise ValueError(
                f"Target token ids run from {low} to {high}, the vocabulary from 0 to {vocab_size - 1} ({IGNORED} marks a row "
                "without target); the pairs were made with another tokenizer than the model's: prepare the data again."
            )
    spec = HeadSpec(
        group=group,
        vocab_start=vocab_start,
        num_columns=max(0, min(weight_VH.shape[0], vocab_size - vocab_start)),
        temperature=temperature,
        vocab_chunk=vocab_chunk,
        row_block=row_block,
        kept_bytes=kept_bytes if torch.is_grad_enabled() else 0,
        reduce_hidden_grad=reduce_hidden_grad,
    )
    logp_R: Tensor = _VocabParallelLogprobs.apply(hidden_RH, weight_VH, targets_R, spec)  # type: ignore[no-untyped-call]
    return logp_R


def sequence_sums(logp_R: Tensor, lengths_Q: Tensor) -> Tensor:
    """Sum of each sequence's rows: [Q] in the dtype of logp_R. Rows are contiguous per sequence, lengths_Q add up to R.

    Summed in fp64 and rounded once, so a long response loses nothing; fixed order, no atomics. A length of 0 gives 0.
    """
    if lengths_Q.device.type == "cpu":
        assert int(lengths_Q.sum()) == logp_R.shape[0], (int(lengths_Q.sum()), logp_R.shape)
    lengths_Q = lengths_Q.to(logp_R.device, non_blocking=True)
    # unsafe=True skips a check of the lengths that would synchronise an accelerator with the host; it was made above.
    sums_Q = torch.segment_reduce(logp_R.double(), "sum", lengths=lengths_Q, axis=0, unsafe=True, initial=0.0)
    return sums_Q.to(logp_R.dtype)


class _VocabParallelLogprobs(torch.autograd.Function):
    """Saves inputs (which live anyway) and lse_R, and holds the kept tiles; under no_grad the context is dropped at once."""

    @staticmethod
    def forward(ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, spec: HeadSpec) -> Tensor:
        statistics_R3, kept = _kernels(hidden_RH.device).local_statistics(hidden_RH, weight_VH, targets_R, spec)
        logp_R, lse_R = merge_statistics(gather_statistics(statistics_R3, spec))
        ctx.save_for_backward(hidden_RH, weight_VH, targets_R, lse_R)
        ctx.kept, ctx.spec = kept, spec
        return torch.where(targets_R == IGNORED, torch.zeros_like(logp_R), logp_R)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_RH, weight_VH, targets_R, lse_R = ctx.saved_tensors
        spec: HeadSpec = ctx.spec
        # Errors overwrite the kept logits: a second backward makes them again, bit by bit.
        kept, ctx.kept = ctx.kept, KeptTiles()
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # where, not a product: an ignored row's upstream gradient may be NaN and must still end as 0.
        coefficient_R = torch.where(targets_R == IGNORED, 0.0, gradients[0]) / spec.temperature
        row_data = RowData(targets_R, lse_R, coefficient_R)
        sink = WeightGradient.of(weight_VH, spec.num_columns) if needs_weight else None
        hidden_grad_RH = _kernels(hidden_RH.device).head_gradients(hidden_RH, weight_VH, row_data, kept, sink, spec)
        if needs_hidden and spec.reduce_hidden_grad and spec.group_size > 1:
            dist.all_reduce(hidden_grad_RH, group=spec.group)
        return hidden_grad_RH if needs_hidden else None, sink.returned() if sink else None, None, None


def gather_statistics(statistics_R3: Tensor, spec: HeadSpec) -> Tensor:
    """All ranks' row statistics [TP, R, 3]: the forward's one collective."""
    if spec.group_size == 1:
        return statistics_R3[None]
    gathered_KR3 = statistics_R3.new_empty((spec.group_size, *statistics_R3.shape))
    dist.all_gather_into_tensor(gathered_KR3.view(-1, 3), statistics_R3, group=spec.group)
    return gathered_KR3


def merge_statistics(statistics_KR3: Tensor) -> tuple[Tensor, Tensor]:
    """(logp_R, lse_R) from the K ranks' (maximum, sum of exponentials, target logit), added in rank order on every rank alike.

    A rank with no true column brings (-inf, 0, 0); only the target's owner brings a target logit other than 0.
    """
    maximum_KR, sum_KR, target_KR = statistics_KR3.unbind(-1)
    maximum_R = maximum_KR.amax(dim=0)
    sum_R, target_R = torch.zeros_like(maximum_R), torch.zeros_like(maximum_R)
    for rank in range(statistics_KR3.shape[0]):
        sum_R += sum_KR[rank] * torch.exp(maximum_KR[rank] - maximum_R)
        target_R += target_KR[rank]
    log_sum_R = sum_R.log()
    # (target - maximum) first: near-certain tokens keep their small log-prob although the logits are large.
    return (target_R - maximum_R) - log_sum_R, maximum_R + log_sum_R


def local_statistics(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, spec: HeadSpec) -> tuple[Tensor, KeptTiles]:
    """This rank's (maximum, sum of exponentials, target logit) per row over its true columns: [R, 3] fp32. Torch operators only."""
    dtype, num_rows = compute_dtype(hidden_RH), hidden_RH.shape[0]
    maximum_R = torch.full((num_rows,), -torch.inf, dtype=dtype, device=hidden_RH.device)
    sum_R, target_R = torch.zeros_like(maximum_R), torch.zeros_like(maximum_R)
    tile, kept = SharedTile(hidden_RH, spec), KeptTiles()
    for columns in slices(spec.num_columns, spec.vocab_chunk):
        weight_CH = weight_VH[columns].to(dtype)
        for rows in slices(num_rows, spec.row_block):
            logits_BC = _tile_logits(hidden_RH[rows], weight_CH, spec.temperature, place_tile(tile, rows, columns, kept))
            index_B, is_here_B = _target_columns(targets_R[rows], columns, spec.vocab_start)
            target_R[rows] += torch.where(is_here_B, logits_BC.gather(1, index_B[:, None])[:, 0], 0.0)
            for logits, maximum, exponentials in cache_blocks(logits_BC, maximum_R[rows], sum_R[rows]):
                new_maximum = torch.maximum(maximum, logits.amax(dim=1))
                exponentials.mul_(torch.exp(maximum - new_maximum)).add_((logits - new_maximum[:, None]).exp_().sum(dim=1))
                maximum.copy_(new_maximum)
    return torch.stack((maximum_R, sum_R, target_R), dim=1), kept


def head_gradients(
    hidden_RH: Tensor, weight_VH: Tensor, row_data: RowData, kept: KeptTiles, sink: "WeightGradient | None", spec: HeadSpec
) -> Tensor:
    """This rank's part of dHidden [R, H] in hidden's dtype; dWeight goes into `sink` chunk by chunk. Torch operators only.

    With e = onehot(target) - softmax: dHidden_r = c_r * e_r . W and dW = e^T . (c * hidden). The coefficient c is applied to
    [R, H] tensors on either side, which saves a pass over every [rows, chunk] tile.
    """
    dtype = compute_dtype(hidden_RH)
    hidden_grad_RH = torch.zeros(hidden_RH.shape, dtype=dtype, device=hidden_RH.device)
    tile = SharedTile(hidden_RH, spec)
    for columns in slices(spec.num_columns, spec.vocab_chunk):
        weight_CH = weight_VH[columns].to(dtype)
        weight_grad_CH = sink.open(columns) if sink else None
        for rows in slices(hidden_RH.shape[0], spec.row_block):
            targets_B, lse_B, coefficient_B = row_data.at(rows)
            error_BC = kept.pop((rows.start, columns.start), None)
            if error_BC is None:
                error_BC = _tile_logits(hidden_RH[rows], weight_CH, spec.temperature, tile.at(rows, columns))
            for logits, lse in cache_blocks(error_BC, lse_B):
                logits.sub_(lse[:, None]).exp_()  # softmax
            index_B, is_here_B = _target_columns(targets_B, columns, spec.vocab_start)
            error_BC.scatter_add_(1, index_B[:, None], -is_here_B[:, None].to(dtype))  # softmax - onehot
            hidden_grad_RH[rows].addmm_(error_BC, weight_CH)
            if weight_grad_CH is not None:
                weight_grad_CH.addmm_(error_BC.t(), hidden_RH[rows] * -coefficient_B[:, None])
        if sink and weight_grad_CH is not None:
            sink.close(columns, weight_grad_CH)
    return hidden_grad_RH.mul_(-row_data.coefficient[:, None]).to(hidden_RH.dtype)


@dataclass(frozen=True)
class WeightGradient:
    """Where dWeight goes, one vocabulary chunk at a time: Megatron's main_grad when the parameter has one, else a new tensor."""

    weight: Tensor  # [V, H], local: V/TP
    total: Tensor  # [V, H]
    is_main_grad: bool

    @staticmethod
    def of(weight_VH: Tensor, num_columns: int) -> "WeightGradient":
        """The weight's main_grad, or a new tensor whose padded rows (from num_columns on) are 0 and whose others `close` writes."""
        main_grad = getattr(weight_VH, "main_grad", None)
        if main_grad is not None:
            return WeightGradient(weight_VH, main_grad, is_main_grad=True)
        total_VH = torch.empty_like(weight_VH)
        total_VH[num_columns:].zero_()
        return WeightGradient(weight_VH, total_VH, is_main_grad=False)

    @property
    def accumulates_in_place(self) -> bool:
        return self.total.dtype == compute_dtype(self.weight)

    def open(self, columns: slice) -> Tensor:
        """The [C, H] accumulator of a chunk in compute dtype: rows of the total itself where the dtype allows, else zeros."""
        if not self.accumulates_in_place:
            return torch.zeros_like(self.total[columns], dtype=compute_dtype(self.weight))
        return self.total[columns] if self.is_main_grad else self.total[columns].zero_()

    def close(self, columns: slice, chunk_CH: Tensor) -> None:
        """Takes the finished accumulator that `open` gave."""
        if self.accumulates_in_place:
            return
        if self.is_main_grad:
            self.total[columns] += chunk_CH
        else:
            self.total[columns] = chunk_CH

    def returned(self) -> Tensor | None:
        """What backward hands to autograd for the weight, following megatron.core.tensor_parallel.layers (0.16).

        Megatron's DDP hook wants a `.grad` on the parameter to know that it is ready, and adds it to main_grad unless
        `grad_added_to_main_grad` says that was done. `lookup_follows` marks a weight whose embedding returns that dummy later.
        """
        if not self.is_main_grad:
            return self.total
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True
        if getattr(self.weight, "lookup_follows", False):
            return None
        # All activations are there: a dense dummy would add a gigabyte to an 8B model's peak. A sparse one has no element.
        return torch.zeros(self.weight.shape, dtype=self.weight.dtype, device=self.weight.device, layout=torch.sparse_coo)


def slices(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    """[start, stop) in pieces of `size`, the last one shorter."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for every model dtype; fp64 inputs (gradcheck, oracles) stay fp64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _kernels(device: torch.device) -> HeadKernels:
    """Torch operators of this file on CPU; elsewhere cuBLAS and Triton, imported only when a tensor lives there."""
    if device.type == "cpu":
        return HeadKernels(local_statistics, head_gradients)
    from spin_megatron.objective import logprobs_triton

    return logprobs_triton.KERNELS


@dataclass
class SharedTile:
    """Memory for the logits of one tile after the other: an allocation a tile would cost page faults worth a fifth of the time."""

    like: Tensor  # [R, H], the hidden states
    spec: HeadSpec

    def at(self, rows: slice, columns: slice) -> Tensor:
        """The memory as [B, C]."""
        return as_tile(self._numbers, rows, columns)

    @functools.cached_property
    def _numbers(self) -> Tensor:
        """Made when it is first needed: where all tiles are kept it never is."""
        size = min(self.spec.row_block, self.like.shape[0]) * min(self.spec.vocab_chunk, self.spec.num_columns)
        return torch.empty(size, dtype=compute_dtype(self.like), device=self.like.device)


def as_tile(flat: Tensor, rows: slice, columns: slice) -> Tensor:
    """The beginning of a flat buffer as [B, C]."""
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    return flat[: shape[0] * shape[1]].view(shape)


def place_tile(tile: SharedTile, rows: slice, columns: slice, kept: KeptTiles) -> Tensor:
    """Where forward writes a tile's logits [B, C]: memory of their own, noted in `kept`, while spec.kept_bytes lasts; then `tile`."""
    shape, dtype = (rows.stop - rows.start, columns.stop - columns.start), compute_dtype(tile.like)
    if sum(logits_BC.nbytes for logits_BC in kept.values()) + math.prod(shape) * dtype.itemsize > tile.spec.kept_bytes:
        return tile.at(rows, columns)
    kept[rows.start, columns.start] = torch.empty(shape, dtype=dtype, device=tile.like.device)
    return kept[rows.start, columns.start]


def _tile_logits(hidden_BH: Tensor, weight_CH: Tensor, temperature: float, logits_BC: Tensor) -> Tensor:
    """Logits of a tile, written into logits_BC."""
    torch.mm(hidden_BH.to(weight_CH.dtype), weight_CH.t(), out=logits_BC)
    return logits_BC if temperature == 1.0 else logits_BC.div_(temperature)


def _target_columns(targets_B: Tensor, columns: slice, vocab_start: int) -> tuple[Tensor, Tensor]:
    """Column of each target inside this chunk (0 where elsewhere) and whether it is inside."""
    index_B = targets_B - (vocab_start + columns.start)
    is_here_B = (targets_B >= 0) & (index_B >= 0) & (index_B < columns.stop - columns.start)
    return torch.where(is_here_B, index_B, 0), is_here_B
