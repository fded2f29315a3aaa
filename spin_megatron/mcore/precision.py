"""FP8 for Megatron Core: which recipe its layers run under, and whether this machine computes it.

Megatron Core's TransformerBlock enters Transformer Engine's autocast for every layer, in a forward-only pass as in a step, so the
reference and the policy are quantised alike. What decides a layer's bits in a pass:
- activations are scaled from the pass's own numbers (no recipe here has state), by rows for the forward product; whether they are
  also quantised by columns, for the backward, changes nothing in the rows;
- weights are quantised at a pass's first micro-batch and kept for its others: the schedules call `set_is_first_microbatch` at the
  first micro-batch of every pass, also after a checkpoint was loaded. A copy made without gradients lacks the columns and is made
  anew (transformer_engine/pytorch/module/base.py, quantize_weight);
- the amax of a tensor under sequence parallelism is that of all tensor ranks.
So with the same weights, packs and layout the log-probs are the same bits, which `training.check_start` asserts.
"""

import logging
from dataclasses import dataclass
from typing import Any

from spin_megatron.mcore.layers import LayerSpec
from spin_megatron.plan.precision import PRECISIONS, PrecisionName

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fp8:
    """Linear layers in FP8. num_bf16_end_layers: so many of the first and of the last layers of the model stay bf16."""

    name: PrecisionName
    num_bf16_end_layers: int = 0

    @classmethod
    def chosen(cls, name: PrecisionName, num_bf16_end_layers: int) -> "Fp8 | None":
        """What `train.precision` asks for; None where nothing is FP8."""
        return None if PRECISIONS[name].fp8_recipe is None else cls(name, num_bf16_end_layers)

    def settings(self) -> dict[str, Any]:
        """Fields of TransformerConfig. Weights stay bf16 (fp8_param is off): checkpoints and exports hold them unrounded."""
        precision = PRECISIONS[self.name]
        return {
            "fp8": precision.fp8_format,
            "fp8_recipe": precision.fp8_recipe,
            "first_last_layers_bf16": self.num_bf16_end_layers > 0,
            "num_layers_at_start_in_bf16": self.num_bf16_end_layers,
            "num_layers_at_end_in_bf16": self.num_bf16_end_layers,
        }


def require_fp8(fp8: Fp8, spec: LayerSpec) -> None:
    """Ask Transformer Engine whether it computes the recipe here.

    Raises:
        ValueError: it does not, with its reason.
    """
    if spec.kind != "transformer_engine":
        raise ValueError(f'train.precision="{fp8.name}" needs Transformer Engine: {spec.reason}; use "bf16" or "fp32" here.')
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    question = {
        "fp8-blockwise": FP8GlobalStateManager.is_fp8_block_scaling_available,
        "fp8-tensorwise": FP8GlobalStateManager.is_fp8_available,
        "mxfp8": FP8GlobalStateManager.is_mxfp8_available,
    }[fp8.name]
    is_available, reason = question()
    if not is_available:
        raise ValueError(f'train.precision="{fp8.name}" is not computed here: {reason.rstrip(".")} (Transformer Engine); use "bf16".')
