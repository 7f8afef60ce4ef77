"""A rank of `bench_transfer`: rank 0 sends to rank 1 (and back, where both ways are measured), rank 1 holds the watch."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from ..core.kv_layout import KvLayout, Piece, transfer_plan
from .bench_transfer import JOB, RESULT, Measured, TransferJob, TransferResult
from .bench_transfer_marks import EndPair, steps_of
from .kv_pages import KvPages
from .kv_places import KvCopy, KvPool
from .kv_runs import runs_of
from .mpi_world import MpiWorld
from .progress import Progress
from .transport import TransferOutcome, make_transport

_LAYERS: Final = 32
_HEADS: Final = 8
_HEAD_DIM: Final = 128
_IN_FLIGHT: Final = 8
_REQUEST: Final = 1024  # tokens of the request that is measured in every way
_WAIT_S: Final = 60.0
_SETTLE_S: Final = 0.005
_MARKS_BYTES: Final = 1 << 16
_HEAD_START_CYCLES: Final = 2_000_000  # about 1 ms


class _Bench:
    def __init__(self, job: TransferJob, world: MpiWorld) -> None:
        from mpi4py import MPI

        self.job = job
        self.world = world
        self.comm = MPI.COMM_WORLD
        self.peer = 1 - world.rank
        index = world.rank % max(1, job.num_devices)
        self.device = torch.device("cpu" if job.device == "cpu" else f"cuda:{index}")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        layouts = [KvLayout(1, 1, (_LAYERS,), _HEADS, _HEAD_DIM, "bfloat16")] * 2
        sizes = [16, 16]
        if job.variant == "relayout":  # the first of two tensor-parallel ranks to one rank with other blocks
            layouts[0], sizes[1] = KvLayout(2, 1, (_LAYERS,), _HEADS, _HEAD_DIM, "bfloat16"), 64
        self.sizes = sizes
        most = max(*job.sizes, job.layerwise_tokens, _IN_FLIGHT * _REQUEST if _REQUEST in job.sizes else 0)
        num_blocks = -(-most // sizes[world.rank])
        self.pages = KvPages(layouts[world.rank], 0, num_blocks, sizes[world.rank], self.device)
        self.pages.pool.normal_()
        self.pieces: list[Piece] = [
            piece for piece in transfer_plan(*layouts) if piece.source_rank == piece.destination_rank == 0
        ]
        generator = torch.Generator().manual_seed(world.rank)
        self.order = torch.randperm(num_blocks, generator=generator).tolist()  # scattered pages
        elements = sum((p.layers[1] - p.layers[0]) * (p.heads[1] - p.heads[0]) for p in self.pieces)
        self.token_bytes = elements * 2 * _HEAD_DIM * 2
        self.progress = Progress(world, lambda rank, data: None, lambda rank: None)
        self.transport = make_transport(job.backend, self.progress, self.pages)
        self.progress.start()
        self.next_id = 0
        self.peer_pool: tuple[int, KvPool] | None = None

    def blocks(self, num_tokens: int, slot: int = 0) -> list[int]:
        count = -(-num_tokens // self.sizes[self.world.rank])
        return list(self.order[slot * count : (slot + 1) * count])

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.comm.Barrier()

    # ---- transfers ---------------------------------------------------------------------------------------------------

    def _carry(
        self,
        transfers: list[tuple[int, bool, int, int]],
        during: Callable[[], None] | None = None,
        *,
        asked_first: bool = False,
    ) -> tuple[float, list[TransferOutcome]]:
        """(id, whether rank 0 sends, tokens, slot) all at once; (seconds, outcomes) from the receivers' start.

        The sends are called first, and known to the other rank by then; with `asked_first` the receives.
        """
        outcomes: list[TransferOutcome] = []
        done = threading.Event()
        ended = 0.0

        def on_done(outcome: TransferOutcome) -> None:
            nonlocal ended
            ended = time.perf_counter()
            outcomes.append(outcome)
            if len(outcomes) == len(transfers):
                done.set()

        def begin(is_send: bool) -> None:
            for ident, from_0, tokens, slot in transfers:
                if from_0 == (self.world.rank == 0) and is_send:
                    written = during is None
                    self.transport.send(
                        ident, self.peer, self.pieces, self.blocks(tokens, slot), tokens, on_done, is_written=written
                    )
                elif from_0 != (self.world.rank == 0) and not is_send:
                    self.transport.receive(ident, self.peer, self.pieces, self.blocks(tokens, slot), tokens, on_done)

        self.sync()
        begin(not asked_first)
        self.sync()
        time.sleep(_SETTLE_S)  # for what is said at once to have been heard
        start = time.perf_counter()
        begin(asked_first)
        if during is not None:
            during()
        if not done.wait(_WAIT_S):
            raise RuntimeError(f"{len(outcomes)} of {len(transfers)} transfers ended within {_WAIT_S:g} s")
        seconds = ended - start
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        if errors:
            raise RuntimeError(errors[0])
        return seconds, outcomes

    def _median(self, run: Callable[[], float]) -> float:
        """Of the watch of rank 1, known to both."""
        run()
        found = statistics.median(run() for _ in range(self.job.repeats))
        return self._from_1(found)

    def _from_1(self, value: float) -> float:
        import numpy as np

        box = np.array([value], dtype=np.float64)
        self.comm.Bcast(box, root=1)
        return float(box[0])

    def transfer(self, num_tokens: int, *, asked_first: bool = False) -> list[EndPair]:
        """What became of single transfers; known to both ranks. Of the first, which is not timed, every byte is checked."""
        found = []
        if self.world.rank == 1:
            self.pages.pool[:, :, self.blocks(num_tokens)] = 0
        for index in range(1 + self.job.repeats):
            self.next_id += 1
            outcomes = self._carry([(self.next_id, True, num_tokens, 0)], asked_first=asked_first)[1]
            found.append(self._pair_of(outcomes[0]))
            if index == 0:
                self._check_bytes(num_tokens)
        return found[1:]

    def _check_bytes(self, num_tokens: int) -> None:
        """Raises RuntimeError, at rank 1, where its pages do not hold what those of rank 0 do."""
        for piece in self.pieces:
            own = self.pages.checksums(self.blocks(num_tokens), num_tokens, piece.layers, piece.heads, 64)
            theirs = own.numpy().copy()
            self.comm.Bcast(theirs, root=0)
            if self.world.rank == 1 and (own.numpy() != theirs).any():
                raise RuntimeError(f"a transfer of {num_tokens} tokens left other bytes than were sent")

    def _pair_of(self, outcome: TransferOutcome) -> EndPair:
        """Both ends' marks of a transfer from rank 0 to rank 1."""
        import numpy as np

        found = []
        for root in (0, 1):
            box = np.zeros(_MARKS_BYTES, dtype=np.uint8)
            if self.world.rank == root:
                data = msgspec.json.encode(outcome.marks)
                box[: len(data)] = np.frombuffer(data, dtype=np.uint8)
            self.comm.Bcast(box, root=root)
            found.append(msgspec.json.decode(box.tobytes().rstrip(b"\0"), type=tuple[tuple[str, int], ...]))
        return EndPair(*found)

    def both_ways(self, num_tokens: int) -> float:
        def run() -> float:
            self.next_id += 2
            pair = [(self.next_id - 1, True, num_tokens, 0), (self.next_id, False, num_tokens, 1)]
            return float(self._carry(pair)[0])

        return self._median(run)

    def many(self, num_tokens: int) -> float:
        def run() -> float:
            first = self.next_id + 1
            self.next_id += _IN_FLIGHT
            return float(self._carry([(first + i, True, num_tokens, i) for i in range(_IN_FLIGHT)])[0])

        return self._median(run)

    def layerwise(self, num_tokens: int) -> tuple[float, int, float]:
        """(seconds, bytes, seconds of data) left when the last layer was written, as the sender saw them; medians."""
        seconds, left, data = [], [], []
        for _ in range(max(3, self.job.repeats)):
            self.next_id += 1
            ident = self.next_id

            def prefill(ident: int = ident) -> None:
                if self.world.rank == 0:
                    next_at = time.perf_counter()
                    for layer in range(_LAYERS):
                        next_at += self.job.layer_interval_s
                        time.sleep(max(0.0, next_at - time.perf_counter()))
                        self.transport.advance(ident, (layer, layer + 1), num_tokens)

            _, outcomes = self._carry([(ident, True, num_tokens, 0)], prefill)
            seconds.append(outcomes[0].time_after_written / 1e12)
            left.append(outcomes[0].bytes_after_written)
            data.append(self._pair_of(outcomes[0]).last_data_seconds)
        import numpy as np

        box = np.array([statistics.median(each) for each in (seconds, left, data)], dtype=np.float64)
        self.comm.Bcast(box, root=0)
        return float(box[0]), int(box[1]), float(box[2])

    # ---- floors ------------------------------------------------------------------------------------------------------

    @property
    def plain_text(self) -> str:
        if self.device.type == "cpu":
            return "one plain MPI message"
        return "a plain copy from the other GPU" if self.job.num_devices > 1 else "a plain copy within the one GPU"

    def plain(self, num_bytes: int) -> float:
        if self.device.type == "cuda":
            return self._median(lambda: self._device_copy(num_bytes))
        import numpy as np

        buffer = np.ones(num_bytes, dtype=np.uint8)

        def run() -> float:
            self.comm.Barrier()
            start = time.perf_counter()
            if self.world.rank == 0:
                self.comm.Send(buffer, 1)
            else:
                self.comm.Recv(buffer, 0)
            return time.perf_counter() - start

        return self._median(run)

    def copy_alone(self, num_tokens: int, how: str) -> float:
        """Device time of what a receiver that reads for itself launches, without messages: a kernel, or a batch."""
        import numpy as np

        from .cuda_ipc import Driver
        from .kv_kernels import read_rows

        table = torch.tensor(self.blocks(num_tokens), dtype=torch.int32, device=self.device)
        sources = np.array(self.blocks(num_tokens), dtype=np.int32) if self.world.rank == 0 else None
        count = -(-num_tokens // self.sizes[0])
        sources = sources if sources is not None else np.empty(count, dtype=np.int32)
        self.comm.Bcast(sources, root=0)
        pool, own_blocks = self._opened(), self.blocks(num_tokens)
        driver, stream = Driver(), torch.cuda.Stream(device=self.device)
        source_table = torch.from_numpy(sources).to(self.device)

        def run() -> float:
            if self.world.rank == 0:
                return 0.0
            own = KvPool.of(self.pages)
            copies = [
                KvCopy(
                    pool.place(piece.layers, piece.heads, 0, source_table.data_ptr()),
                    own.place(piece.layers, piece.heads, 0, table.data_ptr()),
                    piece.layers[1] - piece.layers[0],
                    piece.heads[1] - piece.heads[0],
                    num_tokens,
                    own.row_bytes,
                )
                for piece in self.pieces
            ]

            runs = [list(runs_of(copy, sources.tolist(), own_blocks)) for copy in copies] if how == "batch" else []

            def launch() -> None:
                for each in runs:
                    driver.copy_runs(each, int(stream.cuda_stream))
                for copy in copies if how == "kernel" else ():
                    read_rows(copy)

            with torch.cuda.stream(stream):
                return self._on_device(launch)

        return self._median(run)

    def _device_copy(self, num_bytes: int) -> float:
        if self.world.rank == 0:
            self._opened()
            return 0.0
        import ctypes

        from .cuda_ipc import Driver

        driver, pool = Driver(), self._opened()
        stream = torch.cuda.current_stream(self.device).cuda_stream
        own = int(self.pages.pool.data_ptr())
        args = [ctypes.c_uint64(own), ctypes.c_uint64(pool.address), ctypes.c_size_t(num_bytes)]
        return self._on_device(lambda: driver.call("cuMemcpyAsync", *args, ctypes.c_void_p(stream)))

    def plain_seen_by_host(self, num_bytes: int) -> float:
        """The same copy timed as a transfer is: from the host's call, after a rest, to its end seen by the host."""
        import ctypes

        from .cuda_ipc import Driver

        driver, stream = Driver(), torch.cuda.Stream(device=self.device)
        pool, own = self._opened(), int(self.pages.pool.data_ptr())
        args = [ctypes.c_uint64(own), ctypes.c_uint64(pool.address), ctypes.c_size_t(num_bytes)]

        def run() -> float:
            self.sync()
            time.sleep(_SETTLE_S)
            if self.world.rank == 0:
                return 0.0
            start = time.perf_counter()
            driver.call("cuMemcpyAsync", *args, ctypes.c_void_p(int(stream.cuda_stream)))
            event: Any = torch.cuda.Event()
            event.record(stream)
            while not event.query():
                pass
            return time.perf_counter() - start

        return self._median(run)

    def _on_device(self, work: Callable[[], Any]) -> float:
        start: Any = torch.cuda.Event(enable_timing=True)
        end: Any = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(_HEAD_START_CYCLES)  # the device's time is wanted, not that of launching
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _opened(self) -> KvPool:
        """Rank 0's pool as rank 1 sees it (in rank 0, its own)."""
        if self.peer_pool is None:
            import numpy as np

            from .transport_cuda_ipc import CudaMemory

            memory = CudaMemory(self.device)
            box = np.zeros(96, dtype=np.uint8)
            if self.world.rank == 0:
                handle, _, offset, _ = memory.export(self.pages)
                numbers = np.array([offset, self.pages.num_blocks, *self.pages.heads], dtype=np.int64)
                box[:64] = np.frombuffer(handle, dtype=np.uint8)
                box[64:96] = numbers.view(np.uint8)
            self.comm.Bcast(box, root=0)
            if self.world.rank == 0:
                self.peer_pool = (0, KvPool.of(self.pages))
            else:
                offset, num_blocks, first, last = (int(n) for n in box[64:96].view(np.int64))
                base = memory.open(box[:64].tobytes(), bytes(16))
                row_bytes = _HEAD_DIM * 2
                pool = KvPool(base + offset, (0, _LAYERS), (first, last), num_blocks, self.sizes[0], row_bytes)
                self.peer_pool = (base, pool)
        return self.peer_pool[1]

    # ---- the whole ---------------------------------------------------------------------------------------------------

    def run(self) -> TransferResult:
        found: list[Measured] = []
        for tokens in self.job.sizes:
            size = tokens * self.token_bytes
            plain = self.plain(size)
            if self.device.type == "cuda" and tokens == _REQUEST:
                found.append(Measured("plain", tokens, size, self.plain_seen_by_host(size), plain))
            if self.job.backend == "cuda_ipc":
                found.append(Measured("copy", tokens, size, self.copy_alone(tokens, "kernel"), plain))
                if tokens == _REQUEST:
                    found.append(Measured("batch", tokens, size, self.copy_alone(tokens, "batch"), plain))
            named = tokens == _REQUEST and self.job.variant == "same"
            pairs = self.transfer(tokens)
            found.append(_whole("transfer", tokens, size, plain, pairs, with_steps=tokens == _REQUEST))
            if named:
                pairs = self.transfer(tokens, asked_first=True)
                found.append(_whole("asked first", tokens, size, plain, pairs, with_steps=True))
                found.append(Measured("both ways", tokens, size, self.both_ways(tokens), plain))
                many = self.many(tokens)
                found.append(Measured("many", tokens, _IN_FLIGHT * size, many, self.plain(_IN_FLIGHT * size)))
        if self.job.layerwise_tokens:
            tokens = self.job.layerwise_tokens
            size = tokens * self.token_bytes
            blocking = statistics.median(pair.whole_seconds for pair in self.transfer(tokens))
            seconds, left, data = self.layerwise(tokens)
            plain = self.plain(size)
            found.append(Measured("layer-wise", tokens, size, seconds, plain, left, blocking, data))
        return TransferResult(self.job, self.transport.description, self.plain_text, tuple(found))


def _whole(
    name: str, num_tokens: int, num_bytes: int, plain: float, pairs: list[EndPair], *, with_steps: bool
) -> Measured:
    """Medians of single transfers, from when both ends had been called to the outcome at the reader."""
    seconds = statistics.median(pair.whole_seconds for pair in pairs)
    data = statistics.median(pair.data_seconds for pair in pairs)
    steps = steps_of(pairs) if with_steps else ()
    return Measured(name, num_tokens, num_bytes, seconds, plain, data_seconds=data, steps=steps)


def main() -> None:
    folder = Path(sys.argv[1])
    job = msgspec.json.decode((folder / JOB).read_bytes(), type=TransferJob)
    world = MpiWorld()
    bench = _Bench(job, world)
    result = bench.run()
    bench.sync()
    bench.transport.close()
    bench.progress.stop()
    if world.rank == 0:
        partial = folder / f".{RESULT}"
        partial.write_bytes(msgspec.json.encode(result))
        partial.replace(folder / RESULT)
    world.finalize()


if __name__ == "__main__":
    main()
