"""What the benchmarks share: model shapes with random weights, pairs of UltraChat-like lengths, and how time and memory are read.

Random weights and token ids are enough: the work does not depend on their values.
"""

import math
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "micro": {  # to try a benchmark out
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
    },
    "llama-1b": {  # Llama 3.2 1B
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt, a human answer and a generated one."""

    prompt: int
    real: int
    generated: int


def ultrachat_like_lengths(count: int, seed: int) -> list[Lengths]:
    """Lognormal: prompt mean 123, median 70, at most 512; response mean 314, median 270; prompt and response at most 1024 together."""
    generator = random.Random(seed)

    def lognormal(mean: float, median: float) -> int:
        return max(1, round(generator.lognormvariate(math.log(median), math.sqrt(2 * math.log(mean / median)))))

    found = []
    for _ in range(count):
        prompt = min(lognormal(123, 70), 512)
        real, generated = (min(lognormal(314, 270), 1024 - prompt) for _ in range(2))
        found.append(Lengths(prompt, real, generated))
    return found


# One pair as (prompt, real, generated) token ids.
Pair = tuple[list[int], list[int], list[int]]
PLANNED_PAIRS = 2000


def pairs_of_a_plan(
    pack_tokens: int, *, num_pairs: int, vocab_size: int, multiples: Sequence[int] = (), shorten: int = 1
) -> list[list[Pair]]:
    """The first packs of a plan of many pairs, as a step of a real run has them; a plan of a few pairs alone is padded more than any run.

    Lengths are UltraChat-like, `shorten` times shorter; token ids are random and never 0, which pads. As many packs as hold at least
    num_pairs pairs, and a number of pairs that all of `multiples` divide.
    """
    from spin_megatron.data.packing import plan_packs

    lengths = [
        tuple(-(-part // shorten) for part in (one.prompt, one.real, one.generated))
        for one in ultrachat_like_lengths(PLANNED_PAIRS, seed=0)
    ]
    generator = random.Random(0)
    packs: list[list[Pair]] = []
    for pack in plan_packs([(str(n), sum(one)) for n, one in enumerate(lengths)], pack_tokens=pack_tokens, max_pairs_per_pack=None, seed=0):
        parts = (lengths[int(pair_id)] for pair_id in pack.pair_ids)
        drawn = [[[generator.randrange(1, vocab_size) for _ in range(part)] for part in pair] for pair in parts]
        packs.append([(prompt, real, generated) for prompt, real, generated in drawn])
        count = sum(map(len, packs))
        if count >= num_pairs and not any(count % multiple for multiple in multiples):
            break
    return packs


def model_folder(name: str, scratch: Path, device: str = "cpu") -> Path:
    """A local folder as it is; a name of SIZES as random weights in `scratch`, drawn on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if name not in SIZES:
        return Path(name)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[name], eos_token_id=0, bos_token_id=1))
    # bf16 beside a GPU, as such models are published: half the bytes to write and to read.
    (model if device == "cpu" else model.to(torch.bfloat16)).save_pretrained(scratch)
    if device != "cpu":  # what this process would go on holding is not there for those it starts
        del model
        torch.cuda.empty_cache()
    return scratch


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with how many of its cores this process may use."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def seconds_of(work: Callable[[], object], device: str) -> float:
    """CPU seconds of this process (the machine may be shared), or seconds between two events on the GPU."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3


def results_of(names: Sequence[str], measure: Callable[[str], Result], *, needed: Sequence[str]) -> dict[str, Result]:
    """What `measure` finds for each method. One that is not needed and fails (out of memory, say) is left out, and the reason printed."""
    found = {}
    for name in names:
        try:
            found[name] = measure(name)
        except Exception as error:
            if name in needed:
                raise
            print(f"{name} is left out, it does not run here: {type(error).__name__}: {error}", file=sys.stderr)
    return found


def extra_bytes_of(work: Callable[[], object], device: str) -> int:
    """Growth of the peak memory during the work: resident memory of this process on CPU (Linux), allocated memory on the GPU."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def peak_bytes(device: str) -> int:
    """Peak of this process so far: resident memory on CPU (Linux), memory that the allocator held on the GPU."""
    return torch.cuda.max_memory_reserved() if device != "cpu" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
