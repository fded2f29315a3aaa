"""What of TensorRT-LLM the worker relies on, per release line: class, field, default. Names are facts; the package is not needed.

TensorRT-LLM cannot be imported where there is no GPU, and cannot be installed beside Megatron Core. This table stands in for it: the
tests' double of `tensorrt_llm` accepts what the table lists and refuses the rest, and `differences` reads an installed copy with
`ast`, without importing it, and says where it departs from the table. A default of None means that it does not matter to us.

Read in the releases' own sources, which NVIDIA's documentation of a release shows (branch gh-pages of its repository, VERSION/_modules):
1.2.1 at 58fb435e, all classes but CalibConfig and the default of KvCacheConfig.dtype, and the rules below that name sampling_params.py,
llm_args.py, _check_arguments and _prepare_sampling_params; 1.1.0 at 8660c119, the sampler's fields of TorchLlmArgs; 1.0.0 at 090dc649,
the same and BuildConfig; 1.3.0rc26 at f2bb6484, its page on sampling; the PyTorch sampler's seeds at 2341856e. The rest was read in
copies between releases. No release was installed.

Rules that are no names, and that the double reproduces, each with the upstream place that says so (below tensorrt_llm/):
- `tensorrt_llm.LLM` is the PyTorch one and refuses the engine's fields (build_config, quant_config, calib_config, enable_build_cache,
  workspace); the engine's LLM is `tensorrt_llm._tensorrt_engine.LLM`, gone from 1.3.0rc16 on. llmapi/llm.py,
  _TorchLLM._validate_args_for_torch_backend. Unknown fields are refused by both: llmapi/llm_args.py, BaseLlmArgs.model_config.
- greedy is, before 1.2, top_k in (None, 1) with top_p in (None, 0), whatever the temperature; from 1.2 on all three None, or
  top_k 1, or top_p 0, or temperature 0. Hence all three are always given together. sampling_params.py, SamplingParams._greedy_decoding.
- from 1.2 on 0 <= top_p <= 1; top_k >= 0, 0 is off; temperature >= 0: SamplingParams._validate. Before, 0 as a temperature went to the
  sampler unchecked, so greedy is asked for as top_k 1.
- without a tokenizer end_id must be given: llmapi/llm.py, BaseLLM._prepare_sampling_params. A matched stop_token_id is left out of
  the output unless include_stop_str_in_output.
- engine: prompt + max_tokens beyond max_seq_len is refused; logprobs need gather_generation_logits, prompt_logprobs a build with
  gather_context_logits. PyTorch: a prompt beyond max_num_tokens is refused. llmapi/llm.py, BaseLLM._check_arguments.
- engine: KvCacheConfig.dtype must be "auto": llmapi/llm_args.py, TrtLlmArgs.validate_kv_cache_dtype. Limits of the LLM that differ
  from the built ones are refused in 1.0, later cut with a warning: TrtLlmArgs.validate_build_config_with_runtime_params.
- the library's engine cache is keyed by its version, the build settings and the model's path: llmapi/build_cache.py,
  CachedStage.get_hash_key. TLLM_LLMAPI_BUILD_CACHE in the environment turns it on.
- a calibration folder is read as split "train", column "text", unless its path holds the name of a data set it knows, and its text
  gets the tokenizer's special tokens: quantization/quantize_by_modelopt.py, get_calib_dataloader.
- engines are built in a temporary folder below `workspace`, then copied by save: llmapi/llm.py, BaseLLM.__init__, _TrtLLM.save.
- rank 0 alone writes output_timing_cache: builder.py, build.
- with TLLM_WORKER_USE_SINGLE_PROCESS=1 one GPU's model runs in the calling process, without MPI: executor/executor.py,
  GenerationExecutor.create. What generate_async returns can be awaited and aborted: executor/result.py, GenerationResult.
- the PyTorch sampler ignores a request's seed up to 1.2, and with the FlashInfer that 1.3 pins takes the first row's for all it draws
  together (_torch/pyexecutor/sampler/seed_manager.py); the C++ one ("TRTLLMSampler", always used by engines) takes each. From
  1.3.0rc26 on there is none but the first, and asking for the other is an error: there no setting makes seeds belong to rows.
- a calibrated model is loaded with trust_remote_code (we refuse models that bring code), and as a VILA model where its path says
  "vila": quantization/quantize_by_modelopt.py, get_model.
- trtllm-llmapi-launch splits its command at spaces, and in some releases stops its other ranks only behind a command that succeeded.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

Fields = Mapping[str, str | None]


@dataclass(frozen=True)
class SurfaceClass:
    """A class of TensorRT-LLM: the file below the package that defines it, and field -> default as source text."""

    file: str
    fields: Fields
    bases: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReleaseLine:
    """Releases from `first` (its pre-releases included) to below `below`."""

    first: str
    below: str
    has_engines: bool
    classes: Mapping[str, SurfaceClass]

    def holds(self, version: str) -> bool:
        return Version(f"{self.first}.dev0") <= Version(version) < Version(f"{self.below}.dev0")

    def fields(self, name: str) -> dict[str, str | None]:
        """A class's own and inherited fields."""
        found: dict[str, str | None] = {}
        for base in self.classes[name].bases:
            found |= self.fields(base)
        return found | dict(self.classes[name].fields)


