"""Memory of a rank, from sizes worked out by hand and from what Megatron Core's own runs on A100 and H100 allocated."""

from dataclasses import replace

import pytest

from spin_megatron.plan.hardware import GIGA, GPUS, find_gpu
from spin_megatron.plan.memory import (
    FRAGMENTATION,
    LayerWidths,
    RankMemory,
    StateBytes,
    TrainSettings,
    activation_bytes,
    attention_backward_bytes,
    backward_bytes,
    chunks_in_flight,
    head_bytes,
    layer_widths,
    state_bytes,
)
from spin_megatron.plan.shape import ModelShape, ParallelLayout

SMALL = ModelShape("llama", 4, 64, 96, 4, 2, 16, 256, 64, 1e-5, 1e4)
# A dummy gradient of each kind of its matrices, in bf16: (64 + 2 x 32) x 64 of QKV, 64 x 64, 192 x 64 and 64 x 96.
SMALL_DUMMIES = 2 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96)
LLAMA3_8B = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, 5e5)
MIXTRAL = ModelShape(
    "mixtral", 32, 4096, 14336, 32, 8, 128, 32000, 32768, 1e-5, 1e6, num_experts=8, experts_per_token=2, expert_ffn_hidden_size=14336
)


def test_adamw_keeps_16_bytes_a_parameter_and_rmsprop_12() -> None:
    # bf16 weight 2, fp32 gradient 4, fp32 weight 4, fp32 moments 2 x 4 or 1 x 4; sizes here are multiples of 128, so nothing is padded.
    settings = TrainSettings(64, 1, distributed_optimizer=False)
    state = state_bytes(SMALL, ParallelLayout(), settings, 0)
    # Layer: norms 128, qkv 128 x 64, proj 64 x 64, fc1 192 x 64, fc2 64 x 96; embedding and head 256 x 64; final norm 64.
    numel = 4 * (128 + 64 * (128 + 64 + 192 + 96)) + 2 * 256 * 64 + 64
    assert (state.num_parameters, state.weights, state.gradients, state.optimizer) == (numel, 2 * numel, 4 * numel, 12 * numel)
    assert state_bytes(SMALL, ParallelLayout(), replace(settings, optimizer="rmsprop"), 0).optimizer == 8 * numel
    assert state_bytes(SMALL, ParallelLayout(), replace(settings, precision="fp32"), 0).optimizer == 8 * numel


def test_the_distributed_optimizer_divides_its_state_by_the_data_ranks() -> None:
    layout = ParallelLayout(data=4)
    states = [state_bytes(SMALL, layout, TrainSettings(64, 1), 0, rank) for rank in range(4)]
    assert sum(state.optimizer for state in states) == 12 * states[0].num_parameters
    assert max(state.optimizer for state in states) < 1.01 * 3 * states[0].num_parameters


