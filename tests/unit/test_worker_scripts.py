"""The worker scripts: stand-alone, on the Pythons of their packages, alike where they do the same."""

import ast
import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from spin_megatron.generation import external
from spin_megatron.generation.engine import provider
from spin_megatron.generation.external import WorkerCommand
from tests.doubles.installation import Site
from tests.doubles.scene import ENGINES, GREEDY, SAMPLED, answers, expected, make_prompts, make_spec

GENERATION = Path(external.__file__).parent


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
