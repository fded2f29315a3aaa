#!/usr/bin/env python3
"""Where the CPU time of a training step goes, by torch.profiler: before (plain Megatron Core) and after (this project), same pairs.

    python -m tools.benchmarks.profile_step [--model smollm2-135m] [--pairs 2 --pack-tokens 2048 --threads 1]

Before: Megatron Core's GPTModel of local layers; each pair's two sequences padded to the longer one in a micro-batch of their own, local
attention under a causal mask, logits of every token, Megatron Core's cross-entropy. After: `train_step` over packs that share prompts.
Both make the same update with the same wrapper and optimizer; the losses are compared. One step of each is run before the profiled one.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from spin_megatron.data.batches import make_batch
from spin_megatron.mcore.model import SpinModel, build_model, load_huggingface, transformer_config
from spin_megatron.mcore.optimizer import Trainer, UpdateRule, apply_gradients, build_trainer, clear_gradients
from spin_megatron.mcore.rotary import rotary_angles
from spin_megatron.mcore.runtime import Runtime, running
from spin_megatron.mcore.training import Objective, train_step
from spin_megatron.objective.logprobs import VOCAB_CHUNK
from spin_megatron.objective.spin_loss import spin_loss
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.run.records import ReferenceScore, SpinPair
from tools.benchmarks.problem import device_name, model_folder, pairs_of_a_plan

BETA, LEARNING_RATE = 0.1, 1e-5
RULE = UpdateRule("adamw", max_grad_norm=1.0)
PARTS = ("matrix products of the layers", "attention", "head", "optimizer", "norms, activations, rotary, residuals")


class PlainModel(SpinModel):
    """Megatron Core's own layers and loss, over padded sequences."""

    def forward(self, tokens_BS: Tensor) -> Tensor:  # type: ignore[override]
        """Log-probability of each next token: [B, S - 1]."""
        length = tokens_BS.shape[1]
        positions_BS = torch.arange(length).expand_as(tokens_BS)
        hidden_SBH = self.decoder(
            hidden_states=self.embedding(input_ids=tokens_BS, position_ids=positions_BS),
            attention_mask=torch.ones(length, length, dtype=torch.bool).triu(1)[None, None],
            rotary_pos_emb=rotary_angles(positions_BS[0], self.rotary_pos_emb.inv_freq),
        )
        weight_VH = self.shared_embedding_or_output_weight() if self.shape.tied_embeddings else None
        # SpinModel put its own head in the place of the layer's forward; this is the layer's.
        logits_SBV, _ = type(self.output_layer).forward(self.output_layer, hidden_SBH, weight=weight_VH)
        loss_SB: Tensor = vocab_parallel_cross_entropy(logits_SBV[:-1], tokens_BS.t()[1:].contiguous())
        return -loss_SB.t()


def plain_model(shape: ModelShape, runtime: Runtime) -> list[SpinModel]:
    """One chunk of local layers, as Megatron Core's specs build them."""
    config = transformer_config(shape, runtime, dtype=torch.float32, recompute="none", spec="local")
    config.use_te_activation_func = False
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    submodules = TransformerBlockSubmodules(layer_specs=[layer] * shape.num_layers, layer_norm=WrappedTorchNorm)
    model = PlainModel(config, shape, submodules, pre_process=True, post_process=True, pg_collection=runtime.groups.megatron)
    del model.embedding.word_embeddings.forward  # SpinModel's, which leaves the gradient of a weight that it shares to this project's head
    return [model]


def plain_sums(model: Any, pair: SpinPair) -> Tensor:
    """[1, 2] log-prob sums of a pair's answers, both sequences padded to the longer one."""
    sequences = [(*pair.prompt_ids, *answer) for answer in (pair.real_ids, pair.generated_ids)]
    longest = max(map(len, sequences))
    logp_BS = model(torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences]))
    place_S = torch.arange(1, longest)[None, :]
    ends_B1 = torch.tensor([[len(sequence)] for sequence in sequences])
    is_answer_BS = (place_S >= len(pair.prompt_ids)) & (place_S < ends_B1)
    return torch.where(is_answer_BS, logp_BS, 0.0).sum(dim=1)[None]


def plain_step(trainer: Trainer, pairs: list[SpinPair], reference_P2: Tensor) -> float:
    """One update, a micro-batch a pair; the loss."""
    losses: list[Tensor] = []

    def step(numbers: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        number = next(numbers)
        sums_12 = plain_sums(model, pairs[number])
        output = spin_loss(sums_12, reference_P2[number : number + 1], loss="logistic", beta=BETA, divisor=1)
        losses.append(output.metrics["loss"])
        return sums_12, lambda _: (output.loss, losses[-1])

    clear_gradients(trainer)
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(range(len(pairs)))],
        model=trainer.chunks,
        num_microbatches=len(pairs),
        seq_length=1,
        micro_batch_size=2,
        forward_only=False,
    )
    apply_gradients(trainer, learning_rate=LEARNING_RATE)
    return float(torch.stack(losses).mean())