def test_experts_are_divided_by_the_ranks_that_share_them() -> None:
    layout = ParallelLayout(tensor=2, pipeline=4, data=8, expert=8)
    state = state_bytes(MIXTRAL, layout, TrainSettings(4096, 1), 1)
    # 8 layers; one expert a rank, halved over tensor ranks, shared by 8 / 8 = 1 data rank: 12 bytes each. The rest over 8 data ranks.
    experts = 8 * 3 * 4096 * 14336 // 2
    dense = 8 * (2 * 4096 + 8 * 4096 + 4096 * (6144 + 4096) // 2)
    assert state.optimizer == pytest.approx(12 * experts + 12 * dense / 8, rel=1e-3)


def test_nemo_reports_what_is_planned_for_llama3_8b() -> None:
    # NVIDIA dgxc-benchmarking 741c886, llama3.1/README.md: 8 H100, TP1 CP2 DP4, bf16 gradients: memory_allocated 44,271,689,728.
    settings = TrainSettings(8192, 32, precision="fp8-tensorwise", gradient_bytes=2)
    planned = state_bytes(LLAMA3_8B, ParallelLayout(data=4, context=2), settings, 0).total
    assert planned == pytest.approx(44_271_689_728, rel=0.005)


def test_megatron_cores_mixtral_ci_run_reports_what_is_planned() -> None:
    # Megatron-LM d98e8a64, tests/functional_tests/test_cases/mixtral/mixtral_8x7b_alltoall_tp2pp4ep4_release_sm: vocabulary 256000,
    # mem-allocated-bytes 17,703,634,944 of the last rank on H100. The file does not say how many GPUs; 128 is the number that fits.
    shape = replace(MIXTRAL, vocab_size=256000)
    planned = state_bytes(shape, ParallelLayout(tensor=2, pipeline=4, data=16, expert=4), TrainSettings(4096, 1), 3).total
    assert planned == pytest.approx(17_703_634_944, rel=0.03)


# Megatron-LM d98e8a64, tests/functional_tests/test_cases/gpt/gpt3_7b_*_memory_speed: 32 layers of hidden 4096, 32 heads, 8 groups,
# ungated MLP of 16384, biases, two dropout masks of a byte; vocabulary 131200. mem-max minus mem-allocated is what a step takes.
@pytest.mark.parametrize(
    ("tensor", "tokens", "layers_in_flight", "measured"),
    [
        pytest.param(4, 2 * 8192, 32, 57_143_791_616 - 20_663_519_232, id="TP4, two sequences of 8192, H100"),
        pytest.param(4, 2 * 8192, 32, 58_188_115_968 - 20_634_103_808, id="TP4, two sequences of 8192, A100"),
        pytest.param(1, 8192, 29, 60_720_852_992 - 24_808_996_864, id="PP4 with 8 virtual stages, last rank, H100"),
    ],
)
def test_megatron_cores_7b_ci_runs_take_the_planned_activations(tensor: int, tokens: int, layers_in_flight: int, measured: int) -> None:
    dropout_masks = 2 * 4096 / 2  # two masks of one byte, in elements of two
    widths = LayerWidths(
        residual=4 * 4096 + dropout_masks,
        attention=(2 * 32 + 2 * 8) * 128 / tensor,
        mlp=2 * 16384 / tensor,
        statistics=32 / tensor,
        checkpoint=4096,
    )
    logits = tokens * 131200 / tensor * (2 + 4)  # bf16 and their fp32 copy
    planned = layers_in_flight * tokens * widths.token_bytes(2, "none") + logits
    assert planned == pytest.approx(measured, rel=0.05)


def test_the_interleaved_ci_run_has_29_layers_in_flight_on_its_last_rank() -> None:
    # PP4, 8 virtual stages, 4 micro-batches: (4 - 3 - 1) x 2 + 7 x 4 before the first backward, and that one.
    assert chunks_in_flight(ParallelLayout(pipeline=4, virtual_pipeline=8), 3, 4) == 29


@pytest.mark.parametrize(("rank", "micro_batches", "expected"), [(0, 8, 4), (1, 8, 3), (3, 8, 1), (0, 2, 2)])
def test_one_forward_one_backward_holds_the_stages_after_it(rank: int, micro_batches: int, expected: int) -> None:
    assert chunks_in_flight(ParallelLayout(pipeline=4), rank, micro_batches) == expected


def test_a_layer_keeps_what_its_widths_say() -> None:
    # Tokens of 64 elements: norms' inputs and outputs 4 x 64, queries and output 2 x 64, keys and values 2 x 32, SwiGLU 3 x 96.
    settings = TrainSettings(128, 1)
    widths = layer_widths(SMALL, ParallelLayout(), settings)
    assert (widths.residual, widths.attention, widths.mlp, widths.checkpoint) == (256, 192, 288, 64)
    assert widths.token_bytes(2, "none") == 2 * (256 + 192 + 288) + 4 * 4
    assert widths.token_bytes(2, "selective") == 2 * (256 + 192) + 4 * 4
    assert widths.token_bytes(2, "full") == 2 * 64
    # Norms of heads: their 64 + 32 inputs, and a scale for each of 4 + 2 heads besides the 4 sums of the attention.
    normed = layer_widths(replace(SMALL, qk_norm=True), ParallelLayout(), settings)
    assert normed == replace(widths, attention=192 + 96, statistics=4 + 4 + 2)
    # Two heads of keys over four ranks: one on each.
    assert layer_widths(SMALL, ParallelLayout(tensor=4), settings).attention == 2 * 16 + 2 * 16
    split = layer_widths(SMALL, ParallelLayout(tensor=2, sequence=True), settings)
    assert (split.residual, split.attention, split.mlp) == (128, 96, 144)
    assert layer_widths(SMALL, ParallelLayout(tensor=2), settings).residual == 256
    assert layer_widths(SMALL, ParallelLayout(), replace(settings, shared_prefix=0.5)).attention == 2 * 64 + 1.5 * 64


def test_full_recompute_keeps_layer_inputs_and_one_layer() -> None:
    settings = TrainSettings(128, 1, recompute="full", fused_gradients=True)
    widths = layer_widths(SMALL, ParallelLayout(), settings)
    embedded = 128 * 64 * 2
    assert activation_bytes(SMALL, ParallelLayout(), settings, 0) == 4 * 128 * 64 * 2 + embedded + SMALL_DUMMIES
    layer = 128 * (widths.token_bytes(2, "none") - widths.token_bytes(2, "full"))
    beyond = backward_bytes(SMALL, ParallelLayout(), replace(settings, recompute="none"))
    assert backward_bytes(SMALL, ParallelLayout(), settings) == layer + beyond


def test_layers_that_are_not_recomputed_keep_everything() -> None:
    settings = TrainSettings(128, 1, recompute="full", recompute_layers=3, fused_gradients=True)
    widths = layer_widths(SMALL, ParallelLayout(), settings)
    everything, again = 128 * widths.token_bytes(2, "none"), 128 * 64 * 2
    embedded = 128 * 64 * 2
    kept = 3 * again + everything + embedded
    assert activation_bytes(SMALL, ParallelLayout(), settings, 0) == kept + SMALL_DUMMIES
    # Two stages of two virtual stages have one layer each: all of them.
    stages = ParallelLayout(pipeline=2, virtual_pipeline=2)
    fewer, all_layers = (activation_bytes(SMALL, stages, replace(settings, recompute_layers=number), 0) for number in (3, None))
    assert fewer == all_layers


def test_flash_attention_keeps_branches_apart_in_its_backward() -> None:
    # 256 tokens in 6 branches, half of them prompts that are seen once more: 384 keys, 256 + 6 x 128 = 1024 rows; 4 heads, 2 groups of 16.
    settings = TrainSettings(256, 1, shared_prefix=0.5, branches=6)
    # Gradients in bf16 of output and queries, of keys and values in 2 groups and in 4 heads. Sums: a head of 16 takes 32, and one more.
    expected = 2 * 16 * (2 * 256 * 4 + 2 * 384 * (2 + 4)) + 4 * 1024 * 4 * (32 + 1)
    assert attention_backward_bytes(SMALL, ParallelLayout(), settings) == expected
    # No head has a group of its own: nothing is held twice. A context rank has half of the queries, and of the prompts' copies.
    plain = replace(SMALL, num_kv_heads=4)
    assert attention_backward_bytes(plain, ParallelLayout(), settings) == 2 * 16 * (2 * 256 * 4 + 2 * 384 * 4) + 4 * 1024 * 4 * 33
    halved = 2 * 16 * (2 * 128 * 4 + 2 * 320 * 4) + 4 * (128 + 768) * 4 * 33
    assert attention_backward_bytes(plain, ParallelLayout(context=2), settings) == halved
    split = attention_backward_bytes(SMALL, ParallelLayout(tensor=2), settings)
    assert split == expected / 2


def test_a_layer_goes_back_through_its_mlp_and_then_through_its_attention() -> None:
    settings = TrainSettings(256, 1, shared_prefix=0.5, branches=6)
    # In the MLP the gradients of both halves of 96; in the attention the MLP's 3 x 96 of each token are free again.
    freed = 256 * 3 * 96 * 2
    attention = attention_backward_bytes(SMALL, ParallelLayout(), settings) - freed
    assert attention > 256 * 2 * 96 * 2
    assert backward_bytes(SMALL, ParallelLayout(), settings) == attention
    assert backward_bytes(SMALL, ParallelLayout(), replace(settings, recompute="selective")) == attention + freed
    assert backward_bytes(LLAMA3_8B, ParallelLayout(), TrainSettings(4096, 1)) == 4096 * 2 * 14336 * 2
    copies = 2 * 4096 * 2 * 14336 * 2  # two experts a token, two halves
    assert backward_bytes(MIXTRAL, ParallelLayout(), TrainSettings(4096, 1)) == copies


def test_recompute_never_takes_more() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, sequence=True)
    settings = [TrainSettings(4096, 8, recompute=mode) for mode in ("none", "selective", "full")]  # type: ignore[arg-type]
    taken = [activation_bytes(LLAMA3_8B, layout, mode, 0) + backward_bytes(LLAMA3_8B, layout, mode) for mode in settings]
    assert taken[0] > taken[1] > taken[2]


