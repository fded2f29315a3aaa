"""Our norm, gated activation and rotary frequencies against definitions and transformers."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from spin_megatron.mcore.layers import LayerSpec, RmsNorm, Swiglu, _Swiglu, choose_layer_spec, make_inputs_again
from spin_megatron.mcore.rotary import inverse_frequencies, rotary_table, rotate
from spin_megatron.plan.model_config import RopeScaling
from spin_megatron.plan.shape import ModelShape


def _norm(dtype: torch.dtype, *, sequence_parallel: bool = False) -> RmsNorm:
    config = SimpleNamespace(use_cpu_initialization=True, params_dtype=dtype, sequence_parallel=sequence_parallel)
    norm = RmsNorm(config, 16, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 16))
    return norm


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()


def test_gradients_of_norm_and_activation_are_those_of_finite_differences() -> None:
    norm = _norm(torch.float64)

    def with_weight(hidden: Tensor, weight: Tensor) -> Tensor:
        normed: Tensor = torch.func.functional_call(norm, {"weight": weight}, (hidden,))
        return normed

    assert torch.autograd.gradcheck(with_weight, (_random(5, 1, 16), norm.weight))
    assert torch.autograd.gradcheck(Swiglu(None), (_random(5, 1, 12),))
    assert torch.autograd.gradcheck(_Swiglu.apply, (_random(5, 12), _random(5, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm, reference = _norm(dtype), LlamaRMSNorm(16, eps=1e-5).to(dtype)
    reference.weight.data.copy_(norm.weight)
    hidden = _random(40, 1, 16, dtype=dtype)
    # The sum of squares may be added in another order: one unit in the last place.
    torch.testing.assert_close(norm(hidden), reference(hidden), rtol=torch.finfo(dtype).eps, atol=0)


def test_the_norm_s_weight_is_marked_only_under_sequence_parallelism() -> None:
    assert _norm(torch.float32, sequence_parallel=True).weight.sequence_parallel is True
    assert _norm(torch.float32).weight.sequence_parallel is False


def test_the_activation_is_silu_of_the_first_half_times_the_second() -> None:
    # silu(1) = 1 / (1 + e**-1) = 0.731059; times 10.
    assert Swiglu(None)(torch.tensor([[0.0, 1.0, 5.0, 10.0]])).tolist() == [[0.0, pytest.approx(7.31059, abs=1e-5)]]


def test_an_expert_weighs_what_it_activated_to_the_bits_of_two_steps() -> None:
    outcomes = []
    for is_one_step in (False, True):
        gate_up, weights = _random(300, 24, dtype=torch.bfloat16), _random(300, 1, dtype=torch.float32)
        # As MLP.forward of Megatron Core has it: in fp32, then rounded.
        two_steps = (Swiglu(None)(gate_up) * weights).to(torch.bfloat16)
        activated = _Swiglu.apply(gate_up, weights) if is_one_step else two_steps
        activated.float().square().sum().backward()
        outcomes.append((activated.detach(), gate_up.grad, weights.grad))
    for two_steps, one_step in zip(*outcomes, strict=True):
        assert torch.equal(two_steps, one_step)


@pytest.mark.parametrize(
    ("module", "shape", "kept"),
    [(_norm(torch.float32), (8, 1, 16), 8 * 16 + 8 + 16), (Swiglu(None), (8, 1, 24), 8 * 24)],
    ids=["norm", "swiglu"],
)
def test_nothing_of_the_input_s_size_is_kept_but_the_input(module: torch.nn.Module, shape: tuple[int, ...], kept: int) -> None:
    numbers: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        numbers[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(torch.randn(shape, requires_grad=True))
    assert sum(numbers.values()) == kept


class _Product(torch.nn.Linear):
    """As Megatron Core's linear layers: (product, bias or None)."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden), None


