"""Engines in another environment: what drives a worker holds, whatever the worker does. Against strict doubles (tests/doubles).

Answers, EOS, refusals, crashes, stops, resuming, and the command that starts a worker.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spin_megatron.config import RunConfig
from spin_megatron.generation import external
from spin_megatron.generation.engine import Environment, Prompt, Sampling, provider
from spin_megatron.generation.external import WorkerCommand, normalised
from spin_megatron.launch.check import examine_engine
from spin_megatron.run.records import GeneratedRow
from tests.doubles.installation import Site
from tests.doubles.scene import ENGINES, EOS, GREEDY, SAMPLED, answers, by_id, expected, make_prompts, make_spec
from tests.unit.tiny_models import TINY


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


@pytest.mark.parametrize("name", ENGINES)
def test_a_crash_in_the_middle_keeps_the_chunks_and_the_rest_is_answered_once(name: str, model: Path, site: Site, tmp_path: Path) -> None:
    prompts, spec = make_prompts(), make_spec(model, site, name)
    provider(name).build(spec, tmp_path / "engine")
    crashing = replace(spec, environment=site.environment("DOUBLE_CRASH_AFTER=9"))
    got: list[GeneratedRow] = []
    crash = pytest.raises(RuntimeError, match=r"left no result \(exit code 9\)|its process died without a word")
    with closing(provider(name).load(crashing, tmp_path / "engine", tmp_path / "work")) as engine, crash:
        got.extend(engine.generate(prompts, SAMPLED))
    assert len(got) == 8
    with closing(provider(name).load(spec, tmp_path / "engine", tmp_path / "work")) as engine:
        rows = by_id(engine.generate(prompts, SAMPLED))
    assert rows == expected(model, prompts, SAMPLED)
    requests = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "work").glob("*/attempt_*/requests.jsonl"))]
    assert requests == [13, 13 - 8]  # two chunks of four were whole


@pytest.mark.parametrize("name", ENGINES)
def test_a_stop_while_a_chunk_is_under_way_ends_the_worker_in_seconds_and_keeps_what_was_answered(
    name: str, model: Path, site: Site, tmp_path: Path
) -> None:
    prompts, spec, hung = make_prompts(), make_spec(model, site, name, in_flight=2), tmp_path / "hung"
    provider(name).build(spec, tmp_path / "engine")
    standing = replace(spec, environment=site.environment("DOUBLE_HANG_AFTER=1", f"DOUBLE_HUNG={hung}"))
    with closing(provider(name).load(standing, tmp_path / "engine", tmp_path / "work")) as engine:
        assert list(engine.generate(prompts, SAMPLED, hung.exists)) == []  # no chunk of four was full
        stopped_at = time.time()
    assert stopped_at - hung.stat().st_mtime < 9  # it left by itself: nobody had to end it
    with closing(provider(name).load(spec, tmp_path / "engine", tmp_path / "work")) as engine:
        assert by_id(engine.generate(prompts, SAMPLED)) == expected(model, prompts, SAMPLED)
    requests = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "work").glob("*/attempt_*/requests.jsonl"))]
    assert requests[0] == 13
    assert 13 - 2 <= requests[1] <= 13 - 1


def test_a_worker_that_dies_behind_a_launcher_that_waits_for_ever_is_noticed(
    model: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "_GRACE_SECONDS", 1.0)
    spec = make_spec(model, site)
    provider("trtllm-engine").build(spec, tmp_path / "engine")
    site.program("deaf", '"$@"; sleep 600')
    crashing = replace(spec, environment=site.environment("DOUBLE_CRASH_AFTER=9", prefix=("deaf",)))
    died = pytest.raises(RuntimeError, match="its process died without a word")
    with closing(provider("trtllm-engine").load(crashing, tmp_path / "engine", tmp_path / "work")) as engine, died:
        list(engine.generate(make_prompts(), SAMPLED))


@pytest.mark.parametrize("name", ["trtllm-torch", "vllm"])
def test_what_a_dead_worker_had_started_is_ended(name: str, model: Path, site: Site, tmp_path: Path) -> None:
    spec, orphan = make_spec(model, site, name), tmp_path / "orphan"
    provider(name).build(spec, tmp_path / "engine")
    crashing = replace(spec, environment=site.environment("DOUBLE_CRASH_AFTER=1", f"DOUBLE_ORPHAN={orphan}"))
    with closing(provider(name).load(crashing, tmp_path / "engine", tmp_path / "work")) as engine, pytest.raises(RuntimeError):
        list(engine.generate(make_prompts(), SAMPLED))
    wait_until(lambda: is_gone(int(orphan.read_text())))


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


def test_vllm_on_a_cpu_refuses_heads_it_cannot_compute_before_it_starts(model: Path, site: Site, tmp_path: Path) -> None:
    site.gpus()
    with pytest.raises(ValueError, match="has head size 6; on a CPU vLLM takes 32, 64, 80"):
        provider("vllm").build(make_spec(model, site, "vllm"), tmp_path / "engine")


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
    wait_until(lambda: is_gone(pid))


def is_gone(pid: int) -> bool:
    """Whether the process has ended, be it that nobody asked for its code yet."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or "Z" in stat.read_text().split(")")[1]


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
