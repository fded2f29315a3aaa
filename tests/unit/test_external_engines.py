"""The TensorRT-LLM and vLLM engines, driver and worker script, against strict doubles of their packages (tests/doubles).

Nothing here shows that the real packages work; it shows that what we call is what the table says, and that everything around
the call holds: options, identity, cache, seeds, EOS, refusals, crashes, resuming.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_megatron.generation import external
from spin_megatron.generation.engine import EngineSpec, Prompt, Sampling, provider
from spin_megatron.generation.external import normalised, worker_words
from spin_megatron.run.records import GeneratedRow, PromptRow, write_rows
from spin_megatron.run.seeds import row_seed
from tests.doubles.toy_model import answer, weights_mark
from tests.tiny_tokenizer import save_tiny_tokenizer
from tests.unit.tiny_models import TINY, write_model

DOUBLES = Path(__file__).parents[1] / "doubles"
GENERATION = Path(external.__file__).parent
EOS = (2, 3)
SAMPLED = Sampling(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=12, eos_ids=EOS)
GREEDY = replace(SAMPLED, temperature=0.0)
GPU_LINE = "NVIDIA H100 80GB HBM3, 9.0, 580.65"
ENGINES = ("trtllm-engine", "trtllm-torch", "vllm")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "theta", TINY, dtype=torch.float32)
    save_tiny_tokenizer(tmp_path / "theta")
    return tmp_path / "theta"


@pytest.fixture
def site(tmp_path: Path) -> "Site":
    return Site(tmp_path / "site")


class Site:
    """An environment to run workers in: the doubles, installed as some version, and an nvidia-smi that shows one GPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        self.gpu(GPU_LINE)
        self.install("tensorrt_llm", "1.2.1")
        self.install("vllm", "0.11.0")

    def gpu(self, line: str) -> None:
        script = self.folder / "bin" / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho '{line}'\n" if line else "#!/bin/sh\nexit 9\n")
        script.chmod(0o755)

    def install(self, package: str, version: str) -> None:
        for old in self.folder.glob(f"{package}-*.dist-info"):
            (old / "METADATA").unlink()
            old.rmdir()
        info = self.folder / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")

    def command(self, *settings: str) -> str:
        path = f"PATH={self.folder / 'bin'}:/usr/bin:/bin"
        return " ".join(["env", path, f"PYTHONPATH={DOUBLES}:{self.folder}", *settings, sys.executable])


def make_prompts(count: int = 13) -> list[Prompt]:
    prompts = [tuple(4 + (37 * i + j) % 200 for j in range(1 + i)) for i in range(count)]
    return [Prompt(f"ex-{i}", ids, row_seed(1, "generate", 0, f"ex-{i}")) for i, ids in enumerate(prompts)]


def make_spec(model: Path, site: Site, name: str = "trtllm-engine", **options: Any) -> EngineSpec:
    prompt_file = model.parent / "prompts.parquet"
    write_rows(prompt_file, [PromptRow(prompt.example_id, prompt.token_ids, (5, 2), False) for prompt in make_prompts()], PromptRow)
    dtype = "float32" if name == "vllm" else "bfloat16"
    chosen = {"command": site.command(), **options}
    return EngineSpec(model, dtype, 4, max_prompt_tokens=20, max_new_tokens=12, options=chosen, prompt_files=(prompt_file,))


def by_id(rows: Iterator[GeneratedRow]) -> dict[str, GeneratedRow]:
    return {row.example_id: row for row in rows}


def answers(name: str, spec: EngineSpec, work: Path, sampling: Sampling, prompts: Sequence[Prompt]) -> dict[str, GeneratedRow]:
    """Build and generate, as the two stages do."""
    folder = work / "engine"
    provider(name).build(spec, folder)
    with closing(provider(name).load(spec, folder, work / "work")) as engine:
        return by_id(engine.generate(prompts, sampling))


def expected(model: Path, prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, GeneratedRow]:
    rows = {}
    for prompt in prompts:
        seed = prompt.seed if sampling.temperature else None
        limits = {"vocab_size": TINY.vocab_size, "eos_ids": EOS, "max_tokens": sampling.max_new_tokens}
        tokens, ended_by = answer(weights_mark(model), prompt.token_ids, seed=seed, **limits)
        rows[prompt.example_id] = GeneratedRow(prompt.example_id, tuple(tokens), "length" if ended_by is None else "stop", prompt.seed)
    return rows


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_every_row_has_its_seed_s_answer_with_eos_exactly_where_it_stopped(
    name: str, sampling: Sampling, model: Path, site: Site, tmp_path: Path
) -> None:
    prompts = make_prompts()
    rows = answers(name, make_spec(model, site, name), tmp_path, sampling, prompts)
    wanted = expected(model, prompts, sampling)
    assert rows == wanted
    assert {row.finish_reason for row in wanted.values()} == {"stop", "length"}
    assert {row.token_ids[-1] for row in wanted.values() if row.finish_reason == "stop"} == set(EOS)


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.1", "1.2.0rc4"])
@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_the_engine_gives_the_same_answers_on_every_release_line_that_has_it(
    version: str, sampling: Sampling, model: Path, site: Site, tmp_path: Path
) -> None:
    site.install("tensorrt_llm", version)
    assert answers("trtllm-engine", make_spec(model, site), tmp_path, sampling, make_prompts()) == expected(model, make_prompts(), sampling)


