"""Synthetic requests: drawn lengths, traffic classes, prefixes that many requests share, sessions of several turns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .config_workload import SyntheticDataset, TrafficClass
from .lengths import token_counts
from .segments import Segment, segment_id
from .streams import stream
from .traces import TraceRow

_DRAWS = 1024  # at a time


def synthetic_rows(
    dataset: SyntheticDataset, seed: int, phase: str, max_tokens: int, max_prompt_tokens: int | None
) -> Iterator[TraceRow]:
    """Requests of one phase, without end. A prompt is its shared prefix, what its session said before, and `isl` of its own.

    In a session the earlier prompts and answers stand before the new turn; the answers' tokens are drawn, not the model's.
    A session ends early if its next prompt would be longer than `max_prompt_tokens`. With `concurrent` sessions they take
    turns, so that a session's own are `concurrent` requests apart; nobody waits for an answer before sending the next turn.
    """
    if dataset.shared_prefixes is None and dataset.sessions is None and dataset.classes is None:
        prompts = token_counts(dataset.isl, stream(seed, "isl", phase))
        outputs = token_counts(dataset.osl, stream(seed, "osl", phase))
        for num_prompt_tokens, num_output_tokens in zip(prompts, outputs):
            yield TraceRow(0, num_prompt_tokens, num_output_tokens)
        return
    drawn = _Drawn(dataset, seed, phase)
    slots: list[_Session | None] = [None] * (dataset.sessions.concurrent if dataset.sessions else 1)
    number = num_sessions = 0
    while True:
        slot = number % len(slots)
        session = slots[slot]
        if session is None or session.turns_left == 0:
            session = drawn.session(num_sessions)
            num_sessions += 1
        row = session.row(drawn, number)
        if max_prompt_tokens is not None and row.num_prompt_tokens > max_prompt_tokens and session.turn > 0:
            slots[slot] = None
            continue  # the next one begins in its place
        yield row
        goes_on = session.turns_left > 1
        slots[slot] = session.after(row, min(row.num_output_tokens, max_tokens)) if goes_on else None
        number += 1


class _Kind(NamedTuple):
    """A traffic class and its draws."""

    keys: TrafficClass
    prompts: Iterator[int]
    outputs: Iterator[int]


class _Session(NamedTuple):
    name: str | None
    kind: int
    turn: int
    turns_left: int
    history: tuple[Segment, ...]

    def row(self, drawn: _Drawn, number: int) -> TraceRow:
        kind = drawn.kinds[self.kind]
        own = next(drawn.turns if self.turn and drawn.turns is not None else kind.prompts)
        segments = (*self.history, Segment(segment_id(drawn.seed, "prompt", drawn.phase, number), own))
        return TraceRow(
            0,
            sum(part.num_tokens for part in segments),
            next(kind.outputs),
            segments=segments,
            session=self.name,
            traffic_class=kind.keys.name,
            priority=kind.keys.priority,
        )

    def after(self, row: TraceRow, num_answered: int) -> _Session:
        answer = Segment(segment_id("answer", row.segments[-1].id), num_answered)
        return self._replace(turn=self.turn + 1, turns_left=self.turns_left - 1, history=(*row.segments, answer))


class _Drawn:
    """The streams of chance of one phase. Prefixes are the same in every phase."""

    def __init__(self, dataset: SyntheticDataset, seed: int, phase: str) -> None:
        self.seed, self.phase = seed, phase
        classes = dataset.classes or [TrafficClass(name="", share=1.0, priority=None)]
        self.kinds = []
        for keys in classes:
            suffix = (phase, keys.name) if keys.name else (phase,)
            prompts = token_counts(keys.isl or dataset.isl, stream(seed, "isl", *suffix))
            outputs = token_counts(keys.osl or dataset.osl, stream(seed, "osl", *suffix))
            self.kinds.append(_Kind(keys, prompts, outputs))
        shares = np.cumsum([keys.share for keys in classes]) / sum(keys.share for keys in classes)
        self._shares: list[float] = shares.tolist()
        self._of_kind = _uniforms(stream(seed, "traffic classes", phase))
        self._prefixes = _prefixes(dataset, seed)
        self._of_prefix = _uniforms(stream(seed, "prefix groups", phase))
        shared = dataset.shared_prefixes
        self._prefix_share = shared.share if shared else 0.0
        weights = np.arange(1, len(self._prefixes) + 1) ** -(shared.skew if shared else 0.0)
        self._popularity: list[float] = (np.cumsum(weights) / weights.sum()).tolist()
        sessions = dataset.sessions
        self._num_turns = None if sessions is None else token_counts(sessions.turns, stream(seed, "turns", phase))
        self.turns = None
        if sessions is not None and sessions.turn_isl is not None:
            self.turns = token_counts(sessions.turn_isl, stream(seed, "turn isl", phase))

    def session(self, number: int) -> _Session:
        """A new session; without sessions in the dataset, one turn without a name."""
        kind = bisect_right(self._shares, next(self._of_kind))
        history: tuple[Segment, ...] = ()
        if self._prefixes:
            has_prefix, which = next(self._of_prefix), next(self._of_prefix)
            if has_prefix < self._prefix_share:
                history = (self._prefixes[bisect_right(self._popularity, which)],)
        if self._num_turns is None:
            return _Session(None, kind, 0, 1, history)
        return _Session(f"{self.phase}-{number}", kind, 0, next(self._num_turns), history)


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    """Draws from [0, 1), without end; the sequence does not depend on how many are drawn at a time."""
    while True:
        yield from rng.random(_DRAWS).tolist()


def _prefixes(dataset: SyntheticDataset, seed: int) -> list[Segment]:
    keys = dataset.shared_prefixes
    if keys is None:
        return []
    lengths = token_counts(keys.length, stream(seed, "prefix lengths"))
    return [Segment(segment_id(seed, "prefix", group), next(lengths)) for group in range(keys.groups)]
