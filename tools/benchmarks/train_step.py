#!/usr/bin/env python3
"""Training steps a second: TRL's DPOTrainer with a precomputed reference beside this project's train stage, on the same weights and pairs.

    python -m tools.benchmarks.train_step --trl-python TRL/bin/python [--model tiny|smollm2-135m|llama-1b|FOLDER] [--pairs 8] [--device cpu]

TRL may stand in an environment of its own; it needs the same torch and transformers to be comparable:

    python -m venv TRL
    echo "$PWD/.venv/lib/python3.11/site-packages" > TRL/lib/python3.11/site-packages/base.pth
    TRL/bin/pip install --no-deps trl        # and liger-kernel on CUDA

A step takes all pairs; the same pairs again in the next step, so both sides must report the same losses: that, and the reference
log-probs, is checked. Each side runs in a fresh process, in turns over --rounds; its first step (allocations, compilation) is not timed.
Seconds are wall seconds: run it alone on the machine. Peak memory is that of the whole process on CPU (resident) and of the allocator on
CUDA. On a CPU ours runs with tcmalloc where that is installed, as the launcher starts it; TRL runs as a user starts it, and with tcmalloc
too under --trl-variants. Real tokens are those of x+y and x+y'; MFU counts what a pair needs with its prompt computed once and nothing
recomputed.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spin_megatron.launch.allocator import allocator_variables
from tools.benchmarks.problem import device_name, model_folder, pairs_of_a_plan, peak_bytes, results_of

REPOSITORY = Path(__file__).parents[2]
OURS = "spin-megatron"
BETA, LEARNING_RATE = 0.1, 1e-4


def _packs_of(work: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The step's packs and their pairs, as the train stage knows them."""
    from spin_megatron.data.batches import pair_tokens
    from spin_megatron.run.records import Pack, SpinPair

    packs, pairs = [], []
    for number, pack in enumerate(work["packs"]):
        own = [
            SpinPair(f"{number}/{n}", tuple(pair["prompt"]), tuple(pair["real"]), tuple(pair["generated"]), made_in_iteration=0)
            for n, pair in enumerate(pack)
        ]
        packs.append(Pack(number, tuple(pair.pair_id for pair in own), sum(pair_tokens(pair, share_prompt=True) for pair in own)))
        pairs += own
    return packs, pairs


def our_side(work: dict[str, Any]) -> dict[str, Any]:
    """This project's train stage without its files: reference phase, then updates."""
    from spin_megatron.mcore.model import build_model, load_huggingface
    from spin_megatron.mcore.optimizer import UpdateRule, build_trainer
    from spin_megatron.mcore.reference import PackedPairs, score_pairs
    from spin_megatron.mcore.runtime import running
    from spin_megatron.mcore.training import Objective, train_step
    from spin_megatron.objective.logprobs import KEPT_BYTES
    from spin_megatron.plan.shape import ModelShape, ParallelLayout

    packs, pairs = _packs_of(work)
    packed = PackedPairs({pair.pair_id: pair for pair in pairs}, tuple(packs), work["pack_tokens"], share_prompt=True)
    folder, dtype = Path(work["model"]), getattr(torch, work["dtype"])
    ticks, losses = [], []
    with running(ParallelLayout(), device=work["device"], seed=0) as runtime:
        shape = ModelShape.from_huggingface(folder)
        mode, _, num_layers = work["recompute"].partition(":")
        chunks = build_model(
            shape,
            runtime,
            dtype=dtype,
            recompute=mode,
            recompute_layers=int(num_layers) if num_layers else None,
            kept_logit_bytes=work.get("kept_logit_bytes", KEPT_BYTES),
        )
        load_huggingface(chunks, folder, shape, runtime, show=False)
        scores = score_pairs(chunks, packed, [packed.packs], runtime)
        assert scores is not None
        references = {score.pair_id: score for score in scores}
        trainer = build_trainer(chunks, UpdateRule("adamw", max_grad_norm=1.0))
        for step in range(work["steps"] + 1):
            if work["device"] != "cpu":
                torch.cuda.synchronize()
            ticks.append((time.perf_counter(), time.process_time()))
            if step < work["steps"]:
                batches = [packed.batch(pack) for pack in packs]
                objective = Objective("logistic", work["beta"])
                outcome = train_step(
                    trainer,
                    batches,
                    references,
                    objective,
                    runtime,
                    num_pairs=len(pairs),
                    learning_rate=work["learning_rate"],
                    must_start_at_zero=step == 0,
                )
                losses.append(outcome.metrics["loss"])
    return {
        "wall_seconds": [after[0] - before[0] for before, after in itertools.pairwise(ticks)],
        "cpu_seconds": [after[1] - before[1] for before, after in itertools.pairwise(ticks)],
        "losses": losses,
        "peak_bytes": peak_bytes(work["device"]),
        "reference_real": [references[pair.pair_id].logp_real for pair in pairs],
        "reference_generated": [references[pair.pair_id].logp_generated for pair in pairs],
    }