def test_the_engine_needs_a_release_that_still_builds_engines(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site)
    for version in ("1.3.0", "1.3.0rc21", "0.21.0"):
        site.install("tensorrt_llm", version)
        with pytest.raises(ValueError, match=rf"trtllm-engine.*{version}.*trtllm-torch"):
            provider("trtllm-engine").build(spec, tmp_path / "engine")
    site.install("tensorrt_llm", "1.3.0rc21")
    assert answers("trtllm-torch", make_spec(model, site), tmp_path / "torch", GREEDY, make_prompts()) == expected(
        model, make_prompts(), GREEDY
    )


def test_a_release_whose_sampler_takes_no_seeds_is_told(model: Path, site: Site, tmp_path: Path) -> None:
    site.install("tensorrt_llm", "1.0.0")
    spec = make_spec(model, site, "trtllm-torch")
    provider("trtllm-torch").build(spec, tmp_path / "engine")
    with closing(provider("trtllm-torch").load(spec, tmp_path / "engine", tmp_path / "work")) as engine:
        list(engine.generate(make_prompts(), SAMPLED))
        assert engine.describe()["row_seeds"] is False


def test_what_ran_is_told(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site)
    facts = provider("trtllm-engine").build(spec, tmp_path / "engine")
    assert (facts["engine"], facts["tensorrt_llm"], facts["gpu"]) == ("trtllm-engine", "1.2.1", "NVIDIA H100 80GB HBM3")
    assert (facts["compute_capability"], facts["max_input_len"], facts["from_cache"]) == ("9.0", "13", False)
    with closing(provider("trtllm-engine").load(spec, tmp_path / "engine", tmp_path / "work")) as engine:
        list(engine.generate(make_prompts(), GREEDY))
        told = engine.describe()
    assert (told["engine"], told["version"], told["row_seeds"]) == ("trtllm-engine", "1.2.1", True)


def test_the_engine_s_limits_are_those_of_the_data(model: Path, site: Site, tmp_path: Path) -> None:
    provider("trtllm-engine").build(make_spec(model, site), tmp_path / "engine")
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert (config["max_input_len"], config["max_seq_len"]) == (13, 25)  # the longest prompt has 13 tokens, the cap is 20


def test_an_engine_is_built_from_each_iteration_s_weights(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, cache=str(tmp_path / "cache"))
    first = answers("trtllm-engine", spec, tmp_path / "a", GREEDY, make_prompts())
    write_model(model, TINY, dtype=torch.float32, seed=8)
    with pytest.raises(ValueError, match="weights: built with"):
        provider("trtllm-engine").load(spec, tmp_path / "a" / "engine", tmp_path / "work")
    second = answers("trtllm-engine", spec, tmp_path / "b", GREEDY, make_prompts())
    assert second == expected(model, make_prompts(), GREEDY) != first


def test_equal_weights_come_from_the_cache_and_timings_are_reused(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, cache=str(tmp_path / "cache"))
    engine = provider("trtllm-engine")
    assert not engine.build(spec, tmp_path / "a")["from_cache"]
    assert engine.build(spec, tmp_path / "b")["from_cache"]
    assert (tmp_path / "b" / "rank0.engine").exists()
    assert not (tmp_path / "b" / "work" / "build").exists()
    write_model(model, TINY, dtype=torch.float32, seed=8)
    engine.build(spec, tmp_path / "c")
    reused = [json.loads((tmp_path / name / "config.json").read_text())["timings_reused"] for name in ("a", "c")]
    assert reused == [False, True]


@pytest.mark.parametrize("change", ["version", "gpu"])
def test_shards_refuse_an_engine_of_another_release_or_gpu(change: str, model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site)
    provider("trtllm-engine").build(spec, tmp_path / "engine")
    if change == "version":
        site.install("tensorrt_llm", "1.2.0")
    else:
        site.gpu("NVIDIA A100-SXM4-80GB, 8.0, 580.65")
    with pytest.raises(ValueError, match="tensorrt_llm: built with '1.2.1'" if change == "version" else "gpu: built with 'NVIDIA H100"):
        provider("trtllm-engine").load(spec, tmp_path / "engine", tmp_path / "work")


