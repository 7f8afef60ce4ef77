"""Moving KV pages: the seam, the in-process transport, and the MPI one between real processes."""

from __future__ import annotations

import pytest
import torch

from disagg.core.kv_layout import KvLayout, Piece, transfer_plan
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.transport import (
    KvTransport,
    TransferOutcome,
    TransportError,
    check_backend,
    first_difference,
    ranges_of,
)
from disagg.runtime.transport_local import LocalHub, LocalKvTransport
from tests.warm_world import warm_world

WHOLE = [Piece(0, 0, (0, 2), (0, 2))]


def make_pages(num_tokens_per_block: int = 4) -> KvPages:
    return KvPages(KvLayout(1, 1, (2,), 2, 4, "float32"), 0, 8, num_tokens_per_block)


def pair(verify: bool = True) -> tuple[LocalHub, LocalKvTransport, LocalKvTransport, KvPages, KvPages]:
    hub, source, destination = LocalHub(), make_pages(), make_pages(2)
    source.pool.uniform_()
    return (
        hub,
        LocalKvTransport(hub, 0, source, verify=verify),
        LocalKvTransport(hub, 1, destination, verify=verify),
        source,
        destination,
    )


def test_no_transport_is_refused_in_the_agreed_words() -> None:
    with pytest.raises(TransportError) as refusal:
        check_backend(None)
    assert str(refusal.value) == "Disaggregated serving is not enabled, please check the configuration"


def test_an_unknown_transport_is_refused_with_those_that_exist() -> None:
    assert check_backend("mpi") == "mpi"
    with pytest.raises(TransportError, match=r"'pigeon' is unknown; allowed: mpi, cuda_ipc, host, auto"):
        check_backend("pigeon")


@pytest.mark.parametrize("receiver_first", [False, True])
def test_pages_arrive_whichever_end_comes_first(receiver_first: bool) -> None:
    _, sender, receiver, source, destination = pair()
    outcomes: list[TransferOutcome] = []
    ends = [
        lambda: sender.send(5, 1, WHOLE, (3, 1), 7, outcomes.append),
        lambda: receiver.receive(5, 0, WHOLE, (0, 7, 2, 4), 7, outcomes.append),
    ]
    for end in reversed(ends) if receiver_first else ends:
        assert outcomes == []
        end()
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert outcomes[0].num_bytes == 2 * 2 * 2 * 7 * 4 * 4
    assert outcomes[1].num_checked == 2 * 2 * 4
    sent = source.pack((3, 1), 7, (0, 2), (0, 2))
    assert torch.equal(destination.pack((0, 7, 2, 4), 7, (0, 2), (0, 2)), sent)


def test_a_checksum_names_the_place_that_differs() -> None:
    _, sender, receiver, _source, destination = pair()
    unpack = destination.unpack

    def unpack_badly(packed: torch.Tensor, *args: object) -> None:
        packed[1, 0, 1, 5, 2] += 1.0  # layer 1, K, head 1, token 5: block 2 of two tokens each
        unpack(packed, *args)  # type: ignore[arg-type]

    destination.unpack = unpack_badly  # type: ignore[method-assign]
    outcomes: list[TransferOutcome] = []
    sender.send(5, 1, WHOLE, (3, 1), 7, outcomes.append)
    receiver.receive(5, 0, WHOLE, (0, 7, 2, 4), 7, outcomes.append)
    assert [outcome.error for outcome in outcomes] == ["layer 1, KV head 1, block 2 differs"] * 2


def test_unequal_pieces_no_tokens_and_bad_blocks_fail_alone() -> None:
    _, sender, receiver, _, _ = pair()
    errors: dict[int, str | None] = {}

    def on_done(outcome: TransferOutcome) -> None:
        errors[outcome.transfer_id] = outcome.error

    half = [Piece(0, 0, (0, 1), (0, 2))]
    for ident, pieces, blocks, tokens in (
        (1, half, (3, 1), 7),
        (2, WHOLE, (3, 99), 7),
        (3, WHOLE, (), 0),
        (4, WHOLE, (3, 1), 7),
    ):
        sender.send(ident, 1, pieces, blocks, tokens, on_done)
        receiver.receive(ident, 0, WHOLE, (0, 7, 2, 4)[: 4 if tokens else 0], tokens, on_done)
    assert "the receiver expects" in str(errors[1])
    assert "block ids must lie in 0 to 7" in str(errors[2])
    assert "no data" in str(errors[3])
    assert errors[4] is None


def test_a_lost_rank_an_abort_and_a_close_each_end_what_waits() -> None:
    hub, sender, receiver, _, _ = pair()
    outcomes: list[TransferOutcome] = []
    sender.send(1, 1, WHOLE, (3, 1), 7, outcomes.append)
    sender.abort(1, 1, "cancelled")
    sender.send(2, 1, WHOLE, (3, 1), 7, outcomes.append)
    sender.close()
    receiver.receive(3, 0, WHOLE, (0, 7, 2, 4), 7, outcomes.append)
    hub.fail_transfers_of(0)
    receiver.receive(4, 0, WHOLE, (0, 7, 2, 4), 7, outcomes.append)
    assert [outcome.error for outcome in outcomes] == [
        "cancelled",
        "the transport was closed",
        "rank 0 is down",
        "rank 0 is down",
    ]


