"""What every generation engine must do, run on each: on those that are installed here, and on the others through their doubles.

vLLM itself takes part where there is one: tests/vllm_itself.py.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_megatron.generation.engine import PROVIDERS, Engine, EngineSpec, Prompt, Sampling, eos_token_ids, provider
from spin_megatron.run.records import GeneratedRow, PromptRow, write_rows
from spin_megatron.run.seeds import row_seed
from tests import vllm_itself
from tests.doubles.installation import Site
from tests.doubles.toy_model import answer, weights_mark
from tests.tiny_tokenizer import save_tiny_tokenizer
from tests.unit.tiny_models import TINY, write_model

EOS = tuple(range(2, 12))  # many, so that a random model ends some of its responses
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=20, eos_ids=EOS)
SAMPLED = replace(GREEDY, temperature=1.0)
# Heads of 32: on CPU ONNX Runtime takes multiples of 16, vLLM of 32. 55 positions: less than the longest prompt and response.
SHAPE = replace(TINY, head_dim=32, max_positions=55)
# The doubles stand for engines that cannot be installed here: their model is a toy, everything around it is the engine's own.
DOUBLES = ("trtllm-engine", "trtllm-torch", "vllm")
REAL = ("builtin", *(["onnxruntime-genai"] if find_spec("onnxruntime_genai") else []))
AVAILABLE = (*REAL, *DOUBLES)
PARTICIPANTS = (*AVAILABLE, pytest.param("vllm itself", marks=vllm_itself.needs_vllm))
DTYPES = {"trtllm-engine": "bfloat16", "trtllm-torch": "bfloat16"}
assert {*AVAILABLE, "onnxruntime-genai"} == set(PROVIDERS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, SHAPE, dtype=torch.float32)
    save_tiny_tokenizer(folder)  # exporters want one
    return folder


@dataclass(frozen=True)
class Built:
    """An engine that was built, to be loaded as often as a test likes."""

    name: str
    spec: EngineSpec
    folder: Path
    is_double: bool

    def load(self, work: Path) -> Engine:
        return provider(self.name).load(self.spec, self.folder, work)

    def greedy(self, prompts: Sequence[Prompt], eos_ids: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """What greedy decoding says: transformers' `generate`, or the toy."""
        if not self.is_double:
            return greedy_by_transformers(self.spec.model, prompts, eos_ids, max_new_tokens)
        limits = {"vocab_size": SHAPE.vocab_size, "eos_ids": eos_ids, "max_tokens": max_new_tokens}
        return [answer(weights_mark(self.spec.model), prompt.token_ids, seed=None, **limits)[0] for prompt in prompts]


