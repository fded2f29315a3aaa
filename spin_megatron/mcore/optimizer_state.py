"""The optimizer's state in the layout of the weights it belongs to, so that any other layout can load it.

Each state tensor of a parameter (and the fp32 main copy of a bf16 parameter) is saved like the parameter itself, under
`optimizer.state.<name>.<parameter's key>`. With the distributed optimizer the data-parallel ranks hold slices of the
flattened parameter, cut without regard to its shape; they are put together on the group's first rank to save, and cut
again after loading. So a checkpoint loads with the distributed optimizer on or off, with its state in the host's memory or on the
GPU, and at any TP, PP and DP.

Megatron Core's own DistributedOptimizer.sharded_state_dict is not used: where torch's optimizers stand in for Transformer
Engine's (0.16.1, 0.19.2) its load fails on their "step" tensor, `state_dict` wants a step that was made, all parameters
would share one step tensor that each of them counts up, and the state's names are Adam's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import nn

from spin_megatron.mcore.offload import holders
from spin_megatron.mcore.optimizer import Trainer, parts

_MAIN = "fp32_param"


@dataclass(frozen=True)
class Slot:
    """A parameter and what this rank's optimizer holds for it.

    main: the fp32 tensor the optimizer updates, flat with the distributed optimizer; None when this rank has no part of it.
    start: where main begins in the flattened parameter.
    inner: the torch optimizer whose `state[main]` belongs to it.
    group: the ranks that hold the slices of one parameter; None when this rank holds all of it.
    """

    parameter: nn.Parameter
    main: torch.Tensor | None
    start: int
    inner: torch.optim.Optimizer
    group: dist.ProcessGroup | None

    @property
    def has_own_main(self) -> bool:
        """Whether main holds more digits than the parameter; in fp32 it is the parameter, or a view of it."""
        return self.parameter.dtype != torch.float32


def slots(optimizer: MegatronOptimizer) -> Iterator[Slot]:
    """Every trainable parameter of this rank's model, in the same order on all ranks of a data-parallel group."""
    for part in parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            yield from _distributed_slots(part)
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            halves = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
            pairs = [pair for group, mains in halves for pair in zip(group, mains, strict=True)]
            pairs += [(parameter, parameter) for group in part.fp32_from_fp32_groups for parameter in group]
            yield from (Slot(parameter, main, 0, part.optimizer, None) for parameter, main in pairs)
        else:
            yield from (Slot(parameter, parameter, 0, part.optimizer, None) for parameter in part.get_parameters())


def _distributed_slots(part: Any) -> Iterator[Slot]:
    held = holders(part.optimizer)
    for buffer in part.buffers:
        for parameter in buffer.param_index_map:
            if parameter not in part.model_param_group_index_map:
                yield Slot(parameter, None, 0, part.optimizer, part.data_parallel_group)
                continue
            group_index, index = part.model_param_group_index_map[parameter]
            main, inner = held[part.optimizer.param_groups[group_index]["params"][index]]
            owned = part._get_model_param_range_map(parameter)["param"]  # noqa: SLF001 (no public name in 0.16 to 0.19)
            yield Slot(parameter, main, owned.start, inner, part.data_parallel_group)


def sharded_state_to_save(trainer: Trainer, sharded_weights: Sequence[dict[str, Any]], *, num_updates: int) -> dict[str, Any]:
    """The state as {name: {index: sharded tensor}}. Collective over data-parallel groups with the distributed optimizer.

    Args:
        sharded_weights: sharded_state_dict() of each model chunk.
        num_updates: updates made so far; before the first there is no state but the main parameters.
    """
    layouts = _layouts(sharded_weights)
    state: dict[str, Any] = {}
    for index, slot in enumerate(slots(trainer.optimizer)):
        for name in _names(slot, trainer.rule.state_names if num_updates else ()):
            own = None if slot.main is None else slot.main if name == _MAIN else slot.inner.state[slot.main][name]
            whole = _put_together(own, slot)
            if whole is not None:
                layout = layouts[id(slot.parameter)]
                state.setdefault(name, {})[str(index)] = make_sharded_optimizer_tensor(layout, whole, f"optimizer.state.{name}")
    return state


