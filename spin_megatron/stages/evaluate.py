"""evaluate: theta_{t+1} against its opponent theta_t on the held-out pairs, and warnings where the numbers look too good.

Loss, margin and accuracy say how well theta_{t+1} tells human answers from theta_t's. They can look excellent while the
model collapses: pushing both log-probabilities down, the generated one faster, raises the margin. So the NLL of the human
answers and the drift of both absolute log-probabilities stand beside them, with thresholds that warn.

ln 2 - (logistic loss) is a lower bound of the Jensen-Shannon divergence between the pair (y, y') and the swapped pair (paper,
Lemma C.2: the best possible discriminator's loss is ln 2 - JSD; any other's is higher, whatever scale beta gives its
margins). Near 0 this model cannot tell theta_t from the data, near ln 2 the answers are trivially separable. It is computed
from the logistic loss at this iteration's beta, whichever loss was trained.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from spin_megatron.config_sections import EvaluateSection
from spin_megatron.mcore.model import build_model, load_huggingface
from spin_megatron.mcore.precision import Fp8
from spin_megatron.mcore.reference import PackedPairs, score_pairs
from spin_megatron.mcore.runtime import default_device, running
from spin_megatron.objective.spin_loss import LossName, mean_metrics, metrics_vector, spin_loss
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.manifest import write_json
from spin_megatron.run.records import ReferenceScore, read_rows
from spin_megatron.run.telemetry import EventWriter, progress_bar
from spin_megatron.stages.context import StageContext, StageOutput

logger = logging.getLogger(__name__)


def run(context: StageContext) -> StageOutput:
    """Evaluate theta_{context.iteration + 1}; every rank calls it."""
    layout, t, config = context.layout, context.iteration, context.config
    scores = _score_held_out(context)
    if scores is None:
        return StageOutput(files={})
    references = read_rows(layout.held_out_reference_scores(t), ReferenceScore)
    objective, beta = config.objective, context.scalars.beta
    metrics = compare(scores, references, loss=objective.loss, beta=beta, length_normalised=objective.length_normalised)
    traits = json.loads(layout.pairs_report(t).read_text(encoding="utf-8"))["train"]
    warnings = judge_evaluation(metrics, config.evaluate, traits)
    for warning in warnings:
        logger.warning("theta_%d: %s", t + 1, warning)
    result: dict[str, Any] = {"theta": t + 1, "objective": objective.loss, "beta": beta, **metrics, "warnings": warnings}
    write_json(layout.evaluation(t), result)
    with closing(EventWriter(layout.held_out_events, first_step=t)) as events:
        events.write(t, metrics)
    return StageOutput(files={layout.evaluation(t): None}, summary=result)


def _score_held_out(context: StageContext) -> list[ReferenceScore] | None:
    """Log-prob sums of the held-out pairs under theta_{t+1}, as its exported folder holds it; on rank 0, None on the others."""
    layout, t, settings = context.layout, context.iteration, context.config.train
    folder = layout.theta(t + 1)
    held_out = PackedPairs.read(
        layout.held_out_pairs(t), layout.held_out_packs(t), pack_tokens=settings.pack_tokens, share_prompt=settings.share_prompt
    )
    if not held_out.packs:
        raise ValueError(f"{layout.held_out_pairs(t)} holds no pair to evaluate on; see {layout.pairs_report(t)} for what was dropped.")
    shape = ModelShape.from_huggingface(folder)
    with running(context.config.parallel.layout(), device=default_device(), seed=context.config.run.seed) as runtime:
        fp8 = Fp8.chosen(settings.precision, settings.num_bf16_end_layers)
        chunks = build_model(shape, runtime, dtype=getattr(torch, settings.dtype), fp8=fp8)
        load_huggingface(chunks, folder, shape, runtime, show=context.show)
        own_share = -(-len(held_out.packs) // runtime.layout.data)
        with progress_bar("evaluate (held-out packs)", own_share, show=context.show) as advance:
            return score_pairs(chunks, held_out, [held_out.packs], runtime, advance=advance)


def compare(
    scores: Sequence[ReferenceScore], references: Sequence[ReferenceScore], *, loss: LossName, beta: float, length_normalised: bool = False
) -> dict[str, float]:
    """Means over the pairs. Log-probs in nats an answer, nll_* in nats a token, rewards are beta times log-ratios.

    Args:
        scores: under theta_{t+1}; references: of the same pairs under theta_t, in any order.
    """
    by_id = {score.pair_id: score for score in references}
    reference = [by_id[score.pair_id] for score in scores]
    logp_P2, reference_P2 = _sums(scores), _sums(reference)
    lengths_P2 = torch.tensor([(score.num_real, score.num_generated) for score in scores])

    def means(name: LossName) -> dict[str, float]:
        output = spin_loss(
            logp_P2, reference_P2, loss=name, beta=beta, divisor=len(scores), lengths_P2=lengths_P2, length_normalised=length_normalised
        )
        return mean_metrics(metrics_vector(output.metrics))

    metrics = means(loss)
    num_real_tokens = sum(score.num_real for score in scores)
    drift = {name: metrics[name] - float(reference_P2[:, column].mean()) for column, name in enumerate(("logp_real", "logp_generated"))}
    return {
        "num_pairs": metrics["num_pairs"],
        "loss": metrics["spin_loss"],
        "ln2_minus_loss": math.log(2) - means("logistic")["spin_loss"],
        "margin": metrics["margin"],
        "accuracy": metrics["accuracy"],
        "reward_real": metrics["reward_real"],
        "reward_generated": metrics["reward_generated"],
        "nll_real": -float(logp_P2[:, 0].sum()) / num_real_tokens,
        "nll_real_reference": -float(reference_P2[:, 0].sum()) / num_real_tokens,
        "logp_real": metrics["logp_real"],
        "logp_real_drift": drift["logp_real"],
        "logp_generated": metrics["logp_generated"],
        "logp_generated_drift": drift["logp_generated"],
    }


def _sums(scores: Sequence[ReferenceScore]) -> torch.Tensor:
    """[P, 2] fp64: real, generated; means over thousands of pairs keep their digits."""
    return torch.tensor([(score.logp_real, score.logp_generated) for score in scores], dtype=torch.float64)


def judge_evaluation(metrics: dict[str, float], thresholds: EvaluateSection, traits: Mapping[str, float]) -> list[str]:
    """What a person should look at before going on; empty when nothing is out of bounds.

    Args:
        traits: data.leaks.LeakReport's accuracies: how well length, EOS or the first token alone told the answers apart before training.
    """
    warnings = []
    increase = metrics["nll_real"] - metrics["nll_real_reference"]
    if not increase <= thresholds.max_nll_increase:
        warnings.append(
            f"the NLL of the human answers rose by {increase:.3f} nats a token (evaluate.max_nll_increase={thresholds.max_nll_increase}): "
            "the model is losing the data it should imitate, whatever loss and accuracy say; lower the learning rate or the epochs, or "
            "set objective.nll_weight."
        )
    if not -metrics["logp_real_drift"] <= thresholds.max_logp_drop:
        warnings.append(
            f"log p(y) of the human answers fell by {-metrics['logp_real_drift']:.1f} nats an answer "
            f"(evaluate.max_logp_drop={thresholds.max_logp_drop}), that of the generated ones changed by "
            f"{metrics['logp_generated_drift']:+.1f}: the margin grows by pushing both down; raise objective.beta or train less."
        )
    if metrics["accuracy"] > thresholds.max_accuracy:
        warnings.append(
            f"the held-out accuracy is {metrics['accuracy']:.3f} (evaluate.max_accuracy={thresholds.max_accuracy}): the pairs are "
            f"trivially separable, and further updates teach little. Before training, length alone told {traits['length_accuracy']:.0%} "
            f"of the answers apart, EOS {traits['eos_accuracy']:.0%}, the first token {traits['first_token_accuracy']:.0%} (a coin: 50%). "
            "Where one is far above, cure it (see the report of the merge stage); else it is what the answers say."
        )
    return warnings
