"""The check of a GPU on a machine without one: what it says there, and how its results become one file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_x" name="test_zero[bf16]" time="1.5"><properties>
<property name="first_margin" value="0.0"/><property name="losses" value="[0.69, 0.5]"/><property name="same_bits" value="True"/>
</properties></testcase>
<testcase classname="tests.gpu.test_x" name="test_zero[mxfp8]" time="0.1"><skipped message="needs a Blackwell"/></testcase>
{more}</testsuite></testsuites>"""


def summarise(folder: Path, more: str) -> subprocess.CompletedProcess[str]:
    (folder / "benchmarks").mkdir(exist_ok=True)
    (folder / "benchmarks" / "head.json").write_text('{"ratio": 2}', encoding="utf-8")
    findings = [{"topic": "device", "found": "1 x NVIDIA H100"}, {"topic": "torch", "found": "2.11.0"}]
    (folder / "doctor.json").write_text(json.dumps({"findings": findings}), encoding="utf-8")
    (folder / "tests.xml").write_text(JUNIT.format(more=more), encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "tools" / "gpu_summary.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_summary_holds_device_outcomes_and_numbers(tmp_path: Path) -> None:
    done = summarise(tmp_path, "")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["environment"] == {"device": "1 x NVIDIA H100", "torch": "2.11.0"}
    assert summary["outcomes"] == {"passed": 1, "skipped": 1}
    first, second = summary["tests"]
    assert first["numbers"] == {"first_margin": 0.0, "losses": [0.69, 0.5], "same_bits": True}
    assert (first["name"], first["seconds"]) == ("tests.gpu.test_x::test_zero[bf16]", 1.5)
    assert (second["outcome"], second["message"]) == ("skipped", "needs a Blackwell")
    assert summary["benchmarks"] == {"head": {"ratio": 2}}


def test_a_failure_or_a_part_that_is_missing_fails_the_check(tmp_path: Path) -> None:
    failure = '<testcase classname="t" name="test_memory" time="2"><failure message="assert 9 == 8">...</failure></testcase>'
    assert summarise(tmp_path, failure).returncode == 1
    assert "assert 9 == 8" in (tmp_path / "summary.json").read_text(encoding="utf-8")
    (tmp_path / "doctor.json").unlink()
    command = [sys.executable, str(REPOSITORY / "tools" / "gpu_summary.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "doctor.json is missing" in done.stderr) == (1, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_stops_at_once_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "with space"
    command = [str(REPOSITORY / "tools" / "gpu_check.sh"), str(out)]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 2
    assert "sees no GPU" in done.stderr + done.stdout + (out / "log.txt").read_text(encoding="utf-8")
    assert not (out / "summary.json").exists()
