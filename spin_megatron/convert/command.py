"""`spin-megatron convert`: hf-to-megatron, megatron-to-hf, inspect. tools/convert_checkpoint.py is the same command."""

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from spin_megatron.run.manifest import write_json, write_text
from spin_megatron.run.option_types import count, positive

logger = logging.getLogger(__name__)

DIGESTS_NAME = "tensor_digests.json"
DONE, BAD_INPUT = 0, 2
_TRUST = "open the pickled index of a torch_dist folder although no manifest vouches for it"


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add `convert` and its three directions to a parser's verbs; each sets `handler`."""
    parser: argparse.ArgumentParser = verbs.add_parser("convert", help="checkpoints: Hugging Face to Megatron Core, back, and inspect")
    directions = parser.add_subparsers(metavar="DIRECTION", required=True)
    to_megatron = directions.add_parser(
        "hf-to-megatron", help="a Hugging Face folder to a torch_dist checkpoint, which loads at any TP, PP, VPP and EP"
    )
    _add_folders(to_megatron, "Hugging Face folder: config.json and safetensors", files=".distcp", file_gigabytes=2)
    to_megatron.set_defaults(handler=hf_to_megatron)

    to_huggingface = directions.add_parser(
        "megatron-to-hf", help="the weights of a torch_dist checkpoint, converted or from training, to a Hugging Face folder"
    )
    _add_folders(to_huggingface, "torch_dist folder: holds metadata.json", files="safetensors", file_gigabytes=5)
    to_huggingface.add_argument("--model", metavar="DIR", type=Path, help="Hugging Face folder it was trained from (default: SRC's own)")
    to_huggingface.add_argument(
        "--dtype",
        choices=("stored", "source", "float32", "bfloat16", "float16"),
        default="stored",
        help="of the tensors written: as in SRC, as in the model it came from, or one for all (stored)",
    )
    to_huggingface.add_argument("--trust", action="store_true", help=_TRUST)
    to_huggingface.set_defaults(handler=megatron_to_hf)

    inspect = directions.add_parser("inspect", help="what a folder or file holds, of any format; exit code 2: problems")
    inspect.add_argument("path", metavar="DIR", type=Path)
    inspect.add_argument("--trust", action="store_true", help=_TRUST)
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.set_defaults(handler=inspect_command)
    return parser


def _add_folders(parser: argparse.ArgumentParser, source: str, *, files: str, file_gigabytes: float) -> None:
    """Options of both directions."""
    parser.add_argument("source", metavar="SRC", type=Path, help=source)
    parser.add_argument("destination", metavar="DST", type=Path, help="a new folder; an interrupted conversion goes on in it")
    parser.add_argument("--file-size", metavar="GB", type=positive, default=file_gigabytes, help=f"largest {files} file (%(default)g)")
    parser.add_argument("--workers", type=count, help="files written at once (up to 4, by the cores)")
    parser.add_argument("--verify", action="store_true", help=f"read both sides again, compare every tensor, write DST/{DIGESTS_NAME}")
    parser.add_argument("--probe", action="store_true", help="compare the logits of both sides on a few tokens; loads both models, fp32")


def hf_to_megatron(arguments: argparse.Namespace) -> int:
    """Handle `convert hf-to-megatron`."""
    from spin_megatron.convert.torch_dist import hf_to_torch_dist

    source, destination = arguments.source, arguments.destination
    hf_to_torch_dist(source, destination, max_file_bytes=round(arguments.file_size * 1e9), workers=arguments.workers)
    logger.info("%s is a torch_dist checkpoint of %s", destination, source)
    _check_result(arguments, _Sides(source, destination))
    return DONE


def megatron_to_hf(arguments: argparse.Namespace) -> int:
    """Handle `convert megatron-to-hf`."""
    from spin_megatron.convert.hf_io import model_card
    from spin_megatron.convert.torch_dist import torch_dist_to_hf

    source, destination = arguments.source, arguments.destination
    torch_dist_to_hf(
        source,
        arguments.model,
        destination,
        dtype=arguments.dtype,
        max_file_bytes=round(arguments.file_size * 1e9),
        workers=arguments.workers,
        trust=arguments.trust,
    )
    write_text(destination / "README.md", model_card(_card_facts(source)))
    logger.info("%s is a Hugging Face folder of %s", destination, source)
    _check_result(arguments, _Sides(destination, source, arguments.model, arguments.dtype, arguments.trust))
    return DONE


def _card_facts(checkpoint: Path) -> dict[str, Any]:
    """What the model card states: of a checkpoint of our training the settings, progress and versions that it records."""
    from spin_megatron.convert.saved_checkpoint import COMPLETE_NAME

    facts: dict[str, Any] = {"converted from": f"{checkpoint.resolve().name} (torch_dist)"}
    if not (checkpoint / COMPLETE_NAME).exists():
        return facts | {"training": "none that this checkpoint records"}
    recorded = json.loads((checkpoint / COMPLETE_NAME).read_text(encoding="utf-8"))
    facts |= {"method": "Self-Play Fine-Tuning (SPIN, arXiv 2401.01335)"}
    facts |= {f"progress: {name}": value for name, value in recorded.get("progress", {}).items()}
    software = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    return {**facts, **recorded["recipe"], "software": software}


@dataclass(frozen=True)
class _Sides:
    """The two sides of a finished conversion, and how the checkpoint is read."""

    huggingface: Path
    checkpoint: Path
    model: Path | None = None
    dtype: str = "stored"
    trust: bool = False


def _check_result(arguments: argparse.Namespace, sides: _Sides) -> None:
    """--verify and --probe."""
    from spin_megatron.convert.hf_io import HfFolder
    from spin_megatron.convert.verify import open_weights, verify_tensors

    if arguments.verify:
        weights = open_weights(sides.checkpoint, sides.model, dtype=cast(Any, sides.dtype), trust=sides.trust)
        digests = verify_tensors(HfFolder(sides.huggingface), weights, workers=arguments.workers)
        write_json(arguments.destination / DIGESTS_NAME, {"sha256": digests})
        logger.info("all %d tensors are equal on both sides; digests in %s", len(digests), arguments.destination / DIGESTS_NAME)
    if arguments.probe:
        from spin_megatron.convert.probe import probe

        found = probe(sides.huggingface, sides.checkpoint)
        difference, deviation = found.largest_difference, found.standard_deviation
        logger.info("logits differ by %.2g at most, their standard deviation is %.2g (%d tokens)", difference, deviation, found.num_tokens)


def inspect_command(arguments: argparse.Namespace) -> int:
    """Handle `convert inspect`: prints what is there; BAD_INPUT where something is wrong with it."""
    from spin_megatron.convert.inspect_folder import inspect_folder

    facts = inspect_folder(arguments.path, trust=arguments.trust)
    code = BAD_INPUT if facts["problems"] else DONE
    if arguments.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return code
    problems = facts.pop("problems")
    for name, value in facts.items():
        sys.stdout.write(f"{name + ':':<14} {_said(value)}\n")
    for problem in problems:
        sys.stdout.write(f"problem:       {problem}\n")
    return code


def _said(value: Any) -> str:
    """A value for people: numbers with thousands, a table as "11 tensors, 149,024 bytes, dtypes: 9 F32, 2 BF16"."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_said(item)}" if isinstance(item, dict) else f"{_said(item)} {name}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
