"""Seeds that belong to rows: every random choice follows from (run seed, purpose, iteration, id), never from an order.

Sharding, batching, resuming and reordering therefore cannot change what a row draws.
"""

import hashlib
import json


def row_seed(run_seed: int, purpose: str, iteration: int, example_id: str) -> int:
    """A 63-bit seed: the first 8 bytes (big-endian) of sha256 over the compact JSON list of the arguments, shifted right by one.

    63 bits, so that every engine's signed 64-bit seed field holds it. The JSON list keeps the arguments apart:
    ("ab", 1) and ("a", "b1") cannot meet.
    """
    text = json.dumps([run_seed, purpose, iteration, example_id], separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "big") >> 1
