"""Shards that answer side by side on one machine: GPUs of their own, and one progress bar over all."""

import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spin_megatron.config import RunConfig
from spin_megatron.generation.engine import EngineSpec, provider
from spin_megatron.launch import gpus, local, loop
from spin_megatron.launch.gpus import GpuPool, visible_gpus
from spin_megatron.plan.hardware import GPUS, gpu_of_driver_name
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.records import GeneratedRow, PromptRow, write_rows
from spin_megatron.stage_table import StageRef

H100 = "NVIDIA H100 80GB HBM3"
LLAMA_70B = Path(__file__).parents[2] / "examples" / "llama3_70b" / "model_config.json"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Put an nvidia-smi on PATH that shows so many GPUs."""

    def show(count: int) -> None:
        script = tmp_path / "bin" / "nvidia-smi"
        script.parent.mkdir(exist_ok=True)
        script.write_text("#!/bin/sh\n" + "".join(f"echo '{i}, GPU-{i}abc, {H100}'\n" for i in range(count)))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")

    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    return show


def test_visible_gpus_are_those_of_the_machine_or_those_that_were_chosen(
    nvidia_smi: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(3)
    assert visible_gpus() == [("0", H100), ("1", H100), ("2", H100)]
    monkeypatch.setenv(gpus.VISIBLE, "2,GPU-0abc")
    assert visible_gpus() == [("2", H100), ("GPU-0abc", H100)]
    monkeypatch.setenv(gpus.VISIBLE, "")
    assert visible_gpus() == []


def test_replicas_get_gpus_of_their_own_and_give_them_back() -> None:
    pool = GpuPool([str(i) for i in range(5)], 2)
    with pool.group() as first, pool.group() as second:
        assert (first, second) == ({gpus.VISIBLE: "0,1"}, {gpus.VISIBLE: "2,3"})  # the fifth is left over
    with pool.group() as one, pool.group() as other:
        assert {one[gpus.VISIBLE], other[gpus.VISIBLE]} == {"0,1", "2,3"}
    with GpuPool(["0"], 2).group() as too_few, GpuPool(["0"], 0).group() as needs_none:
        assert too_few == needs_none == {}


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("builtin", {}, 1),
        ("onnxruntime-genai", {}, 0),
        ("vllm", {"tensor_parallel": 2, "pipeline_parallel": 2}, 4),
        # 141 GB in bf16: the planner's rates a GPU are highest at 4 of 80 GB, and at 2 of 141 GB.
        ("trtllm-engine", {}, 4),
        ("trtllm-torch", {"pipeline_parallel": 2}, 8),
    ],
)
def test_a_replica_has_the_gpus_it_is_told_or_the_planner_s(name: str, options: dict[str, int], wanted: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(LLAMA_70B.read_text())
    spec = EngineSpec(tmp_path, "bfloat16", batch_size=256, max_prompt_tokens=512, max_new_tokens=1024, options=options)
    assert provider(name).gpus(spec, H100) == wanted
    if name == "trtllm-engine":
        assert provider(name).gpus(replace(spec, batch_size=64), "NVIDIA H200") == 2


def test_a_replica_in_fp32_is_planned_with_weights_of_four_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(LLAMA_70B.read_text())
    spec = EngineSpec(tmp_path, "float32", batch_size=256, max_prompt_tokens=512, max_new_tokens=1024)
    assert provider("vllm").gpus(spec, H100) == 8  # 282 GB; of 4 x 80 GB they would leave too little for keys and values


def test_the_driver_s_names_are_known_to_the_planner() -> None:
    assert gpu_of_driver_name("NVIDIA A100-SXM4-40GB") == GPUS["a100-40gb"]
    assert gpu_of_driver_name("NVIDIA A100-SXM4-80GB") == GPUS["a100-80gb"]
    assert gpu_of_driver_name(H100) == GPUS["h100-80gb"]
    assert gpu_of_driver_name("NVIDIA H200") == GPUS["h200-141gb"]
    assert gpu_of_driver_name("NVIDIA A100") is None  # which of two
    assert gpu_of_driver_name("NVIDIA GeForce RTX 4090") is None


def test_shards_run_on_different_gpus_under_one_bar(
    nvidia_smi: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvidia_smi(2)
    layout = RunLayout(tmp_path / "it's a run")
    values = {"model": {"path": "m"}, "data": {"source": "d"}, "generate": {"num_shards": 2}, "launch": {"shard_processes": 2}}
    config = RunConfig.model_validate(values)
    layout.root.mkdir()
    layout.run_json.write_text(config.model_dump_json())
    rows = [PromptRow(f"ex-{i}", (5,), (6,), False) for i in range(5)]
    write_rows(layout.prompts, rows, PromptRow)
    write_rows(layout.held_out, rows[:1], PromptRow)
    for shard in range(2):
        write_rows(layout.part(0, shard, 0), [GeneratedRow(f"ex-{shard}", (7, 2), "stop", 1)], GeneratedRow)
    # A stand-in for the stage: both shards wait for each other, then tell their GPU; what they show must not reach the terminal.
    body = """
        import os, sys, time, pathlib
        shard = sys.argv[sys.argv.index("--shard") + 1]
        folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
        (folder / f"here_{shard}").touch()
        while not all((folder / f"here_{k}").exists() for k in range(2)):
            time.sleep(0.02)
        (folder / f"gpu_{shard}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        print("a bar")
    """
    program = tmp_path / "rank.py"
    program.write_text(textwrap.dedent(body))
    monkeypatch.setattr(local, "PROGRAM", (sys.executable, str(program)))
    with local.Launcher() as launcher, caplog.at_level("INFO", logger="spin_megatron.progress"):
        codes = loop._run_shards(launcher, config, layout, [StageRef("generate", 0, 0), StageRef("generate", 0, 1)])
    assert codes == [0, 0]
    assert {(layout.root / f"gpu_{shard}").read_text() for shard in range(2)} == {"0", "1"}
    assert [path.read_text() for path in sorted(layout.root.rglob("attempt_1/rank_0.out"))] == ["a bar\n", "a bar\n"]
    assert loop.num_answered(config, layout, 0) == 2
