"""Bytes the planner names, against bytes that Megatron Core and autograd hold on CPU for a small model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import schedules

from spin_megatron.mcore.lora import Lora, add_adapters
from spin_megatron.mcore.model import SpinModel, build_model
from spin_megatron.mcore.optimizer import UpdateRule, apply_gradients, build_trainer, clear_gradients, parts
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.mcore.training import Objective, train_step
from spin_megatron.plan.adapters import MODULES, AdapterShape
from spin_megatron.plan.layouts import RECOMPUTE_ORDER
from spin_megatron.plan.memory import OptimizerName, TrainSettings, chunks_in_flight, layer_widths, state_bytes
from spin_megatron.plan.precision import PrecisionName
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from tests.parity.fake_ranks import fake_rank
from tests.parity.gloo import meeting_ports, run_ranks
from tests.parity.tiny_models import make_tiny_model
from tests.parity.updates import make_bench

# Odd sizes, so that padding shows: norms of 72 and head_dim 12 are no multiples of 64, the vocabulary is prime.
TINY = ModelShape("qwen3", 4, 72, 88, 6, 2, 12, 257, 64, 1e-6, 1e4, qk_norm=True)
TIED = replace(TINY, family="llama", qk_norm=False, tied_embeddings=True)
MIXTURE = replace(TINY, family="mixtral", qk_norm=False, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=91)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def state_after_an_update(
    shape: ModelShape, runtime: Runtime, precision: PrecisionName, rule: UpdateRule, adapters: AdapterShape | None = None
) -> list[int]:
    """Bytes of weights, gradients and optimizer."""
    chunks = build_model(shape, runtime, dtype=DTYPES[precision])
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.zeros_(parameter)
    if adapters is not None:
        add_adapters(chunks, Lora(adapters, 1.0, 0, 0), runtime)
    trainer = build_trainer(chunks, rule)
    clear_gradients(trainer)
    apply_gradients(trainer, learning_rate=1e-3)
    buffers = [buffer for chunk in trainer.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    weights = sum(_storages([parameter for chunk in chunks for parameter in chunk.parameters()]).values())
    return [weights, gradients, _optimizer_bytes(trainer.optimizer, rule, weights_kept=chunks)]


def state_of_a_real_rank(shape: ModelShape, layout: ParallelLayout) -> list[int]:
    with running(layout, device="cpu", seed=0) as runtime:
        return state_after_an_update(shape, runtime, "bf16", UpdateRule("adamw", is_distributed=True))


def _storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage the tensors lie in."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _optimizer_bytes(optimizer: Any, rule: UpdateRule, *, weights_kept: list[SpinModel]) -> int:
    """Main parameters that are not the model's own weights, and the rule's moments."""
    own = _storages([parameter for chunk in weights_kept for parameter in chunk.parameters()])
    total = 0
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage().data_ptr() not in own:
                    total += parameter.nbytes
                total += sum(part.optimizer.state[parameter][name].nbytes for name in rule.state_names)
    return total


@pytest.mark.parametrize(
    ("shape", "layout", "precision", "optimizer", "is_sharded"),
    [
        pytest.param(TINY, ParallelLayout(data=2), "bf16", "adamw", True, id="AdamW over two data ranks"),
        pytest.param(TINY, ParallelLayout(tensor=2, data=2), "bf16", "rmsprop", True, id="RMSProp TP2 DP2"),
        pytest.param(TINY, ParallelLayout(data=3), "fp32", "adamw", True, id="fp32 has no second copy of the weights"),
        pytest.param(TINY, ParallelLayout(data=2), "bf16", "adamw", False, id="every data rank holds all of it"),
        pytest.param(TIED, ParallelLayout(pipeline=2, data=2), "bf16", "adamw", True, id="tied embedding has a bucket of its own"),
        pytest.param(TINY, ParallelLayout(pipeline=2, virtual_pipeline=2), "bf16", "adamw", True, id="each virtual stage has buffers"),
        pytest.param(MIXTURE, ParallelLayout(data=6, expert=2), "bf16", "adamw", True, id="experts are shared by fewer ranks"),
    ],
)
def test_planned_state_is_what_megatron_core_allocates(
    shape: ModelShape, layout: ParallelLayout, precision: PrecisionName, optimizer: OptimizerName, is_sharded: bool
) -> None:
    """Every rank in turn is this process: what it allocates does not depend on what the others send."""
    settings = TrainSettings(64, 1, precision=precision, optimizer=optimizer, distributed_optimizer=is_sharded)
    for rank in range(layout.world_size):
        with fake_rank(layout, rank, device="cpu") as runtime:
            measured = state_after_an_update(shape, runtime, precision, UpdateRule(optimizer, is_distributed=is_sharded))
            planned = state_bytes(shape, layout, settings, runtime.pipeline_rank, runtime.data_rank)
            assert [planned.weights, planned.gradients, planned.optimizer] == measured, rank


def test_real_data_ranks_hold_what_is_planned() -> None:
    layout = ParallelLayout(data=2)
    for data_rank, measured in enumerate(run_ranks(state_of_a_real_rank, 2, TINY, layout, timeout=240)):
        planned = state_bytes(TINY, layout, TrainSettings(64, 1), 0, data_rank)
        assert [planned.weights, planned.gradients, planned.optimizer] == measured


@pytest.mark.parametrize(
    ("shape", "layout", "adapters"),
    [
        pytest.param(TINY, ParallelLayout(tensor=2, data=2), AdapterShape(3, tuple(MODULES)), id="all targets, TP2 DP2"),
        pytest.param(TIED, ParallelLayout(pipeline=2, virtual_pipeline=2), AdapterShape(5, ("fc2", "qkv")), id="two targets, tied"),
        pytest.param(MIXTURE, ParallelLayout(data=2, expert=2), AdapterShape(2, ("qkv", "proj")), id="attention of experts' layers"),
    ],
)
@pytest.mark.parametrize("is_sharded", [True, False])
def test_with_adapters_frozen_weights_are_all_there_is_of_the_base(
    shape: ModelShape, layout: ParallelLayout, adapters: AdapterShape, is_sharded: bool
) -> None:
    settings = TrainSettings(64, 1, optimizer="adamw", distributed_optimizer=is_sharded, adapters=adapters)
    for rank in range(layout.world_size):
        with fake_rank(layout, rank, device="cpu") as runtime:
            measured = state_after_an_update(shape, runtime, "bf16", UpdateRule("adamw", is_distributed=is_sharded), adapters)
            planned = state_bytes(shape, layout, settings, runtime.pipeline_rank, runtime.data_rank)
            assert [planned.weights, planned.gradients, planned.optimizer] == measured, rank
            whole = state_bytes(shape, layout, replace(settings, adapters=None), runtime.pipeline_rank, runtime.data_rank)
            assert planned.gradients + planned.optimizer < 0.3 * (whole.gradients + whole.optimizer)


@contextmanager
def waiting_chunks() -> Iterator[list[int]]:
    """After each forward of Megatron Core's schedules, how many this rank has made and not yet gone back through."""
    counts, waiting, forward, backward = [], 0, schedules.forward_step, schedules.backward_step

    def counted_forward(*args: Any, **options: Any) -> Any:
        nonlocal waiting
        waiting += 1
        counts.append(waiting)
        return forward(*args, **options)

    def counted_backward(*args: Any, **options: Any) -> Any:
        nonlocal waiting
        waiting -= 1
        return backward(*args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(schedules, "forward_step", counted_forward)
        patched.setattr(schedules, "backward_step", counted_backward)
        yield counts
    assert waiting == 0


def most_waiting_chunks(folder: Path, layouts: list[ParallelLayout], num_packs: int, ports: list[int]) -> list[int]:
    """Of this rank in an update, by layout."""
    found = []
    for layout, port in zip(layouts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with running(layout, device="cpu", seed=1) as runtime:
            bench = make_bench(folder, UpdateRule("rmsprop"), runtime)
            packs = bench.packed.packs[:num_packs]
            batches, num_pairs = bench.batches(packs), sum(len(pack.pair_ids) for pack in packs)
            with waiting_chunks() as counts:
                train_step(
                    bench.trainer, batches, bench.references, Objective("logistic", 0.1), runtime, num_pairs=num_pairs, learning_rate=1e-3
                )
            found.append(max(counts))
    return found


def test_planned_chunks_in_flight_are_those_of_megatron_cores_schedules(tmp_path: Path) -> None:
    folder, num_packs = make_tiny_model("llama2", tmp_path, num_hidden_layers=8), 10
    layouts = [
        ParallelLayout(data=4),
        ParallelLayout(pipeline=2, data=2, virtual_pipeline=4),
        ParallelLayout(pipeline=4),
        ParallelLayout(pipeline=4, virtual_pipeline=2),  # fills up to 12 packs
    ]
    with meeting_ports(len(layouts)) as ports:
        found = run_ranks(most_waiting_chunks, 4, folder, layouts, num_packs, ports, timeout=240)
    for layout, by_rank in zip(layouts, zip(*found, strict=True), strict=True):
        micro_batches = -(-num_packs // layout.data)
        # Megatron Core's order of ranks: pipeline outermost.
        planned = [chunks_in_flight(layout, rank // layout.data, micro_batches) for rank in range(4)]
        assert list(by_rank) == planned, layout
    assert [by_layout[-2:] for by_layout in found] == [[4, 11], [3, 9], [2, 7], [1, 5]]


def kept_for_backward(shape: ModelShape, layout: ParallelLayout, num_tokens: int, adapters: AdapterShape | None) -> dict[str, int]:
    """By recompute mode: bytes of the storages that autograd keeps of a forward, weights not counted."""
    kept = {}
    with fake_rank(layout, 0, device="cpu") as runtime:
        for mode in RECOMPUTE_ORDER:
            chunks = build_model(shape, runtime, dtype=torch.bfloat16, recompute=mode)
            if adapters is not None:
                add_adapters(chunks, Lora(adapters, 1.0, 0, 0), runtime)
            kept[mode] = _kept(chunks[0], num_tokens)
    return kept


def layer_bytes(shape: ModelShape, layout: ParallelLayout, num_tokens: int, adapters: AdapterShape | None = None) -> dict[str, float]:
    """By recompute mode: bytes of one layer, the difference between four and two layers, so that embedding and head drop out."""
    deep, flat = (kept_for_backward(replace(shape, num_layers=number), layout, num_tokens, adapters) for number in (4, 2))
    return {mode: (deep[mode] - flat[mode]) / 2 for mode in deep}


def _kept(chunk: SpinModel, num_tokens: int, num_rows: int = 0) -> int:
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    own = _storages(list(chunk.parameters()))
    held: list[torch.Tensor] = []  # alive until counted: a freed storage's address would be used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    rows_R = torch.zeros(num_rows, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logp_R = chunk.train()(
            torch.zeros(1, num_tokens, dtype=torch.int64),
            torch.arange(num_tokens)[None],
            torch.tensor([[0, 0, 0, num_tokens]]),
            rows_R,
            rows_R,
        )
    held += logp_R.grad_fn.kept.values()  # logits, which the head's node holds itself
    return sum(num_bytes for address, num_bytes in _storages(held).items() if address not in own)


def test_only_the_layers_that_are_told_are_made_again() -> None:
    shape = replace(TINY, num_layers=4)
    kept = {}
    with fake_rank(ParallelLayout(), 0, device="cpu") as runtime:
        for layers in (1, 2, 3):
            chunks = build_model(shape, runtime, dtype=torch.float32, recompute="full", recompute_layers=layers)
            kept[layers] = _kept(chunks[0], 64)
    # Neither none nor all: without the first goes a copy of the branches, with the last the rotary table, which all layers share.
    assert kept[1] - kept[2] == kept[2] - kept[3] > 0


def test_the_head_keeps_the_logits_it_is_told_to() -> None:
    with fake_rank(ParallelLayout(), 0, device="cpu") as runtime:
        nothing, everything = (
            _kept(build_model(TINY, runtime, dtype=torch.float32, kept_logit_bytes=budget)[0], 64, 50) for budget in (0, 2**20)
        )
    assert everything - nothing == 50 * TINY.vocab_size * 4


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(ParallelLayout(), id="one rank"),
        pytest.param(ParallelLayout(tensor=2), id="TP2"),
        pytest.param(ParallelLayout(tensor=2, sequence=True), id="TP2 SP"),
    ],
)
@pytest.mark.parametrize(
    "adapters",
    [
        pytest.param(None, id="all weights"),
        pytest.param(AdapterShape(4, tuple(MODULES)), id="all targets"),
        pytest.param(AdapterShape(6, ("proj", "fc2")), id="row-parallel targets"),
    ],
)
@pytest.mark.parametrize("qk_norm", [pytest.param(False, id="plain heads"), pytest.param(True, id="norms of heads")])
def test_planned_activations_of_a_layer_are_what_autograd_keeps(
    layout: ParallelLayout, adapters: AdapterShape | None, qk_norm: bool
) -> None:
    """Exact, with what parts local layers from the GPU's: the planner's formula is that of Transformer Engine's.

    Each local norm keeps one fp32 number a token. What norms and the activation give is made again (mcore/layers.py), but for the input
    of an MLP that is recomputed as a whole; with adapters the formula counts it where an adapter reads it.
    """
    shape = ModelShape("qwen3" if qk_norm else "llama", 4, 128, 320, 8, 2, 16, 256, 4096, 1e-5, 1e4, qk_norm=qk_norm)
    num_tokens = 128
    split = layout.tensor if layout.sequence else 1
    statistics = 2 * 4 // split
    read = set(MODULES) if adapters is None else set(adapters.targets)
    hidden, activated = 2 * shape.hidden_size // split, 2 * shape.ffn_hidden_size // layout.tensor
    made_again = {
        "none": (("qkv" in read) + ("fc1" in read)) * hidden + ("fc2" in read) * activated,
        "selective": ("qkv" in read) * hidden,
    }
    for mode, num_bytes in layer_bytes(shape, layout, num_tokens, adapters).items():
        widths = layer_widths(shape, layout, TrainSettings(num_tokens, 1, recompute=mode, adapters=adapters))
        beyond = 0 if mode == "full" else statistics - made_again[mode]
        assert num_bytes == (widths.token_bytes(2, mode) + beyond) * num_tokens, mode


def test_local_experts_keep_their_tokens_and_their_first_product() -> None:
    """Of a copy less than planned: what it weighed is made again, as is the attention's input."""
    num_tokens, copies = 128, 2
    dense = ModelShape("mixtral", 4, 128, 320, 8, 2, 16, 256, 4096, 1e-5, 1e4)
    shape = replace(dense, num_experts=4, experts_per_token=copies, expert_ffn_hidden_size=256)
    made_again, norms = 2 * (copies * 256 + 128), 2 * 4
    # int64 and fp32 of each chosen expert, the token (int64) and the weight (fp32) of each copy; a bool and fp32 of every expert.
    routing = copies * (8 + 4 + 8 + 4) + 4 * (1 + 4)
    planned_routing = 2 * 2 * 4
    planned = layer_widths(shape, ParallelLayout(), TrainSettings(num_tokens, 1)).token_bytes(2, "none")
    measured = layer_bytes(shape, ParallelLayout(), num_tokens)["none"]
    assert measured == (planned - planned_routing - made_again + norms + routing) * num_tokens
