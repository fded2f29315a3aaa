"""Process groups: every rank stands where the layout says, and stopping leaves nothing behind."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from spin_megatron.mcore.cpu_shim import PATCHES, megatron_on_cpu
from spin_megatron.mcore.runtime import Runtime, _open_device, running, start_runtime
from spin_megatron.plan.shape import ParallelLayout
from tests.parity.gloo import meeting_ports, run_ranks


def _sum_over(group: dist.ProcessGroup, value: int) -> int:
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, group=group)
    return int(tensor)


def _coordinates(layouts: list[ParallelLayout], ports: list[int]) -> list[list[int]]:
    found = []
    for layout, port in zip(layouts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with running(layout, device="cpu", seed=1) as runtime:
            groups = runtime.groups
            sums = [_sum_over(group, 2**runtime.rank) for group in (groups.tensor, groups.data, groups.pipeline, groups.model)]
            found.append([runtime.tensor_rank, runtime.data_rank, runtime.pipeline_rank, *sums, runtime.is_loss_rank])
        assert not dist.is_initialized()
        assert vars(torch.Tensor).get("cuda") is None
    return found


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _freed_between_tensors() -> int:
    with running(ParallelLayout(), device="cpu", seed=1):
        tensors = [torch.ones(2**19) for _ in range(64)]  # 2 MiB each
        before = _resident_bytes()
        del tensors[::2]
        return before - _resident_bytes()


def test_memory_between_tensors_that_live_on_goes_back_to_the_system() -> None:
    # In a process of its own: in this one's heap other tests have left room that would be taken first.
    (freed,) = run_ranks(_freed_between_tensors, 1)
    assert freed > 56 * 2**20


def test_ranks_are_laid_out_tensor_first_then_data_then_pipeline() -> None:
    layouts = [ParallelLayout(tensor=2, data=2), ParallelLayout(data=2, pipeline=2)]
    with meeting_ports(len(layouts)) as ports:
        by_rank = run_ranks(_coordinates, 4, layouts, ports, timeout=200)
    # (tensor, data, pipeline) rank; members of the tensor, data, pipeline and model group as sums of 2**rank; holds the loss
    assert [found[0] for found in by_rank] == [
        [0, 0, 0, 0b0011, 0b0101, 0b0001, 0b0011, True],
        [1, 0, 0, 0b0011, 0b1010, 0b0010, 0b0011, False],
        [0, 1, 0, 0b1100, 0b0101, 0b0100, 0b1100, True],
        [1, 1, 0, 0b1100, 0b1010, 0b1000, 0b1100, False],
    ]
    assert [found[1] for found in by_rank] == [
        [0, 0, 0, 0b0001, 0b0011, 0b0101, 0b0101, False],
        [0, 1, 0, 0b0010, 0b0011, 0b1010, 0b1010, False],
        [0, 0, 1, 0b0100, 0b1100, 0b0101, 0b0101, True],  # the last stage holds the loss
        [0, 1, 1, 0b1000, 0b1100, 0b1010, 0b1010, True],
    ]


def test_a_layout_that_does_not_fit_the_number_of_ranks_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"parallel\.tensor=2 x pipeline=2 .* needs 4 ranks, but WORLD_SIZE=1; start 4 ranks"):
        start_runtime(ParallelLayout(tensor=2, pipeline=2), device="cpu", seed=1)
    assert not dist.is_initialized()


def test_several_ranks_without_a_meeting_point_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR is not set, but WORLD_SIZE=2"):
        start_runtime(ParallelLayout(data=2), device="cpu", seed=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="sees no GPU"):
        start_runtime(ParallelLayout(), device="cuda", seed=1)


def test_one_rank_starts_without_a_launcher_and_can_be_started_again() -> None:
    assert "MASTER_PORT" not in os.environ
    for _ in range(2):
        with running(ParallelLayout(), device="cpu", seed=3) as runtime:
            assert isinstance(runtime, Runtime)
            assert runtime.is_loss_rank
            assert _sum_over(runtime.groups.tensor, 5) == 5


def test_the_meta_device_still_works_under_and_after_the_shim() -> None:
    # In a fresh process: torch remembers its tensor factories when a device context is first entered.
    script = (
        "import torch\n"
        "from spin_megatron.mcore.cpu_shim import PATCHES, megatron_on_cpu\n"
        "with megatron_on_cpu([patch for patch in PATCHES if patch.name == 'device arguments']):\n"
        "    with torch.device('meta'):\n"
        "        print(torch.zeros(2).device.type, torch.empty(2).device.type)\n"
        "with torch.device('meta'):\n"
        "    print(torch.zeros(2).device.type, torch.empty(2).device.type)\n"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.split() == ["meta"] * 4


def test_the_shim_restores_every_attribute_even_after_an_error() -> None:
    replaced = [(item.owner, item.attribute) for patch in PATCHES for item in patch.replacements()]
    before = [vars(owner).get(attribute, "absent") for owner, attribute in replaced]

    @megatron_on_cpu()
    def fail_inside() -> None:
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    after = [vars(owner).get(attribute, "absent") for owner, attribute in replaced]
    assert all(old is new for old, new in zip(before, after, strict=True))
    assert len(replaced) >= 15


def test_kernels_on_a_gpu_are_asked_for_the_same_bits_in_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert _open_device("cuda", contextlib.ExitStack()) == torch.device("cuda", 0)
    # What is set stays the user's choice.
    assert environment == {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
