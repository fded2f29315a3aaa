"""The engine backend's LLM: builds from a Hugging Face folder, saves, and loads an engine folder. Gone from 1.3 on."""

import json
import os
from pathlib import Path
from typing import Any

from toy_model import weights_mark

from tensorrt_llm import _LINE, BaseLLM, BuildConfig

if not _LINE.has_engines:
    raise ImportError("the TensorRT backend was removed")


class LLM(BaseLLM):
    """A model path with rank files is an engine, else a Hugging Face folder to build from."""

    uses_seeds = True

    def __init__(self, **keywords: Any) -> None:
        self._check_keywords("TrtLlmArgs", keywords)
        if keywords.get("enable_build_cache") or os.environ.get("TLLM_LLMAPI_BUILD_CACHE"):
            raise AssertionError("the library's engine cache is keyed by path: it hands out stale engines")
        self._ranks = keywords["tensor_parallel_size"] * keywords["pipeline_parallel_size"]
        self.skip_tokenizer_init = keywords.get("skip_tokenizer_init", False)
        folder = Path(keywords["model"])
        if (folder / "rank0.engine").exists():
            self._load(folder, keywords)
        else:
            self._build(folder, keywords)
        self.mark, self.vocab_size = self._engine["mark"], self._engine["vocab_size"]
        self.max_input_len, self.max_seq_len = self._engine["max_input_len"], self._engine["max_seq_len"]

    def _load(self, folder: Path, keywords: dict[str, Any]) -> None:
        if "build_config" in keywords:
            raise AssertionError("an engine is not built again")
        self._engine = json.loads((folder / "config.json").read_text())
        if self._engine["ranks"] != self._ranks:
            raise ValueError(f"the engine is for {self._engine['ranks']} ranks, got {self._ranks}")

    def _build(self, folder: Path, keywords: dict[str, Any]) -> None:
        if keywords["dtype"] == "auto":
            raise AssertionError("auto makes float16 of an fp32 checkpoint")
        config: BuildConfig = keywords["build_config"]
        self._engine = {"mark": weights_mark(folder), "max_input_len": config.max_input_len, "max_seq_len": config.max_seq_len}
        self._engine |= {"vocab_size": json.loads((folder / "config.json").read_text())["vocab_size"], "ranks": self._ranks}
        if keywords.get("quant_config") is not None:
            self._calibrate(keywords)
        if config.output_timing_cache and os.sep in config.output_timing_cache:
            Path(config.output_timing_cache).write_text("timings")
        self._engine["timings_reused"] = config.input_timing_cache is not None

    def _calibrate(self, keywords: dict[str, Any]) -> None:
        calibration = keywords["calib_config"]
        folder = Path(calibration.calib_dataset)
        if not folder.is_dir() or "cnn_dailymail" in str(folder):
            raise AssertionError(f"calibration on {folder} would be a download")
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        self._engine["calibrated_on"] = [row["text"] for row in rows][: calibration.calib_batches]
        self._engine["mark"] += " fp8"

    def save(self, engine_dir: str) -> None:
        folder = Path(engine_dir)
        for rank in range(self._ranks):
            (folder / f"rank{rank}.engine").write_text(json.dumps([rank, self._engine["mark"]]))
        (folder / "config.json").write_text(json.dumps(self._engine))
