"""One set of constants against published runs: training within 20%, generation within 20%, mixtures within 25%.

Sources, by the letters of the tables:
    D  NVIDIA/dgxc-benchmarking 741c886 (June 2025): llama3.1/README.md, ft_llama3/README_8b.md and README_70b.md; 8 to 2048 H100
    N  NVIDIA NeMo Framework user guide 24.12, performance summary; 8 to 64 H100, FP8
    B  NVIDIA-NeMo/Megatron-Bridge docs/performance-summary-archive.md, releases 25.11 and 26.06
    C  NVIDIA/Megatron-LM d98e8a64, tests/functional_tests/test_cases/gpt/gpt3_7b_*: iteration-time of CI runs in deterministic mode,
       without overlap of tensor-parallel collectives and without fused gradients; its ungated MLP of 16384 as a gated one of equal work
    T  NVIDIA/TensorRT-LLM 00f37686, docs/source/performance/perf-overview.md: release 1.0, FP8 checkpoints
"""

from dataclasses import dataclass

import pytest

from spin_megatron.plan.duration import generation
from spin_megatron.plan.hardware import find_gpu
from spin_megatron.plan.layouts import usable_bytes
from spin_megatron.plan.memory import TrainSettings, all_ranks
from spin_megatron.plan.precision import PrecisionName
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.plan.speed import step_time


