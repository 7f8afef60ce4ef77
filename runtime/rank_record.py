"""What a rank of an executor tells rank 0: where it is, what it holds, and how it ended. Knows no device.

Rank 0 is no executor's: it reads these without loading what executors run on.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from .clock import monotonic_ns
from .executor_kv import ChecksumRow
from .wire import PROTOCOL_VERSION, Hello

DRAINED: Final = "drained"


class ExecutorBrokenError(RuntimeError):
    """This executor cannot go on: one of its ranks is gone, or a step failed half-way on several ranks."""


class SessionConfig(Struct, frozen=True):
    """What a Hello carries: the origin of the session's clock, and whether the session is recorded.

    `sends_early`: KV may be asked for before it is computed, so that a step must tell of its layers; a graph cannot.
    `seed`: of the executor's policies in this session, and `reuses_blocks`: whether it shares KV blocks in it; None: as
    its configuration says.
    """

    origin_ns: int
    record: bool = True
    sends_early: bool = True
    seed: int | None = None
    reuses_blocks: bool | None = None


def session_of(hello: Hello) -> SessionConfig:
    """What `hello` carries. ExecutorBrokenError if its sender speaks another version of the messages than this rank."""
    if hello.version != PROTOCOL_VERSION:
        raise ExecutorBrokenError(
            f"a rank of executor {hello.executor} speaks version {PROTOCOL_VERSION} of the messages between ranks, and was"
            f" greeted in version {hello.version}: all ranks must run the same version of disagg"
        )
    return msgspec.msgpack.decode(hello.config, type=SessionConfig)


class RankInfo(Struct, frozen=True):
    """What a rank holds, for the run's manifest and for tests."""

    rank: int
    executor: int
    hostname: str
    pid: int
    device: str
    kv_bytes: int
    weight_bytes: int
    layers: tuple[int, int]
    kv_heads: tuple[int, int]
    num_blocks: int = 0
    free_bytes: int | None = None  # of the device, once everything has its place; None for host memory
    transport: str | None = None  # how KV travels here, and why so
    collectives: str | None = None  # how the executor's ranks sum, and why so


class RankRecord(Struct, frozen=True):
    """What a rank alone knows at its end."""

    rank: int
    margins: tuple[tuple[int, float], ...] = ()
    checksums: tuple[ChecksumRow, ...] = ()


def session_config(record: bool, *, sends_early: bool) -> SessionConfig:
    """A session that begins now."""
    return SessionConfig(monotonic_ns(), record, sends_early)