def test_fp8_is_calibrated_on_the_run_s_own_prompts(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, quantization="fp8", calibration_prompts=3)
    provider("trtllm-engine").build(spec, tmp_path / "engine")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = json.loads((tmp_path / "engine" / "config.json").read_text())["calibrated_on"]
    assert texts == [tokenizer.decode(prompt.token_ids, skip_special_tokens=False) for prompt in make_prompts()[:3]]


@pytest.mark.parametrize("name", ["trtllm-engine", "trtllm-torch"])
def test_a_crash_in_the_middle_keeps_the_chunks_and_the_rest_is_answered_once(name: str, model: Path, site: Site, tmp_path: Path) -> None:
    prompts, spec = make_prompts(), make_spec(model, site, name)
    provider(name).build(spec, tmp_path / "engine")
    crashing = replace(spec, options={**spec.options, "command": site.command("DOUBLE_CRASH_AFTER=9")})
    got: list[GeneratedRow] = []
    crash = pytest.raises(RuntimeError, match=r"left no result \(exit code 9\)")
    with closing(provider(name).load(crashing, tmp_path / "engine", tmp_path / "work")) as engine, crash:
        got.extend(engine.generate(prompts, SAMPLED))
    assert len(got) == 8
    with closing(provider(name).load(spec, tmp_path / "engine", tmp_path / "work")) as engine:
        rows = by_id(engine.generate(prompts, SAMPLED))
    assert rows == expected(model, prompts, SAMPLED)
    requests = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "work").glob("attempt_*/requests.jsonl"))]
    assert requests == [13, 13 - 8]  # two chunks of four were whole


def test_a_worker_that_shows_no_progress_is_ended(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, "trtllm-torch")
    provider("trtllm-torch").build(spec, tmp_path / "engine")
    sleeper = tmp_path / "sleeper.sh"
    sleeper.write_text(f'#!/bin/sh\ncase "$(cat "$2")" in *generate*) sleep 600;; *) exec {site.command()} "$@";; esac\n')
    sleeper.chmod(0o755)
    stuck = replace(spec, options={**spec.options, "command": str(sleeper), "no_progress_seconds": 8})
    ended = pytest.raises(RuntimeError, match="showed no progress for 8 s")
    with closing(provider("trtllm-torch").load(stuck, tmp_path / "engine", tmp_path / "work")) as engine, ended:
        list(engine.generate(make_prompts(), SAMPLED))


def test_a_stop_in_the_middle_ends_the_worker(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, "trtllm-torch")
    provider("trtllm-torch").build(spec, tmp_path / "engine")
    engine: Any = provider("trtllm-torch").load(spec, tmp_path / "engine", tmp_path / "work")
    next(engine.generate(make_prompts(), SAMPLED))
    engine.close()
    assert engine._worker._process.poll() is not None


@pytest.mark.parametrize("name", ENGINES)
def test_a_package_that_is_not_there_is_named(name: str, model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, name, command=f"env PATH=/usr/bin:/bin PYTHONPATH= {sys.executable} -S")
    package = "vllm" if name == "vllm" else "tensorrt_llm"
    with pytest.raises(RuntimeError, match=f"{package} is not installed"):
        provider(name).build(spec, tmp_path / "engine")


@pytest.mark.parametrize("name", ["trtllm-engine", "trtllm-torch"])
def test_a_machine_without_a_gpu_is_refused(name: str, model: Path, site: Site, tmp_path: Path) -> None:
    site.gpu("")
    with pytest.raises(ValueError, match="nvidia-smi shows none"):
        provider(name).build(make_spec(model, site, name), tmp_path / "engine")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel=0"),
        ({"tensor_parallel": 2.5}, "tensor_parallel=2.5.*of type int"),
        ({"quantization": "int4"}, "quantization='int4'.*'none' or 'fp8'"),
        ({"free_gpu_memory_fraction": 1.0}, "between 0 and 1"),
        ({"comand": "python3"}, "comand"),
        ({"command": "python3 'unfinished"}, "no command line"),
        ({"command": "srun -n {gpus} python3"}, "{ranks} is its one placeholder"),
        ({"in_flight": True}, "of type int"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], words: str, model: Path, site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        provider("trtllm-engine").build(make_spec(model, site, **options), tmp_path / "engine")


