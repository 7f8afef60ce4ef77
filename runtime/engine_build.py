"""What an engine stands on, built on its device: collectives, KV pool and stepper, in an order that fits the memory.

On a GPU with a memory fraction the KV pool is sized last: a small pool serves to find out what the kernels, the largest
chunk and the graphs take, is given back, and the real one gets its share of what is then left.
"""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass
from typing import Any, Final

import torch

from ..core.config import ExecutorConfig
from ..core.step_sizes import chunk_graph_decodes
from ..policies.vocabulary import Role
from .collectives import Collectives, MpiCollectives, SingleRank
from .devices import take_pages
from .executor_spec import DeviceError
from .kv_pages import KvPages, needed_bytes
from .model_place import Place
from .stepper import Stepper
from .weights import ModelWeights

_TRIAL_TOKENS: Final = 4096
_MARGIN_BYTES: Final = 64 << 20  # what a second warm-up may take beyond the first


@dataclass(frozen=True, slots=True)
class Built:
    """`stepper` None: the engine's own plain one. `free_bytes`: left on the device in the end."""

    pages: KvPages
    stepper: Stepper | None
    free_bytes: int | None = None


def executor_collectives(group: Any, place: Place, device: str) -> Collectives:
    """How the ranks of one executor talk inside a step. Collective over `group` (None: one rank)."""
    if group is None:
        return SingleRank()
    if torch.device(device).type != "cuda":
        return MpiCollectives(group, place.tp)
    from .nccl import NcclCollectives
    from .peer_start import peer_reduce

    torch.cuda.set_device(device)
    return NcclCollectives(group, place.tp, *peer_reduce(group, place, torch.device(device)))


def build_stepper(
    place: Place,
    weights: ModelWeights,
    config: ExecutorConfig,
    collectives: Collectives,
    group: Any,
    device: str,
    fraction: float | None,
    record_margins: bool,
) -> Built:
    """The KV pool of one rank, and on a GPU a warm stepper over it. Collective over `group`, None for one rank.

    `fraction`: of the device's free memory for the KV; else `config.num_blocks`. Raises DeviceError.
    """
    if torch.device(device).type != "cuda":
        return Built(take_pages(place, config, device), None)
    torch.cuda.set_device(device)
    try:
        return _on_gpu(place, weights, config, collectives, group, device, fraction, record_margins)
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(_out_of_memory(str(error), place, weights, config, device, fraction)) from error


def _out_of_memory(
    error: str, place: Place, weights: ModelWeights, config: ExecutorConfig, device: str, fraction: float | None
) -> str:
    """How much the engine needs and lacks on its device, and what to lower. `error` as torch words it."""
    free, total = torch.cuda.mem_get_info(device)
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", error)
    parts = f"weights take {weights.nbytes >> 20} MiB"
    cache = f"kv_cache.free_gpu_memory_fraction (now {fraction})"
    if fraction is None:
        num_tokens = config.num_blocks * config.tokens_per_block
        pool = needed_bytes(place.layout, place.rank, config.num_blocks, config.tokens_per_block)
        parts += f", the KV pool {pool >> 20} MiB"
        cache = f"kv_cache.max_tokens (now {num_tokens})"
    return (
        f"{device} has no memory left for the engine: {free >> 20} MiB of {total >> 20} MiB are free, and "
        f"{asked[1] if asked else 'more'} is needed at once; {parts}; lower max_num_tokens (now "
        f"{config.scheduler.max_num_tokens}), max_batch_size (now {config.scheduler.max_batch_size}) or {cache}, or raise "
        "tensor_parallel_size"
    )


def _on_gpu(
    place: Place,
    weights: ModelWeights,
    config: ExecutorConfig,
    collectives: Collectives,
    group: Any,
    device: str,
    fraction: float | None,
    record_margins: bool,
) -> Built:
    from .model_fused import can_fuse

    if not can_fuse(place.shape):
        return Built(take_pages(place, config, device), None)

    from .fused_stepper import FusedStepper

    def stepper_over(pages: KvPages) -> FusedStepper:
        limits = (config.scheduler.max_batch_size, config.scheduler.max_num_tokens)
        made = FusedStepper(
            place,
            weights,
            pages,
            collectives,
            torch.device(device),
            *limits,
            record_margins=record_margins,
            chunk_decodes=chunk_decodes(config),
        )
        made.warm_up()
        return made

    num_blocks = config.num_blocks
    most = config.scheduler.max_num_tokens
    if fraction is not None:
        _release()
        before, _ = torch.cuda.mem_get_info(device)
        trial_blocks = -(-max(most, _TRIAL_TOKENS) // config.tokens_per_block)
        pages = KvPages(place.layout, place.rank, trial_blocks, config.tokens_per_block, device)
        pool_bytes = pages.nbytes
        trial = stepper_over(pages)
        torch.cuda.synchronize()
        taken = before - torch.cuda.mem_get_info(device)[0] - pool_bytes  # kernels, graphs, the largest step
        del trial, pages
        _release()
        rotation_bytes = 2 * place.shape.max_position_embeddings * place.shape.head_dim * place.shape.dtype_bytes
        left = before - taken - rotation_bytes - _MARGIN_BYTES
        num_blocks = _least(_blocks_in(place, config, left, fraction, device), group)
    pages = KvPages(place.layout, place.rank, num_blocks, config.tokens_per_block, device)
    stepper = stepper_over(pages)
    return Built(pages, stepper, torch.cuda.mem_get_info(device)[0])


def chunk_decodes(config: ExecutorConfig) -> tuple[int, ...]:
    """With how many decodes beside them prompts have graphs: what an executor of that role runs day by day."""
    if config.role is Role.GENERATION:
        return ()
    return (0,) if config.role is Role.CONTEXT else (0, *chunk_graph_decodes(config.scheduler.max_batch_size))


def _blocks_in(place: Place, config: ExecutorConfig, free: int, fraction: float, device: str) -> int:
    block = needed_bytes(place.layout, place.rank, 1, config.tokens_per_block)
    num_blocks = int(free * fraction) // block
    if num_blocks < 1:
        raise DeviceError(
            f"{device}: {free >> 20} MiB are left beside the weights and the largest step, and free_gpu_memory_fraction "
            f"{fraction} of that does not hold one KV block of {block >> 10} KiB; lower max_num_tokens or max_batch_size, "
            "or raise tensor_parallel_size"
        )
    return num_blocks


def _least(num_blocks: int, group: Any) -> int:
    """The executor's block count is that of its tightest rank."""
    if group is None:
        return num_blocks
    import numpy as np
    from mpi4py import MPI

    least = np.array([num_blocks], dtype=np.int64)
    group.Allreduce(MPI.IN_PLACE, least, op=MPI.MIN)
    return int(least[0])


def _release() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
