"""The check of a GPU on a machine without one: what it says there, and how its results become one file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.gpu_summary import read_tests

REPOSITORY = Path(__file__).parents[2]
PASSED = {"name": "tests/gpu/test_x.py::test_zero[bf16]", "outcome": "passed", "seconds": 1.5, "numbers": {"losses": [0.69, 0.5]}}
SKIPPED = {"name": "tests/gpu/test_x.py::test_zero[mxfp8]", "outcome": "skipped", "seconds": 0.1, "message": "needs a Blackwell"}


def summarise(folder: Path, *tests: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    (folder / "benchmarks").mkdir(exist_ok=True)
    for name in ("head", "train_step"):
        (folder / "benchmarks" / f"{name}.json").write_text('{"ratio": 2}', encoding="utf-8")
    findings = [{"topic": "device", "found": "1 x NVIDIA H100"}, {"topic": "torch", "found": "2.11.0"}]
    (folder / "doctor.json").write_text(json.dumps({"findings": findings}), encoding="utf-8")
    (folder / "tests.jsonl").write_text("".join(json.dumps(test) + "\n" for test in tests), encoding="utf-8")
    return summary_of(folder)


def summary_of(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "gpu_summary.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_summary_holds_device_outcomes_and_numbers(tmp_path: Path) -> None:
    done = summarise(tmp_path, PASSED | {"outcome": "unfinished"}, PASSED, SKIPPED)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["environment"] == {"device": "1 x NVIDIA H100", "torch": "2.11.0"}
    assert summary["outcomes"] == {"passed": 1, "skipped": 1}
    assert summary["tests"] == [PASSED, SKIPPED]
    assert summary["benchmarks"] == {"head": {"ratio": 2}, "train_step": {"ratio": 2}}


@pytest.mark.parametrize("outcome", ["failed", "unfinished", "not begun"])
def test_a_test_that_failed_or_did_not_finish_fails_the_check(outcome: str, tmp_path: Path) -> None:
    memory = {"name": "tests/gpu/test_x.py::test_memory", "outcome": outcome, "message": "assert 9 == 8"}
    assert summarise(tmp_path, PASSED, memory).returncode == 1
    assert "assert 9 == 8" in (tmp_path / "summary.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["doctor.json", "tests.jsonl", "benchmarks/head.json"])
def test_what_is_missing_fails_the_check_and_the_rest_is_summed_up(name: str, tmp_path: Path) -> None:
    summarise(tmp_path, PASSED)
    (tmp_path / name).unlink()
    done = summary_of(tmp_path)
    assert (done.returncode, f"{Path(name).name} is missing" in done.stderr) == (1, True)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert [len(summary[part]) for part in ("environment", "tests", "benchmarks")] == {
        "doctor.json": [0, 1, 2],
        "tests.jsonl": [2, 0, 2],
        "benchmarks/head.json": [2, 1, 1],
    }[name]


SUITE = """
import os, pytest
def test_it_passes(record_property): record_property("tokens_per_second", 12.5)
def test_it_fails(): assert 9 == 8
@pytest.mark.skip(reason="needs a Blackwell")
def test_it_is_skipped(): pass
@pytest.fixture
def broken(): raise ValueError("no such device")
def test_it_never_begins(broken): pass
def test_it_dies(): os.abort()
def test_it_has_no_turn(): pass
"""


def test_a_process_that_dies_loses_the_test_it_was_in_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((REPOSITORY / "tests" / "gpu" / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_it.py").write_text(SUITE, encoding="utf-8")
    environment = os.environ | {"SPIN_MEGATRON_GPU_RESULTS": str(tmp_path / "tests.jsonl")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode < 0
    found = [(test["outcome"], test.get("numbers"), test.get("message")) for test in read_tests(tmp_path / "tests.jsonl")]
    assert found == [
        ("passed", {"tokens_per_second": 12.5}, None),
        ("failed", None, "assert 9 == 8"),
        ("skipped", None, "Skipped: needs a Blackwell"),
        ("failed", None, "ValueError: no such device"),
        ("unfinished", None, None),
        ("not begun", None, None),
    ]


# In the place of a Python with a GPU: policy_on_gpu's process dies, training_on_gpu's hangs (its limit is cut), the others do their part.
STAND_IN = """#!/usr/bin/env bash
case $* in
    *"doctor --json") echo '{{"findings": []}}' ;;
    *logprobs_cuda.py) echo '{passed}' >>"$SPIN_MEGATRON_GPU_RESULTS" ;;
    *policy_on_gpu.py) kill -SEGV $$ ;;
    *training_on_gpu.py) sleep 60 ;;
    *tools.benchmarks*) for last; do :; done; echo '{{"ratio": 2}}' >"$last" ;;
    *gpu_summary.py*) exec {python} "$@" ;;
esac
"""


def test_a_part_that_dies_or_hangs_leaves_the_others_their_turn(tmp_path: Path) -> None:
    binaries, out = tmp_path / "bin", tmp_path / "out"
    binaries.mkdir()
    (binaries / "python").write_text(STAND_IN.format(passed=json.dumps(PASSED), python=sys.executable), encoding="utf-8")
    # GNU's, with every limit cut to a second.
    (binaries / "timeout").write_text(
        f'#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nshift\nexec {shutil.which("timeout")} --signal=INT 1 "$@"\n',
        encoding="utf-8",
    )
    for program in binaries.iterdir():
        program.chmod(0o755)
    environment = os.environ | {"PYTHON": str(binaries / "python"), "PATH": f"{binaries}:{os.environ['PATH']}"}
    command = [str(REPOSITORY / "tools" / "gpu_check.sh"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    log = (out / "log.txt").read_text(encoding="utf-8")
    assert "policy_on_gpu: exit code 139" in log
    assert "training_on_gpu: exit code 124" in log
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["tests"], set(summary["benchmarks"])) == ([PASSED], {"head", "train_step"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_stops_at_once_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "with space"
    command = [str(REPOSITORY / "tools" / "gpu_check.sh"), str(out)]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 2
    assert "sees no GPU" in done.stderr + done.stdout + (out / "log.txt").read_text(encoding="utf-8")
    assert not (out / "summary.json").exists()
