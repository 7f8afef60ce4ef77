"""Clocks of other hosts: how well they are measured, and what is done to the stamps of their ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.core.tables import RequestRow, StayRow, StepRow, TransferRow
from disagg.runtime import clock_offsets
from disagg.runtime.clock import Clock, clock_domain
from disagg.runtime.clock_offsets import (
    ClockMeter,
    ClockOffset,
    ClockReading,
    answer_probes,
    best_reading,
    merged_rows,
)

SECOND = 10**9


class Wire:
    """Two ranks' progress and true time. A frame takes `delays(sender, number)`; rank 1's clock has a rate of its own."""

    def __init__(self, offset_ns: int, drift: float, delays: Callable[[int, int], int]) -> None:
        self.now = 5 * SECOND
        self.handlers: dict[int, Callable[[int, bytes], None]] = {}
        self._offset_ns, self._drift, self._delays = offset_ns, drift, delays
        self._frames: list[tuple[int, int, int, bytes]] = []  # arrival, from, to, frame
        self._num_sent = 0
        self._is_delivering = False

    def remote(self) -> int:
        return self.now + self._offset_ns + round(self.now * self._drift)

    def send(self, sender: int, to: int, frame: bytes) -> None:
        self._num_sent += 1
        self._frames.append((self.now + self._delays(sender, self._num_sent), sender, to, frame))
        if self._is_delivering:
            return
        self._is_delivering = True
        while self._frames:
            first = min(self._frames)
            self._frames.remove(first)
            self.now, sender, to, frame = first
            self.handlers[to](sender, frame)
        self._is_delivering = False

    def meter(self) -> ClockMeter:
        """Of rank 0, with rank 1 answering."""
        answer_probes(End(self, 1), self.remote)
        return ClockMeter(End(self, 0), lambda: self.now)


class End:
    """What ClockMeter and answer_probes need of Progress."""

    def __init__(self, wire: Wire, rank: int) -> None:
        self._wire, self._rank = wire, rank

    def subscribe(self, channel: int, handler: Callable[[int, bytes], None]) -> None:
        self._wire.handlers[self._rank] = handler

    def send(self, rank: int, frame: bytes, channel: int) -> bool:
        self._wire.send(self._rank, rank, frame)
        return True


@pytest.fixture
def another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process asks for the name of its clock once, rank 1 first, and gets another answer each time."""
    names = iter(["a", "b"])
    monkeypatch.setattr(clock_offsets, "clock_domain", lambda: next(names))


@given(st.integers(-(10**17), 10**17), st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), min_size=1))
def test_the_true_offset_lies_within_the_uncertainty(offset: int, delays: list[tuple[int, int]]) -> None:
    now = 10**12
    exchanges = []
    for there, back in delays:
        exchanges.append((now, now + there + offset, now + there + back))
        now += there + back
    reading = best_reading(exchanges)
    assert reading is not None
    assert abs(reading.offset_ns - offset) <= reading.uncertainty_ns
    assert reading.uncertainty_ns == (min(there + back for there, back in delays) + 1) // 2


def test_without_an_answer_there_is_no_reading() -> None:
    assert best_reading([]) is None


@pytest.mark.usefixtures("another_host")
def test_one_quick_exchange_among_many_slow_ones_is_enough() -> None:
    # to rank 1 takes 3 ms, back 1 ms: a wrong guess by 1 ms each time; but once both take 20 µs
    wire = Wire(
        7 * 86_400 * SECOND, 0.0, lambda sender, n: 20_000 if 200 <= n < 210 else (3_000_000, 1_000_000)[sender]
    )
    meter = wire.meter()
    meter.measure_start([1])
    start = meter.offsets[0].start
    assert start is not None
    assert abs(start.offset_ns - 7 * 86_400 * SECOND) <= 20_000 >= start.uncertainty_ns
    assert meter.start_offset_ns(1) == start.offset_ns
    assert not meter.offsets[0].is_applied  # until it was measured at the end


@pytest.mark.usefixtures("another_host")
def test_drift_between_start_and_end_is_removed_from_stamps() -> None:
    wire = Wire(-3 * SECOND, 80e-6, lambda sender, n: 1000)  # 80 ppm fast
    meter = wire.meter()
    meter.measure_start([1])
    origin = wire.now
    shifted = Clock(origin + meter.start_offset_ns(1)).origin_ns
    stamps = []
    for _ in range(10):
        wire.now += 60 * SECOND
        stamps.append((wire.now - origin, (wire.remote() - shifted) * 1000))
    meter.measure_end([1])
    offset = meter.offsets[0]
    assert offset.is_applied
    assert offset.drift_ppm == pytest.approx(80, rel=1e-3)
    assert stamps[-1][1] / 1000 - stamps[-1][0] == pytest.approx(600e9 * 80e-6, rel=1e-3)  # 48 ms off, uncorrected
    for truth_ns, stamp in stamps:
        assert abs(offset.on_rank0(stamp, origin) - truth_ns * 1000) <= 2_000_000  # 2 µs in ps


