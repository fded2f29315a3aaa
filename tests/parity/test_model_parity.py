"""Log-probs and logits of every family equal those of transformers in fp32, on every layout."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from spin_megatron.data.batches import make_batch
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.objective.logprobs import sequence_sums
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from tests.parity.gloo import meeting_ports, run_ranks
from tests.parity.tiny_models import EXPERT_MODELS, MODELS, huggingface_logits, make_pairs, make_tiny_model, response_logps

WORLD = 8  # one set of processes runs all layouts; what a layout does not need is data parallel
PACK_TOKENS = 256
ALL_DENSE = tuple(MODELS)
# What differs between families under a layout: kv groups fewer than ranks, own head size, tied ends, window.
LAYOUTS: list[tuple[ParallelLayout, tuple[str, ...]]] = [
    (ParallelLayout(tensor=1, pipeline=1, data=8), (*ALL_DENSE, *EXPERT_MODELS)),
    (ParallelLayout(tensor=2, pipeline=1, data=4), ALL_DENSE),
    (ParallelLayout(tensor=4, pipeline=1, data=2), ALL_DENSE),
    (ParallelLayout(tensor=1, pipeline=2, data=4), ALL_DENSE),
    (ParallelLayout(tensor=2, pipeline=2, data=2), ALL_DENSE),
    (ParallelLayout(tensor=4, pipeline=2, data=1), ALL_DENSE),
    (ParallelLayout(tensor=2, pipeline=2, data=2, sequence=True), ("llama3", "qwen3_tied")),
    (ParallelLayout(tensor=2, pipeline=2, data=2, virtual_pipeline=2), ("llama3", "qwen3_tied")),
    (ParallelLayout(tensor=2, pipeline=1, data=4, expert=2, sequence=True), tuple(EXPERT_MODELS)),
]


@dataclass(frozen=True)
class Reference:
    """One model: its folder and what transformers computes, an npz of logits by sequence."""

    name: str
    folder: Path
    logits: Path


@dataclass(frozen=True)
class Found:
    """What one model gave on one layout: sequence sums with and without a shared prompt; the largest logit difference."""

    sums_shared: list[float]
    sums_separate: list[float]
    logit_difference: float


def _score(reference: Reference, runtime: Runtime) -> Found | None:
    from spin_megatron.mcore.model import build_model, load_huggingface
    from spin_megatron.mcore.steps import gather_over_data, score_packs

    shape = ModelShape.from_huggingface(reference.folder)
    chunks = build_model(shape, runtime, dtype=torch.float32)
    load_huggingface(chunks, reference.folder, shape, runtime, show=False)
    shared, separate = (make_batch(make_pairs(), pack_tokens=PACK_TOKENS, pad_id=0, share_prompt=share) for share in (True, False))
    (logp_shared, *_), = [score_packs(chunks, [shared], runtime) or [None]]
    hidden: list[torch.Tensor] = []
    chunks[-1].decoder.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    (logp_separate, *_), = [score_packs(chunks, [separate], runtime) or [None]]
    found = None
    if runtime.is_last_stage:
        assert logp_shared is not None
        assert logp_separate is not None
        sums = [sequence_sums(logp, batch.lengths_Q).tolist() for logp, batch in ((logp_shared, shared), (logp_separate, separate))]
        found = Found(sums[0], sums[1], _logit_difference(chunks[-1], hidden[0], separate.branches_B4, reference.logits, runtime))
    gathered = gather_over_data(found, runtime)
    if gathered is None:
        return None
    if runtime.layout.expert == 1:  # experts of several ranks are summed in an order that depends on the rank
        assert all(copy == gathered[0] for copy in gathered), "data-parallel copies computed different bits"
    return max(gathered, key=lambda copy: copy.logit_difference)


def _logit_difference(
    chunk: torch.nn.Module, hidden_T1H: torch.Tensor, branches_B4: torch.Tensor, logits: Path, runtime: Runtime
) -> float:
    """Largest difference to transformers' logits over all positions computed and all true vocabulary columns."""
    group = runtime.groups.tensor

    def gathered(part: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=dim)

    if runtime.layout.sequence:
        hidden_T1H = gathered(hidden_T1H, 0)
    is_tied = chunk.share_embeddings_and_output_weights
    weight_VH = chunk.shared_embedding_or_output_weight() if is_tied else chunk.output_layer.weight
    logits_TV = gathered(hidden_T1H[:, 0] @ weight_VH.t(), 1)[:, : chunk.shape.vocab_size]
    with np.load(logits) as expected:
        differences = [
            float((logits_TV[start : start + length] - torch.from_numpy(expected[f"arr_{number}"])[:length]).abs().max())
            for number, (_, _, start, length) in enumerate(branches_B4.tolist())
        ]
    return max(differences)


def _all_layouts(references: list[Reference], ports: list[int]) -> list[dict[str, Found | None]]:
    found = []
    for (layout, names), port in zip(LAYOUTS, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with running(layout, device="cpu", seed=1) as runtime, torch.no_grad():
            found.append({reference.name: _score(reference, runtime) for reference in references if reference.name in names})
    return found


@pytest.mark.timeout(600)
def test_log_probs_and_logits_equal_transformers_for_every_family_and_layout(tmp_path: Path) -> None:
    sequences = [(pair.prompt_ids, response) for pair in make_pairs() for response in (pair.real_ids, pair.generated_ids)]
    references, expected_sums = [], {}
    for name in (*MODELS, *EXPERT_MODELS):
        folder = make_tiny_model(name, tmp_path / name)
        logits = huggingface_logits(folder, sequences)
        np.savez(tmp_path / f"{name}.npz", *(part.numpy() for part in logits))
        references.append(Reference(name, folder, tmp_path / f"{name}.npz"))
        expected_sums[name] = [float(response_logps(part, *sequence).sum()) for part, sequence in zip(logits, sequences, strict=True)]
        assert min(float(part.std()) for part in logits) > 0.8, "too flat a model would hide errors"

    with meeting_ports(len(LAYOUTS)) as ports:
        by_layout = run_ranks(_all_layouts, WORLD, references, ports, timeout=500)[0]

    for (layout, names), found in zip(LAYOUTS, by_layout, strict=True):
        assert set(found) == set(names)
        for name, result in found.items():
            where = f"{name} on {layout}"
            assert result.logit_difference < 2e-4, where
            # Sums of up to 30 tokens at about -6.5 nats: fp32 rounding leaves about 1e-5.
            assert result.sums_shared == pytest.approx(expected_sums[name], abs=1e-4), where
            assert result.sums_separate == pytest.approx(expected_sums[name], abs=1e-4), where
    worst = max(result.logit_difference for found in by_layout for result in found.values())
    print(f"largest logit difference over all layouts: {worst:.2e}")
