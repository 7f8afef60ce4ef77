"""Sums through the other ranks' memory: ranks that are processes with shared host memory, kernels in the interpreter."""

from __future__ import annotations

import mmap
import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from disagg.runtime import peer_start
from disagg.runtime.model_fused import FusedModel
from disagg.runtime.model_kernels import add_rms_norm, rms_norm
from disagg.runtime.model_place import Place
from disagg.runtime.peer_reduce import (
    ATTENDED,
    EMBEDDED,
    GATED,
    PeerLayout,
    PeerReduce,
    PeerReduceError,
    most_rows,
)
from disagg.runtime.weights import random_weights
from tests.fused_models import SHAPES, fused_engine
from tests.tiny_models import MIN_MARGIN, Script, make_engine, prompts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels here read host memory: the interpreter")
HIDDEN, ROWS = 48, 6


def ends(layout: PeerLayout) -> list[PeerReduce]:
    """All ranks of an executor over memory that processes forked from this one share."""
    memories = [
        torch.from_numpy(np.frombuffer(mmap.mmap(-1, layout.nbytes + 64), dtype=np.uint8)) for _ in range(layout.tp)
    ]
    addresses = [memory.data_ptr() for memory in memories]
    return [PeerReduce(layout, memory, addresses, rank) for rank, memory in enumerate(memories)]


