"""export: theta_t as a Hugging Face folder, the hand-over between iterations.

theta_0 is the base model: a folder of links to it, once its config, tensor names and shapes are found to be ones we
compute; or, of a converted torch_dist checkpoint, its weights as a Hugging Face folder. theta_t of t > 0 is written from the
final weights of train t-1, reloaded with transformers and compared with the log-probabilities that train recorded. With
[lora] these are theta_{t-1} and adapters: they are merged, so that theta_t is a model like any other and the next base, and kept
beside it.
"""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spin_megatron.config import RunConfig
from spin_megatron.convert.adapters import write_peft
from spin_megatron.convert.hf_io import CARRIED_FILES, HfFolder, check_tensors, model_card, model_files
from spin_megatron.convert.safetensors_writer import INDEX_NAME
from spin_megatron.convert.torch_dist import torch_dist_to_hf
from spin_megatron.plan.precision import PrecisionName
from spin_megatron.plan.run_plan import check_config_fits, check_model
from spin_megatron.plan.shape import ModelShape, model_folder
from spin_megatron.run.manifest import installed_versions, is_disk_full, write_text
from spin_megatron.run.records import ReferenceScore, SpinPair, read_rows
from spin_megatron.stages.context import StageContext, StageOutput

logger = logging.getLogger(__name__)

# Nats a response token between Megatron Core and transformers; measured 1e-6 in fp32. In bf16 the two round differently.
PROBE_TOLERANCE_NATS: dict[PrecisionName, float] = {"fp32": 1e-3, "bf16": 0.25}
# The export is bf16 and train scored in FP8: emulated E4M3 moved a token by about 0.1 nats rms.
FP8_PROBE_TOLERANCE_NATS = 0.5


