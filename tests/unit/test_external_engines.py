"""The TensorRT-LLM and vLLM engines, driver and worker script, against strict doubles of their packages (tests/doubles).

Nothing here shows that the real packages work; it shows that what we call is what the table says, and that everything around
the call holds: options, identity, cache, seeds, EOS, refusals, crashes, resuming.
"""

import ast
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_megatron.config import RunConfig
from spin_megatron.generation import external
from spin_megatron.generation.engine import EngineSpec, Environment, Prompt, Sampling, provider
from spin_megatron.generation.external import WorkerCommand, normalised
from spin_megatron.launch.loop import examine_engine
from spin_megatron.run.records import GeneratedRow, PromptRow, write_rows
from spin_megatron.run.seeds import row_seed
from tests.doubles.installation import H100, Site, skip_where_paths_are_split
from tests.doubles.toy_model import answer, weights_mark
from tests.tiny_tokenizer import save_tiny_tokenizer
from tests.unit.tiny_models import TINY, write_model

GENERATION = Path(external.__file__).parent
EOS = (2, 3)
SAMPLED = Sampling(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=12, eos_ids=EOS)
GREEDY = replace(SAMPLED, temperature=0.0)
ENGINES = ("trtllm-engine", "trtllm-torch", "vllm")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "theta", TINY, dtype=torch.float32)
    save_tiny_tokenizer(tmp_path / "theta")
    return tmp_path / "theta"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


def make_prompts(count: int = 13) -> list[Prompt]:
    prompts = [tuple(4 + (37 * i + j) % 200 for j in range(1 + i)) for i in range(count)]
    return [Prompt(f"ex-{i}", ids, row_seed(1, "generate", 0, f"ex-{i}")) for i, ids in enumerate(prompts)]


def make_spec(model: Path, site: Site, name: str = "trtllm-engine", **options: Any) -> EngineSpec:
    prompt_file = model.parent / "prompts.parquet"
    write_rows(prompt_file, [PromptRow(prompt.example_id, prompt.token_ids, (5, 2), False) for prompt in make_prompts()], PromptRow)
    dtype = "float32" if name == "vllm" else "bfloat16"
    limits = {"max_prompt_tokens": 20, "max_new_tokens": 12}
    return EngineSpec(model, dtype, 4, options=options, prompt_files=(prompt_file,), environment=site.environment(), **limits)


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
    assert (facts["compute_capability"], facts["max_input_len"], facts["from_cache"]) == ("9.0", 13, False)
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
    timings = [json.loads((tmp_path / name / "config.json").read_text())["timings"] for name in ("a", "c")]
    assert timings == ["", "timed\n"]


@pytest.mark.parametrize("change", ["version", "gpu"])
def test_shards_refuse_an_engine_of_another_release_or_gpu(change: str, model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site)
    provider("trtllm-engine").build(spec, tmp_path / "engine")
    if change == "version":
        site.install("tensorrt_llm", "1.2.0")
    else:
        site.gpus("NVIDIA A100-SXM4-80GB, 8.0, 580.65")
    with pytest.raises(ValueError, match="tensorrt_llm: built with '1.2.1'" if change == "version" else "gpu: built with 'NVIDIA H100"):
        provider("trtllm-engine").load(spec, tmp_path / "engine", tmp_path / "work")


def test_fp8_is_calibrated_on_the_run_s_own_prompts(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, quantization="fp8", calibration_prompts=3)
    provider("trtllm-engine").build(spec, tmp_path / "engine")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = json.loads((tmp_path / "engine" / "config.json").read_text())["calibrated_on"]
    assert texts == [tokenizer.decode(prompt.token_ids, skip_special_tokens=False) for prompt in make_prompts()[:3]]


