#!/usr/bin/env python3
"""Responses a second: the `generate` of transformers beside the built-in engine, on the same weights, prompts and threads in one run.

    python -m tools.benchmarks.generate [--model tiny|smollm2-135m|FOLDER] [--batch 16 --prompts 16 --new-tokens 128] [--mix 8]

Both sides draw at temperature 1 without filters (`sampled`; ours with a seed a row) or take the largest logit (`greedy`). Each response
has the same length on both sides: the logit of EOS is set so that it comes where planned. By default all are --new-tokens long; with
--mix S prompts and responses have UltraChat-like lengths, divided by S, and rows end at different times: transformers then waits
for the longest of each batch, while the built-in engine refills its slots.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from spin_megatron.generation import hf_loop
from spin_megatron.generation.decoder import Decoder
from spin_megatron.generation.engine import EngineSpec, Prompt, Sampling
from spin_megatron.run.records import TokenIds
from tools.benchmarks.problem import SIZES, device_name, model_folder, ultrachat_like_lengths

THEIRS, OURS = "transformers", "spin-megatron"
MODES = {"greedy": 0.0, "sampled": 1.0}
EOS = 0  # no prompt holds it
Tokens = list[TokenIds]
# Prompt -> the length of its response, EOS included.
Requests = Mapping[TokenIds, int]


def make_requests(options: argparse.Namespace, vocab_size: int) -> Requests:
    """Random prompts with the lengths of their responses: UltraChat-like ones, or a few tens of tokens and --new-tokens."""
    generator = random.Random(0)
    if options.mix:
        mix = ultrachat_like_lengths(options.prompts, seed=0)
        lengths = [(-(-one.prompt // options.mix), -(-one.generated // options.mix)) for one in mix]
    else:
        lengths = [(generator.randint(16, 64), options.new_tokens) for _ in range(options.prompts)]
    return {tuple(generator.randrange(1, vocab_size) for _ in range(prompt)): response for prompt, response in lengths}


def end_where_planned(logits_NV: Tensor, is_last: Sequence[bool]) -> Tensor:
    """The logits with EOS as the only choice of the rows that end, and no choice of the others."""
    logits_NV[:, EOS] = torch.tensor([1e4 if last else -1e4 for last in is_last], dtype=logits_NV.dtype)
    return logits_NV


class PlannedEnds(LogitsProcessor):
    """Ends each row of a batch of transformers' `generate` after as many tokens as planned."""

    def __init__(self, prompt_length: int, num_tokens: Sequence[int]) -> None:
        self._prompt_length = prompt_length
        self._num_tokens = num_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See LogitsProcessor."""
        done = input_ids.shape[1] - self._prompt_length
        return end_where_planned(scores, [done + 1 == num_tokens for num_tokens in self._num_tokens])


def ending_decoder(requests: Requests) -> type[Decoder]:
    """The built-in engine's decoder, each of whose rows ends after as many tokens as planned."""
    last_position: dict[int, int] = {}  # slot -> position of the token before EOS

    class EndingDecoder(Decoder):
        @torch.inference_mode()
        def prefill(self, token_ids: Sequence[int], slot: int) -> Tensor:
            last_position[slot] = len(token_ids) + requests[tuple(token_ids)] - 2
            return end_where_planned(super().prefill(token_ids, slot), [requests[tuple(token_ids)] == 1])

        @torch.inference_mode()
        def step(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], *, width: int) -> Tensor:
            logits_NV = super().step(tokens, positions, slots, width=width)
            is_last = [last_position.get(slot) == position for slot, position in zip(slots, positions, strict=True)]
            return end_where_planned(logits_NV, is_last)

    return EndingDecoder


