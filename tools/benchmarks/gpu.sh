#!/usr/bin/env bash
# All GPU benchmarks on one GPU, meant for less than 8 minutes on an H100; leaves a JSON file a benchmark.
#
#   tools/benchmarks/gpu.sh [--out docs/benchmarks] [--python .venv/bin/python] [--trl-python TRL/bin/python] [--peak-tflops 989]
#   tools/benchmarks/gpu.sh --device cpu --out DIR      # a dry run of the same lines with tiny sizes
#
# The head at hidden 4096 and 8192 with Llama 3's vocabulary beside torch's, Megatron Core's and Liger's; every attention kernel that is
# installed; training steps of a 1B Llama beside TRL with Liger, or alone where there is no TRL. TRL and Liger: see train_step.py. Each
# benchmark has a time limit, and what failed or missed its gate is reported at the end, after everything was measured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

device=cuda out=docs/benchmarks python=.venv/bin/python trl_python='' peak_tflops=989
while [[ $# -gt 0 ]]; do
    case $1 in
        --device) device=$2 ;;
        --out) out=$2 ;;
        --python) python=$2 ;;
        --trl-python) trl_python=$2 ;;
        --peak-tflops) peak_tflops=$2 ;;
        *) echo "gpu.sh: $1 is no option of it; they are --device --out --python --trl-python --peak-tflops" >&2; exit 2 ;;
    esac
    shift 2
done
trl_python=${trl_python:-$python}
mkdir -p "$out"

if [[ $device == cpu ]]; then
    head=(--rows 48 --vocab 300 --rounds 1 --error-rows 8 --quick --dtype bfloat16) hidden=(16 24)
    attention=(--pack-tokens 2048 --heads 2 --groups 1 --head-dim 16 --rounds 1 --quick --dtype bfloat16)
    train_step=(--model micro --shorten 16 --pack-tokens 192 --pairs 2 --steps 2)
    trl_pairs=(1) limits=(900 900 900)
else
    head=(--rows 8192 --vocab 128256 --rounds 5 --dtype bfloat16) hidden=(4096 8192)
    # Megatron Core's own attention makes the scores of a whole pack, 32 x 8192 x 8192, several times over: 60 GB.
    attention=(--pack-tokens 4096 --heads 32 --groups 8 --head-dim 128 --rounds 10 --dtype bfloat16)
    train_step=(--model llama-1b --pack-tokens 8192 --pairs 64 --steps 4)
    trl_pairs=(2 8) limits=(80 60 220)
fi

failed=()
if ! "$trl_python" -c 'import trl' 2>/dev/null; then
    trl_pairs=()
    # A dry run does not miss it.
    [[ $device == cpu ]] || failed+=("TRL ($trl_python has none; tools/benchmarks/train_step.py says how to install it beside this project)")
fi
run() {
    local seconds=$1 name=$2 benchmark=$3
    shift 3
    echo "== $name ($(date +%T))"
    timeout --kill-after=10 "$seconds" "$python" -m "tools.benchmarks.$benchmark" "$@" --device "$device" --out "$out/${name}_$device.json" ||
        failed+=("$name")
}

for size in "${hidden[@]}"; do
    run "${limits[0]}" "head_h$size" head "${head[@]}" --hidden "$size"
done
run "${limits[1]}" attention attention "${attention[@]}"
run "${limits[2]}" "train_step_${train_step[1]}" train_step "${train_step[@]}" --dtype bfloat16 --peak-tflops "$peak_tflops" \
    --trl-python "$trl_python" --trl-pairs "${trl_pairs[@]}"
echo "== done ($(date +%T)); $out"
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "gpu.sh: failed, or missed its gate: ${failed[*]}" >&2
    exit 1
fi
