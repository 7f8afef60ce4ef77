"""Leader mode: executor 1 is one rank, executor 2 two; the user, here, carries the params between their first ranks.

Executor 2 serves all three types of requests at once.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from disagg.policies.vocabulary import ContextPhaseParams, FinishReason, RequestType
from disagg.runtime.api import Executor, TokenError, request
from disagg.runtime.executor_spec import ModelSource
from tests.runtime_programs.clusters import cluster, context, mixed
from tests.tiny_models import SHAPES, Script, make_engine, prompts

SHAPE = SHAPES["llama"]
SPEC = cluster(ModelSource(SHAPE, seed=3), [context(), mixed(tp=2)], first_rank=0, leader_mode=True)
PROMPTS = prompts(SHAPE, [5, 19, 12, 7], seed=5)
NUM_TOKENS = 25


def expected(prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    return tuple(Script([make_engine(SHAPE)]).generate(0, prompt, num_tokens))


def check(condition: object, what: object) -> None:
    if not condition:
        raise RuntimeError(f"not so: {what}")


def first_executor(executor: Executor, comm: Any, mpi: Any) -> None:
    """Context phases for the other executor, handed over as bytes."""
    ids = executor.enqueue_requests(
        [request(prompt, NUM_TOKENS, request_type=RequestType.CONTEXT_ONLY) for prompt in PROMPTS[:2]]
    )
    for prompt, (response,) in zip(PROMPTS, executor.await_responses(ids, timeout=30)):
        check(not response.has_error and response.result.output_token_ids == expected(prompt, 1), response)
        comm.Send([msgspec.msgpack.encode(response.result.context_phase_params), mpi.BYTE], dest=1)


def second_executor(executor: Executor, comm: Any, mpi: Any) -> None:
    """A whole request and a context-only one run while generation-only ones arrive."""
    whole = executor.enqueue_request(request(PROMPTS[2], 60))
    half = executor.enqueue_request(request(PROMPTS[3], NUM_TOKENS, request_type=RequestType.CONTEXT_ONLY))
    pulled = []
    for prompt in PROMPTS[:2]:
        status = mpi.Status()
        comm.Probe(0, status=status)
        data = bytearray(status.Get_count(mpi.BYTE))
        comm.Recv([data, mpi.BYTE], 0)
        params = msgspec.msgpack.decode(data, type=ContextPhaseParams)
        kind = RequestType.GENERATION_ONLY
        asked = request(prompt, NUM_TOKENS, request_type=kind, context_phase_params=params, streaming=True)
        pulled.append(executor.enqueue_request(asked, 10 if prompt is PROMPTS[1] else None))
    for request_id, prompt, length in zip(pulled, PROMPTS, (NUM_TOKENS, 10)):
        tokens: tuple[int, ...] = ()
        is_final = False
        while not is_final:
            for response in executor.await_responses(request_id, timeout=30):
                check(not response.has_error, response)
                tokens += response.result.output_token_ids
                is_final = response.result.is_final
        check(tokens == expected(prompt, length), f"{tokens} of request {request_id}")
        reason = FinishReason.STOP if length == 10 else FinishReason.LENGTH
        check(response.result.finish_reasons == (reason,), response)
    (response,) = executor.await_responses(whole, timeout=30)
    check(response.result.output_token_ids == expected(PROMPTS[2], 60), response)
    (response,) = executor.await_responses(half, timeout=30)
    check(response.result.output_token_ids == expected(PROMPTS[3], 1), response)
    executor.cancel_request(half)  # nobody will read its KV, so the shutdown need not wait for its lease
    steps, stays = executor.get_latest_iteration_stats(), executor.get_latest_request_stats()
    check(steps and steps[0].executor == 2 and sum(step.num_chunks for step in steps) >= 2, steps)
    check([stay.stage for stay in stays].count("generation") == 2 and len(stays) == 4, stays)
    check(executor.get_latest_request_stats() == [], "stats are given once")
    check(executor.latest_report() is not None, "it reports")


def main() -> None:
    executor = Executor(SPEC)
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rank = comm.Get_rank()
    check(executor.can_enqueue_requests() == (rank in (0, 1)), rank)
    if rank == 2:
        try:
            executor.enqueue_request(request(PROMPTS[0], 4))
        except RuntimeError as error:
            check("first rank, which is rank 1" in str(error), error)
        executor.shutdown()
        return
    try:
        executor.enqueue_request(request((10**6,), 4))
        raise RuntimeError("foreign token ids were taken")
    except TokenError:
        pass
    (first_executor if rank == 0 else second_executor)(executor, comm, MPI)
    if rank == 0:
        executor.shutdown()
    else:
        lost = executor.enqueue_request(request(PROMPTS[0], 200))
        executor.shutdown(drain=False)
        (response,) = executor.await_responses(lost, timeout=0)
        check(response.has_error and "was shut down" in response.error_msg, response)
    print(f"rank {rank} is well", flush=True)


if __name__ == "__main__":
    sys.exit(main())
