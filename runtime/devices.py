"""What a rank's device must have before the rank takes it: it is there, and has room for weights and KV pool."""

from __future__ import annotations

import torch

from ..core.config import ExecutorConfig
from .executor_spec import DeviceError
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
