"""The engine backend's LLM: builds from a Hugging Face folder, saves, and loads an engine folder. Gone from 1.3 on."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from toy_model import weights_mark

from tensorrt_llm import _LINE, BaseLLM, BuildConfig, SamplingParams

if not _LINE.has_engines:
    raise ImportError("the TensorRT backend was removed")


_LIMITS = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")


class LLM(BaseLLM):
    """A model path with rank files is an engine, else a Hugging Face folder to build from."""

    uses_seeds = True

    def __init__(self, **keywords: Any) -> None:
        self._check_keywords("TrtLlmArgs", keywords)
        if keywords["kv_cache_config"].dtype != "auto":
            raise AssertionError("KvCacheConfig.dtype is not supported by the TensorRT backend.")
        if keywords.get("enable_build_cache") or os.environ.get("TLLM_LLMAPI_BUILD_CACHE"):
            raise AssertionError("the library's engine cache is keyed by path: it hands out stale engines")
        self._ranks = keywords["tensor_parallel_size"] * keywords["pipeline_parallel_size"]
        if self._ranks == 1 and os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") != "1":
            raise AssertionError("MPI spawning fails inside a Slurm step")
        self.skip_tokenizer_init = keywords.get("skip_tokenizer_init", False)
        folder = Path(keywords["model"])
        if (folder / "rank0.engine").exists():
            self._load(folder, keywords)
        else:
            self._build(folder, keywords)
        self.mark, self.vocab_size = self._engine["mark"], self._engine["vocab_size"]

    def _load(self, folder: Path, keywords: dict[str, Any]) -> None:
        if "build_config" in keywords:
            raise AssertionError("an engine is not built again")
        self._built = folder
        self._engine = json.loads((folder / "config.json").read_text())
        self._check_limits(keywords, self._engine)
        if self._engine["ranks"] != self._ranks:
            raise ValueError(f"tp_size {self._ranks} is not consistent with the engine's {self._engine['ranks']}")

    def _check_limits(self, keywords: dict[str, Any], built: dict[str, Any]) -> None:
        for name in _LIMITS:
            if keywords.get(name) != built[name]:
                raise ValueError(f"{name} [{keywords.get(name)}] is not equal to build_config.{name} [{built[name]}]")

    def _build(self, folder: Path, keywords: dict[str, Any]) -> None:
        if keywords["dtype"] == "auto":
            raise AssertionError("auto makes float16 of an fp32 checkpoint")
        config: BuildConfig = keywords["build_config"]
        self._check_limits(keywords, vars(config))
        self._engine = {"mark": weights_mark(folder)} | {name: getattr(config, name) for name in _LIMITS}
        self._engine |= {"vocab_size": json.loads((folder / "config.json").read_text())["vocab_size"], "ranks": self._ranks}
        if keywords.get("quant_config") is not None:
            self._calibrate(keywords)
        timings = Path(config.input_timing_cache).read_text() if config.input_timing_cache is not None else ""
        if config.output_timing_cache is not None:
            Path(config.output_timing_cache).write_text(timings + "timed\n")
        self._engine["timings"] = timings
        self._workspace = tempfile.TemporaryDirectory(suffix="-llm-workspace", dir=keywords["workspace"])
        self._built = Path(self._workspace.name)
        for rank in range(self._ranks):
            (self._built / f"rank{rank}.engine").write_text(json.dumps([rank, self._engine["mark"]]))
        (self._built / "config.json").write_text(json.dumps(self._engine))

    def _calibrate(self, keywords: dict[str, Any]) -> None:
        calibration = keywords["calib_config"]
        folder = Path(calibration.calib_dataset)
        known = ("cnn_dailymail", "scienceqa", "science_qa")
        if not folder.is_dir() or any(name in str(folder).lower() for name in known):
            raise AssertionError(f"calibration on {folder} would be a download")
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        self._engine["calibrated_on"] = [row["text"] for row in rows][: calibration.calib_batches]
        self._engine["mark"] += " fp8"

    def check_request(self, num_prompt_tokens: int, _params: SamplingParams) -> None:
        if num_prompt_tokens > self._engine["max_input_len"]:
            raise ValueError(f"prompt length {num_prompt_tokens} exceeds max_input_len {self._engine['max_input_len']}")
        if num_prompt_tokens + (_params.max_tokens or 0) > self._engine["max_seq_len"]:
            raise ValueError(f"prompt length and max_tokens should not exceed max_seq_len ({self._engine['max_seq_len']})")

    def save(self, engine_dir: str) -> None:
        shutil.copytree(self._built, engine_dir, dirs_exist_ok=True)