def test_ranks_that_share_the_clock_have_exactly_no_offset() -> None:
    wire = Wire(0, 0.0, lambda sender, n: 1000)
    meter = wire.meter()
    meter.measure_start([1])
    meter.measure_end([1])
    (offset,) = meter.offsets
    assert offset.same_clock
    assert offset.start == offset.end
    assert offset.start is not None
    assert (offset.start.offset_ns, offset.start.uncertainty_ns) == (0, 0)
    assert not offset.is_applied


@pytest.mark.usefixtures("another_host")
def test_frames_of_other_sizes_and_numbers_change_nothing() -> None:
    wire = Wire(SECOND, 0.0, lambda sender, n: 1000)
    meter = wire.meter()
    meter.measure_start([1])
    before = meter.offsets
    for frame in (b"", b"x", b"\0" * 32, b"\xff" * 33):
        wire.handlers[0](1, frame)
        wire.handlers[1](0, frame)
    assert meter.offsets == before


def test_the_name_of_a_clock_is_the_same_in_one_process_twice() -> None:
    assert clock_domain() == clock_domain() != ""


def test_a_clock_without_an_origin_begins_now_however_long_the_host_has_been_up() -> None:
    assert 0 <= Clock().read() < 10**12


# ---- merging --------------------------------------------------------------------------------------------------------

FAST = ClockOffset(2, False, ClockReading(500, 10, 0), ClockReading(500 + 1000, 10, 1_000_000))  # gains 1/1000


def rows() -> list[RequestRow | StayRow | StepRow | TransferRow]:
    return [
        RequestRow(0, "", "", None, 8, 4, 4, "length", None, 1, 1, 2, 0, 1, 2, 3, 1_001_000, 2_002_000, 9),
        StayRow(2, 7, "generation", 3, 1, 3, 0, 1_001_000, 2_002_000, 3_003_000, 0),
        StayRow(1, 6, "context", 1, 1, 1, 0, 1, 2, 3, 0),
        StepRow(2, 1, 1, 3, 1, 8, 0, 0, 0, 1_001_000, 2_002_000, 1, 1, 1, 0, 0),
        TransferRow(7, 1, 2, 8, 1, 1_001_000, 2_002_000, True, None, 0),
    ]


def test_stamps_of_the_other_host_move_and_all_others_stay() -> None:
    request, stay, other, step, transfer = merged_rows(rows(), {1: ClockOffset(1, True), 2: FAST}, 0)
    assert (request.transfer_start_ps, request.kv_usable_ps) == (1_000_000, 2_000_000)
    assert (request.arrival_ps, request.dispatch_ps, request.context_start_ps, request.first_token_ps) == (0, 1, 2, 3)
    assert request.end_ps == 9
    assert (stay.enqueued_ps, stay.started_ps, stay.ended_ps) == (1_000_000, 2_000_000, 3_000_000)
    assert (other.enqueued_ps, other.started_ps, other.ended_ps) == (1, 2, 3)
    assert (step.start_ps, step.end_ps) == (1_000_000, 2_000_000)
    assert (transfer.start_ps, transfer.end_ps) == (1_000_000, 2_000_000)


def test_rows_of_one_host_are_not_touched() -> None:
    before = rows()
    assert merged_rows(before, {1: ClockOffset(1, True), 2: ClockOffset(2, True)}, 0) is before


def test_without_a_measurement_at_the_end_the_first_one_stands() -> None:
    before = rows()
    assert merged_rows(before, {2: ClockOffset(2, False, ClockReading(500, 10, 0))}, 0) is before


@given(st.integers(-(10**15), 10**15), st.integers(-(10**15), 10**15), st.integers(-900_000, 10**6))
def test_merging_keeps_the_order_of_a_rank_s_stamps(first: int, second: int, gained: int) -> None:
    offset = ClockOffset(1, False, ClockReading(0, 1, 0), ClockReading(gained, 1, 1_000_000))
    low, high = sorted((first, second))
    assert offset.on_rank0(low, 123) <= offset.on_rank0(high, 123)
