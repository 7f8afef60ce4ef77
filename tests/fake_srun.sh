#!/bin/sh
# srun as PRRTE calls it, with one node at a time, on this machine: asks for its version, or starts a daemon on a node.
if [ "$1" = --version ]; then
    echo "slurm 23.11.4"
    exit 0
fi
while [ $# -gt 0 ]; do
    case "$1" in
    --nodelist=*) node=${1#*=} ;;
    -*) ;;
    *) break ;;
    esac
    shift
done
export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
echo "$node" >>"$FAKE_SRUN_LOG"
exec "$@"
