#!/usr/bin/env python3
"""The TensorRT-LLM side of generation: one script, started with one JSON path, in TensorRT-LLM's own environment.

    python trtllm_worker.py JOB.json

It imports the standard library and `tensorrt_llm`, nothing of this project, and runs on Python 3.10 to 3.12. The job says
what to do (`probe`, `build` or `generate`); the answer is the file job["result"], written last and whole: without it the job
failed, whatever the exit code says (launchers lose exit codes). Responses go to chunk files, each written whole.

Two ways to run a model: "engine", a TensorRT engine that `build` makes (TensorRT-LLM from 1.0, below 1.3), and "torch", its PyTorch
backend, which loads the Hugging Face folder (from 1.0). No log-probabilities are asked of either: training computes its own.
"""

import asyncio
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
PACKAGE = "tensorrt_llm"
POLL_SECONDS = 1.0


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


# ---- TensorRT-LLM


def parallel_arguments(job: dict[str, Any]) -> dict[str, int]:
    """How the model is spread over GPUs."""
    return {"tensor_parallel_size": job["tensor_parallel"], "pipeline_parallel_size": job["pipeline_parallel"]}


def limits(job: dict[str, Any]) -> dict[str, int]:
    """What the engine is sized for. Given to the LLM as to the build, since releases refuse, cut or keep runtime limits that differ."""
    return {name: job[name] for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")}


def kv_cache_config(job: dict[str, Any]) -> Any:
    """Block reuse off: it changes the first token's logits between the first and later equal prompts (issue 15503 upstream)."""
    from tensorrt_llm.llmapi import KvCacheConfig

    return KvCacheConfig(enable_block_reuse=False, free_gpu_memory_fraction=job["free_gpu_memory_fraction"])


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Make the TensorRT engine of job["model"] in job["engine"]."""
    check_expected(job)
    # Upstream's own cache is keyed by the model's path: it would hand out the engine of an earlier iteration. An image may turn it on.
    for name in ("TLLM_LLMAPI_BUILD_CACHE", "TLLM_LLMAPI_BUILD_CACHE_ROOT"):
        os.environ.pop(name, None)
    from tensorrt_llm import BuildConfig
    from tensorrt_llm._tensorrt_engine import LLM

    build_config = BuildConfig(
        **limits(job),
        # The engine is kept full, so kernels are chosen for that; the default of 8 may even exceed the limit.
        opt_batch_size=job["max_batch_size"],
        # Timings of kernels, not of weights: safe to reuse from one iteration to the next.
        input_timing_cache=job["timing_cache"]["input"],
        output_timing_cache=job["timing_cache"]["output"],
    )
    llm = LLM(
        model=job["model"],
        # The engine is asked for token ids; calibration brings its own tokenizer. An older transformers may not know the folder's.
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        build_config=build_config,
        enable_build_cache=False,
        # Every rank writes its engine here first: a folder that all of them see, where /tmp is of one node and may be small.
        workspace=job["workspace"],
        kv_cache_config=kv_cache_config(job),
        **limits(job),
        **parallel_arguments(job),
        **quantization_arguments(job),
    )
    try:
        llm.save(job["engine"])
    finally:
        llm.shutdown()
    return probe(job)


def quantization_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """FP8 weights, activations and KV cache, calibrated on this run's own prompts."""
    if job["quantization"] == "none":
        return {}
    from tensorrt_llm.llmapi import CalibConfig, QuantAlgo, QuantConfig

    return {
        "quant_config": QuantConfig(quant_algo=QuantAlgo.FP8, kv_cache_quant_algo=QuantAlgo.FP8),
        # The default data set is a download; a local folder is read as split "train", column "text".
        "calib_config": CalibConfig(
            calib_dataset=job["calibration"],
            calib_batches=job["calibration_prompts"],
            calib_batch_size=1,
            calib_max_seq_length=job["max_input_len"],
            tokenizer_max_seq_length=job["max_input_len"],
        ),
    }


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Answer every request; the engine is kept full by a window of requests in flight."""
    check_expected(job)
    llm, facts = open_engine(job) if job["mode"] == "engine" else open_torch(job)
    try:
        chunks = asyncio.run(answer_all(llm, job))
    finally:
        llm.shutdown()
    return {**chunks.facts(), **facts, **probe(job)}


def open_engine(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load a built engine. Its sampler is the C++ one, which takes a seed a request."""
    from tensorrt_llm._tensorrt_engine import LLM

    num_ranks = job["tensor_parallel"] * job["pipeline_parallel"]
    missing = [rank for rank in range(num_ranks) if not (Path(job["engine"]) / f"rank{rank}.engine").exists()]
    if missing:
        raise RuntimeError(f"{job['engine']} lacks the engine files of ranks {missing}; run build-engine again")
    arguments = {"skip_tokenizer_init": True, "kv_cache_config": kv_cache_config(job)}
    llm = LLM(model=job["engine"], **arguments, **limits(job), **parallel_arguments(job))
    return llm, {"row_seeds": True}


def open_torch(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load the Hugging Face folder into the PyTorch backend, with the sampler that takes a seed a request where there is one."""
    from tensorrt_llm import LLM

    sampler, row_seeds = sampler_arguments()
    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        kv_cache_config=kv_cache_config(job),
        **limits(job),
        **parallel_arguments(job),
        **sampler,
    )
    return llm, {"row_seeds": row_seeds}


def sampler_arguments() -> tuple[dict[str, Any], bool]:
    """The keyword that chooses the C++ sampler in this release, and whether a request's seed will count.

    The PyTorch sampler draws from one generator for the whole batch and ignores seeds, and is the only one from 1.3.0rc26 on.
    """
    from tensorrt_llm.llmapi import TorchLlmArgs

    fields = getattr(TorchLlmArgs, "model_fields", {})
    for name, value in (("sampler_type", "TRTLLMSampler"), ("enable_trtllm_sampler", True), ("use_torch_sampler", False)):
        if name in fields:
            return {name: value}, True
    return {}, False


def sampling_parameters(job: dict[str, Any], seed: int) -> Any:
    """One object a request. temperature, top_k and top_p always together: what alone is greedy changed in 1.2."""
    from tensorrt_llm import SamplingParams

    sampling = job["sampling"]
    # Greedy as "sample from the one best": the same in every release, while temperature 0 is refused before 1.2.
    drawn = {"temperature": sampling["temperature"], "top_k": sampling["top_k"], "top_p": sampling["top_p"]}
    chosen = drawn if sampling["temperature"] > 0 else {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    first, *others = sampling["eos_ids"]
    return SamplingParams(
        **chosen,
        seed=seed,
        max_tokens=sampling["max_new_tokens"],
        end_id=first,
        pad_id=first,
        stop_token_ids=others or None,
        include_stop_str_in_output=True,
        detokenize=False,
        add_special_tokens=False,
    )


async def answer_all(llm: Any, job: dict[str, Any]) -> Chunks:
    """Keep job["in_flight"] requests in the engine until all are answered or a stop is asked for; each is taken out when it is done."""
    chunks, requests, stop = Chunks(job), iter(read_requests(job)), Path(job["stop"])

    async def answer_some() -> None:
        for request in requests:
            chunks.in_flight(+1)
            answer = llm.generate_async({"prompt_token_ids": request["prompt_ids"]}, sampling_parameters(job, request["seed"]))
            try:
                output = await answer
            except asyncio.CancelledError:
                answer.abort()
                raise
            chunks.in_flight(-1)
            chunks.add(finished(request["id"], output.outputs[0]))

    answering = asyncio.gather(*(answer_some() for _ in range(job["in_flight"])))
    try:
        while not answering.done() and not stop.exists():
            await asyncio.wait([answering], timeout=POLL_SECONDS)
        if answering.done():
            answering.result()
    finally:
        answering.cancel()
        chunks.write()
    return chunks


def finished(request_id: str, output: Any) -> dict[str, Any]:
    """A response as the engine gives it; the driver puts EOS right."""
    return {
        "id": request_id,
        "token_ids": list(output.token_ids),
        "finish_reason": str(output.finish_reason),
        "stop_reason": output.stop_reason if isinstance(output.stop_reason, int) else None,
    }


ACTIONS = {"probe": probe, "build": build, "generate": generate}

if __name__ == "__main__":
    sys.exit(main(sys.argv))
