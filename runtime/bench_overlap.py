"""How much decode steps slow down while KV arrives at full rate, and how much of its arrival they cover.

An engine decodes on one GPU while a stream beside its own reads another process's pages on a second GPU (or, where there
is but one, on that), over and over: by copy engines, as the transport does where runs are long, and with its kernel, whose
programs take multiprocessors away from the steps. How many it may have is what is tried.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

from ..core.model_shapes import PRESETS, ModelError
from .bench_engine import CONTEXT, EngineBench
from .bench_rows import BenchRow
from .bench_timing import device_seconds
from .collectives import SingleRank
from .kernel_intervals import KV_COPY, DeviceWork, common, device_work, length, merged
from .kv_kernels import MANY_PROGRAMS, copy_rows
from .kv_places import KvCopy, KvPool
from .kv_runs import runs_of
from .model_place import Place

BATCH: Final = 64
ENGINES: Final = 0  # as a number of programs: copy engines do it
GRIDS: Final = (ENGINES, 24, 66, MANY_PROGRAMS)
SLOWDOWN_GOAL: Final = 1.15
OVERLAP_GOAL: Final = 0.80
_TOKENS: Final = 1024  # of a request that is received
_SLOTS: Final = 8  # requests that are received by turns, each in blocks of its own
_AHEAD: Final = 2  # copies launched and not yet done
_PEER_COPIES: Final = ("Memcpy PtoP", "Memcpy DtoD")  # as the profiler calls copies from memory that is mapped here
_ALONE_S: Final = 0.15
_SWITCH_S: Final = 1e-4  # as in an executor


def run_overlap_bench(
    model: str, device: str = "cuda", programs: Sequence[int] = GRIDS, quick: bool = False
) -> list[BenchRow]:
    """Rows for each number of programs in `programs`; goals are those of the first.

    Raises ModelError for an unknown model, DeviceError without a GPU.
    """
    from .devices import check_device
    from .executor_spec import DeviceError

    if model not in PRESETS:
        raise ModelError(f"model {model!r} is unknown; allowed: {', '.join(PRESETS)}")
    if device != "cuda":
        raise DeviceError(
            f"bench overlap measures a GPU; device: {device} has no copies beside its kernels; allowed: cuda"
        )
    check_device("cuda:0")
    sys.setswitchinterval(_SWITCH_S)
    two = torch.cuda.device_count() > 1
    shape = PRESETS[model]
    reader = "cuda:1" if two else "cuda:0"
    block = _TOKENS // 32
    with exported_pages(model, "cuda:0", _SLOTS * block, 32) as handle:
        engine = EngineBench(
            shape,
            Place.of(shape),
            SingleRank(),
            reader,
            max_batch=BATCH,
            max_num_tokens=1024,
            spare_blocks=_SLOTS * block,
        )
        with opened(handle, engine) as source:
            bench = OverlapBench(engine, source, _TOKENS, BATCH, CONTEXT)
            return bench.rows(
                programs, 24 if quick else 64, "the other GPU" if two else "the same GPU: there is but one"
            )


@contextmanager
def exported_pages(model: str, device: str, num_blocks: int, tokens_per_block: int) -> Iterator[tuple[bytes, int, int]]:
    """(handle, offset, blocks) of pages that another process holds, as long as the context is open."""
    args = [model, device, str(num_blocks), str(tokens_per_block)]
    command = [sys.executable, "-m", f"{__package__}.bench_overlap_source", *args]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a process without pipes")
    try:
        words = process.stdout.readline().split()
        if len(words) != 2:
            raise RuntimeError(f"the process that exports its pages told nothing; its exit code was {process.wait()}")
        yield bytes.fromhex(words[0]), int(words[1]), num_blocks
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@contextmanager
def opened(handle: tuple[bytes, int, int], engine: EngineBench) -> Iterator[KvPool]:
    """Those pages as this process reads them."""
    from .cuda_ipc import Driver, use_device

    use_device(engine.device.index or 0)
    driver, own = Driver(), KvPool.of(engine.pages)
    base = driver.open(handle[0])
    try:
        yield KvPool(base + handle[1], own.layers, own.heads, handle[2], own.tokens_per_block, own.row_bytes)
    finally:
        torch.cuda.synchronize(engine.device)
        driver.close(base)


@dataclass(frozen=True, slots=True)
class Together:
    """A decode step while KV arrives. `rate`, `alone_rate`: bytes a second then, and with the engine idle."""

    programs: int
    step_s: float
    rate: float
    alone_rate: float


def launch_copy(copy: KvCopy, programs: int) -> None:
    """The transport's kernel, with at most so many programs; of many, each is small."""
    if programs < 64:
        copy_rows(copy, max_programs=programs, tile=256, num_warps=32)
    else:
        copy_rows(copy, max_programs=programs, tile=64, num_warps=8)


