"""Models of Transformer Engine's layers without a GPU: names, checkpoints and every call against the installed release."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_megatron.data.batches import make_batch
from spin_megatron.mcore import model as models
from spin_megatron.mcore import runtime as runtimes
from spin_megatron.mcore.attention import Backend
from spin_megatron.mcore.checkpoint import load_weights, save_weights
from spin_megatron.mcore.cpu_shim import PATCHES, megatron_on_cpu
from spin_megatron.mcore.layers import LayerSpec, SpecKind
from spin_megatron.mcore.model import SpinModel, build_model, global_parameters, load_huggingface
from spin_megatron.mcore.optimizer import UpdateRule, _mark_tensor_parallel, build_trainer
from spin_megatron.mcore.precision import Fp8, require_fp8
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.mcore.steps import score_packs
from spin_megatron.mcore.training import Objective, StepOutcome, train_step
from spin_megatron.objective.logprobs import sequence_sums
from spin_megatron.plan.precision import PrecisionName
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.run.records import ReferenceScore
from tests.parity.fake_ranks import fake_rank, meta_model
from tests.parity.tiny_models import EXPERT_MODELS, MODELS, make_pairs, make_tiny_model

FAMILIES = [*MODELS, *EXPERT_MODELS]
# FP8 multiplies multiples of 16: 32, 48 and 2 x 24 of the tiny models do not all.
ALIGNED = {"hidden_size": 64, "intermediate_size": 96}
RECIPES: dict[PrecisionName, str] = {
    "fp8-blockwise": "Float8BlockScaling",
    "fp8-tensorwise": "Float8CurrentScaling",
    "mxfp8": "MXFP8BlockScaling",
}
PACK_TOKENS = 256


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from tests.te.standins import install

    # Megatron Core compiles its fused activations; the functions themselves are what is looked at here.
    with torch.compiler.set_stance("force_eager"):
        yield install(monkeypatch)


def use(patch: pytest.MonkeyPatch, kind: SpecKind) -> None:
    """Build models of this kind of layers from now on."""
    attention = Backend("transformer_engine" if kind == "transformer_engine" else "sdpa", "the test")
    patch.setattr(models, "choose_layer_spec", lambda device: LayerSpec(kind, "the test"))
    patch.setattr(models, "choose_backend", lambda *args, **kwargs: attention)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_tiny_model(name, root / name, **ALIGNED) for name in FAMILIES}


@pytest.fixture
def runtime(calls: Any) -> Iterator[Runtime]:
    with running(ParallelLayout(), device="cpu", seed=1) as started:
        yield started


def saved_keys(chunks: Sequence[SpinModel]) -> dict[str, tuple[Any, ...]]:
    """What a checkpoint holds: key -> (whole shape, this rank's shapes and offsets, dtype); without the objects of FP8."""
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

    for chunk in chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)
        walk(state)
    return found


MARKS = ("tensor_model_parallel", "sequence_parallel", "allreduce")


def marks(chunks: Sequence[SpinModel], shape: ModelShape, runtime: Runtime) -> dict[str, tuple[bool, ...]]:
    """What reductions and norms read of each parameter, by its name in the whole model."""
    defaults = {"allreduce": True}
    return {
        name: tuple(bool(getattr(parameter, mark, defaults.get(mark, False))) for mark in MARKS)
        for chunk in chunks
        for name, parameter in global_parameters(chunk, shape, runtime)
    }


def layouts_of(shape: ModelShape) -> list[tuple[ParallelLayout, int]]:
    """Layouts with a rank of each that together hold every kind of part."""
    layouts = [(ParallelLayout(tensor=2, pipeline=2, sequence=True), 2), (ParallelLayout(tensor=2, sequence=True), 1)]
    return [*layouts, (ParallelLayout(data=2, expert=2), 1)] if shape.num_experts else layouts


