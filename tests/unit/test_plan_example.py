"""The 70B example is a valid config whose layout fits, and the plan beside it is what the command prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from spin_megatron.config_file import load_config
from spin_megatron.launch.check import check_config
from spin_megatron.plan.parameters import count_parameters
from spin_megatron.plan.run_plan import check_config_fits, model_shape

EXAMPLE = Path(__file__).parents[2] / "examples" / "llama3_70b"
MODEL = EXAMPLE / "model_config.json"


def test_the_example_is_llama3_70b() -> None:
    assert count_parameters(model_shape(load_config(EXAMPLE / "config.toml"), MODEL)) == 70_553_706_496


def test_the_examples_layout_fits_its_32_h100() -> None:
    fits = check_config_fits(load_config(EXAMPLE / "config.toml"), "h100-80gb", model_config=MODEL)
    assert fits.layout.world_size == 32
    # One data rank, RMSProp: 2 + 4 + 4 + 4 bytes a parameter; the ends hold more than a 32nd of them.
    assert fits.memory.state.total > 14 * 70_553_706_496 / 32


def test_check_refuses_it_on_gpus_too_few_to_hold_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(MODEL.read_bytes())
    here = f"model.path={tmp_path}"
    check_config(load_config(EXAMPLE / "config.toml", [here]))
    eight = load_config(EXAMPLE / "config.toml", [here, "parallel.pipeline=1", "parallel.virtual_pipeline=1"])
    with pytest.raises(ValueError, match=r"pipeline rank 0 needs .* GB .*h100-80gb has 81.5 GB to use; no layout of 8 GPUs fits"):
        check_config(eight)
    check_config(load_config(EXAMPLE / "config.toml", [here, "parallel.pipeline=1", "parallel.virtual_pipeline=1", "slurm.gpu=h200-141gb"]))


def test_the_plan_beside_it_is_what_the_command_prints() -> None:
    verb = [sys.executable, "-m", "spin_megatron.cli", "plan", str(EXAMPLE / "config.toml"), "--model-config", str(MODEL)]
    done = subprocess.run([*verb, "--gpus", "32", "--gpu", "h100-80gb"], capture_output=True, text=True, timeout=120, check=True)
    written = (EXAMPLE / "plan.txt").read_text(encoding="utf-8")
    assert done.stdout == written, "examples/llama3_70b/README.md has the command that writes plan.txt"
