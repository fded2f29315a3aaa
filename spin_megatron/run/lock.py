"""A lock on a shared file system: two processes never both work on one stage, and a dead owner's lock is taken over.

flock is not kept across nodes on every cluster file system, so the lock is a file, made by a hard link (atomic on NFS too),
that names its owner and is touched while the owner lives. It is stale when

- it was made on this host by a process that is gone, or
- it was made by an earlier life of the same Slurm job (which Slurm ends before it starts the next), or
- it was not touched for `stale_seconds`, by the clock that stamps files: a file server's may be minutes away from this host's.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from spin_megatron.run.manifest import StageIncomplete

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. job: Slurm's job and array element; restart: which life of it."""

    token: str
    host: str
    pid: int
    pid_started: str
    job: str | None = None
    restart: int = 0

    @classmethod
    def this_process(cls, job: str | None = None, restart: int = 0) -> "Owner":
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), _start_time(os.getpid()), job, restart)


def _start_time(pid: int) -> str:
    """When a process of this host started, in clock ticks; "" when there is none. A pid alone may have been reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def read_owner(path: Path) -> Owner | None:
    """The owner a lock file names, or None when there is no lock."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def is_held(path: Path, *, stale_seconds: float, by: Owner | None = None) -> bool:
    """Whether a living owner holds the lock; `by` is who asks."""
    owner = read_owner(path)
    return owner is not None and _lives(owner, path, stale_seconds=stale_seconds, by=by)


def _lives(owner: Owner, path: Path, *, stale_seconds: float, by: Owner | None) -> bool:
    """Whether the owner that a lock file named is alive, as far as can be told from here."""
    if owner.host == socket.gethostname():
        return _start_time(owner.pid) == owner.pid_started != ""
    if by is not None and owner.job is not None and owner.job == by.job and by.restart > owner.restart:
        return False
    try:
        return _stamp_of_now(path) - path.stat().st_mtime < stale_seconds
    except FileNotFoundError:
        return False


def _stamp_of_now(path: Path) -> float:
    """What a file beside `path` that is touched now gets as its time; this host's time for those who may write none there."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        beside.touch()
        return beside.stat().st_mtime
    except OSError:  # a colleague looks at the run's state
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


@contextmanager
def held(path: Path, owner: Owner, *, what: str, stale_seconds: float, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock, touching it from a thread.

    Args:
        what: the work it protects, for the message.
        wait_seconds: how long to wait for a lock that may turn out stale.

    Raises:
        StageIncomplete: another living process holds it.
    """
    deadline, is_told = time.monotonic() + wait_seconds, False
    while not _take(path, owner, stale_seconds):
        if time.monotonic() >= deadline:
            other = read_owner(path)
            raise StageIncomplete(
                f"{what} is being run by another process ({_describe(other)}; lock {path}); wait for it, or stop it, and run again."
            )
        if not is_told:
            is_told = True
            logger.info("waiting for %s, which another process has (%s; lock %s)", what, _describe(read_owner(path)), path)
        time.sleep(min(1.0, stale_seconds / 10))
    ended = threading.Event()
    beat = threading.Thread(target=_touch_until, args=(path, ended, stale_seconds / 6), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        if (found := read_owner(path)) is not None and found.token == owner.token:
            path.unlink(missing_ok=True)


def _take(path: Path, owner: Owner, stale_seconds: float) -> bool:
    """Try once: make the lock file, removing a stale one first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{owner.token}")
    seen = read_owner(path)
    if path.exists() and (seen is None or not _lives(seen, path, stale_seconds=stale_seconds, by=owner)):
        # Of several that judged the same owner dead one renames its lock away; a lock newly made meanwhile is put back,
        # by a link, which gives way to a still newer one.
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False
        if read_owner(aside) != seen:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
            aside.unlink()
            return False
    try:
        aside.write_text(json.dumps(asdict(owner)), encoding="utf-8")
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)
    return True


def _touch_until(path: Path, ended: threading.Event, every_seconds: float) -> None:
    while not ended.wait(every_seconds):
        # Whatever fails may not fail the next time: a file server was away, or another process looked at the lock (`_take`).
        with contextlib.suppress(OSError):
            os.utime(path)


def _describe(owner: Owner | None) -> str:
    if owner is None:
        return "unknown"
    return f"job {owner.job}, restart {owner.restart}, on {owner.host}" if owner.job else f"pid {owner.pid} on {owner.host}"
