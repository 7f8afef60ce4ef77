"""What the machine must have before ranks can take it: the device that is asked for, and room for the KV pools."""

from __future__ import annotations

import os

import torch

from ..core.config import ExecutorConfig
from .executor_spec import DeviceError, Roster
from .kv_pages import KvPages, needed_bytes
from .model_place import Place
from .weights import needed_weight_bytes


def check_device(device: str) -> None:
    """Raises DeviceError for a device that this process cannot use."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU here"
        raise DeviceError(f"device: {kind} cannot be had: {why}; allowed here: device: cpu")
    if index and int(index) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise DeviceError(f"device {device} cannot be had: the GPUs here are 0 to {last}; device: cpu needs none")


def check_machine(roster: Roster) -> None:
    """Raises DeviceError if this machine alone cannot hold the cluster: no such device, or less memory than KV."""
    if roster.spec.device != "cpu":
        _check_one_gpu_a_rank(roster)
    for rank in roster.executor_of:
        check_device(roster.device_of(rank))
    if roster.spec.device != "cpu":
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


def check_weights_fit(place: Place, device: str) -> None:
    """Raises DeviceError, before anything is loaded, if a GPU has no room for this rank's weights."""
    if torch.device(device).type != "cuda":
        return
    needed = needed_weight_bytes(place)
    free, total = torch.cuda.mem_get_info(torch.device(device))
    if needed > free:
        raise DeviceError(
            f"{device}: the weights of {place.shape.name} need {needed >> 20} MiB on each rank with tensor_parallel_size"
            f" {place.tp} and pipeline_parallel_size {place.layout.pp}, and {free >> 20} MiB of {total >> 20} MiB are free;"
            " raise tensor_parallel_size or pipeline_parallel_size, choose a smaller model, or free the device"
        )


def take_pages(place: Place, config: ExecutorConfig, device: str) -> KvPages:
    """The KV pool of one rank. Raises DeviceError where there is no memory for it."""
    try:
        return KvPages(place.layout, place.rank, config.num_blocks, config.tokens_per_block, device)
    except (RuntimeError, MemoryError) as error:  # torch has no one name for it
        needed = needed_bytes(place.layout, place.rank, config.num_blocks, config.tokens_per_block)
        first = str(error).strip().partition("\n")[0]
        raise DeviceError(
            f"kv_cache.max_tokens {config.num_blocks * config.tokens_per_block} needs {needed} bytes for this rank's part"
            f" on {device}, which cannot be had: {first}; lower it"
        ) from error


def _pool_bytes(roster: Roster, executor: int) -> int:
    config, layout = roster.configs[executor], roster.layouts[executor]
    ranks = range(len(roster.placements[executor].participant_ids))
    return sum(needed_bytes(layout, rank, config.num_blocks, config.tokens_per_block) for rank in ranks)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
