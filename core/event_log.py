"""The event log of one core: what went in, when, and what came out; and its replay.

A log is a header frame and one frame per instant: (now, events, commands), msgpack, each after its length in four bytes,
big-endian. It holds everything that a core's behaviour depends on, so a fresh core fed the events only must give the
same commands, byte for byte: that proves the core deterministic and the log complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import msgspec
from msgspec import Struct

from .commands import Command
from .config import ExecutorConfig, OrchestratorConfig
from .events import Event
from .executor import ExecutorCore
from .orchestrator import OrchestratorCore

FORMAT: Final = 2
_PREFIX: Final = 4
_MAX_FRAME: Final = 1 << 30


class LogHeader(Struct, frozen=True):
    format: int
    executor: ExecutorConfig | None = None
    orchestrator: OrchestratorConfig | None = None
    policy_root: str = "."


class _AnyHeader(Struct, frozen=True):
    """What the headers of all formats have."""

    format: int


class Frame(Struct, frozen=True, array_like=True):
    """One instant of one core."""

    now: int
    events: tuple[Event, ...]
    commands: tuple[Command, ...]


class EventLogError(ValueError):
    """A log that is cut short, of another format, or no log at all."""


class ReplayDifference(AssertionError):
    """A fresh core did something else than the log says. `frame` counts from 0."""

    def __init__(self, frame: int, now: int, logged: tuple[Any, ...], replayed: tuple[Any, ...]) -> None:
        self.frame, self.now, self.logged, self.replayed = frame, now, logged, replayed
        super().__init__(f"frame {frame} at {now} ps:\n  logged   {logged}\n  replayed {replayed}")


class Core(Protocol):
    """Either core, as a driver sees it."""

    def handle(self, event: Any, now: int, more: bool = False) -> list[Any]: ...


_encoder: Final = msgspec.msgpack.Encoder()
_header_decoder: Final = msgspec.msgpack.Decoder(LogHeader)
_format_decoder: Final = msgspec.msgpack.Decoder(_AnyHeader)
_frame_decoder: Final = msgspec.msgpack.Decoder(Frame)


class LoggedCore:
    """A core whose every instant is written to `sink` as a frame, once its planning pass is over."""

    def __init__(self, core: Core, header: LogHeader, sink: Callable[[bytes], object]) -> None:
        self.core = core
        self._sink = sink
        self._events: list[Any] = []
        self._commands: list[Any] = []
        self._write(header)

    def handle(self, event: Any, now: int, more: bool = False) -> list[Any]:
        commands = self.core.handle(event, now, more)
        if event is not None:
            self._events.append(event)
        self._commands += commands
        if not more:
            self._write(Frame(now, tuple(self._events), tuple(self._commands)))
            self._events.clear()
            self._commands.clear()
        return commands

    def _write(self, value: Any) -> None:
        body = _encoder.encode(value)
        self._sink(len(body).to_bytes(_PREFIX, "big") + body)


def read_log(data: bytes) -> tuple[LogHeader, Iterator[Frame]]:
    """The header and the frames of a log; EventLogError if it is none."""
    bodies = _bodies(data)
    try:
        first = next(bodies)
        found = _format_decoder.decode(first).format
        if found != FORMAT:
            raise EventLogError(f"event log of format {found}, this version reads {FORMAT}")
        header = _header_decoder.decode(first)
    except (StopIteration, msgspec.DecodeError) as error:
        raise EventLogError(f"not an event log: {error}") from None
    return header, _frames(bodies)


def _frames(bodies: Iterator[bytes]) -> Iterator[Frame]:
    for i, body in enumerate(bodies):
        try:
            yield _frame_decoder.decode(body)
        except msgspec.DecodeError as error:
            raise EventLogError(f"frame {i} of the event log: {error}") from None


def _bodies(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + _PREFIX], "big")
        at += _PREFIX
        if length > _MAX_FRAME or at + length > len(data):
            raise EventLogError(f"the event log is cut short at byte {at}")
        yield data[at : at + length]
        at += length


def make_core(header: LogHeader) -> Core:
    if header.executor is not None:
        return ExecutorCore(header.executor, header.policy_root)
    if header.orchestrator is not None:
        return OrchestratorCore(header.orchestrator)
    raise EventLogError("the header of the event log names no core")


def replay_frames(core: Core, frames: Iterator[Frame]) -> int:
    """Feed the events of `frames` to `core` and compare what comes out; the number of frames.

    ReplayDifference at the first frame whose commands differ in a byte.
    """
    number = 0
    for number, frame in enumerate(frames, 1):
        commands: list[Any] = []
        for event in frame.events:
            commands += core.handle(event, frame.now, True)
        commands += core.handle(None, frame.now)
        if _encoder.encode(commands) != _encoder.encode(frame.commands):
            raise ReplayDifference(number - 1, frame.now, frame.commands, tuple(commands))
    return number


def replay(data: bytes) -> int:
    """Replay a whole log into a fresh core; see `replay_frames`."""
    header, frames = read_log(data)
    return replay_frames(make_core(header), frames)
