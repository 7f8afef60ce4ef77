"""Conformance: a hardware run's own times, given back to the simulator, must give the hardware run's own decisions.

The event logs of a run say when every core was given what. `Recording` pairs each message, transfer and wake-up with the
command that caused it; what no command caused - arrivals, cancels, dead peers - is the outside world's, and is injected.
A simulation on these times then has nothing left of its own but the cores and the driver's rules: `conform` runs it and
compares the logs, instant by instant.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec.structs import replace

from ..core.commands import ORCHESTRATOR, Dispatched, PrepareReceive, ReceiveKv, Record, RunSteps, Send, ServeKv
from ..core.config import OrchestratorConfig
from ..core.event_log import Frame, LogHeader, read_log
from ..core.events import (
    Arrive,
    FirstTokens,
    KvReceived,
    KvRequested,
    KvTaken,
    Response,
    StepsCommitted,
    StepsDone,
    Wake,
)
from ..core.tables import RequestRow
from ..policies.vocabulary import ContextPhaseParams, FinishReason
from .calls import MESSAGE
from .cluster import SimulatedCluster

NEVER_AFTER: Final = 10**15  # picoseconds past the last recorded instant: when what never happened would happen


class ConformanceDifference(AssertionError):
    """The simulator did something else than the hardware; the message shows the first difference."""


StepEnds = Mapping[tuple[int, int], Sequence[int]]


class Recording:
    """The times of one run. `logs` holds the event log of each core by rank; `step_ends` holds, by (executor, epoch), the
    instant at which each of its steps was reported, from step 1 on.
    """

    may_be_late = False  # instants are found in the record as they come

    def __init__(self, logs: Mapping[int, bytes], step_ends: StepEnds) -> None:
        self.headers: dict[int, LogHeader] = {}
        self.frames: dict[int, list[Frame]] = {}
        for core, data in logs.items():
            header, frames = read_log(data)
            self.headers[core] = header
            self.frames[core] = list(frames)
        config = self.headers[ORCHESTRATOR].orchestrator
        if config is None:
            raise ValueError("the log of rank 0 is not an orchestrator's")
        self.config: OrchestratorConfig = config
        self.never = max((f[-1].now for f in self.frames.values() if f), default=0) + NEVER_AFTER
        self.external: list[tuple[int, int, int, Any]] = []  # (instant, place in it, core, event)
        self.true_lengths: dict[int, int] = {}
        self.output_hashes: dict[int, tuple[int, ...]] = {}  # of the blocks of what is generated, by user's request
        self._users: dict[int, int] = {}  # executor-level id: user's request id
        self._step_ends = step_ends
        self._epoch: dict[int, int] = {}
        self._arrivals: dict[tuple[int, int], deque[tuple[int, int]]] = {}
        self._transfers: dict[
            tuple[str, int, int], tuple[int, int]
        ] = {}  # by which end, its core, the reader's request
        self._readers: dict[tuple[int, int], int] = {}  # (source, its request): the reader's request, as last served
        self._wakes: dict[int, list[tuple[int, int]]] = {core: [] for core in logs}
        self._pair()

    # ---- what the logs say ------------------------------------------------------------------------------------------

    def _pair(self) -> None:
        sent: dict[tuple[int, int], deque[tuple[int, Any]]] = {}
        for core, frames in self.frames.items():
            for frame in frames:
                for command in frame.commands:
                    self._note(core, frame.now, command, sent)
        for core, frames in self.frames.items():
            for frame in frames:
                for place, event in enumerate(frame.events):
                    self._attribute(core, frame.now, place, event, sent)
                for command in frame.commands:
                    if isinstance(command, ServeKv) and command.ok:
                        self._readers[core, command.request_id] = command.reader_id

    def _note(self, core: int, now: int, command: Any, sent: dict[tuple[int, int], deque[tuple[int, Any]]]) -> None:
        if isinstance(command, Send):
            sent.setdefault((core, command.to), deque()).append((now, command.message))
        elif isinstance(command, ReceiveKv | PrepareReceive):
            present = command.num_present if isinstance(command, ReceiveKv) else 0
            asked = KvRequested(command.source_id, core, command.request_id, present)
            sent.setdefault((core, command.source), deque()).append((now, asked))
        elif isinstance(command, ServeKv) and not command.ok:
            refusal = KvReceived(command.reader_id, False, command.error)
            sent.setdefault((core, command.reader), deque()).append((now, refusal))
        elif isinstance(command, Dispatched):
            self._users[command.executor_request.id] = command.request_id
        elif isinstance(command, Record) and isinstance(command.row, RequestRow):
            row = command.row
            stopped = row.finish_reason == FinishReason.STOP.value
            self.true_lengths[row.request_id] = row.num_output_tokens if stopped else 1 << 30

    def _attribute(
        self, core: int, now: int, place: int, event: Any, sent: dict[tuple[int, int], deque[tuple[int, Any]]]
    ) -> None:
        match event:
            case StepsDone():
                for request_id, hashes in event.block_hashes:
                    if request_id in self._users:
                        self.output_hashes[self._users[request_id]] = hashes
                return
            case StepsCommitted():
                return
            case Wake():
                self._wakes[core].append((now, place))
                return
            case KvTaken(ok=True):
                reader_id = self._readers.get((core, event.request_id), -1)
                self._transfers["taken", core, reader_id] = (now, place)
                return
            case KvReceived(ok=True):
                self._transfers["received", core, event.request_id] = (now, place)
                return
        for sender in sorted(self.frames):
            queue = sent.get((sender, core))
            if queue and queue[0][0] < now and _is_that(queue[0][1], event):
                queue.popleft()
                self._arrivals.setdefault((sender, core), deque()).append((now, place))
                return
        self.external.append((now, place, core, event))

    # ---- the times, as the simulator's drivers ask for them ---------------------------------------------------------

    def begin(self, executor: int, run: RunSteps, now: int) -> None:
        self._epoch[executor] = run.epoch

    def end_of_step(self, executor: int, k: int) -> int:
        ends = self._step_ends.get((executor, self._epoch[executor]), ())
        return ends[k - 1] if k <= len(ends) else self.never

    def step_by(self, executor: int, done: int, at: int, last: int) -> int:
        ends = self._step_ends.get((executor, self._epoch[executor]), ())
        return min(last, max(done, bisect_left(ends, at)) + 1)

    def message_arrives(self, sender: int, receiver: int, now: int, message: object) -> tuple[int, int]:
        queue = self._arrivals.get((sender, receiver))
        return queue.popleft() if queue else (self.never, sender)

    def wake(self, core: int, at: int, now: int) -> tuple[int, int]:
        wakes = self._wakes[core]
        i = bisect_left(wakes, (now + 1, 0))
        return wakes[i] if i < len(wakes) else (self.never, core)

    def transfer_ends(self, source: int, command: ServeKv) -> tuple[tuple[int, int], tuple[int, int]]:
        never = (self.never, source)
        received = self._transfers.get(("received", command.reader, command.reader_id), never)
        return received, self._transfers.get(("taken", source, command.reader_id), never)


def conform(recording: Recording, launch: Mapping[int, tuple[int, int] | tuple[int, int, bool]] | None = None) -> int:
    """Simulate the recorded run on its own times; the number of instants compared.

    ConformanceDifference at the first instant, in order of time, at which any core was given or did something else.
    Token ids are left out of the comparison: a simulation has none.
    """
    logs: dict[int, list[bytes]] = {core: [] for core in recording.frames}
    cluster = SimulatedCluster(
        recording.config,
        recording,
        kv_bytes_per_token=1,
        link_bytes_per_s=1e9,
        launch=launch,
        log_sink=lambda core: logs[core].append,
    )

    def inject(item: tuple[int, Any]) -> None:
        core, event = item
        if isinstance(event, Arrive):
            request_id = event.request.id
            length = recording.true_lengths.get(request_id, 1 << 30)
            cluster.submit(event.request, length, recording.output_hashes.get(request_id, ()))
        else:
            cluster.tell(core, event)

    for now, place, core, event in recording.external:
        cluster.env.calendar.call_at(now, MESSAGE + place, inject, (core, event))
    problem: Exception | None = None
    try:
        cluster.run(until_s=(recording.never - 1) / 10**12)
    except Exception as error:  # the simulation left the recorded path: the logs up to there show where
        problem = error
    first: tuple[int, str] | None = None
    compared = 0
    for core, expected in recording.frames.items():
        _, frames = read_log(b"".join(logs[core]))
        found = list(frames)
        for i in range(max(len(expected), len(found))):
            want = _plain(expected[i]) if i < len(expected) else None
            got = _plain(found[i]) if i < len(found) else None
            if want != got:
                at = min(frame.now for frame in (want, got) if frame is not None)
                if first is None or at < first[0]:
                    first = (at, f"core {core}, instant {i} at {at} ps:\n  hardware  {want}\n  simulator {got}")
                break
            compared += 1
    if first is not None:
        raise ConformanceDifference(first[1] + (f"\n  then {problem!r}" if problem else "")) from problem
    if problem is not None:
        raise problem
    return compared


def _is_that(sent: Any, heard: Any) -> bool:
    """Whether `sent` is what was heard: the tokens of a request that moves are the driver's to add on the way."""
    return bool(sent == heard or (type(heard) is Response and _tokenless(sent) == _tokenless(heard)))


def _plain(frame: Frame) -> Frame:
    """The frame without token ids, which only hardware has."""
    return Frame(frame.now, tuple(map(_tokenless, frame.events)), tuple(map(_tokenless, frame.commands)))


def _tokenless(value: Any) -> Any:
    if isinstance(value, StepsDone):
        return replace(value, first_tokens=())
    if isinstance(value, Response) and value.context_phase_params is not None:
        return replace(value, context_phase_params=_tokenless(value.context_phase_params))
    if isinstance(value, ContextPhaseParams):
        return replace(value, first_gen_tokens=(), state=b"")
    if isinstance(value, FirstTokens):
        return replace(value, tokens=())
    if isinstance(value, Send):
        return replace(value, message=_tokenless(value.message))
    request = getattr(value, "request", None) or getattr(value, "executor_request", None)
    if request is not None and request.context_phase_params is not None:
        stripped = replace(request, context_phase_params=_tokenless(request.context_phase_params))
        return replace(value, **{"request" if hasattr(value, "request") else "executor_request": stripped})
    return value
