#!/usr/bin/env python3
"""The log-prob head beside its alternatives: time, extra memory, and error against float64, in one run on the same tensors.

    python -m tools.benchmarks.head [--rows 4096 --hidden 576 --vocab 49152] [--dtype float32] [--device cpu] [--out head.json]

Each method maps (hidden [R, H], weight [V, H], targets [R]) to log-probs [R]; `score` runs it under no_grad, `train` adds a backward with
a random gradient per row. Times are medians over rounds in which all methods take turns (CPU seconds of the process on CPU, where the
machine may be shared; events on CUDA), and ratios are medians of a round's own ratios. Memory is the growth of the peak, on CPU
in a fresh process per method, gradients included. Errors are measured on --error-rows of the rows.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from spin_megatron.objective.logprobs import KEPT_BYTES, vocab_parallel_logprobs
from tools.benchmarks.problem import device_name, extra_bytes_of, results_of, seconds_of

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]
MODES = ("score", "train")
BASELINE, OURS = "naive", "spin-megatron"
# What the head has to hold against the naive method on the GATED problem: ratios of time and of extra memory.
GATES = {"score_time": 1.0, "score_memory": 0.10, "train_time": 1.05, "train_memory": 0.12}
# And on a GPU with Llama 3's vocabulary in bf16: at least this share of the rate of cuBLAS' product of the head's size.
PRODUCT_SHARES = {"score": 0.70, "train": 0.65}


def naive(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
    """Logits, log_softmax in fp32, gather."""
    return (hidden_RH @ weight_VH.t()).float().log_softmax(-1).gather(1, targets_R[:, None])[:, 0]


def torch_chunks(**options: Any) -> LogProbs:
    """The chunked linear_cross_entropy of torch 2.13."""
    settings = torch.nn.LinearCrossEntropyOptions(**options)

    def method(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
        return -functional.linear_cross_entropy(hidden_RH, weight_VH, targets_R, reduction="none", options=settings)

    return method


def megatron_core() -> LogProbs:
    """Megatron Core's vocab-parallel cross-entropy (not fused: the fused one rounds gradients to bf16) on one rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        parallel_state.initialize_model_parallel()

    def method(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
        loss_1R: Tensor = vocab_parallel_cross_entropy((hidden_RH @ weight_VH.t())[None], targets_R[None])
        return -loss_1R[0]

    return method


def liger() -> LogProbs:
    """Liger's fused linear cross-entropy with per-token losses."""
    fused: Callable[..., Tensor] = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def method(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
        return -fused(hidden_RH, weight_VH, targets_R, reduction="none")

    return method


def ours(kept_bytes: int = KEPT_BYTES) -> LogProbs:
    """This project's head on one rank."""

    def method(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
        return vocab_parallel_logprobs(
            hidden_RH, weight_VH, targets_R, group=None, vocab_start=0, vocab_size=weight_VH.shape[0], kept_bytes=kept_bytes
        )

    return method


METHODS: dict[str, Callable[[], LogProbs]] = {
    BASELINE: lambda: naive,
    "torch chunks (auto)": torch_chunks,
    "torch chunks (512 rows)": lambda: torch_chunks(batch_chunk_size=512),
    "Megatron Core": megatron_core,
    "Liger": liger,
    OURS: ours,
    f"{OURS}, nothing kept": lambda: ours(0),
    f"{OURS}, all kept": lambda: ours(2**62),
}
# Measured where they are named only.
VARIANTS = (f"{OURS}, nothing kept", f"{OURS}, all kept")


@dataclass(frozen=True)
class Problem:
    """Sizes and place of one comparison; `tensors` makes the same inputs in every process."""

    rows: int
    hidden: int
    vocab: int
    dtype: str
    device: str

    def tensors(self, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states and weights with logits of deviation 3, targets, and a random gradient per row."""
        # Drawn where they are used: a billion weights take a processor ten seconds, and every method and mode draws them anew.
        source: dict[str, Any] = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        rows, dtype = self.rows if rows is None else rows, getattr(torch, self.dtype)
        hidden_RH = torch.randn(rows, self.hidden, **source).to(dtype)
        weight_VH = torch.randn(self.vocab, self.hidden, **source).mul_(3.0 / self.hidden**0.5).to(dtype)
        targets_R = torch.randint(0, self.vocab, (rows,), **source)
        return hidden_RH.requires_grad_(), weight_VH.requires_grad_(), targets_R, torch.randn(rows, **source)


GATED = Problem(rows=4096, hidden=576, vocab=49152, dtype="float32", device="cpu")


def run_once(method: LogProbs, mode: str, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, gradient_R: Tensor) -> Tensor:
    """One pass; `train` leaves the gradients on the leaves."""
    hidden_RH.grad = weight_VH.grad = None
    with torch.set_grad_enabled(mode == "train"):
        logp_R = method(hidden_RH, weight_VH, targets_R)
    if mode == "train":
        logp_R.backward(gradient_R.to(logp_R.dtype))
    return logp_R.detach()


def extra_bytes(name: str, mode: str, problem: Problem) -> int:
    """Growth of this process's peak memory over its inputs during one pass."""
    method = METHODS[name]()
    small = Problem(8, problem.hidden, 64, problem.dtype, problem.device).tensors()
    run_once(method, mode, *small)  # libraries are loaded and their workspaces made outside the measure
    tensors = problem.tensors()
    return extra_bytes_of(lambda: run_once(method, mode, *tensors), problem.device)


def measure_memory(names: list[str], problem: Problem, threads: int, *, is_quick: bool) -> dict[str, dict[str, int]]:
    """extra_bytes of each method and mode; without the peers that do not run here."""

    def measure(name: str) -> dict[str, int]:
        return {mode: _memory(name, mode, problem, threads, is_quick=is_quick) for mode in MODES}

    return results_of(names, measure, needed=(BASELINE, OURS))


def _memory(name: str, mode: str, problem: Problem, threads: int, *, is_quick: bool) -> int:
    """On CPU in a process of its own, because a process keeps what it once had."""
    if problem.device != "cpu" or is_quick:
        found = extra_bytes(name, mode, problem)
    else:
        command = [sys.executable, "-m", "tools.benchmarks.head", *_arguments(problem), "--threads", str(threads)]
        command += ["--memory-of", name, mode]
        found = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=1800).stdout.split()[-1])
    print(f"memory  {name:24} {mode:6} {found / 2**20:9.0f} MiB", file=sys.stderr)
    return found


def measure_seconds(methods: dict[str, LogProbs], problem: Problem, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each method and mode, `rounds` times in turn, after one unmeasured turn on CUDA (compilation, autotuning)."""
    tensors = problem.tensors()
    result: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in MODES} for name in methods}
    for number in range(rounds + (problem.device != "cpu")):
        for mode in MODES:
            for name, method in methods.items():
                spent = seconds_of(lambda method=method, mode=mode: run_once(method, mode, *tensors), problem.device)  # type: ignore[misc]
                if number or problem.device == "cpu":
                    result[name][mode].append(spent)
        print(f"round {number + 1} done", file=sys.stderr)
    return result


def measure_errors(methods: dict[str, LogProbs], problem: Problem, rows: int) -> dict[str, dict[str, float]]:
    """Largest log-prob error in nats, and largest gradient errors relative to the largest gradient, against float64."""
    tensors = problem.tensors(rows)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors[:2]]
    logp_R = (exact[0] @ exact[1].t()).log_softmax(-1).gather(1, tensors[2][:, None])[:, 0]
    logp_R.backward(tensors[3].double())
    result = {}
    for name, method in methods.items():
        found_R = run_once(method, "train", *tensors)
        errors = {"logp_nats": float((found_R.double() - logp_R.detach()).abs().max())}
        for key, leaf, true in zip(("hidden_grad", "weight_grad"), tensors[:2], exact, strict=True):
            assert leaf.grad is not None
            assert true.grad is not None
            errors[key] = float((leaf.grad.double() - true.grad).abs().max() / true.grad.abs().max())
        result[name] = errors
    return result


def product_rate(problem: Problem, rounds: int) -> float:
    """FLOP/s of one plain product of the head's size, the ceiling of every method."""
    hidden_RH, weight_VH = (tensor.detach() for tensor in problem.tensors()[:2])
    spent = statistics.median(seconds_of(lambda: hidden_RH @ weight_VH.t(), problem.device) for _ in range(rounds + 1))
    return 2 * problem.rows * problem.hidden * problem.vocab / spent


def summarise(
    problem: Problem,
    times: dict[str, dict[str, list[float]]],
    memory: dict[str, dict[str, int]],
    errors: dict[str, dict[str, float]],
    rate: float,
) -> dict[str, Any]:
    """The JSON's `methods`: medians, ratios to the baseline, share of the plain product's rate (forward 2, training 8 R*H*V FLOPs)."""
    unit = problem.rows * problem.hidden * problem.vocab
    result: dict[str, Any] = {}
    for name in times:
        row: dict[str, Any] = {"error": errors[name]}
        for mode, flops in zip(MODES, (2 * unit, 8 * unit), strict=True):
            median = statistics.median(times[name][mode])
            ratios = [one / base for one, base in zip(times[name][mode], times[BASELINE][mode], strict=True)]
            row[mode] = {
                "seconds": median,
                "all_seconds": times[name][mode],
                "time_ratio": statistics.median(ratios),
                "product_rate_share": flops / median / rate,
                "extra_bytes": memory[name][mode],
                "memory_ratio": memory[name][mode] / max(memory[BASELINE][mode], 1),
            }
        result[name] = row
    return result


def table(rows: dict[str, Any]) -> str:
    """The README's table, in Markdown."""
    lines = [
        (
            "| method | score s (ratio; of the product's rate) | score MiB (ratio) | train s (ratio; of the product's rate) "
            "| train MiB (ratio) | logp error, nat | dH, dW error |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = []
        for mode in MODES:
            part = row[mode]
            cells.append(f"{part['seconds']:.3g} ({part['time_ratio']:.2f}; {part['product_rate_share']:.0%})")
            cells.append(f"{part['extra_bytes'] / 2**20:.0f} ({part['memory_ratio']:.3f})")
        error = row["error"]
        errors = f"{error['logp_nats']:.1e} | {error['hidden_grad']:.1e}, {error['weight_grad']:.1e}"
        lines.append(f"| {name} | {' | '.join(cells)} | {errors} |")
    return "\n".join(lines)


def gates(problem: Problem, rows: dict[str, Any]) -> dict[str, dict[str, float | bool]]:
    """What this problem has to hold: each gate's limit, what was found, and whether it holds."""
    if problem == GATED:
        found = {f"{mode}_{kind}": rows[OURS][mode][f"{kind}_ratio"] for mode in MODES for kind in ("time", "memory")}
        return {name: {"limit": limit, "found": found[name], "holds": found[name] <= limit} for name, limit in GATES.items()}
    if (problem.device, problem.vocab, problem.dtype) != ("cuda", 128256, "bfloat16"):
        return {}
    held: dict[str, dict[str, float | bool]] = {}
    for mode, share in PRODUCT_SHARES.items():
        own = rows[OURS][mode]
        held[f"{mode}_product"] = {"limit": share, "found": own["product_rate_share"], "holds": own["product_rate_share"] >= share}
        if "Liger" in rows:
            ratio = own["seconds"] / rows["Liger"][mode]["seconds"]
            held[f"{mode}_Liger"] = {"limit": 1.0, "found": ratio, "holds": ratio <= 1.0}
    return held


def _arguments(problem: Problem) -> list[str]:
    return [text for name, value in vars(problem).items() for text in (f"--{name}", str(value))]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 4096), ("hidden", 576), ("vocab", 49152), ("threads", 1), ("rounds", 3), ("error-rows", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of: {', '.join(METHODS)}")
    parser.add_argument("--out", type=Path, default=Path("head.json"))
    parser.add_argument("--quick", action="store_true", help="to try it out: read memory in this process, which is not exact on CPU")
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "MODE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _available(names: list[str] | None, device: str) -> list[str]:
    """The methods that run here; the two that everything is compared with are always among them."""
    chosen = [name for name in METHODS if name in (BASELINE, OURS, *(names or ())) or (names is None and name not in VARIANTS)]
    missing = set() if device == "cuda" and importlib.util.find_spec("liger_kernel") else {"Liger"}
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since torch 2.13
        missing |= {name for name in METHODS if name.startswith("torch chunks")}
    if importlib.util.find_spec("megatron") is None:
        missing.add("Megatron Core")
    return [name for name in chosen if name not in missing]


def main() -> int:
    """Measure, write the JSON, print the table; 1 if a gate does not hold."""
    options = _parse()
    torch.set_num_threads(options.threads)
    problem = Problem(options.rows, options.hidden, options.vocab, options.dtype, options.device)
    if options.memory_of:
        name, mode = options.memory_of
        print(extra_bytes(name, mode, problem))
        return 0
    names = _available(options.methods, problem.device)
    memory = measure_memory(names, problem, options.threads, is_quick=options.quick)
    methods = {name: METHODS[name]() for name in memory}
    errors = measure_errors(methods, problem, options.error_rows)
    times = measure_seconds(methods, problem, options.rounds)
    rate = product_rate(problem, options.rounds)
    rows = summarise(problem, times, memory, errors, rate)
    device = device_name(problem.device)
    held = gates(problem, rows)
    report = {
        "problem": vars(problem) | {"threads": options.threads, "rounds": options.rounds},
        "torch": torch.__version__,
        "device_name": device,
        "product_flops_per_second": rate,
        "methods": rows,
        "gates": held,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{vars(problem)}, {options.threads} threads, {device}, torch {torch.__version__}, product {rate / 1e12:.3g} TFLOP/s\n")
    print(table(rows))
    for name, gate in held.items():
        print(f"{name:12} {gate['found']:.3f} (limit {gate['limit']}) {'holds' if gate['holds'] else 'DOES NOT HOLD'}")
    return 0 if all(gate["holds"] for gate in held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
