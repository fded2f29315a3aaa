"""Tiny random Hugging Face models of every family, written by the safetensors library itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spin_megatron.convert.families import expected_huggingface_names
from spin_megatron.plan.model_config import ARCHITECTURES, Family, RopeScaling
from spin_megatron.plan.shape import ModelShape

LLAMA3_SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
TINY = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=32,
    num_heads=8,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=259,  # prime to every number of tensor ranks
    max_positions=64,
    norm_epsilon=1e-5,
    rope_theta=5e5,
)


def tiny_shape(family: Family, *, tied: bool = False, scaling: RopeScaling | None = None) -> ModelShape:
    """A shape of the family that splits over 8 tensor ranks, 4 stages and 2 expert ranks."""
    experts: dict[str, Any] = {}
    if family in ("mixtral", "qwen3_moe"):
        experts = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_hidden_size": 32 if family == "mixtral" else 16}
    return replace(
        TINY,
        family=family,
        tied_embeddings=tied,
        rope_scaling=scaling,
        qkv_bias=family == "qwen2",
        qk_norm=family.startswith("qwen3"),
        head_dim=8 if family.startswith("qwen3") else 6,
        sliding_window=8 if family == "mistral" else None,
        **experts,
    )


def config_of_transformers_4(shape: ModelShape, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json as transformers 4.x writes it."""
    scaling = shape.rope_scaling
    config = {
        "architectures": [ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": shape.tied_embeddings,
        "sliding_window": shape.sliding_window,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if scaling is not None:
        config["rope_scaling"] = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    if shape.family == "mixtral":
        config |= {"num_local_experts": shape.num_experts, "num_experts_per_tok": shape.experts_per_token}
    if shape.family == "qwen3_moe":
        config |= {
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.expert_ffn_hidden_size,
            "norm_topk_prob": True,
        }
    return config


def config_of_transformers_5(shape: ModelShape, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json as transformers 5.x writes it: silently misread by 4.x."""
    config = config_of_transformers_4(shape, dtype)
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, **(scaling or {})}
    config["dtype"] = config.pop("torch_dtype")
    if "num_experts" in config:
        config["num_local_experts"] = config.pop("num_experts")
    return config


def random_weights(shape: ModelShape, dtype: torch.dtype = torch.bfloat16, seed: int = 7) -> dict[str, Tensor]:
    """Weights by Hugging Face name; matrices of standard deviation 0.2, norms around 1, so that logits depend on all of them."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: 0.2 * torch.randn(size, generator=generator) for name, size in expected_huggingface_names(shape).items()}
    return {name: (weight + 1 if "norm" in name else weight).to(dtype) for name, weight in weights.items()}


def write_model(
    folder: Path, shape: ModelShape, *, dtype: torch.dtype = torch.bfloat16, num_files: int = 1, seed: int = 7
) -> dict[str, Tensor]:
    """Write a model folder (weights, config, a made-up tokenizer.json); returns the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(shape, dtype, seed)
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config_of_transformers_4(shape, name)))
    (folder / "tokenizer.json").write_bytes(b'{"version": "1.0"}\r\n')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    names = list(weights)
    if num_files == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return weights
    weight_map = {name: f"model-{1 + i * num_files // len(names):05d}-of-{num_files:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in names if weight_map[name] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(weight.nbytes for weight in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights
