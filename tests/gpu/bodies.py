"""What the tests of this folder do, by device: tests/parity/test_gpu_bodies.py runs the same on the CPU, smaller and in fp32."""

import gc
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from spin_megatron.data.batches import PackBatch, make_batch
from spin_megatron.mcore.fused import choose_weight_gradients
from spin_megatron.mcore.layers import choose_layer_spec
from spin_megatron.mcore.lora import Lora, add_adapters
from spin_megatron.mcore.model import SpinModel, build_model, load_huggingface
from spin_megatron.mcore.optimizer import UpdateRule, build_trainer
from spin_megatron.mcore.optimizer_state import slots
from spin_megatron.mcore.precision import Fp8
from spin_megatron.mcore.runtime import DeviceKind, Runtime, running
from spin_megatron.mcore.steps import score_packs
from spin_megatron.mcore.training import Objective, train_step
from spin_megatron.objective.logprobs import sequence_sums
from spin_megatron.plan.adapters import AdapterShape
from spin_megatron.plan.memory import CONTEXT_BYTES, TrainSettings, rank_memory
from spin_megatron.plan.precision import PRECISIONS, PrecisionName
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.records import ReferenceScore, SpinPair
from spin_megatron.stages import train
from spin_megatron.stages.context import StageContext
from tests.parity.tiny_models import make_pairs
from tests.parity.train_run import make_config
from tests.parity.updates import make_bench, make_steps, numbers_of

PACK_TOKENS = 512  # whole blocks of every FP8 recipe
# Sizes that FP8 multiplies: multiples of 128.
ALIGNED = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def different_pairs(seed: int, num_pairs: int, vocab_size: int) -> list[SpinPair]:
    """Pairs with ids of their own, so that several packs can be trained together."""
    pairs = make_pairs(seed, num_pairs=num_pairs, longest=60, vocab_size=vocab_size)
    return [replace(pair, pair_id=f"{seed}_{pair.pair_id}") for pair in pairs]


@dataclass(frozen=True)
class Steps:
    """What a few updates were: loss, mean |margin|, whether gradients were finite and seconds, a step each; the reference sums."""

    losses: list[float]
    margins: list[float]
    are_applied: list[bool]
    seconds: list[float]
    references: dict[str, ReferenceScore] = field(repr=False)


def build(shape: ModelShape, runtime: Runtime, precision: PrecisionName, *, num_bf16_end_layers: int = 0) -> list[SpinModel]:
    """The policy in that precision."""
    dtype = getattr(torch, PRECISIONS[precision].dtype)
    return build_model(shape, runtime, dtype=dtype, fp8=Fp8.chosen(precision, num_bf16_end_layers))


def score(chunks: list[SpinModel], batches: list[PackBatch], runtime: Runtime) -> dict[str, ReferenceScore]:
    """Log-prob sums of the packs' pairs, forward-only."""
    found = {}
    for batch, logp_R in zip(batches, score_packs(chunks, batches, runtime), strict=True):
        sums = sequence_sums(logp_R, batch.lengths_Q).view(-1, 2).tolist()
        lengths = batch.lengths_Q.view(-1, 2).tolist()
        found |= {name: ReferenceScore(name, *both, *sizes) for name, both, sizes in zip(batch.pair_ids, sums, lengths, strict=True)}
    return found


def update(
    chunks: list[SpinModel], packs: list[list[SpinPair]], runtime: Runtime, *, num_steps: int, pack_tokens: int = PACK_TOKENS
) -> Steps:
    """Score the packs, then train on all of them a few times. Raises ValueError when the first margins are not exactly 0."""
    batches = [make_batch(pack, pack_tokens=pack_tokens, pad_id=0, share_prompt=True) for pack in packs]
    trainer = build_trainer(chunks, UpdateRule("rmsprop"))
    references = score(chunks, batches, runtime)
    outcomes, seconds = [], []
    for step in range(num_steps):
        started = time.perf_counter()
        outcome = train_step(
            trainer,
            batches,
            references,
            Objective("logistic", 0.1),
            runtime,
            num_pairs=sum(len(pack) for pack in packs),
            learning_rate=1e-4,
            must_start_at_zero=step == 0,
        )
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        outcomes.append(outcome)
        seconds.append(time.perf_counter() - started)
    return Steps(
        [outcome.metrics["loss"] for outcome in outcomes],
        [outcome.metrics["margin_abs"] for outcome in outcomes],
        [outcome.is_applied for outcome in outcomes],
        seconds,
        references,
    )


