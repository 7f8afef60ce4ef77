#!/usr/bin/env bash
# The held-out experiments on hardware, each TIMES times (default 2), on a machine with as many GPUs as PART wants:
#
#   bash benchmarks/h200/heldout/run.sh OUTPUT [PART [SECONDS [TIMES]]]     # archives of at most 15 MB each are left in OUTPUT
#
#   pair    two GPUs: the 1p1_* files, then two lanes of one GPU: the queues beside the other 1_mixed_* files (6 minutes a time)
#   lanes   four GPUs: the 1p1_* files beside the 2_mixed_* ones (seven minutes for two times); the default
#   four    four GPUs: the 4gpu_* files (five minutes for two times)
#
# After SECONDS (default 520) no further cluster is started. Predictions are committed before (benchmarks/h200/predict.py).
# DISAGG_TRACES names the folder of the traces.
set -euo pipefail
output=$(mkdir -p "$1" && cd "$1" && pwd)
part=${2:-lanes} seconds=${3:-520} times=${4:-2}
cd "$(dirname "$0")/../../.."
runs=$(mktemp -d)/heldout
here=benchmarks/h200/heldout
began=$(date +%s)
labels=$(for i in $(seq "$times"); do echo "--label hardware-$i"; done)
lane() { # lane GPUS FILE...
    local gpus=$1
    shift
    local left=$((seconds - ($(date +%s) - began)))
    CUDA_VISIBLE_DEVICES=$gpus python3 benchmarks/h200/series.py --runs "$runs" $labels --until "$left" "$@" ||
        echo "GPUs $gpus: ended with $?"
}
case $part in
pair)
    lane 0,1 $here/1p1_{short,bursty,azure,near,closed,long,25gbps,5gbps}.yaml
    lane 0 $here/1_mixed_queues.yaml &
    lane 1 $here/1_mixed_{qwen,short,near,closed,prefixes}.yaml &
    wait
    ;;
lanes)
    lane 0,1 $here/1p1_{short,long,bursty,azure,near,closed,25gbps,5gbps}.yaml &
    lane 2,3 $here/2_mixed_routers.yaml $here/2_mixed.yaml $here/1p1_qwen.yaml &
    wait
    ;;
four)
    lane 0,1,2,3 $here/4gpu_{2c2g,1c3g,4_mixed}.yaml
    ;;
*)
    echo "PART $part; allowed: pair, lanes, four" >&2
    exit 2
    ;;
esac
python3 benchmarks/h200/archive.py "$runs" "$output" --most-mb 15 --most-archives 4
