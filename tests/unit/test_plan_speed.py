"""Step time from parts worked out by hand; the constants themselves are held to published runs in test_plan_published.py."""

from dataclasses import replace
from typing import Any

import pytest

from spin_megatron.plan.adapters import AdapterShape
from spin_megatron.plan.duration import (
    PACK_FILL,
    Batch,
    RunSettings,
    Storage,
    Workload,
    checkpoint_bytes,
    engine_tensor,
    generation,
    gpu_hours,
    plan_batch,
    run_time,
    with_workload,
)
from spin_megatron.plan.hardware import find_gpu
from spin_megatron.plan.memory import TrainSettings
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.plan.speed import (
    HEAD_SHARE,
    MEMORY_SHARE,
    StepTime,
    forward_flops,
    forward_only_seconds,
    head_time,
    layer_matrix_elements,
    layer_time,
    stage_times,
    step_time,
)

H100 = find_gpu("h100")
LLAMA3_8B = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, 5e5)
LLAMA3_70B = replace(LLAMA3_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_heads=64)
MIXTRAL = ModelShape(
    "mixtral", 32, 4096, 14336, 32, 8, 128, 32000, 32768, 1e-5, 1e6, num_experts=8, experts_per_token=2, expert_ffn_hidden_size=14336
)
SETTINGS = TrainSettings(4096, 8)
WORKLOAD = Workload(1000, prompt_tokens=100, real_tokens=301, generated_tokens=301, train_pairs=(1000, 2000), epochs=(2, 1))


def test_forward_flops_count_two_a_matrix_element_and_the_keys_a_token_sees() -> None:
    # Llama-3-8B: a layer's matrices 4096 x (6144 + 4096 + 3 x 14336); two attention products of 32 heads x 128 over 2048 keys.
    layer = 2 * 4096 * (6144 + 4096 + 3 * 14336) + 4 * 4096 * 2048
    expected = 1000 * (32 * layer + 2 * 4096 * 128256)
    assert forward_flops(LLAMA3_8B, replace(SETTINGS, keys_per_token=2048), 1000) == expected
    half_head = forward_flops(LLAMA3_8B, replace(SETTINGS, keys_per_token=2048, head_rows=0.5), 1000)
    assert expected - half_head == 1000 * 4096 * 128256


def test_nvidia_counts_as_many_flops_for_the_same_sequence() -> None:
    # dgxc-benchmarking: 4.74e14 for a sequence of 8192 of Llama 3.1 8B, forward and backward, causal attention counted whole.
    flops = 3 * forward_flops(LLAMA3_8B, replace(SETTINGS, keys_per_token=8192), 8192)
    assert flops == pytest.approx(4.74e14, rel=0.03)


def test_a_mixture_counts_the_experts_a_token_is_sent_to() -> None:
    dense, expert = layer_matrix_elements(MIXTRAL)
    assert (dense, expert) == (4096 * (6144 + 4096) + 8 * 4096, 2 * 3 * 4096 * 14336)


def test_tensor_parallelism_divides_a_layers_work() -> None:
    whole = layer_time(LLAMA3_70B, ParallelLayout(), SETTINGS, H100)
    split = layer_time(LLAMA3_70B, ParallelLayout(tensor=8, sequence=True), SETTINGS, H100)
    assert whole.communication == 0
    assert split.communication > 0
    assert split.forward == pytest.approx(whole.forward / 8, rel=1e-9)


def test_full_recompute_adds_a_forward_and_selective_less() -> None:
    none, selective, full = (
        layer_time(LLAMA3_70B, ParallelLayout(), replace(SETTINGS, recompute=mode), H100)  # type: ignore[arg-type]
        for mode in ("none", "selective", "full")
    )
    assert full.backward == pytest.approx(none.backward + none.forward)
    assert none.backward < selective.backward < full.backward
    a_quarter = layer_time(LLAMA3_70B, ParallelLayout(), replace(SETTINGS, recompute="full", recompute_layers=20), H100)
    assert a_quarter.backward == pytest.approx(none.backward + none.forward / 4)


