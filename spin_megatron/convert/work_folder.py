"""What both converters share: a destination that is unfinished until it says otherwise, threads over files, a progress bar."""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import TypeVar

from spin_megatron.run.manifest import write_json
from spin_megatron.run.telemetry import Advance, progress_bar

STATE_NAME = "UNFINISHED.json"
_MEGABYTE = 1_000_000
FileT = TypeVar("FileT")


class Interrupted(Exception):
    """Another thread failed; this one's file is dropped."""


class Meter:
    """Counts bytes and tensors over threads and shows them with the rate; the bar adds the time left."""

    def __init__(self, advance: Advance, tensor_bytes: Mapping[str, int], *, done: int) -> None:
        self._advance = advance
        self._left = dict(tensor_bytes)
        self._num_tensors = len(self._left)
        self._num_finished = 0
        self._num_bytes = 0
        self._shown = done // _MEGABYTE
        self._done_before = done
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def count(self, name: str, num_bytes: int) -> None:
        """Count bytes of a tensor as moved.

        Raises:
            Interrupted: another thread failed.
        """
        if self.stop.is_set():
            raise Interrupted
        with self._lock:
            self._num_bytes += num_bytes
            self._left[name] -= num_bytes
            self._num_finished += self._left[name] == 0
            megabytes = (self._done_before + self._num_bytes) // _MEGABYTE
            rate = self._num_bytes / max(time.monotonic() - self._started, 1e-3) / 1e9
            self._advance(megabytes - self._shown, f"{self._num_finished}/{self._num_tensors} tensors, {rate:.2f} GB/s")
            self._shown = megabytes

    def forget(self, name: str, num_bytes: int) -> None:
        """Take bytes of a tensor for moved by an earlier run."""
        self._left[name] -= num_bytes
        self._num_finished += self._left[name] == 0


@contextmanager
def metered(description: str, tensor_bytes: Mapping[str, int], *, done: int = 0, show: bool = True) -> Iterator[Meter]:
    """A progress bar in megabytes over tensors of the given sizes."""
    total = sum(tensor_bytes.values())
    with progress_bar(f"{description} (MB)", max(1, total // _MEGABYTE), done=done // _MEGABYTE, show=show) as advance:
        yield Meter(advance, tensor_bytes, done=done)


def default_workers() -> int:
    """Threads that write files at once: writing is copying, and more than four saturate one disk."""
    return min(4, os.cpu_count() or 1)


def over_files(files: Sequence[FileT], work: Callable[[FileT], None], *, workers: int, stop: threading.Event) -> None:
    """Do `work` for every file in threads; the first failure stops the others and is raised."""
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        # In the caller's context: torch keeps its options (`no_archive_checksums`) in context variables, which new threads lack.
        futures = [pool.submit(copy_context().run, work, file) for file in files]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # Also when a signal interrupts the waiting: threads look at it before each piece.
            if any(not future.done() or future.exception() for future in futures):
                stop.set()
            for future in futures:
                future.cancel()
        errors = [error for future in done if (error := future.exception()) is not None]
    errors = [error for error in errors if not isinstance(error, Interrupted)] or errors
    if errors:
        raise errors[0]


def begin(destination: Path, key: str, num_bytes: int) -> None:
    """Claim a destination: new, empty, or left unfinished by the same conversion, which then goes on.

    Raises:
        ValueError: the folder holds something else.
        OSError: the disk is too small for `num_bytes` more.
    """
    state = destination / STATE_NAME
    if state.exists():
        if json.loads(state.read_text(encoding="utf-8")).get("key") != key:
            raise ValueError(f"{destination} holds an unfinished conversion of another source or with other settings; remove the folder.")
    elif destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not empty; give a new folder, or remove it.")
    destination.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(destination).free
    if free < num_bytes:
        needed = f"{num_bytes / 1e9:.1f} GB are to be written"
        raise OSError(errno.ENOSPC, f"{destination} has {free / 1e9:.1f} GB free and {needed}; make room first")
    write_json(state, {"key": key, "meaning": "This folder is not finished; the same command goes on with it."})


def finish(destination: Path) -> None:
    """Declare the destination whole, and sweep up what a killed process may have left beside its files."""
    for leftover in destination.glob(".*.tmp"):
        leftover.unlink()
    (destination / STATE_NAME).unlink()