def llama(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int) -> ModelShape:
    return ModelShape("llama", layers, hidden, ffn, heads, groups, hidden // heads, vocab, 8192, 1e-5, 1e4)


LLAMA2_7B = llama(32, 4096, 11008, 32, 32, 32000)
LLAMA2_13B = llama(40, 5120, 13824, 40, 40, 32000)
LLAMA2_70B = llama(80, 8192, 28672, 64, 8, 32000)
LLAMA3_8B = llama(32, 4096, 14336, 32, 8, 128256)
LLAMA3_70B = llama(80, 8192, 28672, 64, 8, 128256)
LLAMA3_405B = llama(126, 16384, 53248, 128, 8, 128256)
LLAMA3_405B_CUT = llama(8, 16384, 53248, 128, 8, 128256)  # D's proxy for 32 GPUs
GPT_7B = llama(32, 4096, 10923, 32, 8, 131200)  # 3 x 10923 = 2 x 16384
QWEN3_30B = ModelShape(
    *("qwen3_moe", 48, 2048, 6144, 32, 4, 128, 151936, 40960, 1e-6, 1e6),
    qk_norm=True,
    num_experts=128,
    experts_per_token=8,
    expert_ffn_hidden_size=768,
)


def parallel(tensor: int, pipeline: int, data: int, context: int = 1, virtual: int = 1) -> ParallelLayout:
    return ParallelLayout(tensor, pipeline, data, tensor > 1, context, 1, virtual)


@dataclass(frozen=True)
class Run:
    """sequence: tokens of one; batch: sequences of an update; seconds of an update."""

    source: str
    shape: ModelShape
    layout: ParallelLayout
    sequence: int
    batch: int
    precision: PrecisionName
    seconds: float
    gpu: str = "h100-80gb"

    def __str__(self) -> str:
        layout = self.layout
        parts = f"TP{layout.tensor} PP{layout.pipeline} VP{layout.virtual_pipeline} CP{layout.context} DP{layout.data}"
        return f"{self.source}: {self.shape.num_layers} x {self.shape.hidden_size} {self.precision} {parts} {self.gpu}"


def of_rate(sequence: int, batch: int, gpus: int, tokens_per_second_per_gpu: float) -> float:
    """Seconds of an update from a published rate."""
    return sequence * batch / gpus / tokens_per_second_per_gpu


TUNED_RUNS = [
    Run("D", LLAMA3_8B, parallel(1, 1, 4, 2), 8192, 128, "bf16", 12.27),
    Run("D", LLAMA3_8B, parallel(1, 1, 64, 2), 8192, 2048, "bf16", 12.33),
    Run("D", LLAMA3_8B, parallel(1, 1, 8), 4096, 32, "bf16", 1.32),
    Run("D", LLAMA3_70B, parallel(4, 4, 2, 2, 5), 8192, 128, "bf16", 14.66),
    Run("D", LLAMA3_70B, parallel(4, 4, 32, 2, 5), 8192, 2048, "bf16", 14.65),
    Run("D", LLAMA3_70B, parallel(4, 4, 2, 1, 5), 4096, 32, "bf16", 3.36),  # SFT: 1,219 tokens/s/GPU
    Run("D", LLAMA3_405B_CUT, parallel(8, 1, 2, 2), 8192, 64, "bf16", 5.4),
    Run("D", LLAMA3_8B, parallel(1, 1, 4, 2), 8192, 128, "fp8-tensorwise", 9.33),
    Run("D", LLAMA3_8B, parallel(1, 1, 8), 4096, 32, "fp8-tensorwise", 0.95),
    Run("D", LLAMA3_70B, parallel(4, 8, 2, 1, 5), 8192, 128, "fp8-tensorwise", 9.86),
    Run("D", LLAMA3_70B, parallel(4, 8, 64, 1, 5), 8192, 4096, "fp8-tensorwise", 10.15),
    Run("D", LLAMA3_70B, parallel(4, 4, 2, 1, 5), 4096, 32, "fp8-tensorwise", 2.26),
    Run("D", LLAMA3_405B_CUT, parallel(8, 1, 2, 2), 8192, 64, "fp8-tensorwise", 3.53),
    Run("N", LLAMA2_7B, parallel(1, 1, 8), 4096, 128, "fp8-tensorwise", of_rate(4096, 128, 8, 16934)),
    Run("N", LLAMA2_13B, parallel(1, 4, 4, 1, 10), 4096, 128, "fp8-tensorwise", of_rate(4096, 128, 16, 8715)),
    Run("N", LLAMA2_70B, parallel(4, 4, 4, 1, 20), 4096, 128, "fp8-tensorwise", of_rate(4096, 128, 64, 1728)),
    Run("N", LLAMA2_7B, parallel(1, 1, 8), 4096, 32, "fp8-tensorwise", of_rate(4096, 32, 8, 16891)),
    Run("N", LLAMA2_70B, parallel(4, 4, 1), 4096, 32, "fp8-tensorwise", of_rate(4096, 32, 16, 1816)),
    Run("N", LLAMA3_70B, parallel(4, 4, 2, 2, 5), 8192, 128, "fp8-tensorwise", of_rate(8192, 128, 64, 1524)),
    Run("B", LLAMA3_70B, parallel(4, 4, 2, 1, 5), 4096, 32, "fp8-tensorwise", of_rate(4096, 32, 32, 1638)),
    Run("B", LLAMA3_70B, parallel(4, 8, 2, 1, 5), 8192, 128, "fp8-tensorwise", of_rate(8192, 128, 64, 1602)),
    Run("B", LLAMA3_8B, parallel(1, 1, 8), 8192, 128, "fp8-tensorwise", of_rate(8192, 128, 8, 30624), "b200-180gb"),
]
PLAIN_RUNS = [
    Run("C", GPT_7B, ParallelLayout(tensor=4, data=2), 8192, 8, "bf16", 2.587, "a100-80gb"),
    Run("C", GPT_7B, ParallelLayout(pipeline=4, data=2, virtual_pipeline=8), 8192, 8, "bf16", 2.942, "a100-80gb"),
    Run("C", GPT_7B, ParallelLayout(tensor=4, data=2), 8192, 8, "bf16", 1.115, "h100-80gb"),
]


def tuned_settings(run: Run) -> TrainSettings:
    """What NVIDIA's recipes switch on: bf16 gradients, fused kernels, overlap of every collective; logits are kept."""
    return TrainSettings(
        pack_tokens=run.sequence,
        micro_batches=run.batch // run.layout.data,
        precision=run.precision,
        keys_per_token=run.sequence / 2,
        gradient_bytes=2,
        recompute_logits=False,
        overlap_tensor=True,
        overlap_context=True,
        overlap_pipeline=True,
        overlap_data=True,
    )


@pytest.mark.parametrize("run", TUNED_RUNS, ids=str)
def test_published_training_runs_are_met_within_20_percent(run: Run) -> None:
    step = step_time(run.shape, run.layout, tuned_settings(run), find_gpu(run.gpu))
    assert step.total == pytest.approx(run.seconds, rel=0.20)


# Not N's 70B on two servers, planned to take 101 GB: without data ranks state alone is 16 bytes a parameter, and its table does not say how
# it fitted.
@pytest.mark.parametrize("run", [run for run in TUNED_RUNS if run.layout != parallel(4, 4, 1)], ids=str)
def test_published_training_runs_are_planned_to_fit(run: Run) -> None:
    gpu = find_gpu(run.gpu)
    most = max(rank.total for rank in all_ranks(run.shape, run.layout, tuned_settings(run)))
    # The fullest are 8B in FP8 on eight: bf16 weights are planned beside their FP8 copies.
    assert most < 1.01 * usable_bytes(gpu)


@pytest.mark.parametrize("run", PLAIN_RUNS, ids=str)
def test_runs_without_overlap_and_fusion_are_met_within_20_percent(run: Run) -> None:
    # The CI runs of TP4 hold two sequences in a micro-batch.
    sequences = 2 if run.layout.tensor == 4 else 1
    settings = TrainSettings(
        pack_tokens=run.sequence * sequences,
        micro_batches=run.batch // run.layout.data // sequences,
        keys_per_token=run.sequence / 2,
        fused_gradients=False,
        recompute_logits=False,
        overlap_data=True,
    )
    assert step_time(run.shape, run.layout, settings, find_gpu(run.gpu)).total == pytest.approx(run.seconds, rel=0.20)


def test_supervised_tuning_of_70b_on_32_h100_makes_1219_tokens_a_second_and_gpu_within_20_percent() -> None:
    run = next(run for run in TUNED_RUNS if run.seconds == 3.36)
    step = step_time(run.shape, run.layout, tuned_settings(run), find_gpu(run.gpu))
    assert step.tokens_per_second(32) == pytest.approx(1219, rel=0.20)


def test_a_mixture_of_128_experts_is_met_within_25_percent() -> None:
    # B, 26.06: Qwen3-30B-A3B, 16 H100, EP16, FP8, batch 1024: 8,826 tokens/s/GPU.
    settings = TrainSettings(
        4096,
        64,
        precision="fp8-tensorwise",
        keys_per_token=2048,
        gradient_bytes=2,
        recompute_logits=False,
        overlap_data=True,
    )
    step = step_time(QWEN3_30B, ParallelLayout(data=16, expert=16), settings, find_gpu("h100"))
    assert step.tokens_per_second(16) == pytest.approx(8826, rel=0.25)


# Tokens per second of one engine, by (prompt, answer) length.
GENERATION = [
    pytest.param(
        *(LLAMA3_8B, "h100-80gb", 1),
        {(128, 128): 28312, (128, 2048): 22714, (500, 2000): 17660, (1000, 1000): 15220, (2048, 2048): 9305},
        id="8B on an H100",
    ),
    pytest.param(
        *(LLAMA3_8B, "h200-141gb", 1),
        {(128, 128): 27911, (128, 2048): 26221, (500, 2000): 20770, (1000, 1000): 17744, (2048, 2048): 12194},
        id="8B on an H200",
    ),
    pytest.param(
        *(LLAMA3_70B, "h100-80gb", 2),
        {(128, 128): 6378, (128, 2048): 6651, (500, 2000): 5222, (1000, 1000): 4205, (2048, 2048): 3082},
        id="70B on two H100",
    ),
    pytest.param(
        *(LLAMA3_70B, "h200-141gb", 1),
        {(128, 128): 3803, (128, 2048): 4336, (500, 2000): 3666, (1000, 1000): 2909, (2048, 2048): 2003},
        id="70B on an H200",
    ),
    pytest.param(
        *(LLAMA3_405B, "h100-80gb", 8),
        {(128, 128): 3627, (128, 2048): 4340, (500, 2000): 3994, (1000, 1000): 2919, (2048, 2048): 2296},
        id="405B on eight H100",
    ),
]


@pytest.mark.parametrize(("shape", "gpu", "tensor", "rates"), GENERATION)
def test_published_generation_is_met_within_20_percent(
    shape: ModelShape, gpu: str, tensor: int, rates: dict[tuple[int, int], float]
) -> None:
    """Source T."""
    for (prompt, answer), published in rates.items():
        made = generation(shape, find_gpu(gpu), prompt_tokens=prompt, new_tokens=answer, kind="compiled", tensor=tensor, element_bytes=1)
        assert made is not None
        assert made.tokens_per_second == pytest.approx(published, rel=0.20), (prompt, answer)
