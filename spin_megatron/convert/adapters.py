"""LoRA adapters of a checkpoint: merged into the weights they stood beside, and as a folder that PEFT reads.

A checkpoint of training with [lora] holds A [L, R, I] and B [L, O, R] of each adapted linear layer, in Megatron Core's order of rows.
Merged weights are W + (alpha / R) B A in fp32, rounded once; W is the base as it was trained beside: rounded to the training dtype.

Shapes: L layers, R rank, I inputs, O outputs.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from spin_megatron.convert.families import WholeParameter, cut_rows, parameters, row_blocks
from spin_megatron.convert.hf_io import HfFolder
from spin_megatron.convert.saved_checkpoint import SavedCheckpoint, SavedTensor
from spin_megatron.plan.adapters import FACTOR_A, FACTOR_B
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.manifest import atomic_path, write_json

PEFT_WEIGHTS_NAME, PEFT_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"


class MergedCheckpoint(SavedCheckpoint):
    """A checkpoint of adapters and the Hugging Face folder of its base, read as one checkpoint of the merged weights.

    Args:
        checkpoint: holds the adapters. base: the theta_t they were trained beside.
        alpha: of [lora]. dtype: what training kept the weights in, and what is read here.

    Raises:
        ValueError: as SavedCheckpoint, or no adapters in it.
    """

    def __init__(self, checkpoint: Path, base: Path, *, alpha: float, dtype: torch.dtype, trust: bool = False) -> None:
        super().__init__(checkpoint, trust=trust)
        self._adapters = SavedCheckpoint(checkpoint, trust=trust)
        self._base, self._alpha, self._dtype = HfFolder(base), alpha, dtype
        self._shape = ModelShape.from_huggingface(base)
        self._entries = {(entry.saved[0], entry.indices): entry for entry in parameters(self._shape)}
        if not any(key.endswith(FACTOR_B) for key in self._adapters.tensors):
            raise ValueError(f"{checkpoint} holds no adapters; it is a checkpoint of whole weights, which is exported without [lora].")
        stacks = (self._shape.num_layers, self._shape.num_experts or 0)
        self.tensors = {
            key: SavedTensor(key, dtype, (*stacks[: len(indices)], *entry.shape), chunks={})
            for (key, indices), entry in self._entries.items()
        }

    def identity(self) -> str:
        """Of the adapters and of their base."""
        return f"{self._adapters.identity()} {self._base.identity()}"

    def read_rows(self, key: str, indices: Sequence[int], start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a merged parameter, in the training dtype."""
        entry = self._entries[key, tuple(indices)]
        blocks = cut_rows(row_blocks(entry, self._shape), start, stop)
        rows = [self._base.get_slice(entry.sources[block.source].name, 0, block.start, block.stop) for block in blocks]
        own = torch.cat(rows).to(self._dtype)
        factors = read_factors(self._adapters, entry, start, stop)
        if factors is None:
            return own
        lora_a, lora_b = factors
        delta = (lora_b.float() * (self._alpha / lora_a.shape[0])) @ lora_a.float()
        return (own.float() + delta).to(self._dtype)


def read_factors(adapters: SavedCheckpoint, entry: WholeParameter, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
    """A [R, I] and rows [start, stop) of B [O, R] beside a parameter; None where it has no adapter."""
    key_a, key_b = (f"{entry.saved[0].removesuffix('weight')}{factor}" for factor in (FACTOR_A, FACTOR_B))
    if key_a not in adapters.tensors:
        return None
    rank = adapters.tensors[key_a].shape[1]
    return adapters.read_rows(key_a, entry.indices, 0, rank), adapters.read_rows(key_b, entry.indices, start, stop)


def write_peft(checkpoint: Path, base: Path, destination: Path, *, alpha: float) -> list[Path]:
    """Write the adapters as PEFT stores them, to be used beside `base`; returns the files.

    Layers that Megatron Core holds as one (q, k, v; gate, up) share their A and have their own rows of B.

    Args:
        checkpoint: as for MergedCheckpoint. base: recorded as the model they belong to.
    """
    adapters, shape = SavedCheckpoint(checkpoint), ModelShape.from_huggingface(base)
    tensors = dict(_peft_tensors(adapters, shape))
    rank = next(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    destination.mkdir(parents=True, exist_ok=True)
    with atomic_path(destination / PEFT_WEIGHTS_NAME) as aside:
        save_file(tensors, aside, metadata={"format": "pt"})
    write_json(destination / PEFT_CONFIG_NAME, config)
    return [destination / PEFT_WEIGHTS_NAME, destination / PEFT_CONFIG_NAME]


def _peft_tensors(adapters: SavedCheckpoint, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    for entry in parameters(shape):
        factors = read_factors(adapters, entry, 0, entry.shape[0])
        if factors is None:
            continue
        lora_a, lora_b = factors
        sizes = [block.stop - block.start for block in row_blocks(entry, shape)]
        rows: dict[str, list[Tensor]] = {}
        for block, part in zip(row_blocks(entry, shape), lora_b.split(sizes), strict=True):
            rows.setdefault(entry.sources[block.source].name, []).append(part)
        for name, parts in rows.items():
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            # safetensors stores no memory twice: each layer gets a copy of the A it shares.
            yield f"{prefix}.lora_A.weight", lora_a.clone()
            yield f"{prefix}.lora_B.weight", torch.cat(parts)
