"""Logits of a distributed checkpoint, loaded by Megatron Core itself on one rank: the far side of a conversion's probe."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from spin_megatron.mcore.model import build_model
from spin_megatron.mcore.runtime import running
from spin_megatron.plan.shape import ModelShape, ParallelLayout


def megatron_logits(checkpoint: Path, shape: ModelShape, tokens_T: Tensor, *, rounded_to: torch.dtype = torch.float32) -> Tensor:
    """Load a torch_dist checkpoint with Megatron Core and compute fp32 logits on the CPU, in this process alone.

    Megatron Core unpickles the checkpoint's index, so the caller must trust the folder.

    Args:
        tokens_T: int64 [T]. rounded_to: dtype through which the weights go first, that of what they are compared with.

    Returns:
        [T, V] fp32, padding cut off.
    """
    with running(ParallelLayout(), device="cpu", seed=0) as runtime, torch.no_grad():
        (chunk,) = build_model(shape, runtime, dtype=torch.float32)
        state: dict[str, Any] = {name: value for name, value in chunk.sharded_state_dict().items() if not isinstance(value, ShardedObject)}
        loaded = dist_checkpointing.load({"model": state}, str(checkpoint), validate_access_integrity=False)
        missing, unexpected = chunk.load_state_dict(loaded["model"], strict=False)
        assert not unexpected and all(name.endswith("_extra_state") for name in missing), (missing, unexpected)
        for parameter in chunk.parameters():
            parameter.copy_(parameter.to(rounded_to))
        hidden: list[Tensor] = []
        chunk.decoder.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        length = tokens_T.numel()
        whole = torch.tensor([[0, 0, 0, length]])  # one branch: plain causal attention
        none = torch.zeros(1, dtype=torch.int64)
        chunk(tokens_T[None], torch.arange(length)[None], whole, none, none)
        weight_VH = chunk.shared_embedding_or_output_weight() if shape.tied_embeddings else chunk.output_layer.weight
        logits_TV: Tensor = hidden[0].squeeze(1) @ weight_VH[: shape.vocab_size].T
        return logits_TV
