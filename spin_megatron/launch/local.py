"""Start the ranks of a stage as processes on this machine, and end them together.

Rank 0 keeps the terminal (progress bars); every rank writes logs/<stage>/attempt_N/rank_R.log. A rank that fails takes the
others down after a grace period. SIGTERM, SIGINT and SIGHUP are passed on, so that a stage can save and leave with exit code 75.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from spin_megatron.launch.allocator import allocator_variables
from spin_megatron.run.children import ended_with_parent

DONE, FAILED, BAD_INPUT, INCOMPLETE, STOPPED = 0, 1, 2, 3, 75
logger = logging.getLogger(__name__)

GRACE_SECONDS = 20.0
POLL_SECONDS = 0.05
PROGRAM = (sys.executable, "-m", "spin_megatron.cli")
_PARENT = "SPIN_MEGATRON_PARENT_PID"
# The descriptor in rank 0 of the socket at which it serves the meeting of all ranks; mcore/runtime.py takes it.
MEETING_SOCKET = "SPIN_MEGATRON_MEETING_SOCKET"


class Launcher:
    """Starts stages and, inside `with`, passes a stop on to every rank that runs; enter it in the main thread.

    Once one of `stop_signals` came, nothing new is started. A second SIGINT ends the ranks where they are.
    """

    def __init__(self) -> None:
        self._stop_requested, self._end_requested = threading.Event(), threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._previous: dict[int, Any] = {}

    def is_stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self._stop_requested.is_set()

    def __enter__(self) -> Self:
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        _signal_all(self._processes, signal.SIGKILL)

    def _stop(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.is_stopping():
            self._end_requested.set()
        elif number == signal.SIGINT:
            logger.info("stopping: what runs saves and leaves; Ctrl-C again ends it at once, and what is not saved is made again")
        self._stop_requested.set()
        self._pass_on(self._processes)

    def _pass_on(self, processes: list[subprocess.Popen[bytes]]) -> None:
        _signal_all(processes, signal.SIGKILL if self._end_requested.is_set() else signal.SIGTERM)

    def launch(
        self,
        arguments: Sequence[str],
        *,
        world_size: int,
        threads: int,
        log_folder: Path,
        variables: Mapping[str, str] | None = None,
        has_terminal: bool = True,
    ) -> int:
        """Run `spin-megatron ARGUMENTS` as `world_size` ranks and wait for them. May be called from several threads.

        Args:
            arguments: verb and options; `--log-file` is added for each rank.
            threads: OMP_NUM_THREADS of each rank.
            log_folder: logs of this stage; a new attempt_N is made below it.
            variables: what else stands in the ranks' environment.
            has_terminal: rank 0 writes on it; otherwise what it would show goes into a file, rank_0.out, beside its log.

        Returns:
            0 when every rank returned 0, else the exit code of the rank that failed first.
        """
        if self.is_stopping():
            return STOPPED
        attempt = new_attempt(log_folder)
        ranks: list[subprocess.Popen[bytes]] = []
        # Rank 0 gets the socket itself: a port that is only known to be free now may be another's when it starts to listen.
        meeting = socket.create_server(("127.0.0.1", 0))
        common = allocator_variables() | dict(variables or {})
        for rank in range(world_size):
            log_file = attempt / f"rank_{rank}.log"
            command = [*PROGRAM, *arguments, "--log-file", str(log_file)]
            environment = _environment(rank, world_size, meeting.getsockname()[1], threads) | common
            environment[MEETING_SOCKET] = str(meeting.fileno())
            kept = (meeting.fileno(),) if rank == 0 else ()
            if rank == 0 and has_terminal:
                process = subprocess.Popen(command, env=environment, pass_fds=kept)
            else:
                # A rank but the first shows nothing; the first would show its log a second time.
                with open(log_file if rank else log_file.with_suffix(".out"), "ab") as log:
                    process = subprocess.Popen(command, env=environment, pass_fds=kept, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            ranks.append(process)
            self._processes.append(process)
        meeting.close()
        if self.is_stopping():  # a signal came while they were started
            self._pass_on(ranks)
        return _wait(ranks, self._end_requested)


def stop_signals() -> list[signal.Signals]:
    """What asks to save and leave: also the end of the terminal, unless that is ignored (nohup)."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]


def end_with_parent() -> None:
    """In a rank: die when the launcher dies. Linux only."""
    parent = os.environ.get(_PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ended_with_parent(signal.SIGKILL)()
    if os.getppid() != int(parent):  # it died before the call above
        os._exit(1)


def _environment(rank: int, world_size: int, port: int, threads: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
    )
    environment[_PARENT] = str(os.getpid())
    if sys.path[0] not in ("", os.getcwd()):
        # `python -m` looks for modules in the current folder first, where a datasets.py of the user's would be taken for the library. A
        # launcher that was itself started so may need it: its package may lie there.
        environment.setdefault("PYTHONSAFEPATH", "1")
    if sys.platform.startswith("linux"):
        # Without it gloo looks up this machine's own name, which need not resolve.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def new_attempt(log_folder: Path) -> Path:
    """Make attempt_N, N counting from 1, and point `latest` at it."""
    log_folder.mkdir(parents=True, exist_ok=True)
    number = 1 + sum(1 for _ in log_folder.glob("attempt_*"))
    while True:
        attempt = log_folder / f"attempt_{number}"
        try:
            attempt.mkdir()
            break
        except FileExistsError:
            number += 1
    aside = log_folder / f".latest.{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(attempt.name)
    os.replace(aside, log_folder / "latest")
    return attempt


def _wait(processes: list[subprocess.Popen[bytes]], end_requested: threading.Event) -> int:
    """Wait for all; once one has failed, give the others GRACE_SECONDS to end by themselves, then end them."""
    first_failure: int | None = None
    deadline = 0.0
    while None in (codes := [process.poll() for process in processes]):
        if first_failure is None:
            first_failure = next((code for code in codes if code), None)
            deadline = time.monotonic() + GRACE_SECONDS
        elif time.monotonic() > deadline:
            _signal_all(processes, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    if first_failure is None:
        first_failure = next((code for code in codes if code), DONE)
    if end_requested.is_set():
        return STOPPED
    if first_failure < 0:
        logger.error("a rank was killed by signal %d%s", -first_failure, " (out of memory?)" if first_failure == -signal.SIGKILL else "")
        first_failure = STOPPED if first_failure in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP) else FAILED
    # A rank that is killed while another explains a bad input is not the reason.
    explained = [code for code in codes if code in (BAD_INPUT, INCOMPLETE)]
    return explained[0] if explained else first_failure


def _signal_all(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
