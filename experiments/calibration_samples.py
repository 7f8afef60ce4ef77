"""From what a session leaves behind to samples: how long each step, message and transfer took, and what it was made of.

Everything is read from the event logs, which say when each core was given what and what it ordered, on one clock a host.
A step lasts from the end of the one before it, or from its plan if the executor was at rest, to its own end as its leader
saw it: just what the simulator calls a step's time. So the first step of a plan also holds what it took to launch it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from ..core.chunk_sums import chunk_pairs
from ..core.commands import ORCHESTRATOR, PrepareReceive, ReceiveKv, RunSteps, Send, ServeKv
from ..core.event_log import Frame, read_log
from ..core.events import Arrive, KvReceived, KvRequested, KvTaken
from ..core.overheads import num_token_ids
from .errors import ConfigError
from .sample_columns import checked_rows

if TYPE_CHECKING:
    from ..runtime.session_series import SessionResult

FIRST: Final = "first"  # of an epoch
CONTINUED: Final = "continued"  # the first of a plan that goes on with an epoch
FOLLOWING: Final = "following"  # any other: launched while the step before it ran, where the device allows that
NOTHING: Final = "nothing"  # before the first plan of a session
_INTO_EXECUTOR, _FROM_EXECUTOR, _BETWEEN = (
    "orchestrator to executor",
    "executor to orchestrator",
    "executor to executor",
)


class StepSample(Struct, frozen=True, array_like=True):
    """One step. `before`: what the executor did before this plan: nothing, idle, decode, chunk; `same` inside a plan."""

    session: int
    executor: int
    epoch: int
    step: int
    kind: str
    before: str
    duration_ps: int
    num_decodes: int
    num_kv_tokens: int
    num_chunks: int
    num_chunk_tokens: int
    num_pairs: int
    num_cached_tokens: int
    num_sampled: int  # tokens that the chunks yield
    num_joined: int
    num_left: int
    in_transfer: bool  # KV came or went meanwhile
    sends_early: bool = False  # KV might be asked for early: a step with chunks told of its layers, and was no graph
    num_shared_kv: int = 0  # of the KV tokens, those that are read again, from blocks that sequences share
    longest_cached: int = -1  # the most tokens cached before one chunk; -1: a sample of a time that did not tell
    # From the end of the step before it, where that had chunks, to this one's plan; 0 if they follow each other. -1: there
    # was no such step, or a sample of a time that did not tell.
    rest_ps: int = -1
    rest_in_transfer_ps: int = 0  # of the rest, how long KV left the executor


class MessageSample(Struct, frozen=True, array_like=True):
    """From the instant that made one core send it to the instant at which another was given it."""

    session: int
    sender: int
    receiver: int
    pair: str
    kind: str
    latency_ps: int
    num_tokens: int = -1  # ids of tokens that it carries, 0 without a prompt; -1: a sample of a time that did not tell


class TransferSample(Struct, frozen=True, array_like=True):
    """One transfer: from the answer of its source to the reader's having it, and then to the source's being rid of it."""

    session: int
    source: int
    reader: int
    num_tokens: int
    num_blocks: int
    num_in_flight: int  # between these two when it began, itself included
    duration_ps: int
    taken_ps: int | None


class ClientSample(Struct, frozen=True, array_like=True):
    """From a request's intended send to the orchestrator's being given it."""

    session: int
    is_open_loop: bool
    delay_ps: int


class Samples(Struct):
    """All that calibration saw."""

    steps: list[StepSample] = []
    messages: list[MessageSample] = []
    transfers: list[TransferSample] = []
    clients: list[ClientSample] = []

    def spaced_messages(self) -> list[MessageSample]:
        """Those of open loops, where there are any: requests that are sent all at once wait for each other on their way."""
        spaced = {sample.session for sample in self.clients if sample.is_open_loop}
        return [sample for sample in self.messages if sample.session in spaced] or self.messages

    def add(self, number: int, result: SessionResult, *, is_open_loop: bool, sends_early: bool = False) -> None:
        """Take in one session. Raises EventLogError for a log that is none."""
        frames = {core: list(read_log(data)[1]) for core, data in result.logs.items() if data}
        transfers = _transfers(number, frames)
        self.transfers += [sample for sample, _, _ in transfers]
        self.messages += _messages(number, frames)
        self.clients += [
            ClientSample(number, is_open_loop, frame.now - event.request.arrival)
            for frame in frames.get(ORCHESTRATOR, ())
            for event in frame.events
            if isinstance(event, Arrive)
        ]
        for executor in sorted(frames):
            if executor != ORCHESTRATOR:
                busy = [(a, b) for s, a, b in transfers if executor in (s.source, s.reader)]
                leaving = [(a, b) for s, a, b in transfers if executor == s.source]
                steps = _steps(number, executor, frames[executor], result.step_ends.get(executor, ()), busy, leaving)
                self.steps += [replace(step, sends_early=True) for step in steps] if sends_early else steps


# ---- steps ----------------------------------------------------------------------------------------------------------


def _steps(
    session: int,
    executor: int,
    frames: Sequence[Frame],
    step_ends: Iterable[tuple[int, int, int]],
    busy: Sequence[tuple[int, int]],
    leaving: Sequence[tuple[int, int]],
) -> list[StepSample]:
    ends: dict[int, dict[int, int]] = defaultdict(dict)
    for epoch, step, at in step_ends:
        ends[epoch][step] = at
    plans = [(frame.now, c) for frame in frames for c in frame.commands if isinstance(c, RunSteps)]
    found: list[StepSample] = []
    last_end, before = -1, NOTHING
    for i, (ordered, run) in enumerate(plans):
        following = plans[i + 1][1] if i + 1 < len(plans) else None
        of_epoch = ends.get(run.epoch, {})
        last = following.first_step - 1 if following is not None and following.epoch == run.epoch else run.last_step
        is_behind_chunks = before == "chunk"
        if before != NOTHING and ordered > last_end:
            before = "idle"
        for step in range(run.first_step, last + 1):
            end = of_epoch.get(step)
            if end is None:
                break
            is_first = step == run.first_step
            start = max(ordered, last_end) if is_first else last_end
            kind = FOLLOWING if not is_first else FIRST if step == 1 else CONTINUED
            sample = _step(session, executor, run, step, kind, before if is_first else "same", start, end, busy)
            if is_first and is_behind_chunks:
                kept = _time_of(leaving, last_end, start) if start > last_end else 0
                sample = replace(sample, rest_ps=start - last_end, rest_in_transfer_ps=kept)
            found.append(sample)
            last_end = end
        before = "chunk" if run.chunks else "decode"
    return found


def _time_of(spans: Iterable[tuple[int, int]], begin: int, end: int) -> int:
    """How much of the time from `begin` to `end` lies in any of the spans."""
    found, covered = 0, begin
    for a, b in sorted(spans):
        a, b = max(a, covered), min(b, end)
        if b > a:
            found += b - a
            covered = b
    return found


def _step(
    session: int,
    executor: int,
    run: RunSteps,
    step: int,
    kind: str,
    before: str,
    start: int,
    end: int,
    busy: Sequence[tuple[int, int]],
) -> StepSample:
    num_decodes = run.num_decodes if run.decodes else 0
    return StepSample(
        session,
        executor,
        run.epoch,
        step,
        kind,
        before,
        end - start,
        num_decodes,
        run.num_kv_tokens + (step - 1) * num_decodes if num_decodes else 0,
        len(run.chunks),
        sum(chunk.length for chunk in run.chunks),
        sum(chunk_pairs(chunk.start, chunk.length) for chunk in run.chunks),
        sum(chunk.start for chunk in run.chunks),
        sum(chunk.is_last for chunk in run.chunks),
        len(run.joined) if kind != FOLLOWING else 0,
        len(run.left) if kind != FOLLOWING else 0,
        any(a < end and start < b for a, b in busy),
        num_shared_kv=run.num_shared_kv if num_decodes else 0,
        longest_cached=max((chunk.start for chunk in run.chunks), default=0),
    )


# ---- messages -------------------------------------------------------------------------------------------------------


def _messages(session: int, frames: Mapping[int, Sequence[Frame]]) -> list[MessageSample]:
    """Every message that one core sent and another was given; order is kept between two cores, so each is the next."""
    sent: dict[tuple[int, int], deque[tuple[int, Any]]] = defaultdict(deque)
    for core, of_core in frames.items():
        for frame in of_core:
            for command in frame.commands:
                if isinstance(command, Send):
                    sent[core, command.to].append((frame.now, command.message))
                elif isinstance(command, ReceiveKv | PrepareReceive):
                    asked = KvRequested(command.source_id, core, command.request_id)
                    sent[core, command.source].append((frame.now, asked))
    found = []
    for core, of_core in frames.items():
        for frame in of_core:
            for event in frame.events:
                for sender in frames:
                    queue = sent.get((sender, core))
                    if queue and queue[0][0] < frame.now and queue[0][1] == event:
                        at, _ = queue.popleft()
                        kind, pair = type(event).__name__, pair_kind(sender, core)
                        tokens = num_token_ids(event)
                        found.append(MessageSample(session, sender, core, pair, kind, frame.now - at, tokens))
                        break
    return found


def pair_kind(sender: int, receiver: int) -> str:
    if sender == ORCHESTRATOR:
        return _INTO_EXECUTOR
    return _FROM_EXECUTOR if receiver == ORCHESTRATOR else _BETWEEN


# ---- transfers ------------------------------------------------------------------------------------------------------


def _transfers(session: int, frames: Mapping[int, Sequence[Frame]]) -> list[tuple[TransferSample, int, int]]:
    """Transfers of KV that was whole when it was asked for, each with its first and last instant."""
    served: dict[tuple[int, int], tuple[int, int, ServeKv]] = {}
    taken: dict[tuple[int, int], int] = {}
    for core, of_core in frames.items():
        for frame in of_core:
            for command in frame.commands:
                if isinstance(command, ServeKv) and command.ok and not command.is_early:
                    served[command.reader, command.reader_id] = core, frame.now, command
            for event in frame.events:
                if isinstance(event, KvTaken) and event.ok:
                    taken[core, event.request_id] = frame.now
    spans: list[tuple[int, int, int, ServeKv]] = []
    for core, of_core in frames.items():
        for frame in of_core:
            for event in frame.events:
                if isinstance(event, KvReceived) and event.ok and (core, event.request_id) in served:
                    source, at, command = served[core, event.request_id]
                    spans.append((at, frame.now, source, command))
    found = []
    for at, end, source, command in spans:
        num_in_flight = sum(a <= at < b and s == source and c.reader == command.reader for a, b, s, c in spans)
        gone = taken.get((source, command.request_id))
        sample = TransferSample(
            session,
            source,
            command.reader,
            command.num_tokens,
            len(command.blocks),
            num_in_flight,
            end - at,
            None if gone is None else gone - at,
        )
        found.append((sample, at, end))
    return found


# ---- as files -------------------------------------------------------------------------------------------------------

_TABLES: Final[dict[str, type[Struct]]] = {
    "steps": StepSample,
    "messages": MessageSample,
    "transfers": TransferSample,
    "clients": ClientSample,
}
# What a column of words may hold.
_WORDS: Final[dict[str, dict[str, Sequence[str]]]] = {
    "steps": {"kind": (FIRST, CONTINUED, FOLLOWING), "before": (NOTHING, "idle", "decode", "chunk", "same")},
    "messages": {"pair": (_INTO_EXECUTOR, _FROM_EXECUTOR, _BETWEEN)},
}


def write_samples(samples: Samples, folder: Path) -> None:
    """One Parquet file a kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for name, kind in _TABLES.items():
        rows = getattr(samples, name)
        names = kind.__struct_fields__
        columns = {field: [getattr(row, field) for row in rows] for field in names}
        partial = folder / f".{name}.partial"
        pq.write_table(pa.table(columns), partial, compression="zstd")
        partial.replace(folder / f"{name}.parquet")


def read_samples(folder: Path) -> Samples | None:
    """None where there are none. Raises ConfigError for a file that is damaged, or whose columns are not those of samples."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = Samples()
    for name, kind in _TABLES.items():
        path = folder / f"{name}.parquet"
        if not path.is_file():
            return None
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path}: cannot be read: {str(error).partition(chr(10))[0]}") from error
        rows = [kind(**row) for row in checked_rows(table, kind, _WORDS.get(name, {}), path)]
        setattr(samples, name, rows)
    return samples


def as_arrays(rows: Sequence[Struct]) -> dict[str, Any]:
    """The columns of samples of one kind as numpy arrays."""
    import numpy as np

    if not rows:
        return {}
    values = zip(*(msgspec.structs.astuple(row) for row in rows), strict=True)
    return {name: np.array(column) for name, column in zip(rows[0].__struct_fields__, values, strict=True)}
