"""What is sent: the phases of an experiment as streams of planned requests, the same for both worlds.

Everything is drawn lazily; a million requests are never held at once. True output lengths live here and in the driver
of a world only: a core and its policies see `max_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..core.prefix_names import token_hashes
from .arrivals import arrival_offsets, scaled
from .config import Experiment
from .config_workload import ConcurrencyPhase, Phase, Quantile, SyntheticDataset, TracePhase
from .errors import ConfigError
from .lengths import draw
from .oracles import uses_oracle
from .segments import segment_hashes
from .streams import stream
from .synthetic import synthetic_rows
from .traces import HASH_ID_TOKENS, TraceRow, block_hashes, read_trace, summarise_trace, trace_path

_QUANTILE_DRAWS = 100_000
_KEPT_TOKENS = 1 << 23


class PlannedRequest(Struct, frozen=True):
    """One request to be sent. `id` counts from 0 over all phases.

    `offset`: intended send in picoseconds since the phase began, None in a closed loop. `num_output_tokens` is the true
    output length, at most `max_tokens`, and hidden from cores and policies; `output_cut` says that it was longer.
    """

    id: int
    phase: str
    offset: int | None
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    output_cut: bool = False
    excluded: bool = False
    session: str | None = None
    traffic_class: str = ""
    priority: float = 0.5
    block_hashes: tuple[int, ...] = ()
    input_token_ids: tuple[int, ...] | None = None
    is_told: bool = False  # an oracle decides: it is told the true output length


class PlannedPhase:
    """One phase: `concurrency` None for an open loop; iterate `requests` once."""

    def __init__(self, keys: Phase, requests: Iterator[PlannedRequest], num_requests: int) -> None:
        self.name = keys.name
        self.excluded = keys.exclude_from_results
        self.concurrency = keys.concurrency if isinstance(keys, ConcurrencyPhase) else None
        self.requests = requests
        self.num_requests = num_requests


class Workload:
    """The workload of one run, drawn from `config.seed`.

    `vocab_size` asks for token ids (hardware); without it `input_token_ids` is None. `with_block_hashes` False leaves
    the hashes of prefix blocks out. Raises ConfigError for a trace that is missing, malformed or too short.
    """

    def __init__(self, config: Experiment, *, vocab_size: int | None = None, with_block_hashes: bool = True) -> None:
        self._config = config
        self._seed = config.seed
        self._vocab_size = vocab_size
        self._with_block_hashes = with_block_hashes
        self._id_tokens: dict[int, tuple[int, ...]] = {}
        self._num_kept = 0
        self._is_told = uses_oracle(config)
        self.counts = phase_counts(config)
        self.num_requests = sum(self.counts)
        self.max_tokens = declared_max_tokens(config)

    def phases(self) -> Iterator[PlannedPhase]:
        """The phases in order. Read each to its end before the next: they share one trace and one count of ids."""
        dataset = self._config.workload.dataset
        rows: Iterator[TraceRow] | None = None
        if not isinstance(dataset, SyntheticDataset):
            rows = islice(read_trace(dataset.type, trace_path(dataset, self._config.root)), dataset.skip, None)
        first_id = 0
        for keys, num_requests in zip(self._config.workload.phases, self.counts, strict=True):
            yield PlannedPhase(keys, self._requests(keys, num_requests, first_id, rows), num_requests)
            first_id += num_requests

    def __iter__(self) -> Iterator[PlannedRequest]:
        """Every request of every phase, in order of sending."""
        return chain.from_iterable(phase.requests for phase in self.phases())

    def _requests(
        self, keys: Phase, num_requests: int, first_id: int, rows: Iterator[TraceRow] | None
    ) -> Iterator[PlannedRequest]:
        if rows is None:
            rows = self._synthetic_rows(keys.name)
        offsets: Iterator[int] | None = None
        if not isinstance(keys, ConcurrencyPhase | TracePhase):
            offsets = arrival_offsets(keys, stream(self._seed, "arrivals", keys.name))
        origin: int | None = None
        tokens_per_block, is_told, max_tokens = self.tokens_per_block, self._is_told, self.max_tokens
        longest = self._config.workload.max_prompt_tokens
        name, excluded, traffic_class, priority = (
            keys.name,
            keys.exclude_from_results,
            keys.traffic_class,
            keys.priority,
        )
        for number, row in enumerate(islice(rows, num_requests)):
            if longest is not None and row.num_prompt_tokens > longest:
                row = replace(row, num_prompt_tokens=longest)
            offset: int | None = None
            if offsets is not None:
                offset = next(offsets)
            elif isinstance(keys, TracePhase):
                origin = row.at if origin is None else origin
                offset = scaled(row.at - origin, keys.speedup)
            hashes = self._hashes(row, tokens_per_block) if self._with_block_hashes else ()
            request_id = first_id + number
            yield PlannedRequest(  # by place: a million are made
                request_id,
                name,
                offset,
                row.num_prompt_tokens,
                min(row.num_output_tokens, max_tokens),
                max_tokens,
                row.num_output_tokens > max_tokens,
                excluded,
                row.session,
                traffic_class or row.traffic_class,
                priority if row.priority is None else row.priority,
                hashes,
                None if self._vocab_size is None else self._token_ids(request_id, row),
                is_told,
            )

    def _hashes(self, row: TraceRow, tokens_per_block: int) -> tuple[int, ...]:
        """Of the prompt's full blocks, as far as the data set says what prompts have in common."""
        if row.segments:
            return segment_hashes(row.segments, row.num_prompt_tokens, tokens_per_block)
        if row.token_ids:
            return token_hashes(row.token_ids[: row.num_prompt_tokens], tokens_per_block)
        return block_hashes(row.hash_ids, row.num_prompt_tokens, tokens_per_block) if row.hash_ids else ()

    @property
    def tokens_per_block(self) -> int:
        """Of the executors that compute prompts, for the hashes of prompt blocks."""
        cluster = self._config.cluster
        groups = [*(cluster.instances or []), cluster.context_servers, cluster.mixed_servers]
        for group in groups:
            if group is not None and getattr(group, "role", "context") != "generation":
                return group.kv_cache.tokens_per_block
        return 32

    def _synthetic_rows(self, phase: str) -> Iterator[TraceRow]:
        workload = self._config.workload
        if not isinstance(workload.dataset, SyntheticDataset):
            raise ConfigError("a trace has no length distributions")
        return synthetic_rows(workload.dataset, self._seed, phase, self.max_tokens, workload.max_prompt_tokens)

    def _token_ids(self, request_id: int, row: TraceRow) -> tuple[int, ...]:
        """Ids uniform over the vocabulary: equal hash ids, and equal parts, give equal tokens; the rest is its own."""
        vocab_size = self._vocab_size or 1
        if row.token_ids:
            if max(row.token_ids) >= vocab_size:
                raise ConfigError(
                    f"the data set has token id {max(row.token_ids)}; allowed with this model: 0 to {vocab_size - 1}"
                )
            return row.token_ids[: row.num_prompt_tokens]
        ids: list[int] = []
        for part in row.segments:
            ids += self._tokens_of("tokens of segment", part.id, part.num_tokens)
        if ids:
            return tuple(ids[: row.num_prompt_tokens])
        for hash_id in row.hash_ids:  # the last may name less than that many: its tokens are as equal as its blocks
            ids += self._tokens_of("tokens of hash id", hash_id, HASH_ID_TOKENS)
        del ids[row.num_prompt_tokens :]
        own = stream(self._seed, "tokens of request", request_id)
        ids += own.integers(0, vocab_size, row.num_prompt_tokens - len(ids)).tolist()
        return tuple(ids)

    def _tokens_of(self, what: str, name: int, number: int) -> tuple[int, ...]:
        known = self._id_tokens.get(name)
        if known is None:
            known = tuple(stream(self._seed, what, name).integers(0, self._vocab_size or 1, number).tolist())
            self._num_kept += number
            if self._num_kept <= _KEPT_TOKENS:  # the rest is drawn again when it is met again
                self._id_tokens[name] = known
        return known


