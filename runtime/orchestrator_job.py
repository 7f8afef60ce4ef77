"""The values that a run on real executors takes and gives: they travel between processes as msgpack."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from .clock_offsets import ClockOffset
from .executor_spec import HardwareSpec
from .orchestrator_load import LoadPhase, SendRow
from .rank_record import RankInfo, RankRecord
from .session_record import Row
from .wire import KvPart

JOB: Final = "job"
RESULT: Final = "result"
PROGRESS: Final = "progress"
PLACEMENT: Final = "placement"  # who runs where, as text, once all ranks are up
QUIET: Final = "--quiet"  # argument of orchestrator_main: whoever started it will tell of failures


class Fault(Struct, frozen=True):
    """A process of an executor is killed `after` picoseconds of the run. `participant` indexes participant_ids."""

    executor: int
    after: int
    participant: int = 0


class Job(Struct, frozen=True):
    """`warm_up`: how many small requests first go over every context × generation pair and mixed executor, not recorded."""

    spec: HardwareSpec
    phases: tuple[LoadPhase, ...]
    warm_up: int = 1
    drain: bool = True
    faults: tuple[Fault, ...] = ()


class HardwareResult(Struct, frozen=True, tag="result"):
    """What a run leaves. Instants in picoseconds of the run's clock. Keys are cores: 0 the orchestrator, then executors.

    `logs`: event logs, replayable by `core.event_log`. `step_ends`: (epoch, step within it, instant) of each step.
    `parts`: (rank, its part) of each KV transfer, at both ends. What an executor that died had to say is missing.
    Rows are on rank 0's clock; logs and step ends are on their own core's, which `clock_offsets` tells from it.
    """

    rows: list[Row]
    logs: dict[int, bytes]
    step_ends: dict[int, list[tuple[int, int, int]]]
    parts: dict[int, list[tuple[int, KvPart]]]
    sends: list[SendRow]
    ranks: list[RankInfo]
    rank_records: list[RankRecord]
    clock_offsets: list[ClockOffset] = []
    orchestrator_host: str = ""
    orchestrator_pid: int = 0


class Failure(Struct, frozen=True, tag="failure"):
    """Instead of a result: why there is none."""

    message: str
    exit_code: int


_encoder: Final = msgspec.msgpack.Encoder()
_job_decoder: Final = msgspec.msgpack.Decoder(Job)
_outcome_decoder: Final = msgspec.msgpack.Decoder(HardwareResult | Failure)


def encode(value: Job | HardwareResult | Failure) -> bytes:
    return _encoder.encode(value)


def decode_job(data: bytes) -> Job:
    """Raises msgspec.ValidationError for anything else."""
    return _job_decoder.decode(data)


def decode_outcome(data: bytes) -> HardwareResult | Failure:
    """Raises msgspec.ValidationError for anything else."""
    outcome: HardwareResult | Failure = _outcome_decoder.decode(data)
    return outcome
