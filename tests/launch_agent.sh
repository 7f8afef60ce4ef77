#!/bin/sh
# Starts what is to run on host $1 on this machine instead, under that name and, with a clock of its own, $AGENT_SHIFT_S
# seconds ahead. Where namespaces are not to be had both are this machine's.
host=$1
shift
for root in "" --map-root-user; do
    if unshare $root --time --uts --fork true 2>/dev/null; then
        exec unshare $root --time --monotonic "${AGENT_SHIFT_S:-0}" --uts --fork sh -c 'hostname "$0"; eval "$1"' "$host" "$*"
    fi
done
exec sh -c "$*"