def phase_counts(config: Experiment) -> tuple[int, ...]:
    """Requests of each phase; a trace phase without a number takes the rest of the trace. Raises ConfigError."""
    dataset = config.workload.dataset
    asked = [phase.requests for phase in config.workload.phases]
    if isinstance(dataset, SyntheticDataset):
        return tuple(number or 0 for number in asked)
    path = trace_path(dataset, config.root)
    needed: int | None = dataset.skip + sum(n or 0 for n in asked)
    if None in asked or isinstance(config.workload.max_tokens, Quantile):
        needed = None
    num_rows = summarise_trace(dataset.type, path, needed).num_rows
    if num_rows == 0:
        raise ConfigError(f"{path}: holds no rows")
    left = max(0, num_rows - dataset.skip)
    counts: list[int] = []
    for phase, number in zip(config.workload.phases, asked, strict=True):
        taken = left if number is None else number
        if taken > left or taken == 0:
            raise ConfigError(
                f"{path}: phase '{phase.name}' wants {number or 'at least 1'} requests and the trace has {left} left of "
                f"{num_rows}{f' after {dataset.skip} that are skipped' if dataset.skip else ''}"
            )
        counts.append(taken)
        left -= taken
    return tuple(counts)


def declared_max_tokens(config: Experiment) -> int:
    """The bound of all requests: the number given, or the quantile of the dataset's output lengths, rounded up."""
    bound = config.workload.max_tokens
    if not isinstance(bound, Quantile):
        return bound
    dataset = config.workload.dataset
    if isinstance(dataset, SyntheticDataset):
        drawn = draw(dataset.osl, stream(0, "quantile of osl"), _QUANTILE_DRAWS)  # no run's own draws: it must not vary
        return int(np.quantile(drawn, bound.quantile, method="inverted_cdf"))
    counts = summarise_trace(dataset.type, trace_path(dataset, config.root), None).output_counts
    wanted = bound.quantile * sum(counts.values())
    seen = 0
    for length in sorted(counts):
        seen += counts[length]
        if seen >= wanted:
            return length
    return max(counts)