def test_a_transfer_in_flight_twice_is_refused() -> None:
    _, sender, receiver, _, _ = pair()
    outcomes: list[TransferOutcome] = []
    sender.send(1, 1, WHOLE, (3, 1), 7, outcomes.append)
    sender.send(1, 1, WHOLE, (3, 1), 7, outcomes.append)
    assert [outcome.error for outcome in outcomes] == ["transfer 1 with rank 1 is already in flight"]
    receiver.receive(1, 0, WHOLE, (0, 7, 2, 4), 7, outcomes.append)
    assert [outcome.error for outcome in outcomes[1:]] == [None, None]


def test_the_local_transport_fits_the_seam() -> None:
    transport: KvTransport = pair()[1]
    assert transport.name == "local"
    assert transport.capabilities.survives_peer_loss


@pytest.mark.parametrize("index", range(0, 2 * 3 * 4 + 1 * 2 * 4, 5))
def test_the_first_different_checksum_is_found_across_pieces(index: int) -> None:
    ranges = ranges_of([Piece(0, 0, (4, 5), (2, 4)), Piece(0, 0, (0, 2), (0, 3))])
    own = bytearray(8 * (2 * 3 * 4 + 1 * 2 * 4))
    sent = bytearray(own)
    sent[8 * index] ^= 1
    places = [(layer, head, block) for layer in (0, 1) for head in (0, 1, 2) for block in range(4)]
    places += [(4, head, block) for head in (2, 3) for block in range(4)]
    layer, head, block = places[index]
    assert (
        first_difference(bytes(own), bytes(sent), ranges, 4) == f"layer {layer}, KV head {head}, block {block} differs"
    )
    assert first_difference(bytes(own), bytes(own), ranges, 4) is None


def test_a_plan_between_layouts_moves_every_page_once_through_the_local_transport() -> None:
    source_layout, destination_layout = KvLayout(2, 1, (3,), 4, 8, "float32"), KvLayout(1, 2, (1, 2), 4, 8, "float32")
    hub = LocalHub()
    whole = torch.randn(3, 2, 4, 10, 8)
    sources = [KvPages(source_layout, rank, 6, 4) for rank in range(2)]
    destinations = [KvPages(destination_layout, rank, 6, 4) for rank in range(2)]
    transports = [LocalKvTransport(hub, rank, pages) for rank, pages in enumerate([*sources, *destinations])]
    for pages in sources:
        part = whole[slice(*pages.layers), :, slice(*pages.heads)].contiguous()
        pages.unpack(part, (5, 0, 2), 10, pages.layers, pages.heads)
    outcomes: list[TransferOutcome] = []
    plan = transfer_plan(source_layout, destination_layout)
    for piece in plan:
        transports[piece.source_rank].send(1, 2 + piece.destination_rank, [piece], (5, 0, 2), 10, outcomes.append)
        transports[2 + piece.destination_rank].receive(1, piece.source_rank, [piece], (1, 3, 4), 10, outcomes.append)
    assert [outcome.error for outcome in outcomes] == [None] * (2 * len(plan))
    for pages in destinations:
        part = whole[slice(*pages.layers), :, slice(*pages.heads)]
        assert torch.equal(pages.pack((1, 3, 4), 10, pages.layers, pages.heads), part)


@pytest.mark.mpi
def test_many_transfers_in_both_directions_arrive_whole() -> None:
    ways = ["mpi:verify", "peer_read:verify", "peer_read:plain", "staged:plain"]
    out = warm_world().run("tests.mpi_programs.transfers", [",".join(ways)], 4)
    for way in ways:
        lines = [line for line in out.splitlines() if f", {way}: 160 transfers" in line]
        assert len(lines) == 4, out
        assert all(line.endswith(" 0 checksums") == way.endswith("plain") for line in lines)


@pytest.mark.mpi
def test_a_transfer_that_cannot_be_fails_alone_and_with_words() -> None:
    assert warm_world().run("tests.mpi_programs.failing_transfers", [], 2).count("1: None") == 2


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ways", "layouts"),
    [
        ("mpi", "2 3 16 1 3 4"),  # tp 2 to tp 1
        ("mpi,staged,staged_host,peer_read", "1 3,1 4 2 4 16"),  # uneven stages to tp 2
        ("mpi,peer_read", "1 5 8 1 1,3,1 8"),  # one rank to three uneven stages
        ("mpi", "1 2 4 4 2 4 2"),  # to twice as many ranks as KV heads
    ],
)
def test_kv_sent_while_it_is_computed_arrives_whole_in_any_layout(ways: str, layouts: str) -> None:
    args = [ways, *layouts.split()]
    ranks = sum(int(args[i]) * len(args[i + 1].split(",")) for i in (1, 4))
    out = warm_world().run("tests.mpi_programs.progressive", args, ranks)
    for way in ways.split(","):
        assert out.count(f", {way}: progressive transfers") == ranks, out


@pytest.mark.mpi
def test_a_transfer_given_up_half_way_fails_alone_and_a_busy_sender_delays_nobody() -> None:
    ways = ["mpi", "staged_host", "peer_read"]
    out = warm_world().run("tests.mpi_programs.cut_short", [",".join(ways)], 2)
    for way in ways:
        assert out.count(f", {way}: cut short") == 2, out
