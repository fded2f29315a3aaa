"""Ask the system for the parts of a file that will be read soon, so that reading the disk and writing overlap.

Weights are read through mapped files, page fault by page fault: of a file that is not cached that is a fraction of a plain
copy's rate, as every fault waits for a small read of its own. Advice costs nothing where the pages are cached already.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, TypeVar

# Enough to keep a disk busy while a piece is written.
AHEAD_BYTES = 128 * 2**20
# Linux reads at most the larger of the device's read-ahead window and its largest request for one piece of advice and drops the
# rest without a word (force_page_cache_ra in mm/readahead.c); 128 KiB is the default window.
_ADVICE_BYTES = 128 * 2**10
ItemT = TypeVar("ItemT")


def advise(file: BinaryIO, start: int, num_bytes: int) -> None:
    """Have the system read bytes [start, start + num_bytes) of a file into its cache; returns while it does."""
    for offset in range(start, start + num_bytes, _ADVICE_BYTES):
        os.posix_fadvise(file.fileno(), offset, min(_ADVICE_BYTES, start + num_bytes - offset), os.POSIX_FADV_WILLNEED)


def ahead(items: Sequence[ItemT], num_bytes: Callable[[ItemT], int], advise_item: Callable[[ItemT], None]) -> Iterator[ItemT]:
    """Yield items in order, each of them advised up to AHEAD_BYTES before its turn."""
    advised, waiting = 0, 0
    for position, item in enumerate(items):
        while advised < len(items) and (advised <= position or waiting < AHEAD_BYTES):
            advise_item(items[advised])
            waiting += num_bytes(items[advised])
            advised += 1
        yield item
        waiting -= num_bytes(item)