def test_a_dtype_the_engine_is_not_built_in_is_refused(model: Path, site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generate\.dtype=float32"):
        provider("trtllm-engine").build(replace(make_spec(model, site), dtype="float32"), tmp_path / "engine")


def test_several_gpus_start_through_srun_and_the_launcher() -> None:
    words = worker_words("srun --mpi=pmix --ntasks={ranks} trtllm-llmapi-launch python3", ranks=4, option="command")
    assert words == ("srun", "--mpi=pmix", "--ntasks=4", "trtllm-llmapi-launch", "python3")
    assert worker_words("env 'A=b c' python3", ranks=1, option="command") == ("env", "A=b c", "python3")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (([5, 6, 2], "stop", None), ((5, 6, 2), "stop")),
        (([5, 6], "stop", None), ((5, 6, 2), "stop")),  # the engine leaves end_id out
        (([5, 6], "stop", 3), ((5, 6, 3), "stop")),  # or the stop id, which it names
        (([5, 2, 7, 7], "length", None), ((5, 2), "stop")),  # or runs on behind EOS
        (([5, 6, 7, 8], "length", None), ((5, 6, 7, 8), "length")),
        (([5, 6, 7, 3], "length", None), ((5, 6, 7, 3), "stop")),
        (([], "stop", None), ((2,), "stop")),
    ],
)
def test_eos_is_put_right(given: tuple[list[int], str, int | None], wanted: tuple[tuple[int, ...], str]) -> None:
    assert normalised(*given, replace(SAMPLED, max_new_tokens=4)) == wanted


@pytest.mark.parametrize(
    ("given", "words"),
    [(([5], "timeout", None), "timeout"), (([5] * 5, "length", None), "at most 4"), (([5], "length", None), "1 tokens without EOS")],
)
def test_a_response_that_breaks_the_rules_is_refused(given: tuple[list[int], str, int | None], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        normalised(*given, replace(SAMPLED, max_new_tokens=4))


def test_unknown_token_ids_of_an_engine_are_refused(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, "trtllm-torch")
    provider("trtllm-torch").build(spec, tmp_path / "engine")
    chunks = tmp_path / "work" / "attempt_0" / "chunks"
    chunks.mkdir(parents=True)
    response = {"id": "ex-0", "token_ids": [5, TINY.vocab_size], "finish_reason": "length", "stop_reason": None}
    (chunks / "chunk_00000.jsonl").write_text(json.dumps(response) + "\n")
    refused = pytest.raises(ValueError, match=r"ex-0 an unusable response.*259.* outside the vocabulary")
    with closing(provider("trtllm-torch").load(spec, tmp_path / "engine", tmp_path / "work")) as engine, refused:
        list(engine.generate(make_prompts(), GREEDY))


def test_a_request_no_engine_can_answer_is_refused_before_a_worker_starts(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, "trtllm-torch")
    provider("trtllm-torch").build(spec, tmp_path / "engine")
    with closing(provider("trtllm-torch").load(spec, tmp_path / "engine", tmp_path / "work")) as engine:
        with pytest.raises(ValueError, match="outside the model's vocabulary"):
            engine.generate([Prompt("broken", (999,), 1)], GREEDY)
        assert list(engine.generate([], GREEDY)) == []


def test_worker_scripts_import_nothing_but_the_standard_library_and_their_engine() -> None:
    for name, package in (("trtllm_worker.py", "tensorrt_llm"), ("vllm_worker.py", "vllm")):
        tree = ast.parse((GENERATION / name).read_text(encoding="utf-8"), feature_version=(3, 10))
        found = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        found |= {(node.module or "").partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert found - set(sys.stdlib_module_names) == {package}


def test_worker_scripts_share_their_file_handling_to_the_letter() -> None:
    parts = []
    for name in ("trtllm_worker.py", "vllm_worker.py"):
        text = (GENERATION / name).read_text(encoding="utf-8")
        parts.append(text[text.index("# ---- files") : text.rindex("# ---- ")])
    assert parts[0] == parts[1]


def test_a_worker_s_own_folder_hides_no_installed_package(site: Site, tmp_path: Path) -> None:
    # `vllm.py` lies beside vllm_worker.py: without care the worker would import our module for the package.
    job = {"schema": 1, "action": "generate", "result": str(tmp_path / "result.json"), "expected": {"version": "0.11.0", "gpu": "x"}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = ["env", *site.command().split()[1:], str(GENERATION / "vllm_worker.py"), str(tmp_path / "job.json")]
    subprocess.run(command, check=False, capture_output=True, timeout=60)
    assert "expects gpu 'x', here is 'NVIDIA H100 80GB HBM3'" in json.loads((tmp_path / "result.json").read_text())["error"]


def test_a_job_of_another_schema_is_refused(site: Site, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"schema": 2}))
    command = ["env", *site.command().split()[1:], str(GENERATION / "trtllm_worker.py"), str(tmp_path / "job.json")]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "this worker knows 1" in result.stderr
