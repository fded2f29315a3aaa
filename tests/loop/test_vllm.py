"""vLLM itself in whole iterations, and on the quickstart's model: only where SPIN_VLLM_PYTHON names an interpreter that has it."""

import json
import os
import signal
import subprocess
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spin_megatron.generation.engine import EngineSpec, Prompt, Sampling, eos_token_ids, provider
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.records import GeneratedRow, read_rows
from tests import vllm_itself
from tests.tiny_run import SPIN_MEGATRON, make_tiny_run, spin_megatron

pytestmark = [vllm_itself.needs_vllm, pytest.mark.timeout(1800)]

QUICKSTART_MODEL = Path(__file__).parents[2] / "assets" / "SmolLM2-135M-Instruct"


def settings() -> list[str]:
    """One iteration with vLLM, answers in chunks of 4."""
    environment = vllm_itself.ENVIRONMENT
    values = {"run.iterations": 1, "generate.engine": "vllm", "generate.batch_size": 4, "generate.environment.python": environment.python}
    values |= {"generate.environment.variables": json.dumps(environment.variables), "generate.options.eager": "true"}
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def answers(layout: RunLayout) -> list[GeneratedRow]:
    return [row for path in sorted(layout.shard(0, 0).glob("part_*.parquet")) for row in read_rows(path, GeneratedRow)]


def test_an_iteration_that_was_killed_while_vllm_answered_gives_the_answers_of_one_that_was_not(tmp_path: Path) -> None:
    config = make_tiny_run(tmp_path / "a run", head_dim=32)
    whole, cut = RunLayout(tmp_path / "whole run"), RunLayout(tmp_path / "cut run")
    result = spin_megatron("run", config, "--run-dir", whole.root, *settings())
    assert result.returncode == 0, result.stdout + result.stderr
    assert (whole.theta(1) / "model.safetensors").exists()
    engine = json.loads((whole.shard(0, 0) / "MANIFEST.json").read_text(encoding="utf-8"))["summary"]["engine"]
    assert (engine["engine"], engine["row_seeds"]) == ("vllm", True)
    run = subprocess.Popen([*SPIN_MEGATRON, "run", str(config), "--run-dir", str(cut.root), *settings()], start_new_session=True)
    try:
        while not any(cut.shard(0, 0).rglob("chunk_*.jsonl")):
            assert run.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    result = spin_megatron("run", config, "--run-dir", cut.root, *settings())
    assert result.returncode == 0, result.stdout + result.stderr
    assert answers(cut) == answers(whole)
    assert len(answers(whole)) == 40


@pytest.mark.skipif(not QUICKSTART_MODEL.exists(), reason="make quickstart makes the model")
def test_on_the_quickstart_s_model_greedy_answers_are_those_of_transformers_and_seeds_those_of_rows(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    questions = ("How do I boil an egg?", "What is the capital of France?", "Why is the sky blue?", "Name three rivers.", "Tell me a joke.")
    chats = [[{"role": "user", "content": text}] for text in questions]
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    prompts = [Prompt(f"p{number}", tuple(tokens), 1000 + number) for number, tokens in enumerate(ids)]
    greedy = Sampling(0.0, 0, 1.0, 24, eos_token_ids(QUICKSTART_MODEL))
    limits = {"batch_size": 4, "max_prompt_tokens": 64, "max_new_tokens": 24}
    spec = EngineSpec(QUICKSTART_MODEL, "float32", **limits, options=vllm_itself.OPTIONS, environment=vllm_itself.ENVIRONMENT)
    provider("vllm").build(spec, tmp_path / "engine")

    def answer(name: str, asked: list[Prompt], sampling: Sampling) -> dict[str, tuple[int, ...]]:
        with closing(provider("vllm").load(spec, tmp_path / "engine", tmp_path / name)) as engine:
            return {row.example_id: row.token_ids for row in engine.generate(asked, sampling)}

    model = AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL, dtype=torch.float32)
    expected = {}
    for prompt in prompts:
        tokens = torch.tensor([prompt.token_ids])
        output = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=24)
        expected[prompt.example_id] = tuple(output[0, tokens.shape[1] :].tolist())
    assert answer("greedy", prompts, greedy) == expected
    sampled = answer("sampled", prompts, replace(greedy, temperature=1.0))
    alone = answer("two of them", prompts[3:1:-1], replace(greedy, temperature=1.0))
    assert alone == {prompt.example_id: sampled[prompt.example_id] for prompt in prompts[2:4]}
