"""Two transports in one process and one thread: frames and copies take place when a test says so, in an order it chooses."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from disagg.core.kv_layout import KvLayout, Piece
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.kv_runs import copy_in_host_memory
from disagg.runtime.progress import ProgressError
from disagg.runtime.transport import TransferOutcome, TransportCapabilities
from disagg.runtime.transport_cuda_ipc import PeerReadCarrier
from disagg.runtime.transport_lane import InlineLane
from disagg.runtime.transport_mpi import MpiCarrier
from disagg.runtime.transport_staging import DeviceStager
from disagg.runtime.transport_wire import decode
from disagg.runtime.transport_worker import SegmentTransport

LAYOUT = KvLayout(1, 1, (2,), 2, 4, "float32")
WHOLE = [Piece(0, 0, (0, 2), (0, 2))]
NUM_TOKENS = 7
STAGING_BYTES = 256  # of 896: a layer in two segments


class Wire:
    """Frames between two ranks, in the order of each; `told` counts their kinds by sender."""

    def __init__(self) -> None:
        self.frames: dict[int, deque[bytes]] = {0: deque(), 1: deque()}  # by sender
        self.told: dict[int, Counter[str]] = {0: Counter(), 1: Counter()}
        self.dead: set[int] = set()
        self.sent: dict[tuple[int, int], deque[tuple[Any, Any]]] = {}  # (sender, tag): buffers and whom to tell
        self.posted: dict[tuple[int, int], deque[tuple[Any, Any]]] = {}  # (sender, tag): the same of receives

    def arrivals(self) -> list[tuple[int, int]]:
        return [key for key, waiting in self.sent.items() if waiting and self.posted.get(key)]

    def arrive(self, key: tuple[int, int]) -> None:
        (sent, gone), (into, landed) = self.sent[key].popleft(), self.posted[key].popleft()
        gone(None)
        if len(sent) != len(into):
            landed(ProgressError(f"{len(sent)} bytes were sent where {len(into)} were expected"))
            return
        into.copy_(sent)
        landed(None)


class OneThread:
    """What a transport uses of `Progress`; runs when it is told to."""

    max_tag = 100
    is_own_thread = True
    is_running = True
    is_expecting = False

    def __init__(self, wire: Wire, rank: int) -> None:
        self._wire = wire
        self.rank = rank
        self.calls: deque[Callable[[], object]] = deque()
        self.handler: Any = None
        self.on_down: Any = None

    @property
    def down_ranks(self) -> frozenset[int]:
        return frozenset(self._wire.dead - {self.rank})

    def subscribe(self, channel: int, handler: Any) -> None:
        self.handler = handler

    def watch_peers(self, on_down: Any) -> None:
        self.on_down = on_down

    def poll(self, poller: Any) -> None:
        pass

    def call(self, what: Callable[[], object]) -> None:
        self.calls.append(what)

    def isend_buffer(self, rank: int, tag: int, buffer: Any, on_done: Any) -> None:
        self._wire.sent.setdefault((self.rank, tag), deque()).append((buffer, on_done))

    def irecv_buffer(self, rank: int, tag: int, buffer: Any, on_done: Any) -> None:
        self._wire.posted.setdefault((rank, tag), deque()).append((buffer, on_done))

    def send(self, rank: int, frame: bytes, channel: int) -> bool:
        if rank in self._wire.dead:
            return False
        self._wire.frames[self.rank].append(frame)
        self._wire.told[self.rank][type(decode(frame)).__name__] += 1
        return True


class LateLane(InlineLane):
    """A device that takes its time: what is run is done when `poll` is called."""

    def __init__(self) -> None:
        self.work: deque[tuple[Callable[[], Any], Callable[[str | None], None]]] = deque()

    def run(self, work: Any, then: Any) -> None:
        self.work.append((work, then))

    def poll(self) -> bool:
        if not self.work:
            return False
        work, then = self.work.popleft()
        work()
        then(None)
        return True

    def fail(self, error: str) -> bool:
        """The device does not do what comes next."""
        if self.work:
            self.work.popleft()[1](error)
            return True
        return False


class SameProcess:
    """Peers' memory is one's own."""

    def export(self, pages: KvPages) -> tuple[bytes, int, int, bytes]:
        handle = int(pages.pool.data_ptr()).to_bytes(8, "little").ljust(64, b"\0")
        return handle, pages.nbytes, 0, bytes(16)

    def open(self, handle: bytes, device: bytes) -> int:
        return int.from_bytes(handle[:8], "little")

    def close(self, address: int) -> None:
        pass


class Pair:
    """Rank 0 sends to rank 1, which reads for itself, or (`is_staged`) by messages of staging buffers.

    `outcomes[rank][id]` are the ends' outcomes, each told once.
    """

    def __init__(
        self,
        *,
        verify: bool = False,
        min_segment_bytes: int = 1,
        block_sizes: tuple[int, int] = (4, 2),
        is_staged: bool = False,
    ) -> None:
        self.is_staged = is_staged
        self.counts = [-(-NUM_TOKENS // size) for size in block_sizes]
        self.wire = Wire()
        self.progress = [OneThread(self.wire, rank) for rank in (0, 1)]
        self.pages = [KvPages(LAYOUT, 0, 64, size) for size in block_sizes]
        self.pages[0].pool.uniform_(1.0, 2.0)
        self.lanes = [LateLane() for _ in (0, 1)]
        self.outcomes: tuple[dict[int, TransferOutcome], dict[int, TransferOutcome]] = ({}, {})
        self.touched_late: list[str] = []
        self.transports = [
            SegmentTransport(
                progress,  # type: ignore[arg-type]
                pages,
                self._staged(lane, progress) if is_staged else self._carrier(lane),
                verify=verify,
                min_segment_bytes=min_segment_bytes,
            )
            for progress, pages, lane in zip(self.progress, self.pages, self.lanes, strict=True)
        ]
        self.owner: tuple[dict[int, int], dict[int, int]] = ({}, {})  # block: the transfer that may touch it

    def _copy(self, what: Any, source: Any, destination: Any) -> None:
        for rank, blocks in ((0, source), (1, destination)):
            self.touched_late += [f"block {b} of rank {rank}" for b in blocks if b not in self.owner[rank]]
        copy_in_host_memory(what, source, destination)

    def _staged(self, lane: LateLane, progress: OneThread) -> MpiCarrier:
        def stager(desk: Any) -> DeviceStager:
            return DeviceStager(desk, lane, self._copy, STAGING_BYTES, via_host=False)

        capabilities = TransportCapabilities(False, True)
        return MpiCarrier(progress, stager, "staged", "one process", capabilities)  # type: ignore[arg-type]

    def _carrier(self, lane: LateLane) -> PeerReadCarrier:
        return PeerReadCarrier(
            "one process",
            TransportCapabilities(False, True),
            lambda desk: lane,
            SameProcess(),
            lambda lane: (self._copy, self._copy),
        )

    def blocks(self, rank: int, ident: int) -> tuple[int, ...]:
        count = self.counts[rank]
        return tuple(63 - ident * count - i for i in range(count))

    def send(self, ident: int, *, is_written: bool = True, num_tokens: int = NUM_TOKENS) -> None:
        blocks = self._own(0, ident)
        done = self._on_done(0)
        self.transports[0].send(ident, 1, WHOLE, blocks, num_tokens, done, is_written=is_written)

    def receive(self, ident: int) -> None:
        self.transports[1].receive(ident, 0, WHOLE, self._own(1, ident), NUM_TOKENS, self._on_done(1))

    def _own(self, rank: int, ident: int) -> tuple[int, ...]:
        blocks = self.blocks(rank, ident)
        self.owner[rank].update(dict.fromkeys(blocks, ident))
        return blocks

    def _on_done(self, rank: int) -> Callable[[TransferOutcome], None]:
        def on_done(outcome: TransferOutcome) -> None:
            assert outcome.transfer_id not in self.outcomes[rank], "told twice"
            self.outcomes[rank][outcome.transfer_id] = outcome
            for block in self.blocks(rank, outcome.transfer_id):
                del self.owner[rank][block]

        return on_done

    def arrived(self, ident: int) -> bool:
        want = self.pages[0].pack(self.blocks(0, ident), NUM_TOKENS, (0, 2), (0, 2))
        return bool((self.pages[1].pack(self.blocks(1, ident), NUM_TOKENS, (0, 2), (0, 2)) == want).all())

    def kill(self, rank: int) -> None:
        """That rank says and does nothing any more; the other is told."""
        self.wire.dead.add(rank)
        self.progress[rank].calls.clear()
        self.lanes[rank].work.clear()
        for frames in self.wire.frames.values():
            frames.clear()
        self.progress[1 - rank].on_down(rank)

    def step(self, rng: random.Random | None = None) -> bool:
        """One thing that can happen now, the first or a random one. False: nothing is left to do."""
        deeds: list[Callable[[], object]] = []
        for rank in {0, 1} - self.wire.dead:
            progress, frames = self.progress[rank], self.wire.frames[1 - rank]
            if progress.calls:
                deeds.append(lambda progress=progress: progress.calls.popleft()())
            if frames:
                deeds.append(lambda rank=rank, frames=frames: self.progress[rank].handler(1 - rank, frames.popleft()))
            if self.lanes[rank].work:
                deeds.append(lambda rank=rank: self.transports[rank]._poll())
        deeds += [lambda key=key: self.wire.arrive(key) for key in self.wire.arrivals()]
        if not deeds:
            return False
        (rng.choice(deeds) if rng is not None else deeds[0])()
        return True

    def settle(self, rng: random.Random | None = None) -> None:
        while self.step(rng):
            pass

    def errors(self, rank: int) -> dict[int, str | None]:
        return {ident: outcome.error for ident, outcome in sorted(self.outcomes[rank].items())}

    def left_overs(self, rank: int) -> dict[str, int]:
        """What a transport still keeps of transfers that are over."""
        names = ("_sends", "_receives", "_out", "_in", "_offered", "_offers", "_held", "_early", "_aheads")
        found = {name: len(kept) for name in names if (kept := getattr(self.transports[rank], name))}
        if self.is_staged and (num := self.num_lent_buffers(rank)):
            found["buffers"] = num
        return found

    def num_lent_buffers(self, rank: int) -> int:
        """Staging buffers that are not free."""
        carrier: Any = self.transports[rank]._carrier
        return sum(pool._num_made - len(pool._free) for pool in (carrier._stager._outgoing, carrier._stager._incoming))
