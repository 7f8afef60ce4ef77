"""How close the engine comes to its device: decode steps and prefills beside floors measured in the same process.

Floor of a decode step: the model's matrix products alone at that batch, as one CUDA graph, plus the KV bytes that it must
read over the measured bandwidth of a device-to-device copy. Floor of a prefill: the matrix products alone plus the best
attention kernel that torch offers, alone.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Final

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.commands import Chunk, Joined, RunSteps
from ..core.model_shapes import PRESETS, ModelError, ModelShape
from .bench_rows import BenchRow
from .bench_timing import device_seconds
from .collectives import Collectives, SingleRank
from .engine import Engine
from .kv_pages import KvPages
from .model_batch import ChunkFeed, JoinedFeed, PlanFeed
from .model_place import Place
from .prefill_attention import varlen_attention
from .weights import ModelWeights, random_weights

DECODES: Final = ((1, 1.15), (64, 1.10), (256, 1.08))  # (batch, most that the step may take, in floors)
PREFILLS: Final = ((8, 1024, 0.88), (1, 8192, 0.85))  # (prompts, tokens of each, least floor over measured)
CONTEXT: Final = 1024
_BLOCK: Final = 32


def run_engine_bench(model: str, tp: int = 1, device: str = "cuda", quick: bool = False) -> list[BenchRow]:
    """The rows of one model on one device, or for tp > 1 on as many; starts an MPI world for those.

    Raises ModelError for an unknown model or layout, and DeviceError for a device that is not here.
    """
    from .devices import check_device
    from .executor_spec import DeviceError

    if model not in PRESETS:
        raise ModelError(f"model {model!r} is unknown; allowed: {', '.join(PRESETS)}")
    if device != "cuda":
        raise DeviceError(f"--device {device}: bench engine measures a GPU, whose kernels it has not; allowed: cuda")
    for rank in range(tp):
        check_device(f"{device}:{rank}")
    shape = PRESETS[model]
    Place.of(shape, tp)
    if tp == 1:
        return EngineBench(shape, Place.of(shape), SingleRank(), f"{device}:0").rows(quick)
    return _in_world(model, tp, device, quick)


def _in_world(model: str, tp: int, device: str, quick: bool) -> list[BenchRow]:
    import tempfile

    import msgspec

    from .launcher import LaunchError, launch

    with tempfile.TemporaryDirectory(prefix="disagg-bench-") as folder:
        result = Path(folder) / "rows.json"
        args = [model, device, str(int(quick)), str(result)]
        code = launch(f"{__package__}.bench_engine_main", args, tp)
        if code != 0 or not result.exists():
            raise LaunchError(f"the benchmark's {tp} ranks ended with {code}; see their output")
        return msgspec.json.decode(result.read_bytes(), type=list[BenchRow])


class EngineBench:
    """One rank's measurements. With several ranks all of them call the same methods in the same order.

    `max_batch`, `max_num_tokens`: largest steps that are warmed up. `spare_blocks`: blocks of the pool, its last, that no
    decode step touches.
    """

    def __init__(
        self,
        shape: ModelShape,
        place: Place,
        collectives: Collectives,
        device: str,
        *,
        max_batch: int = DECODES[-1][0],
        max_num_tokens: int = 8192,
        context: int = CONTEXT,
        spare_blocks: int = 0,
    ) -> None:
        from .fused_stepper import FusedStepper

        self.shape = shape
        self.place = place
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.context = context
        self.weights: ModelWeights = random_weights(place, 0, device)
        self.decode_blocks = max(max_batch * (context + 128), max_num_tokens) // _BLOCK + 8
        self.pages = KvPages(place.layout, place.rank, self.decode_blocks + spare_blocks, _BLOCK, device)
        self._sums = f"; sums: {collectives.description}" if place.tp > 1 else ""
        limits = (max_batch, max_num_tokens)
        self.stepper = FusedStepper(place, self.weights, self.pages, collectives, self.device, *limits)
        self.stepper.warm_up()
        self.engine = Engine(shape, self.weights, place, self.pages, collectives, device, stepper=self.stepper)
        self.copy_rate = self._copy_rate()
        self._plan = 0

    def rows(self, quick: bool = False) -> list[BenchRow]:
        """Every row of the table; `quick` leaves the longest out."""
        found = [BenchRow("device copy", self.copy_rate / 1e12, None, None, None, None, "TB/s", "read + write, 2 GiB")]
        for batch, goal in DECODES:
            found += self.decode_row(batch, goal)
        for prompts, tokens, goal in PREFILLS[: 1 if quick else None]:
            found += self.prefill_row(prompts, tokens, goal)
        return found

    # ---- decode ------------------------------------------------------------------------------------------------------

    def decode_row(self, batch: int, goal: float) -> list[BenchRow]:
        gemms = self.gemms(batch)
        kv_bytes = batch * self.context * self.pages.layout.kv_bytes_per_token(self.place.rank, self.shape.dtype_bytes)
        floor = gemms + kv_bytes / self.copy_rate
        measured = self.decode_step(batch, self.context)
        ratio = measured / floor
        name = f"decode step, batch {batch}, context {self.context}{self._tp_text}"
        note = f"goal: at most so many floors{self._sums}"
        return [
            BenchRow(
                f"matrix products alone, {batch} tokens{self._tp_text}", gemms * 1e3, None, None, None, None, "ms", ""
            ),
            BenchRow(name, measured * 1e3, floor * 1e3, ratio, goal, ratio <= goal, "ms", note),
        ]

    def decode_step(self, batch: int, context: int, num_steps: int = 24) -> float:
        """Median seconds of a step of a running batch whose steps are launched one behind the other."""
        per_request = -(-(context + 2 * num_steps) // _BLOCK)
        order = torch.randperm(self.decode_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        joined = tuple(
            Joined(i, context - num_steps // 2, tuple(order[i * per_request : (i + 1) * per_request]))
            for i in range(batch)
        )
        feed = PlanFeed(tuple(JoinedFeed(i, 1 + i % 100) for i in range(batch)))
        self._begin(joined=joined, last_step=num_steps, num_decodes=batch, feed=feed)
        ends = []
        pending = [self.engine.launch() for _ in range(2)]
        for _ in range(num_steps - 2):
            pending.append(self.engine.launch())
            pending.pop(0).result()
            ends.append(time.perf_counter())
        for step in pending:
            step.result()
        self._begin(left=tuple(range(batch)))
        return statistics.median(b - a for a, b in itertools.pairwise(ends))

    # ---- prefill -----------------------------------------------------------------------------------------------------

    def prefill_row(self, prompts: int, tokens: int, goal: float) -> list[BenchRow]:
        gemms = self.gemms(prompts * tokens, head_rows=prompts)
        attention, kernel = self.best_attention(prompts, tokens)
        floor = gemms + attention
        measured = self.prefill_step(prompts, tokens)
        ratio = floor / measured
        text = f"{prompts} × {tokens} tokens{self._tp_text}"
        note = f"goal: floor over measured at least; attention alone {attention * 1e3:.1f} ms ({kernel})"
        return [
            BenchRow(f"matrix products alone, {text}", gemms * 1e3, None, None, None, None, "ms", ""),
            BenchRow(f"prefill, {text}", measured * 1e3, floor * 1e3, ratio, goal, ratio >= goal, "ms", note),
        ]

    def prefill_step(self, prompts: int, tokens: int, repeats: int = 5) -> float:
        per_request = -(-tokens // _BLOCK)
        chunks = tuple(
            Chunk(i, 0, tokens, True, tuple(range(i * per_request, (i + 1) * per_request))) for i in range(prompts)
        )
        ids = tuple(int(t) for t in torch.randint(0, self.shape.vocab_size, (tokens,)))
        feed = PlanFeed((), tuple(ChunkFeed(i, ids) for i in range(prompts)))
        times = []
        for _ in range(repeats):
            self._begin(chunks=chunks, feed=feed)
            began = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def best_attention(self, prompts: int, tokens: int) -> tuple[float, str]:
        """Seconds of causal attention alone in all of this rank's layers, and the kernel that was best."""
        num_query = self.place.query_heads[1] - self.place.query_heads[0]
        num_kv = self.place.kv_heads[1] - self.place.kv_heads[0]
        dtype, dim = self.pages.pool.dtype, self.shape.head_dim
        q = torch.randn(prompts, num_query, tokens, dim, dtype=dtype, device=self.device)
        k, v = torch.randn(2, prompts, num_kv, tokens, dim, dtype=dtype, device=self.device)
        found: list[tuple[float, str]] = []
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

            def attend(backend: SDPBackend = backend) -> None:
                with sdpa_kernel(backend):
                    functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            found.append((device_seconds(attend, self.device), backend.name))
        q1, k1, v1 = (x.transpose(1, 2).reshape(-1, x.shape[1], dim).contiguous() for x in (q, k, v))
        sums = torch.arange(0, prompts * tokens + 1, tokens, dtype=torch.int32, device=self.device)

        def varlen() -> None:
            varlen_attention()(q1, k1, v1, sums, sums, tokens, tokens, None)

        found.append((device_seconds(varlen, self.device), "varlen"))
        seconds, name = min(found)
        return seconds * len(self.weights.layers), name

    # ---- floors ------------------------------------------------------------------------------------------------------

    def gemms(self, tokens: int, head_rows: int | None = None) -> float:
        """Seconds of the model's matrix products alone on this rank."""
        weights = self.weights.layers
        x = torch.randn(tokens, self.shape.hidden_size, dtype=self.pages.pool.dtype, device=self.device)
        attended = torch.randn(tokens, weights[0].o.shape[1], dtype=x.dtype, device=self.device)
        inner = torch.randn(tokens, weights[0].down.shape[1], dtype=x.dtype, device=self.device)
        head = self.weights.head

        def products() -> None:
            for layer in weights:
                functional.linear(x, layer.qkv)
                functional.linear(attended, layer.o)
                functional.linear(x, layer.gate_up)
                functional.linear(inner, layer.down)
            if head is not None:
                functional.linear(x[:head_rows], head)

        return device_seconds(products, self.device, graph=tokens <= 512)

    def _copy_rate(self) -> float:
        """Bytes read plus bytes written a second by a device-to-device copy."""
        source = torch.randn(1 << (29 if self.device.type == "cuda" else 20), dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() * 4 / device_seconds(lambda: target.copy_(source), self.device)

    # ---- plans -------------------------------------------------------------------------------------------------------

    def _begin(
        self,
        *,
        joined: tuple[Joined, ...] = (),
        left: tuple[int, ...] = (),
        chunks: tuple[Chunk, ...] = (),
        last_step: int = 1,
        num_decodes: int = 0,
        feed: PlanFeed | None = None,
    ) -> None:
        self._plan += 1
        run = RunSteps(
            self._plan, self._plan, 1, last_step, left, joined, chunks, (), num_decodes, 0, decodes=bool(num_decodes)
        )
        self.engine.begin(run, feed)

    @property
    def _tp_text(self) -> str:
        return f", tp {self.place.tp}" if self.place.tp > 1 else ""
