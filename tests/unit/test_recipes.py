"""The Zephyr recipes load, have the published values, name a source for each, and fit on the node they are for."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from spin_megatron.config import RunConfig
from spin_megatron.config_file import load_config
from spin_megatron.plan.run_plan import check_config_fits

FOLDER = Path(__file__).parents[2] / "examples" / "zephyr_7b"
RECIPES = ("paper.toml", "uclaml_scripts.toml")

# Mistral 7B, from which zephyr-7b-sft-full was fine-tuned.
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def recipe(name: str) -> RunConfig:
    return load_config(FOLDER / name)


@pytest.mark.parametrize("name", RECIPES)
def test_both_recipes_have_the_published_settings(name: str) -> None:
    config = recipe(name)
    scalars = [config.at(t) for t in range(config.run.iterations)]
    assert [item.beta for item in scalars] == [0.1, 0.1, 0.1, 5.0]
    assert [item.learning_rate for item in scalars] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [item.window for item in scalars] == [2, 2, 2, 2]
    optimizer, train = config.optimizer, config.train
    assert (optimizer.name, optimizer.weight_decay, optimizer.rmsprop_alpha, optimizer.epsilon) == ("rmsprop", 0.0, 0.99, 1e-8)
    assert (optimizer.schedule, optimizer.warmup_fraction, optimizer.max_grad_norm) == ("linear", 0.1, None)
    assert (train.global_batch_pairs, train.dtype) == (64, "bfloat16")
    assert (config.objective.loss, config.objective.nll_weight, config.objective.length_normalised) == ("logistic", 0.0, False)
    assert (config.model.path, config.data.source) == ("alignment-handbook/zephyr-7b-sft-full", "HuggingFaceH4/ultrachat_200k")
    assert config.model.revision == "ac6e600eefcce74f5e8bae1035d4f66019e93190"
    assert (config.data.turns, config.data.split, config.run.seed) == ("first", "train_sft", 42)
    assert config.data.revision is not None
    assert re.fullmatch(r"[0-9a-f]{40}", config.data.revision)


def test_the_papers_recipe_has_its_own_numbers() -> None:
    config = recipe("paper.toml")
    assert config.data.num_examples == 50_000
    assert config.data.max_prompt_tokens + config.data.max_response_tokens == 2048
    assert [(config.at(t).schedule_epochs, config.at(t).stop_epoch) for t in range(4)] == [(2, 2)] * 4
    assert (config.generate.temperature, config.generate.top_k, config.generate.top_p) == (1.0, 0, 1.0)
    assert config.data.system is None


def test_the_scripts_recipe_has_their_quirks() -> None:
    config = recipe("uclaml_scripts.toml")
    assert (config.data.num_examples, config.data.num_held_out) == (49_792, 500)
    assert (config.data.max_prompt_tokens, config.data.max_response_tokens, config.data.over_long) == (512, 512, "truncate")
    assert [config.at(t).schedule_epochs for t in range(4)] == [6] * 4
    assert (config.generate.temperature, config.generate.batch_size) == (0.0, 8)
    assert config.data.system == ""
    assert not config.data.deduplicate
    two_epochs = load_config(FOLDER / "uclaml_scripts.toml", ["train.stop_epoch=2"])
    assert (two_epochs.at(3).stop_epoch, two_epochs.at(3).schedule_epochs) == (2, 6)


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_names_its_source(name: str) -> None:
    source = re.compile(r"#.*(?:\b[PC]\b|\bours\b|\bthe same\b)")
    text = (FOLDER / name).read_text(encoding="utf-8")
    settings = [line for line in text.splitlines() if re.match(r"\w+ = ", line)]
    without = [line.partition(" = ")[0] for line in settings if not source.search(line)]
    assert without == ["name"], "only the run's own name is free"

    def count(table: dict[str, Any]) -> int:
        return sum(count(value) if isinstance(value, dict) else 1 for value in table.values())

    assert len(settings) == count(tomllib.loads(text)), "the pattern sees every setting"


@pytest.mark.parametrize("gpu", ["h100-80gb", "a100-80gb"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_fit_on_one_node_of_8_gpus_with_80_gb(tmp_path: Path, name: str, gpu: str) -> None:
    config = recipe(name)
    assert config.parallel.layout().world_size == 8
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MISTRAL_7B), encoding="utf-8")
    check_config_fits(config, gpu, model_config=path)
    with pytest.raises(ValueError, match="a100-40gb"):
        check_config_fits(config, "a100-40gb", model_config=path)
