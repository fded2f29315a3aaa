"""How pairs are packed, whether they share their prompt, and what is recomputed changes neither log-probs nor gradients."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spin_megatron.data.batches import PackBatch, make_batch
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.objective.logprobs import sequence_sums
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.run.records import SpinPair
from tests.parity.gloo import meeting_ports, run_ranks
from tests.parity.tiny_models import make_pairs, make_tiny_model

PAIRS = make_pairs(seed=3, num_pairs=4)
PACK_TOKENS = 256
Gradients = dict[str, torch.Tensor]


def _pack(pairs: Sequence[SpinPair], *, share_prompt: bool, pack_tokens: int = PACK_TOKENS) -> PackBatch:
    return make_batch(pairs, pack_tokens=pack_tokens, pad_id=0, share_prompt=share_prompt)


def _model(folder: Path, runtime: Runtime, **options: Any) -> list[Any]:
    from spin_megatron.mcore.model import build_model, load_huggingface

    shape = ModelShape.from_huggingface(folder)
    chunks = build_model(shape, runtime, dtype=torch.float32, **options)
    load_huggingface(chunks, folder, shape, runtime, show=False)
    return chunks


def _coefficients(batch: PackBatch) -> torch.Tensor:
    """One upstream gradient a sequence, of either sign, that goes with the pair and not with its place."""
    names = [pair.pair_id for pair in PAIRS]
    return torch.tensor([[1.0 + names.index(name), -0.7 - names.index(name)] for name in batch.pair_ids]).flatten()


def _logps_and_gradients(chunks: list[Any], batches: Sequence[PackBatch], runtime: Runtime) -> tuple[list[torch.Tensor], Gradients]:
    from spin_megatron.mcore.steps import forward_step, run_schedule

    logps: list[torch.Tensor] = []

    def finish(batch: PackBatch, logp_R: torch.Tensor) -> tuple[torch.Tensor, None]:
        logps.append(logp_R.detach().clone())
        loss = (sequence_sums(logp_R, batch.lengths_Q) * _coefficients(batch)).sum()
        return loss * len(batches), None  # the schedule divides by the number of packs

    for chunk in chunks:
        chunk.train()
        chunk.zero_grad()
    run_schedule(forward_step(finish), chunks, batches, runtime, forward_only=False)
    gradients = {f"{number}.{name}": parameter.grad for number, chunk in enumerate(chunks) for name, parameter in chunk.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, missing
    _sum_over_tensor_ranks(chunks, runtime)
    return logps, gradients


def _sum_over_tensor_ranks(chunks: list[Any], runtime: Runtime) -> None:
    """What Megatron Core's finalize_model_grads does for norms: under sequence parallelism each rank saw its own tokens."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=runtime.groups.tensor)


def _largest_relative_difference(found: Gradients, expected: Gradients) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def _check_all_variants(folder: Path, runtime: Runtime) -> None:
    """Separate sequences in one pack are the reference; everything else must give the same."""
    one_pack = [_pack(PAIRS, share_prompt=False)]
    chunks = _model(folder, runtime)
    logps, gradients = _logps_and_gradients(chunks, one_pack, runtime)
    variants = {
        "shared prompt": [_pack(PAIRS, share_prompt=True)],
        "shared prompt, other order": [_pack(PAIRS[::-1], share_prompt=True)],
        "shared prompt, a pack a pair": [_pack([pair], share_prompt=True) for pair in PAIRS],
        "with an empty pack": [_pack(PAIRS, share_prompt=True), _pack([], share_prompt=True)],
    }
    for name, batches in variants.items():
        found_logps, found_gradients = _logps_and_gradients(chunks, batches, runtime)
        _compare(name, batches, found_logps, one_pack, logps)
        # fp32: sums over a few hundred tokens in another order.
        assert _largest_relative_difference(found_gradients, gradients) < 1e-5, (name, runtime.layout)
    for recompute in ("selective", "full"):
        recomputing = _model(folder, runtime, recompute=recompute)
        found_logps, found_gradients = _logps_and_gradients(recomputing, variants["shared prompt"], runtime)
        _compare(recompute, variants["shared prompt"], found_logps, one_pack, logps)
        assert _largest_relative_difference(found_gradients, gradients) < 1e-5, (recompute, runtime.layout)


