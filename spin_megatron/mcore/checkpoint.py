"""Distributed checkpoints: weights, optimizer, random states and how far training got.

A training checkpoint is a folder `step_00000100` in Megatron Core's torch_dist format: weights under GPTModel's own keys,
`optimizer.state.*`, `rng.*`, and, written last, COMPLETE.json. A folder without that file is garbage of a process that
died, and is removed on resume. Tensors are stored whole and stacked over layers, so a checkpoint loads at any TP, PP, VPP
and DP; at the layout that saved it, it loads bit for bit. A weights checkpoint holds the weights alone, for export. Of a model with LoRA
adapters both hold the adapters in the weights' place: the frozen base is theta_t, whose digest is in the recipe.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from spin_megatron.convert.saved_checkpoint import COMPLETE_NAME, INDEX_NAME
from spin_megatron.data.progress import Progress
from spin_megatron.mcore.lora import has_adapters, sharded_adapters
from spin_megatron.mcore.optimizer import Trainer, gather_weights
from spin_megatron.mcore.optimizer_state import restore_state, sharded_state_to_load, sharded_state_to_save
from spin_megatron.mcore.runtime import Runtime
from spin_megatron.run.manifest import difference, digest_file, fsync_tree, installed_versions, write_json

logger = logging.getLogger(__name__)

SCHEMA = 2
# What Megatron Core unpickles when it loads a folder (0.19 writes no common.pt).
_PICKLES = (INDEX_NAME, "common.pt")
_PREFIX = "step_"


class _DirectSave(torch_strategies.TorchDistSaveShardedStrategy):
    """Writes torch_dist files from this process.

    Megatron Core's own writer starts a manager process and forks writers: 4 to 10 s for the first save, orphans when a rank
    is killed, and a hang without psutil. The files are the same.
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        tensors = torch_strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)[0]  # noqa: SLF001
        save_tensors(
            torch_strategies.mcore_to_pyt_state_dict(tensors, False),
            storage_writer=FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True, thread_count=1),
            planner=torch_strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_training(root: Path, trainer: Trainer, progress: Progress, runtime: Runtime, *, recipe: Mapping[str, Any], keep: int) -> Path:
    """Write the state of training below `root` and keep only the newest `keep` checkpoints there. Collective.

    Args:
        recipe: flat settings and input digests that the run must go on with; plain JSON values.

    Raises:
        OSError: the disk is full or the folder cannot be written; on every rank.
    """
    gather_weights(trainer)
    folder = root / f"{_PREFIX}{progress.step:08d}"
    sharded_weights = [_sharded_weights(chunk.module) for chunk in trainer.chunks]
    state = {**_by_chunk(sharded_weights), "rng": _sharded_random_state(runtime)}
    # With the distributed optimizer one rank of each data-parallel group saves for all; the others have nothing to add.
    if optimizer_state := sharded_state_to_save(trainer, sharded_weights, num_updates=progress.num_updates):
        state["optimizer"] = optimizer_state
    facts = {"progress": dataclasses.asdict(progress), "recipe": dict(recipe)}
    _save(folder, state, kind="training", facts=facts, runtime=runtime)
    if runtime.rank == 0:
        for old in _complete_folders(root)[:-keep]:
            _remove(old)
    return folder


def save_weights(folder: Path, chunks: Sequence[nn.Module], runtime: Runtime, *, recipe: Mapping[str, Any]) -> None:
    """Write the weights alone, as export reads them. Collective. The recipe is recorded as by `save_training`.

    Raises:
        OSError: as `save_training`.
    """
    _save(folder, _by_chunk([_sharded_weights(chunk) for chunk in chunks]), kind="weights", facts={"recipe": dict(recipe)}, runtime=runtime)


