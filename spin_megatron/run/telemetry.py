"""What a running stage shows and keeps: progress bars, a log file, metrics.jsonl and TensorBoard events."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spin_megatron.run.manifest import plain, write_text


class _Terminal(Console):
    """Standard error. Whoever reads it may go first: tee on Ctrl-C, a terminal whose connection breaks.

    Rich would then end the process, or raise an error, before the stage has saved its state; it goes on unseen.
    """

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


console = _Terminal(stderr=True)


def counted(number: int, noun: str) -> str:
    """ "1 rank", "2 ranks": a number and a noun whose plural ends in s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Advance(Protocol):
    """Move a progress bar on; `note` replaces the text behind it."""

    def __call__(self, amount: int = 1, note: str | None = None) -> None: ...


def configure_logging(log_file: Path | None, *, show: bool = True) -> None:
    """Send the package's log records to the terminal (show) and, appended, to a file.

    Python's warnings (libraries give many at import) and records for debugging go to the file alone, where there is one.
    """
    logger, warnings = logging.getLogger("spin_megatron"), logging.getLogger("py.warnings")
    logger.setLevel(logging.DEBUG)
    logging.captureWarnings(log_file is not None)
    for source in (logger, warnings):
        source.propagate = False
        for handler in list(source.handlers):
            source.removeHandler(handler)
            handler.close()
    if show:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]") if console.is_terminal else _LineHandler()
        handler.setLevel(logging.INFO)
        logger.addHandler(handler)
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        file_handler = logging.FileHandler(log_file, encoding="utf-8")
        file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(file_handler)
        warnings.addHandler(file_handler)


class _LineHandler(logging.Handler):
    """A line a message, however long: from a job's log, a command that was wrapped could not be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)-8s %(message)s", datefmt="%X"))

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), soft_wrap=True, markup=False, highlight=False, emoji=False)


@contextmanager
def progress_bar(description: str, total: int, *, done: int = 0, show: bool = True) -> Iterator[Advance]:
    """A progress bar on standard error; where that is no terminal, a log line with the time left every 30 seconds.

    Args:
        description: what is counted, e.g. "generate (responses)".
        total: how many units the work has; done: how many were finished before (resume).
        show: False on ranks other than the first.
    """
    if not show:
        yield lambda amount=1, note=None: None
    elif console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(description, total=total, completed=done, note="")

            def advance(amount: int = 1, note: str | None = None) -> None:
                progress.update(task, advance=amount)
                if note is not None:
                    progress.update(task, note=note)

            yield advance
    else:
        yield _log_lines(description, total, done)


def _log_lines(description: str, total: int, done: int) -> Advance:
    logger = logging.getLogger("spin_megatron.progress")
    started = time.monotonic()
    state = {"done": done, "shown_at": started}

    def advance(amount: int = 1, note: str | None = None) -> None:
        state["done"] += amount
        now, moved, left = time.monotonic(), state["done"] - done, total - state["done"]
        if left <= 0 < left + amount or now - state["shown_at"] > 30:  # once when all is done, whatever is counted behind it
            state["shown_at"] = now
            notes = [f"{(now - started) / moved * left:.0f} s left"] if moved > 0 and left > 0 else []
            notes += [note] if note else []
            logger.info("%s: %d of %d%s", description, state["done"], total, f" ({', '.join(notes)})" if notes else "")

    return advance


class EventWriter:
    """TensorBoard events of one folder, a curve a name. Opening drops what earlier files there say of `first_step` and later."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

        self._writer = EventFileWriter(str(folder))
        session = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=session))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of one step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MetricsWriter:
    """Appends one JSON object a step to metrics.jsonl (flushed each step) and the same numbers to TensorBoard.

    Opening with `resume_step` drops lines of that step and later: they belong to work that was lost and is redone.
    """

    def __init__(self, path: Path, tensorboard: Path, *, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            write_text(path, "".join(_line(row) for row in read_metrics(path) if row["step"] < resume_step))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._events = EventWriter(tensorboard, first_step=resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of one step; NaN and infinities are kept as the strings JSON has no number for."""
        self._file.write(_line({"step": step, "time": time.time(), **values}))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.write(step, values)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _line(row: Mapping[str, float | str]) -> str:
    return json.dumps(plain(row)) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl file, none where there is no file; a line that was cut short belongs to no finished step."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
