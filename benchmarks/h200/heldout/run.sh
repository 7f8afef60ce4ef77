#!/usr/bin/env bash
# The held-out experiments on hardware, each TIMES times (default 2), on a machine with as many GPUs as PART wants:
#
#   bash benchmarks/h200/heldout/run.sh OUTPUT [PART [SECONDS [TIMES]]]     # archives of at most 15 MB each are left in OUTPUT
#
#   calibrate  two GPUs: 1 + 1, then a mixed executor of each shape, one on each GPU; profiles in OUTPUT (5 minutes)
#   calibrate4 four GPUs: the same, and beside it 1 + 1 of the second shape, then a mixed executor of two GPUs (5 minutes)
#   calibrate_lanes  four GPUs: 1 + 1 and two mixed executors, each on the GPUs that `lanes` gives them (3 minutes)
#   pair       two GPUs: the 1p1_* files (five minutes a time)
#   routers    two GPUs: the 2_mixed* files (six minutes a time)
#   singles    two GPUs, a lane each: the queues beside the other 1_mixed_* files (4 minutes a time)
#   single     one GPU: all 1_mixed_* files (seven minutes a time)
#   lanes      four GPUs: the 1p1_* files beside the 2_mixed* ones (five minutes a time); the default
#   four       four GPUs: the 4gpu_* files (three minutes a time)
#   four_singles  four GPUs: the 1_mixed_* files but the queues, in four lanes (90 s a time)
#
# After SECONDS (default 520) no further cluster is started. Predictions are committed before (benchmarks/h200/predict.py).
# DISAGG_TRACES names the folder of the traces.
#
# What fails ends nothing else: archives are left in any case, and the exit code is 1 then. Of a calibration that failed the
# finished sessions are in an archive of their own, from which `disagg calibrate --resume` goes on.
set -euo pipefail
output=$(mkdir -p "$1" && cd "$1" && pwd)
part=${2:-lanes} seconds=${3:-520} times=${4:-2}
cd "$(dirname "$0")/../../.."
runs=$(mktemp -d)/heldout
here=benchmarks/h200/heldout
began=$(date +%s)
labels=$(for i in $(seq "$times"); do echo "--label hardware-$i"; done)
failed=0
pids=()
start() { # COMMAND…, beside all others
    "$@" &
    pids+=($!)
}
finish() { # waits for each by itself: a bare `wait` has no exit code of theirs
    local pid
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=1
    done
}
lane() { # lane GPUS FILE...
    local gpus=$1
    shift
    local left=$((seconds - ($(date +%s) - began))) code=0
    CUDA_VISIBLE_DEVICES=$gpus python3 benchmarks/h200/series.py --runs "$runs" $labels --until "$left" "$@" || code=$?
    [ "$code" = 0 ] || echo "GPUs $gpus: ended with $code"
    return "$code"
}
calibrate() { # calibrate GPUS FILE [PROFILE]
    local name=${3:-$2} code=0
    CUDA_VISIBLE_DEVICES=$1 python3 -m disagg calibrate "benchmarks/h200/calibrate_$2.yaml" --output "$profiles/$name.json" ||
        code=$?
    [ "$code" = 0 ] || echo "calibration of $name: ended with $code"
    return "$code"
}
one_after_another() { # of two calibrations on the same GPUs, the second also where the first failed
    local code=0
    calibrate 2,3 qwen || code=1
    calibrate 2,3 mixed_tp2 || code=1
    return "$code"
}
archive_profiles() { # removes what it has packed
    local sessions packed=1
    tar czf "$output/profiles.tgz" -C "$profiles" --exclude '*.sessions' .
    for sessions in "$profiles"/*.sessions; do
        if [ -d "$sessions" ] && [ ! -e "${sessions%.sessions}.json" ]; then
            python3 benchmarks/h200/archive.py "$sessions" "$output" --most-mb 15 --most-archives 4 || packed=0
        fi
    done
    if [ "$packed" = 1 ]; then rm -r "$profiles"; fi
}
case $part in
calibrate | calibrate4 | calibrate_lanes)
    profiles=$output/profiles
    mkdir -p "$profiles"
    case $part in
    calibrate4) start one_after_another ;;
    calibrate_lanes)
        start calibrate 2 mixed
        start calibrate 3 mixed mixed_b
        ;;
    esac
    calibrate 0,1 1p1 || failed=1
    if [ "$part" != calibrate_lanes ]; then
        start calibrate 0 mixed
        start calibrate 1 qwen_mixed
    fi
    finish
    archive_profiles
    exit "$failed"
    ;;
pair)
    lane 0,1 $here/1p1_{azure,near,closed,short,bursty,long,25gbps,5gbps,qwen}.yaml || failed=1
    ;;
routers)
    lane 0,1 $here/2_mixed.yaml $here/2_mixed_routers.yaml $here/2_mixed_prefix_routers.yaml || failed=1
    ;;
singles)
    start lane 0 $here/1_mixed_queues.yaml
    start lane 1 $here/1_mixed_{qwen,near,closed,azure,bursty,prefixes,short,long}.yaml
    finish
    ;;
single)
    lane 0 $here/1_mixed_{near,closed,azure,bursty,prefixes,short,long,queues,qwen}.yaml || failed=1
    ;;
lanes)
    start lane 0,1 $here/1p1_{azure,near,closed,short,bursty,long,25gbps,5gbps,qwen}.yaml
    start lane 2,3 $here/2_mixed.yaml $here/2_mixed_routers.yaml $here/2_mixed_prefix_routers.yaml
    finish
    ;;
four)
    lane 0,1,2,3 $here/4gpu_{2c2g,1c3g,4_mixed}.yaml || failed=1
    ;;
four_singles)
    start lane 0 $here/1_mixed_{near,closed,long}.yaml
    start lane 1 $here/1_mixed_{azure,bursty}.yaml
    start lane 2 $here/1_mixed_{short,prefixes}.yaml
    start lane 3 $here/1_mixed_qwen.yaml
    finish
    ;;
*)
    echo "PART $part; allowed: calibrate, calibrate4, calibrate_lanes, pair, routers, singles, single, lanes, four, four_singles" >&2
    exit 2
    ;;
esac
python3 benchmarks/h200/archive.py "$runs" "$output" --most-mb 15 --most-archives 4 || failed=1
exit "$failed"
