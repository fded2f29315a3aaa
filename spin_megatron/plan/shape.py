"""The shape of a model and how it is laid out over ranks: what every part needs to know before a weight is read.

`ModelShape.from_huggingface` reads a config.json written by transformers 4.x (`rope_theta`, `rope_scaling`,
`num_experts`) or 5.x (`rope_parameters`, `num_local_experts`) and refuses, by name, everything that the Megatron side
would silently compute otherwise. No torch here.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

# Where a converted checkpoint keeps config, tokenizer and tensor names of its source, for the way back.
SOURCE_FOLDER = "huggingface"
Family = Literal["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"]

ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# What transformers takes where a config.json says nothing (the same in 4.46, 4.57 and 5.x).
_DEFAULT_ROPE_THETA: dict[Family, float] = {"mixtral": 1_000_000.0}
_DEFAULT_SLIDING_WINDOW: dict[Family, int] = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096, "qwen3_moe": 4096}
_DEFAULT_HEAD_DIM: dict[Family, int] = {"qwen3": 128}
# Families whose window is off unless use_sliding_window is true, and those that keep the first max_window_layers free of it.
_WINDOW_SWITCH: tuple[Family, ...] = ("qwen2", "qwen3", "qwen3_moe")
_WINDOW_FROM_LAYER: tuple[Family, ...] = ("qwen2", "qwen3")


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies. linear: divide by factor. llama3: Llama 3.1's smooth split, all fields set."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_positions: int | None = None


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
        config = _Config(values, where)
        family = _family(config)
        _refuse_what_is_not_computed(config, family)
        num_heads = config.count("num_attention_heads")
        num_kv_heads = config.count("num_key_value_heads", num_heads if family == "llama" else None, null=num_heads)
        hidden_size = config.count("hidden_size")
        if num_heads % num_kv_heads:
            raise config.refused("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads={num_heads}")
        theta, scaling = _rope(config, family)
        num_layers = config.count("num_hidden_layers")
        num_experts, experts_per_token, expert_ffn = _experts(config, family)
        return cls(
            family=family,
            num_layers=num_layers,
            hidden_size=hidden_size,
            ffn_hidden_size=config.count("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(config, family, hidden_size, num_heads),
            vocab_size=config.count("vocab_size"),
            max_positions=config.count("max_position_embeddings"),
            norm_epsilon=config.number("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=config.flag("tie_word_embeddings"),
            qkv_bias=family == "qwen2",
            qk_norm=family in ("qwen3", "qwen3_moe"),
            sliding_window=_sliding_window(config, family, num_layers),
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


@dataclass(frozen=True)
class _Config:
    """Typed access to the values of one config.json; every refusal names the file, the field and the value."""

    values: Mapping[str, Any]
    where: str

    def refused(self, name: str, value: object, expected: str) -> ValueError:
        return ValueError(f"{self.where}: {name}={value!r} is not supported; expected {expected}.")

    def count(self, name: str, default: int | None = None, *, null: int | None = None) -> int:
        """A positive integer; `default` when the field is absent, `null` when it is null. Neither given: refused."""
        if name not in self.values and default is not None:
            return default
        value = self.values.get(name)
        if value is None and name in self.values and null is not None:
            return null
        if name not in self.values:
            raise ValueError(f"{self.where} lacks {name!r}; it decides the weights' shapes. Fetch the model's own config.json.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refused(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.refused(name, value, "a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refused(name, value, "true or false")
        return bool(value)


def _family(config: _Config) -> Family:
    family = config.values.get("model_type")
    architectures = config.values.get("architectures")
    known = ", ".join(sorted(ARCHITECTURES))
    if family not in ARCHITECTURES:
        raise ValueError(f"{config.where}: model_type={family!r} (architectures={architectures!r}) is unknown here; known are {known}.")
    found = cast(Family, family)
    if architectures is not None and architectures != [ARCHITECTURES[found]]:
        raise config.refused("architectures", architectures, f"[{ARCHITECTURES[found]!r}] for model_type {family!r}")
    return found


def _refuse_what_is_not_computed(config: _Config, family: Family) -> None:
    values = config.values
    if values.get("hidden_act") not in (None, "silu"):
        raise config.refused("hidden_act", values["hidden_act"], "'silu'")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise config.refused(name, values[name], f"false ({family} with this bias has parameters Megatron Core's layer lacks)")
    for name in ("quantization_config", "auto_map"):
        if values.get(name):
            cure = "plain float weights" if name == "quantization_config" else "code of transformers itself (no remote code is run)"
            raise config.refused(name, values[name], f"no such entry: {cure}")
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise config.refused("partial_rotary_factor", values["partial_rotary_factor"], "1 (the whole head is rotated)")
    if family == "qwen3_moe":
        if values.get("norm_topk_prob") is not True:
            raise config.refused("norm_topk_prob", values.get("norm_topk_prob"), "true (softmax over the chosen experts)")
        if values.get("mlp_only_layers") or values.get("decoder_sparse_step", 1) != 1:
            found = (values.get("mlp_only_layers"), values.get("decoder_sparse_step"))
            raise config.refused("mlp_only_layers, decoder_sparse_step", found, "[] and 1 (experts in every layer)")


def _head_dim(config: _Config, family: Family, hidden_size: int, num_heads: int) -> int:
    if config.values.get("head_dim") is None and family not in _DEFAULT_HEAD_DIM and hidden_size % num_heads:
        raise config.refused("hidden_size", hidden_size, f"a multiple of num_attention_heads={num_heads}, or a head_dim")
    default = _DEFAULT_HEAD_DIM.get(family, hidden_size // num_heads)
    head_dim = config.count("head_dim", default, null=default)
    if head_dim % 2:
        raise config.refused("head_dim", head_dim, "an even number (rotary embeddings turn pairs)")
    return head_dim


def _rope(config: _Config, family: Family) -> tuple[float, RopeScaling | None]:
    """Base and scaling from either dialect. Both present must agree: readers of either would compute differently."""
    new, old = config.values.get("rope_parameters"), config.values.get("rope_scaling")
    for name, entry in (("rope_parameters", new), ("rope_scaling", old)):
        if entry is not None and (not isinstance(entry, dict) or any(isinstance(value, dict) for value in entry.values())):
            raise config.refused(name, entry, "one flat set of numbers for all layers")
    top_theta = config.values.get("rope_theta")
    inner_theta = (new or {}).get("rope_theta")
    if None not in (top_theta, inner_theta) and top_theta != inner_theta:
        raise config.refused("rope_theta", top_theta, f"the same as rope_parameters.rope_theta={inner_theta!r}, or only one of them")
    theta = next((value for value in (inner_theta, top_theta) if value is not None), _DEFAULT_ROPE_THETA.get(family, 10_000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise config.refused("rope_theta", theta, "a positive number")
    scaling = _rope_scaling(config, new or old or {}, "rope_parameters" if new else "rope_scaling")
    if new and old and scaling != _rope_scaling(config, old, "rope_scaling"):
        raise config.refused("rope_scaling", old, f"the same scaling as rope_parameters={new!r}, or only one of them")
    return float(theta), scaling


def _rope_scaling(config: _Config, entry: Mapping[str, Any], name: str) -> RopeScaling | None:
    kind = entry.get("rope_type", entry.get("type", "default"))
    nested = _Config(entry, f"{config.where}: {name}")
    if entry.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise nested.refused("partial_rotary_factor", entry["partial_rotary_factor"], "1 (the whole head is rotated)")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", nested.number("factor"))
    if kind != "llama3":
        raise nested.refused("rope_type", kind, "'default', 'linear' or 'llama3'")
    low, high = nested.number("low_freq_factor"), nested.number("high_freq_factor")
    if low >= high:
        raise nested.refused("low_freq_factor", low, f"less than high_freq_factor={high}")
    return RopeScaling("llama3", nested.number("factor"), low, high, nested.count("original_max_position_embeddings"))


def _sliding_window(config: _Config, family: Family, num_layers: int) -> int | None:
    """The window all layers share, None without one; refused when only some layers have it."""
    kinds = config.values.get("layer_types")
    off = family in _WINDOW_SWITCH and not config.flag("use_sliding_window")
    is_null = "sliding_window" in config.values and config.values["sliding_window"] is None
    window = None if off or is_null else config.count("sliding_window", _DEFAULT_SLIDING_WINDOW.get(family, 0)) or None
    if kinds is None and window is not None and family in _WINDOW_FROM_LAYER:
        first = config.values.get("max_window_layers", 28)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if kinds is None:
        return window
    if kinds not in ([kind] * num_layers for kind in ("full_attention", "sliding_attention")):
        raise config.refused("layer_types (or max_window_layers)", kinds, "the same attention, full or sliding, in every layer")
    if kinds[0] == "full_attention":
        return None
    if window is None:
        raise config.refused("sliding_window", window, "a positive integer, as layer_types asks for sliding_attention")
    return window


def _experts(config: _Config, family: Family) -> tuple[int | None, int | None, int | None]:
    """(num_experts, experts_per_token, expert_ffn_hidden_size); Nones for a dense family."""
    if family not in ("mixtral", "qwen3_moe"):
        return None, None, None
    old, new = config.values.get("num_experts"), config.values.get("num_local_experts")
    if None not in (old, new) and old != new:
        raise config.refused("num_experts", old, f"the same as num_local_experts={new!r}, or only one of them")
    num_experts = config.count("num_experts" if new is None else "num_local_experts")
    experts_per_token = config.count("num_experts_per_tok")
    if experts_per_token > num_experts:
        raise config.refused("num_experts_per_tok", experts_per_token, f"at most num_experts={num_experts}")
    return num_experts, experts_per_token, config.count("moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size")
