"""A model's config.json, field by field: what decides its shape, and by name everything that is not computed here.

Written by transformers 4.x (`rope_theta`, `rope_scaling`, `num_experts`) or 5.x (`rope_parameters`, `num_local_experts`); where it says
nothing, transformers' own defaults hold. No torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

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


@dataclass(frozen=True)
class ModelConfig:
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
        """A positive number; `default` when the field is absent or null."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.refused(name, value, "a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false when the field is absent or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refused(name, value, "true or false")
        return bool(value)


def family_of(config: ModelConfig) -> Family:
    """The family of the model; each reader below raises ValueError for what it refuses."""
    family = config.values.get("model_type")
    architectures = config.values.get("architectures")
    known = ", ".join(sorted(ARCHITECTURES))
    if family not in ARCHITECTURES:
        raise ValueError(f"{config.where}: model_type={family!r} (architectures={architectures!r}) is unknown here; known are {known}.")
    found = cast(Family, family)
    if architectures is not None and architectures != [ARCHITECTURES[found]]:
        raise config.refused("architectures", architectures, f"[{ARCHITECTURES[found]!r}] for model_type {family!r}")
    return found


def refuse_what_is_not_computed(config: ModelConfig, family: Family) -> None:
    """Raise for a setting that changes what a layer computes, and that ours do not."""
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


def head_dim_of(config: ModelConfig, family: Family, hidden_size: int, num_heads: int) -> int:
    """Size of a head: as given, the family's own, or the hidden size over the heads."""
    if config.values.get("head_dim") is None and family not in _DEFAULT_HEAD_DIM and hidden_size % num_heads:
        raise config.refused("hidden_size", hidden_size, f"a multiple of num_attention_heads={num_heads}, or a head_dim")
    default = _DEFAULT_HEAD_DIM.get(family, hidden_size // num_heads)
    head_dim = config.count("head_dim", default, null=default)
    if head_dim % 2:
        raise config.refused("head_dim", head_dim, "an even number (rotary embeddings turn pairs)")
    return head_dim


def rope_of(config: ModelConfig, family: Family) -> tuple[float, RopeScaling | None]:
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


def _rope_scaling(config: ModelConfig, entry: Mapping[str, Any], name: str) -> RopeScaling | None:
    kind = entry.get("rope_type", entry.get("type", "default"))
    nested = ModelConfig(entry, f"{config.where}: {name}")
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


def sliding_window_of(config: ModelConfig, family: Family, num_layers: int) -> int | None:
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


def experts_of(config: ModelConfig, family: Family) -> tuple[int | None, int | None, int | None]:
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
