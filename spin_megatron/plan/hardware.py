"""What a GPU can do, from its makers' data sheets: the numbers every estimate of the planner starts from.

Rates are per GPU. Network and NVLink rates are one direction: half of the "bidirectional" number a data sheet shows.
"""

import difflib
import re
from dataclasses import dataclass

GIB = 2**30
TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU in its usual 8-GPU server.

    memory_bytes: what the driver gives a process (torch's total_memory), less than the name says.
    bf16_flops, fp8_flops: peak dense FLOP/s of the tensor cores; fp8_flops is None where there is no FP8.
    capability: CUDA compute capability.
    memory_bandwidth, nvlink_bandwidth, network_bandwidth, host_bandwidth: bytes/s; network: one NIC a GPU; host: PCIe.
    host_memory_bandwidth: a GPU's share of the server's main memory, bytes/s.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    fp8_flops: float | None
    capability: tuple[int, int]
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    host_memory_bandwidth: float
    gpus_per_node: int = 8


# Sources of each row: the data sheet of the GPU (dense rates are half of the sparse ones it prints) and of the DGX or HGX
# server for the network. memory_bytes is torch.cuda.get_device_properties(0).total_memory as printed by that GPU in public logs.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 data sheet (June 2021): 312 TFLOP/s bf16, 2039 GB/s (80 GB) or 1555 GB/s (40 GB), NVLink 600 GB/s both ways, PCIe 4.
        # DGX A100 data sheet: 8 x 200 Gb/s HDR; two EPYC 7742, each 8 channels of DDR4-3200, 204.8 GB/s.
        Gpu("a100-40gb", int(39.4 * GIB), 312 * TERA, None, (8, 0), 1555 * GIGA, 300 * GIGA, 25 * GIGA, 25 * GIGA, 51 * GIGA),
        Gpu("a100-80gb", int(79.15 * GIB), 312 * TERA, None, (8, 0), 2039 * GIGA, 300 * GIGA, 25 * GIGA, 25 * GIGA, 51 * GIGA),
        # NVIDIA H100 data sheet (SXM): 989.4 and 1978.9 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s both ways, PCIe 5.
        # DGX H100 data sheet: 8 x 400 Gb/s NDR; two Xeon 8480C, each 8 channels of DDR5-4800, 307.2 GB/s.
        Gpu("h100-80gb", int(79.1 * GIB), 989.4 * TERA, 1978.9 * TERA, (9, 0), 3350 * GIGA, 450 * GIGA, 50 * GIGA, 50 * GIGA, 77 * GIGA),
        # NVIDIA H200 data sheet (SXM): H100's compute, 141 GB at 4.8 TB/s.
        Gpu("h200-141gb", int(139.7 * GIB), 989.4 * TERA, 1978.9 * TERA, (9, 0), 4800 * GIGA, 450 * GIGA, 50 * GIGA, 50 * GIGA, 77 * GIGA),
        # NVIDIA dgxc-benchmarking README, "Peak Theoretical Throughput" and reference architectures (July 2026): B200 2250 and 4500
        # TFLOP/s dense, 180 GB, NVLink 1.8 TB/s both ways, 8 x 400 Gb/s; B300 the same rates, 270 GB, 8 x 800 Gb/s.
        # DGX B200: two Xeon 8570, each 8 channels of DDR5-5600; DGX B300: two Xeon 6776P, each 8 of DDR5-6400.
        # The memory bus is 7680 bits at 3996 MHz: 7.67 TB/s (pytorch/ao #4002, which also shows the 178.35 GiB).
        Gpu("b200-180gb", int(178.35 * GIB), 2250 * TERA, 4500 * TERA, (10, 0), 7670 * GIGA, 900 * GIGA, 50 * GIGA, 50 * GIGA, 90 * GIGA),
        Gpu("b300-270gb", int(267.5 * GIB), 2250 * TERA, 4500 * TERA, (10, 3), 7670 * GIGA, 900 * GIGA, 100 * GIGA, 50 * GIGA, 102 * GIGA),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name; "h100" is enough where it says which one.

    Raises:
        ValueError: no or several GPUs of that name; the message lists them.
    """
    wanted = name.lower().removeprefix("nvidia-").replace("_", "-")
    if wanted in GPUS:
        return GPUS[wanted]
    beginning = [known for known in GPUS if known.startswith(f"{wanted}-")]
    if len(beginning) == 1:
        return GPUS[beginning[0]]
    close = beginning or difflib.get_close_matches(wanted, GPUS, n=1)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"--gpu {name!r} is not in the table of GPUs; known are {', '.join(GPUS)} (spin_megatron/plan/hardware.py).{hint}")


def gpu_of_driver_name(name: str) -> Gpu | None:
    """The GPU that nvidia-smi calls, say, "NVIDIA H100 80GB HBM3"; None where the table has none, or several and the name does not say."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    of_model = [gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in words]
    of_memory = [gpu for gpu in of_model if gpu.name.partition("-")[2] in words]
    found = of_memory or of_model
    return found[0] if len(found) == 1 else None
