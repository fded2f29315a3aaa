"""A language model without weights, for the doubles of engines: standard library only, the same in the tests.

The next token is uniform over 3 candidates that follow from the text and from the model's folder; the first of them is often one of
the low ids, among which EOS ids are. So answers differ by prompt, by seed and by weights, and end by themselves.
"""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path


def weights_mark(folder: str | Path) -> str:
    """What tells one model from another."""
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def candidates(mark: str, text: Sequence[int], vocab_size: int) -> list[int]:
    """Three next tokens, the most probable first."""
    digest = hashlib.sha256(f"{mark} {list(text)}".encode()).digest()
    tokens = [int.from_bytes(digest[i : i + 4], "big") % vocab_size for i in (0, 4, 8)]
    if digest[12] % 4 == 0:
        tokens[0] = 2 + digest[13] % 10
    return tokens


def answer(
    mark: str, prompt: Sequence[int], *, vocab_size: int, eos_ids: Sequence[int], max_tokens: int, seed: int | None
) -> tuple[list[int], int | None]:
    """Token ids, EOS included, and the EOS id that ended them. seed None is greedy."""
    generator = None if seed is None else random.Random(seed)
    tokens: list[int] = []
    for _ in range(max_tokens):
        choices = candidates(mark, [*prompt, *tokens], vocab_size)
        tokens.append(choices[0] if generator is None else generator.choice(choices))
        if tokens[-1] in eos_ids:
            return tokens, tokens[-1]
    return tokens, None
