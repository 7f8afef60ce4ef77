"""What a rank and its leader do with an early transfer, on a transport that only writes down what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from disagg.core.commands import Chunk, PrepareReceive, RunSteps, ServeKv
from disagg.core.events import KvReceived, KvTaken
from disagg.policies.vocabulary import ContextPhaseParams, Request, RequestType, SamplingConfig
from disagg.runtime.engine import Engine, PlanFeed
from disagg.runtime.executor_kv import ExecutorTransfers, RankTransfers
from disagg.runtime.executor_spec import ModelSource, check_spec
from disagg.runtime.executor_tokens import Sequences, TokenError, check_tokens
from disagg.runtime.model_batch import ChunkFeed
from disagg.runtime.transport import OutcomeHandler, TransferOutcome
from disagg.runtime.wire import KvPart, KvWrittenOrder, ReceiveKvOrder, ServeKvOrder
from tests.runtime_programs.clusters import cluster, context, generation
from tests.tiny_models import SHAPES, make_engine

SHAPE = SHAPES["llama"]
# executor 1: ranks 1 and 2, stages of three layers and one; executor 2: ranks 3 and 4, slices of all layers
ROSTER = check_spec(cluster(ModelSource(SHAPE), [context(1, 2, (3, 1)), generation(2, 1)]))


class Noting:
    """A transport that keeps its calls. `finish(peer)` ends the part with one peer."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.handlers: dict[int, OutcomeHandler] = {}
        self.on_advance: Callable[[], object] | None = None

    def send(
        self,
        transfer_id: int,
        peer_rank: int,
        pieces: Sequence[Any],
        blocks: Sequence[int],
        num_tokens: int,
        on_done: OutcomeHandler,
        *,
        is_written: bool = True,
    ) -> None:
        self.calls.append(("send", transfer_id, peer_rank, is_written))
        self.handlers[peer_rank] = on_done

    def advance(self, transfer_id: int, layers: tuple[int, int], num_tokens: int) -> None:
        self.calls.append(("advance", transfer_id, layers, num_tokens))
        if self.on_advance is not None:
            self.on_advance()

    def forget(self, transfer_id: int) -> None:
        self.calls.append(("forget", transfer_id))

    def finish(self, peer_rank: int, error: str | None = None) -> None:
        self.handlers.pop(peer_rank)(TransferOutcome(8, peer_rank, True, 10, 1, error))

    def taken(self) -> list[tuple[Any, ...]]:
        calls, self.calls = self.calls, []
        return calls


def rank_transfers(rank: int = 1) -> tuple[RankTransfers, Noting, list[KvPart]]:
    transport = Noting()
    parts: list[KvPart] = []
    return RankTransfers(ROSTER, rank, transport, parts.append), transport, parts  # type: ignore[arg-type]


EARLY = ServeKvOrder(7, 2, 8, 10, (0, 1, 2), is_early=True)


def test_a_rank_that_is_asked_early_sends_what_its_engine_says_is_written() -> None:
    transfers, transport, parts = rank_transfers(2)  # whose only layer is the model's fourth
    transfers.on_layers(0, 1, ((7, 4),))  # before the order: nobody has asked yet
    transfers.serve(EARLY)
    assert transport.taken() == [("send", 8, 3, False), ("send", 8, 4, False)]
    transfers.on_layers(0, 1, ((5, 4), (7, 8)))
    assert transport.taken() == [("advance", 8, (3, 4), 8)]
    transport.finish(3)
    transport.finish(4)
    assert transport.taken() == [("forget", 8)]
    assert [part.ok for part in parts] == [True]
    transfers.on_layers(0, 1, ((7, 10),))
    assert transport.taken() == []


def test_a_rank_that_was_asked_too_late_to_hear_of_a_layer_is_told_when_all_is_written() -> None:
    transfers, transport, _ = rank_transfers()
    transfers.serve(EARLY)
    transport.taken()
    transfers.written(KvWrittenOrder(7))
    assert transport.taken() == [("advance", 8, (0, 3), 10)]
    transfers.written(KvWrittenOrder(6))
    assert transport.taken() == []


