"""The Triton epilogues of the head, run by Triton's interpreter on CPU tensors, against float64.

The interpreter is chosen when Triton is imported, so all cases run in one fresh process; it checks logic, not races or speed.
Triton comes with `pip install -e ".[dev]"` on Linux.
"""

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_megatron.objective.logprobs import IGNORED, HeadSpec, RowData, WeightGradient, merge_statistics
from tests.parity.gloo import run_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux: pip install triton)")

CASES: dict[str, dict[str, Any]] = {
    "prime vocabulary": {"vocab": 1009},
    "vocabulary of 1024 + 1": {"vocab": 1025},
    "Llama 3 over 8 ranks": {"vocab": 16032, "rows": 6},
    "a second rank's columns": {"vocab": 300, "vocab_start": 300, "targets_up_to": 600},
    "padded tail": {"vocab": 100, "padded": 128},
    "panels shorter than their rows": {"vocab": 70, "vocab_chunk": 8, "row_block": 2, "rows": 37},
    "some tiles kept": {"vocab": 70, "vocab_chunk": 8, "row_block": 2, "rows": 37, "kept_bytes": 3000},
    "all logits far below zero": {"vocab": 300, "shift": -300.0},
    "temperature": {"vocab": 300, "temperature": 0.5},
    "bf16": {"vocab": 300, "dtype": torch.bfloat16},
    "no rows": {"vocab": 300, "rows": 0},
}


def _inputs(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows, vocab = case.get("rows", 11), case["vocab"]
    hidden_RH = torch.randn(rows, 12, generator=generator)
    weight_VH = torch.randn(case.get("padded", vocab), 12, generator=generator)
    weight_VH[vocab:] = 100.0  # a padded column that counted would win every softmax
    if "shift" in case:
        hidden_RH[:, 0], weight_VH[:, 0] = 1.0, case["shift"]
    targets_R = torch.randint(0, case.get("targets_up_to", vocab), (rows,), generator=generator)
    targets_R[::4] = IGNORED
    coefficient_R = torch.randn(rows, generator=generator).where(targets_R != IGNORED, 0.0)
    dtype = case.get("dtype", torch.float32)
    return hidden_RH.to(dtype), weight_VH.to(dtype), targets_R, coefficient_R


def _spec(case: dict[str, Any]) -> HeadSpec:
    return HeadSpec(
        group=None,
        vocab_start=case.get("vocab_start", 0),
        num_columns=case["vocab"],
        temperature=case.get("temperature", 1.0),
        vocab_chunk=case.get("vocab_chunk", 256),
        row_block=case.get("row_block", 4),
        kept_bytes=case.get("kept_bytes", 0),
        reduce_hidden_grad=True,
    )


def _interpret(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """In a fresh process: both halves of the head for each case."""
    os.environ["TRITON_INTERPRET"] = "1"
    from spin_megatron.objective.logprobs_triton import KERNELS

    results = {}
    for name, case in cases.items():
        hidden_RH, weight_VH, targets_R, coefficient_R = _inputs(case)
        spec = _spec(case)
        statistics_R3, kept = KERNELS.local_statistics(hidden_RH, weight_VH, targets_R, spec)
        _, lse_R = merge_statistics(statistics_R3[None])
        weight = torch.nn.Parameter(weight_VH)
        weight.main_grad = torch.ones(weight_VH.shape)  # type: ignore[attr-defined]
        sink = WeightGradient.of(weight, spec.num_columns)
        row_data = RowData(targets_R, lse_R, coefficient_R / spec.temperature)
        hidden_grad_RH = KERNELS.head_gradients(hidden_RH, weight_VH, row_data, kept, sink, spec)
        results[name] = {"statistics": statistics_R3, "lse": lse_R, "hidden_grad": hidden_grad_RH, "main_grad": weight.main_grad}
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Tensor]]:
    return run_ranks(_interpret, 1, CASES, timeout=240, is_fresh=True)[0]


