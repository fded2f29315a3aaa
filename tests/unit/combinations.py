"""Settings that meet in one run, drawn from all their values, and by rules stated here a second time which of them are to blame."""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from spin_megatron.plan.shape import ModelShape
from tests.unit.tiny_models import config_of_transformers_4

Settings = dict[str, Any]

_DENSE = ModelShape("llama", 8, 256, 784, 8, 2, 32, 1000, 4096, 1e-5, 1e4)
SHAPES = {
    "dense": _DENSE,
    "experts": replace(_DENSE, family="mixtral", num_experts=4, experts_per_token=2, expert_ffn_hidden_size=784),
}
# The first value of each is what stands in DEFAULTS: legal with all other defaults.
VALUES: dict[str, tuple[Any, ...]] = {
    "model": ("dense", "experts"),
    "parallel.tensor": (1, 2, 3, 8),
    "parallel.sequence": (False, True),
    "parallel.pipeline": (1, 2, 3),
    "parallel.virtual_pipeline": (1, 2),
    "parallel.stage_layers": ((), (6, 2), (3, 3, 1, 1)),
    "parallel.context": (1, 2, 3),
    "parallel.expert": (1, 2, 3),
    "parallel.data": (1, 2),
    "parallel.overlap": ("auto", "on", "off"),
    "train.precision": ("bf16", "fp32", "fp8-blockwise", "fp8-tensorwise", "mxfp8", "fp8-delayed"),
    "train.num_bf16_end_layers": (0, 1, 5),
    "train.pack_tokens": (4096, 3072, 4098),
    "train.share_prompt": (True, False),
    "train.recompute": ("none", "selective", "full"),
    "train.distributed_optimizer": (True, False),
    "optimizer.name": ("rmsprop", "adamw"),
    "optimizer.offload_fraction": (0.0, 0.5, 1.0),
    "lora.rank": (0, 8),
    "lora.targets": (("qkv", "proj"), ("qkv", "proj", "fc1", "fc2")),
    "lora.dropout": (0.0, 0.1),
    "slurm.gpu": (None, "h100-80gb", "a100-80gb", "b200-180gb"),
    "generate.engine": ("builtin", "mistyped"),
    "guard.on_excess": ("warn", "skip", "stop"),
}
DEFAULTS: Settings = {name: values[0] for name, values in VALUES.items()}


def drawn(count: int, seed: int = 0) -> Iterator[Settings]:
    """So many combinations, most of them with several settings off their defaults."""
    generator = random.Random(seed)
    for _ in range(count):
        yield {name: generator.choice(values) if generator.random() < 0.3 else values[0] for name, values in VALUES.items()}


def pairs() -> Iterator[Settings]:
    """Every two values of any two settings, all others at their defaults."""
    for (one, ones), (other, others) in itertools.combinations(VALUES.items(), 2):
        for first, second in itertools.product(ones, others):
            yield {**DEFAULTS, one: first, other: second}


def layouts() -> Iterator[Settings]:
    """Every combination of what spreads a model over ranks."""
    names = [name for name in VALUES if name.startswith("parallel.") and name != "parallel.overlap"]
    for values in itertools.product(*(VALUES[name] for name in ("model", *names))):
        yield {**DEFAULTS, **dict(zip(("model", *names), values, strict=True))}


def faults(settings: Settings) -> set[str]:
    """The fields that are to blame; empty where the combination is legal."""
    return _layout_faults(settings) | _pack_faults(settings) | _precision_faults(settings) | _other_faults(settings)


def _layout_faults(settings: Settings) -> set[str]:
    tensor, pipeline, virtual, expert = (settings[f"parallel.{name}"] for name in ("tensor", "pipeline", "virtual_pipeline", "expert"))
    split, ranks = settings["parallel.stage_layers"], settings["parallel.data"] * settings["parallel.context"]
    has_experts = settings["model"] == "experts"
    blame = {
        "parallel.tensor": tensor == 3,  # 8 heads; 2 groups of keys are shared by 8 ranks, and 1, 2 and 8 divide the FFN
        "parallel.pipeline": not split and pipeline == 3,  # 8 layers
        "parallel.stage_layers": bool(split) and len(split) != pipeline * virtual,  # they do add up to 8
        "parallel.virtual_pipeline": virtual > 1 and pipeline == 1,
        "parallel.sequence": (tensor == 1) if settings["parallel.sequence"] else (has_experts and tensor > 1),
        "parallel.expert": expert > 1 and (not has_experts or 4 % expert > 0 or ranks % expert > 0),
        "parallel.overlap": settings["parallel.overlap"] == "on" and ranks == 1,
    }
    return {field for field, is_wrong in blame.items() if is_wrong}


