"""An exported folder gives the same logits under transformers 4.46, 4.57 and 5.x; one with a 5.x config alone does not.

Runs where SPIN_TRANSFORMERS_ENVIRONMENTS names a folder: environments are made in it on first use (they share this one's
torch; `pip` fetches three small packages each) and used again later. The config's fields themselves are checked everywhere
by tests/unit/test_hf_io.py.
"""

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spin_megatron.convert.torch_dist import hf_to_torch_dist, torch_dist_to_hf
from spin_megatron.plan.shape import Family, ModelShape
from tests.unit.tiny_models import LLAMA3_SCALING, config_of_transformers_5, tiny_shape, write_model

ROOT = os.environ.get("SPIN_TRANSFORMERS_ENVIRONMENTS")
PACKAGES = {
    "4.46.3": ("transformers==4.46.3", "tokenizers==0.20.3", "huggingface-hub==0.36.0"),
    "4.57.6": ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface-hub==0.36.0"),
}
NOT_KNOWN = {"4.46.3": ("qwen3", "qwen3_moe")}
# Families whose logits a config of 5.x alone changes in 4.x: theta falls back to 10000. Mixtral's default there is its own.
MISREAD = ("llama", "llama_tied", "qwen2", "qwen3")
# fp32, sums of 48 terms in another order; 2.2e-6 was measured.
TOLERANCE = 2e-5

LOGITS = """
import json, sys
import numpy, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folders, target = json.loads(sys.argv[1]), sys.argv[2]
found = {}
for name, folder in folders.items():
    found[f"{name}.dtype"] = str(AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").dtype)
    # Not the above made float: some models of 4.46 compute cosines in the dtype they are loaded in.
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        found[name] = model(torch.arange(5, 53)[None]).logits[0].numpy()
numpy.savez(target, **found)
"""


def shapes() -> dict[str, ModelShape]:
    families: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
    found = {family: tiny_shape(family, scaling=LLAMA3_SCALING if family == "llama" else None) for family in families}
    found["llama_tied"] = replace(tiny_shape("llama", tied=True, scaling=LLAMA3_SCALING), head_dim=8)
    found["mistral"] = replace(found["mistral"], rope_theta=1e4)
    found["mixtral"] = replace(found["mixtral"], rope_theta=1e6)
    return found


def environment(version: str) -> str:
    """The interpreter of an environment with this version of transformers, made on first use."""
    assert ROOT is not None
    folder = Path(ROOT) / f"transformers-{version}"
    python = folder / "bin" / "python"
    if not (folder / "READY").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=300)
        (site,) = folder.glob("lib/python3*/site-packages")
        (site / "zz_shared.pth").write_text(sysconfig.get_path("purelib"))  # behind its own packages: torch, numpy, safetensors
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", *PACKAGES[version]]
        subprocess.run(install, check=True, timeout=600)
        (folder / "READY").touch()
    return str(python)


def logits(python: str, folders: dict[str, Path], target: Path) -> dict[str, np.ndarray]:
    """What an interpreter's transformers computes for each folder, and the dtype it loads it in."""
    arguments = json.dumps({name: str(folder) for name, folder in folders.items()})
    command = [python, "-W", "ignore", "-c", LOGITS, arguments, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=target.parent, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(target) as found:
        return dict(found)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Name -> (a folder as transformers 5 writes it, the same after a conversion there and back)."""
    root = tmp_path_factory.mktemp("majors")
    found = {}
    for name, shape in shapes().items():
        write_model(root / name, shape)
        (root / name / "config.json").write_text(json.dumps(config_of_transformers_5(shape)))
        hf_to_torch_dist(root / name, root / f"{name}_megatron", show=False, workers=1)
        torch_dist_to_hf(root / f"{name}_megatron", None, root / f"{name}_back", show=False, workers=1)
        found[name] = (root / name, root / f"{name}_back")
    return found


def test_here_the_exported_folder_computes_what_the_source_does(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    both = {f"{name} {side}": folder for name, pair in folders.items() for side, folder in zip(("source", "back"), pair, strict=True)}
    found = logits(sys.executable, both, tmp_path / "here.npz")
    for name in folders:
        assert np.array_equal(found[f"{name} source"], found[f"{name} back"]), name
        assert found[f"{name} source"].std() > 0.1
        assert found[f"{name} back.dtype"] == "torch.bfloat16"


@pytest.mark.skipif(ROOT is None, reason="SPIN_TRANSFORMERS_ENVIRONMENTS names no folder for environments of transformers 4.x")
@pytest.mark.parametrize("version", PACKAGES)
def test_transformers_4_computes_the_same_logits(folders: dict[str, tuple[Path, Path]], version: str, tmp_path: Path) -> None:
    known = {name: pair for name, pair in folders.items() if name not in NOT_KNOWN.get(version, ())}
    python = environment(version)
    here = logits(sys.executable, {name: pair[1] for name, pair in known.items()}, tmp_path / "here.npz")
    there = logits(python, {name: pair[1] for name, pair in known.items()}, tmp_path / "there.npz")
    for name in known:
        difference = float(np.abs(here[name] - there[name]).max())
        assert difference < TOLERANCE, f"{name} under transformers {version}: {difference}"
        assert there[f"{name}.dtype"] == "torch.bfloat16"
    # The trap is real: the folder as transformers 5 wrote it loads there without an error and computes something else.
    misread = {name: known[name][0] for name in MISREAD if name in known}
    wrong = logits(python, misread, tmp_path / "wrong.npz")
    for name in misread:
        assert float(np.abs(here[name] - wrong[name]).max()) > 0.05, name