def train_from_zero(folder: Path, device: DeviceKind, precision: PrecisionName, *, num_bf16_end_layers: int = 0) -> Steps:
    """The reference pass and three steps over two packs of a small model."""
    shape = ModelShape.from_huggingface(folder)
    packs = [different_pairs(seed, 8, shape.vocab_size) for seed in range(2)]
    with running(ParallelLayout(), device=device, seed=1) as runtime:
        chunks = build(shape, runtime, precision, num_bf16_end_layers=num_bf16_end_layers)
        load_huggingface(chunks, folder, shape, runtime, show=False)
        with torch.no_grad():  # the tiny models are drawn for narrow ones; a power of two rounds nothing
            for parameter in chunks[0].parameters():
                if parameter.dim() > 1:
                    parameter.mul_(0.25)
        return update(chunks, packs, runtime, num_steps=3)


@dataclass(frozen=True)
class Updates:
    """Loss and gradient norm of each step, and the main weights and how many of their elements lie in the host's memory."""

    numbers: list[tuple[float, float]]
    mains: list[torch.Tensor]
    num_in_host: int

    @property
    def num_elements(self) -> int:
        return sum(main.numel() for main in self.mains)

    @property
    def largest(self) -> int:
        return max(main.numel() for main in self.mains)


def updates_of(folder: Path, device: DeviceKind, rule: UpdateRule, is_in_host: Callable[[torch.Tensor], bool]) -> Updates:
    """Three bf16 updates of a tiny model; every parameter's state must lie where its main weights do."""
    with running(ParallelLayout(), device=device, seed=1) as runtime:
        bench = make_bench(folder, rule, runtime, dtype=torch.bfloat16)
        numbers = numbers_of(make_steps(bench, range(3)))
        held = list(slots(bench.trainer.optimizer))
    for slot in held:
        state = [slot.inner.state[slot.main][name] for name in rule.state_names]
        assert [is_in_host(tensor) for tensor in state] == [is_in_host(slot.main)] * len(state)
    mains = [slot.main for slot in held]
    in_host = sum(main.numel() for main in mains if is_in_host(main))
    return Updates(numbers, mains, in_host)


def rms_nats(found: dict[str, ReferenceScore], expected: dict[str, ReferenceScore]) -> float:
    """Root mean square difference of a token's log-prob, from the sums: if tokens err independently, squares of sums add up."""
    squares, num_tokens = 0.0, 0
    for name, score_ in expected.items():
        squares += (found[name].logp_real - score_.logp_real) ** 2 + (found[name].logp_generated - score_.logp_generated) ** 2
        num_tokens += score_.num_real + score_.num_generated
    return math.sqrt(squares / num_tokens)


@dataclass(frozen=True)
class Peak:
    """Bytes that a block of code had at most, beyond those before it."""

    before: int
    device: DeviceKind

    @property
    def num_bytes(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        return _resident("VmHWM") - self.before


@contextmanager
def peak_memory(device: DeviceKind) -> Iterator[Peak]:
    """Measure the allocator's peak on CUDA, the process's resident memory on the CPU (Linux)."""
    gc.collect()  # a model in training is a cycle: one of an earlier test would be freed in the middle of the measure
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield Peak(torch.cuda.memory_allocated(), device)
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    yield Peak(_resident("VmRSS"), device)


def _resident(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))[1]) * 1024  # type: ignore[index]


def wide_shape(*, ffn: int, vocab_size: int) -> ModelShape:
    """Two layers of Llama-3-70B's width, heads and grouped keys; its FFN is 28672 wide."""
    return ModelShape(
        family="llama",
        num_layers=2,
        hidden_size=8192,
        ffn_hidden_size=ffn,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=vocab_size,
        max_positions=8192,
        norm_epsilon=1e-5,
        rope_theta=500000.0,
    )