def run(context: StageContext) -> StageOutput:
    """Make theta_{context.iteration}."""
    folder = context.layout.theta(context.iteration)
    summary = _take_base_model(context, folder) if context.iteration == 0 else _write_trained_model(context, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return StageOutput(files=dict.fromkeys(files), summary=summary)


def _take_base_model(context: StageContext, folder: Path) -> dict[str, Any]:
    source = base_folder(context.config.model.path, context.config.model.revision)
    shape = check_folder(source)
    check_model(context.config, shape)
    if context.config.slurm.gpu is not None:  # of a hub's model nothing was known before
        check_config_fits(context.config, context.config.slurm.gpu, model_config=model_folder(source) / "config.json")
    if model_folder(source) != source:
        torch_dist_to_hf(source, None, folder, show=context.show)
        return {"source": str(source), "family": shape.family}
    for path in model_files(source):
        link = folder / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return {"source": str(source), "family": shape.family}


def check_folder(folder: Path) -> ModelShape:
    """The shape of a model folder whose tensors are all there, of the right sizes, in whole files. Reads headers only.

    Of a converted checkpoint only the shape is read: what it holds is checked as it is converted.

    Raises:
        ValueError: they are not, or the model is not one we compute.
    """
    shape = ModelShape.from_huggingface(folder)
    if model_folder(folder) == folder:
        check_tensors(HfFolder(folder), shape)
    return shape


def base_folder(address: str, revision: str | None) -> Path:
    """The local folder of the base model; a hub name is downloaded at its pinned revision: safetensors, and no second copy of them.

    Raises:
        ValueError: the hub has no such model or revision, or cannot be reached.
    """
    if Path(address).is_dir():
        return Path(address)
    from huggingface_hub import snapshot_download

    wanted, unwanted = ["config.json", INDEX_NAME, "*.safetensors", *CARRIED_FILES], ["consolidated*", "*/*.safetensors"]
    try:
        return Path(snapshot_download(address, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except (OSError, ValueError) as error:  # no such name or commit, no access, no network
        if is_disk_full(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"the hub's model {address!r} cannot be fetched at model.revision={revision}: {reason}. Check both, your access to it, and the "
            "network; without one, give model.path the folder of a local copy."
        ) from error


def _write_trained_model(context: StageContext, folder: Path) -> dict[str, Any]:
    t = context.iteration - 1
    source = context.layout.theta(t)
    dtype = context.config.train.dtype
    final, lora = context.layout.final_weights(t), context.config.lora
    torch_dist_to_hf(final, source, folder, dtype=dtype, lora_alpha=lora.alpha if lora.rank else None, show=context.show)
    if lora.rank:
        write_peft(final, source, context.layout.adapter(context.iteration), alpha=lora.alpha)
    write_text(folder / "README.md", model_card(training_facts(context.config, context.iteration)))
    largest = _largest_probe_difference(context, folder)
    tolerance = PROBE_TOLERANCE_NATS.get(context.config.train.precision, FP8_PROBE_TOLERANCE_NATS)
    if not largest <= tolerance:
        raise ValueError(
            f"theta_{context.iteration} reloaded from {folder} differs from the trained model by {largest:.3g} nats a token on the "
            f"probe pairs, more than {tolerance}: the export is not the model that was trained. Keep the run "
            "directory and report this."
        )
    logger.info("theta_%d reloads with transformers; largest difference to the trained model %.2g nats a token", context.iteration, largest)
    return {"dtype": dtype, "probe_nats_per_token": largest}


def training_facts(config: RunConfig, num_iterations: int) -> dict[str, Any]:
    """What the model card of theta_{num_iterations} states; settings that changed stand iteration by iteration."""
    past = [config.at(iteration) for iteration in range(num_iterations)]
    data, objective, optimizer, train, generate = config.data, config.objective, config.optimizer, config.train, config.generate
    loss = [objective.loss, f"beta {_each(f'{at.beta:g}' for at in past)}"]
    loss += [f"NLL weight {objective.nll_weight:g}"] if objective.nll_weight else []
    loss += ["length-normalised"] if objective.length_normalised else []
    clipping = "no clipping" if optimizer.max_grad_norm is None else f"clipped at norm {optimizer.max_grad_norm:g}"
    rates = _each(f"{at.learning_rate:g}" for at in past)
    return {
        "method": "Self-Play Fine-Tuning (SPIN, arXiv 2401.01335)",
        "base model": _pinned(config.model.path, config.model.revision),
        "data": _pinned(data.source, data.revision),
        "prompts": f"{data.num_examples or 'all'}, of up to {data.max_prompt_tokens} tokens; answers up to {data.max_response_tokens}",
        "iterations done": num_iterations,
        "pairs of": f"the newest {_each(str(at.window) for at in past)} iterations",
        "loss": ", ".join(loss),
        "optimizer": f"{optimizer.name}, weight decay {optimizer.weight_decay:g}, {clipping}",
        "learning rate": f"peak {rates}, {optimizer.schedule}, warm-up {optimizer.warmup_fraction:g}",
        "epochs": _each(f"{at.stop_epoch} of a {at.schedule_epochs}-epoch schedule" for at in past),
        "pairs an update": train.global_batch_pairs,
        "precision": train.precision,
        "opponent's answers": f"{generate.engine}, {generate.dtype}, temperature {generate.temperature:g}, top-p {generate.top_p:g}",
        "trained": f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g}, merged" if config.lora.rank else "all weights",
        "seed": config.run.seed,
        "software": ", ".join(f"{name} {version}" for name, version in installed_versions().items()),
    }


def _pinned(address: str, revision: str | None) -> str:
    return f"{address} @ {revision}" if revision else address


def _each(values: Iterable[str]) -> str:
    """One value where all iterations had the same, else all of them in order."""
    found = list(values)
    return found[0] if len(set(found)) == 1 else ", then ".join(found)


def _largest_probe_difference(context: StageContext, folder: Path) -> float:
    """Largest |log-prob difference| per response token between train's record and the folder reloaded by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from spin_megatron.generation.hf_loop import no_weight_bar

    t = context.iteration - 1
    pairs = {pair.pair_id: pair for pair in read_rows(context.layout.held_out_pairs(t), SpinPair)}
    with no_weight_bar():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, context.config.train.dtype), local_files_only=True)
    largest = 0.0
    for score in read_rows(context.layout.probe(t), ReferenceScore):
        pair = pairs[score.pair_id]
        for trained, response in ((score.logp_real, pair.real_ids), (score.logp_generated, pair.generated_ids)):
            reloaded = _log_probability(model, pair.prompt_ids, response)
            largest = max(largest, abs(reloaded - trained) / max(1, len(response)))
            if math.isnan(reloaded):
                return math.nan
    return largest


def _log_probability(model: Any, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> float:
    """Sum log p(response | prompt) in nats under a transformers model, fp32 sum."""
    import torch

    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt_ids + response_ids])).logits[0].float()  # fp32: bf16 logits cost 0.2 nats a sequence
    logp_TV = torch.log_softmax(logits_TV[len(prompt_ids) - 1 : -1], dim=-1)
    return float(logp_TV.gather(1, torch.tensor(response_ids)[:, None]).sum())