@pytest.fixture(scope="module", params=PARTICIPANTS)
def built(request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    name, folder = request.param.removesuffix(" itself"), tmp_path_factory.mktemp("engine")
    is_double = request.param in DOUBLES
    prompt_file = folder / "prompts.parquet"
    write_rows(prompt_file, [PromptRow(prompt.example_id, prompt.token_ids, (12, 2), False) for prompt in make_prompts(40)], PromptRow)
    environment = Site(folder / "site").environment("DOUBLE_IN_FLIGHT=10") if is_double else vllm_itself.ENVIRONMENT
    limits = {"batch_size": 5, "max_prompt_tokens": 40, "max_new_tokens": 20}
    files = {"prompt_files": (prompt_file,), "environment": environment, "options": vllm_itself.OPTIONS if name == "vllm" else {}}
    spec = EngineSpec(model_folder, DTYPES.get(name, "float32"), **limits, **files)
    provider(name).build(spec, folder / "built")
    return Built(name, spec, folder / "built", is_double)


@pytest.fixture(scope="module")
def engine(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with closing(built.load(tmp_path_factory.mktemp("work"))) as loaded:
        yield loaded


def make_prompts(count: int = 14) -> list[Prompt]:
    """Prompts of 1 to 35 tokens with the seeds a run would give them."""
    generator = random.Random(7)
    lengths = [1, 35] + [generator.randrange(2, 35) for _ in range(count - 2)]
    return [
        Prompt(f"ex-{i}", tuple(generator.randrange(12, SHAPE.vocab_size) for _ in range(length)), row_seed(1, "generate", 0, f"ex-{i}"))
        for i, length in enumerate(lengths)
    ]


def by_id(rows: Iterator[GeneratedRow]) -> dict[str, GeneratedRow]:
    listed = list(rows)
    assert len({row.example_id for row in listed}) == len(listed)
    return {row.example_id: row for row in listed}


def greedy_by_transformers(folder: Path, prompts: Sequence[Prompt], eos_ids: Sequence[int], max_new_tokens: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": list(eos_ids), "pad_token_id": 0}
        outputs.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist())
    return outputs


def test_greedy_responses_equal_those_of_transformers_generate_in_fp32(engine: Engine, built: Built) -> None:
    prompts = make_prompts()
    expected = built.greedy(prompts, EOS, 20)
    rows = by_id(engine.generate(prompts, GREEDY))
    assert [list(rows[prompt.example_id].token_ids) for prompt in prompts] == expected
    assert len({tuple(tokens) for tokens in expected}) > 10  # the model says something different for each


def test_a_response_ends_with_eos_exactly_when_it_stopped(engine: Engine) -> None:
    rows = by_id(engine.generate(make_prompts(40), SAMPLED))
    reasons = {row.finish_reason for row in rows.values()}
    assert reasons == {"stop", "length"}
    for row in rows.values():
        assert (row.token_ids[-1] in EOS) == (row.finish_reason == "stop")
        assert not set(row.token_ids[:-1]) & set(EOS)
        assert 1 <= len(row.token_ids) <= 20
        assert row.finish_reason == "stop" or len(row.token_ids) == 20


def test_every_eos_id_ends_a_response(engine: Engine, built: Built) -> None:
    # Two tokens that greedy decoding emits on the way become EOS ids: responses must stop at the first of either.
    prompts = make_prompts()
    free = built.greedy(prompts, [0], 20)
    eos_ids = (free[0][5], free[1][3])
    rows = by_id(engine.generate(prompts, replace(GREEDY, eos_ids=eos_ids)))
    for prompt, tokens in zip(prompts, free, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in eos_ids]
        expected = tokens[: ends[0] + 1] if ends else None
        if expected is not None:
            assert (list(rows[prompt.example_id].token_ids), rows[prompt.example_id].finish_reason) == (expected, "stop")


def test_a_response_that_stops_on_its_last_allowed_token_has_stopped(engine: Engine, built: Built) -> None:
    prompts = make_prompts()[:1]
    tokens = built.greedy(prompts, [0], 20)[0]
    first = tokens.index(tokens[4])
    sampling = replace(GREEDY, eos_ids=(tokens[4],), max_new_tokens=first + 1)
    (row,) = engine.generate(prompts, sampling)
    assert (list(row.token_ids), row.finish_reason) == (tokens[: first + 1], "stop")


def test_seeds_decide_the_responses_and_nothing_else_does(engine: Engine) -> None:
    prompts = make_prompts()
    first, again = by_id(engine.generate(prompts, SAMPLED)), by_id(engine.generate(prompts, SAMPLED))
    assert first == again
    assert [first[prompt.example_id].seed for prompt in prompts] == [prompt.seed for prompt in prompts]
    other = by_id(engine.generate([replace(prompt, seed=prompt.seed + 1) for prompt in prompts], SAMPLED))
    changed = sum(first[key].token_ids != other[key].token_ids for key in first)
    assert changed >= len(prompts) - 1


def test_another_batch_size_changes_no_answer_or_is_refused_where_it_is_built_in(built: Built, engine: Engine, tmp_path: Path) -> None:
    prompts, smaller = make_prompts(20), replace(built, spec=replace(built.spec, batch_size=3))
    if built.name == "trtllm-engine":
        with pytest.raises(ValueError, match="max_batch_size: built with 5, now 3"):
            smaller.load(tmp_path)
        return
    with closing(smaller.load(tmp_path)) as other:
        assert by_id(other.generate(prompts, SAMPLED)) == by_id(engine.generate(prompts, SAMPLED))


def test_equal_prompts_with_different_seeds_get_different_responses(engine: Engine) -> None:
    prompt = make_prompts()[3]
    rows = by_id(engine.generate([replace(prompt, example_id=f"copy-{i}", seed=i) for i in range(8)], SAMPLED))
    assert len({row.token_ids for row in rows.values()}) > 5


def test_top_k_one_is_greedy(engine: Engine) -> None:
    prompts = make_prompts()
    greedy, top_one = by_id(engine.generate(prompts, GREEDY)), by_id(engine.generate(prompts, replace(SAMPLED, top_k=1)))
    assert {key: row.token_ids for key, row in greedy.items()} == {key: row.token_ids for key, row in top_one.items()}


def test_what_was_answered_before_a_crash_and_what_is_answered_after_it_are_the_answers(built: Built, tmp_path: Path) -> None:
    prompts = make_prompts()
    with closing(built.load(tmp_path / "whole")) as engine:
        whole = by_id(engine.generate(prompts, SAMPLED))
    with closing(built.load(tmp_path / "cut")) as engine:
        some = list(islice(engine.generate(prompts, SAMPLED), 6))
    with closing(built.load(tmp_path / "cut")) as engine:
        rest = by_id(engine.generate(prompts, SAMPLED))
    assert rest == whole
    assert all(whole[row.example_id] == row for row in some)
    # Without some of the prompts, the others' answers are the same: they depend on nothing beside them.
    with closing(built.load(tmp_path / "alone")) as engine:
        assert by_id(engine.generate(prompts[3:5], SAMPLED)) == {prompt.example_id: whole[prompt.example_id] for prompt in prompts[3:5]}


def test_a_stop_ends_the_answers_and_the_rest_is_answered_later(built: Built, tmp_path: Path) -> None:
    prompts = make_prompts()
    polls = iter([False, *[True] * 1000])
    with closing(built.load(tmp_path / "stopped")) as engine:
        some = by_id(engine.generate(prompts, SAMPLED, lambda: next(polls)))
    assert len(some) < len(prompts)
    with closing(built.load(tmp_path / "stopped")) as engine:
        rows = by_id(engine.generate(prompts, SAMPLED))
    assert len(rows) == len(prompts)
    assert all(rows[name] == row for name, row in some.items())


def test_an_engine_of_other_weights_is_refused_before_the_first_request(built: Built, model_folder: Path, tmp_path: Path) -> None:
    if built.name == "builtin":
        pytest.skip("it has no engine but the weights themselves")
    shutil.copytree(model_folder, tmp_path / "theta")
    write_model(tmp_path / "theta", SHAPE, dtype=torch.float32, seed=8)
    other = replace(built, spec=replace(built.spec, model=tmp_path / "theta"))
    with pytest.raises(ValueError, match="weights: built with"):
        other.load(tmp_path / "work")


def test_no_prompts_give_no_responses(engine: Engine) -> None:
    assert list(engine.generate([], SAMPLED)) == []


@pytest.mark.parametrize(
    ("token_ids", "reason"),
    [
        ((), "empty prompt"),
        ((4,) * 41, "max_prompt_tokens=40"),
        ((4, SHAPE.vocab_size), "outside the model's vocabulary of 259"),
        ((4, -1), "outside the model's vocabulary of 259"),
    ],
)
def test_a_prompt_the_model_cannot_answer_is_refused_before_any_work(engine: Engine, token_ids: tuple[int, ...], reason: str) -> None:
    prompts = [*make_prompts(), Prompt("broken", token_ids, 1)]
    with pytest.raises(ValueError, match=reason) as caught:
        engine.generate(prompts, GREEDY)  # at the call, not at the first row
    assert "broken" in str(caught.value)


def test_a_repeated_example_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="ex-0 comes twice"):
        engine.generate([make_prompts()[0], make_prompts()[0]], GREEDY)


def test_more_new_tokens_than_the_engine_was_made_for_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="exceeds the engine's limit 20"):
        engine.generate(make_prompts(), replace(GREEDY, max_new_tokens=21))