_ARGS = "llmapi/llm_args.py"
_COMMON_ARGS: Fields = {
    "model": None,
    "tokenizer": "None",
    "skip_tokenizer_init": "False",
    "trust_remote_code": "False",
    "tensor_parallel_size": "1",
    "pipeline_parallel_size": "1",
    "dtype": "'auto'",
    "kv_cache_config": None,
    "max_batch_size": None,
    "max_input_len": None,
    "max_seq_len": "None",
    "max_num_tokens": None,
    "gather_generation_logits": "False",
}
_ENGINE_ARGS: Fields = {
    "build_config": None,
    "quant_config": None,
    "calib_config": None,
    "enable_build_cache": "False",
    "workspace": "None",
}
_SAMPLING: Fields = {
    "end_id": "None",
    "pad_id": "None",
    "max_tokens": "32",
    "stop_token_ids": "None",
    "include_stop_str_in_output": "False",
    "top_k": "None",
    "top_p": "None",
    "seed": "None",
    "temperature": "None",
    "logprobs": "None",
    "detokenize": "True",
    "add_special_tokens": "True",
    "ignore_eos": "False",
}
_KV_CACHE: Fields = {"enable_block_reuse": "True", "free_gpu_memory_fraction": None, "max_tokens": "None", "dtype": "'auto'"}
_BUILD: Fields = {
    "max_input_len": "1024",
    "max_seq_len": "None",
    "opt_batch_size": "8",
    "max_batch_size": "2048",
    "max_beam_width": "1",
    "max_num_tokens": "8192",
    "gather_context_logits": "False",
    "gather_generation_logits": None,
    "input_timing_cache": "None",
    "output_timing_cache": None,
}
_QUANT: Fields = {"quant_algo": "None", "kv_cache_quant_algo": "None", "exclude_modules": "None"}
_CALIB: Fields = {
    "calib_dataset": "'cnn_dailymail'",
    "calib_batches": "512",
    "calib_batch_size": "1",
    "calib_max_seq_length": "512",
    "tokenizer_max_seq_length": "2048",
}
_OUTPUT: Fields = {"token_ids": None, "finish_reason": "None", "stop_reason": "None"}


def _line(first: str, below: str, *, has_engines: bool, torch_args: Fields) -> ReleaseLine:
    classes = {
        "BaseLlmArgs": SurfaceClass(_ARGS, _COMMON_ARGS),
        "TorchLlmArgs": SurfaceClass(_ARGS, torch_args, bases=("BaseLlmArgs",)),
        "KvCacheConfig": SurfaceClass(_ARGS, _KV_CACHE),
        "SamplingParams": SurfaceClass("sampling_params.py", _SAMPLING),
        "CompletionOutput": SurfaceClass("executor/result.py", _OUTPUT),
    }
    if has_engines:
        classes |= {
            "TrtLlmArgs": SurfaceClass(_ARGS, _ENGINE_ARGS, bases=("BaseLlmArgs",)),
            "CalibConfig": SurfaceClass(_ARGS, _CALIB),
            "BuildConfig": SurfaceClass("builder.py", _BUILD),
            "QuantConfig": SurfaceClass("models/modeling_utils.py", _QUANT),
        }
    return ReleaseLine(first, below, has_engines, classes)


RELEASE_LINES = (
    # The switch to the C++ sampler, the one that takes a seed a request: a flag, then a name, then gone with that sampler.
    _line("1.0", "1.1", has_engines=True, torch_args={"enable_trtllm_sampler": "False"}),
    _line("1.1", "1.3.0rc16", has_engines=True, torch_args={"sampler_type": "SamplerType.auto"}),
    _line("1.3.0rc16", "1.3.0rc26", has_engines=False, torch_args={"sampler_type": None}),
    _line("1.3.0rc26", "2.0", has_engines=False, torch_args={}),
)


def release_line(version: str) -> ReleaseLine:
    """The line of a version.

    Raises:
        ValueError: no line of the table holds it.
    """
    for line in RELEASE_LINES:
        if line.holds(version):
            return line
    known = ", ".join(f"{line.first} to below {line.below}" for line in RELEASE_LINES)
    raise ValueError(f"TensorRT-LLM {version} is in no line of the table ({known}); extend spin_megatron/generation/trtllm_surface.py.")


def differences(package: Path, version: str) -> list[str]:
    """Where an installed copy departs from the table: a line each, empty when it agrees. The package is read, never imported.

    Args:
        package: the installed tensorrt_llm folder.
    """
    found: list[str] = []
    for name, surface in release_line(version).classes.items():
        path = package / surface.file
        if not path.exists():
            found.append(f"{surface.file} is missing, which should define {name}")
            continue
        fields = _fields_of(ast.parse(path.read_text(encoding="utf-8")), name)
        if fields is None:
            found.append(f"{surface.file} defines no class {name}")
            continue
        for field, expected in surface.fields.items():
            if field not in fields:
                found.append(f"{name}.{field} is gone")
            elif expected is not None and fields[field] != expected:
                found.append(f"{name}.{field} defaults to {fields[field]}, the table says {expected}")
    return found


def _fields_of(tree: ast.Module, name: str) -> dict[str, str | None] | None:
    """Annotated fields of a class with their defaults as source text; None when there is no such class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            statements = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
            return {statement.target.id: _default(statement.value) for statement in statements if isinstance(statement.target, ast.Name)}
    return None


def _default(value: ast.expr | None) -> str | None:
    """The default of a plain, dataclass or pydantic field, as source text; None for a required or computed one."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in ("Field", "PybindMirrorField", "field"):
        chosen = [keyword.value for keyword in value.keywords if keyword.arg == "default"]
        first = chosen or [argument for argument in value.args if not (isinstance(argument, ast.Constant) and argument.value is ...)]
        return ast.unparse(first[0]) if first else None
    return None if value is None else ast.unparse(value)
