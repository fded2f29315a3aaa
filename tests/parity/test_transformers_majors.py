"""An exported folder gives the same logits under transformers 4.46, 4.57 and 5.x; one with a 5.x config alone does not.

Each version of 4.x is installed once, on first use, into a folder of its own beside the environment (three small packages each,
28 MB in all) and stands before this environment's torch on the path of a process of its own. Without a package index the tests
are skipped, except where CI is set: there they fail. The config's fields themselves are checked by tests/unit/test_hf_io.py.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spin_megatron.convert.torch_dist import hf_to_torch_dist, torch_dist_to_hf
from spin_megatron.plan.model_config import Family
from spin_megatron.plan.shape import ModelShape
from tests.unit.tiny_models import LLAMA3_SCALING, config_of_transformers_5, tiny_shape, write_model

ROOT = Path(sys.prefix) / "transformers_4"
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
import numpy, torch, transformers
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folders, target = json.loads(sys.argv[1]), sys.argv[2]
found = {"transformers": transformers.__version__}
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


def installed(version: str) -> Path:
    """A folder that holds this version of transformers, made on first use."""
    folder = ROOT / version
    if not folder.exists():
        ROOT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT) as aside:
            # Without dependencies: torch, numpy, safetensors and the rest are this environment's.
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", f"{aside}/site"]
            done = subprocess.run([*command, *PACKAGES[version]], capture_output=True, text=True, timeout=240, check=False)
            if done.returncode:
                reason = f"transformers {version} could not be installed: {done.stderr[-500:]}"
                pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
            Path(aside, "site").rename(folder)
    return folder


def logits(folders: dict[str, Path], target: Path, *, transformers: Path | None = None) -> dict[str, np.ndarray]:
    """What transformers (this environment's, or of another folder) computes for each folder, and the dtype it loads it in."""
    arguments = json.dumps({name: str(folder) for name, folder in folders.items()})
    command = [sys.executable, "-W", "ignore", "-c", LOGITS, arguments, str(target)]
    environment = {**os.environ, "PYTHONPATH": str(transformers or ""), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=target.parent, env=environment, check=False)
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


@pytest.fixture(scope="module")
def here(folders: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Logits under this environment's transformers 5, of the sources ("llama source") and of what came back ("llama back")."""
    return logits(sides(folders), tmp_path_factory.mktemp("here") / "logits.npz")


def sides(folders: dict[str, tuple[Path, Path]]) -> dict[str, Path]:
    return {f"{name} {side}": folder for name, pair in folders.items() for side, folder in zip(("source", "back"), pair, strict=True)}


def test_here_the_exported_folder_computes_what_the_source_does(folders: dict[str, tuple[Path, Path]], here: dict[str, np.ndarray]) -> None:
    assert str(here["transformers"]).startswith("5.")
    for name in folders:
        assert np.array_equal(here[f"{name} source"], here[f"{name} back"]), name
        assert here[f"{name} source"].std() > 0.1
        assert here[f"{name} back.dtype"] == "torch.bfloat16"


@pytest.mark.parametrize("version", PACKAGES)
def test_transformers_4_computes_the_same_logits(
    folders: dict[str, tuple[Path, Path]], here: dict[str, np.ndarray], version: str, tmp_path: Path
) -> None:
    known = [name for name in folders if name not in NOT_KNOWN.get(version, ())]
    misread = [name for name in MISREAD if name in known]
    wanted = {f"{name} back" for name in known} | {f"{name} source" for name in misread}
    asked = {name: folder for name, folder in sides(folders).items() if name in wanted}
    there = logits(asked, tmp_path / "there.npz", transformers=installed(version))
    assert there["transformers"] == version
    for name in known:
        difference = float(np.abs(here[f"{name} back"] - there[f"{name} back"]).max())
        assert difference < TOLERANCE, f"{name} under transformers {version}: {difference}"
        assert there[f"{name} back.dtype"] == "torch.bfloat16"
    for name in misread:
        # The trap is real: the folder as transformers 5 wrote it loads there without an error and computes something else.
        assert float(np.abs(here[f"{name} source"] - there[f"{name} source"]).max()) > 0.05, name
