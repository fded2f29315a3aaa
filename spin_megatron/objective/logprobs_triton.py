"""The head's two halves on CUDA: cuBLAS for the products, one Triton epilogue a direction for everything else.

Same contract as `local_statistics` and `head_gradients` in logprobs.py, which describe the mathematics. What differs is memory traffic:

- A tile's logits (row_block x vocab_chunk, fp32, 16 MiB at 1024 x 4096) are written by cuBLAS and read back by the epilogue while they
  still lie in the L2 cache (50 MB on Hopper), so fp32 logits cost no HBM bandwidth. bf16 logits would round away 0.2 nat a response.
- Backward writes dZ in the operands' dtype (bf16) for a panel of many tiles, so that the two gradient products see long inner
  dimensions and touch their fp32 accumulators once a panel: a read-modify-write of dW for every 1024 rows would cost a third of the time.

A full Triton product was measured elsewhere at half of cuBLAS' rate on Hopper, hence only the epilogues are Triton. They also run on CPU
tensors in Triton's interpreter (TRITON_INTERPRET=1), which is how the tests check their logic without a GPU: no kernel has a loop with a
run-time bound or a tl.dot, the two things the interpreter gets wrong (NumPy 2.4; bf16 operands).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spin_megatron.objective.logprobs import (
    HeadKernels,
    HeadSpec,
    KeptTiles,
    RowData,
    SharedTile,
    WeightGradient,
    as_tile,
    place_tile,
    slices,
)

# A panel of the backward is this many tiles: 8192 rows x 8192 columns of bf16 dZ are 128 MiB with the default tile.
PANEL_ROW_TILES = 8
PANEL_COLUMN_TILES = 2
# One program holds a whole tile row in registers: 16384 fp32 over 16 warps are 32 registers a thread.
MAX_TILE_COLUMNS = 16384


def local_statistics(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, spec: HeadSpec) -> tuple[Tensor, KeptTiles]:
    """This rank's (maximum, sum of exponentials, target logit) per row over its true columns: fp32 [R, 3]."""
    statistics_R3 = torch.zeros(hidden_RH.shape[0], 3, dtype=torch.float32, device=hidden_RH.device)
    statistics_R3[:, 0] = -torch.inf
    tile, kept = SharedTile(hidden_RH, spec), KeptTiles()
    for columns in slices(spec.num_columns, spec.vocab_chunk):
        for rows in slices(hidden_RH.shape[0], spec.row_block):
            logits_BC = _product(hidden_RH[rows], weight_VH[columns].t(), place_tile(tile, rows, columns, kept))
            _update_statistics[(logits_BC.shape[0],)](
                logits_BC,
                statistics_R3[rows],
                targets_R[rows],
                spec.vocab_start + columns.start,
                logits_BC.shape[1],
                1.0 / spec.temperature,
                BLOCK=_block_columns(spec),
                num_warps=_num_warps(spec),
            )
    return statistics_R3, kept


def head_gradients(
    hidden_RH: Tensor, weight_VH: Tensor, row_data: RowData, kept: KeptTiles, sink: WeightGradient | None, spec: HeadSpec
) -> Tensor:
    """This rank's part of dHidden [R, H] in hidden's dtype (accumulated in fp32); dWeight goes into `sink` panel by panel."""
    num_rows, dtype = hidden_RH.shape[0], hidden_RH.dtype
    hidden_grad_RH = torch.zeros(hidden_RH.shape, dtype=torch.float32, device=hidden_RH.device)
    panel_rows, panel_columns = spec.row_block * PANEL_ROW_TILES, spec.vocab_chunk * PANEL_COLUMN_TILES
    panel = torch.empty(min(panel_rows, num_rows) * min(panel_columns, spec.num_columns), dtype=dtype, device=hidden_RH.device)
    tile = SharedTile(hidden_RH, spec)
    for columns in slices(spec.num_columns, panel_columns):
        weight_grad_CH = sink.open(columns) if sink else None
        for rows in slices(num_rows, panel_rows):
            error_NC = as_tile(panel, rows, columns)
            _fill_panel(error_NC, rows, columns, hidden_RH, weight_VH, row_data, kept, tile, spec)
            _add_product(hidden_grad_RH[rows], error_NC, weight_VH[columns])
            if weight_grad_CH is not None:
                _add_product(weight_grad_CH, error_NC.t(), hidden_RH[rows])
        if sink and weight_grad_CH is not None:
            sink.close(columns, weight_grad_CH)
    return hidden_grad_RH.to(dtype)


KERNELS = HeadKernels(local_statistics, head_gradients)


