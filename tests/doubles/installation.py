"""An environment that workers are started in: the doubles, installed as some version, and an nvidia-smi that shows GPUs."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from spin_megatron.generation.engine import Environment
from spin_megatron.generation.trtllm_surface import release_line

DOUBLES = Path(__file__).parent
H100 = "NVIDIA H100 80GB HBM3, 9.0, 580.65"
VERSIONS = {"tensorrt_llm": "1.2.1", "vllm": "0.11.0"}


def skip_where_paths_are_split() -> None:
    """trtllm-llmapi-launch splits its command at spaces; where this project or its Python lies under one, a worker cannot start by it."""
    for path in (str(DOUBLES), sys.executable):
        if len(path.split()) != 1:
            pytest.skip(f"trtllm-llmapi-launch splits {path} at its spaces, and is refused there")


class Site:
    """The environment's folder; `python` is the interpreter it belongs to."""

    def __init__(self, folder: Path, *, python: str = sys.executable) -> None:
        self.folder, self.python = folder, python
        (folder / "bin").mkdir(parents=True)
        self.gpus(H100)
        for package, version in VERSIONS.items():
            self.install(package, version)

    def gpus(self, *lines: str) -> None:
        """What nvidia-smi says; without lines it fails, as where there is no driver."""
        shown = "\n".join(f"echo '{line}'" for line in lines) or "exit 9"
        self.program("nvidia-smi", shown)

    def program(self, name: str, body: str) -> None:
        """A shell script on the environment's PATH."""
        script = self.folder / "bin" / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)

    def install(self, package: str, version: str) -> None:
        """Give a double another version."""
        for old in self.folder.glob(f"{package}-*.dist-info"):
            shutil.rmtree(old)
        info = self.folder / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "top_level.txt").write_text(package)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        if package == "tensorrt_llm" and not version.startswith("0."):
            line = release_line(version)
            values = {"has_engines": line.has_engines, "classes": {name: line.fields(name) for name in line.classes}}
            (self.folder / "release_line.json").write_text(json.dumps(values))

    def environment(self, *variables: str, launcher: tuple[str, ...] = (), prefix: tuple[str, ...] = ()) -> Environment:
        """As [generate.environment] would give it."""
        path = f"PATH={self.folder / 'bin'}:/usr/bin:/bin"
        # In the prefix, behind what takes PYTHONPATH away from a worker.
        doubles = ("env", path, f"PYTHONPATH={DOUBLES}:{self.folder}")
        return Environment(self.python, (*doubles, *prefix), launcher, variables)
