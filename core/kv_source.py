"""The source's side of handing KV over: who has asked for the KV of which context phase, and when it is served.

A reader asks once. With early binding it asks while the context phase is queued or runs; it is noted, and served when the
blocks are there to send from: at the first chunk with layer-wise sending, at the end of the phase without. Serving is the
pin: from then on the blocks belong to the reader too, until KvTaken or PeerDown.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Final

from ..policies.vocabulary import RequestType
from .blocks import BlockManager
from .commands import AbortKv, ServeKv
from .events import KvRequested, KvWithdrawn
from .life_cycle import State
from .visit import Visit

_NOT_DONE: Final = (State.QUEUED, State.CONTEXT_RUNNING)


class KvSource:
    """`gone` holds executors that will never read again; `emit` takes its commands."""

    def __init__(
        self,
        blocks: BlockManager,
        gone: Container[int],
        emit: Callable[[ServeKv | AbortKv], object],
        layerwise: bool,
        tokens_per_block: int,
    ) -> None:
        self._blocks = blocks
        self._gone = gone
        self._emit = emit
        self._layerwise = layerwise
        self._tokens_per_block = tokens_per_block

    def requested(self, event: KvRequested, visit: Visit | None, now: int) -> None:
        """A reader asks for the KV of `visit` (None: there is no such visit): serve it, note it, or refuse it."""
        error = self._why_not(event, visit)
        if visit is None or error is not None:
            self._refuse(event.request_id, (event.reader, event.reader_id), error)
            return
        visit.reader = (event.reader, event.reader_id)
        visit.num_present = event.num_present
        if visit.state is State.CONTEXT_DONE:
            self.serve(visit)
        elif visit.state is State.CONTEXT_RUNNING:
            self.begun(visit, now)

    def _why_not(self, event: KvRequested, visit: Visit | None) -> str | None:
        subject = f"the KV of request {event.request_id}"
        early = (
            visit is not None and visit.state in _NOT_DONE and visit.request.request_type is RequestType.CONTEXT_ONLY
        )
        if visit is None or visit.doom is not None or visit.is_read or not (early or visit.state is State.CONTEXT_DONE):
            return f"{subject} is not held here: its lease ran out, or it was cancelled or read"
        reader = visit.pinned_by or visit.reader
        if reader is not None:
            return f"{subject} is being read by executor {reader[0]}"
        present = event.num_present
        most = visit.num_kv_tokens - 1 if visit.state is State.CONTEXT_DONE else 0  # early, all of it is asked for
        if not 0 <= present <= most or present % self._tokens_per_block:
            return f"{subject}: its reader says it has {present} tokens; allowed: whole blocks of at most {most} tokens"
        return f"executor {event.reader} is gone" if event.reader in self._gone else None

    def begun(self, visit: Visit, now: int) -> None:
        """Its blocks are its own and final: an early reader can be sent what each step from now on writes."""
        if visit.reader is not None and self._layerwise:
            visit.served_at = now
            self._pin(visit, visit.request.num_prompt_tokens, visit.num_kv_tokens)

    def serve(self, visit: Visit) -> None:
        """All of its KV is written: send it to whoever has asked."""
        if visit.reader is not None:
            self._pin(visit, visit.num_kv_tokens - visit.num_present, None)

    def _pin(self, visit: Visit, num_tokens: int, num_written: int | None) -> None:
        if visit.reader is None:
            return
        executor, reader_id = visit.pinned_by = visit.reader
        visit.reader = None
        blocks = self._blocks.blocks_of(visit.id)
        if visit.num_present:
            blocks = blocks[visit.num_present // self._tokens_per_block :]
        self._emit(ServeKv(visit.id, executor, reader_id, num_tokens, blocks, True, None, num_written))

    def withdrawn(self, event: KvWithdrawn, visit: Visit | None) -> None:
        """The reader needs the blocks that it reserved; nothing is on its way to them yet, or this is void."""
        if visit is not None and visit.reader == (event.reader, event.reader_id):
            self.turn_away(visit, f"the early reservation for request {visit.id} was withdrawn")

    def turn_away(self, visit: Visit, why: str) -> None:
        """Whoever has asked and was not served yet never will be."""
        if visit.reader is not None:
            self._refuse(visit.id, visit.reader, why)
            visit.reader = None

    def abort(self, visit: Visit, why: str) -> None:
        """The visit has ended; where part of its KV was never written, an early reader would wait for it for ever."""
        if visit.num_kv_tokens < visit.request.num_prompt_tokens:
            self._emit(AbortKv(visit.id, why))

    def _refuse(self, request_id: int, reader: tuple[int, int], error: str | None) -> None:
        self._emit(ServeKv(request_id, *reader, 0, (), False, error))
