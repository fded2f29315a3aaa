"""What is shipped: the list of files of the built package."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_the_wheel_holds_the_package_with_its_worker_scripts_and_no_test_or_double(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="the build backend is not installed")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("spin_megatron", "tests"):  # what could be taken for packages
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "spin_megatron").rglob("*.py")}
    assert {name for name in names if not name.split("/")[0].endswith(".dist-info")} == shipped
    assert {"spin_megatron/generation/trtllm_worker.py", "spin_megatron/generation/vllm_worker.py"} <= shipped
