"""How far the clocks of other hosts are from rank 0's, and how stamps of their ranks are brought onto it.

Each host counts its own CLOCK_MONOTONIC. Rank 0 asks a rank for its reading many times over; in the exchange with the
shortest round trip the reading was taken half-way, give or take half the round trip (F. Cristian, "Probabilistic clock
synchronization", 1989). It does so at the start and at the end of a run: the first offset shifts the origin of the
rank's session, the difference of the two is drift, taken as linear and removed when records are merged.

Ranks that share rank 0's clock have an offset of exactly 0: nothing is measured and nothing is changed.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import Any, Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from ..core.tables import DecisionRow, RequestRow, StayRow, StepRow, TransferRow
from .clock import PS_PER_NS, clock_domain, monotonic_ns
from .progress import ProgressError

CLOCK_CHANNEL: Final = 13  # of Progress
NUM_EXCHANGES: Final = 256
_WINDOW: Final = 4  # exchanges under way at once: they keep both progress threads awake, which makes round trips short
_PATIENCE_S: Final = 2.0
_PING: Final = struct.Struct("<Q")  # number of the exchange
_PONG: Final = struct.Struct("<Qq16s")  # the same number, the reading in nanoseconds, which clock it is
Row = RequestRow | StayRow | StepRow | TransferRow | DecisionRow


class ClockReading(Struct, frozen=True):
    """A rank's clock minus rank 0's, within ± `uncertainty_ns`, at the reading `at_ns` of rank 0's clock."""

    offset_ns: int
    uncertainty_ns: int
    at_ns: int


class ClockOffset(Struct, frozen=True):
    """One rank's clock beside rank 0's. `start` or `end` is None where the rank did not answer.

    `same_clock`: it is rank 0's own clock, and both readings are exactly zero.
    """

    rank: int
    same_clock: bool
    start: ClockReading | None = None
    end: ClockReading | None = None

    @property
    def is_applied(self) -> bool:
        """Whether stamps of this rank are changed when records are merged."""
        return not self.same_clock and self.start is not None and self.end is not None

    @property
    def drift_ppm(self) -> float | None:
        """How much faster the rank's clock runs, in parts per million; None if that is not known."""
        if self.start is None or self.end is None or self.end.at_ns == self.start.at_ns:
            return None
        return (self.end.offset_ns - self.start.offset_ns) / (self.end.at_ns - self.start.at_ns) * 1e6

    def on_rank0(self, instant: int, origin_ns: int) -> int:
        """The instant of the run's clock at which the rank's session clock showed `instant`; both in picoseconds.

        The session's origin is `origin_ns` on rank 0's clock, and was shifted by the offset at the start.
        """
        if not self.is_applied or self.start is None or self.end is None:
            return instant
        began = (self.start.at_ns - origin_ns) * PS_PER_NS
        span = self.end.at_ns - self.start.at_ns
        own_span = span + self.end.offset_ns - self.start.offset_ns
        if span <= 0 or own_span <= 0:
            return instant
        return began + (instant - began) * span // own_span


