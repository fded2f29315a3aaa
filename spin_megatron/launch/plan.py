"""`spin-megatron plan CONFIG --gpus N --gpu NAME`: which layouts of N GPUs fit, how fast each is, and what the whole run costs."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spin_megatron.config import RunConfig
from spin_megatron.config_file import load_config
from spin_megatron.launch.check import check_num_rows
from spin_megatron.plan.duration import Storage, gpu_hours
from spin_megatron.plan.hardware import GIGA, GPUS, Gpu, find_gpu
from spin_megatron.plan.layouts import Candidate, Refusal, by_recompute, describe
from spin_megatron.plan.memory import RankMemory
from spin_megatron.plan.precision import PRECISIONS
from spin_megatron.plan.run_plan import (
    DEFAULT_ANSWER_TOKENS,
    DEFAULT_EXAMPLES,
    DEFAULT_PROMPT_TOKENS,
    Lengths,
    Plan,
    make_plan,
    make_question,
    model_shape,
)
from spin_megatron.run.option_types import count, positive


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb's options to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser("plan", help="which layouts fit on N GPUs, how fast, and what the run costs")
    parser.add_argument("config", type=Path, help="a config file")
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="GPUs of training")
    parser.add_argument("--gpu", default="h100-80gb", metavar="NAME", help=f"one of {', '.join(GPUS)} (default: %(default)s)")
    parser.add_argument("--model-config", type=Path, metavar="JSON", help="a config.json, when model.path is not on this machine")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="default: train.precision")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), help="only this mode; default: the fastest that fits")
    examples = f"default: data.num_examples, the rows of a data.source on this machine, or {DEFAULT_EXAMPLES}"
    parser.add_argument("--examples", type=count, metavar="N", help=examples)
    parser.add_argument(
        "--prompt-tokens", type=positive, metavar="MEAN", help=f"default: {DEFAULT_PROMPT_TOKENS}, or the cap if that is less"
    )
    parser.add_argument(
        "--answer-tokens", type=positive, metavar="MEAN", help=f"default: {DEFAULT_ANSWER_TOKENS}, or the cap if that is less"
    )
    parser.add_argument("--generated-tokens", type=positive, metavar="MEAN", help="default: as --answer-tokens")
    parser.add_argument("--read-gb", type=positive, default=5.0, metavar="GB/s", help="what the storage reads in all (%(default)g)")
    parser.add_argument("--write-gb", type=positive, default=2.0, metavar="GB/s", help="what it writes (%(default)g)")
    parser.add_argument("--top", type=count, default=10, metavar="K", help="layouts shown (%(default)d)")
    parser.add_argument("--refused", action="store_true", help="show every refused layout with its reason")
    parser.add_argument("--json", action="store_true", help="for programs: everything, as JSON")
    parser.add_argument("--set", dest="overrides", metavar="SECTION.KEY=VALUE", action="append", default=[], help="override one setting")
    parser.set_defaults(handler=command)
    return parser


def command(arguments: argparse.Namespace) -> int:
    """Plan and print; 0, or 2 when no layout fits."""
    config = load_config(arguments.config, arguments.overrides)
    shape = model_shape(config, arguments.model_config)
    examples, examples_from = examples_of(config, arguments.examples)
    lengths = lengths_of(config, arguments, examples)
    question = make_question(config, shape, find_gpu(arguments.gpu), lengths, precision=arguments.precision)
    storage = Storage(arguments.read_gb * GIGA, arguments.write_gb * GIGA)
    plan = make_plan(config, question, arguments.gpus, storage=storage, recompute=arguments.recompute)
    if arguments.json:
        print(json.dumps(as_json(plan) | {"examples_from": examples_from}, indent=2))  # noqa: T201 (the answer of the command)
    else:
        from spin_megatron.plan.tables import print_plan

        print_plan(plan, examples_from=examples_from, top=arguments.top, show_refused=arguments.refused)
    return 0 if plan.search.candidates else 2


def examples_of(config: RunConfig, asked: int | None) -> tuple[int, str]:
    """Prompts to learn from, and what says that they are so many; prepare may find that some of a source's rows are of no use.

    Raises:
        ValueError: the source's rows are counted, and are too few.
    """
    if asked is not None:
        return asked, "--examples"
    if config.data.num_examples is not None:
        return config.data.num_examples, "data.num_examples"
    if (num_rows := check_num_rows(config)) is not None:
        return num_rows - config.data.num_held_out, "rows of data.source that are not held out"
    return DEFAULT_EXAMPLES, "assumed: data.source cannot be counted here, give --examples"


def lengths_of(config: RunConfig, arguments: argparse.Namespace, examples: int) -> Lengths:
    """Lengths from the command line, else the defaults, never beyond the config's caps.

    Raises:
        ValueError: a mean is.
    """
    prompt = arguments.prompt_tokens or min(DEFAULT_PROMPT_TOKENS, config.data.max_prompt_tokens)
    answer = arguments.answer_tokens or min(DEFAULT_ANSWER_TOKENS, config.data.max_response_tokens)
    lengths = Lengths(examples, prompt, answer, arguments.generated_tokens or answer)
    for name, mean, cap, field in (
        ("--prompt-tokens", lengths.prompt_tokens, config.data.max_prompt_tokens, "data.max_prompt_tokens"),
        ("--answer-tokens", lengths.real_tokens, config.data.max_response_tokens, "data.max_response_tokens"),
        ("--generated-tokens", lengths.generated_tokens, config.data.max_response_tokens, "data.max_response_tokens"),
    ):
        if mean > cap:
            raise ValueError(f"{name} {mean:g} must be at most {field}={cap}; it is a mean, the cap holds for every one.")
    return lengths


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes, times in seconds."""
    question = plan.question
    return {
        "gpus": plan.num_gpus,
        "gpu": asdict(question.gpu),
        "model": asdict(question.shape),
        "workload": asdict(question.workload),
        "layouts": [candidate_json(candidate, plan.num_gpus, question.gpu) for candidate in plan.search.candidates],
        "refused": [asdict(refusal) for refusal in plan.search.refusals],
        "own": _own_json(plan),
        "best": describe(plan.search.candidates[0]) if plan.search.candidates else None,
        "best_by_recompute": [
            candidate_json(mode, plan.num_gpus, question.gpu)
            for best in plan.search.candidates[:1]
            for mode in by_recompute(question, best)
        ],
        "ranks": [_memory_json(memory) for memory in plan.ranks],
        "iterations": [asdict(iteration) | {"total": iteration.total} for iteration in plan.iterations],
        "gpu_hours": gpu_hours(plan.iterations, plan.num_gpus),
        "warnings": plan.warnings,
    }


def candidate_json(candidate: Candidate, num_gpus: int, gpu: Gpu) -> dict[str, Any]:
    """One layout with its rates, as plain values."""
    step = candidate.step
    return {
        "layout": asdict(candidate.layout),
        "recompute": candidate.settings.recompute,
        "batch": asdict(candidate.batch),
        "memory": _memory_json(candidate.memory),
        "step": asdict(step) | {"total": step.total, "bubble_share": step.bubble_share},
        "tokens_per_second_per_gpu": step.tokens_per_second(num_gpus),
        "model_flops_utilisation": step.utilisation(num_gpus, gpu),
        "pairs_per_second": candidate.pairs_per_second,
    }


def _own_json(plan: Plan) -> dict[str, Any] | None:
    if isinstance(plan.own, Refusal):
        return asdict(plan.own)
    return None if plan.own is None else candidate_json(plan.own, plan.num_gpus, plan.question.gpu)


def _memory_json(memory: RankMemory) -> dict[str, Any]:
    return asdict(memory) | {"total": memory.total}
