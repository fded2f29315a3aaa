#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than 8 minutes on one H100 or H200: tests/gpu (CPU-GPU agreement, bf16 and each
# FP8 recipe from margins of exactly 0, memory and time of a slice of 70B against the plan, the optimizer in the host's memory, a killed run
# that goes on), and the benchmark of the head. tools/benchmarks has the longer ones.
#
#   tools/gpu_check.sh [OUT]                in the environment of tools/cuda_environment.sh: . DIR/activate first
#   WHEELS=DIR tools/gpu_check.sh [OUT]     python3.12 with torch 2.11 for CUDA 13.0 and nothing else: installs DIR/*.whl, without an index
#
# OUT (default: gpu_check): summary.json (device, versions, outcome and numbers of each test, benchmarks), doctor.json, tests.xml,
# benchmarks/, log.txt. Exit code: 0 all passed, 1 something failed, 2 there is no GPU.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-gpu_check}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3.12}
exec > >(tee "$out/log.txt") 2>&1
say() { printf '\n== %s (%(%H:%M:%S)T)\n' "$1" -1; }

if [[ -n ${WHEELS:-} ]]; then
    say "install $WHEELS beside this Python's torch"
    [[ -x $out/venv/bin/python ]] || "$python" -m venv --system-site-packages "$out/venv"
    python=$out/venv/bin/python
    "$python" -m pip --disable-pip-version-check install -q --no-index --no-deps "$WHEELS"/*.whl
    "$python" -m pip --disable-pip-version-check install -q --no-index --no-deps --no-build-isolation -e .
    libraries=$("$python" -c 'import nvidia, pathlib; print(pathlib.Path(list(nvidia.__path__)[0]))')
    export LD_LIBRARY_PATH=$libraries/nccl/lib:$libraries/cudnn/lib:$libraries/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "torch of $python sees no GPU: nothing here can run; the same checks without one are: make test" >&2; exit 2; }
binaries=$(dirname "$(command -v "$python")")
export PATH=$binaries:$PATH HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
# Products in one fixed order: the reference's bits must come again.
export CUBLAS_WORKSPACE_CONFIG=:4096:8 NVTE_ALLOW_NONDETERMINISTIC_ALGO=0

say "doctor"
"$python" -m spin_megatron.cli doctor || true
"$python" -m spin_megatron.cli doctor --json >"$out/doctor.json" || true

failed=0
say "tests"
timeout --kill-after=10 270 "$python" -W ignore -m pytest -q -p no:cacheprovider -m gpu --timeout 120 --durations 10 \
    --junitxml "$out/tests.xml" tests/gpu || failed=1

say "benchmarks"
mkdir -p "$out/benchmarks"
timeout --kill-after=10 80 "$python" -W ignore -m tools.benchmarks.head --device cuda --dtype bfloat16 --out "$out/benchmarks/head.json" || failed=1
# This project's side alone; tools/benchmarks/gpu.sh measures TRL's beside it.
timeout --kill-after=10 80 "$python" -W ignore -m tools.benchmarks.train_step --model llama-1b --pack-tokens 8192 --pairs 32 --steps 2 \
    --dtype bfloat16 --device cuda --trl-pairs --out "$out/benchmarks/train_step.json" || failed=1

say "summary"
"$python" tools/gpu_summary.py "$out" || failed=1
exit "$failed"