def require_recipe(folder: Path, recipe: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None) -> None:
    """Check that a whole checkpoint was made with this recipe; `defaults` as in `manifest.difference`.

    Raises:
        ValueError: it was not; the message lists the differences.
    """
    changed = difference(_read_facts(folder, kind=None)["recipe"], recipe, defaults=defaults)
    if changed:
        lines = "\n  ".join(f"{name}: {change}" for name, change in changed.items())
        raise ValueError(
            f"{folder} was made with other settings or inputs:\n  {lines}\nRestore them to go on from it, or remove the folder "
            f"{folder.parent} to train anew."
        )


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a whole checkpoint."""
    return (folder / COMPLETE_NAME).exists()


def newest_training(root: Path, runtime: Runtime) -> Path | None:
    """Remove half-written checkpoints below `root` and return the newest whole one, the same on all ranks. Collective."""
    step = -1
    if runtime.rank == 0 and root.exists():
        complete = _complete_folders(root)
        for folder in sorted(root.glob(f"{_PREFIX}*")):
            if folder not in complete:
                logger.warning("%s is half-written and is removed", folder)
                _remove(folder)
        if complete:
            step = _step_of(complete[-1])
    answer = torch.tensor([step], dtype=torch.int64, device=runtime.device)
    dist.broadcast(answer, src=0)
    return None if answer.item() < 0 else root / f"{_PREFIX}{int(answer.item()):08d}"


def load_training(
    folder: Path, trainer: Trainer, runtime: Runtime, *, recipe: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> Progress:
    """Load weights, optimizer and random states; recipe and defaults as in `require_recipe`. Collective.

    Raises:
        ValueError: the checkpoint is not one of training, was made with another recipe or schema, or its files are damaged.
    """
    facts = _read_facts(folder, kind="training")
    require_recipe(folder, recipe, defaults=defaults)
    progress = Progress(**facts["progress"])
    sharded_weights = [_sharded_weights(chunk.module) for chunk in trainer.chunks]
    state = {**_by_chunk(sharded_weights), "optimizer": sharded_state_to_load(trainer, sharded_weights, num_updates=progress.num_updates)}
    has_same_layout = facts["layout"] == json.loads(json.dumps(dataclasses.asdict(runtime.layout)))
    if has_same_layout:
        state["rng"] = _sharded_random_state(runtime)
    loaded = _load(folder, state)
    _restore_weights([chunk.module for chunk in trainer.chunks], loaded)
    restore_state(trainer, loaded.get("optimizer", {}), num_updates=progress.num_updates)
    if has_same_layout:
        _restore_random_state(loaded["rng"])
    elif runtime.rank == 0:
        logger.warning("%s was saved with %s; random states start anew (nothing depends on them: dropout is off)", folder, facts["layout"])
    return progress


def remove_training(root: Path) -> None:
    """Remove every training checkpoint below `root`; call it on one rank, when they are of no more use."""
    for folder in root.glob(f"{_PREFIX}*"):
        _remove(folder)


def _sharded_weights(chunk: nn.Module) -> dict[str, Any]:
    """The chunk's trained weights as sharded tensors: of an adapted model the adapters alone.

    `_extra_state` objects are left out: only FP8 recipes refused here fill them.
    """
    if has_adapters(chunk):
        return sharded_adapters(chunk)
    state: dict[str, Any] = chunk.sharded_state_dict()  # type: ignore[operator]
    return {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}


def _by_chunk(sharded_weights: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {f"model{index}": dict(weights) for index, weights in enumerate(sharded_weights)}


def _save(folder: Path, state: dict[str, Any], *, kind: Literal["training", "weights"], facts: dict[str, Any], runtime: Runtime) -> None:
    if runtime.rank == 0:
        if folder.exists():
            _remove(folder)
        folder.mkdir(parents=True)
    dist.barrier()
    try:
        dist_checkpointing.save(state, str(folder), sharded_strategy=_DirectSave("torch_dist", 1))
    except CheckpointException as error:  # not an Exception: torch derives it from BaseException
        reasons = [reason for reason, _ in error.failures.values()]
        raise next((reason for reason in reasons if isinstance(reason, OSError)), RuntimeError(f"{folder}: {reasons}")) from error
    if runtime.rank == 0:
        fsync_tree(folder)
        layout = dataclasses.asdict(runtime.layout)
        facts |= {"pickles": _pickle_digests(folder), "versions": installed_versions()}
        write_json(folder / COMPLETE_NAME, {"schema": SCHEMA, "kind": kind, "layout": layout, **facts})
    dist.barrier()


def _load(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    try:
        # Each rank asks for what it needs, the distributed optimizer's ranks not for all: nothing to validate across ranks.
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
    except CheckpointException as error:
        reasons = "; ".join(str(reason) for reason, _ in error.failures.values())
        raise ValueError(f"{folder} cannot be loaded ({reasons}); remove the folder to resume from the checkpoint before it.") from error
    except (dist_checkpointing.core.CheckpointingException, KeyError, EOFError) as error:
        raise ValueError(f"{folder} cannot be loaded ({error}); remove the folder to resume from the checkpoint before it.") from error
    return loaded


def _restore_weights(chunks: Sequence[nn.Module], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        trained = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
        missing = [name for name in missing if name in trained]
        assert not missing and not unexpected, f"missing {missing}, unexpected {unexpected}"


def _sharded_random_state(runtime: Runtime) -> dict[str, Any]:
    """This rank's generator states, one row each of a [ranks, bytes] tensor."""
    states = {"cpu": torch.get_rng_state(), **tensor_parallel.get_cuda_rng_tracker().get_states()}
    if runtime.device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state()
    row = (0, runtime.rank, runtime.world_size)
    return {name: ShardedTensor.from_rank_offsets(f"rng.{name}", value, row, prepend_axis_num=1) for name, value in states.items()}


def _restore_random_state(states: dict[str, torch.Tensor]) -> None:
    states = {name: state.cpu().view(-1) for name, state in states.items()}
    torch.set_rng_state(states.pop("cpu"))
    if "device" in states:
        torch.cuda.set_rng_state(states.pop("device"))
    tensor_parallel.get_cuda_rng_tracker().set_states(states)


def _complete_folders(root: Path) -> list[Path]:
    """Whole training checkpoints, oldest first."""
    return sorted((folder for folder in root.glob(f"{_PREFIX}*") if is_complete(folder)), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _read_facts(folder: Path, *, kind: Literal["training", "weights"] | None) -> dict[str, Any]:
    path = folder / COMPLETE_NAME
    if not path.exists():
        raise ValueError(f"{folder} is no whole checkpoint ({COMPLETE_NAME} is missing); remove it.")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if facts.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {facts.get('schema')}, this version reads {SCHEMA}; use the version that wrote it.")
    if _pickle_digests(folder) != facts["pickles"]:
        raise ValueError(f"{folder}: {' or '.join(_PICKLES)} changed since it was saved, and is not unpickled; remove the folder.")
    if kind is not None and facts["kind"] != kind:
        raise ValueError(f"{folder} is a {facts['kind']} checkpoint, expected a {kind} checkpoint.")
    return facts


def _pickle_digests(folder: Path) -> dict[str, str]:
    return {name: digest_file(folder / name) for name in _PICKLES if (folder / name).exists()}


def _remove(folder: Path) -> None:
    """The marker goes first: a removal that is interrupted leaves garbage, not a checkpoint with holes."""
    (folder / COMPLETE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)
