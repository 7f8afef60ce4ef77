"""The links between executors as the orchestrator knows them: what each carries, and what it has sent on its way."""

from __future__ import annotations

from collections.abc import Sequence

from ..policies.links import Link
from ..policies.vocabulary import PS_PER_S
from .config import ExecutorConfig
from .prediction import LinkTimes, PredictionConfig


class Links:
    """A link is taken to carry one transfer after the other at its full rate, from when its reader is sent off."""

    def __init__(self, config: PredictionConfig, executors: Sequence[ExecutorConfig]) -> None:
        self.is_asked = False  # before the first question nothing is counted
        self._config = config
        self._kinds = dict(zip((e.id for e in executors), config.link_kind_of, strict=True))
        self._num_kinds = max(config.link_kind_of, default=-1) + 1
        self._domains = {e.id: e.domain for e in executors}
        self._free_at: dict[tuple[int, int], int] = {}  # when what is in flight is through, in picoseconds

    def sent(self, source: int, reader: int, num_tokens: int, now: int) -> None:
        """`reader` was told to fetch the KV of so many tokens from `source`."""
        times = self._times(source, reader)
        if times is not None:
            took = round(num_tokens * self._config.kv_bytes_per_token / times.bytes_per_s * PS_PER_S)
            self._free_at[source, reader] = max(self._free_at.get((source, reader), 0), now) + took

    def between(self, source: int, reader: int, now: int) -> Link:
        """The link in this direction; of an executor with itself, or with one that is none, it takes no time."""
        self.is_asked = True
        times = self._times(source, reader)
        if times is None:
            return Link(float("inf"))
        left = max(self._free_at.get((source, reader), 0) - now, 0)
        in_flight = left * times.bytes_per_s / PS_PER_S
        return Link(times.bytes_per_s, times.latency, times.token_latency, in_flight, self._config.kv_bytes_per_token)

    def _times(self, source: int, reader: int) -> LinkTimes | None:
        config = self._config
        kinds = self._kinds.get(source), self._kinds.get(reader)
        if source == reader or kinds[0] is None or kinds[1] is None:
            return None
        across = self._num_kinds**2 if self._domains[source] != self._domains[reader] else 0
        return config.links[across + kinds[0] * self._num_kinds + kinds[1]]