def on_each(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns in a process of its own for each rank, all at the same time."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run(rank: int) -> None:
        try:
            results.put((rank, work(rank), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))

    processes = [context.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    found: list[tuple[int, Any, str | None]] = []
    while len(found) < count and not any(error for _, _, error in found):
        found.append(results.get())
    for process in processes:
        if len(found) < count:
            process.kill()  # it waits for one that failed
        process.join()
    errors = [error for _, _, error in found if error is not None]
    assert not errors, errors[0]
    return [value for _, value, _ in sorted(found)]


def counters(end: PeerReduce, offset: int) -> torch.Tensor:
    """[rows, ranks] of this rank, as its kernels see them."""
    layout = end.layout
    return end._memory[offset : offset + layout.max_rows * layout.tp * 4].view(torch.int32).view(-1, layout.tp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [2, 4])
def test_the_sum_is_added_and_normed_as_by_a_sum_and_a_norm(tp: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tp)
    layout = PeerLayout(tp, HIDDEN, dtype, ROWS)
    ranks = ends(layout)
    weight = torch.randn(HIDDEN, generator=generator).to(dtype)
    # quarters, whose sums need no rounding: the interpreter and torch round to bfloat16 differently
    before = torch.randint(-9, 9, (ROWS, HIDDEN), generator=generator).to(dtype) / 4
    parts = torch.randint(-9, 9, (tp, ROWS, HIDDEN), generator=generator).to(dtype) / 4
    for round_, (which, rows, add) in enumerate([(EMBEDDED, 6, False), (ATTENDED, 3, True), (GATED, 1, True)]):
        for rank, end in enumerate(ranks):
            end.slot(which, rows).copy_(parts[rank, :rows])
            for peer in range(tp):
                if peer != rank:
                    counters(end, layout.sum_flags)[:rows, peer] = round_ + 1  # they have come already
        total = torch.zeros(rows, HIDDEN)
        for part in parts:
            total += part[:rows].float()
        results = []
        for end in ranks:
            residual, out = before[:rows].clone(), torch.empty(rows, HIDDEN, dtype=dtype)
            (end.add_rms_norm if add else end.rms_norm)(which, residual, weight, 1e-5, out)
            end.check()
            results.append((residual, out))
            assert counters(end, layout.sum_flags)[:rows].tolist() == [[round_ + 1] * tp] * rows
        expected, normed = before[:rows].clone(), torch.empty(rows, HIDDEN, dtype=dtype)
        if add:
            add_rms_norm(total.to(dtype), expected, weight, 1e-5, normed)
        else:
            expected = total.to(dtype)
            rms_norm(expected, weight, 1e-5, normed)
        for residual, out in results:
            assert torch.equal(residual, expected)
            assert torch.equal(out, normed)


def test_ranks_that_run_at_the_same_time_wait_for_each_other_and_overwrite_nothing_too_early() -> None:
    tp, rounds = 3, 12
    layout = PeerLayout(tp, HIDDEN, torch.float32, ROWS)
    ranks = ends(layout)
    weight = torch.ones(HIDDEN)

    def work(rank: int) -> int:
        end, wrong = ranks[rank], 0
        for round_ in range(rounds):
            rows = 1 + round_ * 5 % 4
            which = (EMBEDDED, ATTENDED, GATED)[round_ % 3]
            end.slot(which, rows).fill_(float(round_ * 10 + rank))
            residual, out = torch.empty(2, rows, HIDDEN).unbind(0)
            end.rms_norm(which, residual, weight, 1.0, out)
            wrong += not bool((residual == round_ * 10 * tp + 3).all())
        end.check()
        return wrong

    assert on_each(tp, work) == [0, 0, 0]


def test_counts_go_on_past_the_largest_number() -> None:
    layout = PeerLayout(2, HIDDEN, torch.float32, ROWS)
    ranks = ends(layout)
    for rank, end in enumerate(ranks):
        counters(end, layout.sum_flags)[:] = 2**31 - 1
        counters(end, layout.sum_flags)[:, 1 - rank] = -(2**31)
        end.slot(ATTENDED, 1).fill_(1.0)
    residual, out = torch.zeros(2, 1, HIDDEN).unbind(0)
    ranks[0].add_rms_norm(ATTENDED, residual, torch.ones(HIDDEN), 0.0, out)
    ranks[0].check()
    assert residual.unique().tolist() == [2.0]
    assert counters(ranks[0], layout.sum_flags)[0].tolist() == [-(2**31)] * 2


def test_a_peer_that_does_not_come_is_given_up_and_told_of() -> None:
    ranks = ends(PeerLayout(2, HIDDEN, torch.float32, ROWS))
    residual, out = torch.zeros(2, 1, HIDDEN).unbind(0)
    with ranks[0].limited(3):
        ranks[0].add_rms_norm(ATTENDED, residual, torch.ones(HIDDEN), 1.0, out)
    with pytest.raises(PeerReduceError, match="did not come to a sum"):
        ranks[0].check()
    ranks[0].add_rms_norm(GATED, residual, torch.ones(HIDDEN), 1.0, out)  # without a limit of its own: stopped
    ranks[1].stop()
    ranks[1].argmax(torch.zeros(1, 8), (0, 8))
    with pytest.raises(PeerReduceError):
        ranks[1].check()


def test_the_greatest_logit_of_all_ranks_is_found_and_of_equals_the_first() -> None:
    tp, vocab = 2, 70
    layout = PeerLayout(tp, HIDDEN, torch.float32, ROWS)
    ranks = ends(layout)
    logits = torch.randn(3, tp * vocab, generator=torch.Generator().manual_seed(2))
    logits[0, 100] = 9.0
    logits[1, [69, 70]] = 9.0  # on either side of the ranks' border
    logits[2] = -float("inf")
    logits[2, [3, 139]] = -50.0

    def work(rank: int) -> list[list[int]]:
        own = torch.nn.functional.pad(logits[:, rank * vocab : (rank + 1) * vocab], (0, 2), value=99.0)  # padding
        said = []
        for rows in (3, 1, 3):
            said.append(ranks[rank].argmax(own[:rows], (rank * vocab, (rank + 1) * vocab)).tolist())
        ranks[rank].check()
        return said

    assert on_each(tp, work) == [[[100, 69, 3], [100], [100, 69, 3]]] * tp


class OnlyPeers:
    """Collectives of which nothing may be used but the peers."""

    description = "peers"

    def __init__(self, peers: PeerReduce) -> None:
        self.peers = peers


def test_a_fused_engine_of_two_ranks_yields_the_tokens_of_one() -> None:
    shape = SHAPES["qwen2"]
    texts = prompts(shape, [9, 6], seed=8)
    plain = make_engine(shape, random_weights(Place.of(shape), 3), record_margins=True)

    def tokens(engine: Any) -> dict[int, list[int]]:
        script = Script([engine])
        for request, text in enumerate(texts):
            script.prefill(request, text, 5, len(text) + 20)
            script.run(joined=[request], num_steps=1)
        script.run(num_steps=1)
        return script.tokens

    expected = tokens(plain)
    assert min(margin for _, margin in plain.margins) > MIN_MARGIN
    ranks = ends(PeerLayout(2, shape.hidden_size, torch.float32, 72))

    def work(rank: int) -> dict[int, list[int]]:
        place, collectives = Place.of(shape, 2, 1, rank), OnlyPeers(ranks[rank])
        return tokens(fused_engine(shape, place=place, collectives=collectives))  # type: ignore[arg-type]

    assert on_each(2, work) == [expected, expected]


def test_many_rows_are_left_to_the_collectives() -> None:
    peers = SimpleNamespace(max_rows=4)
    model: Any = SimpleNamespace(_collectives=SimpleNamespace(peers=peers))
    assert FusedModel._peers_for(model, 4) is peers
    assert FusedModel._peers_for(model, 5) is None
    assert [most_rows(tp, 4096, torch.bfloat16) for tp in (2, 4, 8)] == [512, 170, 73]


def test_the_doctor_tells_how_ranks_on_these_gpus_would_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(peer_start.SWITCH, raising=False)
    apart = {(1, 2): "cuda:1 and cuda:2 are not joined by NVLink"}
    monkeypatch.setattr(peer_start, "pair_problem", lambda own, peer: apart.get((own, peer)))
    assert peer_start.host_sums([0, 1]) == "few rows through peer memory, more by NCCL"
    assert peer_start.host_sums([0, 1, 2]) == "NCCL: cuda:1 and cuda:2 are not joined by NVLink"
    monkeypatch.setenv(peer_start.SWITCH, "0")
    assert peer_start.host_sums([0, 1]) == "NCCL: DISAGG_PEER_REDUCE is 0"


class FakeComm:
    """A communicator of as many ranks, of which the others say `theirs`."""

    def __init__(self, theirs: list[bytes]) -> None:
        self.theirs = theirs

    def Get_size(self) -> int:
        return 1 + len(self.theirs)

    def Allgather(self, own: list[Any], everyone: list[Any]) -> None:
        size = len(own[0])
        everyone[0][:] = b"".join(part.ljust(size, b"\0") for part in [own[0], *self.theirs])


@pytest.mark.mpi
def test_what_one_rank_cannot_none_does_and_all_hear_why(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["llama"]
    device = torch.device("cpu")

    def said(comm: FakeComm, place: Place) -> str:
        made, words = peer_start.peer_reduce(comm, place, device)  # type: ignore[arg-type]
        assert made is None
        return words

    two = Place.of(shape, 2)
    monkeypatch.setenv(peer_start.SWITCH, "0")
    assert said(FakeComm([b""]), two) == "NCCL: DISAGG_PEER_REDUCE is 0"
    monkeypatch.delenv(peer_start.SWITCH)
    assert said(FakeComm([b"the other has no NVLink"]), two) == "NCCL: the other has no NVLink"
    assert said(FakeComm([b""]), Place.of(shape, 1, 2)) == "NCCL: the executor has pipeline stages"
    monkeypatch.setattr(peer_start, "device_uuid", lambda index: bytes(16))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(peer_start, "_problem_alone", lambda comm, place: None)
    comm = FakeComm([])
    comm.theirs = [b""]
    spoken = iter([b"", b"elsewhere", b"0123456789abcdef", b""])
    comm.Allgather = lambda own, everyone: FakeComm.Allgather(  # type: ignore[method-assign]
        SimpleNamespace(theirs=[next(spoken)]),
        own,
        everyone,  # type: ignore[arg-type]
    )
    assert said(comm, two) == "NCCL: the executor's ranks are on several hosts"


def test_a_rank_whose_kernel_cannot_be_compiled_says_so_where_the_others_wait_for_it() -> None:
    class CompilerError(Exception):  # as Triton's, no RuntimeError
        pass

    def add_rms_norm(*args: Any) -> None:
        raise CompilerError("ptxas is not to be found\nand more")

    layout = PeerLayout(2, HIDDEN, torch.float32, ROWS)
    made: Any = SimpleNamespace(
        layout=layout,
        limited=lambda looks: nullcontext(),
        slot=lambda which, rows: torch.zeros(rows, HIDDEN),
        add_rms_norm=add_rms_norm,
    )
    comm: Any = FakeComm([b""])
    comm.Get_rank = lambda: 0
    told: list[bytes] = []
    comm.Allgather = lambda own, everyone: (told.append(own[0]), FakeComm.Allgather(comm, own, everyone))
    words = "a trial through peers' memory failed: ptxas is not to be found"
    assert peer_start._tried(comm, made, torch.device("cpu")) == words
    assert [each.rstrip(b"\0").decode() for each in told] == [words]
    comm.theirs = [b"the other has no compiler"]  # whose words come where this rank has come through
    made.add_rms_norm = lambda *args: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        assert peer_start._tried(comm, made, torch.device("cpu")) == "the other has no compiler"
