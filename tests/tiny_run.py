"""A whole run in miniature: a random Llama of a few hundred kB, a character tokenizer, forty conversations, a config."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_tokenizer import save_tiny_tokenizer

SPIN_MEGATRON = (sys.executable, "-m", "spin_megatron.cli")

CONFIG = """
[run]
name = "tiny"
seed = 3
iterations = 2

[model]
path = "model"

[data]
source = "conversations.jsonl"
num_held_out = 8
max_prompt_tokens = 48
max_response_tokens = 24

[generate]
dtype = "float32"
batch_size = 8
rows_per_part = 8

[objective]
beta = [0.1, 1.0]

[optimizer]
name = "adamw"
learning_rate = 1e-3

[train]
precision = "fp32"
global_batch_pairs = 8
pack_tokens = 192
schedule_epochs = 2
save_every_steps = 2

[parallel]
pipeline = 2
"""


def make_tiny_model(folder: Path, *, seed: int = 0, head_dim: int = 16) -> None:
    """A random 4-layer Llama with grouped queries and a tokenizer, as a Hugging Face folder."""
    tokenizer = save_tiny_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_conversations(path: Path, count: int = 40) -> None:
    """Counting aloud: the prompt names a number, the answer the next two."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"after {number}?"},
                {"role": "assistant", "content": f"{number + 1} {number + 2}"},
            ]
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tiny_run(folder: Path, *, head_dim: int = 16) -> Path:
    """Model, data and config in one folder; returns the config's path."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tiny_model(folder / "model", head_dim=head_dim)
    make_conversations(folder / "conversations.jsonl")
    config = folder / "config.toml"
    config.write_text(CONFIG, encoding="utf-8")
    return config


def spin_megatron(*arguments: str | Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end; output is captured."""
    return subprocess.run([*SPIN_MEGATRON, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, check=False)
