"""What this machine must have before a cluster is started on it: the GPUs that are asked for, or memory for the KV pools.

Knows no PyTorch where the device is the CPU: the ranks load it, and whoever starts them has no use for it.
"""

from __future__ import annotations

import os

from ..core.model_shapes import DTYPE_BYTES
from .executor_spec import DeviceError, Roster


def check_machine(roster: Roster) -> None:
    """Raises DeviceError if this machine alone cannot hold the cluster: no such device, or less memory than KV."""
    if roster.spec.device != "cpu":
        _check_one_gpu_a_rank(roster)
        from .devices import check_device  # it loads PyTorch, which takes as long as all else before a start

        for rank in roster.executor_of:
            check_device(roster.device_of(rank))
        return
    memory = _memory_bytes()
    if memory is None:
        return
    needed = {executor: _pool_bytes(roster, executor) for executor in roster.configs}
    if sum(needed.values()) > memory:
        largest = max(needed, key=lambda executor: needed[executor])
        config = roster.configs[largest]
        raise DeviceError(
            f"the KV caches need {sum(needed.values())} bytes, but this machine has {memory} bytes of memory; the largest"
            f" is executor {largest}'s, {needed[largest]} bytes for kv_cache.max_tokens"
            f" {config.num_blocks * config.tokens_per_block}: lower it"
        )


def _check_one_gpu_a_rank(roster: Roster) -> None:
    """Ranks of one executor talk through NCCL, which wants a device of its own for each of them."""
    for executor, placement in roster.placements.items():
        devices = [roster.device_of(rank) for rank in placement.participant_ids]
        if len(set(devices)) < len(devices):
            raise DeviceError(
                f"executor {executor} has device_ids {list(placement.device_ids)} for {len(devices)} ranks; allowed: a GPU of"
                " its own for each rank of an executor (several executors may share one)"
            )


def _pool_bytes(roster: Roster, executor: int) -> int:
    config, layout = roster.configs[executor], roster.layouts[executor]
    ranks = range(len(roster.placements[executor].participant_ids))
    num_tokens = config.num_blocks * config.tokens_per_block
    return sum(layout.kv_bytes_per_token(rank, DTYPE_BYTES[layout.dtype]) for rank in ranks) * num_tokens


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