@pytest.mark.parametrize("name", ENGINES)
def test_a_crash_in_the_middle_keeps_the_chunks_and_the_rest_is_answered_once(name: str, model: Path, site: Site, tmp_path: Path) -> None:
    prompts, spec = make_prompts(), make_spec(model, site, name)
    provider(name).build(spec, tmp_path / "engine")
    crashing = replace(spec, environment=site.environment("DOUBLE_CRASH_AFTER=9"))
    got: list[GeneratedRow] = []
    crash = pytest.raises(RuntimeError, match=r"left no result \(exit code 9\)")
    with closing(provider(name).load(crashing, tmp_path / "engine", tmp_path / "work")) as engine, crash:
        got.extend(engine.generate(prompts, SAMPLED))
    assert len(got) == 8
    with closing(provider(name).load(spec, tmp_path / "engine", tmp_path / "work")) as engine:
        rows = by_id(engine.generate(prompts, SAMPLED))
    assert rows == expected(model, prompts, SAMPLED)
    requests = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "work").glob("*/attempt_*/requests.jsonl"))]
    assert requests == [13, 13 - 8]  # two chunks of four were whole


def test_a_worker_that_shows_no_progress_is_ended(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, "trtllm-torch")
    provider("trtllm-torch").build(spec, tmp_path / "engine")
    site.program("sleeper", 'case "$(cat "$3")" in *generate*) sleep 600;; *) exec "$@";; esac')
    stuck = replace(spec, environment=site.environment(prefix=("sleeper",)), options={"no_progress_seconds": 3})
    ended = pytest.raises(RuntimeError, match="showed no progress for 3 s")
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
    spec = replace(make_spec(model, site, name), environment=Environment(sys.executable))
    package = "vllm" if name == "vllm" else "tensorrt_llm"
    with pytest.raises(ValueError, match=f"{package} is not installed"):
        provider(name).build(spec, tmp_path / "engine")


@pytest.mark.parametrize("name", ["trtllm-engine", "trtllm-torch"])
def test_a_machine_without_a_gpu_is_refused(name: str, model: Path, site: Site, tmp_path: Path) -> None:
    site.gpus()
    with pytest.raises(ValueError, match="nvidia-smi shows none"):
        provider(name).build(make_spec(model, site, name), tmp_path / "engine")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel": -1}, "tensor_parallel=-1"),
        ({"tensor_parallel": 2}, "a replica on 2 GPUs .* does not fit on the 1 that are there"),
        ({"tensor_parallel": 2.5}, "tensor_parallel=2.5.*of type int"),
        ({"quantization": "int4"}, "quantization='int4'.*'none' or 'fp8'"),
        ({"free_gpu_memory_fraction": 1.0}, "between 0 and 1"),
        ({"quantisation": "fp8"}, "quantisation"),
        ({"in_flight": True}, "of type int"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], words: str, model: Path, site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        provider("trtllm-engine").build(make_spec(model, site, **options), tmp_path / "engine")


