"""Run a function on several ranks, each a process of its own, and collect what every rank returns.

They are forked from a server that has imported tests/preloaded.py and done nothing else: imports are most of what a rank costs.
The ranks find each other through the same environment variables a launcher sets, so the code under test starts its
process groups as in production. Every rank's traceback is shown; a rank that hangs says where, and is killed.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch.distributed as dist

GRACE_SECONDS = 5.0


class RankFailure(AssertionError):
    """Some rank raised, died or did not return in time. The message holds every rank's traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, is_fresh: bool = False) -> list[Any]:
    """Call function(*args) on `world_size` ranks.

    Args:
        function: importable (top level of a module); it reads its rank from RANK.
        args: picklable.
        timeout: seconds from the start until the ranks that are not done are killed.
        is_fresh: start interpreters that have imported nothing, for what is decided by the environment at an import.

    Returns:
        What the function returned, by rank. It must be picklable; tensors are copied.

    Raises:
        RankFailure: a rank failed or the time ran out.
    """
    with meeting_ports(1) as (port,):
        context = multiprocessing.get_context("spawn") if is_fresh else fork_server()
        return _run_ranks(function, world_size, args, port, timeout, context)


def _run_ranks(
    function: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    port: int,
    timeout: float,
    context: ForkServerContext | SpawnContext,
) -> list[Any]:
    processes: list[BaseProcess] = []
    pipes: list[multiprocessing.connection.Connection] = []
    for rank in range(world_size):
        coordinates = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # another process serves the store: rank 0 must not
            "OMP_NUM_THREADS": "1",
        }
        reader, writer = context.Pipe(duplex=False)
        # Not daemonic: saving a distributed checkpoint starts a process of its own.
        process = context.Process(target=_rank_main, args=(writer, function, args, coordinates, timeout))
        process.start()
        writer.close()
        processes.append(process)
        pipes.append(reader)
    try:
        outcomes = _collect(processes, pipes, timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    failures = [f"--- rank {rank} ---\n{text}" for rank, (is_done, text) in enumerate(outcomes) if not is_done]
    if failures:
        raise RankFailure(f"{function.__name__} failed on {len(failures)} of {world_size} ranks\n" + "\n".join(failures))
    return [value for _, value in outcomes]


def fork_server() -> ForkServerContext:
    """Starts processes that have imported everything; one server for the whole session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def _rank_main(
    writer: multiprocessing.connection.Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environment: dict[str, str],
    timeout: float,
) -> None:
    """A rank: take the environment, call, send (True, value) or (False, traceback) back."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()  # the server's is that of the session's start
    os.environ.update(environment)
    if sys.platform.startswith("linux"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look up the machine's name, which need not resolve
    faulthandler.dump_traceback_later(max(timeout - GRACE_SECONDS, 1.0), exit=False)
    try:
        # Plain pickle copies tensors; the connection's own pickler would send handles to memory that ends with this process.
        outcome = pickle.dumps((True, function(*args)))
    except BaseException:
        outcome = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(outcome)
    writer.close()


def _end_with_parent() -> None:
    """Die with the test process, even when that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _collect(processes: list[BaseProcess], pipes: list[multiprocessing.connection.Connection], timeout: float) -> list[tuple[bool, Any]]:
    """Wait for every rank; after the first failure the others get GRACE_SECONDS, since they may wait for the one that failed."""
    outcomes: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout
    while len(outcomes) < len(pipes) and time.monotonic() < deadline:
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in outcomes}
        for ready in multiprocessing.connection.wait(list(waiting), timeout=max(deadline - time.monotonic(), 0)):
            rank = waiting[ready]  # type: ignore[index]
            try:
                outcomes[rank] = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                processes[rank].join()
                outcomes[rank] = (False, f"died without a word, exit code {processes[rank].exitcode}")
            if not outcomes[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    missing = (False, f"did not return (limit {timeout:g} s, or {GRACE_SECONDS:g} s after another rank failed); killed")
    return [outcomes.get(rank, missing) for rank in range(len(pipes))]


@contextmanager
def meeting_ports(count: int) -> Iterator[list[int]]:
    """Ports of `count` stores that this process serves. Each is good for one start of the ranks' process groups.

    The system chose the ports when the stores bound them, so no other process can take one before the ranks come.
    """
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(count)]
    yield [store.port for store in stores]
