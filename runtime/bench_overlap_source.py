"""The other process of `bench_overlap`: pages on a GPU that it exports and keeps until its stdin is closed.

`python -m disagg.runtime.bench_overlap_source MODEL DEVICE NUM_BLOCKS TOKENS_PER_BLOCK` prints one line: the handle of the
pages' allocation, and their offset in it.
"""

from __future__ import annotations

import sys

import torch

from ..core.model_shapes import PRESETS
from .cuda_ipc import Driver, use_device
from .kv_pages import KvPages
from .model_place import Place


def main() -> int:
    model, device, num_blocks, tokens_per_block = sys.argv[1:5]
    use_device(torch.device(device).index or 0)
    place = Place.of(PRESETS[model])
    pages = KvPages(place.layout, place.rank, int(num_blocks), int(tokens_per_block), device)
    pages.pool.normal_()
    torch.cuda.synchronize()
    address, driver = int(pages.pool.data_ptr()), Driver()
    base, _ = driver.allocation_of(address)
    print(driver.export(base).hex(), address - base, flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
