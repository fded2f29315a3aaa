"""LoRA from checkpoint to checkpoint: resumed bit for bit, loaded at other layouts, merged on export, and refused where it cannot be."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spin_megatron.config import RunConfig
from spin_megatron.convert.saved_checkpoint import SavedCheckpoint
from spin_megatron.convert.torch_dist import torch_dist_to_hf
from spin_megatron.data.progress import Progress
from spin_megatron.mcore.checkpoint import load_training, save_training
from spin_megatron.mcore.lora import Lora
from spin_megatron.mcore.optimizer import UpdateRule
from spin_megatron.mcore.runtime import running
from spin_megatron.plan.adapters import AdapterShape
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import Manifest, output_file, write_manifest
from spin_megatron.run.records import SpinPair, read_rows
from spin_megatron.stages import export, train
from spin_megatron.stages.context import StageContext
from tests.parity.gloo import meeting_ports, run_ranks
from tests.parity.tiny_models import make_tiny_model
from tests.parity.train_run import make_config, make_run
from tests.parity.updates import Bench, make_bench, make_steps, numbers_of, weight_bits

ADAPTERS = ("qkv", "proj", "fc1", "fc2")
LORA = Lora(AdapterShape(4, ADAPTERS), scale=2.0, seed=3, iteration=0)
RULE = UpdateRule("adamw", is_distributed=True)
RECIPE = {"lora.rank": 4}
SAVED_AT = ParallelLayout(tensor=2, data=2, sequence=True)
ELSEWHERE = (ParallelLayout(tensor=4), ParallelLayout(pipeline=2, data=2), ParallelLayout(pipeline=2, data=2, virtual_pipeline=2))


def _bench(folder: Path, runtime: Any, lora: Lora = LORA) -> Bench:
    rule = replace(RULE, is_distributed=runtime.layout.data > 1)
    return make_bench(folder, rule, runtime, lora=lora)


def _save_and_go_on(folder: Path, root: Path, ports: list[int]) -> Any:
    """Two updates at one layout, save, two more; the same two again there from the checkpoint, and at the other layouts."""
    os.environ["MASTER_PORT"] = str(ports[0])
    with running(SAVED_AT, device="cpu", seed=1) as runtime:
        bench = _bench(folder, runtime)
        make_steps(bench, (0, 1))
        saved = save_training(root, bench.trainer, Progress(step=2, packs_consumed=8), runtime, recipe=RECIPE, keep=2)
        undisturbed = numbers_of(make_steps(bench, (2, 3))), weight_bits(bench.trainer)
        again = _bench(folder, runtime, replace(LORA, seed=9))  # another A, which only what is loaded can put right
        load_training(saved, again.trainer, runtime, recipe=RECIPE)
        resumed = numbers_of(make_steps(again, (2, 3))), weight_bits(again.trainer)
    elsewhere = []
    for layout, port in zip(ELSEWHERE, ports[1:], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with running(layout, device="cpu", seed=1) as runtime:
            bench = _bench(folder, runtime, replace(LORA, seed=9))
            load_training(saved, bench.trainer, runtime, recipe=RECIPE)
            elsewhere.append(numbers_of(make_steps(bench, (2, 3))))
    return undisturbed, resumed, elsewhere


@pytest.mark.timeout(400)
def test_a_checkpoint_of_adapters_resumes_bit_for_bit_and_loads_at_other_layouts(tmp_path: Path) -> None:
    folder = make_tiny_model("qwen3_tied", tmp_path / "model")
    with meeting_ports(1 + len(ELSEWHERE)) as ports:
        ranks = run_ranks(_save_and_go_on, 4, folder, tmp_path / "checkpoints", ports, timeout=300)
    for undisturbed, resumed, elsewhere in ranks:
        assert resumed == undisturbed
        for layout, steps in zip(ELSEWHERE, elsewhere, strict=True):
            for found, wanted in zip(steps, undisturbed[0], strict=True):
                assert found == pytest.approx(wanted, rel=1e-5), layout
    saved = SavedCheckpoint(tmp_path / "checkpoints" / "step_00000002", trust=True)
    trained = {key for key in saved.tensors if not key.startswith("rng.")}
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    weights = {f"decoder.layers.{linear}.adapter.lora_{factor}" for linear in linears for factor in "ab"}
    assert trained == weights | {f"optimizer.state.{name}.{key}" for name in ("exp_avg", "exp_avg_sq") for key in weights}


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunLayout, RunConfig]:
    """Iteration 0 trained with adapters and theta_1 exported."""
    layout = make_run(tmp_path_factory.mktemp("lora"))
    config = make_config(layout.root, lora={"rank": 4, "alpha": 8.0})
    output = train.run(StageContext(config, layout, 0, show=False))
    files = tuple(output_file(layout.train(0), path) for path in output.files)
    write_manifest(layout.train(0), Manifest("train", 0, None, key="test", settings={}, inputs={}, outputs=files))
    export.run(StageContext(config, layout, 1, show=False))
    return layout, config


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _steps(layout: RunLayout) -> list[dict[str, Any]]:
    return [json.loads(line) for line in layout.metrics(0).read_text(encoding="utf-8").splitlines()]


def test_training_with_adapters_starts_at_margin_zero_and_learns(lora_run: tuple[RunLayout, RunConfig]) -> None:
    steps = _steps(lora_run[0])
    assert steps[0]["margin_abs"] == 0.0
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.01


def test_merged_weights_are_the_base_plus_the_adapters_rounded_once(lora_run: tuple[RunLayout, RunConfig]) -> None:
    layout, _ = lora_run
    base, merged = _weights(layout.theta(0)), _weights(layout.theta(1))
    adapter = load_file(layout.adapter(1) / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    changed = set()
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" not in adapter:
            assert torch.equal(merged[name], weight), name
            continue
        changed.add(name.split(".")[-2])
        delta = 8.0 / 4 * adapter[f"{prefix}.lora_B.weight"].double() @ adapter[f"{prefix}.lora_A.weight"].double()
        assert float(delta.abs().max()) > 1e-4, name
        # Weights of order 0.2: an fp32 product and sum are within two of their last bits of the exact ones.
        torch.testing.assert_close(merged[name].double(), weight.double() + delta, rtol=3e-7, atol=1e-8)
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_merged_in_bf16_the_sum_is_rounded_once(lora_run: tuple[RunLayout, RunConfig], tmp_path: Path) -> None:
    layout, _ = lora_run
    torch_dist_to_hf(layout.final_weights(0), layout.theta(0), tmp_path / "bf16", dtype="bfloat16", lora_alpha=8.0, show=False)
    adapter = load_file(layout.adapter(1) / "adapter_model.safetensors")
    name, prefix = "model.layers.2.mlp.down_proj.weight", "base_model.model.model.layers.2.mlp.down_proj"
    delta = 2.0 * adapter[f"{prefix}.lora_B.weight"].double() @ adapter[f"{prefix}.lora_A.weight"].double()
    exact = _weights(layout.theta(0))[name].bfloat16().double() + delta
    found = _weights(tmp_path / "bf16")[name]
    assert found.dtype == torch.bfloat16
    # But for ties that fp32 decides otherwise; rounding B A to bf16 first would move every hundredth weight.
    assert float((found == exact.bfloat16()).double().mean()) > 0.999
    with pytest.raises(ValueError, match="lacks"):
        torch_dist_to_hf(layout.final_weights(0), layout.theta(0), tmp_path / "whole", show=False)


def test_peft_beside_the_base_computes_what_the_merged_model_does(lora_run: tuple[RunLayout, RunConfig]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (the dev extra brings it)")
    from transformers import AutoModelForCausalLM

    layout, _ = lora_run
    pair = read_rows(layout.held_out_pairs(0), SpinPair)[0]
    tokens = torch.tensor([[*pair.prompt_ids, *pair.real_ids]])
    base = AutoModelForCausalLM.from_pretrained(layout.theta(0), dtype=torch.float32)
    with torch.no_grad():
        before = base(tokens).logits.clone()
        adapted = peft.PeftModel.from_pretrained(base, layout.adapter(1))(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(layout.theta(1), dtype=torch.float32)(tokens).logits
    assert float((adapted - before).abs().max()) > 1e-2
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


def test_another_rank_than_the_checkpoint_s_is_refused(lora_run: tuple[RunLayout, RunConfig]) -> None:
    layout, _ = lora_run
    with pytest.raises(ValueError, match=r"lora\.rank: 4 -> 8"):
        train.run(StageContext(make_config(layout.root, lora={"rank": 8, "alpha": 8.0}), layout, 0, show=False))


def test_adapters_of_experts_are_refused_and_those_of_attention_are_not(tmp_path: Path) -> None:
    experts = ModelShape.from_huggingface(make_tiny_model("mixtral", tmp_path))
    with pytest.raises(ValueError, match=r'lora\.targets=.*mixtral has 4 experts where fc1 would be.*use \["qkv", "proj"\]'):
        AdapterShape(4, ("qkv", "fc1")).check(experts)
    AdapterShape(4, ("qkv", "proj")).check(experts)