def best_reading(exchanges: Iterable[tuple[int, int, int]]) -> ClockReading | None:
    """From (sent, the other's reading, received), in nanoseconds, the one with the shortest round trip; None of none."""
    shortest = min(exchanges, key=lambda exchange: exchange[2] - exchange[0], default=None)
    if shortest is None:
        return None
    sent, reading, received = shortest
    half_way = (sent + received) // 2
    return ClockReading(reading - half_way, (received - sent + 1) // 2, half_way)


# ---- over MPI -------------------------------------------------------------------------------------------------------


class _Post(Protocol):
    """What is needed of Progress."""

    def subscribe(self, channel: int, handler: Callable[[int, bytes], None]) -> None: ...
    def send(self, rank: int, frame: bytes, channel: int) -> bool: ...


def _send(progress: _Post, rank: int, frame: bytes) -> bool:
    try:
        return progress.send(rank, frame, CLOCK_CHANNEL)
    except ProgressError:  # this process is leaving
        return False


def _digest() -> bytes:
    return sha256(clock_domain().encode()).digest()[:16]


def answer_probes(progress: _Post, read_ns: Callable[[], int] = monotonic_ns) -> None:
    """On a rank other than 0, before its progress starts: answer rank 0's questions for the time."""
    digest = _digest()

    def answer(rank: int, frame: bytes) -> None:
        if rank == 0 and len(frame) == _PING.size:
            _send(progress, 0, _PONG.pack(_PING.unpack(frame)[0], read_ns(), digest))

    progress.subscribe(CLOCK_CHANNEL, answer)


class ClockMeter:
    """On rank 0, made before its progress starts: measures the other ranks' clocks, one rank at a time.

    An answer asks the next question on the progress thread itself, without waking another thread in between.
    """

    def __init__(self, progress: _Post, read_ns: Callable[[], int] = monotonic_ns) -> None:
        self._progress = progress
        self._read_ns = read_ns
        self._digest = _digest()
        self._number = 0
        self._rank = -1
        self._left = 0  # exchanges not yet begun
        self._sent_ns: dict[int, int] = {}  # of those under way, by number
        self._exchanges: list[tuple[int, int, int]] = []
        self._same_clock: bool | None = None
        self._over = threading.Event()
        self._offsets: dict[int, ClockOffset] = {}
        progress.subscribe(CLOCK_CHANNEL, self._answered)

    def measure_start(self, ranks: Iterable[int]) -> None:
        """Before the first session."""
        for rank in ranks:
            same, reading = self._measure(rank)
            self._offsets[rank] = ClockOffset(rank, same, reading)

    def measure_end(self, ranks: Iterable[int]) -> None:
        """After the last session, of the ranks that are still there."""
        for rank in ranks:
            known = self._offsets.get(rank)
            if known is None:
                continue
            self._offsets[rank] = replace(known, end=known.start if known.same_clock else self._measure(rank)[1])

    def start_offset_ns(self, rank: int) -> int:
        """What to add to an origin of rank 0's clock to have it on the clock of `rank`."""
        known = self._offsets.get(rank)
        return 0 if known is None or known.start is None else known.start.offset_ns

    @property
    def offsets(self) -> list[ClockOffset]:
        """By rank."""
        return [self._offsets[rank] for rank in sorted(self._offsets)]

    def _measure(self, rank: int) -> tuple[bool, ClockReading | None]:
        self._exchanges, self._same_clock, self._sent_ns = [], None, {}
        self._rank, self._left = rank, NUM_EXCHANGES
        self._over.clear()
        if self._ask():  # the first answer says whether it is another clock at all
            self._over.wait(_PATIENCE_S)
        self._rank = -1  # answers that come later are nobody's
        if self._same_clock:
            return True, ClockReading(0, 0, self._read_ns())
        return False, best_reading(list(self._exchanges))

    def _ask(self) -> bool:
        self._number += 1
        self._left -= 1
        frame = _PING.pack(self._number)
        self._sent_ns[self._number] = self._read_ns()
        return _send(self._progress, self._rank, frame)

    def _answered(self, rank: int, frame: bytes) -> None:
        received_ns = self._read_ns()
        if rank != self._rank or len(frame) != _PONG.size:
            return
        number, reading, digest = _PONG.unpack(frame)
        sent_ns = self._sent_ns.pop(number, None)
        if sent_ns is None:
            return
        self._same_clock = digest == self._digest
        self._exchanges.append((sent_ns, reading, received_ns))
        if self._same_clock:
            self._over.set()
            return
        while self._left > 0 and len(self._sent_ns) < _WINDOW and self._ask():
            pass
        if not self._sent_ns:
            self._over.set()


# ---- merging --------------------------------------------------------------------------------------------------------


def merged_rows(rows: list[Any], offsets: Mapping[int, ClockOffset], origin_ns: int) -> list[Any]:
    """`rows` with every stamp on rank 0's clock; `offsets` by executor, those of its leader. Untouched where none applies.

    Stamps that rank 0 gave itself stay as they are.
    """
    applied = {executor: offset for executor, offset in offsets.items() if offset.is_applied}
    if not applied:
        return rows

    def moved(row: Any, executor: int | None, *names: str) -> Any:
        offset = applied.get(-1 if executor is None else executor)
        if offset is None:
            return row
        stamps = {name: getattr(row, name) for name in names}
        return replace(row, **{n: offset.on_rank0(at, origin_ns) for n, at in stamps.items() if at is not None})

    merged = []
    for row in rows:
        match row:
            case RequestRow():
                row = moved(row, row.context_executor, "context_start_ps")
                row = moved(row, row.generation_executor, "transfer_start_ps", "kv_usable_ps")
            case StayRow():
                row = moved(row, row.executor, "enqueued_ps", "started_ps", "ended_ps")
            case StepRow():
                row = moved(row, row.executor, "start_ps", "end_ps")
            case TransferRow():
                row = moved(row, row.reader, "start_ps", "end_ps")
        merged.append(row)
    return merged
