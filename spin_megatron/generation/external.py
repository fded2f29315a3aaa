"""Engines that live in another environment: a worker script, one JSON job, files between the two.

The driver writes the job and its requests into a folder of this attempt, starts the worker under the command the user gives
(a container, srun, another Python) and reads chunk files as they appear. A worker is done when its result file says so and the
rows are all there; its exit code is not believed, since launchers lose it. Chunks of an attempt that was cut off are read
again by the next one: an answer is never made twice.
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from spin_megatron.generation.engine import EngineSpec, Environment, Prompt, Sampling, check_prompts, never
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.children import ended_with_parent
from spin_megatron.run.manifest import digest_values, write_json, write_text
from spin_megatron.run.records import FinishReason, GeneratedRow, TokenIds

logger = logging.getLogger(__name__)

SCHEMA = 1
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30.0
_STOP_SECONDS = 10.0
_TOLD_LINES = 20
_NOT_FOUND = 127  # of env: there is no such program
# What must not reach the worker's environment: our Python's paths and thread count; TensorRT-LLM's own engine cache, which is keyed
# by the model's path and would hand out the engine of an earlier iteration; and a batch job's own shape, which srun takes for its step's.
_UNSET = (
    *("PYTHONPATH", "PYTHONHOME", "OMP_NUM_THREADS", "TLLM_LLMAPI_BUILD_CACHE", "TLLM_LLMAPI_BUILD_CACHE_ROOT"),
    *("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK"),
)


class WorkerFailed(RuntimeError):
    """A worker ended without doing its job."""


@dataclass(frozen=True)
class WorkerCommand:
    """How a worker script is started.

    ranks: processes that the environment's launcher starts. starter: words before the interpreter that tie them together.
    settings: NAME=VALUE for its environment.
    no_progress_seconds: a worker that shows nothing new for so long is ended (a lost rank leaves others waiting for ever).
    """

    environment: Environment
    script: Path
    ranks: int = 1
    starter: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    no_progress_seconds: float = 3600.0

    def line(self, job: Path) -> list[str]:
        """The argument list.

        Raises:
            ValueError: the script's or the interpreter's path has spaces and there is a starter, whose shell would split it.
        """
        for path, cure in (
            (str(self.script), "install spin_megatron in a folder without any"),
            (self.environment.python, "give generate.environment.python a path without any, such as a link's"),
        ):
            if self.starter and len(path.split()) != 1:
                raise ValueError(f"{path}: {self.starter[0]} splits paths at spaces; {cure}.")
        unset = [word for name in _UNSET for word in ("-u", name)]
        launcher = [word.replace("{ranks}", str(self.ranks)) for word in self.environment.launcher]
        words = [*launcher, *self.environment.prefix, *self.starter, self.environment.python, str(self.script)]
        # The worker reads its job's path back from this form, which no shell splits.
        return ["env", *unset, *self.settings, *self.environment.variables, *words, quote(str(job))]


class Worker:
    """One worker process, from its job file to its result."""

    def __init__(self, command: WorkerCommand, job: Mapping[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._command = command
        self._result = folder / "result.json"
        self._stop = folder / "stop"
        for left in (self._result, self._stop):
            left.unlink(missing_ok=True)
        self._log = folder / "worker.log"
        write_json(folder / "job.json", {"schema": SCHEMA, "result": str(self._result), "stop": str(self._stop), "own_group": True, **job})
        self._progress_at = time.monotonic()
        self._result_seen_at: float | None = None
        line = command.line(folder / "job.json")
        logger.info("starting %s", shlex.join(line))
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A session of its own, so that ending it ends all it started.
                start_new_session=True,
                preexec_fn=ended_with_parent(signal.SIGTERM),  # noqa: PLW1509
            )

    def is_running(self) -> bool:
        """Whether the process is there; ends it when it showed no progress for too long, or lingers behind its result."""
        if self._process.poll() is not None:
            return False
        if self._result.exists():
            self._result_seen_at = self._result_seen_at or time.monotonic()
            if time.monotonic() - self._result_seen_at > _GRACE_SECONDS:
                self.end()
                return False
        if time.monotonic() - self._progress_at > self._command.no_progress_seconds:
            self.end()
            seconds = self._command.no_progress_seconds
            raise WorkerFailed(f"the worker showed no progress for {seconds:.0f} s and was ended; see {self._log}")
        return True

    def progressed(self) -> None:
        """Tell that something new was seen of the worker."""
        self._progress_at = time.monotonic()

    def wait(self) -> dict[str, Any]:
        """Wait for the end and return the result.

        Raises:
            WorkerFailed: the message ends with the last lines of its log.
        """
        while self.is_running():
            time.sleep(_POLL_SECONDS)
        return self.result()

    def result(self) -> dict[str, Any]:
        """The result of a worker that has ended; see `wait`."""
        failure = f"it left no result (exit code {self._process.returncode})"
        if self._result.exists():
            found: dict[str, Any] = json.loads(self._result.read_text(encoding="utf-8"))
            if found["ok"]:
                return found
            failure = found["error"]
        elif self._process.returncode == _NOT_FOUND:
            words = [*self._command.environment.launcher, *self._command.environment.prefix, *self._command.starter]
            failure = f"none of {[*words, self._command.environment.python]} may be missing; correct [generate.environment]"
        tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TOLD_LINES:])
        raise WorkerFailed(f"the worker failed: {failure}\nLast lines of {self._log}:\n{tail}")

    def stop(self) -> None:
        """Have the worker write what it has and leave, through a file, which reaches it behind any launcher; then see that it does."""
        if self._process.poll() is None:
            self._stop.touch()
        deadline = time.monotonic() + _STOP_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self.end()

    def end(self) -> None:
        """Ask the worker and all it started to end, and see that they do."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                _signal_group(self._process.pid, number)
                try:
                    self._process.wait(_GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    continue


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def normalised(token_ids: Sequence[int], finish_reason: str, stop_reason: int | None, sampling: Sampling) -> tuple[TokenIds, FinishReason]:
    """A response as our records have it: EOS at the end exactly when it stopped, nothing behind the first EOS.

    Engines differ in whether they give the token that ended a response, and some ran on behind it.

    Raises:
        ValueError: the engine gave up on the request, or gave more tokens than allowed.
    """
    tokens = tuple(token_ids)
    ends = [place for place, token in enumerate(tokens) if token in sampling.eos_ids]
    if ends:
        tokens = tokens[: ends[0] + 1]
    elif finish_reason == "stop":
        tokens = (*tokens, stop_reason if stop_reason in sampling.eos_ids else sampling.eos_ids[0])
    elif finish_reason != "length":
        raise ValueError(f"finish reason {finish_reason!r}, expected stop or length")
    if len(tokens) > sampling.max_new_tokens:
        raise ValueError(f"{len(tokens)} tokens, at most {sampling.max_new_tokens} were asked for")
    stopped = bool(tokens) and tokens[-1] in sampling.eos_ids
    if not stopped and len(tokens) < sampling.max_new_tokens:
        raise ValueError(f"{len(tokens)} tokens without EOS, though {sampling.max_new_tokens} were allowed")
    return tokens, "stop" if stopped else "length"


def _request(prompt: Prompt) -> dict[str, Any]:
    return {"id": prompt.example_id, "prompt_ids": list(prompt.token_ids), "seed": prompt.seed}


def _answered(attempt: Path, waiting: Mapping[str, Prompt]) -> Iterator[Prompt]:
    """The prompts that an earlier attempt was asked just as they are now."""
    for line in (attempt / "requests.jsonl").read_text(encoding="utf-8").splitlines():
        request = json.loads(line)
        prompt = waiting.get(request["id"])
        if prompt is not None and _request(prompt) == request:
            yield prompt


class ExternalEngine:
    """Answers prompts through a worker; `work` keeps what attempts leave."""

    def __init__(self, name: str, command: WorkerCommand, job: Mapping[str, Any], spec: EngineSpec, work: Path) -> None:
        self._name = name
        self._command = command
        self._job = job
        self._spec = spec
        self._work = work
        self._shape = ModelShape.from_huggingface(spec.model)
        self._worker: Worker | None = None
        self._result: dict[str, Any] = {}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Callable[[], bool] = never) -> Iterator[GeneratedRow]:
        """See Engine.generate; rows come chunk by chunk. What a stopped worker had answered comes with the next attempt."""
        check_prompts(prompts, spec=self._spec, sampling=sampling, shape=self._shape)
        return self._generate({prompt.example_id: prompt for prompt in prompts}, sampling, stop)

    def _generate(self, waiting: dict[str, Prompt], sampling: Sampling, stop: Callable[[], bool]) -> Iterator[GeneratedRow]:
        kept = self._work / f"sampling_{digest_values(vars(sampling))[:16]}"
        for folder in (chunks.parent for chunks in sorted(kept.glob("attempt_*/chunks"))):
            same = {prompt.example_id: prompt for prompt in _answered(folder, waiting)}
            for row in self._new_rows(folder, set(), same, sampling):
                del waiting[row.example_id]
                yield row
        if not waiting or stop():
            return
        attempt = kept / f"attempt_{time.time_ns()}"
        yield from self._run(attempt, waiting, sampling, stop)
        if waiting and not stop():
            raise RuntimeError(f"the worker ended well but left {len(waiting)} requests unanswered; see {attempt}")

    def _run(self, attempt: Path, waiting: dict[str, Prompt], sampling: Sampling, stop: Callable[[], bool]) -> Iterator[GeneratedRow]:
        """Start a worker for what is waiting and yield its rows as their chunks appear."""
        chunks = attempt / "chunks"
        attempt.mkdir(parents=True)
        requests = [_request(prompt) for prompt in waiting.values()]
        write_text(attempt / "requests.jsonl", "".join(json.dumps(request) + "\n" for request in requests))
        chunks.mkdir()  # last: an attempt that has it has its requests
        job = {**self._job, "action": "generate", "requests": str(attempt / "requests.jsonl"), "chunks": str(chunks)}
        job["sampling"] = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens", "eos_ids")}
        num_requests = len(requests)
        self._worker = Worker(self._command, job, attempt)
        seen: set[Path] = set()
        while True:
            is_running = self._worker.is_running()  # before the look, so that the last chunks are not missed
            for row in self._new_rows(attempt, seen, waiting, sampling):
                self._worker.progressed()
                yield row
            if not is_running:
                break
            if stop():
                self._worker.stop()
                return
            time.sleep(_POLL_SECONDS)
        self._result = self._worker.result()
        if self._result["rows"] != num_requests:
            raise RuntimeError(f"the worker says it answered {self._result['rows']} of {num_requests} requests; see {attempt}")
        if sampling.temperature and not self._result["row_seeds"]:
            told = "engine %s (version %s) draws without the rows' seeds: another run, batch or shard gives other answers (docs/engines.md)"
            logger.warning(told, self._name, self._result["version"])

    def _new_rows(self, attempt: Path, seen: set[Path], waiting: dict[str, Prompt], sampling: Sampling) -> Iterator[GeneratedRow]:
        """Rows of chunk files not seen yet; each takes its prompt off `waiting`."""
        for path in sorted(set((attempt / "chunks").glob("chunk_*.jsonl")) - seen):
            seen.add(path)
            for line in path.read_text(encoding="utf-8").splitlines():
                response = json.loads(line)
                prompt = waiting.pop(response["id"], None)
                if prompt is not None:
                    yield self._row(prompt, response, sampling, path)

    def _row(self, prompt: Prompt, response: Mapping[str, Any], sampling: Sampling, path: Path) -> GeneratedRow:
        """Check one response of the engine and make it a row.

        Raises:
            ValueError: it has unknown token ids or breaks the rules of `normalised`.
        """
        unknown = [token for token in response["token_ids"] if not 0 <= token < self._shape.vocab_size]
        try:
            if unknown:
                raise ValueError(f"token ids {unknown[:5]} outside the vocabulary of {self._shape.vocab_size}")
            tokens, reason = normalised(response["token_ids"], response["finish_reason"], response["stop_reason"], sampling)
        except ValueError as error:
            raise ValueError(f"engine {self._name!r} gave example {prompt.example_id} an unusable response ({path}): {error}.") from error
        return GeneratedRow(prompt.example_id, tokens, reason, prompt.seed)

    def describe(self) -> dict[str, Any]:
        """See Engine.describe; what the worker said of itself, once it has run."""
        facts = {name: value for name, value in self._result.items() if name not in ("schema", "ok", "rows", "seconds")}
        return {"engine": self._name, "dtype": self._spec.dtype, "worker_seconds": self._result.get("seconds"), **facts}

    def close(self) -> None:
        """End the worker if it still runs (a stop was asked for)."""
        if self._worker is not None:
            self._worker.stop()