def _pack_faults(settings: Settings) -> set[str]:
    context, tensor = settings["parallel.context"], settings["parallel.tensor"]
    pack, parts = settings["train.pack_tokens"], tensor if settings["parallel.sequence"] else 1
    # The longest pair: 1024 tokens of prompt, or twice as many, and two answers of 1024.
    is_short = pack < (3072 if settings["train.share_prompt"] else 4096)
    tokens = {"fp8-blockwise": 128, "fp8-tensorwise": 16, "mxfp8": 32}.get(settings["train.precision"], 1)
    is_cut = pack % ((2 * context if context > 1 else 1) * parts) > 0 or pack % (tokens * context * parts) > 0
    return {"train.pack_tokens"} if is_short or is_cut else set()


def _precision_faults(settings: Settings) -> set[str]:
    precision, gpu, tensor = settings["train.precision"], settings["slurm.gpu"], settings["parallel.tensor"]
    if not precision.startswith(("fp8", "mxfp8")):
        return {"train.num_bf16_end_layers"} if settings["train.num_bf16_end_layers"] else set()
    # An FFN of 784 is 49 x 16, halved 392; a GPU of none of these: Ampere has no FP8, Hopper no MXFP8.
    is_misfit = precision == "mxfp8" or tensor > 1
    generation = {None: 0, "a100-80gb": 8, "h100-80gb": 9, "b200-180gb": 10}[gpu]
    found = {"train.precision"} if is_misfit or precision == "fp8-delayed" or generation < (10 if precision == "mxfp8" else 9) else set()
    split, pipeline, virtual = (settings[f"parallel.{name}"] for name in ("stage_layers", "pipeline", "virtual_pipeline"))
    ends = [sum(split[rank::pipeline]) if split else 8 // pipeline for rank in (0, pipeline - 1)]
    if settings["train.num_bf16_end_layers"] > min(ends) or (split and len(split) != pipeline * virtual):
        found |= {"train.num_bf16_end_layers"} if settings["train.num_bf16_end_layers"] else set()
    if precision == "fp8-tensorwise" and settings["parallel.expert"] > 1:
        found.add("parallel.expert")
    return found


def _other_faults(settings: Settings) -> set[str]:
    is_offloaded, has_adapters = settings["optimizer.offload_fraction"] > 0, settings["lora.rank"] > 0
    cannot = settings["train.precision"] == "fp32" or not settings["train.distributed_optimizer"] or has_adapters
    blame = {
        "optimizer.offload_fraction": is_offloaded and (cannot or settings["slurm.gpu"] is None),
        "lora.targets": has_adapters and settings["model"] == "experts" and "fc1" in settings["lora.targets"],
        "lora.dropout": settings["lora.dropout"] > 0,
        "generate.engine": settings["generate.engine"] == "mistyped",
    }
    return {field for field, is_wrong in blame.items() if is_wrong}


def write_models(folder: Path) -> None:
    """The config.json of each shape, the data's file and a config that names no model yet."""
    for name, shape in SHAPES.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config_of_transformers_4(shape)), encoding="utf-8")
    (folder / "data.jsonl").touch()
    (folder / "config.toml").write_text('[data]\nsource = "data.jsonl"\n', encoding="utf-8")


def overrides(settings: Settings) -> list[str]:
    """The settings that are not at their defaults as --set arguments, and the model."""
    changed = [name for name, value in settings.items() if name != "model" and (value != DEFAULTS[name] or name == "lora.targets")]
    return [f"model.path={settings['model']}", *(f"{name}={json.dumps(settings[name])}" for name in changed)]