def sharded_state_to_load(trainer: Trainer, sharded_weights: Sequence[dict[str, Any]], *, num_updates: int) -> dict[str, Any]:
    """Like `sharded_state_to_save`, with CPU zeros of each whole parameter's shape to load into."""
    layouts = _layouts(sharded_weights)
    state: dict[str, Any] = {}
    for index, slot in enumerate(slots(trainer.optimizer)):
        if slot.main is None:
            continue
        for name in _names(slot, trainer.rule.state_names if num_updates else ()):
            # Zeros: rows of vocabulary padding that the saving layout did not have stay as they are here.
            room = torch.zeros(slot.parameter.shape, dtype=torch.float32, device="cpu")
            layout = layouts[id(slot.parameter)]
            state.setdefault(name, {})[str(index)] = make_sharded_optimizer_tensor(layout, room, f"optimizer.state.{name}")
    return state


def restore_state(trainer: Trainer, loaded: dict[str, Any], *, num_updates: int) -> None:
    """Copy a loaded state into the optimizer; its step count becomes num_updates."""
    for index, slot in enumerate(slots(trainer.optimizer)):
        if slot.main is None:
            continue
        tensors = {name: _cut(loaded[name][str(index)], slot) for name in _names(slot, trainer.rule.state_names if num_updates else ())}
        if _MAIN in tensors:
            with torch.no_grad():
                slot.main.copy_(tensors.pop(_MAIN))
        slot.inner.state.pop(slot.main, None)
        if num_updates:
            slot.inner.state[slot.main] = {name: tensor.to(slot.main.device, copy=True) for name, tensor in tensors.items()}
            _set_step(slot.inner, slot.main, num_updates)


def _set_step(inner: torch.optim.Optimizer, main: torch.Tensor, num_updates: int) -> None:
    """Torch's optimizers count steps with a tensor a parameter, Transformer Engine's and apex's with a number a group."""
    if isinstance(inner, torch.optim.Adam | torch.optim.RMSprop):
        inner.state[main]["step"] = torch.tensor(float(num_updates), dtype=torch.float32)
    else:
        for group in inner.param_groups:
            group["step"] = num_updates


def _names(slot: Slot, state_names: tuple[str, ...]) -> tuple[str, ...]:
    return (_MAIN, *state_names) if slot.has_own_main else state_names


def _layouts(sharded_weights: Sequence[dict[str, Any]]) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """id(parameter) -> how the parameter is sharded."""
    found = (value for chunk in sharded_weights for value in nested_values(chunk))
    return {id(value.data): value for value in found if isinstance(value, ShardedTensor | ShardedTensorFactory)}


def _put_together(own: torch.Tensor | None, slot: Slot) -> torch.Tensor | None:
    """The state tensor in the parameter's shape: on the rank that saves it, None on the others of the group."""
    if slot.group is None:
        assert own is not None
        return own
    whole = torch.zeros(slot.parameter.numel(), dtype=torch.float32, device=slot.parameter.device)
    if own is not None:
        whole[slot.start : slot.start + own.numel()] = own
    # As integers the sum of one slice and zeros is that slice bit for bit; as floats -0.0 would become 0.0.
    first = dist.get_process_group_ranks(slot.group)[0]
    dist.reduce(whole.view(torch.int32), dst=first, group=slot.group)
    return whole.view(slot.parameter.shape).cpu() if dist.get_rank() == first else None


def _cut(whole: torch.Tensor, slot: Slot) -> torch.Tensor:
    assert slot.main is not None
    if slot.group is None:
        return whole
    return whole.flatten()[slot.start : slot.start + slot.main.numel()]
