"""Models of Transformer Engine's layers without a GPU: names, checkpoints and every call against the installed release."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_megatron.data.batches import make_batch
from spin_megatron.mcore import model as models
from spin_megatron.mcore import runtime as runtimes
from spin_megatron.mcore.checkpoint import save_weights
from spin_megatron.mcore.cpu_shim import PATCHES, megatron_on_cpu
from spin_megatron.mcore.layers import LayerSpec, SpecKind
from spin_megatron.mcore.model import SpinModel, build_model, global_parameters, load_huggingface
from spin_megatron.mcore.optimizer import UpdateRule, _mark_tensor_parallel, build_trainer
from spin_megatron.mcore.precision import Fp8, require_fp8
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.mcore.steps import score_packs
from spin_megatron.mcore.training import Objective, StepOutcome, train_step
from spin_megatron.objective.logprobs import sequence_sums
from spin_megatron.plan.memory import TrainSettings, layer_widths
from spin_megatron.plan.precision import PrecisionName
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.run.records import ReferenceScore
from tests.parity.fake_ranks import fake_rank
from tests.parity.tiny_models import EXPERT_MODELS, make_pairs
from tests.parity.updates import load_weights
from tests.te.kinds import FAMILIES, KINDS, PACK_TOKENS, layouts_of, on_meta, reference_and_step, saved_keys, use

RECIPES: dict[PrecisionName, str] = {
    "fp8-blockwise": "Float8BlockScaling",
    "fp8-tensorwise": "Float8CurrentScaling",
    "mxfp8": "MXFP8BlockScaling",
}


MARKS = ("tensor_model_parallel", "sequence_parallel", "allreduce")


def marks(chunks: Sequence[SpinModel], shape: ModelShape, runtime: Runtime) -> dict[str, tuple[bool, ...]]:
    """What reductions and norms read of each parameter, by its name in the whole model."""
    defaults = {"allreduce": True}
    return {
        name: tuple(bool(getattr(parameter, mark, defaults.get(mark, False))) for mark in MARKS)
        for chunk in chunks
        for name, parameter in global_parameters(chunk, shape, runtime)
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_both_kinds_of_layers_save_the_same_keys(name: str, folders: dict[str, Path], calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelShape.from_huggingface(folders[name])
    for layout, rank in layouts_of(shape):
        found = []
        for kind, fp8 in KINDS:
            use(monkeypatch, kind)
            with on_meta(shape, layout, rank, fp8) as (chunks, _):
                found.append(saved_keys(chunk.sharded_state_dict() for chunk in chunks))
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
    reference, step = reference_and_step(chunks, runtime, calls)
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
    reference, step = reference_and_step(chunks, runtime, calls)
    for call in (*reference, *step):
        assert call.recipe == "Float8CurrentScaling"
        assert call.num_rows % 16 == 0
    assert "Fp8Padding" in calls.others


def test_experts_keep_for_their_backward_what_is_planned(
    folders: dict[str, Path], runtime: Runtime, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    use(monkeypatch, "transformer_engine")
    shape = ModelShape.from_huggingface(folders["mixtral"])
    chunks = build_model(shape, runtime, dtype=torch.bfloat16)
    load_huggingface(chunks, folders["mixtral"], shape, runtime, show=False)
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunks[0].parameters()}
    kept: dict[int, Tensor] = {}  # alive until counted, by storage
    forward = TEGroupedMLP.forward

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def noted(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            return forward(*args, **kwargs)

    monkeypatch.setattr(TEGroupedMLP, "forward", noted)
    batch = make_batch(make_pairs(), pack_tokens=PACK_TOKENS, pad_id=0, share_prompt=True)
    chunks[0](batch.tokens_T[None], batch.positions_T[None], batch.branches_B4, batch.rows_R, batch.targets_R)
    assert shape.experts_per_token is not None
    assert shape.expert_ffn_hidden_size is not None
    num_copies = shape.num_layers * PACK_TOKENS * shape.experts_per_token
    a_copy = 2 * (shape.hidden_size + 3 * shape.expert_ffn_hidden_size) + 4  # and its fp32 weight
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) == num_copies * a_copy
    router_logits = 2 * (shape.num_experts or 0)
    planned = layer_widths(shape, ParallelLayout(), TrainSettings(PACK_TOKENS, 1)).mlp - router_logits
    assert shape.num_layers * PACK_TOKENS * planned * 2 == num_copies * (a_copy - 4)


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_a_token_s_experts_are_summed_by_the_kernel_that_has_one_order(
    name: str, dispatcher: str, folders: dict[str, Path], runtime: Runtime, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ModelShape.from_huggingface(folders[name])
    settings = models._expert_settings
    monkeypatch.setattr(models, "_expert_settings", lambda *a, **k: settings(*a, **k) | {"moe_token_dispatcher_type": dispatcher})
    arange = torch.arange  # with fused kernels the alltoall dispatcher numbers its chunks on the GPU
    monkeypatch.setattr(torch, "arange", lambda *a, **k: arange(*a, **(k | {"device": "cpu"} if "device" in k else k)))
    batch = make_batch(make_pairs(), pack_tokens=PACK_TOKENS, pad_id=0, share_prompt=True)
    found = []
    for kind in ("local", "transformer_engine"):
        use(monkeypatch, kind)  # type: ignore[arg-type]
        chunks = build_model(shape, runtime, dtype=torch.float32)
        load_huggingface(chunks, folders[name], shape, runtime, show=False)
        found.append((score_packs(chunks, [batch], runtime)[0], calls.others.count("moe_permute"), calls.others.count("moe_unpermute")))
    (expected, *none), (logp_R, *fused) = found
    torch.testing.assert_close(logp_R, expected, atol=2e-4, rtol=0)
    assert (none, fused) == ([0, 0], [shape.num_layers, shape.num_layers])


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