def sides_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name of each side -> what its process is given beyond the common work."""
    sides: dict[str, dict[str, Any]] = {}
    for per_batch in options.trl_pairs:
        sides[f"TRL, {per_batch} pair{'s' * (per_batch > 1)} a batch"] = {"trl_pairs": per_batch}
    for variant in options.trl_variants:
        own = {"allocator": "tcmalloc"} if variant == "tcmalloc" else {"trl_checkpointing": True}
        sides[f"TRL, 1 pair a batch, {variant.replace('-', ' ')}"] = {"trl_pairs": 1, **own}
    # The launcher gives ranks on a CPU tcmalloc where it is installed.
    own = {"allocator": "tcmalloc"} if allocator_variables() else {}
    for recompute in options.recompute:
        mode, _, num_layers = recompute.partition(":")
        name = f"{mode} recompute of {num_layers} layers" if num_layers else f"{mode} recompute"
        sides[OURS if mode == "none" else f"{OURS}, {name}"] = {"recompute": recompute, **own}
    if options.keep_no_logits:
        sides[f"{OURS}, no logits kept"] = {"recompute": "none", "kept_logit_bytes": 0, **own}
    if options.glibc:
        sides[f"{OURS}, glibc's allocator"] = {"recompute": "none"}
    return sides


def run_side(work: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The outcome of one side in a process of its own."""
    if "trl_pairs" in work:
        command = [str(options.trl_python), "-m", "tools.benchmarks.train_step_trl"]
    else:
        command = [sys.executable, "-m", "tools.benchmarks.train_step", "--our-side"]
    done = subprocess.run(
        command,
        input=json.dumps(work),
        cwd=REPOSITORY,
        env=os.environ | (allocator_variables() if "allocator" in work else {}),
        capture_output=True,
        text=True,
        timeout=options.timeout,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def needed_flops(pairs: list[dict[str, list[int]]], folder: Path) -> float:
    """Floating-point operations of one forward and backward pass over the pairs, each prompt computed once, nothing recomputed."""
    from spin_megatron.plan.shape import ModelShape

    shape = ModelShape.from_huggingface(folder)
    attention = shape.hidden_size * (shape.num_heads + shape.num_kv_heads) * 2 * shape.head_dim
    layers = shape.num_layers * (attention + 3 * shape.hidden_size * shape.ffn_hidden_size)
    total = 0.0
    for pair in pairs:
        prompt, answers = len(pair["prompt"]), (len(pair["real"]) - 1, len(pair["generated"]) - 1)
        tokens, rows = prompt + sum(answers), sum(answers) + 2
        products = prompt * (prompt + 1) / 2 + sum(answer * prompt + answer * (answer + 1) / 2 for answer in answers)
        score = products * shape.num_layers * 2 * shape.num_heads * shape.head_dim
        total += 6 * (tokens * layers + rows * shape.hidden_size * shape.vocab_size + score)
    return total


def tokens_of(work: dict[str, Any]) -> dict[str, int]:
    """Tokens of a step: of x+y and x+y' (real), with the prompt once (needed), and in packs, padding included (computed)."""
    answers = [len(pair["real"]) + len(pair["generated"]) for pair in work["pairs"]]
    prompts = [len(pair["prompt"]) for pair in work["pairs"]]
    needed = sum(prompts) + sum(answers) - 2 * len(prompts)  # an answer's last token predicts nothing
    return {"real": 2 * sum(prompts) + sum(answers), "needed": needed, "computed": len(work["packs"]) * work["pack_tokens"]}


def summarise(found: dict[str, list[dict[str, Any]]], work: dict[str, Any]) -> dict[str, Any]:
    """A row a side: medians over rounds and steps, the first step left out; ratios to the fastest TRL side as its user starts it."""
    pairs, flops = work["pairs"], needed_flops(work["pairs"], Path(work["model"]))
    real_tokens = tokens_of(work)["real"]
    rows: dict[str, dict[str, Any]] = {}
    for name, outcomes in found.items():
        seconds = statistics.median(statistics.median(outcome["wall_seconds"][1:]) for outcome in outcomes)
        rows[name] = {
            "pairs_per_second": len(pairs) / seconds,
            "real_tokens_per_second": real_tokens / seconds,
            "cpu_seconds_per_step": statistics.median(statistics.median(outcome["cpu_seconds"][1:]) for outcome in outcomes),
            "peak_bytes": statistics.median(outcome["peak_bytes"] for outcome in outcomes),
            "rounds": len(outcomes),
            "needed_flops_per_second": flops / seconds,
            "losses": outcomes[0]["losses"],
        }
    best = fastest_peer(rows, with_tcmalloc=False)
    if best is not None:
        for row in rows.values():
            row["speed_ratio"] = row["pairs_per_second"] / rows[best]["pairs_per_second"]
            row["memory_ratio"] = row["peak_bytes"] / rows[best]["peak_bytes"]
    return rows


def fastest_peer(rows: dict[str, dict[str, Any]], *, with_tcmalloc: bool) -> str | None:
    """The fastest TRL side, as its user starts it or with tcmalloc; None where no such side was run."""
    peers = [name for name in rows if not name.startswith(OURS) and name.endswith(", tcmalloc") == with_tcmalloc]
    return max(peers, key=lambda name: float(rows[name]["pairs_per_second"]), default=None)


def disagreement(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Largest difference between the sides: reference log-probs of a response relative to their size, and losses."""
    outcomes = [outcomes[0] for outcomes in found.values()]
    base = outcomes[-1]
    result = {"reference_relative": 0.0, "loss": 0.0}
    for other in outcomes[:-1]:
        for part in ("reference_real", "reference_generated"):
            worst = max(abs(a - b) / abs(b) for a, b in zip(other[part], base[part], strict=True))
            result["reference_relative"] = max(result["reference_relative"], worst)
        result["loss"] = max(result["loss"], *(abs(a - b) for a, b in zip(other["losses"], base["losses"], strict=True)))
    return result


def table(rows: dict[str, Any], peak_tflops: float | None) -> str:
    """The README's table, in Markdown."""
    mfu = peak_tflops is not None
    lines = [f"| side | pairs/s (ratio) | real tokens/s | peak GiB (ratio) |{' MFU |' if mfu else ''}", "|---|---|---|---|" + "---|" * mfu]
    for name, row in rows.items():
        ratios = [f" ({row[kind]:.2f})" if kind in row else "" for kind in ("speed_ratio", "memory_ratio")]
        cells = [
            f"{row['pairs_per_second']:.3g}{ratios[0]}",
            f"{row['real_tokens_per_second']:.0f}",
            f"{row['peak_bytes'] / 2**30:.2f}{ratios[1]}",
        ]
        if peak_tflops is not None:
            cells.append(f"{row['needed_flops_per_second'] / peak_tflops / 1e12:.1%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name of tools.benchmarks.problem.SIZES (random weights) or a folder")
    for name, default in (
        ("pairs", 8),
        ("steps", 3),
        ("rounds", 1),
        ("threads", 2),
        ("pack-tokens", 2048),
        ("shorten", 1),
        ("timeout", 3600),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--trl-pairs", type=int, nargs="*", default=[1, 4], help="pairs of TRL's padded batches; none: without TRL")
    variants = ("gradient-checkpointing", "tcmalloc")
    parser.add_argument("--trl-variants", nargs="*", choices=variants, default=[], help="more rows, of one pair a batch")
    parser.add_argument("--trl-python", type=Path, default=Path(sys.executable), help="the interpreter that has TRL")
    parser.add_argument("--recompute", nargs="+", default=["none"], help="rows of ours: none, selective, full, or full:N for N layers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU (H100: 989 in bf16)")
    parser.add_argument("--out", type=Path, default=Path("train_step.json"))
    parser.add_argument("--glibc", action="store_true", help="a row of ours without tcmalloc, as on a machine that lacks it")
    parser.add_argument("--keep-no-logits", action="store_true", help="a row of ours with train.kept_logit_bytes = 0")
    parser.add_argument("--add", action="store_true", help="add rounds to those of the file, of the same problem")
    parser.add_argument("--our-side", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, write the JSON, print the table."""
    options = _parse()
    if options.our_side:
        work = json.load(sys.stdin)
        torch.set_num_threads(work["threads"])
        print(json.dumps(our_side(work)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(options.model, Path(scratch), options.device)
        vocab_size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        work = {name: getattr(options, name) for name in ("steps", "threads", "pack_tokens", "dtype", "device")}
        work |= {"model": str(folder), "beta": BETA, "learning_rate": LEARNING_RATE}
        packs = pairs_of_a_plan(
            options.pack_tokens, num_pairs=options.pairs, vocab_size=vocab_size, multiples=options.trl_pairs, shorten=options.shorten
        )
        work["packs"] = [[dict(zip(("prompt", "real", "generated"), pair, strict=True)) for pair in pack] for pack in packs]
        work["pairs"] = [pair for pack in work["packs"] for pair in pack]
        earlier = json.loads(options.out.read_text(encoding="utf-8")) if options.add else {}
        found: dict[str, list[dict[str, Any]]] = earlier.get("rounds", {})
        sides = sides_of(options)

        def outcome_of(name: str) -> dict[str, Any]:
            outcome = run_side(work | sides[name], options)
            print(f"{name}: {outcome['wall_seconds']}", file=sys.stderr)
            return outcome

        for _ in range(options.rounds):
            for name, outcome in results_of(list(sides), outcome_of, needed=[name for name in sides if name.startswith(OURS)]).items():
                found.setdefault(name, []).append(outcome)
        rows = summarise(found, work)
    about_sides = ("trl_pairs", "trl_variants", "trl_python", "recompute", "glibc", "keep_no_logits")
    left_out = (*about_sides, "our_side", "add", "rounds", "out", "timeout")
    problem = {name: value for name, value in vars(options).items() if name not in left_out}
    assert problem == earlier.get("problem", problem), f"{options.out} holds rounds of another problem: {earlier['problem']}"
    report = {
        "problem": problem,
        "torch": torch.__version__,
        "versions": next((outcomes[0]["versions"] for outcomes in found.values() if "versions" in outcomes[0]), {}),
        "device_name": device_name(options.device),
        "num_pairs": len(work["pairs"]),
        "tokens": tokens_of(work),
        "methods": rows,
        "disagreement": disagreement(found),
        "rounds": found,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(rows, options.peak_tflops))
    print(f"largest disagreement of the sides: {report['disagreement']}")


if __name__ == "__main__":
    main()
