"""Compare both sides of a conversion by what they compute: logits through transformers and through Megatron Core."""

from dataclasses import dataclass
from pathlib import Path

import torch

from spin_megatron.convert.hf_io import HfFolder
from spin_megatron.plan.shape import ModelShape

NUM_TOKENS = 24
# Of the logits' standard deviation. Both compute in fp32 from equal weights: 2e-6 was measured on tiny models of every family.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class ProbeResult:
    """Largest difference of two logits, standard deviation of the logits (fp32), and tokens looked at."""

    largest_difference: float
    standard_deviation: float
    num_tokens: int


def probe(huggingface: Path, checkpoint: Path) -> ProbeResult:
    """Load both sides, one after the other, in fp32 on the CPU and compare their logits on NUM_TOKENS token ids.

    Needs memory for the model in fp32 (4 bytes a parameter). Megatron Core unpickles the checkpoint's index: the caller has to
    trust the folder, or know that a manifest vouches for it.

    Raises:
        ValueError: they differ by more than TOLERANCE standard deviations.
    """
    from transformers import AutoModelForCausalLM

    from spin_megatron.mcore.probe import megatron_logits

    shape = ModelShape.from_huggingface(huggingface)
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(shape.vocab_size, (NUM_TOKENS,), generator=generator)
    model = AutoModelForCausalLM.from_pretrained(huggingface, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        expected_TV = model(tokens_T[None]).logits[0].clone()  # clone: the rest of the output goes with the model
    del model
    stored = HfFolder(huggingface).dtype("model.embed_tokens.weight")
    found_TV = megatron_logits(checkpoint, shape, tokens_T, rounded_to=stored)
    difference, deviation = float((found_TV - expected_TV).abs().max()), float(expected_TV.std())
    if not difference <= TOLERANCE * deviation:
        raise ValueError(
            f"Logits of {huggingface} (transformers) and {checkpoint} (Megatron Core) differ by {difference:.3g}, their standard deviation "
            f"is {deviation:.3g}: the two sides do not compute the same model. Run --verify, and report this."
        )
    return ProbeResult(difference, deviation, NUM_TOKENS)