def transformers_side(folder: Path, options: argparse.Namespace, requests: Requests) -> Callable[[float], Tokens]:
    """Left-padded batches through `generate`, in the order of the prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))

    def answer(temperature: float) -> Tokens:
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        responses: Tokens = []
        for start in range(0, len(requests), options.batch):
            batch, lengths = list(requests)[start : start + options.batch], list(requests.values())[start : start + options.batch]
            longest = max(map(len, batch))
            ids = torch.tensor([[EOS] * (longest - len(tokens)) + list(tokens) for tokens in batch])
            mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in batch])
            settings |= {"max_new_tokens": max(lengths), "logits_processor": LogitsProcessorList([PlannedEnds(longest, lengths)])}
            with torch.inference_mode():
                output = model.generate(ids, attention_mask=mask, eos_token_id=EOS, pad_token_id=EOS, **settings)
            responses += [tuple(row[: row.index(EOS) + 1]) for row in output[:, longest:].tolist()]
        return responses

    return answer


def our_side(folder: Path, options: argparse.Namespace, requests: Requests) -> Callable[[float], Tokens]:
    """The built-in engine."""
    longest = max(requests.values())
    spec = EngineSpec(folder, options.dtype, options.batch, max(map(len, requests)), longest)
    engine = hf_loop.load(spec, folder, folder, decoder_type=ending_decoder(requests))
    print(f"ours: {engine.describe()}", file=sys.stderr)
    prompts = [Prompt(str(number), token_ids, number) for number, token_ids in enumerate(requests)]

    def answer(temperature: float) -> Tokens:
        rows = {row.example_id: row for row in engine.generate(prompts, Sampling(temperature, 0, 1.0, longest, (EOS,)))}
        return [rows[prompt.example_id].token_ids for prompt in prompts]

    return answer


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rates of both sides and modes, a value a round."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    requests = make_requests(options, config["vocab_size"])
    sides = {THEIRS: transformers_side(folder, options, requests), OURS: our_side(folder, options, requests)}
    rates: dict[str, dict[str, list[float]]] = {mode: {side: [] for side in sides} for mode in options.modes}
    responses: dict[tuple[str, str], Tokens] = {}
    for number in range(options.rounds):
        for mode in options.modes:
            for side, answer in sides.items():
                start = time.process_time()
                responses[mode, side] = answer(MODES[mode])
                rates[mode][side].append(sum(requests.values()) / (time.process_time() - start))
        print(f"round {number + 1} done", file=sys.stderr)
    for found in responses.values():
        assert list(map(len, found)) == list(requests.values())
    both = [responses.get(("greedy", side), []) for side in sides]
    equal = sum(theirs == ours for theirs, ours in zip(*both, strict=True)) if "greedy" in options.modes else None
    return {"rates": rates, "greedy_equal": equal, "mean_response_tokens": statistics.mean(requests.values())}


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """A row a mode: the median rates, and the median, least and largest of the rounds' ratios."""
    rows = {}
    for mode, sides in found["rates"].items():
        ratios = [ours / theirs for ours, theirs in zip(sides[OURS], sides[THEIRS], strict=True)]
        rows[mode] = {side: statistics.median(values) for side, values in sides.items()}
        rows[mode] |= {"ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)]}
    return rows


def table(rows: dict[str, Any]) -> str:
    """Generated tokens per CPU second, as Markdown."""
    lines = [f"| mode | {THEIRS} | {OURS} | ratio (of the rounds) |", "|---|---|---|---|"]
    for mode, row in rows.items():
        low, high = row["ratios"]
        lines.append(f"| {mode} | {row[THEIRS]:.0f} | {row[OURS]:.0f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help=f"{', '.join(SIZES)} (random weights) or a folder")
    for name, default in (("prompts", 16), ("batch", 16), ("new-tokens", 128), ("threads", 1), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mix", type=int, metavar="S", help="UltraChat-like lengths of prompts and responses, divided by this")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("generate.json"))
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, write the JSON, print the table."""
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, model_folder(options.model, Path(scratch)))
    rows = summarise(found)
    unused = {"out", "new_tokens"} if options.mix else {"out"}
    problem = {name: value for name, value in vars(options).items() if name not in unused}
    report = {"problem": problem, "torch": torch.__version__, "device_name": device_name("cpu"), "methods": rows, **found}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"greedy responses equal: {found['greedy_equal']} of {options.prompts}; mean response {found['mean_response_tokens']:.1f} tokens")


if __name__ == "__main__":
    main()