class _Layer(torch.nn.Module):
    """A norm and a gated MLP, as they follow each other in a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.activation = _norm(torch.float64), Swiglu(None)
        self.linear_fc1, self.linear_fc2 = (_Product(*sizes, bias=False, dtype=torch.float64) for sizes in ((16, 24), (12, 16)))

    def forward(self, hidden: Tensor) -> Tensor:
        self.normed = self.norm(hidden)
        self.activated = self.activation(self.linear_fc1(self.normed)[0])
        product: Tensor = self.linear_fc2(self.activated)[0]
        return product


def test_inputs_of_products_are_freed_and_made_again_to_the_same_bits() -> None:
    outcomes = []
    for is_lean in (False, True):
        layer, hidden = _Layer(), _random(300, 1, 16)
        if is_lean:
            make_inputs_again(layer)
        out = layer(hidden)
        sizes = [tensor.untyped_storage().nbytes() for tensor in (layer.normed, layer.activated)]
        assert sizes == ([0, 0] if is_lean else [300 * 16 * 8, 300 * 12 * 8])
        out.square().sum().backward()
        outcomes.append([out.detach(), hidden.grad, *(parameter.grad for parameter in layer.parameters())])
    for kept, made_again in zip(*outcomes, strict=True):
        assert torch.equal(kept, made_again)


def test_without_gradients_nothing_is_freed() -> None:
    layer = _Layer()
    make_inputs_again(layer)
    with torch.no_grad():
        layer(_random(3, 1, 16))
    assert layer.normed.untyped_storage().nbytes() == 3 * 16 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pack_is_rotated_as_transformers_rotates_each_sequence(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    inv_freq = inverse_frequencies(_shape(8, 10000.0, None))
    # A prompt of 3, answers of 4 and 2 that go on from it, one token of padding.
    table = rotary_table(torch.tensor([[0, 0, 0, 3], [0, 3, 3, 4], [0, 3, 7, 2]]), torch.device("cpu"), 10, 1, 0, inv_freq=inv_freq)
    angles = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3, 4, 0])[:, None] * torch.cat((inv_freq, inv_freq))
    heads = _random(10, 2, 8, dtype=dtype)
    cosine, sine = (part[None].to(dtype) for part in (angles.cos(), angles.sin()))
    expected, _ = apply_rotary_pos_emb(heads[None], heads[None], cosine, sine, unsqueeze_dim=2)
    # transformers rounds each of the two products that are added.
    torch.testing.assert_close(rotate(heads, table), expected[0], rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert torch.autograd.gradcheck(lambda wide: rotate(wide, table.double()), (_random(10, 2, 8),))


def _shape(head_dim: int, theta: float, scaling: RopeScaling | None) -> ModelShape:
    return ModelShape(
        family="llama",
        num_layers=1,
        hidden_size=head_dim,
        ffn_hidden_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        vocab_size=8,
        max_positions=131072,
        norm_epsilon=1e-5,
        rope_theta=theta,
        rope_scaling=scaling,
    )


@pytest.mark.parametrize(
    ("theta", "head_dim", "scaling"),
    [
        (10000.0, 128, None),
        (10000.0, 64, RopeScaling("linear", 2.5)),
        (500000.0, 128, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        (500000.0, 64, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
        (10000.0, 16, RopeScaling("llama3", 4.0, 2.0, 9.0, 1024)),  # constants that Megatron Core cannot express
    ],
    ids=["plain", "linear", "llama_3.1", "llama_3.2", "other constants"],
)
def test_rotary_frequencies_equal_transformers(theta: float, head_dim: int, scaling: RopeScaling | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope: dict[str, object] = {"rope_theta": theta, "rope_type": "default" if scaling is None else scaling.kind}
    if scaling is not None:
        rope["factor"] = scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=131072, rope_parameters=rope)
    expected = LlamaRotaryEmbedding(config).inv_freq
    found = inverse_frequencies(_shape(head_dim, theta, scaling))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    if scaling is not None:
        assert not torch.allclose(found, inverse_frequencies(_shape(head_dim, theta, None)), rtol=1e-3, atol=0)


def test_the_layer_modules_are_named_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    assert choose_layer_spec(torch.device("cpu")).kind == "local"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen = choose_layer_spec(torch.device("cuda"))
    assert (chosen.kind, chosen.reason[:37]) == ("local", "Transformer Engine is not installed (")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_layer_spec(torch.device("cuda")).kind == "transformer_engine"


def test_weight_gradients_are_fused_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from spin_megatron.mcore.fused import choose_weight_gradients

    gpu, local, engine = torch.device("cuda"), LayerSpec("local", ""), LayerSpec("transformer_engine", "")
    there: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in there else None)
    assert choose_weight_gradients(engine, gpu).maker == "transformer_engine"
    assert choose_weight_gradients(local, gpu).maker == "torch"
    there.add("fused_weight_gradient_mlp_cuda")
    chosen = choose_weight_gradients(local, gpu)
    assert (chosen.maker, "apex's fused_weight_gradient_mlp_cuda is installed" in chosen.reason) == ("apex", True)
    assert choose_weight_gradients(engine, gpu).maker == "transformer_engine"
    assert choose_weight_gradients(local, torch.device("cpu")).reason.startswith("fused kernels compute on CUDA only")


def test_only_layers_that_can_are_told_to_add_to_the_buffer() -> None:
    from spin_megatron.mcore.fused import add_to_main_gradients

    fusing, plain = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    fusing.fuse_wgrad_accumulation = False  # type: ignore[assignment]
    add_to_main_gradients(torch.nn.Sequential(fusing, plain))
    assert fusing.fuse_wgrad_accumulation is True
    assert not hasattr(plain, "fuse_wgrad_accumulation")


def test_the_update_s_kernels_are_told_by_the_optimizer_s_origin() -> None:
    from spin_megatron.mcore.fused import Kernels, update_kernels

    weights = [torch.nn.Parameter(torch.zeros(1))]
    assert update_kernels(torch.optim.RMSprop(weights)) == Kernels("torch", "torch's RMSprop")
    for package in ("transformer_engine", "apex"):
        fused = type("FusedAdam", (torch.optim.SGD,), {"__module__": f"{package}.optimizers.fused_adam"})
        assert update_kernels(fused(weights)).maker == package
