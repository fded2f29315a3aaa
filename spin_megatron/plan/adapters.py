"""Which matrices LoRA adapters stand beside, how large they are, and which models can have them.

An adapter adds scale * B A x to a frozen linear layer's W x (arXiv 2106.09685, equation 3), scale = alpha / rank. A is [rank, input],
B [output, rank]. Over tensor ranks they are split as W is: B with the rows of a column-parallel W, A with the columns of a
row-parallel W; the other factor is replicated (mcore/lora.py).
"""

from dataclasses import dataclass
from typing import Literal

from spin_megatron.plan.shape import ModelShape

Target = Literal["qkv", "proj", "fc1", "fc2"]
# Megatron Core's linear layers of a decoder layer, by the names of [lora] targets.
MODULES: dict[Target, str] = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
ROW_PARALLEL: tuple[Target, ...] = ("proj", "fc2")
# Names of an adapter's two factors below the name of its linear layer.
FACTOR_A, FACTOR_B = "adapter.lora_a", "adapter.lora_b"


@dataclass(frozen=True)
class AdapterShape:
    """What decides the adapters' sizes."""

    rank: int
    targets: tuple[Target, ...]

    def check(self, shape: ModelShape) -> None:
        """Refuse targets that the model has not.

        Raises:
            ValueError: names the target, what the model has there, and the targets to use.
        """
        refused = [target for target in self.targets if target in ("fc1", "fc2")]
        if shape.num_experts is not None and refused:
            raise ValueError(
                f"lora.targets={list(self.targets)} (config.toml [lora]): family {shape.family} has {shape.num_experts} experts where "
                f'{" and ".join(refused)} would be, and experts have no adapters here; use ["qkv", "proj"].'
            )
