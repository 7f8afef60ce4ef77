"""What of a transfer is written, has been sent and has arrived: rectangles of (layers) × (tokens). No I/O.

Layers and tokens are global and half-open. Of each layer tokens travel in ascending order without a gap, so one number
per layer says it all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from msgspec import Struct

from ..core.kv_layout import Range


class SegmentError(ValueError):
    """A segment that leaves a gap, repeats something, or lies outside its transfer."""


class Segment(Struct, frozen=True):
    """These layers of these tokens, in every piece of the transfer that has them."""

    layers: Range
    tokens: Range


class Written:
    """How many tokens of each layer are written. What was never said is 0."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}
        self._is_all = False

    def advance(self, layers: Range, num_tokens: int) -> None:
        for layer in range(*layers):
            if num_tokens > self._tokens.get(layer, 0):
                self._tokens[layer] = num_tokens

    def advance_all(self) -> None:
        self._is_all = True

    @property
    def is_all(self) -> bool:
        return self._is_all

    def of(self, layer: int, num_tokens: int) -> int:
        """Tokens of `layer` that are written, at most `num_tokens`."""
        return num_tokens if self._is_all else min(num_tokens, self._tokens.get(layer, 0))


class Outline:
    """The pieces of a transfer between two ranks: which layers it has, and what they weigh.

    `ranges` are (layers, heads) of each piece; `row_bytes` those of one token of K of one head.
    """

    def __init__(self, ranges: Sequence[tuple[Range, Range]], num_tokens: int, row_bytes: int) -> None:
        self.ranges = tuple(ranges)
        self.num_tokens = num_tokens
        self._bytes, self.layers, self._layer_runs, token_bytes = _weights_of(self.ranges, row_bytes)
        self.num_bytes = num_tokens * token_bytes

    def bytes_of(self, segment: Segment) -> int:
        if (segment.layers,) == self._layer_runs and segment.tokens == (0, self.num_tokens):
            return self.num_bytes
        per_token = sum(self._bytes.get(layer, 0) for layer in range(*segment.layers))
        return per_token * (segment.tokens[1] - segment.tokens[0])

    def pieces_of(self, segment: Segment) -> tuple[tuple[Range, Range], ...]:
        """(layers, heads) of the part of each piece that lies in the segment, in the order of the pieces."""
        parts = []
        for layers, heads in self.ranges:
            start, stop = max(layers[0], segment.layers[0]), min(layers[1], segment.layers[1])
            if start < stop:
                parts.append(((start, stop), heads))
        return tuple(parts)

    def whole(self) -> tuple[Segment, ...]:
        """All of it, in as few segments as there are runs of layers."""
        return tuple(Segment(run, (0, self.num_tokens)) for run in self._layer_runs)

    def split(self, segment: Segment, max_bytes: int) -> list[Segment]:
        """The segment in parts of at most `max_bytes` (or one token of one layer): by layers, then by tokens."""
        if self.bytes_of(segment) <= max_bytes:
            return [segment]
        parts: list[Segment] = []
        start, num_tokens = segment.layers[0], segment.tokens[1] - segment.tokens[0]
        while start < segment.layers[1]:
            stop, total = start, 0
            while stop < segment.layers[1] and total + self._bytes.get(stop, 0) * num_tokens <= max_bytes:
                total += self._bytes.get(stop, 0) * num_tokens
                stop += 1
            if stop > start:
                parts.append(Segment((start, stop), segment.tokens))
            else:
                stop = start + 1
                step = max(1, max_bytes // self._bytes[start])
                for token in range(*segment.tokens, step):
                    parts.append(Segment((start, stop), (token, min(token + step, segment.tokens[1]))))
            start = stop
        return parts


_Weights = tuple[dict[int, int], tuple[int, ...], tuple[Range, ...], int]


@lru_cache(maxsize=256)
def _weights_of(ranges: tuple[tuple[Range, Range], ...], row_bytes: int) -> _Weights:
    """(bytes a token of each layer, the layers, their runs, bytes a token), of pieces that come with every transfer."""
    weights: dict[int, int] = {}
    for layers, heads in ranges:
        for layer in range(*layers):
            weights[layer] = weights.get(layer, 0) + 2 * (heads[1] - heads[0]) * row_bytes
    runs: list[Range] = []
    for layer in sorted(weights):
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return weights, tuple(sorted(weights)), tuple(runs), sum(weights.values())


class Outgoing:
    """What of a transfer has been cut off for sending."""

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self._cut = dict.fromkeys(outline.layers, 0)

    def cut_all(self) -> None:
        """Everything at once."""
        self._cut = dict.fromkeys(self._cut, self.outline.num_tokens)

    def is_over(self) -> bool:
        return all(tokens == self.outline.num_tokens for tokens in self._cut.values())

    def is_written(self, written: Written) -> bool:
        if written.is_all:
            return True
        num_tokens = self.outline.num_tokens
        return all(written.of(layer, num_tokens) == num_tokens for layer in self._cut)

    def cut(self, written: Written, at_least: int, at_most: int) -> list[Segment]:
        """Segments for all that is written and not yet cut, or none if that is less than `at_least` bytes.

        Neighbouring layers that are equally far go together; none has more than `at_most` bytes.
        """
        outline = self.outline
        found: list[Segment] = []
        if written.is_all and not any(self._cut.values()):
            found += outline.whole()
        for layer in outline.layers if not found else ():
            tokens = (self._cut[layer], written.of(layer, outline.num_tokens))
            if tokens[0] >= tokens[1]:
                continue
            if found and found[-1].layers[1] == layer and found[-1].tokens == tokens:
                found[-1] = Segment((found[-1].layers[0], layer + 1), tokens)
            else:
                found.append(Segment((layer, layer + 1), tokens))
        if sum(map(outline.bytes_of, found)) < at_least:
            return []
        for segment in found:
            for layer in range(*segment.layers):
                self._cut[layer] = segment.tokens[1]
        return [part for segment in found for part in outline.split(segment, at_most)]


class Incoming:
    """What of a transfer has been announced to its receiver, and how much of that has arrived."""

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self._announced = dict.fromkeys(outline.layers, 0)
        self._bytes_left = outline.num_bytes

    def announce(self, segment: Segment) -> None:
        """Raises SegmentError, and changes nothing, for one that does not continue what came before."""
        start, stop = segment.tokens
        if not (segment.layers[0] < segment.layers[1] and start < stop <= self.outline.num_tokens):
            raise SegmentError(f"a segment of layers {segment.layers}, tokens {segment.tokens} is empty or too long")
        for layer in range(*segment.layers):
            if self._announced.get(layer) != start:
                raise SegmentError(
                    f"a segment of layers {segment.layers} begins at token {start}, but layer {layer} is at "
                    f"{self._announced.get(layer, 'no place in this transfer')}"
                )
        for layer in range(*segment.layers):
            self._announced[layer] = stop

    def announce_all(self) -> None:
        """Everything at once, where nothing was announced before."""
        self._announced = dict.fromkeys(self._announced, self.outline.num_tokens)

    @property
    def is_untouched(self) -> bool:
        """Nothing has been announced."""
        return not any(self._announced.values())

    def arrive(self, segment: Segment) -> None:
        self._bytes_left -= self.outline.bytes_of(segment)

    def is_whole(self) -> bool:
        return self._bytes_left == 0
