"""A benchmark through a stand-in for lm-evaluation-harness, and through the real one where it is installed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from spin_megatron.config import RunConfig
from spin_megatron.pipeline import execute
from spin_megatron.report.overview import benchmarks
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import Manifest, read_manifest, write_manifest
from spin_megatron.stage_table import StageRef, line, settings_of
from spin_megatron.stages import benchmark
from tests.tiny_run import make_tiny_model

STAND_IN = """
import json, sys
from pathlib import Path
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
model = json.loads(arguments["--model_args"])
assert model["pretrained"].endswith("theta_1") and model["dtype"] == "float32" and model["parallelize"] is True
assert arguments["--model"] == "hf" and arguments["--tasks"] == "gsm8k" and arguments["--include_path"] == "my tasks"
folder = Path(arguments["--output_path"]) / "theta_1"
folder.mkdir()
results = {"gsm8k": {"alias": "gsm8k", "acc,none": 0.5, "acc_stderr,none": 0.25}}
(folder / "results_2026.json").write_text(json.dumps({"results": results, "n-shot": {"gsm8k": 5}}))
"""


def make_config(**evaluate: object) -> RunConfig:
    values = {"model": {"path": "m"}, "data": {"source": "d"}, "run": {"iterations": 1}, "train": {"precision": "fp32"}}
    return RunConfig.model_validate({**values, "evaluate": {"lm_eval_tasks": ["arc", "gsm8k"], **evaluate}})


def finish_theta_1(layout: RunLayout) -> None:
    layout.theta(1).mkdir(parents=True)
    write_manifest(layout.theta(1), Manifest("export", 1, None, key="key", settings={}, inputs={}, outputs=()))


def test_each_task_is_a_stage_of_its_own_whose_score_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "version", lambda package: {"lm-eval": "0.4.9"}[package])
    monkeypatch.setattr(benchmark, "PROGRAM", (sys.executable, "-c", STAND_IN))
    config, layout = make_config(lm_eval_model_args={"parallelize": True}, lm_eval_include="my tasks"), RunLayout(tmp_path)
    finish_theta_1(layout)
    assert [str(ref) for ref in line(config)][-2:] == ["benchmark 0 shard 0", "benchmark 0 shard 1"]
    assert execute(config, layout, StageRef("benchmark", 0, 1), rank=0, stop_requested=lambda: False)
    manifest = read_manifest(layout.benchmark(0, 1))
    assert manifest is not None
    assert manifest.summary["metrics"]["acc,none"] == 0.5
    written = json.loads(layout.benchmark_result(0, 1).read_text(encoding="utf-8"))
    assert (written["version"], written["num_fewshot"]) == ("0.4.9", {"gsm8k": 5})
    cells = [list(column.cells) for column in benchmarks(config, layout).columns]
    assert cells == [["1"], ["gsm8k"], ["acc,none"], ["0.5000"], ["0.2500"]]
    assert read_manifest(layout.benchmark(0, 0)) is None


def test_a_benchmark_depends_on_its_own_task_alone() -> None:
    first, second = (settings_of(make_config(), StageRef("benchmark", 0, number)) for number in (0, 1))
    assert (first["evaluate.lm_eval_tasks"], second["evaluate.lm_eval_tasks"]) == ("arc", "gsm8k")
    assert not [name for name in settings_of(make_config(), StageRef("evaluate", 0)) if "lm_eval" in name]


def test_a_harness_that_fails_is_an_error_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "version", lambda package: "0.4.9")
    program = (sys.executable, "-c", "import sys; sys.exit('Tasks were not found: arc_eazy')")
    with pytest.raises(ValueError, match=r"(?s)task 'arc_eazy' of evaluate\.lm_eval_tasks.*Tasks were not found"):
        benchmark.run_harness("arc_eazy", {"pretrained": "theta_1"}, program=program)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux's")
def test_a_harness_ends_with_the_stage_that_started_it_even_when_that_is_killed(tmp_path: Path) -> None:
    harness = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys; from spin_megatron.stages import benchmark; benchmark.version = lambda package: '0.4.9'; "
        f"benchmark.run_harness('arc', {{}}, program=(sys.executable, '-c', {harness!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as stage:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        stage.kill()
    pid = (tmp_path / "pid").read_text()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited 20 s in vain")


def test_a_missing_harness_names_the_extra() -> None:
    if find_spec("lm_eval") is not None:
        pytest.skip("lm-evaluation-harness is installed here")
    with pytest.raises(ValueError, match=r"pip install 'spin-megatron\[eval\]'"):
        benchmark.harness_version()


TASK = """
task: counting_on
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "after {{number}}?"
doc_to_target: 0
doc_to_choice: ["{{number + 1}}", "{{number + 7}}"]
metric_list: [{metric: acc}]
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed: pip install 'spin-megatron[eval]'")
def test_the_real_harness_scores_an_exported_model_on_a_task_of_ones_own(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "theta 1")
    data = tmp_path / "numbers.jsonl"
    data.write_text("".join(json.dumps({"number": number}) + "\n" for number in range(8)), encoding="utf-8")
    tasks = tmp_path / "my tasks"
    tasks.mkdir()
    (tasks / "counting_on.yaml").write_text(TASK.replace("DATA", json.dumps(str(data))), encoding="utf-8")
    found = benchmark.run_harness("counting_on", {"pretrained": str(tmp_path / "theta 1"), "dtype": "float32"}, include=tasks)
    accuracy = found["results"]["counting_on"]["acc,none"]
    assert 0 <= accuracy <= 1
    assert accuracy * 8 == int(accuracy * 8), "a share of the eight questions"
