"""Tiny random models of every family, made from a seed as Hugging Face folders, and pairs to score with them.

Weights are drawn wide (logits vary by about 1, biases and norms differ from 0 and 1), so that a wrong rope, mask, bias or head
order moves log-probs by far more than any tolerance.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spin_megatron.run.records import SpinPair

VOCAB = 259  # prime to every tensor-parallel size: padded, and cut again
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # fewer than 4 tensor ranks
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name -> (transformers' model class, what differs from _COMMON)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}
EXPERT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
}


def make_tiny_model(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the model in fp32 and return its folder."""
    import transformers

    architecture, differences = (MODELS | EXPERT_MODELS)[name]
    config = getattr(transformers, f"{architecture}Config")(**(_COMMON | differences | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).float()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    center = 0.0 if parameter_name.endswith("bias") else 1.0
                    parameter.copy_(center + 0.3 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def make_pairs(seed: int = 0, *, num_pairs: int = 3, longest: int = 60, vocab_size: int = VOCAB) -> list[SpinPair]:
    """Pairs of random ids with prompts and answers of many lengths, one answer a single token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(0, vocab_size, (length,), generator=generator).tolist())

    half, third = longest // 2, longest // 3
    pairs = [SpinPair(f"pair_{number}", ids(1, third), ids(5, half), ids(3, half), 0) for number in range(num_pairs - 1)]
    return [*pairs, SpinPair("short", ids(third, third), ids(1, 1), ids(2, 2), 0)]


@torch.no_grad()
def huggingface_logits(folder: Path, sequences: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[torch.Tensor]:
    """Fp32 logits [len(prompt) + len(response), V] of each (prompt, response), one at a time, by transformers."""
    from transformers import AutoModelForCausalLM

    model: Callable[..., Any] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return [model(torch.tensor([[*prompt, *response]])).logits[0] for prompt, response in sequences]


def response_logps(logits_TV: torch.Tensor, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    """Log-probability of each response token from the logits of the whole sequence, in fp64."""
    rows = logits_TV[len(prompt) - 1 : len(prompt) + len(response) - 1].double()
    return rows.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
