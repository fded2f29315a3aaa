"""Models of both kinds of layers, Megatron Core's own and Transformer Engine's, and what a checkpoint of them holds."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from spin_megatron.data.batches import make_batch
from spin_megatron.mcore import model as models
from spin_megatron.mcore.attention import Backend
from spin_megatron.mcore.layers import LayerSpec, SpecKind
from spin_megatron.mcore.model import SpinModel
from spin_megatron.mcore.optimizer import UpdateRule, build_trainer
from spin_megatron.mcore.precision import Fp8
from spin_megatron.mcore.runtime import Runtime
from spin_megatron.mcore.steps import score_packs
from spin_megatron.mcore.training import Objective, train_step
from spin_megatron.objective.logprobs import sequence_sums
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.run.records import ReferenceScore
from tests.parity.fake_ranks import meta_model
from tests.parity.tiny_models import EXPERT_MODELS, MODELS, make_pairs

FAMILIES = [*MODELS, *EXPERT_MODELS]
PACK_TOKENS = 256
KINDS: tuple[tuple[SpecKind, Fp8 | None], ...] = (("local", None), ("transformer_engine", Fp8("fp8-blockwise", 1)))


def use(patch: pytest.MonkeyPatch, kind: SpecKind) -> None:
    """Build models of this kind of layers from now on."""
    attention = Backend("transformer_engine" if kind == "transformer_engine" else "sdpa", "the test")
    patch.setattr(models, "choose_layer_spec", lambda device: LayerSpec(kind, "the test"))
    patch.setattr(models, "choose_backend", lambda *args, **kwargs: attention)


def layouts_of(shape: ModelShape) -> list[tuple[ParallelLayout, int]]:
    """Layouts with a rank of each that together hold every kind of part."""
    layouts = [(ParallelLayout(tensor=2, pipeline=2, sequence=True), 2), (ParallelLayout(tensor=2, sequence=True), 1)]
    return [*layouts, (ParallelLayout(data=2, expert=2), 1)] if shape.num_experts else layouts


@contextmanager
def on_meta(shape: ModelShape, layout: ParallelLayout, rank: int, fp8: Fp8 | None) -> Iterator[tuple[list[SpinModel], Runtime]]:
    """The chunks of one rank without storage, as `use` says."""
    make_config = models.transformer_config

    def without_storage(*args: Any, **kwargs: Any) -> Any:
        config = make_config(*args, **kwargs)
        config.use_cpu_initialization, config.init_model_with_meta_device = False, True
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "transformer_config", without_storage)
        with meta_model(shape, layout, rank, fp8=fp8) as built:
            yield built


def saved_keys(states: Iterable[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """What sharded states put into a checkpoint: key -> (whole shape, this rank's shapes and offsets, dtype); no objects of FP8."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    found: dict[str, tuple[Any, ...]] = {}

    def walk(value: Any) -> None:
        if isinstance(value, ShardedTensor):
            part = (tuple(value.local_shape), tuple(value.global_offset))
            whole, parts, dtype = found.get(value.key, (tuple(value.global_shape), (), value.dtype))
            assert (whole, dtype) == (tuple(value.global_shape), value.dtype)
            found[value.key] = (whole, tuple(sorted({*parts, part})), dtype)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    for state in states:
        apply_factories(state)
        walk(state)
    return found


def reference_and_step(
    chunks: list[SpinModel], runtime: Runtime, calls: Any, *, num_packs: int = 2
) -> tuple[list[Any], list[Any]]:
    """The reference pass and one step over the same packs, which starts at margins of exactly 0: the calls of each."""
    pairs = [make_pairs(seed) for seed in range(num_packs)]
    batches = [
        make_batch(
            [type(pair)(f"{seed}_{pair.pair_id}", pair.prompt_ids, pair.real_ids, pair.generated_ids, 0) for pair in pack],
            pack_tokens=PACK_TOKENS,
            pad_id=0,
            share_prompt=True,
        )
        for seed, pack in enumerate(pairs)
    ]
    calls.linear.clear()
    references = {}
    for batch, logp_R in zip(batches, score_packs(chunks, batches, runtime), strict=True):
        sums = sequence_sums(logp_R, batch.lengths_Q).view(-1, 2).tolist()
        references |= {pair_id: ReferenceScore(pair_id, *both, 1, 1) for pair_id, both in zip(batch.pair_ids, sums, strict=True)}
    reference_calls = list(calls.linear)
    calls.linear.clear()
    trainer = build_trainer(chunks, UpdateRule("rmsprop"))
    num_pairs = sum(len(batch.pair_ids) for batch in batches)
    outcome = train_step(
        trainer, batches, references, Objective("logistic", 0.1), runtime, num_pairs=num_pairs, learning_rate=1e-4, must_start_at_zero=True
    )
    assert outcome.is_applied
    assert outcome.metrics["margin_abs"] == 0.0
    return reference_calls, list(calls.linear)