def test_a_tiny_layer_is_bound_by_launches() -> None:
    tiny = ModelShape("llama", 4, 64, 96, 4, 2, 16, 256, 64, 1e-5, 1e4)
    assert layer_time(tiny, ParallelLayout(), SETTINGS, H100).forward == 150e-6


def test_the_head_takes_eight_products_when_it_makes_its_logits_again_and_six_otherwise() -> None:
    rows, columns = 4096, 128256
    product = 2 * rows * 4096 * columns / (H100.bf16_flops * HEAD_SHARE)
    epilogues = 4 * rows * columns * 4 / (H100.memory_bandwidth * MEMORY_SHARE)
    again = head_time(LLAMA3_8B, ParallelLayout(), SETTINGS, H100)
    kept = head_time(LLAMA3_8B, ParallelLayout(), replace(SETTINGS, recompute_logits=False), H100)
    assert again.total == pytest.approx(4 * product + epilogues)
    assert kept.total == pytest.approx(3 * product + epilogues)


def test_one_forward_one_backward_waits_for_the_other_stages_once() -> None:
    layout = ParallelLayout(pipeline=4)
    stages = [stage.total for stage in stage_times(LLAMA3_70B, layout, SETTINGS, H100)]
    step = step_time(LLAMA3_70B, layout, SETTINGS, H100)
    assert step.compute + step.tensor == pytest.approx(8 * max(stages))
    assert step.bubble == pytest.approx(sum(stages) - max(stages))
    assert step.imbalance == pytest.approx(max(stages) / (sum(stages) / 4))
    assert max(stages) == stages[-1], "the head is on the last stage"
    interleaved = step_time(LLAMA3_70B, ParallelLayout(pipeline=4, virtual_pipeline=5), SETTINGS, H100)
    assert interleaved.bubble == pytest.approx(step.bubble / 5)


def test_the_forward_only_pass_is_about_a_third_of_a_step() -> None:
    layout = ParallelLayout(tensor=8, pipeline=4, sequence=True)
    share = forward_only_seconds(LLAMA3_70B, layout, SETTINGS, H100) / step_time(LLAMA3_70B, layout, SETTINGS, H100).total
    assert 0.25 < share < 0.40


def test_a_network_slows_data_ranks_that_leave_the_server() -> None:
    inside = step_time(LLAMA3_8B, ParallelLayout(data=8), SETTINGS, H100)
    # TP8 fills the server, so each data rank's partner is in another one and both have one NIC.
    beyond = step_time(LLAMA3_8B, ParallelLayout(tensor=8, data=2, sequence=True), SETTINGS, H100)
    moved_inside, moved_beyond = 6 * 8.03e9 * 7 / 8, 6 * 8.03e9 / 8 / 2
    assert inside.data == pytest.approx(moved_inside / (450e9 * 0.7), rel=0.01)
    assert beyond.data == pytest.approx(moved_beyond / (50e9 * 0.8), rel=0.01)


def test_utilisation_is_model_flops_over_peak() -> None:
    step = StepTime(1.0, 0.5, 0.25, 0.0, 0.15, 0.1, 1.0, num_tokens=8192, model_flops=2 * H100.bf16_flops)
    assert step.total == 2.0
    assert step.bubble_share == 0.125
    assert step.utilisation(4, H100) == pytest.approx(0.25)
    assert step.tokens_per_second(4) == 1024


def test_a_pair_takes_its_prompt_once_or_twice() -> None:
    assert WORKLOAD.tokens_per_pair(share_prompt=True) == 100 + 300 + 300
    assert WORKLOAD.tokens_per_pair(share_prompt=False) == 800
    # Shared: the prompt's tokens see 50 keys on average, an answer's 100 + 150.
    assert WORKLOAD.keys_per_token(share_prompt=True) == pytest.approx((100 * 50 + 600 * 250) / 700)
    assert WORKLOAD.keys_per_token(share_prompt=False) == pytest.approx((200 * 50 + 600 * 250) / 800)