def test_the_head_lies_on_the_last_stage_and_follows_its_rows() -> None:
    layout = ParallelLayout(pipeline=2)
    settings = TrainSettings(4096, 8, head_rows=0.5, kept_logit_bytes=10**6)
    assert head_bytes(LLAMA3_8B, layout, settings, 0) == 0
    # Final norm's input and output, 2048 gathered rows in bf16 with an fp32 gradient; an fp32 tile of 1024 x 4096, the gradient of a panel
    # of at most 8192 x 8192 in bf16, kept logits.
    expected = 2 * 4096 * 4096 * 2 + 2048 * 4096 * (2 + 4) + 1024 * 4096 * 4 + 2048 * 8192 * 2 + 10**6
    assert head_bytes(LLAMA3_8B, layout, settings, 1) == expected
    # No more than there are: 128256 columns.
    everything, nothing = (head_bytes(LLAMA3_8B, layout, replace(settings, kept_logit_bytes=kept), 1) for kept in (10**12, 0))
    assert everything - nothing == 2048 * 128256 * 4
    few = replace(LLAMA3_8B, vocab_size=1000)
    expected = 2 * 4096 * 4096 * 2 + 2048 * 4096 * (2 + 4) + 1024 * 1000 * 4 + 2048 * 1000 * 2 + 10**6
    assert head_bytes(few, layout, settings, 1) == expected


