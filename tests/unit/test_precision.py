"""What FP8 asks of packs, models, layouts and GPUs, and which settings of Megatron Core it becomes."""

from dataclasses import replace

import pytest
import torch

from spin_megatron.config import RunConfig
from spin_megatron.launch.check import check_config
from spin_megatron.mcore.layers import choose_layer_spec
from spin_megatron.mcore.precision import Fp8, require_fp8
from spin_megatron.plan.hardware import find_gpu
from spin_megatron.plan.memory import TrainSettings, fp8_copy_bytes, layer_widths
from spin_megatron.plan.precision import PRECISIONS, PrecisionName, check_capability, check_precision
from spin_megatron.plan.shape import ModelShape, ParallelLayout

SHAPE = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=512,
    ffn_hidden_size=1536,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=1000,
    max_positions=4096,
    norm_epsilon=1e-5,
    rope_theta=1e4,
)
EXPERTS = replace(SHAPE, family="mixtral", num_experts=4, experts_per_token=2, expert_ffn_hidden_size=1536)
FP8: list[PrecisionName] = ["fp8-blockwise", "fp8-tensorwise", "mxfp8"]


@pytest.mark.parametrize(
    ("name", "layout", "pack_tokens", "message"),
    [
        ("fp8-blockwise", ParallelLayout(), 4000, r"train\.pack_tokens=4000 is not a multiple of 128: .* on each of the 1 ranks.*use 4096"),
        ("fp8-tensorwise", ParallelLayout(), 4008, r"multiple of 16: .*use 4016"),
        ("mxfp8", ParallelLayout(tensor=2, sequence=True), 4128, r"multiple of 64: .* 32 tokens on each of the 2 ranks.*use 4160"),
        ("fp8-blockwise", ParallelLayout(tensor=2, sequence=True), 4224, r"multiple of 256: .*use 4352"),
    ],
)
def test_each_rank_s_share_of_a_pack_must_be_whole_blocks(
    name: PrecisionName, layout: ParallelLayout, pack_tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_precision(name, SHAPE, layout, pack_tokens=pack_tokens)
    check_precision("bf16", SHAPE, layout, pack_tokens=pack_tokens)


def test_matrices_must_be_multiples_of_what_the_tensor_cores_take() -> None:
    for name in FP8:
        check_precision(name, SHAPE, ParallelLayout(tensor=2), pack_tokens=4096)
    # 1544 / 2 = 772 = 48 x 16 + 4.
    with pytest.raises(ValueError, match=r"sizes are multiples of 16, and the model has FFN size 772 on a rank with parallel\.tensor=2"):
        check_precision("fp8-blockwise", replace(SHAPE, ffn_hidden_size=1544), ParallelLayout(tensor=2), pack_tokens=4096)
    # 1520 / 2 = 760 = 23 x 32 + 24, and 47 x 16 + 8.
    with pytest.raises(ValueError, match=r"FFN size of an expert 760"):
        check_precision("mxfp8", replace(EXPERTS, expert_ffn_hidden_size=1520), ParallelLayout(tensor=2), pack_tokens=4096)


def test_a_scale_shared_with_other_packs_in_each_epoch_is_refused() -> None:
    layout = ParallelLayout(data=2, expert=2)
    with pytest.raises(ValueError, match=r'parallel\.expert=2 with train\.precision="fp8-tensorwise": .*use "fp8-blockwise"'):
        check_precision("fp8-tensorwise", EXPERTS, layout, pack_tokens=4096)
    check_precision("fp8-blockwise", EXPERTS, layout, pack_tokens=4096)


def test_no_more_layers_stay_bf16_than_a_stage_has() -> None:
    check_precision("fp8-blockwise", SHAPE, ParallelLayout(pipeline=2), pack_tokens=4096, num_bf16_end_layers=2)
    with pytest.raises(ValueError, match=r"train\.num_bf16_end_layers=3 is more than the 2 layers"):
        check_precision("fp8-blockwise", SHAPE, ParallelLayout(pipeline=2), pack_tokens=4096, num_bf16_end_layers=3)


@pytest.mark.parametrize(
    ("gpu", "possible"),
    [("a100-80gb", []), ("h100", ["fp8-blockwise", "fp8-tensorwise"]), ("b200", FP8)],
)
def test_each_gpu_has_the_recipes_of_its_generation(gpu: str, possible: list[PrecisionName]) -> None:
    for name in PRECISIONS:
        if name in possible or name not in FP8:
            check_capability(name, find_gpu(gpu).capability, where=gpu)
        else:
            with pytest.raises(ValueError, match=rf'train\.precision="{name}" needs .*{gpu} has compute capability .*"bf16"'):
                check_capability(name, find_gpu(gpu).capability, where=gpu)


def _config(**slurm: str) -> RunConfig:
    values = {
        "model": {"path": "org/model", "revision": "a" * 40},
        "data": {"source": "org/data", "revision": "d" * 40},
        "train": {"precision": "fp8-blockwise", "pack_tokens": 4096},
        "slurm": slurm,
    }
    return RunConfig.model_validate(values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_fp8_is_refused_by_name_where_there_is_no_gpu() -> None:
    expected = r'train\.precision="fp8-blockwise" needs .*this machine has no NVIDIA GPU; use "fp32", "bf16"; .*slurm\.gpu'
    with pytest.raises(ValueError, match=expected):
        check_config(_config())
    check_config(_config(gpu="h100-80gb"))  # the cluster's GPU counts, not that of the machine that submits
    with pytest.raises(ValueError, match=r"slurm\.gpu=a100-80gb has compute capability 8\.0"):
        check_config(_config(gpu="a100-80gb"))
    with pytest.raises(ValueError, match=r'needs Transformer Engine: .* this is cpu; use "bf16" or "fp32"'):
        require_fp8(Fp8("fp8-blockwise"), choose_layer_spec(torch.device("cpu")))


@pytest.mark.parametrize("name", FP8)
def test_a_choice_becomes_megatron_core_s_settings(name: PrecisionName) -> None:
    from megatron.core.enums import Fp8Recipe
    from megatron.core.transformer import TransformerConfig

    fp8 = Fp8.chosen(name, 1)
    assert fp8 is not None
    config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **fp8.settings())
    assert config.fp8_recipe == Fp8Recipe(name.removeprefix("fp8-"))
    assert config.fp8 == ("hybrid" if name == "fp8-tensorwise" else "e4m3")
    assert (config.first_last_layers_bf16, config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (True, 1, 1)
    assert not config.fp8_param
    assert Fp8.chosen("bf16", 0) is None


def test_fp8_halves_the_kept_inputs_of_products_and_keeps_two_copies_of_their_matrices() -> None:
    layout = ParallelLayout()
    bf16, fp8 = TrainSettings(4096, 1), TrainSettings(4096, 1, precision="fp8-blockwise")
    wide, narrow = layer_widths(SHAPE, layout, bf16), layer_widths(SHAPE, layout, fp8)
    # In elements of two bytes, halved: two norms' outputs of 512 each; the activation, 1536. The attention reads its output of 512 in bf16
    # itself, so the product's is one more, of half the size.
    assert (wide.residual - narrow.residual, wide.attention - narrow.attention, wide.mlp - narrow.mlp) == (512, -256, 768)
    matrices = 4 * (512 * (8 + 2 * 2) * 64 + 512 * 512 + 3 * 512 * 1536)
    assert (fp8_copy_bytes(SHAPE, layout, fp8, 0), fp8_copy_bytes(SHAPE, layout, bf16, 0)) == (2 * matrices, 0)
