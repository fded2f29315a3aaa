#!/usr/bin/env python3
"""The vLLM side of generation: one script, started with one JSON path, in vLLM's own environment.

    python vllm_worker.py JOB.json

Of the same shape as trtllm_worker.py: the standard library and `vllm` alone, Python 3.10 to 3.13, actions `probe` and `generate`
(vLLM loads the Hugging Face folder, there is nothing to build), the result file written last. vLLM takes a seed a request.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any
from urllib.parse import unquote

SCHEMA = 1
WATCH = "--watch"
PACKAGE = "vllm"


# ---- files: the same lines as in the other worker scripts


def write_whole(path: Path, text: str) -> None:
    """Write aside, fsync, rename: a reader sees the whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, path)


def read_requests(job: dict[str, Any]) -> list[dict[str, Any]]:
    """[{"id", "prompt_ids", "seed"}, ...]"""
    with open(job["requests"], encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


class Chunks:
    """Response files of job["chunk_rows"] rows, each written as soon as it is full, and what the requests in the engine came to.

    in_flight_use: the mean over time of the requests in the engine, at most its batch size, as a share of the batch size.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._folder, self._size = Path(job["chunks"]), job["chunk_rows"]
        self._batch_size = job["max_batch_size"]
        self._lines: list[str] = []
        self._num_chunks = self.rows = self._in_flight = 0
        self._busy_seconds = 0.0
        self._started_at = self._changed_at = time.monotonic()

    def in_flight(self, change: int) -> None:
        """So many requests went into the engine, or came out."""
        now = time.monotonic()
        self._busy_seconds += min(self._in_flight, self._batch_size) * (now - self._changed_at)
        self._in_flight, self._changed_at = self._in_flight + change, now

    def add(self, response: dict[str, Any]) -> None:
        """Take a response that came out."""
        self._lines.append(json.dumps(response) + "\n")
        self.rows += 1
        if len(self._lines) == self._size:
            self.write()

    def write(self) -> None:
        """Write what is there."""
        if self._lines:
            write_whole(self._folder / f"chunk_{self._num_chunks:05d}.jsonl", "".join(self._lines))
            self._lines, self._num_chunks = [], self._num_chunks + 1

    def facts(self) -> dict[str, Any]:
        """For the result."""
        seconds = self._changed_at - self._started_at
        return {"rows": self.rows, "in_flight_use": self._busy_seconds / (self._batch_size * seconds) if seconds else 0.0}


def gpus() -> list[dict[str, str]]:
    """Name, compute capability and driver of each visible GPU, as nvidia-smi tells them; empty where there is none."""
    names = ("name", "compute_cap", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(names, map(str.strip, line.split(",")), strict=True)) for line in output.splitlines()]


def probe(_job: dict[str, Any]) -> dict[str, Any]:
    """What is installed here, found by what is imported: builds for other devices have names of their own. Nothing is imported."""
    names = packages_distributions().get(PACKAGE)
    if not names:
        raise RuntimeError(f"{PACKAGE} is not installed in {sys.executable}; start the worker in its environment or container")
    return {"version": version(names[0]), "gpus": gpus(), "python": sys.version.split()[0]}


def check_expected(job: dict[str, Any]) -> None:
    """Refuse to run on another version or kind of GPU than the job was made for, before anything is loaded."""
    found = probe(job)
    for name, value in (("version", found["version"]), ("gpu", found["gpus"][0]["name"] if found["gpus"] else "none")):
        if job["expected"][name] != value:
            raise RuntimeError(f"this job expects {name} {job['expected'][name]!r}, here is {value!r}; run build-engine on these machines")


def failure(error: str) -> str:
    """The result of a job that failed."""
    return json.dumps({"schema": SCHEMA, "ok": False, "error": error}, indent=2)


def watch(job: dict[str, Any], worker: int) -> int:
    """Once the worker of that process id is dead without a result, write one in its stead, and end what it had started.

    A launcher would wait for its other ranks for ever, and processes of the library would keep their GPUs.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while os.getppid() == worker:
        time.sleep(0.5)
    if Path(job["result"]).exists():
        return 0
    try:
        write_whole(Path(job["result"]), failure("its process died without a word: killed, out of memory, or crashed in a library"))
    finally:
        if job.get("own_group"):
            os.killpg(0, signal.SIGTERM)
            time.sleep(5)
            os.killpg(0, signal.SIGKILL)
    return 0


def main(arguments: list[str]) -> int:
    """Do the job and write its result; 0 when it is done."""
    path = Path(arguments[1])
    job = json.loads((path if path.exists() else Path(unquote(arguments[1]))).read_text(encoding="utf-8"))
    if job["schema"] != SCHEMA:
        raise SystemExit(f"job schema {job['schema']}, this worker knows {SCHEMA}: driver and worker are of different versions")
    if WATCH in arguments:
        return watch(job, int(arguments[-1]))
    watcher = subprocess.Popen([sys.executable, *arguments, WATCH, str(os.getpid())])
    # The folder of this script holds modules of ordinary names, which must not stand before installed ones.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    started = time.monotonic()
    try:
        facts = ACTIONS[job["action"]](job)
    except Exception as error:
        write_whole(Path(job["result"]), failure(f"{type(error).__name__}: {error}"))
        traceback.print_exc()
        # trtllm-llmapi-launch stops its other ranks only behind a command that went well; the result says that this one did not.
        return 0 if "TLLM_SPAWN_PROXY_PROCESS" in os.environ else 1
    result = {"schema": SCHEMA, "ok": True, "seconds": time.monotonic() - started, **facts}
    write_whole(Path(job["result"]), json.dumps(result, indent=2))
    watcher.kill()
    watcher.wait()
    return 0


# ---- vLLM


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Answer every request, with job["in_flight"] of them in the engine until all are in."""
    check_expected(job)
    from vllm import EngineArgs, LLMEngine

    check_sampling(job)
    # On a CPU the fraction is one of all memory, which others use too; there the cache is as large as a full batch needs.
    on_gpu = job["expected"]["gpu"] != "none"
    cache = {"gpu_memory_utilization": job["free_gpu_memory_fraction"]} if on_gpu else {"kv_cache_memory_bytes": job["kv_cache_bytes"]}
    arguments = EngineArgs(
        model=job["model"],
        dtype=job["dtype"],
        tensor_parallel_size=job["tensor_parallel"],
        pipeline_parallel_size=job["pipeline_parallel"],
        max_model_len=job["max_seq_len"],
        max_num_seqs=job["max_batch_size"],
        **cache,
        enforce_eager=job["eager"],
        # Reused blocks are computed in another batch shape: a prompt's logits would depend on what came before.
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        trust_remote_code=False,
        seed=0,
    )
    chunks = answer_all(LLMEngine.from_engine_args(arguments), job)
    return {**chunks.facts(), "row_seeds": True, **probe(job)}


def check_sampling(job: dict[str, Any]) -> None:
    """Refuse, before the model is loaded, a temperature that vLLM would raise to its least one."""
    asked, made = job["sampling"]["temperature"], sampling_parameters(job, seed=0).temperature
    if made != asked:
        raise RuntimeError(f"vLLM would sample at temperature {made} instead of {asked}; set generate.temperature to 0 or at least {made}")


def answer_all(engine: Any, job: dict[str, Any]) -> Chunks:
    """Step the engine, and give it a request for each that came out, until all are answered or a stop is asked for."""
    chunks, requests, stop = Chunks(job), read_requests(job), Path(job["stop"])
    waiting = requests[::-1]
    num_inside = 0
    while (waiting or num_inside) and not stop.exists():
        while waiting and num_inside < job["in_flight"]:
            request = waiting.pop()
            prompt = {"prompt_token_ids": request["prompt_ids"]}
            engine.add_request(request["id"], prompt, sampling_parameters(job, request["seed"]))
            num_inside += 1
            chunks.in_flight(+1)
        for output in engine.step():
            if output.finished:
                num_inside -= 1
                chunks.in_flight(-1)
                chunks.add(finished(output.request_id, output.outputs[0]))
    chunks.write()
    return chunks


def sampling_parameters(job: dict[str, Any], seed: int) -> Any:
    """One object a request; every EOS id is a stop id, so that the model's own generation config does not matter."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = job["sampling"]
    return SamplingParams(
        temperature=sampling["temperature"],
        top_k=sampling["top_k"] or -1,  # off is -1 in every release; 0 only in newer ones
        top_p=sampling["top_p"],
        seed=seed,
        max_tokens=sampling["max_new_tokens"],
        stop_token_ids=sampling["eos_ids"],
        ignore_eos=True,
        detokenize=False,
        # One output a request, when it is done, instead of one a step.
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def finished(request_id: str, output: Any) -> dict[str, Any]:
    """A response as the engine gives it; the driver puts EOS right."""
    return {
        "id": request_id,
        "token_ids": list(output.token_ids),
        "finish_reason": str(output.finish_reason),
        "stop_reason": output.stop_reason if isinstance(output.stop_reason, int) else None,
    }


ACTIONS = {"probe": probe, "generate": generate}

if __name__ == "__main__":
    sys.exit(main(sys.argv))