def _logits(case: dict[str, Any]) -> Tensor:
    hidden_RH, weight_VH, _, _ = _inputs(case)
    return hidden_RH.double() @ weight_VH[: case["vocab"]].double().t() / case.get("temperature", 1.0)


@pytest.mark.parametrize("name", CASES)
def test_row_statistics_equal_float64(results: dict[str, dict[str, Tensor]], name: str) -> None:
    case = CASES[name]
    logits_RV, targets_R = _logits(case), _inputs(case)[2]
    column_R = targets_R - case.get("vocab_start", 0)
    is_here_R = (targets_R >= 0) & (column_R >= 0) & (column_R < case["vocab"])
    target_R = torch.where(is_here_R, logits_RV.gather(1, column_R.clamp(0, case["vocab"] - 1)[:, None])[:, 0], 0.0)
    maximum_R, _, found_R = results[name]["statistics"].double().unbind(1)
    tolerance = 1e-4 if "shift" in case else 5e-6  # the fp32 spacing at 300 is 3e-5
    assert torch.allclose(results[name]["lse"].double(), logits_RV.logsumexp(1), rtol=0, atol=tolerance)
    assert torch.allclose(found_R, target_R, rtol=0, atol=tolerance)
    if case.get("rows", 11):
        assert torch.allclose(maximum_R, logits_RV.amax(1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_float64_for_any_coefficient_per_row(results: dict[str, dict[str, Tensor]], name: str) -> None:
    case = CASES[name]
    hidden_RH, weight_VH, targets_R, coefficient_R = _inputs(case)
    column_R = targets_R - case.get("vocab_start", 0)
    onehot_RV = (torch.arange(case["vocab"]) == column_R[:, None]).double()
    error_RV = coefficient_R.double()[:, None] / case.get("temperature", 1.0) * (onehot_RV - _logits(case).softmax(1))
    hidden_grad_RH = error_RV @ weight_VH[: case["vocab"]].double()
    weight_grad_VH = torch.zeros(weight_VH.shape, dtype=torch.float64)
    weight_grad_VH[: case["vocab"]] = error_RV.t() @ hidden_RH.double()
    # bf16 rounds each error to 8 bits; logits of -300 have a spacing of 3e-5, and dHidden sums weights of -300 that cancel.
    relative = 2**-8 if "dtype" in case else 3e-5 if "shift" in case else 2e-6
    hidden_scale = max(hidden_grad_RH.abs().max().item(), abs(case.get("shift", 1.0)), 1.0) if case.get("rows", 11) else 1.0
    assert torch.allclose(results[name]["hidden_grad"].double(), hidden_grad_RH, rtol=0, atol=4 * relative * hidden_scale)
    assert torch.allclose(results[name]["main_grad"].double() - 1.0, weight_grad_VH, rtol=0, atol=20 * relative)  # added to the ones
    assert results[name]["main_grad"][case["vocab"] :].eq(1.0).all()
    assert results[name]["hidden_grad"][targets_R == IGNORED].eq(0).all()


def _compile_for_hopper() -> dict[str, str]:
    """PTX of both kernels; Triton brings its own assembler and asks for no driver when it is given a target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spin_megatron.objective import logprobs_triton

    types = dict.fromkeys(("logits", "statistics", "lse", "coefficients"), "*fp32") | {"errors": "*bf16", "targets": "*i64"}
    types |= dict.fromkeys(("first_column", "num_columns", "error_stride"), "i32") | {"inverse_temperature": "fp32", "BLOCK": "constexpr"}
    assembled = {}
    for kernel in (logprobs_triton._update_statistics, logprobs_triton._write_errors):
        signature = {name: types[name] for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs={"BLOCK": 4096})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert len(compiled.asm["cubin"]) > 0
        assembled[kernel.__name__] = compiled.asm["ptx"]
    return assembled


def test_the_kernels_compile_for_hopper_without_spilling_a_row() -> None:
    assembled = run_ranks(_compile_for_hopper, 1, timeout=240)[0]
    assert set(assembled) == {"_update_statistics", "_write_errors"}
    for ptx in assembled.values():
        assert ".target sm_90" in ptx
        assert ".local" not in ptx
