"""Layouts that fit are ranked, those that do not are refused with their reason; the command prints both, without torch."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spin_megatron.config_file import load_config
from spin_megatron.launch.plan import examples_of
from spin_megatron.plan.duration import Workload
from spin_megatron.plan.hardware import find_gpu
from spin_megatron.plan.layouts import (
    Candidate,
    Question,
    Refusal,
    balanced_stages,
    check_fits,
    describe,
    enumerate_layouts,
    search,
    stage_variants,
    try_layout,
    usable_bytes,
)
from spin_megatron.plan.memory import TrainSettings, all_ranks
from spin_megatron.plan.run_plan import check_config_fits
from spin_megatron.plan.shape import ModelShape, ParallelLayout

LLAMA3_8B = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, 5e5)
LLAMA3_70B = replace(LLAMA3_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_heads=64)
MIXTRAL = replace(LLAMA3_8B, family="mixtral", vocab_size=32000, num_experts=8, experts_per_token=2, expert_ffn_hidden_size=14336)
CONFIG_JSON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 8192,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
CONFIG_TOML = """
[model]
path = "meta-llama/Meta-Llama-3-70B-Instruct"
revision = "main"
[data]
source = "HuggingFaceH4/ultrachat_200k"
revision = "main"
num_examples = 50000
max_prompt_tokens = 512
[train]
pack_tokens = 4096
[parallel]
tensor = 8
pipeline = 4
sequence = true
"""


def question(shape: ModelShape = LLAMA3_70B, *, gpu: str = "h100", pairs: int = 64, **settings: Any) -> Question:
    workload = Workload(50000, 123, 314, 314, (50000,), (2,))
    return Question(shape, find_gpu(gpu), TrainSettings(4096, 1, **settings), workload, pairs, share_prompt=True)


def test_every_layout_has_as_many_ranks_as_gpus_and_every_split_of_them_is_tried() -> None:
    layouts = list(enumerate_layouts(LLAMA3_8B, 16, find_gpu("h100"), pack_tokens=4096))
    assert {layout.world_size for layout in layouts} == {16}
    assert len(set(layouts)) == len(layouts)
    assert {(layout.tensor, layout.pipeline) for layout in layouts} == {
        (tensor, pipeline) for tensor in (1, 2, 4, 8) for pipeline in (1, 2, 4, 8, 16) if tensor * pipeline <= 16
    }
    assert {layout.virtual_pipeline for layout in layouts if layout.pipeline == 4} == {1, 2, 4, 8}
    assert all(layout.sequence == (layout.tensor > 1) for layout in layouts)


def test_expert_ranks_divide_experts_and_data_ranks() -> None:
    layouts = [
        layout for layout in enumerate_layouts(MIXTRAL, 8, find_gpu("h100"), pack_tokens=4096) if layout.tensor == layout.pipeline == 1
    ]
    assert [layout.expert for layout in layouts] == [1, 2, 4, 8]


def test_context_ranks_are_tried_where_each_keeps_4096_tokens_of_a_pack() -> None:
    layouts = list(enumerate_layouts(LLAMA3_8B, 16, find_gpu("h100"), pack_tokens=4 * 4096))
    assert {layout.world_size for layout in layouts} == {16}
    assert {layout.context for layout in layouts if layout.tensor == layout.pipeline == 1} == {1, 2, 4}
    assert {layout.context for layout in enumerate_layouts(LLAMA3_8B, 16, find_gpu("h100"), pack_tokens=8191)} == {1}


def test_a_long_pack_that_one_rank_cannot_hold_is_split_over_context_ranks() -> None:
    # 65536 tokens of Llama-3-8B on one rank: even the layers' inputs, 32 x 8 KiB a token, are 17 GB beside 128 GB / 8 of state.
    asked = question(LLAMA3_8B)
    long = replace(asked, settings=replace(asked.settings, pack_tokens=65536), global_batch_pairs=1024)
    best = search(long, 8).candidates[0]
    assert best.layout.context > 1
    assert "context=" in describe(best)
    assert isinstance(try_layout(long, best.layout, recompute=best.settings.recompute), Candidate)


def test_the_optimizer_in_the_host_s_memory_is_named_where_it_makes_a_model_fit() -> None:
    asked = question(optimizer="rmsprop")
    # 70.55 G / 16 ranks: 26.5 GB of weights and gradients, and 35.3 GB of main weights and squares.
    layout = ParallelLayout(tensor=8, pipeline=2, sequence=True)
    crowded = replace(asked, gpu=find_gpu("a100-40gb"))
    with pytest.raises(ValueError, match=r"no layout of 16 GPUs fits; .* or optimizer\.offload_fraction=1, with which this fits: tensor="):
        check_fits(crowded, layout, "full")
    offloaded = replace(crowded, settings=replace(crowded.settings, offload_fraction=1.0))
    fits = check_fits(offloaded, layout, "full")
    assert fits.memory.state.optimizer == 0
    assert fits.memory.state.host == fits.memory.state.num_parameters * 12


def test_the_best_layout_fits_on_every_rank_and_is_the_fastest() -> None:
    asked = question()
    found = search(asked, 32)
    best = found.candidates[0]
    assert best.layout.world_size == 32
    assert max(memory.total for memory in all_ranks(LLAMA3_70B, best.layout, best.settings)) == best.memory.total
    assert best.memory.total <= usable_bytes(asked.gpu)
    rates = [candidate.pairs_per_second for candidate in found.candidates]
    assert rates == sorted(rates, reverse=True)


def test_70b_does_not_fit_on_8_h100_and_says_what_it_needs() -> None:
    found = search(question(), 8)
    assert found.candidates == []
    reason = next(refusal.reason for refusal in found.refusals if refusal.layout == ParallelLayout(tensor=8, sequence=True))
    # 70.55 G parameters / 8: weights 2 bytes, gradients 4, AdamW with one data rank 12.
    assert "weights 17.6, gradients 35.3, optimizer 105.8" in reason
    assert "train.recompute=full" in reason
    assert "h100-80gb has 81.5 GB to use" in reason


def test_more_recompute_is_taken_only_where_it_is_needed() -> None:
    layout = ParallelLayout(data=8)
    roomy = try_layout(question(LLAMA3_8B, gpu="h200"), layout)
    tight = try_layout(question(LLAMA3_8B, gpu="h100"), layout)
    assert isinstance(roomy, Candidate)
    assert isinstance(tight, Candidate)
    assert (roomy.settings.recompute, tight.settings.recompute) == ("none", "selective")
    assert roomy.step.total < tight.step.total


def test_a_layout_that_does_not_divide_the_model_is_refused_by_its_field() -> None:
    outcome = try_layout(question(), ParallelLayout(tensor=3))
    assert isinstance(outcome, Refusal)
    assert "parallel.tensor=3 does not divide model.num_heads=64" in outcome.reason


def test_context_ranks_halve_what_tokens_leave_but_not_the_keys_they_attend_to() -> None:
    one, two = (
        all_ranks(LLAMA3_70B, ParallelLayout(tensor=8, pipeline=4, context=context, sequence=True), question().settings)[0]
        for context in (1, 2)
    )
    assert 0.5 < two.activations / one.activations < 0.6


@pytest.mark.parametrize(
    ("num_layers", "layout", "head_layers", "stages"),
    [
        # 80 layers and a head of 1.6: the mean is 20.4, so one inner rank takes 21 and the last, with the head, 20.6.
        (80, ParallelLayout(pipeline=4), 1.6, (20, 20, 21, 19)),
        (32, ParallelLayout(pipeline=4), 2.4, (8, 9, 9, 6)),
        (30, ParallelLayout(pipeline=4), 0.0, (7, 7, 8, 8)),
        # Nine layers on the first rank, seven and the head on the second, each rank's from its first chunk to its last.
        (16, ParallelLayout(pipeline=2, virtual_pipeline=4), 2.0, (3, 2, 2, 2, 2, 2, 2, 1)),
        (4, ParallelLayout(pipeline=4), 9.0, (1, 1, 1, 1)),
    ],
)
def test_stages_make_up_for_the_head(num_layers: int, layout: ParallelLayout, head_layers: float, stages: tuple[int, ...]) -> None:
    assert balanced_stages(num_layers, layout, head_layers=head_layers) == stages


def test_layers_that_stages_do_not_divide_are_planned_too_and_the_balanced_split_is_the_faster_one() -> None:
    asked = question(replace(LLAMA3_8B, num_layers=30))
    (only,) = stage_variants(asked, ParallelLayout(tensor=2, pipeline=4, sequence=True))
    assert sum(only.stage_layers) == 30
    even, balanced = stage_variants(question(LLAMA3_8B), ParallelLayout(tensor=2, pipeline=4, sequence=True))
    assert (even.stage_layers, balanced.stage_layers) == ((), (8, 9, 9, 6))
    slow, fast = (try_layout(question(LLAMA3_8B), layout) for layout in (even, balanced))
    assert isinstance(slow, Candidate)
    assert isinstance(fast, Candidate)
    assert fast.step.total < slow.step.total
    assert fast.step.imbalance < slow.step.imbalance
    assert "stage_layers=[" in describe(fast)
    assert "stage_layers" not in describe(slow)


def test_uneven_stages_are_proposed_only_where_they_are_worth_a_list_of_numbers() -> None:
    found = {(c.layout.tensor, c.layout.pipeline, c.layout.virtual_pipeline): c for c in search(question(), 32).candidates}
    assert found[8, 4, 10].layout.stage_layers == (), "0.2% faster with another split"
    uneven = [c.layout for c in search(question(LLAMA3_8B), 16).candidates if c.layout.stage_layers]
    assert any(layout.pipeline == 8 for layout in uneven), "a head of two layers beside stages of four"


def test_data_ranks_that_make_the_batch_another_recipe_are_refused() -> None:
    outcome = try_layout(question(LLAMA3_8B), ParallelLayout(data=32))
    assert isinstance(outcome, Refusal)
    # 4096 x 0.985 / (123 + 313 + 313) = 5.39 pairs a pack, 32 of them.
    assert outcome.reason.startswith("parallel.data=32 packs of 5.4 pairs make 172 pairs an update, train.global_batch_pairs=64")


def test_virtual_stages_pay_for_the_empty_packs_that_fill_their_rounds() -> None:
    # 64 pairs are 11.9 packs; eight stages run rounds of eight packs, so four of sixteen are empty.
    plain = try_layout(question(), ParallelLayout(tensor=8, pipeline=8, sequence=True))
    virtual = try_layout(question(), ParallelLayout(tensor=8, pipeline=8, sequence=True, virtual_pipeline=2))
    assert isinstance(plain, Candidate)
    assert isinstance(virtual, Candidate)
    assert plain.settings.micro_batches == virtual.settings.micro_batches == 12
    assert virtual.step.compute / plain.step.compute == pytest.approx(16 / 12)
    assert virtual.step.num_tokens == plain.step.num_tokens == 12 * 4096


def test_a_config_that_does_not_fit_is_refused_with_one_that_does(tmp_path: Path) -> None:
    config, shape = _write_config(tmp_path)
    fits = check_config_fits(load_config(config), "h100", model_config=shape)
    assert fits.memory.total <= usable_bytes(find_gpu("h100"))
    message = r"\[parallel\] tensor=8 pipeline=2 data=1 sequence=true: pipeline rank 0 needs .* on 16 GPUs this fits: .*=full"
    with pytest.raises(ValueError, match=message):
        check_config_fits(load_config(config, ["parallel.pipeline=2", "train.pack_tokens=12288"]), "h100", model_config=shape)
    with pytest.raises(ValueError, match="no layout of 2 GPUs fits; use more or larger GPUs"):
        check_config_fits(load_config(config, ["parallel.pipeline=1", "parallel.tensor=2"]), "h100", model_config=shape)


def test_the_named_cure_fits_when_it_is_taken() -> None:
    asked = question(optimizer="adamw")
    with pytest.raises(ValueError, match="on 32 GPUs this fits: tensor="):
        check_fits(asked, ParallelLayout(data=8, tensor=4, sequence=True), "none")
    best = search(asked, 32).candidates[0]
    assert check_fits(asked, best.layout, best.settings.recompute).layout == best.layout


def test_the_command_prints_tables_and_json_without_torch(tmp_path: Path) -> None:
    config, shape = _write_config(tmp_path)
    options = [str(config), "--gpus", "32", "--gpu", "h100-80gb", "--model-config", str(shape)]
    tables = _plan(options)
    assert "Best: tensor=8 pipeline=4 data=1" in tables
    assert "Whole run:" in tables
    assert "generate.engine=builtin runs on one GPU" in tables
    assert "generate.batch_size=16 is all that the engine computes at a time" in tables
    plan = json.loads(_plan([*options, "--json"]))
    assert plan["examples_from"] == "data.num_examples"
    assert plan["best"].startswith("tensor=8 pipeline=4 data=1")
    assert [memory["pipeline_rank"] for memory in plan["ranks"]] == [0, 1, 2, 3]
    assert plan["ranks"][0]["state"]["num_parameters"] == 2270756864
    assert len(plan["iterations"]) == 3
    modes = plan["best_by_recompute"]
    assert [mode["recompute"] for mode in modes] == ["none", "selective", "full"]
    assert modes[0]["memory"] == plan["layouts"][0]["memory"]
    memory, seconds = ([mode[key]["total"] for mode in modes] for key in ("memory", "step"))
    assert memory == sorted(memory, reverse=True)
    assert seconds == sorted(seconds)
    assert f"By recompute: none {memory[0] / 1e9:.1f} GB" in tables
    assert all(refusal["reason"] for refusal in plan["refused"])


def test_prompts_are_the_rows_of_a_source_that_is_here_and_else_a_number_that_is_said(tmp_path: Path) -> None:
    config, shape = _write_config(tmp_path)
    assert examples_of(load_config(config), 7) == (7, "--examples")
    assert examples_of(load_config(config), None) == (50_000, "data.num_examples")
    elsewhere = examples_of(load_config(config, ["data.num_examples=null"]), None)
    assert elsewhere == (50_000, "assumed: data.source cannot be counted here, give --examples")
    (tmp_path / "train.jsonl").write_text('{"prompt": "x", "response": "y"}\n' * 1300, encoding="utf-8")
    here = ["data.num_examples=null", "data.num_held_out=300", f"data.source={tmp_path / 'train.jsonl'}", "data.revision=null"]
    words = [word for override in here for word in ("--set", override)]
    tables = _plan([str(config), "--gpus", "32", "--model-config", str(shape), *words])
    assert "1000 prompts (rows of data.source that are not held out);" in tables
    with pytest.raises(ValueError, match="has too few rows, 1300 of 1301"):
        examples_of(load_config(config, [*here, "data.num_held_out=1300"]), None)


def test_the_command_says_which_lengths_it_refuses(tmp_path: Path) -> None:
    config, shape = _write_config(tmp_path)
    with pytest.raises(subprocess.CalledProcessError) as failure:
        _plan([str(config), "--gpus", "8", "--model-config", str(shape), "--prompt-tokens", "900"])
    assert "--prompt-tokens 900 must be at most data.max_prompt_tokens=512" in failure.value.stderr


def _write_config(folder: Path) -> tuple[Path, Path]:
    config, shape = folder / "config.toml", folder / "model.json"
    config.write_text(CONFIG_TOML, encoding="utf-8")
    shape.write_text(json.dumps(CONFIG_JSON), encoding="utf-8")
    return config, shape


def _plan(options: list[str]) -> str:
    """`plan` in a fresh interpreter that has no torch."""
    script = (
        "import sys, argparse; sys.modules['torch'] = None\n"
        "from spin_megatron.launch.plan import add_parser\n"
        "parser = argparse.ArgumentParser(); add_parser(parser.add_subparsers())\n"
        "arguments = parser.parse_args(['plan', *sys.argv[1:]]); sys.exit(arguments.handler(arguments))\n"
    )
    return subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True, timeout=120, check=True).stdout
