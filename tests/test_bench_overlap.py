"""`disagg bench overlap`: its receiver, what it reads out of a profile, and its rows; on host memory in the interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from disagg.runtime.bench_engine import EngineBench
from disagg.runtime.bench_overlap import (
    OverlapBench,
    Receiver,
    Together,
    covered_share,
    overlap_rows,
)
from disagg.runtime.collectives import SingleRank
from disagg.runtime.kernel_intervals import DeviceWork
from disagg.runtime.kv_pages import KvPages
from disagg.runtime.kv_places import KvCopy, KvPlace, KvPool
from disagg.runtime.model_place import Place
from tests.fused_models import SHAPES

SLOTS, BLOCKS_EACH = 2, 2  # 64 tokens a request


def host_copy(copy: KvCopy, programs: int) -> None:
    """What the kernel does, for whole blocks of host memory: the interpreter runs one kernel at a time."""
    source, target = copy.source, copy.destination
    count = copy.num_tokens // source.tokens_per_block

    def address(place: KvPlace, layer: int, kv: int, number: int) -> int:
        block = ctypes.cast(place.table, ctypes.POINTER(ctypes.c_int32))[number]
        return place.address + layer * place.layer_bytes + kv * place.kv_bytes + block * place.block_bytes

    for layer in range(copy.num_layers):
        for kv in range(2):
            for number in range(count):
                ctypes.memmove(
                    address(target, layer, kv, number),
                    address(source, layer, kv, number),
                    copy.num_heads * source.head_bytes,
                )


@pytest.fixture(scope="module")
def bench() -> tuple[OverlapBench, EngineBench, KvPages]:
    shape = SHAPES["llama"]
    place = Place.of(shape)
    spare = SLOTS * BLOCKS_EACH
    engine = EngineBench(
        shape, place, SingleRank(), "cpu", max_batch=2, max_num_tokens=8, context=64, spare_blocks=spare
    )
    source = KvPages(place.layout, 0, spare, 32, "cpu")
    source.pool.normal_()
    return OverlapBench(engine, KvPool.of(source), 32 * BLOCKS_EACH, 2, 64, host_copy), engine, source


def test_an_engine_decodes_while_every_page_of_the_other_arrives_in_its_spare_blocks(
    bench: tuple[OverlapBench, EngineBench, KvPages],
) -> None:
    overlap, engine, source = bench
    engine.pages.pool[:, :, engine.decode_blocks :] = 0
    found = overlap.together(4, num_steps=4)
    assert found.step_s > 0
    assert found.rate > 0
    arrived = engine.pages.pool[:, :, engine.decode_blocks :]
    assert sorted(arrived.sum(dim=(0, 1, 3, 4, 5)).tolist()) == pytest.approx(
        sorted(source.pool.sum(dim=(0, 1, 3, 4, 5)).tolist())
    )


def test_decode_steps_touch_no_block_that_is_received_into(bench: tuple[OverlapBench, EngineBench, KvPages]) -> None:
    overlap, engine, _ = bench
    engine.pages.pool[:, :, engine.decode_blocks :] = 7.0
    overlap.step(4)
    assert bool((engine.pages.pool[:, :, engine.decode_blocks :] == 7.0).all())


def test_the_rate_counts_the_copies_between_the_first_and_the_last() -> None:
    launched = []
    copies: list[KvCopy] = [object(), object()]  # type: ignore[list-item]
    receiver = Receiver(copies, torch.device("cpu"), launched.append)
    receiver.start()
    num_copies, seconds = receiver.stop()
    assert num_copies == len(launched) >= 3
    assert launched[:3] == [copies[0], copies[1], copies[0]]
    assert seconds > 0


def test_a_copy_that_fails_is_told_to_whoever_measures() -> None:
    def refuse(copy: KvCopy) -> None:
        raise ValueError("rows of 3 bytes")

    receiver = Receiver([object()], torch.device("cpu"), refuse)  # type: ignore[list-item]
    receiver.start()
    with pytest.raises(ValueError, match="3 bytes"):
        receiver.stop()


def kernel(start: float, end: float, name: str = "gemm") -> DeviceWork:
    return DeviceWork(start, end, name)


def test_receive_time_is_covered_where_decode_kernels_run_and_counts_only_between_the_first_and_the_last_of_them() -> (
    None
):
    work = [
        kernel(0, 5, "_copy_rows"),  # before any decode kernel
        kernel(10, 20),
        kernel(15, 25, "_copy_rows"),  # of 10 µs the gap 20 to 22 is not covered
        kernel(22, 40, "_split"),
        kernel(30, 34, "_copy_rows"),
        kernel(36, 50, "_copy_rows"),  # ends after the last decode kernel
        DeviceWork(20, 22, "Memcpy DtoH (Device -> Pinned)"),
    ]
    assert covered_share(work) == (pytest.approx(12 / 14), pytest.approx(0.8))
    by_engines = [*work, DeviceWork(20, 26, "Memcpy PtoP (Device -> Device)")]  # of 6 µs 4 are covered
    assert covered_share(by_engines) == (pytest.approx(16 / 20), pytest.approx(4 / 6))
    assert covered_share(work[:1]) is None
    assert covered_share([kernel(0, 10)]) is None


@pytest.mark.parametrize(("slow", "met"), [(0.0080, True), (0.0081, False)])
def test_the_slow_down_of_the_first_number_of_programs_is_judged(slow: float, met: bool) -> None:
    together = [Together(528, slow, 300e9, 365e9), Together(66, 0.0070, 250e9, 360e9)]
    rows = {row.name: row for row in overlap_rows((0.0069, 0.0071), together, (0.83, 0.4), 390e9, "batch 64", "there")}
    judged = rows["decode step, batch 64, receiving, 528 programs"]
    assert (judged.ceiling, judged.ratio, judged.goal) == (pytest.approx(7.0), pytest.approx(slow / 0.007), 1.15)
    assert judged.met is met
    assert rows["decode step, batch 64, receiving, 66 programs"].met is None
    assert rows["received while decoding, 66 programs"].ratio == pytest.approx(250 / 360)
    assert rows["received alone, 528 programs"].ceiling == pytest.approx(390)
    share = rows["time of receiving with a decode kernel running, 528 programs"]
    assert (share.measured, share.met) == (0.83, True)


def test_without_a_device_there_is_neither_a_plain_copy_nor_a_profile(
    bench: tuple[OverlapBench, EngineBench, KvPages],
) -> None:
    overlap, *_ = bench
    assert overlap.plain_rate() is None
    assert overlap.overlap_share(4, 2) is None


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda run: run("no-such-model"), "no-such-model"),
        (lambda run: run("tiny-llama", "cpu"), "measures a GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Callable[..., object], told: str) -> None:
    from disagg.runtime.bench_overlap import run_overlap_bench

    with pytest.raises(Exception, match=told):
        call(run_overlap_bench)
