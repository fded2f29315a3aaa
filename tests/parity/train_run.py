"""A run directory that stands just before train: theta_t as a tiny random Hugging Face folder, packed random pairs, a config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spin_megatron.config import RunConfig
from spin_megatron.config_file import validate_config
from spin_megatron.data.batches import pair_tokens
from spin_megatron.data.packing import plan_packs
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import Manifest, output_file, write_manifest
from spin_megatron.run.records import Pack, SpinPair, write_rows
from tests.parity.tiny_models import make_pairs, make_tiny_model

PACK_TOKENS = 96


def make_config(root: Path, **changes: dict[str, Any]) -> RunConfig:
    """A config for the run; changes are merged into its sections."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(root / "model")},
        "data": {"source": str(root / "data.jsonl"), "max_prompt_tokens": 20, "max_response_tokens": 30},
        "objective": {"beta": 0.1},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "warmup_fraction": 0.0},
        "train": {"precision": "fp32", "global_batch_pairs": 6, "pack_tokens": PACK_TOKENS, "schedule_epochs": 2, "save_every_steps": 2},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    return validate_config(sections, origin="test")


def make_run(
    root: Path,
    *,
    model: str = "llama2",
    num_pairs: int = 16,
    num_held_out: int = 5,
    iteration: int = 0,
    pack_tokens: int = PACK_TOKENS,
    model_options: Mapping[str, Any] | None = None,
) -> RunLayout:
    """Write theta_t and iter_t/pairs, with their manifests."""
    layout = RunLayout(root)
    make_tiny_model(model, layout.theta(iteration), **(model_options or {}))
    pairs = make_pairs(1, num_pairs=num_pairs, longest=50)
    held_out = make_pairs(2, num_pairs=num_held_out, longest=50)
    _write(pairs, layout.train_pairs(iteration), layout.train_packs(iteration), pack_tokens)
    _write(held_out, layout.held_out_pairs(iteration), layout.held_out_packs(iteration), pack_tokens)
    for stage, folder in (("export", layout.theta(iteration)), ("merge", layout.pairs(iteration))):
        files = tuple(output_file(folder, path) for path in sorted(folder.iterdir()))
        write_manifest(folder, Manifest(stage, iteration, None, key="test", settings={}, inputs={}, outputs=files))
    return layout


def _write(pairs: list[SpinPair], pairs_path: Path, packs_path: Path, pack_tokens: int) -> None:
    lengths = [(pair.pair_id, pair_tokens(pair, share_prompt=True)) for pair in pairs]
    write_rows(pairs_path, pairs, SpinPair)
    write_rows(packs_path, plan_packs(lengths, pack_tokens=pack_tokens, max_pairs_per_pack=None, seed=0), Pack)