def test_an_eos_id_outside_the_vocabulary_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="EOS ids \\[259\\]"):
        engine.generate(make_prompts(), replace(GREEDY, eos_ids=(2, 259)))


def test_prompt_and_response_must_fit_the_model_s_positions(engine: Engine) -> None:
    with pytest.raises(ValueError, match="36 prompt tokens \\+ 20 new tokens exceed the model's 55 positions"):
        engine.generate([Prompt("long", (12,) * 36, 1)], GREEDY)


def test_an_unknown_option_is_refused_by_name(built: Built, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="devise"):
        provider(built.name).build(replace(built.spec, options={"devise": "cpu"}), tmp_path)


def test_describe_names_the_engine_and_how_full_it_was(engine: Engine, built: Built) -> None:
    list(engine.generate([replace(prompt, example_id=f"full-{i}", seed=i) for i, prompt in enumerate(make_prompts(25))], SAMPLED))
    facts = engine.describe()
    assert (facts["engine"], facts["dtype"]) == (built.name, built.spec.dtype)
    assert 0 < facts["in_flight_use"] <= 1


def test_an_unknown_provider_is_refused_with_the_valid_choices() -> None:
    with pytest.raises(ValueError, match="builtin"):
        provider("bulitin")


def test_eos_ids_come_from_the_generation_config_then_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert eos_token_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7, 9]}')
    assert eos_token_ids(tmp_path) == (7, 9)
    (tmp_path / "generation_config.json").write_text("{}")
    assert eos_token_ids(tmp_path) == (7,)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="eos_token_id"):
        eos_token_ids(tmp_path)
