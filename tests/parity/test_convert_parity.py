"""Megatron Core itself loads what the converter wrote, at any layout, and the converter reads what Megatron Core saved."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spin_megatron.convert.saved_checkpoint import SavedCheckpoint
from spin_megatron.convert.torch_dist import hf_to_torch_dist, torch_dist_to_hf
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.plan.model_config import Family
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from tests.parity.gloo import meeting_ports, run_ranks
from tests.unit.tiny_models import LLAMA3_SCALING, tiny_shape, write_model

WORLD = 4
DENSE = (
    ParallelLayout(tensor=2, pipeline=2),
    ParallelLayout(tensor=4),  # more ranks than the 2 key heads
    ParallelLayout(tensor=1, pipeline=2, data=2, virtual_pipeline=2),
)
EXPERTS = (ParallelLayout(tensor=2, data=2, expert=2, sequence=True), ParallelLayout(pipeline=2, data=2, expert=2))


@dataclass(frozen=True)
class Case:
    """A model's Hugging Face folder, the checkpoint made from it, and where ranks save their own."""

    name: str
    folder: Path
    converted: Path
    layouts: tuple[ParallelLayout, ...]

    def saved(self, index: int) -> Path:
        return self.converted.with_name(f"{self.name}_saved_{index}")


def _case(root: Path, family: Family, *, tied: bool) -> Case:
    shape = tiny_shape(family, tied=tied, scaling=LLAMA3_SCALING if family == "llama" else None)
    name = f"{family}_{'tied' if tied else 'untied'}"
    write_model(root / name, shape, dtype=torch.float32)
    hf_to_torch_dist(root / name, root / f"{name}_converted", show=False, workers=1)
    return Case(name, root / name, root / f"{name}_converted", DENSE if shape.num_experts is None else EXPERTS)


def _load_compare_and_save(case: Case, index: int, runtime: Runtime) -> list[str]:
    """Names of parameters that differ between Megatron Core's load of the converted folder and the slices of the source."""
    from megatron.core import dist_checkpointing

    from spin_megatron.mcore.checkpoint import _by_chunk, _save, _sharded_weights
    from spin_megatron.mcore.model import build_model, global_parameters, load_huggingface

    shape = ModelShape.from_huggingface(case.folder)
    chunks = build_model(shape, runtime, dtype=torch.float32)
    load_huggingface(chunks, case.folder, shape, runtime, show=False)
    expected = {name: parameter.detach().clone() for chunk in chunks for name, parameter in global_parameters(chunk, shape, runtime)}
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)
    asked = _by_chunk([_sharded_weights(chunk) for chunk in chunks])
    loaded = dist_checkpointing.load(asked, str(case.converted), strict="raise_unexpected")
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"], strict=False)
    different = [
        name
        for chunk in chunks
        for name, parameter in global_parameters(chunk, shape, runtime)
        if not torch.equal(parameter.detach(), expected[name])
    ]
    state = _by_chunk([_sharded_weights(chunk) for chunk in chunks])
    state["optimizer"] = _optimizer_like([_sharded_weights(chunk) for chunk in chunks])
    _save(case.saved(index), state, kind="training", facts={}, runtime=runtime)
    return different


def _optimizer_like(sharded: list[dict[str, Any]]) -> dict[str, Any]:
    """The same sharded tensors under an optimizer's keys, other values: what a training checkpoint holds besides the model."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    moments = {}
    for number, weights in enumerate(sharded):
        for name, value in weights.items():
            if isinstance(value, ShardedTensor):
                value.key = f"optimizer.state.exp_avg.{value.key}"
                value.data = value.data.detach() + 1
                moments[f"{number}.{name}"] = value
    return moments


def _on_every_layout(cases: list[Case], ports: list[int]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for case in cases:
        for index, layout in enumerate(case.layouts):
            os.environ["MASTER_PORT"] = str(ports.pop(0))  # a port serves one start of the process groups
            with running(layout, device="cpu", seed=1) as runtime:
                found[f"{case.name} at {layout}"] = _load_compare_and_save(case, index, runtime)
    return found


@pytest.mark.parametrize("expert", [False, True], ids=["dense", "experts"])
def test_megatron_core_loads_the_conversion_and_its_own_save_converts_back_bit_for_bit(tmp_path: Path, expert: bool) -> None:
    families: list[tuple[Family, bool]] = [("mixtral", False), ("qwen3_moe", True)] if expert else [("llama", False), ("qwen2", True)]
    cases = [_case(tmp_path, family, tied=tied) for family, tied in families]
    with meeting_ports(sum(len(case.layouts) for case in cases)) as ports:
        by_rank = run_ranks(_on_every_layout, WORLD, cases, ports, timeout=280)
    for rank, found in enumerate(by_rank):
        for where, different in found.items():
            assert different == [], f"rank {rank}, {where}: {different}"
    for case in cases:
        source = load_file(case.folder / "model.safetensors")
        for index, layout in enumerate(case.layouts):
            saved = SavedCheckpoint(case.saved(index), trust=True)
            assert any(key.startswith("optimizer.") for key in saved.tensors)
            back = tmp_path / f"{case.name}_back_{index}"
            torch_dist_to_hf(case.saved(index), case.folder, back, trust=True, show=False, workers=1)
            found_weights: dict[str, Tensor] = load_file(back / "model.safetensors")
            assert found_weights.keys() == source.keys()
            assert all(torch.equal(found_weights[name], weight) for name, weight in source.items()), f"{case.name} saved at {layout}"
