"""Processes as /proc shows them: which are alive, which descend from which, and ending some by their pids, never by name."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

# Daemons stand in sbin, which a user's PATH may lack.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
POLL_SECONDS = 0.05


class SlurmLocalError(Exception):
    """What a person can see and cure. exit_code: 1 something failed, 2 usage or a missing program."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def program(name: str) -> str:
    """Full path of a program."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":" + SEARCH_PATH)
    if path is None:
        raise SlurmLocalError(f"{name} is not installed: apt-get install -y --no-install-recommends slurm-wlm munge", 2)
    return path


def read_proc(pid: int, name: str) -> bytes:
    """A file of /proc/PID; empty when the process is gone or belongs to someone else."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    fields = _stat_fields(pid)
    return bool(fields) and fields[0] not in (b"Z", b"X")


def descendants(roots: Iterable[int]) -> list[int]:
    """These processes and all below them."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        fields = _stat_fields(pid)
        if len(fields) > 1:
            children.setdefault(int(fields[1]), []).append(pid)
    found, remaining = [], list(roots)
    while remaining:
        pid = remaining.pop()
        found.append(pid)
        remaining += children.get(pid, [])
    return found


def stop(pids: Iterable[int], *, wait_seconds: float) -> int:
    """SIGTERM, then SIGKILL for those that outlive the wait; returns how many there were."""
    listed = list(pids)
    remaining = send(listed, signal.SIGTERM, wait_seconds=wait_seconds)
    if remaining:
        send(remaining, signal.SIGKILL, wait_seconds=5)
    return len(listed)


def send(pids: Iterable[int], number: signal.Signals, *, wait_seconds: float) -> list[int]:
    """Signal processes and wait until they are gone; returns those that are not."""
    listed = list(pids)
    for pid in listed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    deadline = time.monotonic() + wait_seconds
    while remaining := [pid for pid in listed if is_alive(pid)]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return remaining


def _stat_fields(pid: int) -> list[bytes]:
    """State, parent, ...: what follows the program's name, which may hold spaces and brackets."""
    return read_proc(pid, "stat").rpartition(b")")[2].split()
