#!/usr/bin/env python3
"""The vLLM side of generation: one script, started with one JSON path, in vLLM's own environment.

    python vllm_worker.py JOB.json

Of the same shape as trtllm_worker.py: the standard library and `vllm` alone, Python 3.10 to 3.13, actions `probe` and `generate`
(vLLM loads the Hugging Face folder, there is nothing to build), the result file written last. vLLM takes a seed a request.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = 1
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


def write_chunks(job: dict[str, Any], responses: Iterable[dict[str, Any]]) -> int:
    """Write responses in files of job["chunk_rows"], each as soon as it is full; returns their number."""
    folder = Path(job["chunks"])
    chunk: list[str] = []
    num_rows = num_chunks = 0
    for response in responses:
        chunk.append(json.dumps(response) + "\n")
        num_rows += 1
        if len(chunk) == job["chunk_rows"]:
            write_whole(folder / f"chunk_{num_chunks:05d}.jsonl", "".join(chunk))
            chunk, num_chunks = [], num_chunks + 1
    if chunk:
        write_whole(folder / f"chunk_{num_chunks:05d}.jsonl", "".join(chunk))
    return num_rows


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
    """What is installed here, without importing it."""
    try:
        return {"version": version(PACKAGE), "gpus": gpus(), "python": sys.version.split()[0]}
    except PackageNotFoundError:
        raise RuntimeError(f"{PACKAGE} is not installed in {sys.executable}; start the worker in its environment or container") from None


def check_expected(job: dict[str, Any]) -> None:
    """Refuse to run on another version or kind of GPU than the job was made for, before anything is loaded."""
    found = probe(job)
    for name, value in (("version", found["version"]), ("gpu", found["gpus"][0]["name"] if found["gpus"] else "none")):
        if job["expected"][name] != value:
            raise RuntimeError(f"this job expects {name} {job['expected'][name]!r}, here is {value!r}; run build-engine on these machines")


def main(arguments: list[str]) -> int:
    """Do the job and write its result; 0 when it is done."""
    job = json.loads(Path(arguments[1]).read_text(encoding="utf-8"))
    if job["schema"] != SCHEMA:
        raise SystemExit(f"job schema {job['schema']}, this worker knows {SCHEMA}: driver and worker are of different versions")
    # The folder of this script holds modules of ordinary names, which must not stand before installed ones.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    started = time.monotonic()
    try:
        facts = ACTIONS[job["action"]](job)
    except Exception as error:
        failure = {"schema": SCHEMA, "ok": False, "error": f"{type(error).__name__}: {error}"}
        write_whole(Path(job["result"]), json.dumps(failure, indent=2))
        traceback.print_exc()
        return 1
    result = {"schema": SCHEMA, "ok": True, "seconds": time.monotonic() - started, **facts}
    write_whole(Path(job["result"]), json.dumps(result, indent=2))
    return 0


# ---- vLLM


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Answer every request."""
    check_expected(job)
    from vllm import LLM

    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        tensor_parallel_size=job["tensor_parallel"],
        pipeline_parallel_size=job["pipeline_parallel"],
        max_model_len=job["max_seq_len"],
        max_num_seqs=job["max_batch_size"],
        gpu_memory_utilization=job["free_gpu_memory_fraction"],
        # Reused blocks are computed in another batch shape: a prompt's logits would depend on what came before.
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        trust_remote_code=False,
        seed=0,
    )
    return {"rows": write_chunks(job, responses(llm, job)), "row_seeds": True, **probe(job)}


def sampling_parameters(job: dict[str, Any], seed: int) -> Any:
    """One object a request; every EOS id is a stop id, so that the model's own generation config does not matter."""
    from vllm import SamplingParams

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
    )


def responses(llm: Any, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Responses in the order of the requests; vLLM gets job["in_flight"] of them at a time and batches as it likes."""
    requests = read_requests(job)
    for start in range(0, len(requests), job["in_flight"]):
        window = requests[start : start + job["in_flight"]]
        prompts = [{"prompt_token_ids": request["prompt_ids"]} for request in window]
        parameters = [sampling_parameters(job, request["seed"]) for request in window]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        for request, output in zip(window, outputs, strict=True):
            answer = output.outputs[0]
            yield {
                "id": request["id"],
                "token_ids": list(answer.token_ids),
                "finish_reason": str(answer.finish_reason),
                "stop_reason": answer.stop_reason if isinstance(answer.stop_reason, int) else None,
            }


ACTIONS = {"probe": probe, "generate": generate}

if __name__ == "__main__":
    sys.exit(main(sys.argv))
