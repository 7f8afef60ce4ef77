"""What users get back: responses as they become ready, waited for by one id, many or any. Any thread may ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Final, Protocol, overload

from msgspec import Struct

from ..policies.vocabulary import ContextPhaseParams, FinishReason

PROMISED: Final = (
    "is_promised context_phase_params are the orchestrator's to give: it alone sends the first token later"
)


class Result(Struct, frozen=True):
    """One part of a request's output. `output_token_ids`: those not yet given; the last part may have none.

    `decoding_iter` counts the tokens out so far. `finish_reasons` has one entry (one beam) once it is final.
    """

    is_final: bool
    output_token_ids: tuple[int, ...] = ()
    context_phase_params: ContextPhaseParams | None = None
    finish_reasons: tuple[FinishReason, ...] = ()
    decoding_iter: int = 0
    sequence_index: int = 0


class Response(Struct, frozen=True):
    """`result` is None where `has_error`."""

    request_id: int
    has_error: bool = False
    error_msg: str | None = None
    result: Result | None = None


class UnknownRequestError(KeyError):
    """A request id that was never issued, or whose final response has been taken."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class Listener(Protocol):
    """Who is told of tokens and ends; called on the thread that owns the core."""

    def tokens(self, request_id: int, first_index: int, token_ids: tuple[int, ...]) -> None:
        """Tokens from `first_index` on; some of them may have been told before (a retry, or both phases)."""

    def ended(
        self, request_id: int, reason: FinishReason | None, error: str | None, params: ContextPhaseParams | None
    ) -> None:
        """The one end of a request. `reason` None: its context phase is done and `params` hands it over."""

    def broken(self, error: str) -> None:
        """Nothing more will come."""


class _Answer:
    __slots__ = ("error", "is_over", "num_given", "params", "reason", "streaming", "tokens")

    def __init__(self, streaming: bool) -> None:
        self.streaming = streaming
        self.tokens: list[int] = []
        self.num_given = 0
        self.is_over = False
        self.reason: FinishReason | None = None
        self.error: str | None = None
        self.params: ContextPhaseParams | None = None

    @property
    def is_ready(self) -> bool:
        return self.is_over or (self.streaming and len(self.tokens) > self.num_given)


class Answers:
    """A Listener that keeps what it is told until it is asked for."""

    def __init__(self) -> None:
        self._answers: dict[int, _Answer] = {}
        self._changed = threading.Condition()
        self._broken: str | None = None

    # ---- what is told ------------------------------------------------------------------------------------------------

    def expect(self, request_id: int, streaming: bool) -> None:
        """Before the request is sent."""
        with self._changed:
            self._answers[request_id] = _Answer(streaming)

    def tokens(self, request_id: int, first_index: int, token_ids: tuple[int, ...]) -> None:
        with self._changed:
            answer = self._answers.get(request_id)
            if answer is None or first_index > len(answer.tokens):
                return
            answer.tokens += token_ids[len(answer.tokens) - first_index :]
            if answer.is_ready:
                self._changed.notify_all()

    def ended(
        self, request_id: int, reason: FinishReason | None, error: str | None, params: ContextPhaseParams | None
    ) -> None:
        with self._changed:
            answer = self._answers.get(request_id)
            if answer is not None:
                answer.is_over, answer.reason, answer.error, answer.params = True, reason, error, params
                self._changed.notify_all()

    def broken(self, error: str) -> None:
        with self._changed:
            self._broken = error
            for answer in self._answers.values():
                if not answer.is_over:
                    answer.is_over, answer.error = True, error
            self._changed.notify_all()

    # ---- what is asked -----------------------------------------------------------------------------------------------

    @overload
    def await_responses(self, ids: int | None = None, timeout: float | None = None) -> list[Response]: ...
    @overload
    def await_responses(self, ids: Sequence[int], timeout: float | None = None) -> list[list[Response]]: ...

    def await_responses(
        self, ids: int | Sequence[int] | None = None, timeout: float | None = None
    ) -> list[Response] | list[list[Response]]:
        """Responses that are ready. One id: wait for its next; None: for the next of any; many: until each has one.

        `timeout` in seconds, None waits for ever; when it is up, what is there is returned, possibly nothing. Raises
        UnknownRequestError for an id that nothing can come for. With several ids the answer is one list per id.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        wanted = None if ids is None else [ids] if isinstance(ids, int) else list(ids)
        with self._changed:
            for request_id in wanted or ():
                if request_id not in self._answers:
                    raise UnknownRequestError(
                        f"request {request_id} is unknown here, or its final response was taken already"
                    )
            while not self._enough(wanted):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            if wanted is None:
                return [self._take(i) for i in list(self._answers) if self._answers[i].is_ready]
            taken = [[self._take(i)] if i in self._answers and self._answers[i].is_ready else [] for i in wanted]
        return taken[0] if isinstance(ids, int) else taken

    def num_ready(self) -> int:
        """Requests with a response that nobody has taken yet."""
        with self._changed:
            return sum(answer.is_ready for answer in self._answers.values())

    def _enough(self, wanted: list[int] | None) -> bool:
        if wanted is None:
            return self._broken is not None or any(answer.is_ready for answer in self._answers.values())
        return all(request_id not in self._answers or self._answers[request_id].is_ready for request_id in wanted)

    def _take(self, request_id: int) -> Response:
        answer = self._answers[request_id]
        if answer.is_over:
            del self._answers[request_id]
        if answer.error is not None:
            return Response(request_id, True, answer.error)
        tokens = tuple(answer.tokens[answer.num_given :])
        answer.num_given = len(answer.tokens)
        reasons = (answer.reason,) if answer.is_over and answer.reason is not None else ()
        return Response(
            request_id,
            result=Result(answer.is_over, tokens, answer.params, reasons, len(answer.tokens)),
        )