def test_a_dtype_the_engine_is_not_built_in_is_refused(model: Path, site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generate\.dtype=float32"):
        provider("trtllm-engine").build(replace(make_spec(model, site), dtype="float32"), tmp_path / "engine")


def test_several_gpus_start_as_ranks_of_the_launcher_tied_together(model: Path, site: Site, tmp_path: Path) -> None:
    skip_where_paths_are_split()
    site.gpus(H100, H100)
    # As srun would: so many processes, of which the first is rank 0; as trtllm-llmapi-launch: split at spaces, deaf to failures.
    site.program("launcher", 'echo "$@" >> ' + str(tmp_path / "started") + '; shift; exec "$@"')
    site.program("trtllm-llmapi-launch", "TLLM_SPAWN_PROXY_PROCESS=1 $*; code=$?; [ $code -eq 0 ] || sleep 600")
    launcher = (str(site.folder / "bin" / "launcher"), "--ntasks={ranks}")
    spec = replace(make_spec(model, site, tensor_parallel=2), environment=site.environment(launcher=launcher))
    folder = tmp_path / "it's an engine"  # with spaces and a quote in every path of a job
    provider("trtllm-engine").build(spec, folder)
    assert sorted(path.name for path in folder.glob("rank*.engine")) == ["rank0.engine", "rank1.engine"]
    with closing(provider("trtllm-engine").load(spec, folder, folder / "a shard")) as engine:
        assert by_id(engine.generate(make_prompts(), GREEDY)) == expected(model, make_prompts(), GREEDY)
    started = (tmp_path / "started").read_text().splitlines()
    words = [(line.split()[0], "trtllm-llmapi-launch" in line) for line in started]
    # Looking what is there takes one process, building and answering take both GPUs.
    assert words == [("--ntasks=1", False), ("--ntasks=2", True), ("--ntasks=1", False), ("--ntasks=2", True)]
    (folder / "rank1.engine").unlink()
    failed = pytest.raises(RuntimeError, match="lacks the engine files of ranks")
    with closing(provider("trtllm-engine").load(spec, folder, tmp_path / "work")) as engine, failed:
        list(engine.generate(make_prompts(), GREEDY))


def test_several_gpus_without_a_launcher_are_one_process_that_spawns(model: Path, site: Site, tmp_path: Path) -> None:
    site.gpus(H100, H100)
    facts = provider("trtllm-engine").build(make_spec(model, site, tensor_parallel=1, pipeline_parallel=2), tmp_path / "engine")
    assert (tmp_path / "engine" / "rank1.engine").exists()
    assert facts["options"]["pipeline_parallel"] == 2


@pytest.mark.parametrize(("gpu", "chosen"), [(H100, 1), ("NVIDIA A100-SXM4-40GB, 8.0, 580.65", 1)])
def test_the_planner_chooses_one_gpu_a_replica_for_a_model_that_fits_on_one(
    gpu: str, chosen: int, model: Path, site: Site, tmp_path: Path
) -> None:
    site.gpus(gpu, gpu, gpu, gpu)
    facts = provider("trtllm-torch").build(make_spec(model, site, "trtllm-torch"), tmp_path / "engine")
    assert facts["options"]["tensor_parallel"] == facts["options.tensor_parallel"] == chosen


def test_a_gpu_the_planner_does_not_know_needs_a_given_number(model: Path, site: Site, tmp_path: Path) -> None:
    site.gpus("NVIDIA Quantum 9000, 12.0, 580.65")
    with pytest.raises(ValueError, match=r"tensor_parallel is not set.*Quantum 9000"):
        provider("vllm").build(make_spec(model, site, "vllm"), tmp_path / "engine")
    assert provider("vllm").build(make_spec(model, site, "vllm", tensor_parallel=1), tmp_path / "engine")["gpu"] == "NVIDIA Quantum 9000"


def test_a_command_has_launcher_prefix_starter_and_python_in_this_order_and_a_path_no_shell_splits() -> None:
    environment = Environment("/opt/trt/python3", ("apptainer", "exec", "--nv", "my image.sif"), ("srun", "-n{ranks}"), ("A=b c",))
    command = WorkerCommand(environment, Path("/src/worker.py"), ranks=4, starter=("trtllm-llmapi-launch",), settings=("S=1",))
    line = command.line(Path("/a run/it's/job.json"))
    assert line[0] == "env"
    assert line[(at := line.index("TLLM_LLMAPI_BUILD_CACHE")) - 1 : at + 1] == ["-u", "TLLM_LLMAPI_BUILD_CACHE"]
    tail = ["srun", "-n4", "apptainer", "exec", "--nv", "my image.sif", "trtllm-llmapi-launch", "/opt/trt/python3", "/src/worker.py"]
    assert line[line.index("S=1") :] == ["S=1", "A=b c", *tail, "/a%20run/it%27s/job.json"]


@pytest.mark.parametrize(
    ("python", "script", "cure"),
    [("python3", "/my src/worker.py", "install spin_megatron"), ("/my env/python", "/worker.py", r"generate\.environment\.python")],
)
def test_a_launcher_that_splits_at_spaces_refuses_what_has_one(python: str, script: str, cure: str) -> None:
    command = WorkerCommand(Environment(python), Path(script), starter=("trtllm-llmapi-launch",))
    with pytest.raises(ValueError, match=f"splits paths at spaces; .*{cure}"):
        command.line(Path("/job.json"))


def test_an_interpreter_that_is_missing_is_told_by_its_setting(model: Path, site: Site, tmp_path: Path) -> None:
    spec = replace(make_spec(model, site), environment=Environment("/opt/none/python3"))
    with pytest.raises(ValueError, match=r"/opt/none/python3.*correct \[generate.environment\]"):
        provider("trtllm-engine").build(spec, tmp_path / "engine")


def test_check_says_what_would_answer_or_what_is_missing(
    model: Path, site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment = site.environment()
    started = {"python": environment.python, "prefix": list(environment.prefix)}
    values = {"model": {"path": str(model)}, "data": {"source": "d"}, "generate": {"engine": "trtllm-engine", "environment": started}}
    with caplog.at_level("INFO", logger="spin_megatron"):
        examine_engine(RunConfig.model_validate(values))
    assert "TensorRT-LLM 1.2.1 under Python 3." in caplog.text
    assert "1 x NVIDIA H100 80GB HBM3" in caplog.text
    site.install("tensorrt_llm", "1.3.0rc20")
    with pytest.raises(ValueError, match=r"1\.3\.0rc20; use a container of 1\.2\.1"):
        examine_engine(RunConfig.model_validate(values))
    missing = {"python": "/opt/none/python3"}
    with pytest.raises(ValueError, match=r"/opt/none/python3.*correct \[generate.environment\]"):
        examine_engine(RunConfig.model_validate({**values, "generate": {"engine": "vllm", "environment": missing}}))
    # In a Slurm run the container is known to the jobs alone: a login node refuses nothing.
    slurm = {"slurm": {"stages": {"generate": {"gpus_per_node": 1}}}}
    examine_engine(RunConfig.model_validate({**values, **slurm, "generate": {"engine": "vllm", "environment": missing}}))


def test_a_driver_that_is_killed_takes_its_worker_along(model: Path, site: Site, tmp_path: Path) -> None:
    site.program("sleeper", "echo $$ > " + str(tmp_path / "pid") + "; exec sleep 600")
    environment = site.environment(prefix=("sleeper",))
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom spin_megatron.generation.engine import Environment\n"
        "from spin_megatron.generation.external import Worker, WorkerCommand\n"
        f"Worker(WorkerCommand({environment!r}, Path('w.py')), {{}}, Path(sys.argv[1]))\ntime.sleep(600)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "work")])
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip() != "")
    finally:
        driver.kill()
        driver.wait()
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1])


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


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
    with closing(provider("trtllm-torch").load(spec, tmp_path / "engine", tmp_path / "work")) as engine:
        list(engine.generate(make_prompts(), GREEDY))
    response = {"id": "ex-0", "token_ids": [5, TINY.vocab_size], "finish_reason": "length", "stop_reason": None}
    for chunk in (tmp_path / "work").glob("*/attempt_*/chunks/chunk_*.jsonl"):
        chunk.write_text(json.dumps(response) + "\n")
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


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("minor", [10, 12])
def test_workers_run_on_the_pythons_their_packages_have(name: str, minor: int, model: Path, tmp_path: Path) -> None:
    python = other_python(minor)
    if python is None:
        pytest.skip(f"there is no Python 3.{minor} here")
    site = Site(tmp_path / "site", python=python)
    spec = make_spec(model, site, name)
    assert answers(name, spec, tmp_path, SAMPLED, make_prompts()) == expected(model, make_prompts(), SAMPLED)
    with closing(provider(name).load(spec, tmp_path / "engine", tmp_path / "again")) as engine:
        list(engine.generate(make_prompts(), GREEDY))
        assert engine.describe()["python"].startswith(f"3.{minor}.")


def other_python(minor: int) -> str | None:
    """An interpreter of that version: on PATH, or one of pyenv's."""
    of_pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob(f"3.{minor}.*/bin/python3.{minor}"))
    return shutil.which(f"python3.{minor}", path="/usr/bin:/usr/local/bin") or (str(of_pyenv[-1]) if of_pyenv else None)


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
    command = WorkerCommand(site.environment(), GENERATION / "vllm_worker.py").line(tmp_path / "job.json")
    subprocess.run(command, check=False, capture_output=True, timeout=60)
    assert "expects gpu 'x', here is 'NVIDIA H100 80GB HBM3'" in json.loads((tmp_path / "result.json").read_text())["error"]


def test_a_job_of_another_schema_is_refused(site: Site, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"schema": 2}))
    command = WorkerCommand(site.environment(), GENERATION / "trtllm_worker.py").line(tmp_path / "job.json")
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "this worker knows 1" in result.stderr
