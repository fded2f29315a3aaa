#!/usr/bin/env python3
"""Core attention of one layer over a pack of pairs: this project's beside Megatron Core's and torch's, in one run on the same pairs.

    python -m tools.benchmarks.attention [--pack-tokens 2048 --heads 9 --groups 3 --head-dim 64] [--dtype float32] [--device cpu]

Methods that take a mask over the whole pack cannot share a prompt: they compute [x y] and [x y'] of the same pairs, the others [x y y'].
On CUDA every variable-length kernel that is installed takes a turn. `score` runs a forward pass, `train` a backward pass too. Seconds are
medians over rounds in which all methods take turns (CPU seconds of the process on CPU, events on CUDA), ratios medians of a round's own
ratios to Megatron Core. Memory is the growth of the peak, on CPU in a fresh process a method. Errors are against float64.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spin_megatron.data.batches import PackBatch, make_batch, pair_tokens
from spin_megatron.mcore.attention import Backend, BackendName, BranchAttention, choose_backend
from spin_megatron.mcore.runtime import running
from spin_megatron.mcore.sdpa import attend_by_branch
from spin_megatron.mcore.varlen import PlanCache
from spin_megatron.plan.shape import ParallelLayout
from spin_megatron.run.records import SpinPair
from tools.benchmarks.problem import device_name, extra_bytes_of, pairs_of_a_plan, results_of, seconds_of

MODES = ("score", "train")
BASELINE, OURS = "Megatron Core local, block mask", "spin-megatron"
KERNELS: tuple[BackendName, ...] = ("flash_attn", "transformer_engine", "torch_varlen")
# (query [T, N, D], key [T, G, D], value [T, G, D]) -> context [T, N * D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Sizes and place of one comparison."""

    pack_tokens: int
    heads: int
    groups: int
    head_dim: int
    dtype: str
    device: str

    def batch(self, *, share_prompt: bool) -> PackBatch:
        """The first pack of a plan, without padding; without sharing its pairs take more tokens."""
        pack = pairs_of_a_plan(self.pack_tokens, num_pairs=1, vocab_size=100)[0]
        pairs = [
            SpinPair(str(n), tuple(x), tuple(real), tuple(generated), made_in_iteration=0) for n, (x, real, generated) in enumerate(pack)
        ]
        tokens = sum(pair_tokens(pair, share_prompt=share_prompt) for pair in pairs)
        return make_batch(pairs, pack_tokens=tokens, pad_id=0, share_prompt=share_prompt)

    def tensors(self, batch: PackBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value, and the gradient of the context [T, N * D]."""
        generator, tokens = torch.Generator().manual_seed(0), batch.tokens_T.shape[0]
        shapes = [(tokens, heads, self.head_dim) for heads in (self.heads, self.groups, self.groups)]
        place: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "device": self.device}
        query, key, value = (torch.randn(shape, generator=generator).to(**place).requires_grad_() for shape in shapes)
        return query, key, value, torch.randn(tokens, self.heads * self.head_dim, generator=generator).to(**place)


def megatron_core(problem: Problem, batch: PackBatch) -> Attend:
    """Megatron Core's local DotProductAttention; its mask marks what is hidden."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    module = DotProductAttention(_config(problem, TransformerConfig), 1, AttnMaskType.arbitrary, "self")
    hidden_11TT = ~visible(batch).to(problem.device)[None, None]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context: Tensor = module(query[:, None], key[:, None], value[:, None], hidden_11TT, attn_mask_type=AttnMaskType.arbitrary)
        return context[:, 0]

    return attend


def _config(problem: Problem, make: Callable[..., Any]) -> Any:
    return make(
        num_layers=1,
        hidden_size=problem.heads * problem.head_dim,
        num_attention_heads=problem.heads,
        num_query_groups=problem.groups,
        kv_channels=problem.head_dim,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        params_dtype=getattr(torch, problem.dtype),
    )


def visible(batch: PackBatch) -> Tensor:
    """Bool [T, T] of a pack without shared prompts: each token sees its own sequence up to itself."""
    assert not batch.branches_B4[:, 1].any(), "a mask of blocks has no prefixes"
    sequence_T = torch.repeat_interleave(torch.arange(batch.branches_B4.shape[0]), batch.branches_B4[:, 3])
    return (sequence_T[:, None] == sequence_T[None, :]).tril()


def sdpa_block_mask(problem: Problem, batch: PackBatch) -> Attend:
    """One call of torch's scaled_dot_product_attention over the pack."""
    visible_TT = visible(batch).to(problem.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible_TT, enable_gqa=True)
        return context[0].transpose(0, 1).flatten(1)

    return attend


def by_branch(problem: Problem, batch: PackBatch) -> Attend:
    """Torch's scaled_dot_product_attention branch by branch: this project's fallback, and the float64 oracle."""
    branches = [(row[0], row[1], row[2], row[3]) for row in batch.branches_B4.tolist()]
    scale = problem.head_dim**-0.5
    return lambda query, key, value: attend_by_branch(query, key, value, branches, scale=scale, window=None).flatten(1)


def ours(problem: Problem, batch: PackBatch, *, kernel: BackendName | None = None) -> Attend:
    """This project's core attention with the kernel it chooses here, or with a given one."""
    from megatron.core.transformer import TransformerConfig

    device = torch.device(problem.device)
    chosen = choose_backend(device, getattr(torch, problem.dtype), head_dim=problem.head_dim, sliding_window=None)
    backend = chosen if kernel is None else Backend(kernel, "asked for")
    module = BranchAttention(_config(problem, TransformerConfig), 1, None, "self", backend=backend, plans=PlanCache())
    return lambda query, key, value: module(query[:, None], key[:, None], value[:, None], batch.branches_B4)[:, 0]


# Name -> (whether prompts are shared, maker).
METHODS: dict[str, tuple[bool, Callable[[Problem, PackBatch], Attend]]] = {
    BASELINE: (False, megatron_core),
    "torch sdpa, block mask": (False, sdpa_block_mask),
    "torch sdpa, branch by branch": (True, by_branch),
    OURS: (True, ours),
    **{f"{OURS}, {kernel}": (True, functools.partial(ours, kernel=kernel)) for kernel in KERNELS},
}


def available(problem: Problem) -> list[str]:
    """The methods that run here: the variable-length kernels need CUDA and their packages."""
    from spin_megatron.mcore.attention import is_installed

    packages = {"flash_attn": "flash_attn", "transformer_engine": "transformer_engine", "torch_varlen": "torch.nn.attention.varlen"}
    here = [kernel for kernel in KERNELS if problem.device == "cuda" and is_installed(packages[kernel])]
    return [name for name in METHODS if name not in {f"{OURS}, {kernel}" for kernel in KERNELS} or name.rpartition(", ")[2] in here]


@dataclass(frozen=True)
class Case:
    """A method made ready."""

    attend: Attend
    batch: PackBatch
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]

    def run(self, mode: str) -> Tensor:
        """One pass; `train` leaves gradients on the inputs."""
        *inputs, gradient = self.tensors
        for tensor in inputs:
            tensor.grad = None
        with torch.set_grad_enabled(mode == "train"):
            context = self.attend(*inputs)
        if mode == "train":
            context.backward(gradient)
        return context.detach()


