"""Sums through peers' memory on real GPUs, one rank each: are they right, and how long do they take beside NCCL's?

`python tests/gpu_programs/peer_sums.py [check|time|decode|all] [RANKS]` starts its ranks itself (2 unless said). `check`: equal
to NCCL's sum and a norm in graphs replayed many times while ranks run apart, equal on all ranks bit by bit, and a peer that
does not come is given up. `time`: microseconds of a sum with its norm in a CUDA graph. `decode`: a decode step of an
engine with 64 requests, with and without. Prints one line a finding.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

SHAPE = "llama-3.1-8b"
LIMIT_S = 100
REPLAYS, SUMS = 60, 8


def ranks(what: str) -> None:
    import torch

    from disagg.core.model_shapes import PRESETS
    from disagg.runtime.model_place import Place
    from disagg.runtime.mpi_world import MpiWorld
    from disagg.runtime.nccl import NcclCollectives
    from disagg.runtime.peer_start import SWITCH, peer_reduce

    os.environ[SWITCH] = "1"
    world = MpiWorld()
    device = torch.device(f"cuda:{world.rank}")
    torch.cuda.set_device(device)
    group = world.group(range(world.size))
    place = Place.of(PRESETS[SHAPE], world.size, 1, world.rank)
    began = time.perf_counter()
    peers, words = peer_reduce(group, place, device)
    if world.rank == 0:
        print(f"{words}; opened and tried in {time.perf_counter() - began:.2f} s", flush=True)
    if peers is None:
        raise SystemExit(1)
    collectives = NcclCollectives(group, world.size, peers, words)
    bench = Bench(world.rank, world.size, group, device, collectives, peers)
    with torch.inference_mode():
        if what in ("check", "all"):
            bench.check_sums()
            bench.check_argmax()
        if what in ("time", "all"):
            bench.time_sums()
        if what in ("decode", "all"):
            bench.decode(place)
        if what in ("check", "all"):
            bench.check_giving_up()


def _steps(x: Any) -> Any:
    """Each element of bfloat16 as its place among all values of that type, so that neighbours differ by one."""
    import torch

    bits = x.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


class Bench:
    def __init__(self, rank: int, size: int, group: Any, device: Any, collectives: Any, peers: Any) -> None:
        self.rank, self.size, self.group, self.device = rank, size, group, device
        self.collectives, self.peers = collectives, peers
        self.hidden = peers.layout.hidden_size

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def apart(self, rng: random.Random) -> None:
        """This GPU is busy for up to 100 µs, unlike the others."""
        import torch

        torch.cuda._sleep(rng.randrange(1, 200_000))

    def graph_of(self, work: Callable[[], Any]) -> Any:
        import torch

        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        return graph

    def check_sums(self) -> None:
        """Sums bit-equal to NCCL's for two ranks, for more near them; all bits alike on all ranks.

        A norm may be two steps of bfloat16 off: its squares are summed by twice the warps, in another order, and it is
        rounded twice, before and after the weight, each of which may fall to the neighbour.
        """
        import torch

        from disagg.runtime.model_kernels import add_rms_norm
        from disagg.runtime.peer_reduce import ATTENDED, EMBEDDED, GATED

        rng = random.Random(self.rank)
        generator = torch.Generator(self.device).manual_seed(self.rank)
        weight = torch.linspace(0.5, 1.5, self.hidden, device=self.device).to(torch.bfloat16)
        wrong = wrong_norms = rounded = apart = num = 0
        for rows in (1, 3, 64, self.peers.max_rows):
            inputs = torch.zeros(SUMS, rows, self.hidden, dtype=torch.bfloat16, device=self.device)
            residual, out = (torch.zeros_like(inputs[0]) for _ in range(2))

            def sums(inputs: Any = inputs, residual: Any = residual, out: Any = out, rows: int = rows) -> None:
                residual.zero_()
                for i in range(SUMS):
                    which = (EMBEDDED, ATTENDED, GATED)[i % 3]
                    self.peers.slot(which, rows).copy_(inputs[i])
                    self.peers.add_rms_norm(which, residual, weight, 1e-5, out)

            graph = self.graph_of(sums)
            for _ in range(REPLAYS):
                inputs.normal_(generator=generator)
                self.apart(rng)
                graph.replay()
                found, normed = residual.clone(), out.clone()
                residual.zero_()
                for i in range(SUMS):
                    total = self.collectives.tp_all_reduce(inputs[i].clone())
                    add_rms_norm(total, residual, weight, 1e-5, out)
                if self.size == 2:
                    wrong += int(not torch.equal(found, residual))
                    wrong_norms += int((_steps(normed) - _steps(out)).abs().max() > 2)
                    rounded += int(not torch.equal(normed, out))
                else:
                    wrong += int(not torch.allclose(found.float(), residual.float(), atol=0.1, rtol=0.05))
                everyone = self.collectives.tp_all_gather(torch.cat((found, normed), 1).view(torch.uint8))
                first, *others = everyone.chunk(self.size, -1)
                apart += sum(not torch.equal(first, other) for other in others)
                num += 1
            self.peers.check()
        print(
            f"rank {self.rank}: {num} replays of {SUMS} sums: {wrong} unlike NCCL, {apart} unlike other ranks",
            flush=True,
        )
        print(f"rank {self.rank}: {wrong_norms} norms wrong, {rounded} a rounding off in some element", flush=True)
        if wrong or wrong_norms or apart:
            raise SystemExit(1)

    def check_argmax(self) -> None:
        import torch

        rng = random.Random(self.rank)
        generator = torch.Generator(self.device).manual_seed(self.rank)
        width, wrong = 64_128, 0
        own = (self.rank * width, (self.rank + 1) * width)
        for rows in (64, 1, 64, 5, min(256, self.peers.max_rows)) * 3:
            logits = torch.randn(rows, width, device=self.device, generator=generator)
            self.apart(rng)
            found = self.peers.argmax(logits, own)
            wrong += int((found != self.collectives.tp_all_gather(logits).argmax(dim=-1)).sum())
        self.peers.check()
        print(f"rank {self.rank}: {wrong} greatest logits unlike torch's", flush=True)
        if wrong:
            raise SystemExit(1)

    def check_giving_up(self) -> None:
        """The last: counts differ afterwards."""
        import torch

        from disagg.runtime.peer_reduce import ATTENDED, PeerReduceError

        if self.rank == 0:
            residual, out = torch.zeros(2, 4, self.hidden, dtype=torch.bfloat16, device=self.device).unbind(0)
            looks = 1 << 16
            began = time.perf_counter()
            with self.peers.limited(looks):
                self.peers.add_rms_norm(ATTENDED, residual, residual[0], 1e-5, out)
            torch.cuda.synchronize()
            took = time.perf_counter() - began
            try:
                self.peers.check()
                raise SystemExit("a peer that never came was not missed")
            except PeerReduceError as error:
                print(f"given up after {looks} looks, {took / looks * 1e9:.0f} ns each: {error}", flush=True)
        self.group.Barrier()

    def microseconds(self, work: Callable[[int], Any], count: int = 64) -> float:
        """Of one `work(i)` among `count` in a graph; the slowest rank's median."""
        import numpy as np
        import torch
        from mpi4py import MPI

        def all_of_it() -> None:
            for i in range(count):
                work(i)

        graph = self.graph_of(all_of_it)
        graph.replay()
        torch.cuda.synchronize()
        found = []
        for _ in range(15):
            self.group.Barrier()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) * 1e3 / count)
        worst = np.array([statistics.median(found)])
        self.group.Allreduce(MPI.IN_PLACE, worst, op=MPI.MAX)
        return float(worst[0])

    def time_sums(self) -> None:
        import torch

        from disagg.runtime.model_kernels import add_rms_norm
        from disagg.runtime.peer_reduce import ATTENDED, GATED

        weight = torch.ones(self.hidden, dtype=torch.bfloat16, device=self.device)
        self.say("rows   NCCL   norm   NCCL + norm   peers with norm   (µs, slowest rank)")
        for rows in (1, 16, 64, 256, self.peers.max_rows):
            x, residual, out = torch.zeros(3, rows, self.hidden, dtype=torch.bfloat16, device=self.device).unbind(0)

            def norm(i: int, x: Any = x, residual: Any = residual, out: Any = out) -> None:
                add_rms_norm(x, residual, weight, 1e-5, out)

            def nccl(i: int, x: Any = x) -> None:
                self.collectives.tp_all_reduce(x)

            def both(i: int, nccl: Any = nccl, norm: Any = norm) -> None:
                nccl(i)
                norm(i)

            def by_peers(i: int, residual: Any = residual, out: Any = out) -> None:
                self.peers.add_rms_norm((ATTENDED, GATED)[i % 2], residual, weight, 1e-5, out)

            times = [self.microseconds(work) for work in (nccl, norm, both, by_peers)]
            self.say(f"{rows:4d} {times[0]:6.1f} {times[1]:6.1f} {times[2]:12.1f} {times[3]:14.1f}")
        self.peers.check()

    def decode(self, place: Any) -> None:
        """A step at batch 64 and context 1024, the way it is measured by `disagg bench engine`."""
        import gc

        import torch

        from disagg.core.model_shapes import PRESETS
        from disagg.runtime.bench_engine import EngineBench
        from disagg.runtime.nccl import NcclCollectives

        plain = NcclCollectives(self.group, self.size)
        for name, collectives in (("peers", self.collectives), ("NCCL", plain)):
            bench = EngineBench(PRESETS[SHAPE], place, collectives, str(self.device), max_batch=64, max_num_tokens=1024)
            steps = {batch: [bench.decode_step(batch, 1024) * 1e3 for _ in range(3)] for batch in (1, 64)}
            text = "; ".join(
                f"batch {batch}: {', '.join(f'{ms:.3f}' for ms in found)} ms" for batch, found in steps.items()
            )
            self.say(f"decode by {name}: {text}; products alone {bench.gemms(64) * 1e3:.3f} ms")
            self.peers.check()
            del bench
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    if os.environ.get("OMPI_COMM_WORLD_SIZE"):
        ranks(sys.argv[1])
    else:
        from disagg.runtime.launcher import launch

        wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
        sys.exit(launch(__file__, [wanted], int(sys.argv[2]) if len(sys.argv) > 2 else 2, timeout_s=LIMIT_S))
