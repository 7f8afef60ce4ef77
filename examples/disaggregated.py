"""Disaggregated serving in leader mode: no orchestrator, two executors, and the user carries the handover.

    python examples/disaggregated.py            starts its own MPI world of two ranks
    mpiexec -n 2 python examples/disaggregated.py

Rank 0's executor runs the context phase and gives the first token and the context phase params. The user's own code
sends the params to rank 1, whose executor pulls the KV cache and generates the rest. The model is small, its weights
are random: the tokens mean nothing, but they are the same on every run.
"""

from __future__ import annotations

import sys

import msgspec

from disagg.core.config import ExecutorConfig, OrchestratorConfig
from disagg.core.model_shapes import preset
from disagg.policies.vocabulary import ContextPhaseParams, Request, RequestType, Role
from disagg.runtime.launcher import inside_mpi, launch

PROMPT = (11, 42, 7, 99, 3, 250, 18, 5)
MAX_TOKENS = 12
CONTEXT_RANK, GENERATION_RANK = 0, 1


def serve() -> None:
    from mpi4py import MPI

    from disagg.runtime import api

    executors = (
        ExecutorConfig(1, Role.CONTEXT, num_blocks=64, tokens_per_block=16),
        ExecutorConfig(2, Role.GENERATION, num_blocks=64, tokens_per_block=16),
    )
    spec = api.HardwareSpec(
        OrchestratorConfig(executors),
        api.ModelSource(preset("tiny-llama", "float32"), seed=7),
        (api.Placement(1, (CONTEXT_RANK,)), api.Placement(2, (GENERATION_RANK,))),
        transport="mpi",
        leader_mode=True,
    )
    with api.Executor(spec) as executor:
        # The ids of the two phases are independent: whoever hands over keeps them apart.
        if MPI.COMM_WORLD.Get_rank() == CONTEXT_RANK:
            request_id = executor.enqueue_request(
                api.request(PROMPT, MAX_TOKENS, request_type=RequestType.CONTEXT_ONLY)
            )
            result = answer(executor.await_responses(request_id))
            print(f"context:    {list(result.output_token_ids)}", flush=True)
            handover = msgspec.msgpack.encode(result.context_phase_params)
            MPI.COMM_WORLD.Send([handover, MPI.BYTE], dest=GENERATION_RANK)
        else:
            params = msgspec.msgpack.decode(receive(MPI.COMM_WORLD, CONTEXT_RANK), type=ContextPhaseParams)
            request: Request = api.request(
                PROMPT, MAX_TOKENS, request_type=RequestType.GENERATION_ONLY, context_phase_params=params
            )
            request_id = executor.enqueue_request(request)
            result = answer(executor.await_responses(request_id))
            print(f"generation: {list(result.output_token_ids)}", flush=True)
        # Leaving the block drains: the context executor stays until its KV has been read.


def answer(responses):  # type: ignore[no-untyped-def]
    """The result of the one, final response."""
    (response,) = responses
    if response.has_error:
        raise RuntimeError(response.error_msg)
    return response.result


def receive(comm, source: int) -> bytearray:  # type: ignore[no-untyped-def]
    from mpi4py import MPI

    status = MPI.Status()
    comm.Probe(source, status=status)
    message = bytearray(status.Get_count(MPI.BYTE))
    comm.Recv([message, MPI.BYTE], source)
    return message


if __name__ == "__main__":
    if inside_mpi() is None:
        sys.exit(launch(__file__, num_ranks=2))
    serve()