def test_an_ordinary_transfer_hears_nothing_of_layers() -> None:
    transfers, transport, _ = rank_transfers()
    transfers.serve(ServeKvOrder(7, 2, 8, 10, (0, 1, 2)))
    transfers.on_layers(0, 1, ((7, 10),))
    transfers.written(KvWrittenOrder(7))
    assert transport.taken() == [("send", 8, 3, True), ("send", 8, 4, True)]


def test_what_is_said_of_a_transfer_that_ends_at_that_moment_is_forgotten() -> None:
    transfers, transport, _ = rank_transfers()
    transfers.serve(EARLY)
    transport.taken()

    def both_fail() -> None:
        transport.on_advance = None
        transport.finish(3, "rank 3 is down")
        transport.finish(4, "rank 4 is down")

    transport.on_advance = both_fail
    transfers.on_layers(0, 1, ((7, 8),))
    assert transport.taken() == [("advance", 8, (0, 1), 8), ("forget", 8), ("forget", 8)]


def test_a_leader_tells_the_ranks_that_still_send_that_all_is_written() -> None:
    orders: list[tuple[int, Any]] = []
    transfers = ExecutorTransfers(ROSTER, 1, lambda rank, order: orders.append((rank, order)))
    transfers.serve(ServeKv(7, 2, 8, 10, (0, 1, 2), True, None, 4))
    transfers.serve(ServeKv(6, 2, 9, 10, (3, 4, 5), True))
    assert orders[0] == (1, ServeKvOrder(7, 2, 8, 10, (0, 1, 2), is_early=True))
    assert transfers.part_done(2, KvPart(7, True, True)) is None
    del orders[:]
    for request_id in (5, 6, 7):
        transfers.written(request_id)
    assert orders == [(1, KvWrittenOrder(7))]
    assert transfers.part_done(1, KvPart(7, True, True)) == (KvTaken(7), 1)


def test_a_reader_prepares_as_it_receives() -> None:
    orders: list[tuple[int, Any]] = []
    transfers = ExecutorTransfers(ROSTER, 2, lambda rank, order: orders.append((rank, order)))
    transfers.receive(PrepareReceive(8, 1, 7, 10, (3, 4, 5)))
    assert orders == [(rank, ReceiveKvOrder(8, 1, 7, 10, (3, 4, 5))) for rank in (3, 4)]
    assert transfers.part_done(3, KvPart(8, False, True)) is None
    assert transfers.part_done(4, KvPart(8, False, True)) == (KvReceived(8, True), 1)


def feed(tokens: tuple[int, ...]) -> PlanFeed:
    return PlanFeed(chunks=(ChunkFeed(7, tokens, SamplingConfig()),))


def test_the_engine_tells_of_each_layer_of_a_chunk_and_of_no_decode() -> None:
    engine: Engine = make_engine(SHAPE)
    told: list[tuple[int, int, tuple[tuple[int, int], ...]]] = []
    engine.on_layers = lambda first, end, written: told.append((first, end, written))
    prompt = tuple(range(6))
    engine.begin(RunSteps(1, 1, 1, 1, chunks=(Chunk(7, 0, 4, False, (0, 1)),)), feed(prompt[:4]))
    engine.step()
    assert told == [(layer, layer + 1, ((7, 4),)) for layer in range(SHAPE.num_layers)]
    del told[:]
    engine.begin(RunSteps(2, 2, 1, 1, chunks=(Chunk(7, 4, 2, True, (0, 1)),)), feed(prompt[4:]))
    engine.step()
    assert told == [(layer, layer + 1, ((7, 6),)) for layer in range(SHAPE.num_layers)]


def promised(tokens: tuple[int, ...] = ()) -> Request:
    params = ContextPhaseParams(7, 1, 3, tokens, is_promised=True)
    return Request(8, 3, 5, RequestType.GENERATION_ONLY, input_token_ids=(1, 2, 3), context_phase_params=params)


def test_a_promised_sequence_has_no_token_until_it_is_told_and_is_told_once() -> None:
    check_tokens(promised(), SHAPE.vocab_size)
    with pytest.raises(TokenError, match="allowed: 0 token"):
        check_tokens(promised((5,)), SHAPE.vocab_size)
    sequences = Sequences()
    sequences.enter(promised())
    sequences.first(8, (5,))
    sequences.first(8, (6,))
    sequences.first(9, (6,))
    sequence = sequences.get(8)
    assert sequence is not None
    assert sequence.generated == [5]