def test_an_update_is_the_multiple_of_the_data_ranks_nearest_to_the_pairs_asked_for() -> None:
    batch = plan_batch(WORKLOAD, pack_tokens=4096, global_batch_pairs=64, data_parallel=4, share_prompt=True)
    pairs = PACK_FILL * 4096 / 700  # 5.76 pairs a pack; 64 pairs are 11.1 packs, 2.8 a data rank
    assert batch.pairs_per_pack == pytest.approx(pairs)
    assert batch.micro_batches == 3
    assert batch.pairs_per_step == pytest.approx(12 * pairs)
    settings = with_workload(SETTINGS, WORKLOAD, batch, share_prompt=True)
    assert (settings.micro_batches, settings.head_rows, settings.shared_prefix) == (3, pytest.approx(602 / 700), pytest.approx(200 / 700))
    assert settings.branches == 3 * batch.pairs_per_pack


def test_engines_take_as_many_gpus_as_their_weights_need() -> None:
    # 141 GB of weights against 60% of 84.9 GB: one and two GPUs are too few, four hold it.
    assert engine_tensor(LLAMA3_70B, H100) == 4
    assert engine_tensor(LLAMA3_8B, H100) == 1
    assert generation(LLAMA3_70B, H100, prompt_tokens=100, new_tokens=300, kind="compiled", tensor=1) is None


def test_an_eager_engine_is_bound_by_launches() -> None:
    eager = generation(LLAMA3_8B, H100, prompt_tokens=100, new_tokens=300, kind="eager", tensor=1, max_batch=16)
    compiled = generation(LLAMA3_8B, H100, prompt_tokens=100, new_tokens=300, kind="compiled", tensor=1, max_batch=16)
    assert eager is not None
    assert compiled is not None
    assert eager.tokens_per_second < 16 / (32 * 0.7e-3) < compiled.tokens_per_second


def test_a_run_adds_up_its_stages() -> None:
    layout = ParallelLayout(data=8)
    batch = plan_batch(WORKLOAD, pack_tokens=4096, global_batch_pairs=64, data_parallel=8, share_prompt=True)
    settings = with_workload(SETTINGS, WORKLOAD, batch, share_prompt=True)
    run = RunSettings("compiled", engine_is_built=True, max_batch=256, save_every_steps=10, storage=Storage(1e9, 0.5e9))
    first, second = run_time(LLAMA3_8B, layout, settings, H100, workload=WORKLOAD, batch=batch, run=run)
    step = step_time(LLAMA3_8B, layout, settings, H100).total
    # 1000 pairs in updates of 8 packs of 5.76 pairs: 22 updates an epoch; the second iteration has 2000 pairs once.
    assert (first.steps, second.steps) == (44, 44)
    assert first.train == pytest.approx(44 * step)
    # Weights 16.06 GB: read at 1 GB/s and a minute to start; the build takes a minute and 2 s a GB more.
    assert first.engine == pytest.approx(60 + 16.06 + 60 + 32.1, rel=1e-3)
    # Export reads the trained weights, writes theta, reads that back and scores 4 pairs of two answers on one thread at 100 GFLOP/s.
    assert first.export == pytest.approx(60 + 16.06 + 32.1 + 16.06 + 2 * 8.03 * 4 * (2 * 100 + 301 + 301) / 100, rel=1e-3)
    assert first.checkpoint == pytest.approx((4 * 14 + 2) * 8.030261248e9 / 0.5e9)
    assert second.reference > first.reference
    assert gpu_hours([first, second], 8) == pytest.approx((first.total + second.total) * 8 / 3600)


@pytest.mark.parametrize(
    ("precision", "optimizer", "bytes_each"),
    [("bf16", "adamw", 14), ("fp8-blockwise", "rmsprop", 10), ("fp32", "adamw", 12), ("fp32", "rmsprop", 8)],
)
def test_a_checkpoint_holds_weights_moments_and_of_bf16_the_main_weights(precision: Any, optimizer: Any, bytes_each: int) -> None:
    settings = replace(SETTINGS, precision=precision, optimizer=optimizer)
    assert checkpoint_bytes(LLAMA3_70B, settings) == bytes_each * 70_553_706_496


