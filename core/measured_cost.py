"""What a step costs, from measurements: the evaluation of a fitted profile. Fitting is `experiments/`' business.

Each part of a step is a feature that means something on a device - rows through the matrices, KV read, query-key pairs -
times a coefficient that is never negative, so a step never gets cheaper by doing more in the same kernels; one that is too
large for any graph runs in others, which may be quicker. Outside what was measured the mean slope of the outer half goes
on; `covers` says where that begins.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .chunk_sums import chunk_sums
from .cost import ENDLESS, UNIT_BITS, StepFeatures, affine_span_time
from .measured_range import Measured
from .step_sizes import chunk_graph, padded_rows

UNITS_PER_NS: Final = 1000 << UNIT_BITS


@dataclass(frozen=True)
class Curve:
    """A monotone, continuous, piecewise linear function of a count. `slopes[i]` holds from `knots[i]` on.

    Integers in 2^-20 ps; `knots` ascend from 0; `values` are those at the knots, kept so that looking one up is cheap.
    """

    knots: tuple[int, ...]
    slopes: tuple[int, ...]
    values: tuple[int, ...]

    @classmethod
    def of(cls, start: int, knots: Sequence[int], slopes: Sequence[int]) -> Curve:
        """Raises ValueError for what is no such function."""
        if not knots or knots[0] != 0 or len(knots) != len(slopes) or list(knots) != sorted(set(knots)):
            raise ValueError(f"knots {list(knots)} must ascend from 0, with one slope each, not {len(slopes)}")
        if start < 0 or min(slopes) < 0:
            raise ValueError("a cost never falls: its start and slopes must not be negative")
        values = [start]
        for i in range(1, len(knots)):
            values.append(values[-1] + slopes[i - 1] * (knots[i] - knots[i - 1]))
        return cls(tuple(knots), tuple(slopes), tuple(values))

    @classmethod
    def line(cls, start: int, slope: int) -> Curve:
        return cls.of(start, (0,), (slope,))

    def at(self, x: int) -> int:
        i = bisect_right(self.knots, x) - 1
        return self.values[i] + self.slopes[i] * (x - self.knots[i])

    def slope_at(self, x: int) -> tuple[int, int]:
        """The slope from `x` on, and up to where it goes, that point included."""
        i = bisect_right(self.knots, x)
        return self.slopes[i - 1], self.knots[i] if i < len(self.knots) else ENDLESS

    def total(self, first: int, stride: int, num: int) -> int:
        """Exactly at(first) + at(first + stride) + … of `num` terms, a segment at a time."""
        if stride == 0:
            return num * self.at(first)
        total = 0
        knots, slopes = self.knots, self.slopes
        while num > 0:
            i = bisect_right(knots, first) - 1
            terms = num
            if i + 1 < len(knots):
                terms = min(num, -(-(knots[i + 1] - first) // stride))
            value = self.values[i] + slopes[i] * (first - knots[i])
            total += affine_span_time(value, slopes[i] * stride, terms)
            first += terms * stride
            num -= terms
        return total


ZERO: Final = Curve.line(0, 0)


@dataclass(frozen=True)
class MeasuredCost:
    """Times in 2^-20 ps; coefficients per one of the feature.

    A decode step: `decode_rows` of its batch, padded to the next of `graph_sizes` (none: not padded), `decode_kv` of all
    KV tokens it reads, `decode` a sequence. A step with chunks: `chunk_rows` of all its tokens, padded to a multiple of
    `row_multiple` above it, `pair` a (query, key) pair of the chunks, `cached_token` read again before them and
    `longest_token` one of the longest KV before a chunk, `chunk` and `sample` for each chunk and each token that one yields,
    `mixed_kv` and `mixed_decode` for the decodes that run along.
    With `chunk_graphs` steps with short prompts run as graphs, padded to their rows, where attention is another kernel, in
    which all chunks are walked through side by side: it takes `graph_pair` a pair, or `graph_cached_token` a token of the
    longest KV before a chunk where that is more (-1: what holds kernel by kernel does there, too). A step with chunks that runs
    kernel by kernel takes `launch_floor` at least, which is the host's time.

    A KV token that is read again, since sequences share its block, is nearer at hand: `decode_shared` and `mixed_shared`
    are the parts of reading one, in 2^-20, that it does not cost. From `full_batch` sequences on (0: never) another kernel
    reads the KV of a decode batch: a token takes `full_kv` more, and one that is read again saves `full_shared` of it, no
    more than of smaller batches.
    """

    graph_sizes: tuple[int, ...]
    row_multiple: int
    decode_rows: Curve
    decode_kv: Curve
    decode: int
    chunk_rows: Curve
    pair: int
    cached_token: int
    chunk: int
    sample: int
    mixed_kv: Curve
    mixed_decode: int
    measured: Measured
    chunk_graphs: bool = False
    launch_floor: int = 0
    graph_pair: int = -1
    graph_cached_token: int = -1
    decode_shared: int = 0
    mixed_shared: int = 0
    longest_token: int = 0
    full_batch: int = 0
    full_kv: int = 0
    full_shared: int = 0

    def __post_init__(self) -> None:
        if self.full_batch and self.full_shared > self.decode_shared:
            raise ValueError("a step gets no cheaper by more decodes: full_shared must not be above decode_shared")

    def step_time(self, features: StepFeatures) -> int:
        n, kv, chunks = features.num_decodes, features.num_kv_tokens, features.chunks
        if not chunks:
            each = self.decode * n
            if 0 < self.full_batch <= n:
                kv -= features.num_shared_kv * self.full_shared >> UNIT_BITS
                each += self.full_kv * kv
            else:
                kv -= features.num_shared_kv * self.decode_shared >> UNIT_BITS
            return self.decode_rows.at(self._graph_size(n)) + self.decode_kv.at(kv) + each
        tokens, pairs, cached, longest, sampled = chunk_sums(chunks)
        return self.time_of_sums(n, kv, len(chunks), tokens, pairs, cached, longest, sampled, features.num_shared_kv)

    def time_of_sums(
        self,
        num_decodes: int,
        num_kv: int,
        num_chunks: int,
        num_tokens: int,
        pairs: int,
        cached: int,
        longest: int,
        sampled: int,
        num_shared_kv: int = 0,
    ) -> int:
        """`step_time` by the sums over a step's chunks: their tokens, their (query, key) pairs, tokens cached before
        them, in all and the most before one, tokens that they yield.
        """
        if not num_chunks:
            return self.step_time(StepFeatures(num_decodes, num_kv, (), num_shared_kv))
        graph = self._chunk_graph(num_decodes, num_chunks, num_tokens)
        rows = padded_rows(num_decodes + num_tokens, self.row_multiple) if graph is None else graph[1]
        attention = pairs * self.pair + cached * self.cached_token + longest * self.longest_token
        if graph is not None and self.graph_pair >= 0:
            attention, walk = pairs * self.graph_pair, longest * self.graph_cached_token
            if walk > attention:
                attention = walk
        time = (
            self.chunk_rows.at(rows)
            + attention
            + num_chunks * self.chunk
            + sampled * self.sample
            + self.mixed_kv.at(num_kv - (num_shared_kv * self.mixed_shared >> UNIT_BITS))
            + num_decodes * self.mixed_decode
        )
        return time if graph is not None or time > self.launch_floor else self.launch_floor

    def runs_by_kernels(self, num_decodes: int, num_chunks: int, num_tokens: int) -> bool:
        """Whether a step with these chunks runs kernel by kernel: no graph is as large, or none runs such steps at all."""
        return self._chunk_graph(num_decodes, num_chunks, num_tokens) is None

    def _chunk_graph(self, num_decodes: int, num_chunks: int, num_tokens: int) -> tuple[int, int] | None:
        if not self.chunk_graphs:
            return None
        return chunk_graph(num_decodes, num_chunks, num_tokens, self.graph_sizes[-1])

    def line(self, features: StepFeatures) -> tuple[int, int, int]:
        n = features.num_decodes
        if features.chunks:
            return self.step_time(features), 0, 1
        kv, is_full = self._kv_read(features)
        slope, until = self.decode_kv.slope_at(kv)
        if is_full:
            slope += self.full_kv
        return self.step_time(features), slope * n, (until - kv) // n + 1 if n else ENDLESS

    def span_time(self, features: StepFeatures, num_steps: int) -> int:
        """The sum of step_time over steps that read `num_decodes` more KV tokens each."""
        n = features.num_decodes
        if features.chunks:  # rare, and mostly of one step
            return sum([self.step_time(features.after(i)) for i in range(num_steps)])
        kv, is_full = self._kv_read(features)
        rest = self.step_time(features) - self.decode_kv.at(kv)
        more = self.full_kv * n * (num_steps * (num_steps - 1) // 2) if is_full else 0
        return rest * num_steps + self.decode_kv.total(kv, n, num_steps) + more

    def _kv_read(self, features: StepFeatures) -> tuple[int, bool]:
        """KV tokens of a step of decodes, less what is saved of those read again, and whether a full batch reads them."""
        # `step_time` says the same in line: a call more is a twentieth of its time
        is_full = 0 < self.full_batch <= features.num_decodes
        saved = self.full_shared if is_full else self.decode_shared
        return features.num_kv_tokens - (features.num_shared_kv * saved >> UNIT_BITS), is_full

    def covers(self, features: StepFeatures) -> bool:
        """Whether every feature of the step is within what was measured; a graph's rows always are."""
        n, kv, chunks = features.num_decodes, features.num_kv_tokens, features.chunks
        most = self.measured
        if not chunks:
            return n <= most.decodes and kv <= most.kv_tokens
        tokens, pairs, cached, _, _ = chunk_sums(chunks)
        graph = self._chunk_graph(n, len(chunks), tokens)
        return (
            (graph is not None or padded_rows(n + tokens, self.row_multiple) <= most.rows)
            and pairs <= most.pairs
            and cached <= most.cached_tokens
            and len(chunks) <= most.chunks
            and n <= most.mixed_decodes
            and kv <= most.mixed_kv_tokens
        )

    def _graph_size(self, num_decodes: int) -> int:
        sizes = self.graph_sizes
        i = bisect_left(sizes, num_decodes)
        return sizes[i] if i < len(sizes) else num_decodes
