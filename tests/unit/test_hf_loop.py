"""The built-in engine's own promise: a row's bits do not depend on the rows beside it."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_megatron.generation import hf_loop
from spin_megatron.generation.engine import EngineSpec, Prompt, Sampling
from spin_megatron.generation.hf_loop import HfLoop, PackedLinear, row_attention
from spin_megatron.plan.shape import Family
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
    return hf_loop.load(EngineSpec(folder, dtype, batch_size, max_prompt_tokens=32, max_new_tokens=16), folder)


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


def test_row_attention_reads_exactly_the_row_s_own_length() -> None:
    # Two heads of size 1, scale 1. Row 0 sees keys 0, ln 2 with values 3, 6: weights 1/3, 2/3 -> 5. What lies beyond is NaN.
    nan = float("nan")
    keys = torch.tensor([[[[0.0], [torch.log(torch.tensor(2.0))], [nan]]], [[[0.0], [nan], [nan]]]])
    values = torch.tensor([[[[3.0], [6.0], [nan]]], [[[7.0], [nan], [nan]]]])
    query = torch.ones(3, 2, 1, 1)
    output, _ = row_attention(torch.nn.Identity(), query, keys.split(1), values.split(1), None, scaling=1.0, rows=[(0, 2), (1, 1)])
    torch.testing.assert_close(output[:, 0, :, 0], torch.tensor([[5.0, 5.0], [7.0, 7.0], [0.0, 0.0]]))


def test_a_sliding_window_of_one_sees_only_the_newest_token() -> None:
    keys, values = torch.zeros(1, 1, 4, 1), torch.tensor([[[[1.0], [2.0], [3.0], [4.0]]]])
    for window, expected in ((1, 3.0), (2, 2.5)):  # of three tokens: the last, the mean of the last two
        settings = {"scaling": 1.0, "rows": [(0, 3)], "sliding_window": window}
        output, _ = row_attention(torch.nn.Identity(), torch.ones(1, 1, 1, 1), keys.split(1), values.split(1), None, **settings)
        assert output.item() == expected


def test_a_packed_linear_layer_computes_what_the_layer_did() -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        linear = torch.nn.Linear(24, 40, bias=bias)
        inputs = torch.randn(5, 1, 24)
        expected = inputs.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
        torch.testing.assert_close(PackedLinear(linear)(inputs).double(), expected, atol=1e-6, rtol=1e-6)


def test_rows_that_differ_by_place_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A layer that treats the last row differently, as a kernel with a remainder loop may: the guarantee must be withdrawn.
    write_model(tmp_path, tiny_shape("llama"), dtype=torch.float32)
    forward = PackedLinear.forward

    def uneven(self: PackedLinear, input_BQI: torch.Tensor) -> torch.Tensor:
        output = forward(self, input_BQI)
        return torch.cat([output[:-1], output[-1:] * (1 + 2**-23)]) if len(output) > 1 else output

    monkeypatch.setattr(PackedLinear, "forward", uneven)
    assert not load(tmp_path, batch_size=8).describe()["rows_independent"]


def test_a_width_whose_bits_differ_from_the_widest_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, tiny_shape("llama"), dtype=torch.float32)
    assert load(tmp_path, batch_size=32).describe()["widths"] == [8, 16, 32]
    forward = PackedLinear.forward

    def wide_only(self: PackedLinear, input_BQI: torch.Tensor) -> torch.Tensor:
        output = forward(self, input_BQI)
        return output * (1 + 2**-23) if len(output) == 16 else output

    monkeypatch.setattr(PackedLinear, "forward", wide_only)
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
    steps = sum(length - 1 for length in lengths) / engine.describe()["rows_in_flight"]
    assert steps < 0.75 * steps_of_waiting_batches


def test_a_model_whose_weights_are_not_finite_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_model(tmp_path, tiny_shape("llama"), dtype=torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinity"):
        list(load(tmp_path, batch_size=2).generate(make_prompts(2), GREEDY))
