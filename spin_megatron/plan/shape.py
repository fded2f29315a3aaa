"""The shape of a model and how it is laid out over ranks: what every part needs to know before a weight is read.

`ModelShape.from_huggingface` reads a config.json and refuses, by name, everything that the Megatron side would silently compute
otherwise (plan/model_config.py). No torch here.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_megatron.plan.model_config import (
    Family,
    ModelConfig,
    RopeScaling,
    experts_of,
    family_of,
    head_dim_of,
    refuse_what_is_not_computed,
    rope_of,
    sliding_window_of,
)

# Where a converted checkpoint keeps config, tokenizer and tensor names of its source, for the way back.
SOURCE_FOLDER = "huggingface"


def model_folder(path: Path) -> Path:
    """Where config.json and the tokenizer of a model lie: its Hugging Face folder, or what a converted checkpoint keeps of it."""
    is_checkpoint = not (path / "config.json").exists() and (path / SOURCE_FOLDER / "config.json").exists()
    return path / SOURCE_FOLDER if is_checkpoint else path


@dataclass(frozen=True)
class ModelShape:
    """Everything of a decoder-only model that decides its parameters' shapes and its forward pass.

    ffn_hidden_size: width of a dense layer's gate; with experts, of no layer (see expert_ffn_hidden_size).
    sliding_window: W, a token sees itself and the W - 1 before it; None where the model has no window.
    num_experts, experts_per_token, expert_ffn_hidden_size: None for a dense model; every layer has experts or none has.
    """

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    num_experts: int | None = None
    experts_per_token: int | None = None
    expert_ffn_hidden_size: int | None = None

    @classmethod
    def from_huggingface(cls, folder: Path) -> "ModelShape":
        """Read the config.json of a Hugging Face model folder, or of a checkpoint that was converted from one.

        Raises:
            ValueError: no or broken config.json, an unknown architecture, or a setting this project does not compute.
        """
        path = model_folder(Path(folder)) / "config.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; give a Hugging Face model folder (config.json and *.safetensors).")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); fetch the model again.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds {type(values).__name__}, expected an object; fetch the model again.")
        return cls.from_config(values, str(path))

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str = "config.json") -> "ModelShape":
        """Read the values of a config.json; `where` names them in errors. Raises ValueError as from_huggingface does."""
        config = ModelConfig(values, where)
        family = family_of(config)
        refuse_what_is_not_computed(config, family)
        num_heads = config.count("num_attention_heads")
        num_kv_heads = config.count("num_key_value_heads", num_heads if family == "llama" else None, null=num_heads)
        hidden_size = config.count("hidden_size")
        if num_heads % num_kv_heads:
            raise config.refused("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads={num_heads}")
        theta, scaling = rope_of(config, family)
        num_layers = config.count("num_hidden_layers")
        num_experts, experts_per_token, expert_ffn = experts_of(config, family)
        return cls(
            family=family,
            num_layers=num_layers,
            hidden_size=hidden_size,
            ffn_hidden_size=config.count("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim_of(config, family, hidden_size, num_heads),
            vocab_size=config.count("vocab_size"),
            max_positions=config.count("max_position_embeddings"),
            norm_epsilon=config.number("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=config.flag("tie_word_embeddings"),
            qkv_bias=family == "qwen2",
            qk_norm=family in ("qwen3", "qwen3_moe"),
            sliding_window=sliding_window_of(config, family, num_layers),
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            expert_ffn_hidden_size=expert_ffn,
        )


@dataclass(frozen=True)
class ParallelLayout:
    """How a model is spread over ranks. data counts the model's copies; experts are spread over data x context ranks.

    stage_layers: layers of each pipeline stage in the model's order, first to last; with virtual stages those of pipeline rank 0, 1,
    ... first chunks, then of their second chunks, and so on. Empty: all stages have as many.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    context: int = 1
    expert: int = 1
    virtual_pipeline: int = 1
    stage_layers: tuple[int, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data * self.context

    def layers_of_chunk(self, num_layers: int, pipeline_rank: int, chunk: int = 0) -> int:
        """Layers of one model chunk of a pipeline rank; a rank holds `virtual_pipeline` chunks."""
        if self.stage_layers:
            return self.stage_layers[chunk * self.pipeline + pipeline_rank]
        return num_layers // (self.pipeline * self.virtual_pipeline)

    def layers_of_rank(self, num_layers: int, pipeline_rank: int) -> int:
        """Layers of all chunks of a pipeline rank."""
        return sum(self.layers_of_chunk(num_layers, pipeline_rank, chunk) for chunk in range(self.virtual_pipeline))

    def check(self, shape: ModelShape) -> None:
        """Refuse a layout that does not divide the model.

        Raises:
            ValueError: names the parallel.* field, the number of the model it must divide, and the valid choices.
        """
        for name in ("tensor", "pipeline", "data", "context", "expert", "virtual_pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}={getattr(self, name)} (config.toml [parallel]); use a number of at least 1.")
        self._check_tensor(shape)
        self._check_stages(shape)
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            found = f"parallel.virtual_pipeline={self.virtual_pipeline}"
            raise ValueError(f"{found} needs parallel.pipeline > 1 (config.toml [parallel]); use 1.")
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence=true splits over tensor ranks and parallel.tensor=1 (config.toml [parallel]); use false.")
        self._check_expert(shape)

    def check_training(self, shape: ModelShape, pack_tokens: int) -> None:
        """Refuse a layout that cannot train the model on such packs; some of them can score it.

        Raises:
            ValueError: as `check` and `check_pack`, or names parallel.sequence.
        """
        self.check(shape)
        self.check_pack(pack_tokens)
        if shape.num_experts is not None and self.tensor > 1 and not self.sequence:
            raise ValueError(
                f"parallel.sequence=false with parallel.tensor={self.tensor}: Megatron Core trains experts over tensor ranks with sequence "
                "parallelism only (config.toml [parallel]); use true."
            )

    def check_pack(self, pack_tokens: int) -> int:
        """What must divide a pack's tokens: two chunks a context rank, split again by sequence parallelism.

        Raises:
            ValueError: names train.pack_tokens and the nearest length that does.
        """
        unit = (2 * self.context if self.context > 1 else 1) * (self.tensor if self.sequence else 1)
        if pack_tokens % unit:
            raise ValueError(
                f"train.pack_tokens={pack_tokens} is not a multiple of {unit}, into which parallel.context={self.context} (two chunks a "
                f"rank) and parallel.sequence={str(self.sequence).lower()} (parallel.tensor={self.tensor} parts) split a pack "
                f"(config.toml); use {-(-pack_tokens // unit) * unit}."
            )
        return unit

    def _check_tensor(self, shape: ModelShape) -> None:
        if _tensor_divides(shape, self.tensor):
            return
        choices = _listed(n for n in range(1, shape.num_heads + 1) if _tensor_divides(shape, n))
        raise ValueError(
            f"parallel.tensor={self.tensor} does not divide model.num_heads={shape.num_heads} and the FFN's {_ffn(shape)}, or is neither "
            f"divisor nor multiple of model.num_kv_heads={shape.num_kv_heads} (config.toml [parallel]); use {choices}."
        )

    def _check_stages(self, shape: ModelShape) -> None:
        stages = self.pipeline * self.virtual_pipeline
        if self.stage_layers:
            if len(self.stage_layers) == stages and sum(self.stage_layers) == shape.num_layers and min(self.stage_layers) > 0:
                return
            raise ValueError(
                f"parallel.stage_layers={list(self.stage_layers)} has {len(self.stage_layers)} entries that add up to "
                f"{sum(self.stage_layers)} (config.toml [parallel]); give parallel.pipeline={self.pipeline} x "
                f"parallel.virtual_pipeline={self.virtual_pipeline} positive numbers that add up to model.num_layers={shape.num_layers}."
            )
        if shape.num_layers % stages:
            choices = _listed(n for n in range(1, shape.num_layers + 1) if shape.num_layers % (n * self.virtual_pipeline) == 0)
            raise ValueError(
                f"parallel.pipeline={self.pipeline} x parallel.virtual_pipeline={self.virtual_pipeline} does not divide "
                f"model.num_layers={shape.num_layers} (config.toml [parallel]); say in parallel.stage_layers how many layers each stage "
                f"has, or use parallel.pipeline {choices}."
            )

    def _check_expert(self, shape: ModelShape) -> None:
        if self.expert == 1:
            return
        if shape.num_experts is None:
            raise ValueError(f"parallel.expert={self.expert} but family {shape.family} has no experts (config.toml [parallel]); use 1.")
        ranks = self.data * self.context
        if shape.num_experts % self.expert or ranks % self.expert:
            choices = _listed(n for n in range(1, shape.num_experts + 1) if shape.num_experts % n == 0 and ranks % n == 0)
            raise ValueError(
                f"parallel.expert={self.expert} does not divide both model.num_experts={shape.num_experts} and parallel.data x "
                f"parallel.context={ranks} (config.toml [parallel]); use {choices}."
            )


def _ffn(shape: ModelShape) -> int:
    return shape.ffn_hidden_size if shape.expert_ffn_hidden_size is None else shape.expert_ffn_hidden_size


def _tensor_divides(shape: ModelShape, tensor: int) -> bool:
    """Megatron Core's rule: heads and FFN split evenly; fewer KV heads than ranks are shared by whole groups of ranks."""
    kv_fits = shape.num_kv_heads % tensor == 0 or tensor % shape.num_kv_heads == 0
    return shape.num_heads % tensor == 0 and _ffn(shape) % tensor == 0 and kv_fits


def _listed(choices: Iterable[int]) -> str:
    """Spell choices as "1, 2 or 4"."""
    names = [str(choice) for choice in choices]
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
