"""How long things will take at an executor: the questions that policies which predict may ask (`fleet.predictor`).

Answers are in picoseconds and are estimates: from the experiment's cost profile where there is one, else from reported
step times. `executors` is a pool of arrays or one row, as in `ScoringPolicy.score`; the answer has its shape.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from .vocabulary import Role


class Predictor(Protocol):
    def prefill_time(self, executors: Any, num_tokens: Any, num_cached: Any = 0) -> Any:
        """To compute `num_tokens` prompt tokens behind `num_cached` whose KV is there, with nothing else to do."""
        ...

    def queue_time(self, executors: Any) -> Any:
        """Until the prompt tokens that are queued, begun or on the wire are computed, at the rate of full steps."""
        ...

    def step_time(self, executors: Any, num_requests: int = 0, num_kv_tokens: int = 0) -> Any:
        """Of a decode step with the requests that are there or on the wire, and so many more."""
        ...

    def transfer_time(self, num_tokens: Any) -> Any:
        """To move the KV of so many tokens from one executor to another over an idle link."""
        ...


class ReportedTimes:
    """Without a cost profile: the step time that each executor last reported, whatever that step did.

    A prompt takes as many such steps as it fills; transfers are taken to cost nothing. Before any report a step takes 1 ps.
    """

    def prefill_time(self, executors: Any, num_tokens: Any, num_cached: Any = 0) -> Any:
        return _at_least_one(num_tokens / executors.max_num_tokens) * _at_least_one(executors.step_time_ps)

    def queue_time(self, executors: Any) -> Any:
        x = executors
        return pending_prompt_tokens(x) / x.max_num_tokens * _at_least_one(x.step_time_ps)

    def step_time(self, executors: Any, num_requests: int = 0, num_kv_tokens: int = 0) -> Any:
        return _at_least_one(executors.step_time_ps)

    def transfer_time(self, num_tokens: Any) -> Any:
        return 0


def pending_prompt_tokens(executors: Any) -> Any:
    """Prompt tokens that an executor has yet to compute. On a generation executor what is on the wire is KV: none."""
    x = executors
    queued = x.queued_prefill_tokens + x.inflight_prefill_tokens
    return queued if x.role is Role.GENERATION else queued + x.wire_tokens


def decode_tokens(executors: Any) -> Any:
    """KV tokens that an executor decodes with or will soon. On a context executor: none."""
    x = executors
    return x.decode_kv_tokens + x.wire_tokens if x.role is Role.GENERATION else x.decode_kv_tokens


def _at_least_one(number: Any) -> Any:
    return np.maximum(number, 1) if isinstance(number, np.ndarray) else max(number, 1)
