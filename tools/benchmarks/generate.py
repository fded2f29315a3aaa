#!/usr/bin/env python3
"""Responses a second: the `generate` of transformers beside the built-in engine, on the same weights, prompts and threads in one run.

    python -m tools.benchmarks.generate [--model tiny|smollm2-135m|FOLDER] [--batch 16 --prompts 16 --new-tokens 128] [--eos-share 0.02]

Both sides draw at temperature 1 without filters (`sampled`; ours with a seed a row) or take the largest logit (`greedy`). With
--eos-share S, a share S of the vocabulary ends a response, so that lengths vary: transformers then waits for the longest of each batch.
Time is CPU seconds of the process (the machine may be shared) in rounds in which all take turns; a ratio is the median of a round's
own ratios. Random weights are enough: the work does not depend on their values. Greedy ids are compared, row by row.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from spin_megatron.generation import hf_loop
from spin_megatron.generation.engine import EngineSpec, Prompt, Sampling
from tools.benchmarks.problem import SIZES, device_name, model_folder

THEIRS, OURS = "transformers", "spin-megatron"
MODES = {"greedy": 0.0, "sampled": 1.0}
Tokens = list[tuple[int, ...]]


def make_prompts(options: argparse.Namespace, vocab_size: int) -> list[Prompt]:
    """Random prompts of --prompt-tokens LOW to HIGH tokens."""
    generator = random.Random(0)
    low, high = options.prompt_tokens
    lengths = [generator.randint(low, high) for _ in range(options.prompts)]
    return [Prompt(str(i), tuple(generator.randrange(1, vocab_size) for _ in range(length)), i) for i, length in enumerate(lengths)]


def transformers_side(folder: Path, options: argparse.Namespace, eos_ids: Sequence[int]) -> Callable[[list[Prompt], float], Tokens]:
    """Left-padded batches through `generate`, in the order of the prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))

    def answer(prompts: list[Prompt], temperature: float) -> Tokens:
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        responses: Tokens = []
        for start in range(0, len(prompts), options.batch):
            batch = [prompt.token_ids for prompt in prompts[start : start + options.batch]]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(tokens)) + list(tokens) for tokens in batch])
            mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in batch])
            with torch.inference_mode():
                output = model.generate(
                    ids, attention_mask=mask, max_new_tokens=options.new_tokens, eos_token_id=list(eos_ids), pad_token_id=0, **settings
                )
            responses += [up_to_eos(row, eos_ids) for row in output[:, longest:].tolist()]
        return responses

    return answer


def up_to_eos(tokens: Sequence[int], eos_ids: Sequence[int]) -> tuple[int, ...]:
    """The response without the padding behind it."""
    end = next((i for i, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tuple(tokens[: end + 1])


def our_side(folder: Path, options: argparse.Namespace, eos_ids: Sequence[int]) -> Callable[[list[Prompt], float], Tokens]:
    """The built-in engine."""
    engine = hf_loop.load(EngineSpec(folder, options.dtype, options.batch, options.prompt_tokens[1], options.new_tokens), folder, folder)
    print(f"ours: {engine.describe()}", file=sys.stderr)

    def answer(prompts: list[Prompt], temperature: float) -> Tokens:
        rows = {row.example_id: row for row in engine.generate(prompts, Sampling(temperature, 0, 1.0, options.new_tokens, tuple(eos_ids)))}
        return [rows[prompt.example_id].token_ids for prompt in prompts]

    return answer


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rates of both sides and modes, a value a round."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    prompts = make_prompts(options, config["vocab_size"])
    # Id 0 is no prompt token and, without a share, the one id in the way of a response of full length.
    eos_ids = list(range(1 + int(options.eos_share * config["vocab_size"])))
    sides = {THEIRS: transformers_side(folder, options, eos_ids), OURS: our_side(folder, options, eos_ids)}
    rates: dict[str, dict[str, list[float]]] = {mode: {side: [] for side in sides} for mode in MODES}
    responses: dict[tuple[str, str], Tokens] = {}
    for number in range(options.rounds):
        for mode, temperature in MODES.items():
            for side, answer in sides.items():
                start = time.process_time()
                responses[mode, side] = answer(prompts, temperature)
                rates[mode][side].append(sum(map(len, responses[mode, side])) / (time.process_time() - start))
        print(f"round {number + 1} done", file=sys.stderr)
    equal = sum(a == b for a, b in zip(responses["greedy", THEIRS], responses["greedy", OURS], strict=True))
    mean = statistics.mean(map(len, responses["sampled", OURS]))
    return {"rates": rates, "greedy_equal": equal, "mean_response_tokens": mean}


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """A row a mode: the median rates and the median of the rounds' ratios."""
    rows = {}
    for mode, sides in found["rates"].items():
        ratios = [ours / theirs for ours, theirs in zip(sides[OURS], sides[THEIRS], strict=True)]
        rows[mode] = {side: statistics.median(values) for side, values in sides.items()} | {"ratio": statistics.median(ratios)}
    return rows


def table(rows: dict[str, Any]) -> str:
    """Generated tokens per CPU second, as Markdown."""
    lines = [f"| mode | {THEIRS} | {OURS} | ratio |", "|---|---|---|---|"]
    lines += [f"| {mode} | {row[THEIRS]:.0f} | {row[OURS]:.0f} | {row['ratio']:.2f} |" for mode, row in rows.items()]
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help=f"{', '.join(SIZES)} (random weights) or a folder")
    for name, default in (("prompts", 16), ("batch", 16), ("new-tokens", 128), ("threads", 1), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(16, 64), metavar=("LOW", "HIGH"))
    parser.add_argument("--eos-share", type=float, default=0.0, help="share of the vocabulary that ends a response")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("generate.json"))
    return parser.parse_args()


def main() -> None:
    """Measure, write the JSON, print the table."""
    options = _parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, model_folder(options.model, Path(scratch)))
    rows = summarise(found)
    problem = {name: value for name, value in vars(options).items() if name != "out"}
    report = {"problem": problem, "torch": torch.__version__, "device_name": device_name("cpu"), "methods": rows, **found}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"greedy responses equal: {found['greedy_equal']} of {options.prompts}; mean response {found['mean_response_tokens']:.1f} tokens")


if __name__ == "__main__":
    main()