KINDS: tuple[tuple[SpecKind, Fp8 | None], ...] = (("local", None), ("transformer_engine", Fp8("fp8-blockwise", 1)))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_kinds_of_layers_save_the_same_keys(name: str, folders: dict[str, Path], calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelShape.from_huggingface(folders[name])
    make_config = models.transformer_config

    def without_storage(*args: Any, **kwargs: Any) -> Any:
        config = make_config(*args, **kwargs)
        config.use_cpu_initialization, config.init_model_with_meta_device = False, True
        return config

    monkeypatch.setattr(models, "transformer_config", without_storage)
    for layout, rank in layouts_of(shape):
        found = []
        for kind, fp8 in KINDS:
            use(monkeypatch, kind)
            with meta_model(shape, layout, rank, fp8=fp8) as (chunks, _):
                found.append(saved_keys(chunks))
        assert found[0] == found[1]
        assert len(found[0]) >= 7


@pytest.mark.parametrize("name", FAMILIES)
def test_both_kinds_of_layers_mark_parameters_alike(
    name: str, folders: dict[str, Path], calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ModelShape.from_huggingface(folders[name])
    for layout, rank in layouts_of(shape):
        found = []
        for kind, fp8 in KINDS:
            use(monkeypatch, kind)
            with fake_rank(layout, rank, device="cpu") as runtime:
                chunks = build_model(shape, runtime, dtype=torch.bfloat16, fp8=fp8)
                for chunk in chunks:
                    _mark_tensor_parallel(chunk)
                found.append(marks(chunks, shape, runtime))
        assert found[0] == found[1]
        assert any(is_split for is_split, *_ in found[0].values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_of_one_kind_loads_into_the_other(
    name: str, folders: dict[str, Path], runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shape = ModelShape.from_huggingface(folders[name])

    def build(kind: SpecKind) -> list[SpinModel]:
        use(monkeypatch, kind)
        return build_model(shape, runtime, dtype=torch.bfloat16)

    def values(chunks: list[SpinModel]) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for chunk in chunks for name, parameter in global_parameters(chunk, shape, runtime)}

    for source, target in (("local", "transformer_engine"), ("transformer_engine", "local")):
        first = build(source)  # type: ignore[arg-type]
        load_huggingface(first, folders[name], shape, runtime, show=False)
        save_weights(tmp_path / source, first, runtime, recipe={})
        second = build(target)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in second[0].parameters():
                parameter.fill_(torch.nan)
        load_weights(tmp_path / source, second)
        expected, found = values(first), values(second)
        assert sorted(found) == sorted(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformer_engine_s_layers_compute_what_the_local_ones_do(
    name: str, folders: dict[str, Path], runtime: Runtime, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ModelShape.from_huggingface(folders[name])
    batch = make_batch(make_pairs(), pack_tokens=PACK_TOKENS, pad_id=0, share_prompt=True)
    found = {}
    for kind in ("local", "transformer_engine"):
        use(monkeypatch, kind)  # type: ignore[arg-type]
        chunks = build_model(shape, runtime, dtype=torch.float32)
        load_huggingface(chunks, folders[name], shape, runtime, show=False)
        found[kind] = score_packs(chunks, [batch], runtime)[0]
    torch.testing.assert_close(found["transformer_engine"], found["local"], atol=2e-4, rtol=0)
    # Per layer: QKV with its norm, projection, and the MLP's two; of experts the grouped two.
    assert len(calls.linear) == 4 * shape.num_layers
    assert calls.others.count("DotProductAttention") == shape.num_layers
    assert calls.others.count("apply_rotary_pos_emb") == 2 * shape.num_layers
    norms = 1 + shape.num_layers * (2 * shape.qk_norm + (shape.num_experts is not None))
    assert calls.others.count("RMSNorm") == norms
    epsilons = {module.eps for chunk in chunks for module in chunk.modules() if hasattr(module, "eps")}
    assert epsilons == {shape.norm_epsilon}


def _step(chunks: list[SpinModel], runtime: Runtime, calls: Any, *, num_packs: int = 2) -> tuple[list[Any], list[Any]]:
    """The reference pass and one step over the same packs: the calls of each."""
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


@pytest.mark.parametrize(
    ("precision", "recompute"),
    [*((name, "none") for name in RECIPES), ("fp8-blockwise", "selective"), ("fp8-blockwise", "full")],
)
def test_reference_and_step_run_under_the_same_recipe(
    precision: PrecisionName, recompute: Any, folders: dict[str, Path], runtime: Runtime, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.te.standins import believe_in

    if precision == "mxfp8":
        believe_in(monkeypatch, (10, 0))
    use(monkeypatch, "transformer_engine")
    shape = ModelShape.from_huggingface(folders["llama3"])
    require_fp8(Fp8(precision, 1), LayerSpec("transformer_engine", "the test"))
    chunks = build_model(shape, runtime, dtype=torch.bfloat16, recompute=recompute, fp8=Fp8(precision, 1))
    load_huggingface(chunks, folders["llama3"], shape, runtime, show=False)
    reference, step = _step(chunks, runtime, calls)
    layers = {id(module): layer.layer_number - 1 for layer in chunks[0].decoder.layers for module in layer.modules()}
    for found, has_gradients in ((reference, False), (step, True)):
        for call in found:
            is_end = layers[id(call.module)] in (0, shape.num_layers - 1)
            assert call.recipe == (None if is_end else RECIPES[precision])
            assert call.num_rows % 16 == 0
        # The weights are quantised at each pass's first micro-batch and kept for its second; recomputation sees no first one again.
        first_calls = {}
        for call in found:
            first_calls.setdefault(id(call.module), []).append(call.is_first_microbatch)
        assert len(first_calls) == 4 * shape.num_layers
        assert all(flags[0] is True and not any(flags[1:]) for flags in first_calls.values())
        if recompute == "none":
            assert all(call.has_gradients is has_gradients for call in found)
            assert len(found) == 2 * 4 * shape.num_layers


def test_experts_are_padded_to_whole_blocks_under_fp8(
    folders: dict[str, Path], runtime: Runtime, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "transformer_engine")
    shape = ModelShape.from_huggingface(folders["mixtral"])
    chunks = build_model(shape, runtime, dtype=torch.bfloat16, fp8=Fp8("fp8-tensorwise"))
    load_huggingface(chunks, folders["mixtral"], shape, runtime, show=False)
    reference, step = _step(chunks, runtime, calls)
    for call in (*reference, *step):
        assert call.recipe == "Float8CurrentScaling"
        assert call.num_rows % 16 == 0
    assert "Fp8Padding" in calls.others


def test_a_recipe_that_the_gpu_lacks_is_refused_with_transformer_engine_s_reason(calls: Any) -> None:
    spec = LayerSpec("transformer_engine", "the test")
    require_fp8(Fp8("fp8-blockwise"), spec)
    with pytest.raises(ValueError, match=r'train\.precision="mxfp8" is not computed here: .*10\.0 or higher.*; use "bf16"'):
        require_fp8(Fp8("mxfp8"), spec)


def test_extra_states_stay_out_of_checkpoints(
    folders: dict[str, Path], runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from spin_megatron.convert.saved_checkpoint import SavedCheckpoint

    use(monkeypatch, "transformer_engine")
    shape = ModelShape.from_huggingface(folders["qwen3"])
    chunks = build_model(shape, runtime, dtype=torch.bfloat16, fp8=Fp8("fp8-blockwise"))
    load_huggingface(chunks, folders["qwen3"], shape, runtime, show=False)
    assert any(name.endswith("_extra_state") for name in chunks[0].state_dict())
    save_weights(tmp_path / "weights", chunks, runtime, recipe={})
    assert not [key for key in SavedCheckpoint(tmp_path / "weights", trust=True).tensors if "_extra_state" in key]


def test_the_router_s_product_and_its_gradients_are_torch_s(calls: Any) -> None:
    """On a GPU the router multiplies with general_gemm; on the CPU the shim keeps it away."""
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*size, generator=generator).requires_grad_() for size in ((6, 8), (4, 8)))
    logits = router_gating_linear(hidden, weight, None, torch.float32)
    upstream = torch.randn(6, 4, generator=generator)
    found = torch.autograd.grad(logits, (hidden, weight), upstream)
    assert calls.others == ["general_gemm TN", "general_gemm NN", "general_gemm NT"]
    torch.testing.assert_close(logits, hidden @ weight.t())
    torch.testing.assert_close(found, (upstream @ weight, upstream.t() @ hidden))


@pytest.mark.parametrize("name", ["llama3", "mixtral"])
@pytest.mark.parametrize("rule", ["rmsprop", "adamw"])
def test_cpu_ranks_keep_clear_of_its_kernels(rule: Any, name: str, folders: dict[str, Path]) -> None:
    """Megatron Core takes Transformer Engine's optimizers, norms and router where they are installed, whatever the device."""
    outcome = _local_step(rule, folders[name])
    assert outcome.is_applied
    assert outcome.grad_norm > 1e-3


@pytest.mark.parametrize("rule", ["rmsprop", "adamw"])
def test_without_the_shim_s_patch_they_would_not(rule: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [patch for patch in PATCHES if patch.name != "fused kernels"]
    monkeypatch.setattr(runtimes, "megatron_on_cpu", lambda: megatron_on_cpu(kept))
    with pytest.raises(RuntimeError, match=r"CUDA|NVIDIA"):
        _local_step(rule, folders["llama3"])


def _local_step(rule: Any, folder: Path) -> StepOutcome:
    """A step of Megatron Core's own layers on the CPU."""
    shape = ModelShape.from_huggingface(folder)
    batch = make_batch(make_pairs(), pack_tokens=PACK_TOKENS, pad_id=0, share_prompt=True)
    with running(ParallelLayout(), device="cpu", seed=1) as runtime:
        chunks = build_model(shape, runtime, dtype=torch.bfloat16)
        load_huggingface(chunks, folder, shape, runtime, show=False)
        sums_P2 = sequence_sums(score_packs(chunks, [batch], runtime)[0], batch.lengths_Q).view(-1, 2).tolist()
        references = {pair_id: ReferenceScore(pair_id, *both, 1, 1) for pair_id, both in zip(batch.pair_ids, sums_P2, strict=True)}
        return train_step(
            build_trainer(chunks, UpdateRule(rule, max_grad_norm=1e-3)),
            [batch],
            references,
            Objective("logistic", 0.1),
            runtime,
            num_pairs=len(batch.pair_ids),
            learning_rate=1e-4,
            must_start_at_zero=True,
        )
