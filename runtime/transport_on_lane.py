"""What every way of carrying KV does on its lane besides: checksums, and answering what the device has done."""

from __future__ import annotations

from .transport import checksum_bytes
from .transport_ends import Desk, End
from .transport_lane import Computed, Lane


class OnLane:
    """The pages of `_desk`, read and written on `_lane`."""

    _desk: Desk
    _lane: Lane

    def checksums(self, end: End, tokens_per_block: int, then: Computed) -> None:
        """Of all that `end` holds, as in `TransferOutcome`."""
        pages, outline = self._desk.pages, end.outline
        self._lane.compute(
            lambda: checksum_bytes(pages, outline.ranges, end.blocks, outline.num_tokens, tokens_per_block), then
        )

    def poll(self) -> bool:
        return self._lane.poll()

    @property
    def is_busy(self) -> bool:
        return self._lane.is_busy