def test_files_of_fp32_are_twice_as_large_and_adapters_leave_small_checkpoints() -> None:
    layout, batch = ParallelLayout(data=8), Batch(5.0, 1, 40.0)
    run = RunSettings("compiled", engine_is_built=True, max_batch=256, save_every_steps=25, storage=Storage(1e9, 0.5e9))
    bf16, fp32, lora = (
        run_time(LLAMA3_8B, layout, replace(SETTINGS, **changes), H100, workload=WORKLOAD, batch=batch, run=run)[0]
        for changes in ({}, {"precision": "fp32"}, {"adapters": AdapterShape(16, ("qkv", "proj"))})
    )
    # theta is written once and read twice, by the loader of theta_t and by the probe.
    assert fp32.export - bf16.export == pytest.approx(16.06 * (1 + 1 + 2), rel=1e-3)
    assert fp32.generate - bf16.generate == pytest.approx(16.06, rel=1e-3)
    # Rank 16 beside QKV (4096 -> 6144) and the projection (4096 -> 4096) of 32 layers; 50 updates save twice, and the end once more.
    adapters = 32 * 16 * (4096 + 6144 + 4096 + 4096)
    assert lora.checkpoint == pytest.approx((2 * 14 + 2) * adapters / 0.5e9)
    assert lora.export == bf16.export, "the merged model is whole"


def test_an_engine_in_fp32_has_twice_the_weights_and_half_the_rate() -> None:
    layout, batch = ParallelLayout(data=8), Batch(5.0, 1, 40.0)
    run = RunSettings("compiled", engine_is_built=True, max_batch=256, save_every_steps=25)
    wide = replace(run, engine_bytes=4)
    short, long = (run_time(LLAMA3_8B, layout, SETTINGS, H100, workload=WORKLOAD, batch=batch, run=each)[0] for each in (run, wide))
    assert long.engine - short.engine == pytest.approx(2 * 16.06, rel=1e-3)
    assert long.generate > short.generate


def test_context_ranks_wait_for_all_keys_and_for_their_gradients_in_fp32() -> None:
    # Keys and values of 8 groups x 128 for the 2048 tokens of the other rank: 2 bytes each forward, 4 backward, at 0.7 of NVLink's rate.
    layout = ParallelLayout(context=2)
    gathered = 2 * 2048 * 8 * 128 / (450e9 * 0.7)
    times = {mode: layer_time(LLAMA3_8B, layout, replace(SETTINGS, recompute=mode), H100) for mode in ("none", "selective", "full")}
    assert times["none"].forward_communication == pytest.approx(2 * gathered)
    assert times["none"].communication == times["selective"].communication == pytest.approx(6 * gathered)
    assert times["full"].communication == pytest.approx(8 * gathered), "the forward is made again"
    ring = layer_time(LLAMA3_8B, layout, replace(SETTINGS, overlap_context=True), H100)
    assert ring.communication == pytest.approx(0.45 * 4 * gathered)


@pytest.mark.parametrize(("threads", "seconds"), [(4, 38 / 40e9), (8, 38 / (77e9 * 0.75))])
def test_an_offloaded_update_takes_the_host_s_memory_or_its_cores_and_the_way_back(threads: int, seconds: float) -> None:
    # AdamW of 8.03 G parameters over 8 data ranks, half of them: 38 bytes an element on the host, and 2 up from memory that is not pinned.
    layout = ParallelLayout(data=8)
    settings = replace(SETTINGS, distributed_optimizer=True, host_threads=threads)
    whole, half = (step_time(LLAMA3_8B, layout, replace(settings, offload_fraction=share), H100) for share in (0.0, 0.5))
    elements = 8.03e9 / 8 / 2
    saved = 2 * 12 * elements / (3350e9 * 0.75)
    assert half.optimizer - whole.optimizer == pytest.approx(elements * (seconds + 2 / (50e9 * 0.25)) - saved, rel=1e-3)
    assert half.compute == whole.compute
