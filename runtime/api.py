"""The public face of real executors, after TensorRT-LLM's executor API: an executor by itself, and an orchestrator.

    leader mode         each process makes an `Executor`; the first rank of each enqueues and awaits, the user maps ids
    orchestrator mode   rank 0 makes a `DisaggExecutorOrchestrator`; every other rank calls `serve`

Both are collective: all ranks of the MPI world make theirs, with equal specs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..policies.vocabulary import Request, RequestType, SamplingConfig
from .executor_answers import Response, Result, UnknownRequestError
from .executor_spec import HardwareSpec, ModelSource, Placement
from .executor_tokens import TokenError
from .leader_executor import Executor
from .orchestrator_api import DisaggExecutorOrchestrator, serve

__all__ = [
    "DisaggExecutorOrchestrator",
    "Executor",
    "HardwareSpec",
    "ModelSource",
    "Placement",
    "Response",
    "Result",
    "TokenError",
    "UnknownRequestError",
    "request",
    "serve",
]


def request(
    input_token_ids: Sequence[int],
    max_tokens: int,
    *,
    request_type: RequestType = RequestType.CONTEXT_AND_GENERATION,
    streaming: bool = False,
    sampling: SamplingConfig | None = None,
    end_id: int | None = None,
    **fields: Any,
) -> Request:
    """A request to enqueue; its id is given when it is enqueued. `fields` are others of `Request`."""
    return Request(
        0,
        len(input_token_ids),
        max_tokens,
        request_type,
        input_token_ids=tuple(input_token_ids),
        streaming=streaming,
        sampling=sampling,
        end_id=end_id,
        **fields,
    )