def test_total_adds_fragmentation_to_what_comes_and_goes() -> None:
    memory = RankMemory(0, StateBytes(1, 100, 200, 300), activations=1000, head=500, backward=400, communication=10, context=20)
    assert memory.total == 600 + int(1500 * (1 + FRAGMENTATION)) + 30
    # The head is done before the first layer goes back.
    assert replace(memory, backward=700).total == 600 + int(1700 * (1 + FRAGMENTATION)) + 30


def test_gpus_are_found_by_name_and_unknown_ones_are_listed() -> None:
    assert find_gpu("H100-80GB") is find_gpu("h100") is GPUS["h100-80gb"]
    with pytest.raises(ValueError, match=r"--gpu 'a100' .* known are a100-40gb, .*Did you mean a100-40gb or a100-80gb\?"):
        find_gpu("a100")
    with pytest.raises(ValueError, match="known are a100-40gb"):
        find_gpu("tpu-v5p")


def test_every_gpu_has_less_memory_than_its_name_and_plausible_rates() -> None:
    for name, gpu in GPUS.items():
        gigabytes = int(name.split("-")[1].removesuffix("gb"))
        assert 0.95 * gigabytes < gpu.memory_bytes / 2**30 <= gigabytes
        assert gpu.fp8_flops is None or 1.99 < gpu.fp8_flops / gpu.bf16_flops < 2.01
        assert gpu.network_bandwidth < gpu.nvlink_bandwidth < gpu.memory_bandwidth < gpu.bf16_flops
        assert gpu.memory_bandwidth > 1000 * GIGA