def _fill_panel(
    error_NC: Tensor,
    panel_rows: slice,
    panel_columns: slice,
    hidden_RH: Tensor,
    weight_VH: Tensor,
    row_data: RowData,
    kept: KeptTiles,
    tile: SharedTile,
    spec: HeadSpec,
) -> None:
    """Writes coefficient * (onehot(target) - softmax) of a panel's N rows and C columns into error_NC, tile by tile."""
    for columns in slices(panel_columns.stop, spec.vocab_chunk, panel_columns.start):
        for rows in slices(panel_rows.stop, spec.row_block, panel_rows.start):
            logits_BC = kept.pop((rows.start, columns.start), None)
            if logits_BC is None:
                logits_BC = _product(hidden_RH[rows], weight_VH[columns].t(), tile.at(rows, columns))
            _write_errors[(logits_BC.shape[0],)](
                logits_BC,
                error_NC[rows.start - panel_rows.start :, columns.start - panel_columns.start :],
                *row_data.at(rows),
                spec.vocab_start + columns.start,
                logits_BC.shape[1],
                error_NC.stride(0),
                1.0 / spec.temperature,
                BLOCK=_block_columns(spec),
                num_warps=_num_warps(spec),
            )


@triton.jit
def _update_statistics(
    logits: tl.tensor,
    statistics: tl.tensor,
    targets: tl.tensor,
    first_column: int,
    num_columns: int,
    inverse_temperature: float,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row: online update of (maximum, sum, target logit) by the row's num_columns <= BLOCK logits."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    # -inf beyond the tile: a zero there would enter maximum and sum, silently, wherever the vocabulary is no multiple of BLOCK.
    z = tl.load(logits + row * num_columns + columns, mask=columns < num_columns, other=-float("inf")) * inverse_temperature
    old_maximum = tl.load(statistics + row * 3)
    old_sum = tl.load(statistics + row * 3 + 1)
    old_target = tl.load(statistics + row * 3 + 2)
    maximum = tl.maximum(old_maximum, tl.max(z, axis=0))
    new_sum = old_sum * tl.exp(old_maximum - maximum) + tl.sum(tl.exp(z - maximum), axis=0)
    target = tl.load(targets + row) - first_column
    is_target = (columns == target) & (columns < num_columns)
    tl.store(statistics + row * 3, maximum)
    tl.store(statistics + row * 3 + 1, new_sum)
    tl.store(statistics + row * 3 + 2, old_target + tl.sum(tl.where(is_target, z, 0.0), axis=0))


@triton.jit
def _write_errors(
    logits: tl.tensor,
    errors: tl.tensor,
    targets: tl.tensor,
    lse: tl.tensor,
    coefficients: tl.tensor,
    first_column: int,
    num_columns: int,
    error_stride: int,
    inverse_temperature: float,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row: errors = coefficient * (onehot(target) - exp(logits - lse)), rounded to the errors' dtype."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    z = tl.load(logits + row * num_columns + columns, mask=inside, other=-float("inf")) * inverse_temperature
    target = tl.load(targets + row) - first_column
    softmax = tl.exp(z - tl.load(lse + row))
    error = tl.load(coefficients + row) * (tl.where(columns == target, 1.0, 0.0) - softmax)
    tl.store(errors + row * error_stride + columns, error.to(errors.dtype.element_ty), mask=inside)


def _block_columns(spec: HeadSpec) -> int:
    """One block size for every tile of a call, the shorter last one included: a single compilation."""
    assert spec.vocab_chunk <= MAX_TILE_COLUMNS, f"vocab_chunk={spec.vocab_chunk}: one program holds at most {MAX_TILE_COLUMNS} columns"
    return int(triton.next_power_of_2(min(spec.vocab_chunk, spec.num_columns)))


def _num_warps(spec: HeadSpec) -> int:
    return max(1, min(16, _block_columns(spec) // 512))


def _product(left_BH: Tensor, right_HC: Tensor, out_BC: Tensor) -> Tensor:
    """The fp32 product of operands of any dtype, written into out_BC."""
    if left_BH.dtype == torch.float32:
        torch.mm(left_BH, right_HC, out=out_BC)
    elif left_BH.device.type == "cuda":
        torch.mm(left_BH, right_HC, out_dtype=torch.float32, out=out_BC)  # bf16 operands, fp32 result: cuBLAS only
    else:
        torch.mm(left_BH.float(), right_HC.float(), out=out_BC)
    return out_BC


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to total (fp32), accumulated in fp32 whatever the operands' dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.float(), right.float())
