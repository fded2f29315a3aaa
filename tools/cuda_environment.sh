#!/usr/bin/env bash
# The reference environment for NVIDIA GPUs: Python 3.12, torch 2.11 (CUDA 13.0), megatron-core 0.19.2, Transformer Engine 2.20.2 and this
# package. The machine that makes it needs nvcc 13.0 and no GPU: Transformer Engine's part for torch is compiled here (about 16 minutes
# on 2 cores, 5 GB of disk). Run again, it goes on where it stopped.
#
#   tools/cuda_environment.sh DIR [PYTHON3.12]     makes DIR/venv and DIR/wheels
#   . DIR/activate                                 the environment, with CUDA's libraries on the path
#   CUDA_ARCHS=100 tools/cuda_environment.sh DIR   for Blackwell; 90, Hopper, by default; "90;100" for both
#   MAX_JOBS=8 tools/cuda_environment.sh DIR       compilers at a time; 2 by default
#
# DIR/wheels is what another machine with torch 2.11 for CUDA 13.0 installs without compiling and without an index:
#   pip install --no-index --no-deps DIR/wheels/*.whl && pip install --no-index --no-deps --no-build-isolation -e .
set -euo pipefail

torch=2.11.0 engine=2.20.2 core=0.19.2
[[ $# -ge 1 ]] || { echo "usage: $0 DIR [PYTHON3.12]" >&2; exit 2; }
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$(mkdir -p "$1/wheels" && cd "$1" && pwd)
python=${2:-python3.12}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "$python is not Python 3.12; give one: $0 $1 PYTHON" >&2; exit 2; }
[[ -x $folder/venv/bin/python ]] || "$python" -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip --disable-pip-version-check)

# The versions that the CPU suite is tested with, but for torch and what it asks to be older.
sed -E '/^(torch|triton|setuptools)==/d' "$repository/constraints.txt" >"$folder/constraints.txt"
echo "torch==$torch" >>"$folder/constraints.txt"
"${pip[@]}" install -q -c "$folder/constraints.txt" torch==$torch setuptools wheel pybind11 ninja packaging
# What Transformer Engine and Megatron Core import; they themselves come without dependencies, which name other builds of torch.
"${pip[@]}" install -q -c "$folder/constraints.txt" einops onnx onnxscript pydantic nvdlfw_inspect numpy psutil importlib-metadata nvidia-cudnn-frontend

has_wheel() { compgen -G "$folder/wheels/$1-*.whl" >/dev/null; }
has_wheel "transformer_engine_cu13-$engine" ||
    "${pip[@]}" download -q --no-deps -d "$folder/wheels" transformer-engine-cu13==$engine transformer-engine==$engine megatron-core==$core
"${pip[@]}" install -q --no-deps "$folder"/wheels/{transformer_engine_cu13-$engine,transformer_engine-$engine,megatron_core-$core}-*.whl
libraries=$("$folder/venv/bin/python" -c 'import nvidia, pathlib; print(pathlib.Path(list(nvidia.__path__)[0]))')

if ! has_wheel "transformer_engine_torch-$engine"; then
    command -v nvcc >/dev/null || { echo "nvcc is not on PATH; install the CUDA 13.0 toolkit, or copy DIR/wheels from a machine that has it" >&2; exit 2; }
    archs=${CUDA_ARCHS:-90}
    # 90;100 as torch writes it: 9.0;10.0
    torch_archs=$(sed -E 's/([0-9]+)([0-9])/\1.\2/g' <<<"$archs")
    echo "compiling Transformer Engine $engine for torch $torch and CUDA architectures $archs"
    # nvcc itself says where its toolkit is: what is called so on PATH may be a wrapper that lies elsewhere.
    CUDA_HOME=${CUDA_HOME:-$(realpath "$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')")}
    export CUDA_HOME MAX_JOBS=${MAX_JOBS:-2} NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_CUDA_ARCHS=$archs
    export TORCH_CUDA_ARCH_LIST=$torch_archs PATH=$folder/venv/bin:$PATH
    export CPATH=$libraries/cu13/include:$libraries/nccl/include:$libraries/cudnn/include LIBRARY_PATH=$libraries/cu13/lib:$libraries/nccl/lib
    # Without pip's cache, where a wheel for other architectures or another torch may lie under the same name.
    "${pip[@]}" wheel -q --no-cache-dir --no-deps --no-build-isolation --no-binary=transformer-engine-torch -w "$folder/wheels" transformer-engine-torch==$engine
fi
"${pip[@]}" install -q --no-deps "$folder"/wheels/transformer_engine_torch-$engine-*.whl
"${pip[@]}" install -q -c "$folder/constraints.txt" -e "${repository}[dev]"
# All that was installed but torch, what belongs to it, and this package: for machines without an index.
"${pip[@]}" freeze --exclude-editable | sed -E '/^(torch|triton|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*|transformer[-_]engine.*|megatron[-_]core)(==| @)/{/^nvidia-cudnn-frontend==/!d}' >"$folder/wheels.txt"
find "$folder/wheels" -name '*.whl' ! -name 'transformer_engine*' ! -name 'megatron_core*' -delete  # of an earlier run
"${pip[@]}" download -q --no-deps -d "$folder/wheels" -r "$folder/wheels.txt"

cat >"$folder/activate" <<END
export PATH="$folder/venv/bin:\$PATH"
export LD_LIBRARY_PATH="$libraries/nccl/lib:$libraries/cudnn/lib:$libraries/cu13/lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
END
# shellcheck source=/dev/null
. "$folder/activate"
# Importing it loads the compiled part; nothing of it needs a GPU yet.
python -W ignore -c 'import transformer_engine.pytorch, torch
from importlib.metadata import version
print(*(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformer-engine", "spin-megatron")), sep=", ")'
echo "use it with: . $folder/activate"
