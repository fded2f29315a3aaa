"""A language model without weights, for the doubles of engines: standard library only, the same in the tests.

The next token is uniform over 3 candidates that follow from the text and from the model's folder; every 7th text length or so
allows EOS. So answers differ by prompt, by seed and by weights, and end by themselves.
"""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path


def weights_mark(folder: str | Path) -> str:
    """What tells one model from another."""
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def candidates(mark: str, text: Sequence[int], vocab_size: int, eos_ids: Sequence[int]) -> list[int]:
    """Three next tokens, the most probable first. Ordinary tokens lie behind the EOS ids."""
    digest = hashlib.sha256(f"{mark} {list(text)}".encode()).digest()
    first = max(eos_ids) + 1
    tokens = [first + int.from_bytes(digest[i : i + 4], "big") % (vocab_size - first) for i in (0, 4, 8)]
    if digest[12] % 9 == 0:
        tokens[0] = eos_ids[digest[13] % len(eos_ids)]
    return tokens


def answer(
    mark: str, prompt: Sequence[int], *, vocab_size: int, eos_ids: Sequence[int], max_tokens: int, seed: int | None
) -> tuple[list[int], int | None]:
    """Token ids, EOS included, and the EOS id that ended them. seed None is greedy."""
    generator = None if seed is None else random.Random(seed)
    tokens: list[int] = []
    for _ in range(max_tokens):
        choices = candidates(mark, [*prompt, *tokens], vocab_size, eos_ids)
        tokens.append(choices[0] if generator is None else generator.choice(choices))
        if tokens[-1] in eos_ids:
            return tokens, tokens[-1]
    return tokens, None
