#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than 8 minutes on one H100 or H200: tests/gpu (CPU-GPU agreement, bf16 and each
# FP8 recipe from margins of exactly 0, memory and time of a slice of 70B against the plan, the optimizer in the host's memory, a killed run
# that goes on), and the benchmarks of the head and of a training step. tools/benchmarks has the longer ones.
#
#   tools/gpu_check.sh [OUT]                in the environment of tools/cuda_environment.sh: . DIR/activate first
#   WHEELS=DIR tools/gpu_check.sh [OUT]     python3 with torch 2.11 for CUDA 13.0: unpacks DIR/*.whl into DIR/site, without an index, and
#                                           writes DIR/activate, for what comes after
#
# OUT (default: gpu_check): summary.json (device, versions, outcome and numbers of each test, benchmarks), doctor.json, tests.jsonl (a line a
# test, as they come), benchmarks/, log.txt. Each part has a process and a time limit of its own: one that fails, hangs or dies leaves the
# others their turn, and what it had found is kept. Exit code: 0 all passed, 1 something failed or had no time, 2 nothing could run (no GPU,
# or a package is missing).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-gpu_check}
mkdir -p "$out/benchmarks"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
exec > >(tee "$out/log.txt") 2>&1
say() { printf '\n== %s (%(%H:%M:%S)T)\n' "$1" -1; }

if [[ -n ${WHEELS:-} ]]; then
    say "unpack $WHEELS beside this Python's torch"
    wheels=$(cd "$WHEELS" && pwd)
    # Into a folder, not an environment of its own: made from a Python that is itself in one, that would not see its torch.
    [[ -d $wheels/site ]] ||
        "$python" -m pip --disable-pip-version-check install -q --no-index --no-deps --target "$wheels/site" "$wheels"/*.whl
    libraries=$("$python" -c 'import nvidia, pathlib; print(next(path for path in nvidia.__path__ if pathlib.Path(path, "cudnn").is_dir()))')
    cat >"$wheels/activate" <<END
export PYTHONPATH="$wheels/site:$PWD\${PYTHONPATH:+:\$PYTHONPATH}"
export LD_LIBRARY_PATH="$libraries/nccl/lib:$libraries/cudnn/lib:$libraries/cu13/lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
END
    # shellcheck source=/dev/null
    . "$wheels/activate"
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "torch of $python sees no GPU: nothing here can run; the same checks without one are: make test" >&2; exit 2; }
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 SPIN_MEGATRON_GPU_RESULTS=$out/tests.jsonl
# Found out now, not after minutes: what is missing, and a Transformer Engine that is there but does not load.
"$python" -W ignore -c 'import importlib.util, megatron.core, pytest, pytest_timeout, transformers, safetensors, triton, spin_megatron.cli
if importlib.util.find_spec("transformer_engine"): import transformer_engine.pytorch' ||
    { echo "$python lacks a package (above); tools/cuda_environment.sh makes an environment and wheels" >&2; exit 2; }
# Products in one fixed order: the reference's bits must come again.
export CUBLAS_WORKSPACE_CONFIG=:4096:8 NVTE_ALLOW_NONDETERMINISTIC_ALGO=0
rm -f "$out"/{summary.json,doctor.json,tests.jsonl,benchmarks/*.json}

failed=0
# part SECONDS NAME ARGUMENTS...: a module of this Python; interrupted at its limit, so that it can still say where it was, then killed.
part() {
    local seconds=$1 name=$2
    shift 2
    say "$name"
    timeout --signal=INT --kill-after=10 "$seconds" "$python" -W ignore -m "$@" || { echo "$name: exit code $?"; failed=1; }
}

say "doctor"
timeout 15 "$python" -W ignore -m spin_megatron.cli doctor || true
timeout 15 "$python" -W ignore -m spin_megatron.cli doctor --json >"$out/doctor.json" || true
# A process each: after an illegal access CUDA answers no test of its process. First what everything else stands on, and what is measured;
# last, with all the time that is left, the longest, whose own tests come in the order of their worth.
tests() {
    part "$1" "$2" pytest -v --tb short -p no:cacheprovider -m gpu --timeout 120 "tests/gpu/test_$2.py"
}
tests 45 logprobs_cuda
part 40 "head" tools.benchmarks.head --device cuda --dtype bfloat16 --out "$out/benchmarks/head.json"
tests 70 policy_on_gpu
# This project's side alone; tools/benchmarks/gpu.sh measures TRL's beside it.
part 80 "training step" tools.benchmarks.train_step --model llama-1b --pack-tokens 8192 --pairs 32 --steps 2 --dtype bfloat16 --device cuda \
    --trl-pairs --out "$out/benchmarks/train_step.json"
tests $((465 - SECONDS)) training_on_gpu

say "summary"
"$python" tools/gpu_summary.py "$out" || failed=1
exit "$failed"
