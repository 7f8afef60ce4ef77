#!/usr/bin/env bash
# All held-out experiments, twice each, on a machine with four GPUs: two lanes of two GPUs side by side, then those over four.
#
#   bash benchmarks/h200/heldout/run.sh OUTPUT [SECONDS [PART]]     # archives of at most 15 MB each are left in OUTPUT
#
# PART: two (GPUs an experiment, about seven minutes), four (about five), or both. After SECONDS (default 720) no further
# cluster is started. Predictions are committed before
# (benchmarks/h200/predict.py). DISAGG_TRACES names the folder of the traces.
set -euo pipefail
output=$(mkdir -p "$1" && cd "$1" && pwd)
seconds=${2:-720} part=${3:-both}
cd "$(dirname "$0")/../../.."
runs=$(mktemp -d)/heldout
here=benchmarks/h200/heldout
began=$(date +%s)
lane() { # lane GPUS LABELS FILE...
    local gpus=$1 labels=$2
    shift 2
    local left=$((seconds - ($(date +%s) - began)))
    CUDA_VISIBLE_DEVICES=$gpus python3 benchmarks/h200/series.py --runs "$runs" $labels --until "$left" "$@"
}
both="--label hardware-1 --label hardware-2"
if [ "$part" != four ]; then
    lane 0,1 "$both" $here/1p1_{short,long,bursty,azure,near,closed,25gbps,5gbps}.yaml &
    first=$!
    lane 2,3 "$both" $here/2_mixed_routers.yaml $here/2_mixed.yaml $here/1p1_qwen.yaml &
    second=$!
    wait $first || echo "lane 1 ended with $?"
    wait $second || echo "lane 2 ended with $?"
fi
if [ "$part" != two ]; then
    lane 0,1,2,3 "$both" $here/4gpu_{2c2g,1c3g,4_mixed,tp2}.yaml || echo "four GPUs: $?"
fi
python3 benchmarks/h200/archive.py "$runs" "$output" --most-mb 15 --most-archives 4