def _compare(
    name: str, batches: Sequence[PackBatch], found: list[torch.Tensor], expected_batches: Sequence[PackBatch], expected: list[torch.Tensor]
) -> None:
    """Per-token log-probs, found by pair and side."""

    def by_sequence(all_batches: Sequence[PackBatch], logps: list[torch.Tensor]) -> dict[tuple[str, int], torch.Tensor]:
        parts = {}
        for batch, logp_R in zip(all_batches, logps, strict=True):
            for number, part in enumerate(logp_R.split(batch.lengths_Q.tolist())):
                parts[batch.pair_ids[number // 2], number % 2] = part
        return parts

    if not expected:  # not the last pipeline stage
        assert not found
        return
    found_parts, expected_parts = by_sequence(batches, found), by_sequence(expected_batches, expected)
    assert found_parts.keys() == expected_parts.keys()
    for sequence, part in expected_parts.items():
        torch.testing.assert_close(found_parts[sequence], part, atol=1e-5, rtol=0, msg=lambda text, at=sequence: f"{name} {at}: {text}")


def _on_layouts(folder: Path, ports: list[int], layouts: list[ParallelLayout]) -> None:
    for layout, port in zip(layouts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with running(layout, device="cpu", seed=1) as runtime:
            _check_all_variants(folder, runtime)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3_tied"])
def test_packing_sharing_and_recompute_change_nothing_in_one_process(family: str, tmp_path: Path) -> None:
    folder = make_tiny_model(family, tmp_path / family)
    with running(ParallelLayout(), device="cpu", seed=1) as runtime:
        _check_all_variants(folder, runtime)


def test_packing_sharing_and_recompute_change_nothing_over_tensor_and_pipeline_ranks(tmp_path: Path) -> None:
    folder = make_tiny_model("qwen3_tied", tmp_path / "model")
    layouts = [ParallelLayout(tensor=2, pipeline=2), ParallelLayout(tensor=2, pipeline=2, sequence=True)]
    with meeting_ports(len(layouts)) as ports:
        run_ranks(_on_layouts, 4, folder, ports, layouts, timeout=280)


def test_swapping_real_and_generated_swaps_their_log_probs(tmp_path: Path) -> None:
    from spin_megatron.mcore.steps import score_packs

    folder = make_tiny_model("llama3", tmp_path / "model")
    swapped = [replace(pair, real_ids=pair.generated_ids, generated_ids=pair.real_ids) for pair in PAIRS]
    with running(ParallelLayout(), device="cpu", seed=1) as runtime:
        chunks = _model(folder, runtime)
        batches = [_pack(pairs, share_prompt=True) for pairs in (PAIRS, swapped)]
        logps = score_packs(chunks, batches, runtime)
        sums_P2, swapped_P2 = (sequence_sums(logp_R, batch.lengths_Q).view(-1, 2) for logp_R, batch in zip(logps, batches, strict=True))
    assert (sums_P2[:, 0] - sums_P2[:, 1]).abs().min() > 0.1  # a mix-up would show
    torch.testing.assert_close(swapped_P2.flip(1), sums_P2, atol=1e-5, rtol=0)


def test_scoring_twice_gives_the_same_bits(tmp_path: Path) -> None:
    from spin_megatron.mcore.steps import score_packs

    folder = make_tiny_model("llama3", tmp_path / "model")
    with running(ParallelLayout(), device="cpu", seed=1) as runtime:
        chunks = _model(folder, runtime, recompute="full")
        batch = _pack(PAIRS, share_prompt=True)
        (trained,), _ = _logps_and_gradients(chunks, [batch], runtime)
        scored = [score_packs(chunks, [batch], runtime)[0] for _ in range(2)]
    assert torch.equal(scored[0], scored[1])
    assert torch.equal(scored[0], trained), "the reference pass and the training forward must agree to the bit"
    assert chunks[0].training, "scoring leaves the mode as it was"