def case_of(name: str, problem: Problem) -> Case:
    """A method and its inputs."""
    share_prompt, make = METHODS[name]
    batch = problem.batch(share_prompt=share_prompt)
    return Case(make(problem, batch), batch, problem.tensors(batch))


def error_of(case: Case, problem: Problem) -> float:
    """Largest error of the context against float64."""
    exact = by_branch(problem, case.batch)(*(tensor.detach().double() for tensor in case.tensors[:3]))
    return float((case.run("score").double() - exact).abs().max())


def measure(problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """A row a method."""

    def memory_of(name: str) -> dict[str, int]:
        return {mode: _memory(name, mode, problem, options) for mode in MODES}

    memory = results_of(available(problem), memory_of, needed=(BASELINE, OURS))
    cases = {name: case_of(name, problem) for name in memory}
    times: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in MODES} for name in cases}
    for number in range(options.rounds + 1):  # the first round is not counted: compilation, workspaces
        for name, case in cases.items():
            for mode in MODES:
                spent = seconds_of(lambda case=case, mode=mode: case.run(mode), problem.device)  # type: ignore[misc]
                if number:
                    times[name][mode].append(spent)
    rows: dict[str, Any] = {}
    for name, case in cases.items():
        rows[name] = {"tokens": case.batch.tokens_T.shape[0], "error": error_of(case, problem)}
        for mode in MODES:
            ratios = [one / base for one, base in zip(times[name][mode], times[BASELINE][mode], strict=True)]
            rows[name][mode] = {
                "seconds": statistics.median(times[name][mode]),
                "time_ratio": statistics.median(ratios),
                "extra_bytes": memory[name][mode],
            }
    return rows


def _memory(name: str, mode: str, problem: Problem, options: argparse.Namespace) -> int:
    """Growth of the peak; on CPU in a process of its own, because a process keeps what it once had."""
    if problem.device != "cpu" or options.quick:
        case = case_of(name, problem)
        return extra_bytes_of(lambda: case.run(mode), problem.device)
    arguments = [text for key, value in vars(problem).items() for text in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "tools.benchmarks.attention", *arguments, "--threads", str(options.threads), "--memory-of", name, mode]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout
    return int(output.split()[-1])


def table(rows: dict[str, Any]) -> str:
    """The README's table, in Markdown."""
    lines = ["| attention | tokens | score ms (ratio) | train ms (ratio) | train MiB | error |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = [f"{1e3 * row[mode]['seconds']:.3g} ({row[mode]['time_ratio']:.3f})" for mode in MODES]
        memory = f"{row['train']['extra_bytes'] / 2**20:.0f}"
        lines.append(f"| {name} | {row['tokens']} | {' | '.join(cells)} | {memory} | {row['error']:.0e} |")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pack-tokens", 2048), ("heads", 9), ("groups", 3), ("head-dim", 64), ("threads", 1), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("attention.json"))
    parser.add_argument("--quick", action="store_true", help="to try it out: read memory in this process, which is not exact on CPU")
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "MODE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, write the JSON, print the table."""
    options = _parse()
    torch.set_num_threads(options.threads)
    problem = Problem(options.pack_tokens, options.heads, options.groups, options.head_dim, options.dtype, options.device)
    with running(ParallelLayout(), device=problem.device, seed=0):  # type: ignore[arg-type]
        if options.memory_of:
            case = case_of(options.memory_of[0], problem)
            print(extra_bytes_of(lambda: case.run(options.memory_of[1]), problem.device))
            return
        rows = measure(problem, options)
    report = {
        "problem": vars(problem) | {"threads": options.threads, "rounds": options.rounds},
        "torch": torch.__version__,
        "device_name": device_name(problem.device),
        "methods": rows,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