def profiled(step: Callable[[], float]) -> tuple[float, dict[str, float]]:
    """The second step's loss, and its CPU seconds by part."""
    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        loss = step()
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in found.events():
        seconds[part_of(event)] += event.self_cpu_time_total / 1e6
    return loss, seconds


def part_of(event: Any) -> str:
    """Which part an operator belongs to, by what called it, by its name, and by whether it sees the vocabulary."""
    ancestry, at = [], event
    while at is not None:
        ancestry.append(at.name)
        at = at.cpu_parent
    called_by = " ".join(ancestry)
    if "Optimizer.step" in called_by:
        return "optimizer"
    if "VocabParallel" in called_by and "Embedding" not in called_by:
        return "head"
    if any(name in called_by for name in ("_CpuFlash", "mm2d_attention", "softmax", "Softmax", "bmm", "Bmm", "MaskedFill", "masked_fill")):
        return "attention"
    if any(isinstance(size, int) and size in VOCABULARY for shape in event.input_shapes or () for size in shape or ()):
        return "head"
    if any(name in event.name for name in ("aten::mm", "aten::addmm", "aten::matmul", "aten::linear")):
        return "matrix products of the layers"
    return PARTS[-1]


VOCABULARY: set[int] = set()


def table(report: dict[str, Any]) -> str:
    """Both profiles as Markdown."""
    before, after = report["before"], report["after"]
    lines = ["| part | before, s | after, s |", "|---|---|---|"]
    lines += [f"| {part} | {before['seconds'][part]:.2f} | {after['seconds'][part]:.2f} |" for part in PARTS]
    total = [sum(side["seconds"].values()) for side in (before, after)]
    return "\n".join([*lines, f"| **all** | **{total[0]:.2f}** | **{total[1]:.2f}** |"])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both profiles and losses."""
    shape = ModelShape.from_huggingface(folder)
    VOCABULARY.update({shape.vocab_size, VOCAB_CHUNK})
    packs = pairs_of_a_plan(options.pack_tokens, num_pairs=options.pairs, vocab_size=shape.vocab_size)
    numbered = [
        [SpinPair(f"{n}/{m}", tuple(x), tuple(real), tuple(generated), made_in_iteration=0) for m, (x, real, generated) in enumerate(pack)]
        for n, pack in enumerate(packs)
    ]
    pairs = [pair for pack in numbered for pair in pack]
    # What the reference is does not change the work; far from the policy, so that the gradient is not small.
    references = {pair.pair_id: ReferenceScore(pair.pair_id, 0.0, 0.0, len(pair.real_ids), len(pair.generated_ids)) for pair in pairs}
    with running(ParallelLayout(), device="cpu", seed=0) as runtime:
        sides = {
            "before": lambda: _plain(shape, folder, runtime, pairs),
            "after": lambda: _packed(shape, folder, runtime, numbered, references, options.pack_tokens),
        }
        result = {}
        for name, build in sides.items():
            loss, seconds = profiled(build())
            result[name] = {"loss": loss, "seconds": seconds}
    return result


def _plain(shape: ModelShape, folder: Path, runtime: Runtime, pairs: list[SpinPair]) -> Callable[[], float]:
    chunks = plain_model(shape, runtime)
    load_huggingface(chunks, folder, shape, runtime, show=False)
    trainer = build_trainer(chunks, RULE)
    return lambda: plain_step(trainer, pairs, torch.zeros(len(pairs), 2))


def _packed(
    shape: ModelShape, folder: Path, runtime: Runtime, packs: list[list[SpinPair]], references: dict[str, ReferenceScore], pack_tokens: int
) -> Callable[[], float]:
    chunks = build_model(shape, runtime, dtype=torch.float32)
    load_huggingface(chunks, folder, shape, runtime, show=False)
    trainer = build_trainer(chunks, RULE)
    batches = [make_batch(pack, pack_tokens=pack_tokens, pad_id=0, share_prompt=True) for pack in packs]

    def step() -> float:
        objective = Objective("logistic", BETA)
        outcome = train_step(trainer, batches, references, objective, runtime, num_pairs=sum(map(len, packs)), learning_rate=LEARNING_RATE)
        return outcome.metrics["loss"]

    return step


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name of tools.benchmarks.problem.SIZES (random weights) or a folder")
    for name, default in (("pairs", 2), ("pack-tokens", 2048), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("profile_step.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, model_folder(options.model, Path(scratch)))
    problem = {name: value for name, value in vars(options).items() if name != "out"}
    report = {"problem": problem, "torch": torch.__version__, "device_name": device_name("cpu"), **found}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report))
    print(f"losses: {found['before']['loss']:.7f} and {found['after']['loss']:.7f}")


if __name__ == "__main__":
    main()