@dataclass(frozen=True)
class SliceWork:
    """Updates of a slice of a large model in one process, and what the planner says of their memory."""

    shape: ModelShape
    precision: PrecisionName
    num_packs: int
    pairs_per_pack: int
    pack_tokens: int
    num_steps: int
    adapters: AdapterShape | None = None

    @property
    def packs(self) -> list[list[SpinPair]]:
        return [different_pairs(seed, self.pairs_per_pack, self.shape.vocab_size) for seed in range(self.num_packs)]

    def settings(self, device: DeviceKind) -> TrainSettings:
        gradients = choose_weight_gradients(choose_layer_spec(torch.device(device)), torch.device(device))
        return TrainSettings(
            self.pack_tokens,
            self.num_packs,
            precision=self.precision,
            optimizer="rmsprop",
            distributed_optimizer=False,
            head_rows=sum(len(pair.real_ids) + len(pair.generated_ids) for pair in self.packs[0]) / self.pack_tokens,
            shared_prefix=2 * sum(len(pair.prompt_ids) for pair in self.packs[0]) / self.pack_tokens,
            branches=3 * self.pairs_per_pack,
            fused_gradients=gradients.maker != "torch",
            adapters=self.adapters,
        )

    def planned_bytes(self, device: DeviceKind) -> int:
        """Without the CUDA context: it is outside torch's allocator, and the CPU has none."""
        return rank_memory(self.shape, ParallelLayout(), self.settings(device), 0).total - CONTEXT_BYTES


@dataclass(frozen=True)
class Slice:
    """Updates of a slice, the peak bytes they took, and the names of the parameters that they changed and of all others."""

    steps: Steps
    measured_bytes: int
    changed: set[str]
    unchanged: set[str]


def steps_of_a_slice(work: SliceWork, device: DeviceKind) -> Slice:
    """Real updates of a slice of a large model, from drawn weights: of all of them, or of adapters beside them."""
    with running(ParallelLayout(), device=device, seed=1) as runtime, peak_memory(device) as peak:
        chunks = build(work.shape, runtime, work.precision)
        generator = torch.Generator(device=runtime.device).manual_seed(0)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.uniform_(-0.02, 0.02, generator=generator)
        if work.adapters is not None:
            add_adapters(chunks, Lora(work.adapters, 1.0, 0, 0), runtime)
        before = _sums(chunks[0])
        steps = update(chunks, work.packs, runtime, num_steps=work.num_steps, pack_tokens=work.pack_tokens)
        after = _sums(chunks[0])
        measured = peak.num_bytes
    changed = {name for name, total in after.items() if total != before[name]}
    return Slice(steps, measured, changed, before.keys() - changed)


def _sums(chunk: SpinModel) -> dict[str, float]:
    """The sum of each parameter's elements, fp32."""
    return {name: float(parameter.detach().sum(dtype=torch.float32)) for name, parameter in chunk.named_parameters()}


def run_train(layout: RunLayout, precision: PrecisionName) -> None:
    """The train stage of a run made by tests.parity.train_run, on the GPU where there is one."""
    config = make_config(layout.root, train={"precision": precision, "pack_tokens": PACK_TOKENS, "save_every_steps": 2})
    train.run(StageContext(config, layout, 0, show=False, stop_requested=lambda: False))


def die_in_the_fourth_step(root: str, precision: PrecisionName) -> None:
    """Be a process that is killed, hard, after three updates and one checkpoint."""
    make_step, made = train._make_step, []

    def dying(*args: Any) -> Any:
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(None)
        return make_step(*args)

    train._make_step = dying  # type: ignore[assignment]
    run_train(RunLayout(Path(root)), precision)


def kill_and_resume(layout: RunLayout, precision: PrecisionName) -> None:
    """Train in a process that dies in its fourth step, then here to the end."""
    command = "import sys; from tests.gpu.bodies import die_in_the_fourth_step as die; die(*sys.argv[1:])"
    died = subprocess.run([sys.executable, "-c", command, str(layout.root), precision], timeout=240, check=False)
    assert died.returncode == -signal.SIGKILL
    run_train(layout, precision)
