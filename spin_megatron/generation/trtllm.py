"""Engines "trtllm-engine" and "trtllm-torch": TensorRT-LLM on GPUs, through trtllm_worker.py.

trtllm-engine builds a real TensorRT engine from each theta_t (TensorRT-LLM from 1.0, below 1.3: later releases removed that path);
trtllm-torch loads the Hugging Face folder into TensorRT-LLM's PyTorch backend (from 1.0). One process a build, one a shard.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version

from spin_megatron.generation.built import CACHE_OPTION, WORK_NAME, build_once, engine_identity, require_identity
from spin_megatron.generation.engine import Engine, EngineSpec, Environment, Provider
from spin_megatron.generation.external import ExternalEngine, Worker, WorkerCommand
from spin_megatron.generation.replica import (
    RUN_OPTIONS,
    Probed,
    ReplicaOptions,
    check_model,
    longest_prompt,
    probe,
    read_options,
    replica_gpus,
    replica_job,
    with_tensor_parallel,
)
from spin_megatron.run.manifest import atomic_path, digest_values, write_text
from spin_megatron.run.records import PromptRow, read_all

Mode = Literal["engine", "torch"]
FIRST_VERSION, FIRST_WITHOUT_ENGINES = Version("1.0.0rc0"), Version("1.3.0rc16")
PACKAGE = "tensorrt_llm"
_SCRIPT = Path(__file__).with_name("trtllm_worker.py")
# Ties the ranks that a launcher started into one engine; rank 0 runs the script, the others serve it.
_STARTER = ("trtllm-llmapi-launch",)
# With one GPU the model runs in the worker's own process: MPI spawning fails inside a Slurm step.
_SINGLE_PROCESS = "TLLM_WORKER_USE_SINGLE_PROCESS=1"
# A calibration folder whose path holds one of these is taken for a data set of the hub (quantize_by_modelopt.get_calib_dataloader).
_HUB_NAMES = ("cnn_dailymail", "scienceqa", "science_qa")
# A model whose path holds one of these is calibrated as that model, whatever it is (quantize_by_modelopt.get_model).
_MODEL_NAMES = ("vila", "llava-onevision-qwen2")


@dataclass(frozen=True)
class TrtllmOptions(ReplicaOptions):
    """[generate.options] of the two engines.

    quantization: "none" or "fp8" (trtllm-engine), calibrated on calibration_prompts of this run's own prompts.
    max_num_tokens: tokens the engine computes in one step. cache: folder of engines by identity, and of kernel timings.
    """

    quantization: str = "none"
    calibration_prompts: int = 512
    max_num_tokens: int = 8192
    cache: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("quantization", self.quantization in ("none", "fp8"), "'none' or 'fp8'")
        self.require("calibration_prompts", self.calibration_prompts >= 1, "at least 1")
        self.require("max_num_tokens", self.max_num_tokens >= 1, "at least 1")


@dataclass(frozen=True)
class Trtllm:
    """One of the two engines: its build and load."""

    name: str
    mode: Mode

    def build(self, spec: EngineSpec, folder: Path) -> dict[str, Any]:
        """Ask the environment what it is, then build an engine there, or take an equal one from the cache.

        Raises:
            ValueError: options, release, GPU or dtype do not fit; WorkerFailed: the build failed.
        """
        options, probed, identity = self._identity(spec, folder / WORK_NAME / "probe")
        make: Callable[[Path], None] = self._engine_builder(spec, options, probed) if self.mode == "engine" else lambda _folder: None
        started = time.monotonic()
        from_cache = build_once(spec, folder, identity, make)
        facts = {"needs_build": self.mode == "engine", "from_cache": from_cache, "build_seconds": time.monotonic() - started}
        return {**facts, **identity, "python": probed.python, "gpus": list(probed.gpus), "options": asdict(options)}

    def load(self, spec: EngineSpec, folder: Path, work: Path) -> Engine:
        """An engine that starts its worker when it is asked to answer; refuses one of other weights, settings, release or GPU."""
        options, probed, identity = self._identity(spec, work / "probe")
        require_identity(folder, identity)
        job = self._job(spec, options, probed) | {"mode": self.mode, "engine": str(folder.resolve())}
        return ExternalEngine(self.name, _command(spec, options), job, spec, work)

    def examine(self, options: Mapping[str, Any], environment: Environment, folder: Path) -> str:
        """See Provider.examine."""
        self._read_options(options)
        probed = probe(environment, _SCRIPT, folder)
        self._check_release(probed)
        return f"TensorRT-LLM {probed}"

    def gpus(self, spec: EngineSpec, gpu: str) -> int:
        """See Provider.gpus."""
        return replica_gpus(self._read_options(spec.options), spec, gpu)

    def _read_options(self, given: Mapping[str, Any]) -> TrtllmOptions:
        options = read_options(TrtllmOptions, given, self.name)
        if self.mode == "torch" and options.quantization != "none":
            raise ValueError(f"generate.options.quantization is of engine 'trtllm-engine' alone; leave it out for {self.name!r}.")
        return options

    def _check_release(self, probed: Probed) -> None:
        found = Version(probed.version)
        if found < FIRST_VERSION or (self.mode == "engine" and found >= FIRST_WITHOUT_ENGINES):
            wanted = f">={FIRST_VERSION}" + (f",<{FIRST_WITHOUT_ENGINES}" if self.mode == "engine" else "")
            raise ValueError(
                f"engine {self.name!r} needs {PACKAGE}{wanted}, but [generate.environment] starts one with {found}; "
                "use a container of 1.2.1, or engine 'trtllm-torch', which later releases have."
            )

    def _identity(self, spec: EngineSpec, probe_folder: Path) -> tuple[TrtllmOptions, Probed, dict[str, Any]]:
        """What the worker finds where it runs, the options that follow, and what an engine made there from this spec is."""
        options = self._read_options(spec.options)
        # The engine is built in bfloat16: left to itself the converter makes float16 of an fp32 checkpoint.
        shape = check_model(spec, self.name, dtypes=("bfloat16",))
        probed = probe(spec.environment, _SCRIPT, probe_folder)
        self._check_release(probed)
        if not probed.gpus:
            raise ValueError(f"engine {self.name!r} needs a GPU, and nvidia-smi shows none where [generate.environment] runs.")
        options = with_tensor_parallel(options, spec, shape, probed)
        # A built engine has limits, which follow from the data, and so do its scales with fp8.
        from_data: dict[str, Any] = {"max_input_len": longest_prompt(spec), "options.tensor_parallel": options.tensor_parallel}
        if self.mode == "engine":
            from_data["max_batch_size"] = spec.batch_size
        if options.quantization != "none":
            from_data["calibration"] = digest_values([row.prompt_ids for row in _calibration_rows(spec, options)])
        runtime = probed.runtime(PACKAGE) | from_data
        return options, probed, engine_identity(spec, engine=self.name, runtime=runtime, run_options=RUN_OPTIONS)

    def _job(self, spec: EngineSpec, options: TrtllmOptions, probed: Probed) -> dict[str, Any]:
        job = replica_job(spec, options, probed)
        return job | {"max_num_tokens": max(options.max_num_tokens, job["max_input_len"])}

    def _engine_builder(self, spec: EngineSpec, options: TrtllmOptions, probed: Probed) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            work = (folder / WORK_NAME).resolve()
            job = self._job(spec, options, probed) | {"action": "build", "engine": str(folder.resolve()), "workspace": str(work)}
            job |= {"quantization": options.quantization, "calibration_prompts": options.calibration_prompts, "calibration": None}
            if options.quantization != "none":
                job["calibration"] = str(_write_calibration(spec, options, work / "calibration"))
            timings, kept = work / "timing.cache", _timing_cache(spec, probed)
            job["timing_cache"] = {"input": str(kept) if kept is not None and kept.exists() else None, "output": str(timings)}
            Worker(_command(spec, options), job, work / "build").wait()
            missing = [rank for rank in range(options.ranks) if not (folder / f"rank{rank}.engine").exists()]
            if missing:
                raise RuntimeError(f"the build left no engine for ranks {missing} in {folder}; see its log in {work}")
            if kept is not None and timings.exists():
                with atomic_path(kept) as aside:
                    shutil.copyfile(timings, aside)

        return make


def _command(spec: EngineSpec, options: TrtllmOptions) -> WorkerCommand:
    """One process for one GPU; for more, ranks under the launcher, or, without one, ranks that TensorRT-LLM spawns itself."""
    starter = _STARTER if options.ranks > 1 and spec.environment.launcher else ()
    settings = (_SINGLE_PROCESS,) if options.ranks == 1 else ()
    ranks = options.ranks if starter else 1
    return WorkerCommand(spec.environment, _SCRIPT, ranks, starter, settings, options.no_progress_seconds)


def _timing_cache(spec: EngineSpec, probed: Probed) -> Path | None:
    """Where kernel timings are kept from one iteration to the next: beside the engine cache, one a release and GPU."""
    root = spec.options.get(CACHE_OPTION)
    if not root:
        return None
    folder = Path(str(root)).resolve() / "timing"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest_values(probed.runtime(PACKAGE))}.cache"


def _calibration_rows(spec: EngineSpec, options: TrtllmOptions) -> list[PromptRow]:
    rows = read_all(spec.prompt_files, PromptRow, range(options.calibration_prompts))
    if not rows:
        raise ValueError('there are no prompts to calibrate fp8 on; set generate.options.quantization = "none".')
    return rows


def _write_calibration(spec: EngineSpec, options: TrtllmOptions, folder: Path) -> Path:
    """The run's own prompts as a data set that TensorRT-LLM calibrates on: split train, column text.

    It tokenizes the text with the model's tokenizer; a BOS that this adds is left out of the text.

    Raises:
        ValueError: a path would be taken for another model or a data set of the hub, or transformers is not installed.
    """
    other = [name for name in _MODEL_NAMES if name in str(spec.model.resolve())]
    if other:
        raise ValueError(f"TensorRT-LLM calibrates {spec.model} as a {other[0]!r} model, for its path; move it to one without that word.")
    named = [name for name in _HUB_NAMES if name in str(folder).lower()]
    if named:
        raise ValueError(f"TensorRT-LLM takes {folder} for the hub's {named[0]!r}; move the run to a path without that word.")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(
            'fp8 calibration needs transformers in the Python that runs build-engine; install it, or quantize "none".'
        ) from None

    tokenizer = AutoTokenizer.from_pretrained(spec.model, local_files_only=True, trust_remote_code=False)
    added = tuple(tokenizer("").input_ids[:1]) if tokenizer.bos_token_id is not None else ()
    lines = []
    for row in _calibration_rows(spec, options):
        ids = row.prompt_ids[1:] if added == (tokenizer.bos_token_id,) == row.prompt_ids[:1] else row.prompt_ids
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        lines.append(json.dumps({"text": text}) + "\n")
    write_text(folder / "train.jsonl", "".join(lines))
    return folder


_ENGINE, _TORCH = Trtllm("trtllm-engine", "engine"), Trtllm("trtllm-torch", "torch")
ENGINE = Provider(_ENGINE.build, _ENGINE.load, _ENGINE.examine, _ENGINE.gpus)
TORCH = Provider(_TORCH.build, _TORCH.load, _TORCH.examine, _TORCH.gpus)
