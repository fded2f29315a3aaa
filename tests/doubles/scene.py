"""What tests of engines in another environment share: prompts, a spec in an environment of doubles, and what they must answer."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from spin_megatron.generation.engine import EngineSpec, Prompt, Sampling, provider
from spin_megatron.run.records import GeneratedRow, PromptRow, write_rows
from spin_megatron.run.seeds import row_seed
from tests.doubles.installation import Site
from tests.doubles.toy_model import answer, weights_mark
from tests.unit.tiny_models import TINY

EOS = (2, 3)
SAMPLED = Sampling(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=12, eos_ids=EOS)
GREEDY = replace(SAMPLED, temperature=0.0)
ENGINES = ("trtllm-engine", "trtllm-torch", "vllm")


def make_prompts(count: int = 13) -> list[Prompt]:
    prompts = [tuple(4 + (37 * i + j) % 200 for j in range(1 + i)) for i in range(count)]
    return [Prompt(f"ex-{i}", ids, row_seed(1, "generate", 0, f"ex-{i}")) for i, ids in enumerate(prompts)]


def make_spec(model: Path, site: Site, name: str = "trtllm-engine", **options: Any) -> EngineSpec:
    prompt_file = model.parent / "prompts.parquet"
    write_rows(prompt_file, [PromptRow(prompt.example_id, prompt.token_ids, (5, 2), False) for prompt in make_prompts()], PromptRow)
    dtype = "float32" if name == "vllm" else "bfloat16"
    limits = {"max_prompt_tokens": 20, "max_new_tokens": 12}
    return EngineSpec(model, dtype, 4, options=options, prompt_files=(prompt_file,), environment=site.environment(), **limits)


def by_id(rows: Iterator[GeneratedRow]) -> dict[str, GeneratedRow]:
    return {row.example_id: row for row in rows}


def answers(name: str, spec: EngineSpec, work: Path, sampling: Sampling, prompts: Sequence[Prompt]) -> dict[str, GeneratedRow]:
    """Build and generate, as the two stages do."""
    folder = work / "engine"
    provider(name).build(spec, folder)
    with closing(provider(name).load(spec, folder, work / "work")) as engine:
        return by_id(engine.generate(prompts, sampling))


def expected(model: Path, prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, GeneratedRow]:
    rows = {}
    for prompt in prompts:
        seed = prompt.seed if sampling.temperature else None
        limits = {"vocab_size": TINY.vocab_size, "eos_ids": EOS, "max_tokens": sampling.max_new_tokens}
        tokens, ended_by = answer(weights_mark(model), prompt.token_ids, seed=seed, **limits)
        rows[prompt.example_id] = GeneratedRow(prompt.example_id, tuple(tokens), "length" if ended_by is None else "stop", prompt.seed)
    return rows