class OverlapBench:
    """One engine whose spare blocks receive from `source`, a pool of the same model; `tokens` a request.

    `launch` starts a copy on the current stream; another than the kernel's is for tests.
    """

    def __init__(
        self,
        engine: EngineBench,
        source: KvPool,
        tokens: int,
        batch: int,
        context: int,
        launch: Callable[[KvCopy, int], None] = launch_copy,
    ) -> None:
        self._launch = launch
        self._engine = engine
        self._batch = batch
        self._context = context
        self._source = source
        size = engine.pages.tokens_per_block
        count = -(-tokens // size)
        own = KvPool.of(engine.pages)
        self._slots = min(source.num_blocks, engine.pages.num_blocks - engine.decode_blocks) // count
        if self._slots < 1:
            raise ValueError(f"no room for {tokens} tokens beside the engine's own blocks")
        generator = torch.Generator().manual_seed(2)
        orders = [torch.randperm(self._slots * count, generator=generator, dtype=torch.int32) for _ in range(2)]
        self._tables = [orders[0].to(engine.device), (orders[1] + engine.decode_blocks).to(engine.device)]
        layers, heads = own.layers, own.heads
        self.copies = [
            KvCopy(
                source.place(layers, heads, 0, self._tables[0][slot * count :].data_ptr()),
                own.place(layers, heads, 0, self._tables[1][slot * count :].data_ptr()),
                layers[1] - layers[0],
                heads[1] - heads[0],
                tokens,
                own.row_bytes,
            )
            for slot in range(self._slots)
        ]
        self.copy_bytes = 2 * (layers[1] - layers[0]) * (heads[1] - heads[0]) * tokens * own.row_bytes

    def rows(self, programs: Sequence[int], num_steps: int, where: str) -> list[BenchRow]:
        """The table. The step alone is taken before and after the others, so that a drifting clock shows."""
        self.receiving(programs[0], lambda: None)  # the kernel is compiled
        before = self.step(num_steps)
        together = [self.together(each, num_steps) for each in programs]
        after = self.step(num_steps)
        share = self.overlap_share(programs[0], num_steps)
        return overlap_rows(
            (before, after), together, share, self.plain_rate(), f"batch {self._batch}, context {self._context}", where
        )

    def step(self, num_steps: int) -> float:
        return self._engine.decode_step(self._batch, self._context, num_steps)

    def together(self, programs: int, num_steps: int) -> Together:
        alone_rate, _ = self.receiving(programs, lambda: time.sleep(_ALONE_S))
        rate, step_s = self.receiving(programs, lambda: self.step(num_steps))
        return Together(programs, step_s, rate, alone_rate)

    def receiving(self, programs: int, work: Callable[[], Any]) -> tuple[float, Any]:
        """(bytes received a second, what `work` gave), receiving all the while."""
        launch = self._by_engines() if programs == ENGINES else lambda copy: self._launch(copy, programs)
        receiver = Receiver(self.copies, self._engine.device, launch)
        receiver.start()
        try:
            result = work()
        finally:
            num_copies, seconds = receiver.stop()
        return num_copies * self.copy_bytes / seconds, result

    def _by_engines(self) -> Callable[[KvCopy], None]:
        from .cuda_ipc import AT_ONCE, Driver

        driver, device = Driver(), self._engine.device
        count = -(-self.copies[0].num_tokens // self._engine.pages.tokens_per_block)
        tables = [table.view(-1, count).tolist() for table in self._tables]
        runs = {copy: list(runs_of(copy, *blocks)) for copy, *blocks in zip(self.copies, *tables, strict=True)}
        return lambda copy: driver.copy_runs(runs[copy], int(torch.cuda.current_stream(device).cuda_stream), AT_ONCE)

    def plain_rate(self) -> float | None:
        """Bytes a second of a plain copy as large as a request; None without a GPU."""
        if self._engine.device.type != "cuda":
            return None
        from .cuda_ipc import Driver

        driver, stream = Driver(), torch.cuda.current_stream(self._engine.device).cuda_stream
        into = KvPool.of(self._engine.pages).address
        args = [ctypes.c_uint64(into), ctypes.c_uint64(self._source.address), ctypes.c_size_t(self.copy_bytes)]

        def copy() -> None:
            driver.call("cuMemcpyAsync", *args, ctypes.c_void_p(stream))

        return self.copy_bytes / device_seconds(copy, self._engine.device)

    def overlap_share(self, programs: int, num_steps: int) -> tuple[float, float] | None:
        """As `covered_share`, from a profile; None without a GPU."""
        device = self._engine.device
        if device.type != "cuda":
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self.receiving(programs, lambda: self.step(num_steps))
            torch.cuda.synchronize(device)
        return covered_share(device_work(seen))


class Receiver:
    """A thread that launches copies on a stream of its own, by turns, with a few on their way until it is stopped."""

    def __init__(self, copies: Sequence[KvCopy], device: torch.device, launch: Callable[[KvCopy], None]) -> None:
        self._copies = copies
        self._device = device
        self._launch = launch
        self._stop = threading.Event()
        self._started = threading.Event()
        self._marks: list[Any] = []  # events, or seconds without a GPU: one before the first copy, one after each
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="receiver", daemon=True)

    def start(self) -> None:
        """Returns once copies are under way."""
        self._thread.start()
        self._started.wait()

    def stop(self) -> tuple[int, float]:
        """(copies, seconds on the device). Raises what the thread raised."""
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        first, last = self._marks[0], self._marks[-1]
        seconds = last - first if isinstance(first, float) else float(first.elapsed_time(last)) * 1e-3
        return len(self._marks) - 1, seconds

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
                with torch.cuda.stream(torch.cuda.Stream(self._device)):
                    self._receive(_event, lambda event: event.synchronize())
            else:
                self._receive(time.perf_counter, lambda mark: None)
        except BaseException as error:
            self._error = error
        finally:
            self._started.set()

    def _receive(self, mark: Callable[[], Any], wait: Callable[[Any], None]) -> None:
        self._marks.append(mark())
        ahead: deque[Any] = deque()
        for copy in itertools.cycle(self._copies):
            self._launch(copy)
            ahead.append(mark())
            self._marks.append(ahead[-1])
            if len(ahead) > _AHEAD:
                self._started.set()
                wait(ahead.popleft())
                if self._stop.is_set():
                    break
        for left in ahead:
            wait(left)


def _event() -> Any:
    event: Any = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record()
    return event


def covered_share(work: Sequence[DeviceWork]) -> tuple[float, float] | None:
    """Of the time of receives, between the first and the last decode kernel, that in which a decode kernel ran.

    In all, and of the receive of which it is least; None if the two never met.
    """
    kernels = [item for item in work if item.is_kernel]
    decodes = merged((item.start, item.end) for item in kernels if KV_COPY not in item.name)
    if not decodes:
        return None
    first, last = decodes[0][0], decodes[-1][1]
    received = [
        (item.start, item.end)
        for item in work
        if (KV_COPY in item.name or item.name.startswith(_PEER_COPIES))
        and item.start >= first
        and item.end <= last
        and item.end > item.start
    ]
    if not received:
        return None
    shares = [length(common([own], decodes)) / (own[1] - own[0]) for own in received]
    whole = sum(share * (end - start) for share, (start, end) in zip(shares, received, strict=True))
    return whole / sum(end - start for start, end in received), min(shares)


def overlap_rows(
    alone: Sequence[float],
    together: Sequence[Together],
    share: tuple[float, float] | None,
    plain_rate: float | None,
    what: str,
    where: str,
) -> list[BenchRow]:
    """The table of one run; seconds and bytes a second in, milliseconds and GB/s out."""
    step = statistics.mean(alone)
    told = ", ".join(f"{each * 1e3:.3f}" for each in alone)
    rows = [BenchRow(f"decode step, {what}, alone", step * 1e3, unit="ms", note=f"before and after: {told}")]
    if plain_rate is not None:
        rows.append(BenchRow("plain copy of a request", plain_rate / 1e9, unit="GB/s", note=f"from {where}"))
    for number, found in enumerate(together):
        text = _how(found.programs)
        ratio = found.step_s / step
        goal = None if number else SLOWDOWN_GOAL
        note = "" if number else "goal: at most so many steps alone"
        rows += [
            BenchRow(
                f"received alone, {text}",
                found.alone_rate / 1e9,
                None if plain_rate is None else plain_rate / 1e9,
                None if plain_rate is None else found.alone_rate / plain_rate,
                unit="GB/s",
            ),
            BenchRow(
                f"decode step, {what}, receiving, {text}",
                found.step_s * 1e3,
                step * 1e3,
                ratio,
                goal,
                None if goal is None else ratio <= goal,
                "ms",
                note,
            ),
            BenchRow(
                f"received while decoding, {text}",
                found.rate / 1e9,
                found.alone_rate / 1e9,
                found.rate / found.alone_rate,
                unit="GB/s",
                note="",
            ),
        ]
    if share is not None:
        note = f"goal: at least; of the worst {share[1]:.3f}"
        met = share[0] >= OVERLAP_GOAL
        name = f"time of receiving with a decode kernel running, {_how(together[0].programs)}"
        rows.append(BenchRow(name, share[0], None, share[0], OVERLAP_GOAL, met, "", note))
    return rows


def _how(programs: int) -> str:
    return "copy engines" if programs == ENGINES else f"{programs} programs"
