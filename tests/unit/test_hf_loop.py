"""The built-in engine's own promise: a row's bits do not depend on the rows beside it."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_megatron.generation import hf_loop
from spin_megatron.generation.decoder import Decoder, KvSlots, make_linear
from spin_megatron.generation.engine import EngineSpec, Prompt, Sampling
from spin_megatron.generation.hf_loop import HfLoop
from spin_megatron.plan.model_config import Family
from spin_megatron.run.records import GeneratedRow
from tests.unit.test_engine_contract import greedy_by_transformers
from tests.unit.tiny_models import TINY, tiny_shape, write_model

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=16, eos_ids=(2, 3))
SAMPLED = replace(GREEDY, temperature=1.0)
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")


def make_prompts(count: int = 21) -> list[Prompt]:
    generator = random.Random(5)
    return [
        Prompt(f"ex-{i}", tuple(generator.randrange(4, TINY.vocab_size) for _ in range(generator.randrange(1, 33))), 1000 + i)
        for i in range(count)
    ]


def load(folder: Path, *, batch_size: int, dtype: str = "float32") -> HfLoop:
    return hf_loop.load(EngineSpec(folder, dtype, batch_size, max_prompt_tokens=32, max_new_tokens=16), folder, folder)


def answers_and_logits(
    engine: HfLoop, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, GeneratedRow], dict[tuple[str, int], bytes]]:
    """Responses by example, and the bytes of the logits of every row and step."""
    seen: dict[tuple[str, int], bytes] = {}
    append = HfLoop._append

    def record(self: HfLoop, rows: list, logits_NV: torch.Tensor, sampling: Sampling) -> None:
        for row, logits_V in zip(rows, logits_NV, strict=True):
            seen[row.prompt.example_id, len(row.tokens)] = logits_V.float().numpy().tobytes()
        append(self, rows, logits_NV, sampling)

    monkeypatch.setattr(HfLoop, "_append", record)
    rows = {row.example_id: row for row in engine.generate(prompts, SAMPLED)}
    monkeypatch.setattr(HfLoop, "_append", append)
    return rows, seen


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_responses_are_the_same_bits_for_every_batch_size_order_and_shard(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, tiny_shape(family), dtype=torch.float32)
    prompts = make_prompts()
    engine = load(tmp_path, batch_size=16)
    assert engine.describe()["rows_independent"]
    expected_rows, expected_logits = answers_and_logits(engine, prompts, monkeypatch)
    assert len(expected_rows) == len(prompts)
    shuffled = random.Random(0).sample(prompts, len(prompts))
    one_by_one = [[prompt] for prompt in prompts[:4]]
    cases = [(16, [shuffled]), (1, [prompts[:5]]), (3, [prompts[:9], prompts[9:]]), (40, [prompts]), (8, one_by_one)]
    for batch_size, shards in cases:
        engine = load(tmp_path, batch_size=batch_size)
        for shard in shards:
            rows, logits = answers_and_logits(engine, shard, monkeypatch)
            assert rows == {prompt.example_id: expected_rows[prompt.example_id] for prompt in shard}
            assert all(logits[key] == expected_logits[key] for key in logits), f"batch_size {batch_size}: logits differ in a bit"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_responses_of_every_family_equal_those_of_transformers(family: Family, tmp_path: Path) -> None:
    write_model(tmp_path, tiny_shape(family), dtype=torch.float32)
    prompts = make_prompts(8)
    rows = {row.example_id: list(row.token_ids) for row in load(tmp_path, batch_size=5).generate(prompts, GREEDY)}
    assert [rows[prompt.example_id] for prompt in prompts] == greedy_by_transformers(tmp_path, prompts, GREEDY.eos_ids, 16)


def test_logits_agree_with_transformers_to_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Teacher forcing: the whole sequence at once through transformers' own attention. fp32 sums of 48 to 64 terms: 1e-4.
    write_model(tmp_path, tiny_shape("mistral"), dtype=torch.float32)
    prompts = make_prompts(4)
    rows, logits = answers_and_logits(load(tmp_path, batch_size=4), prompts, monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    for prompt in prompts:
        tokens = rows[prompt.example_id].token_ids
        with torch.no_grad():
            expected_TV = model(torch.tensor([prompt.token_ids + tokens])).logits[0, len(prompt.token_ids) - 1 : -1]
        ours_TV = torch.stack([torch.frombuffer(bytearray(logits[prompt.example_id, i]), dtype=torch.float32) for i in range(len(tokens))])
        torch.testing.assert_close(ours_TV, expected_TV, atol=1e-4, rtol=0)


def test_bfloat16_rows_are_independent_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, tiny_shape("llama"), dtype=torch.bfloat16)
    prompts = make_prompts(9)
    together, _ = answers_and_logits(load(tmp_path, batch_size=9, dtype="bfloat16"), prompts, monkeypatch)
    alone, _ = answers_and_logits(load(tmp_path, batch_size=2, dtype="bfloat16"), prompts, monkeypatch)
    assert together == alone


def slots_holding(keys: list[float], values: list[float]) -> KvSlots:
    """One layer, one head of size 1, one slot of 4 positions; what is not given is NaN."""
    slots = KvSlots(replace(TINY, num_layers=1, num_kv_heads=1, head_dim=1), 2, 4, dtype=torch.float32, device=torch.device("cpu"))
    nan = [float("nan")] * (4 - len(keys))
    places = slots.places(torch.tensor([0] * 4), torch.arange(4))
    slots.write(0, places, torch.tensor(keys + nan).view(4, 1, 1), torch.tensor(values + nan).view(4, 1, 1))
    return slots


def test_a_row_attends_to_exactly_its_own_length() -> None:
    # Keys 0 and ln 2, query 1, values 3 and 6: weights 1/3 and 2/3 give 5. What lies behind is NaN. The second token is padding.
    slots = slots_holding([0.0, math.log(2)], [3.0, 6.0])
    output = slots.attend(0, torch.ones(2, 1, 1), [(0, 2)], None)
    torch.testing.assert_close(output, torch.tensor([[5.0], [0.0]]))
    assert slots.attend(0, torch.ones(1, 1, 1), [(0, 1)], None).item() == 3.0


@pytest.mark.parametrize(("window", "expected"), [(1, 3.0), (2, 2.5), (3, 2.0), (9, 2.0)])
def test_a_sliding_window_counts_the_token_itself(window: int, expected: float) -> None:
    # Equal keys: the mean of the last `window` of the values 1, 2, 3.
    slots = slots_holding([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    assert slots.attend(0, torch.ones(1, 1, 1), [(0, 3)], window).item() == pytest.approx(expected)


@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_a_packed_product_is_the_product(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, inputs = (torch.randn(size, generator=generator) for size in ((40, 24), (40,), (num_rows, 24)))
    for added in (bias, None):
        expected = inputs.double() @ weight.double().T + (0 if added is None else added.double())
        torch.testing.assert_close(make_linear(weight, added)(inputs).double(), expected, atol=1e-5, rtol=1e-5)


def test_rows_that_differ_by_place_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A layer that treats the last row differently, as a kernel with a remainder loop may: the guarantee must be withdrawn.
    write_model(tmp_path, tiny_shape("llama"), dtype=torch.float32)
    step = Decoder.step

    def uneven(self: Decoder, *arguments: Any, width: int) -> torch.Tensor:
        logits = step(self, *arguments, width=width)
        return torch.cat([logits[:-1], logits[-1:] * (1 + 2**-22)])

    monkeypatch.setattr(Decoder, "step", uneven)
    assert not load(tmp_path, batch_size=8).describe()["rows_independent"]


def test_a_width_whose_bits_differ_from_the_widest_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, tiny_shape("llama"), dtype=torch.float32)
    assert load(tmp_path, batch_size=32).describe()["widths"] == [8, 16, 32]
    step = Decoder.step

    def another_at_16(self: Decoder, *arguments: Any, width: int) -> torch.Tensor:
        return step(self, *arguments, width=width) * (1 + 2**-22 if width == 16 else 1)

    monkeypatch.setattr(Decoder, "step", another_at_16)
    facts = load(tmp_path, batch_size=32).describe()
    assert (facts["widths"], facts["rows_independent"]) == ([8, 32], True)


def test_slots_are_refilled_as_rows_finish(tmp_path: Path) -> None:
    # 21 rows through 4 slots, most of which end early: the batch stays nearly full, as one that waits for its longest row cannot.
    write_model(tmp_path, tiny_shape("llama"), dtype=torch.float32)
    engine = load(tmp_path, batch_size=4)
    rows = list(engine.generate(make_prompts(), replace(SAMPLED, eos_ids=tuple(range(2, 40)))))
    num_tokens = {row.example_id: len(row.token_ids) for row in rows}
    lengths = [num_tokens[prompt.example_id] for prompt in make_prompts()]
    assert len(set(lengths)) > 3
    # A prompt's pass draws the first token; batches of four that wait for their longest row would take this many steps.
    steps_of_waiting_batches = sum(max(lengths[i : i + 4]) - 1 for i in range(0, 21, 4))
    steps = sum(length - 1 for length in lengths) / (engine.describe()["in_flight_use"] * 4)
    assert steps < 0.75 * steps_of_waiting_batches


def test_a_model_whose_weights_are_not_finite_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_model(tmp_path, tiny_shape("llama"), dtype=torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinity"):
        list(load(tmp_path, batch_size=2).generate(make_prompts(2), GREEDY))
