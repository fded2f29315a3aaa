"""The table of TensorRT-LLM's surface: read from an installed copy without importing it, and kept by the worker and the double."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from spin_megatron.generation import trtllm_surface
from spin_megatron.generation.trtllm_surface import differences, release_line

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(trtllm_surface.__file__).with_name("trtllm_worker.py")
# Each in another style of the real files: dataclass fields, pydantic Field with default, with a factory, and without.
SOURCES = {
    "sampling_params.py": """
        @dataclass(slots=True, kw_only=True)
        class SamplingParams:
            {sampling}
    """,
    "executor/result.py": """
        @dataclass
        class CompletionOutput:
            token_ids: Optional[List[int]] = field(default_factory=list)
            finish_reason: Optional[Literal['stop', 'length']] = None
            stop_reason: Optional[Union[int, str]] = None
    """,
    "llmapi/llm_args.py": """
        class BaseLlmArgs(StrictBaseModel):
            model: Union[str, Path] = Field(description="where")
            kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
            max_batch_size: Optional[int] = Field(default=2048)
            max_input_len: Optional[int] = Field(default=1024)
            max_num_tokens: Optional[int] = Field(default=8192)
            {base}
        class TorchLlmArgs(BaseLlmArgs):
            sampler_type: Union[str, SamplerType] = Field(default=SamplerType.auto)
        class TrtLlmArgs(BaseLlmArgs):
            build_config: Optional[BuildConfig] = None
            quant_config: Optional[QuantConfig] = None
            calib_config: Optional[CalibConfig] = None
            enable_build_cache: Union[BuildCacheConfig, bool] = Field(default=False)
            workspace: Optional[str] = Field(default=None)
        class KvCacheConfig(StrictBaseModel):
            enable_block_reuse: bool = Field(default=True)
            free_gpu_memory_fraction: Optional[float] = Field(default=0.9, ge=0)
            max_tokens: Optional[int] = PybindMirrorField(None)
            dtype: str = Field(default="auto")
        class CalibConfig(StrictBaseModel):
            {calib}
    """,
    "builder.py": """
        class BuildConfig(BaseModel):
            output_timing_cache: str = 'model.cache'
            gather_generation_logits: bool = False
            {build}
    """,
    "models/modeling_utils.py": """
        class QuantConfig:
            quant_algo: Optional[QuantAlgo] = None
            kv_cache_quant_algo: Optional[QuantAlgo] = None
            exclude_modules: Optional[List[str]] = None
    """,
}


def install(folder: Path, version: str = "1.2.1", **changes: str) -> Path:
    """A copy of the package that agrees with the table, but for lines replaced by `changes` (old=new as text)."""
    line = release_line(version)
    fill = {"sampling": "SamplingParams", "base": "BaseLlmArgs", "calib": "CalibConfig", "build": "BuildConfig"}
    for name, template in SOURCES.items():
        text = "\n".join(row[8:] for row in template.splitlines())
        for key, owner in fill.items():
            fields = [f"{field}: Any = {default}" for field, default in line.fields(owner).items() if default is not None]
            text = text.replace(f"{{{key}}}", "\n    ".join(fields))
        for old, new in changes.items():
            text = text.replace(old, new)
        path = folder / "tensorrt_llm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "tensorrt_llm"


def test_a_copy_that_agrees_has_no_differences(tmp_path: Path) -> None:
    assert differences(install(tmp_path), "1.2.1") == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("include_stop_str_in_output", "keep_stop_token", "SamplingParams.include_stop_str_in_output is gone"),
        ("max_tokens: Any = 32", "max_tokens: Any = 16", "SamplingParams.max_tokens defaults to 16, the table says 32"),
        ("Field(default=True)", "Field(default=False)", "KvCacheConfig.enable_block_reuse defaults to False, the table says True"),
        ("class QuantConfig", "class Quantization", "models/modeling_utils.py defines no class QuantConfig"),
    ],
)
def test_a_copy_that_departs_is_told_by_name(old: str, new: str, told: str, tmp_path: Path) -> None:
    assert differences(install(tmp_path, **{old: new}), "1.2.1") == [told]


def test_a_file_that_moved_is_told(tmp_path: Path) -> None:
    package = install(tmp_path)
    (package / "builder.py").unlink()
    assert differences(package, "1.2.1") == ["builder.py is missing, which should define BuildConfig"]


@pytest.mark.parametrize(
    ("version", "first", "has_engines"),
    [
        ("1.0.0rc4", "1.0", True),
        ("1.1.0", "1.1", True),
        ("1.2.1", "1.1", True),
        ("1.3.0rc15", "1.1", True),
        ("1.3.0rc16", "1.3.0rc16", False),
        ("1.3.0rc26.post1", "1.3.0rc26", False),
    ],
)
def test_every_release_has_one_line(version: str, first: str, has_engines: bool) -> None:
    line = release_line(version)
    assert (line.first, line.has_engines) == (first, has_engines)


@pytest.mark.parametrize("version", ["0.21.0", "2.0.0"])
def test_a_release_outside_the_table_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match=f"{version} is in no line of the table"):
        release_line(version)


def test_every_keyword_the_worker_passes_is_in_the_table() -> None:
    # The double refuses the rest at run time; this also covers calls behind branches that no test takes.
    line = release_line("1.2.1")
    owners = {"SamplingParams": ["SamplingParams"], "KvCacheConfig": ["KvCacheConfig"], "BuildConfig": ["BuildConfig"]}
    owners |= {"QuantConfig": ["QuantConfig"], "CalibConfig": ["CalibConfig"], "LLM": ["TrtLlmArgs", "TorchLlmArgs"]}
    seen = set()
    for node in ast.walk(ast.parse(WORKER.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in owners:
            known = {field for owner in owners[node.func.id] for field in line.fields(owner)}
            used = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            assert used <= known, f"{node.func.id} is given {used - known}"
            seen.add(node.func.id)
    assert seen == set(owners)


def test_the_doctor_reads_an_installed_copy_without_importing_it(tmp_path: Path) -> None:
    install(tmp_path, **{"max_tokens: Any = 32": "max_tokens: Any = 16"})
    (tmp_path / "tensorrt_llm" / "__init__.py").write_text("raise ImportError('no GPU here')\n")
    info = tmp_path / "tensorrt_llm-1.2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: 1.2.1\n")
    command = ["env", f"PYTHONPATH={tmp_path}", sys.executable, str(REPOSITORY / "tools" / "doctor.py")]
    result = subprocess.run([*command, "--environment", "trtllm", "--json"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2, result.stderr
    assert "SamplingParams.max_tokens defaults to 16, the table says 32" in result.stdout
    assert "trtllm-engine" in result.stdout


def test_the_doctor_of_a_python_without_packages_says_what_it_needs() -> None:
    command = [sys.executable, "-I", "-S", str(REPOSITORY / "tools" / "doctor.py"), "--environment", "trtllm"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (2, "")
    assert "pip install packaging" in result.stdout
