"""The protocol where the receiver reads for itself, frame by frame: how many there are, and that none comes too late."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from disagg.runtime.transport_wire import MAX_OFFERS
from tests.transport_pair import NUM_TOKENS, Pair


def test_a_transfer_that_was_offered_takes_one_frame_each_way_and_its_reader_asks_nobody() -> None:
    pair = Pair()
    pair.send(0)
    pair.settle()
    pair.send(1)
    pair.settle()
    pair.wire.told[0].clear()
    pair.receive(1)
    pair.progress[1].calls.popleft()()
    assert pair.lanes[1].work, "the copy was not begun at once"
    pair.settle()
    assert pair.errors(0) == pair.errors(1) == {1: None}
    assert pair.arrived(1)
    assert pair.wire.told == {0: {}, 1: {"KvOfferTaken": 1}}


def test_a_transfer_that_was_asked_for_first_takes_three_frames() -> None:
    pair = Pair()
    for ident in (0, 1):
        pair.wire.told[0].clear(), pair.wire.told[1].clear()
        pair.receive(ident)
        pair.settle()
        pair.send(ident)
        pair.settle()
    assert pair.errors(0) == pair.errors(1) == {0: None, 1: None}
    assert pair.wire.told == {0: {"KvSegment": 1}, 1: {"KvReady": 1, "KvTaken": 1}}


def test_a_sender_whose_receiver_has_not_asked_keeps_nobody_awake() -> None:
    pair = Pair()
    pair.send(0)
    pair.settle()
    assert [progress.is_expecting for progress in pair.progress] == [False, False]
    pair.receive(0)
    pair.progress[1].calls.popleft()()
    assert pair.progress[1].is_expecting
    pair.settle()
    assert not pair.progress[1].is_expecting


def test_question_and_offer_that_cross_make_one_transfer() -> None:
    pair = Pair()
    pair.send(3)
    pair.receive(3)
    for progress in pair.progress:
        progress.calls.popleft()()
    pair.settle()
    assert pair.errors(0) == pair.errors(1) == {3: None}
    assert pair.arrived(3)
    assert pair.left_overs(0) == pair.left_overs(1) == {}


def test_pages_that_were_offered_stay_the_senders_burden_until_the_reader_lets_go() -> None:
    pair = Pair()
    pair.send(2)
    pair.settle()
    pair.receive(2)
    pair.progress[1].calls.popleft()()  # the copy has begun
    pair.transports[0].abort(2, 1, "the request was cancelled")
    pair.progress[0].calls.popleft()()
    assert pair.outcomes[0] == {}
    pair.settle()
    assert pair.errors(0) == {2: "the request was cancelled"}
    assert pair.errors(1) == {2: None}  # it was complete, and nobody took it back
    assert pair.touched_late == []


def test_an_offer_that_nobody_took_is_withdrawn_and_whoever_asks_later_hears_why() -> None:
    pair = Pair()
    pair.send(2)
    pair.settle()
    pair.transports[0].abort(2, 1, "the request was cancelled")
    pair.settle()
    assert pair.errors(0) == {2: "the request was cancelled"}
    assert pair.left_overs(0) == pair.left_overs(1) == {}
    pair.receive(2)
    pair.settle()
    assert pair.errors(1) == {2: "the request was cancelled"}


def test_ends_that_were_told_different_things_both_fail_with_both_sides_of_it() -> None:
    pair = Pair()
    pair.send(1, num_tokens=NUM_TOKENS - 1)
    pair.settle()
    pair.receive(1)
    pair.settle()
    for rank in (0, 1):
        assert "expects 896 bytes, 7 tokens" in str(pair.errors(rank)[1])
        assert "768 bytes, 6 tokens" in str(pair.errors(rank)[1])
    assert pair.left_overs(0) == pair.left_overs(1) == {}


def test_checksums_are_compared_where_the_question_comes_first_and_where_it_does_not() -> None:
    pair = Pair(verify=True)
    pair.receive(1)
    pair.settle()
    for ident in (1, 2):
        pair.send(ident)
    pair.settle()
    pair.receive(2)
    pair.settle()
    assert pair.errors(0) == pair.errors(1) == {1: None, 2: None}
    assert all(outcome.num_checked == 2 * 2 * 4 for outcome in pair.outcomes[1].values())


def test_offers_are_bounded_and_the_rest_waits_to_be_asked() -> None:
    pair = Pair()
    desk = pair.transports[0]
    desk._offered.update({(1, -2 - i): None for i in range(MAX_OFFERS)})  # type: ignore[misc]
    pair.send(1)
    pair.progress[0].calls.popleft()()
    assert pair.wire.told[0] == {}
    desk._offered.clear()
    pair.receive(1)
    pair.settle()
    assert pair.errors(0) == pair.errors(1) == {1: None}


def test_the_death_of_a_reader_frees_what_it_was_offered_and_that_of_a_sender_ends_what_was_being_read() -> None:
    for victim in (0, 1):
        pair = Pair()
        pair.send(1)
        pair.send(2)
        pair.settle()
        pair.receive(2)
        pair.progress[1].calls.popleft()()
        pair.kill(victim)
        pair.settle()
        survivor = 1 - victim
        wanted = {1, 2} if survivor == 0 else {2}
        assert set(pair.outcomes[survivor]) == wanted
        assert all("is down" in str(error) for error in pair.errors(survivor).values())
        assert pair.left_overs(survivor) == {}


def life_of(pair: Pair, ident: int, rng: random.Random) -> list[Callable[[], None]]:
    """What both ends are told of one transfer, in an order of chance: written or layer by layer, and given up or not."""
    progressive = rng.random() < 0.4
    begin = [lambda: pair.send(ident, is_written=not progressive), lambda: pair.receive(ident)]
    rng.shuffle(begin)
    late: list[Callable[[], None]] = []
    if progressive:
        late = [
            lambda: pair.transports[0].advance(ident, (0, 1), 4),
            lambda: pair.transports[0].advance(ident, (0, 2), NUM_TOKENS),
        ]
    if rng.random() < 0.5:
        rank = rng.randrange(2)
        late.insert(rng.randrange(len(late) + 1), lambda: pair.transports[rank].abort(ident, 1 - rank, "given up"))
    return begin + late


def test_through_staging_the_first_segments_are_in_mpi_before_anybody_asks_and_taken_before_the_sender_hears() -> None:
    pair = Pair(is_staged=True)
    pair.send(0)
    pair.settle()
    assert sum(map(len, pair.wire.sent.values())) == 2
    assert pair.wire.told == {0: {"KvAhead": 2}, 1: {}}
    pair.receive(0)
    pair.progress[1].calls.popleft()()
    assert len(pair.wire.arrivals()) == 2, "the reader waits for its sender"
    pair.settle()
    assert pair.errors(0) == pair.errors(1) == {0: None}
    assert pair.arrived(0)
    assert pair.wire.told == {0: {"KvAhead": 2, "KvSegment": 2}, 1: {"KvReady": 1}}
    assert pair.left_overs(0) == pair.left_overs(1) == {}


def test_a_segment_is_announced_before_it_is_packed_but_not_before_it_has_a_buffer() -> None:
    pair = Pair(is_staged=True)
    for ident in (0, 1):
        pair.receive(ident)
        pair.progress[1].calls.popleft()()
        pair.progress[0].handler(1, pair.wire.frames[1].popleft())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair.lanes[0], "poll", lambda: False)  # the device does nothing
        for ident in (0, 1):
            pair.send(ident)
            pair.progress[0].calls.popleft()()
    assert pair.wire.sent == {}
    assert pair.wire.told[0] == {"KvSegment": 4}  # of 8: there are four buffers
    pair.settle()
    assert pair.errors(0) == pair.errors(1) == {0: None, 1: None}
    assert pair.arrived(0)
    assert pair.arrived(1)
    assert pair.left_overs(0) == pair.left_overs(1) == {}


def test_a_segment_that_cannot_be_packed_fails_its_transfer_at_both_ends_and_no_other() -> None:
    pair = Pair(is_staged=True)
    for ident in (0, 1):
        pair.receive(ident)
        pair.settle()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair.lanes[0], "poll", lambda: pair.lanes[0].fail("the device is ill"))
        pair.send(0)
        pair.settle()
    pair.send(1)
    pair.settle()
    assert pair.errors(0) == {0: "transfer 0: the device is ill", 1: None}
    assert pair.errors(1)[1] is None
    assert pair.errors(1)[0] is not None
    assert pair.arrived(1)
    assert pair.left_overs(0) == pair.left_overs(1) == {}


def test_what_was_sent_ahead_for_nobody_is_taken_by_its_receiver_when_it_is_given_up() -> None:
    pair = Pair(is_staged=True)
    for ident in range(5):
        pair.send(ident)
    pair.settle()
    assert pair.wire.told[0] == {"KvAhead": 2}, "one transfer at a time goes ahead"
    pair.transports[0].abort(0, 1, "given up")
    pair.settle()
    assert pair.left_overs(0).get("buffers") is None
    assert pair.left_overs(1) == {}
    pair.send(5)
    pair.settle()
    assert pair.wire.told[0] == {"KvAhead": 4, "KvAheadDropped": 1}
    for ident in (4, 2, 5, 1, 3, 0):
        pair.receive(ident)
    pair.settle()
    assert pair.errors(1) == {0: "given up", **dict.fromkeys(range(1, 6))}
    assert all(pair.arrived(ident) for ident in range(1, 6))
    assert pair.left_overs(0) == pair.left_overs(1) == {}


def test_what_went_ahead_leaves_another_transfer_as_many_segments_under_way_as_a_pipeline_needs() -> None:
    pair = Pair(is_staged=True)
    pair.send(0)
    pair.settle()  # two of its segments wait for a receiver that does not come
    pair.receive(1)
    pair.progress[1].calls.popleft()()
    pair.progress[0].handler(1, pair.wire.frames[1].popleft())
    pair.lanes[0].poll = lambda: False  # type: ignore[method-assign]  # nothing is packed yet
    pair.wire.told[0].clear()
    pair.send(1)
    pair.progress[0].calls.popleft()()
    assert pair.wire.told[0] == {"KvSegment": 2}, "one is on its way while the next is packed"


def test_a_receiver_that_closes_takes_what_came_ahead_before_and_comes_after() -> None:
    pair = Pair(is_staged=True)
    pair.send(0)
    pair.settle()
    pair.transports[1]._on_close()
    pair.settle()
    assert pair.left_overs(1) == {}
    pair.transports[0].abort(0, 1, "given up")
    pair.settle()
    pair.send(1)
    pair.settle()
    assert pair.left_overs(1) == {}
    assert pair.left_overs(0).get("buffers") is None


def test_ends_that_were_told_different_things_leave_nothing_in_mpi() -> None:
    pair = Pair(is_staged=True)
    pair.send(1, num_tokens=NUM_TOKENS - 1)
    pair.settle()
    pair.receive(1)
    pair.settle()
    for rank in (0, 1):
        assert "expects 896 bytes, 7 tokens" in str(pair.errors(rank)[1])
        assert pair.left_overs(rank) == {}
    assert not any(pair.wire.sent.values())


def test_what_was_sent_ahead_of_a_question_that_was_given_up_is_not_taken_for_an_answer_to_the_next() -> None:
    pair = Pair(is_staged=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair.lanes[0], "poll", lambda: False)  # it is being packed
        pair.send(0)
        pair.progress[0].calls.popleft()()
    for again in (False, True):
        pair.receive(0)
        pair.progress[1].calls.popleft()()
        if not again:
            pair.transports[1].abort(0, 0, "given up")
            pair.progress[1].calls.popleft()()
            assert pair.outcomes[1].pop(0).error == "given up"
    while pair.transports[0]._poll():  # packed before the sender hears of any question
        pass
    pair.settle()
    assert pair.outcomes[0].pop(0).error == "given up"
    pair.pages[0].pool.uniform_(2.0, 3.0)
    pair.send(0)
    pair.settle()
    assert pair.errors(0) == pair.errors(1) == {0: None}
    assert pair.arrived(0)
    assert pair.left_overs(0) == pair.left_overs(1) == {}


def test_a_device_that_breaks_while_something_is_sent_ahead_leaves_no_transfer_that_never_ends() -> None:
    pair = Pair(is_staged=True)

    def poll() -> bool:
        raise RuntimeError("the device is ill")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair.lanes[0], "poll", poll)
        pair.send(0)
        pair.progress[0].calls.popleft()()
    pair.receive(0)
    pair.settle()
    assert pair.errors(0) == {0: "transfer 0: the device is ill"}
    assert pair.errors(1) == {0: "transfer 0: the device is ill"}
    assert pair.left_overs(0) == pair.left_overs(1) == {}


@pytest.mark.parametrize(("verify", "is_staged"), [(False, False), (True, False), (False, True), (True, True)])
def test_whatever_crosses_whatever_every_end_is_told_once_and_no_page_is_touched_after_that(
    verify: bool, is_staged: bool
) -> None:
    moved = 0
    for seed in range(150):
        rng = random.Random(seed)
        sizes = ((4, 2), (4, 4))[seed % 2]  # alike, blocks are copied whole
        pair = Pair(verify=verify, block_sizes=sizes, is_staged=is_staged)
        deeds = [life_of(pair, ident, rng) for ident in range(8)]
        while any(deeds):
            if rng.random() < 0.6 and pair.step(rng):
                continue
            rng.choice([row for row in deeds if row]).pop(0)()
        pair.settle(rng)
        assert not any((*pair.wire.sent.values(), *pair.wire.posted.values())), f"seed {seed}: left in MPI"
        for rank in (0, 1):
            assert set(pair.outcomes[rank]) == set(range(8)), f"seed {seed}: {pair.errors(rank)}"
            assert pair.left_overs(rank) == {}, f"seed {seed}"
        assert pair.touched_late == [], f"seed {seed}"
        for ident, error in pair.errors(1).items():
            assert error in (None, "given up"), f"seed {seed}"
            if error is None:
                moved += 1
                assert pair.arrived(ident), f"seed {seed}"
    assert moved > 300
