"""ModelShape reads both dialects of config.json and refuses by name what would be computed wrongly; layouts must divide."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spin_megatron.plan.model_config import RopeScaling
from spin_megatron.plan.shape import ModelShape, ParallelLayout

# config.json of Llama-3.1-8B as transformers 4.x writes it, fields that decide nothing left out.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "attention_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_SHAPE = ModelShape(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_positions=131072,
    norm_epsilon=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
)
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def variant(base: dict[str, Any], drop: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    return {**{name: value for name, value in base.items() if name not in drop}, **changes}


def mistral(**changes: Any) -> dict[str, Any]:
    base = variant(LLAMA, drop=("rope_scaling",), model_type="mistral", architectures=["MistralForCausalLM"], rope_theta=10000.0)
    return {**base, **changes}


def qwen2(**changes: Any) -> dict[str, Any]:
    return variant(LLAMA, drop=("rope_scaling",), model_type="qwen2", architectures=["Qwen2ForCausalLM"], **changes)


def test_a_config_of_transformers_4_is_read_field_by_field(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelShape.from_huggingface(tmp_path) == LLAMA_SHAPE


def test_the_dialect_of_transformers_5_gives_the_same_shape() -> None:
    rope = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert ModelShape.from_config(variant(LLAMA, drop=("rope_theta", "rope_scaling"), rope_parameters=rope)) == LLAMA_SHAPE


def test_both_dialects_side_by_side_are_read_and_must_agree() -> None:
    rope = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert ModelShape.from_config(variant(LLAMA, rope_parameters=rope)) == LLAMA_SHAPE
    with pytest.raises(ValueError, match=r"rope_theta=500000.0 is not supported; expected the same as rope_parameters.rope_theta=10000"):
        ModelShape.from_config(variant(LLAMA, rope_parameters={**rope, "rope_theta": 10000}))
    with pytest.raises(ValueError, match=r"rope_scaling=.*the same scaling as rope_parameters"):
        ModelShape.from_config(variant(LLAMA, rope_parameters={**rope, "factor": 32.0}))


def test_fields_old_llama_configs_leave_out_take_the_values_transformers_takes() -> None:
    shape = ModelShape.from_config(variant(LLAMA, drop=("rope_theta", "rope_scaling", "num_key_value_heads", "tie_word_embeddings")))
    assert shape == replace(LLAMA_SHAPE, num_kv_heads=32, rope_theta=10000.0, rope_scaling=None)


def test_linear_scaling_in_its_oldest_spelling_is_read() -> None:
    shape = ModelShape.from_config(variant(LLAMA, rope_scaling={"type": "linear", "factor": 4}))
    assert shape.rope_scaling == RopeScaling("linear", 4.0)


def test_every_family_sets_what_makes_it_different() -> None:
    assert ModelShape.from_config(mistral(sliding_window=4096)).sliding_window == 4096
    assert ModelShape.from_config(mistral(sliding_window=None)).sliding_window is None
    assert ModelShape.from_config(mistral()).sliding_window == 4096  # transformers' default, as of Mistral v0.1
    assert ModelShape.from_config(qwen2(use_sliding_window=False, sliding_window=131072)) == replace(
        LLAMA_SHAPE, family="qwen2", rope_scaling=None, qkv_bias=True
    )
    qwen3 = ModelShape.from_config(variant(qwen2(), model_type="qwen3", architectures=["Qwen3ForCausalLM"], num_attention_heads=64))
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 128)  # 4096 / 64 = 64, Qwen3's own default is 128
    experts = mistral(num_local_experts=8, num_experts_per_tok=2, model_type="mixtral", architectures=["MixtralForCausalLM"])
    mixtral = ModelShape.from_config(variant(experts, drop=("rope_theta",)))
    assert (mixtral.num_experts, mixtral.experts_per_token, mixtral.expert_ffn_hidden_size) == (8, 2, 14336)
    assert (mixtral.rope_theta, mixtral.sliding_window) == (1e6, None)


def test_experts_are_read_under_the_names_of_both_dialects() -> None:
    old = ModelShape.from_config(QWEN3_MOE)
    assert (old.num_experts, old.experts_per_token, old.expert_ffn_hidden_size, old.ffn_hidden_size) == (128, 8, 768, 6144)
    assert ModelShape.from_config(variant(QWEN3_MOE, drop=("num_experts",), num_local_experts=128)) == old
    with pytest.raises(ValueError, match=r"num_experts=128 is not supported; expected the same as num_local_experts=64"):
        ModelShape.from_config(variant(QWEN3_MOE, num_local_experts=64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (variant(LLAMA, model_type="gpt2"), "model_type='gpt2'.*known are llama, mistral, mixtral, qwen2, qwen3, qwen3_moe"),
        (variant(LLAMA, architectures=["LlamaForSequenceClassification"]), "architectures=.*LlamaForCausalLM"),
        (variant(LLAMA, attention_bias=True), "attention_bias=True"),
        (variant(LLAMA, mlp_bias=True), "mlp_bias=True"),
        (variant(LLAMA, hidden_act="gelu"), "hidden_act='gelu'"),
        (variant(LLAMA, rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_type='yarn'"),
        (variant(LLAMA, rope_scaling={"type": "dynamic", "factor": 4.0}), "rope_type='dynamic'"),
        (variant(LLAMA, rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor=None"),
        (variant(LLAMA, partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (variant(LLAMA, rope_parameters={"rope_theta": 5e5, "partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5"),
        (variant(LLAMA, rope_parameters={"full_attention": {"rope_theta": 1e4}}), "one flat set of numbers for all layers"),
        (variant(LLAMA, quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (variant(LLAMA, auto_map={"AutoModel": "x--y.Z"}), "auto_map.*no remote code"),
        (variant(LLAMA, drop=("vocab_size",)), "lacks 'vocab_size'"),
        (variant(LLAMA, hidden_size="4096"), "hidden_size='4096'.*a positive integer"),
        (variant(LLAMA, num_key_value_heads=5), "num_key_value_heads=5.*divisor of num_attention_heads=32"),
        (variant(LLAMA, hidden_size=4100), "hidden_size=4100.*multiple of num_attention_heads=32"),
        (variant(LLAMA, head_dim=127), "head_dim=127.*even"),
        (qwen2(use_sliding_window=True, sliding_window=64, max_window_layers=16), "the same attention, full or sliding, in every layer"),
        (qwen2(layer_types=["full_attention", "sliding_attention"] * 16), "the same attention, full or sliding, in every layer"),
        (variant(QWEN3_MOE, norm_topk_prob=False), "norm_topk_prob=False"),
        (variant(QWEN3_MOE, mlp_only_layers=[0]), "mlp_only_layers"),
        (variant(QWEN3_MOE, num_experts_per_tok=129), "num_experts_per_tok=129.*at most num_experts=128"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelShape.from_config(values)


def test_a_window_in_every_layer_is_read_however_it_is_spelled() -> None:
    assert ModelShape.from_config(qwen2(use_sliding_window=True, sliding_window=64, max_window_layers=0)).sliding_window == 64
    assert ModelShape.from_config(qwen2(use_sliding_window=True, sliding_window=64, max_window_layers=32)).sliding_window is None
    sliding = qwen2(use_sliding_window=True, sliding_window=64, layer_types=["sliding_attention"] * 32)
    assert ModelShape.from_config(sliding).sliding_window == 64


def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        ModelShape.from_huggingface(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        ModelShape.from_huggingface(tmp_path)


def test_a_layout_that_divides_the_model_is_taken_and_counts_its_ranks() -> None:
    layout = ParallelLayout(tensor=8, pipeline=4, data=2, virtual_pipeline=8)
    layout.check(LLAMA_SHAPE)
    assert layout.world_size == 64
    ParallelLayout(tensor=16).check(LLAMA_SHAPE)  # 8 KV heads on 16 ranks: two ranks share one
    smol = replace(LLAMA_SHAPE, num_heads=9, num_kv_heads=3, hidden_size=576, head_dim=64, ffn_hidden_size=1536, num_layers=30)
    ParallelLayout(tensor=3, pipeline=2).check(smol)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ParallelLayout(tensor=3), r"parallel.tensor=3 does not divide model.num_heads=32.*use 1, 2, 4, 8, 16 or 32\.$"),
        (ParallelLayout(pipeline=3), r"parallel.pipeline=3 .* model.num_layers=32.* parallel.stage_layers .* 1, 2, 4, 8, 16 or 32\.$"),
        (ParallelLayout(pipeline=4, virtual_pipeline=16), r"model.num_layers=32.*use parallel.pipeline 1 or 2\.$"),
        (ParallelLayout(pipeline=2, stage_layers=(16, 15)), r"parallel.stage_layers=\[16, 15\] has 2 entries that add up to 31 .*=32"),
        (ParallelLayout(pipeline=2, stage_layers=(16, 8, 8)), r"has 3 entries .* give parallel.pipeline=2 x parallel.virtual_pipeline=1"),
        (ParallelLayout(pipeline=2, stage_layers=(32, 0)), "positive numbers"),
        (ParallelLayout(stage_layers=(16, 16)), "parallel.pipeline=1 x"),
        (ParallelLayout(virtual_pipeline=2), "parallel.virtual_pipeline=2 needs parallel.pipeline > 1"),
        (ParallelLayout(sequence=True), "parallel.sequence=true"),
        (ParallelLayout(expert=2, data=2), "parallel.expert=2 but family llama has no experts"),
        (ParallelLayout(data=0), "parallel.data=0"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_the_valid_choices(layout: ParallelLayout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(LLAMA_SHAPE)


def test_experts_are_split_over_data_ranks() -> None:
    moe = ModelShape.from_config(QWEN3_MOE)
    ParallelLayout(data=4, expert=4).check(moe)
    with pytest.raises(ValueError, match=r"parallel.expert=4 .* parallel.context=2 .*use 1 or 2\.$"):
        ParallelLayout(data=2, expert=4).check(moe)


def test_the_module_needs_no_torch() -> None:
    code = "import sys; import spin_megatron.plan.shape; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
