"""Frames: what goes in comes out, and nothing but WireError comes out of anything else."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.core.commands import Chunk, Joined, RunSteps
from disagg.core.events import (
    Cancel,
    ContextStarted,
    Enqueue,
    FirstTokenOut,
    FirstTokens,
    KvWithdrawn,
    LeaseRenewed,
    MoveOut,
    Report,
    Response,
    RoleChanged,
    Shutdown,
)
from disagg.policies.vocabulary import ContextPhaseParams, FinishReason, Request, SamplingConfig
from disagg.runtime import wire
from disagg.runtime.wire import Envelope, WireEnd, WireError, decode, encode

REQUEST = Request(
    7,
    4,
    16,
    input_token_ids=(1, 2, 3, 4),
    context_phase_params=ContextPhaseParams(3, 1, 4, (9,), b"opaque"),
    sampling=SamplingConfig(0.5, seed=-3),
    end_id=-1,
    block_hashes=(-(1 << 63), 1 << 63),
)
RUN = RunSteps(1, 2, 1, 8, (4,), (Joined(5, 10, (1, 2)),), (Chunk(6, 0, 8, True, (3,)),), ((5, (9, 10)),), 1, 10)
BODIES: list[wire.Body] = [
    Enqueue(REQUEST),
    Cancel(3),
    LeaseRenewed((1, 2, 3)),
    FirstTokens(7, (5,)),
    KvWithdrawn(1, 2, 3),
    ContextStarted(7),
    FirstTokenOut(7, 5),
    Shutdown(False),
    RoleChanged(1, "generation"),
    MoveOut(7),
    Report(1, blocks_free=10, cache_events=(1, -5, 1 << 62), blocks_cached=2),
    Response(7, 1, FinishReason.LENGTH, 16, report=Report(1)),
    wire.Hello(wire.PROTOCOL_VERSION, 1, b"{}"),
    wire.Ready(1, error="no such file"),
    wire.PlanGrant(1, 2, 1, 8, RUN, b"feed"),
    wire.StepResults(1, 2, 1, 8, (5,), (77,), 1000),
    wire.KvAsk(1, 2, 3, 8),
    wire.KvAnswer(3, False, "expired"),
    wire.KvOver(1, 3, True),
    wire.ServeKvOrder(1, 2, 3, 10, (4, 5), True),
    wire.KvWrittenOrder(1),
    wire.ReceiveKvOrder(3, 1, 1, 10, (8, 9)),
    wire.AbortKvOrder(3, "time-out"),
    wire.KvPart(3, True, True, 4096, 10, 64),
    wire.TokenChunk(7, 1, (5, 6)),
    wire.TokenChunks((wire.TokenChunk(7, 1, (5, 6)), wire.TokenChunk(8, 0, (3,)))),
    wire.RecordsChunk("steps", b"rows"),
    wire.HiddenStop(7, 12),
    wire.HealthPing(4),
    wire.Fault("out of memory"),
    wire.Goodbye("end of run"),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_every_message_arrives_as_it_was_sent(body: wire.Body) -> None:
    sent = Envelope(3, 5, 123, body)
    assert decode(encode(sent)) == sent
    assert decode(encode(sent)).kind == type(body).__struct_config__.tag


def test_every_control_message_is_tried_above() -> None:
    kinds = set(wire.Body.__args__)  # type: ignore[attr-defined]
    assert {type(body) for body in BODIES} == kinds


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (Enqueue(Request(-1, 4, 16)), "id"),
        (Enqueue(Request(1, 1 << 40, 16)), "num_prompt_tokens"),
        (Enqueue(Request(1, 4, 16, input_token_ids=(1, -2))), "input_token_ids"),
        (Enqueue(Request(1, 4, 16, priority=float("nan"))), "priority"),
        (Enqueue(Request(1, 4, 16, session="x" * 70_000)), "session"),
        (LeaseRenewed((5, -1)), "request_ids"),
        (FirstTokens(1, (1 << 40,)), "tokens"),
        (KvWithdrawn(1, 1 << 21, 3), "reader"),
        (ContextStarted(-1), "request_id"),
        (FirstTokenOut(-1), "request_id"),
        (Report(1, cache_events=(-1, 5)), "cache_events begins with -1"),
        (Report(1, cache_events=(2, 5)), "cache_events begins with 2; allowed: a count of the 1 hashes"),
        (Response(1, 1 << 21, None, 0), "executor"),
        (wire.KvWrittenOrder(-1), "body"),
        (wire.PlanGrant(1, 1, 1, 1, RunSteps(1, 1, 1, -1)), "last_step"),
        (wire.PlanGrant(1, 1, 1, 1, RunSteps(1, 1, 1, 1, appended=((5, (-9,)),))), "appended"),
        (wire.TokenChunk(1, 0, (1 << 31,)), "body"),
        (wire.HiddenStop(-1, 0), "body"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_number_or_length_out_of_bounds_is_refused_by_name(body: wire.Body, named: str) -> None:
    frame = msgspec.msgpack.encode(Envelope(0, 0, 0, body))
    with pytest.raises(WireError, match=named if named != "body" else r"\$\[3\]"):
        decode(frame)


def test_a_frame_over_the_limit_is_refused_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = encode(Envelope(0, 0, 0, wire.Goodbye("x" * 200)))
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    with pytest.raises(WireError, match="allowed: at most 100"):
        encode(Envelope(0, 0, 0, wire.Goodbye("x" * 200)))
    with pytest.raises(WireError, match="allowed: at most 100"):
        decode(frame)


def test_an_integer_over_64_bits_cannot_be_sent() -> None:
    with pytest.raises(WireError, match="cancel"):
        encode(Envelope(0, 0, 0, Cancel(1 << 70)))


def test_a_lost_a_repeated_and_a_misattributed_frame_are_seen() -> None:
    sender, receiver = WireEnd(1, lambda: 5), WireEnd(0, lambda: 0)
    first, second, third = (sender.seal(0, wire.HealthPing(n)) for n in range(3))
    assert receiver.open(1, first).body == wire.HealthPing(0)
    with pytest.raises(WireError, match="number 0, expected 1"):
        receiver.open(1, first)
    with pytest.raises(WireError, match="number 2, expected 1"):
        receiver.open(1, third)
    with pytest.raises(WireError, match="claims to come from rank 1"):
        receiver.open(2, second)
    assert receiver.open(1, second).sent_at == 5


def test_pairs_are_numbered_independently() -> None:
    sender = WireEnd(0, lambda: 0)
    assert [decode(sender.seal(to, Cancel(1))).sequence for to in (1, 2, 1, 1, 2)] == [0, 0, 1, 2, 1]


def test_2000_mutated_frames_raise_nothing_but_wire_errors() -> None:
    rng = random.Random(11)
    frames = [encode(Envelope(1, 2, 3, body)) for body in BODIES]
    refused = 0
    for _ in range(2000):
        data = bytearray(rng.choice(frames))
        for _ in range(rng.randint(1, 4)):
            kind = rng.randrange(4)
            at = rng.randrange(len(data) + 1)
            if kind == 0 and data:
                data[at % len(data)] = rng.randrange(256)
            elif kind == 1:
                del data[at:]
            elif kind == 2:
                data[at:at] = rng.randbytes(rng.randint(1, 9))
            else:  # a length that promises far more than there is
                data[at:at] = rng.choice([b"\xdd\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff", b"\xdf\xff\xff\xff\xff"])
        try:
            decode(data)
        except WireError:
            refused += 1
    assert refused > 1000


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(WireError):
        decode(b"\x91" * 200_000 + b"\x01")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data)
