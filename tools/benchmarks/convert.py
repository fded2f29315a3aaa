"""Measure the checkpoint converters at the shapes of Llama-3-70B, cut to a few layers.

    python tools/benchmarks/convert.py --folder /scratch/bench [--layers 4] [--json result.json]

makes a random model (11 GB with 4 layers), converts it to torch_dist and back, each in a fresh process, and copies the same files
plainly (shutil.copyfile and fsync) before and after each conversion. All of that twice: with the files to be read dropped from the
page cache first (cold), and read into it first (hot). Peak anonymous memory is sampled from outside, every 5 ms, above what the
process holds once torch is imported; mapped files do not count, the kernel takes their pages back. Exits with 1 when a bound is
missed: memory under one largest tensor, rate at least 70% of the copies'. Needs three times the model's bytes of disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from spin_megatron.convert.families import expected_huggingface_names
from spin_megatron.convert.safetensors_writer import PlannedTensor, open_file, plan_files, write_index
from spin_megatron.plan.shape import ModelShape

LEAST_RATE = 0.7
MOST_MEMORY = 1.0
_ROWS_BYTES = 64 * 2**20
Cache = Literal["cold", "hot"]
CACHES: tuple[Cache, ...] = ("cold", "hot")
DIRECTIONS = (("hf-to-megatron", "huggingface", "torch_dist"), ("megatron-to-hf", "torch_dist", "back"))
_CHILD = """
import sys
from pathlib import Path
from spin_megatron.convert import torch_dist
direction, source, destination = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
if direction == "hf-to-megatron":
    torch_dist.hf_to_torch_dist(source, destination, show=False)
else:
    torch_dist.torch_dist_to_hf(source, None, destination, show=False)
"""


@dataclass(frozen=True)
class Measured:
    """One direction. Rates in GB/s of the bytes of all tensors; memory in bytes."""

    direction: str
    cache: Cache
    num_bytes: int
    seconds: float
    copy_seconds: tuple[float, float]
    own_anonymous_bytes: int
    peak_anonymous_bytes: int
    largest_tensor_bytes: int

    @property
    def rate_of_copy(self) -> float:
        """The conversion's rate as a part of the copies' mean."""
        return (sum(self.copy_seconds) / 2) / self.seconds

    @property
    def memory_in_tensors(self) -> float:
        """Peak anonymous memory above the interpreter's own, in largest tensors."""
        return (self.peak_anonymous_bytes - self.own_anonymous_bytes) / self.largest_tensor_bytes


def main() -> int:
    """Run the benchmark; prints a table and, if asked, writes JSON."""
    parser = argparse.ArgumentParser(description="Measure the checkpoint converters at Llama-3-70B's shapes.")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on the disk to measure; removed at the end")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True)
    try:
        shape = llama3_70b(arguments.layers)
        make_model(folder / "huggingface", shape)
        measured = []
        for direction, source, destination in DIRECTIONS:
            for cache in CACHES:
                shutil.rmtree(folder / destination, ignore_errors=True)
                measured.append(measure(direction, cache, folder / source, folder / destination, shape))
            shutil.rmtree(folder / source)
    finally:
        shutil.rmtree(folder)
    report(measured)
    if arguments.json:
        rows = [asdict(row) | {"rate_of_copy": row.rate_of_copy, "memory_in_tensors": row.memory_in_tensors} for row in measured]
        arguments.json.write_text(json.dumps({"layers": arguments.layers, "cores": os.cpu_count(), "measured": rows}, indent=2) + "\n")
    return int(any(row.rate_of_copy < LEAST_RATE or row.memory_in_tensors >= MOST_MEMORY for row in measured))


def llama3_70b(num_layers: int) -> ModelShape:
    """Llama-3-70B's shape with fewer layers (config.json of meta-llama/Meta-Llama-3-70B)."""
    return ModelShape(
        family="llama",
        num_layers=num_layers,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_positions=8192,
        norm_epsilon=1e-5,
        rope_theta=500_000.0,
    )


def make_model(folder: Path, shape: ModelShape) -> None:
    """Write random bf16 weights in files of 5 GB, and the config."""
    folder.mkdir()
    names = sorted(expected_huggingface_names(shape).items(), key=lambda item: "layers" not in item[0])
    planned = plan_files([PlannedTensor(name, torch.bfloat16, size) for name, size in names], 5_000_000_000)
    block = torch.randn(_ROWS_BYTES // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    for file in planned:
        with open_file(folder, file) as handle:
            for tensor in file.tensors:
                width = tensor.num_bytes // tensor.shape[0] // 2
                step = max(1, block.numel() // width)
                for start in range(0, tensor.shape[0], step):
                    rows = min(step, tensor.shape[0] - start)
                    handle.write_rows(tensor.name, start, block[: rows * width].view(rows, *tensor.shape[1:]))
    write_index(folder, planned)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def measure(direction: str, cache: Cache, source: Path, destination: Path, shape: ModelShape) -> Measured:
    """Copy, convert, copy again; the copies are removed at once."""
    files = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".distcp"))
    before = time_copy(files, destination.with_name("copy"), cache)
    seconds, own, peak = time_conversion(direction, source, destination, files, cache)
    after = time_copy(files, destination.with_name("copy"), cache)
    sizes = [torch.Size(size).numel() * 2 for size in expected_huggingface_names(shape).values()]
    return Measured(direction, cache, sum(sizes), seconds, (before, after), own, peak, max(sizes))


def time_copy(files: Sequence[Path], target: Path, cache: Cache) -> float:
    """Seconds of a plain copy of files, each fsynced."""
    prepare(files, cache)
    target.mkdir()
    started = time.monotonic()
    for file in files:
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def time_conversion(direction: str, source: Path, destination: Path, files: Sequence[Path], cache: Cache) -> tuple[float, int, int]:
    """(seconds, anonymous bytes before, at most) of a conversion in a process of its own; its start and imports do not count."""
    prepare(files, cache)
    command = [sys.executable, "-c", _CHILD, direction, str(source), str(destination)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the converter's process ended with code {process.wait()}")
        own = peak = anonymous_bytes(process.pid)
        started = time.monotonic()
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.005)
        seconds = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"{direction} ended with code {process.returncode}")
    return seconds, own, peak


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process that is in RAM; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def prepare(files: Sequence[Path], cache: Cache) -> None:
    """Write out what earlier runs left, then drop files from the page cache or read them into it."""
    os.sync()
    block = bytearray(_ROWS_BYTES)
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            if cache == "cold":
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cache == "hot" and handle.readinto(block):
                pass


def report(measured: Sequence[Measured]) -> None:
    """Print the table."""
    print(f"{'direction':<16}{'cache':>6}{'GB':>7}{'seconds':>9}{'GB/s':>7}{'copy s':>16}{'of copy':>9}{'anon MB':>9}{'tensors':>9}")
    for row in measured:
        rate = row.num_bytes / row.seconds / 1e9
        copies = f"{row.copy_seconds[0]:.1f}, {row.copy_seconds[1]:.1f}"
        anonymous = (row.peak_anonymous_bytes - row.own_anonymous_bytes) / 1e6
        print(
            f"{row.direction:<16}{row.cache:>6}{row.num_bytes / 1e9:>7.2f}{row.seconds:>9.1f}{rate:>7.2f}{copies:>16}"
            f"{row.rate_of_copy:>9.0%}{anonymous:>9.0f}{row.memory_in_tensors:>9.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
