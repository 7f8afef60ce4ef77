"""Orchestrator mode through the public API: executors 1 context, 2 generation, 3 mixed. Rank 0 checks everything."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from disagg.core.config import SchedulerConfig
from disagg.core.event_log import replay
from disagg.core.events import Report
from disagg.core.tables import DecisionRow
from disagg.policies.vocabulary import PS_PER_MS, FinishReason, Request, RequestType, Role
from disagg.runtime.api import DisaggExecutorOrchestrator, Response, TokenError, UnknownRequestError, request, serve
from disagg.runtime.executor_spec import ModelSource, SpecError
from disagg.runtime.launcher import inside_mpi
from tests.runtime_programs.clusters import NUM_BLOCKS, cluster, context, generation, mixed
from tests.tiny_models import SHAPES, Script, make_engine, prompts

SHAPE = SHAPES["llama"]
CONTEXT, GENERATION, MIXED = 1, 2, 3
LEASE_MS = 400
SPEC = cluster(
    ModelSource(SHAPE, seed=3),
    [
        context(lease=LEASE_MS * PS_PER_MS),
        generation(),
        mixed(scheduler=SchedulerConfig(max_batch_size=1, max_num_tokens=16)),
    ],
    record_margins=False,
)
PROMPTS = prompts(SHAPE, [5, 19, 12, 7], seed=5)


def expected(prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    return tuple(Script([make_engine(SHAPE)]).generate(0, prompt, num_tokens))


def check(condition: object, what: object) -> None:
    if not condition:
        raise RuntimeError(f"not so: {what}")


def refused(kind: type[Exception], call: Callable[[], Any], words: str) -> None:
    try:
        call()
    except kind as error:
        check(words in str(error), error)
        return
    raise RuntimeError(f"was not refused: {words}")


def result(response: Response) -> Any:
    check(not response.has_error, response)
    return response.result


def context_only(prompt: tuple[int, ...], num_tokens: int, **fields: Any) -> Request:
    return request(prompt, num_tokens, request_type=RequestType.CONTEXT_ONLY, **fields)


def generation_only(prompt: tuple[int, ...], num_tokens: int, params: Any, **fields: Any) -> Request:
    kind = RequestType.GENERATION_ONLY
    return request(prompt, num_tokens, request_type=kind, context_phase_params=params, **fields)


def routed_by_policy(cluster: DisaggExecutorOrchestrator) -> None:
    ids = [cluster.submit(request(prompt, 10)) for prompt in PROMPTS]
    check(len(set(ids)) == 4, "ids are distinct")
    (one,) = cluster.await_responses(ids[2])
    check(result(one).output_token_ids == expected(PROMPTS[2], 10), "one id")
    many = cluster.await_responses([ids[0], ids[1]])
    for prompt, (response,) in zip(PROMPTS, many):
        check(result(response).output_token_ids == expected(prompt, 10), "many ids")
        check(response.result.is_final and response.result.finish_reasons == (FinishReason.LENGTH,), response)
        check(response.result.decoding_iter == 10 and response.result.sequence_index == 0, response)
    (last,) = cluster.await_responses(timeout=30)
    check(last.request_id == ids[3], "any id")
    began = time.monotonic()
    check(cluster.await_responses(timeout=0.2) == [], "nothing is left")
    check(0.15 < time.monotonic() - began < 5, "the time-out is kept")
    refused(UnknownRequestError, lambda: cluster.await_responses(ids[0]), "taken already")
    slow = cluster.submit(request(PROMPTS[0], 150))
    check(cluster.await_responses(slow, timeout=0.001) == [], "not yet")
    check(cluster.await_responses([slow], timeout=0.001) == [[]], "not yet")
    (done,) = cluster.await_responses(slow)
    check(result(done).output_token_ids == expected(PROMPTS[0], 150), "late, but there")


def streaming(cluster: DisaggExecutorOrchestrator) -> None:
    request_id = cluster.submit(request(PROMPTS[1], 30, streaming=True))
    parts = []
    while not parts or not parts[-1].is_final:
        parts += [result(response) for response in cluster.await_responses(request_id, timeout=30)]
    tokens = sum((part.output_token_ids for part in parts), ())
    check(tokens == expected(PROMPTS[1], 30), f"every token once, in order: {tokens}")
    check(len(parts) > 5, f"tokens came one by one, in {len(parts)} parts")
    check(len(parts[0].output_token_ids) == 1, "the context's first token did not wait for the second")


def routed_by_the_caller(cluster: DisaggExecutorOrchestrator) -> None:
    check(cluster.context_executors == [CONTEXT, MIXED], cluster.context_executors)
    check(cluster.generation_executors == [GENERATION, MIXED], cluster.generation_executors)
    for source, reader in ((CONTEXT, GENERATION), (CONTEXT, MIXED), (MIXED, GENERATION)):
        first_ids = cluster.enqueue_context([context_only(prompt, 9) for prompt in PROMPTS[:2]], source)
        seconds = []
        for prompt, first_id in zip(PROMPTS, first_ids):
            (response,) = cluster.await_context_responses(first_id, timeout=30)
            first = result(response)
            params = first.context_phase_params
            check(first.is_final and params.executor == source, first)
            check(first.output_token_ids == params.first_gen_tokens == expected(prompt, 1), first)
            seconds += cluster.enqueue_generation([generation_only(prompt, 9, params)], reader)
        check(not set(first_ids) & set(seconds), "ids of the phases are independent")
        for prompt, (response,) in zip(PROMPTS, cluster.await_generation_responses(seconds, timeout=30)):
            check(result(response).output_token_ids == expected(prompt, 9), "the first token is in both responses")
    (ended,) = cluster.await_context_responses(cluster.enqueue_context([context_only(PROMPTS[0], 1)], CONTEXT)[0])
    check(ended.result.context_phase_params is None and ended.result.finish_reasons == (FinishReason.LENGTH,), ended)


def refusals(cluster: DisaggExecutorOrchestrator) -> None:
    whole, half = request(PROMPTS[0], 4), context_only(PROMPTS[0], 4)
    refused(SpecError, lambda: cluster.submit(half), "allowed here: CONTEXT_AND_GENERATION")
    refused(SpecError, lambda: cluster.enqueue_context([whole], CONTEXT), "allowed here: CONTEXT_ONLY")
    refused(SpecError, lambda: cluster.enqueue_generation([half], GENERATION), "allowed here: GENERATION_ONLY")
    refused(SpecError, lambda: cluster.enqueue_context([half], GENERATION), "allowed: [1, 3]")
    refused(TokenError, lambda: cluster.submit(request((1, 2, 10**6), 4)), "outside 0 to 204")
    lonely = cluster.enqueue_generation([generation_only(PROMPTS[0], 4, None)], GENERATION)
    (response,) = cluster.await_generation_responses(lonely[0], timeout=30)
    check(response.has_error and "needs context_phase_params" in response.error_msg, response)


def cancels(cluster: DisaggExecutorOrchestrator) -> None:
    def cancelled(response: Response) -> bool:
        return result(response).is_final and response.result.finish_reasons == (FinishReason.CANCELLED,)

    running = cluster.submit(request(PROMPTS[0], 200, streaming=True))
    check(len(cluster.await_responses(running, timeout=30)) == 1, "it runs")
    cluster.cancel_request(running)
    final = cluster.await_responses(running, timeout=30)[-1]
    while not final.result.is_final:
        final = cluster.await_responses(running, timeout=30)[-1]
    check(cancelled(final) and final.result.decoding_iter < 200, final)
    # a mixed executor with one place: the second waits in its queue
    first, second = (cluster.enqueue_context([context_only(PROMPTS[1], 40)], MIXED)[0] for _ in range(2))
    cluster.cancel_request(second)
    check(cluster.await_context_responses(first, timeout=30)[0].result is not None, "the first goes on")
    response = cluster.await_context_responses(second, timeout=30)[0]
    check(cancelled(response) or response.result.context_phase_params is not None, "the second was cancelled, or done")
    # held KV: a cancel frees it, and a reader is told so
    held = cluster.enqueue_context([context_only(PROMPTS[2], 8)], CONTEXT)[0]
    params = cluster.await_context_responses(held, timeout=30)[0].result.context_phase_params
    cluster.cancel_request(params.req_id)
    late = cluster.enqueue_generation([generation_only(PROMPTS[2], 8, params)], GENERATION)[0]
    (response,) = cluster.await_generation_responses(late, timeout=30)
    check(response.has_error and "cancelled" in response.error_msg, response)
    # KV asked for, in flight or there
    held = cluster.enqueue_context([context_only(PROMPTS[2], 200)], CONTEXT)[0]
    params = cluster.await_context_responses(held, timeout=30)[0].result.context_phase_params
    pulled = cluster.enqueue_generation([generation_only(PROMPTS[2], 200, params)], GENERATION)[0]
    cluster.cancel_request(pulled)
    check(cancelled(cluster.await_generation_responses(pulled, timeout=30)[0]), "cancelled on its way")
    cluster.cancel_request(12345)  # unknown: ignored


def roles_change(cluster: DisaggExecutorOrchestrator) -> None:
    """Under load: all that was sent is answered, with the right tokens, whoever had become what by then."""
    changes = [(GENERATION, Role.MIXED), (CONTEXT, Role.GENERATION), (GENERATION, Role.CONTEXT), (MIXED, Role.PARKED)]
    back = [(MIXED, Role.MIXED), (GENERATION, Role.GENERATION), (CONTEXT, Role.CONTEXT)]
    sent: list[tuple[int, tuple[int, ...]]] = []

    def check_first(number: int) -> None:
        for request_id, prompt in [sent.pop(0) for _ in range(number)]:
            (response,) = cluster.await_responses(request_id)
            check(result(response).output_token_ids == expected(prompt, 40), request_id)

    for executor, role in changes + back:
        sent += [(cluster.submit(request(prompt, 40)), prompt) for prompt in PROMPTS[:2]]
        cluster.change_role(executor, role)  # while they run, and those before them
        if len(sent) > 4:
            check_first(2)
    check_first(len(sent))
    check(cluster.context_executors == [CONTEXT, MIXED], cluster.context_executors)
    # KV that is where it is to be used is taken over in place
    first = cluster.enqueue_context([context_only(PROMPTS[1], 9)], MIXED)[0]
    params = cluster.await_context_responses(first, timeout=30)[0].result.context_phase_params
    here = cluster.enqueue_generation([generation_only(PROMPTS[1], 9, params)], MIXED)[0]
    (response,) = cluster.await_generation_responses(here, timeout=30)
    check(result(response).output_token_ids == expected(PROMPTS[1], 9), "in place")
    refused(SpecError, lambda: cluster.change_role(9, Role.MIXED), "there is no executor 9")
    refused(SpecError, lambda: cluster.change_role(MIXED, "prefill"), "'prefill' is no role; allowed: context,")  # type: ignore[arg-type]


def leases(cluster: DisaggExecutorOrchestrator) -> None:
    """A lease is swept without any new work, and whoever comes later is told."""
    held = cluster.enqueue_context([context_only(PROMPTS[3], 8)], CONTEXT)[0]
    params = cluster.await_context_responses(held, timeout=30)[0].result.context_phase_params
    began = time.monotonic()
    while True:
        report = cluster.latest_report(CONTEXT)
        if report is not None and report.blocks_free == NUM_BLOCKS and time.monotonic() - began > LEASE_MS / 2000:
            break
        check(time.monotonic() - began < 4 * LEASE_MS / 1000, f"the lease ran out in time: {report}")
        time.sleep(0.01)
    late = cluster.enqueue_generation([generation_only(PROMPTS[3], 8, params)], GENERATION)[0]
    (response,) = cluster.await_generation_responses(late, timeout=30)
    check(response.has_error and "its lease ran out" in response.error_msg, response)


def main() -> None:
    world = inside_mpi()
    if world is None or world.rank != 0:
        serve(SPEC)
        return
    drain = sys.argv[1] == "drain"
    cluster = DisaggExecutorOrchestrator(SPEC)
    check([info.rank for info in cluster.ranks] == [1, 2, 3], cluster.ranks)
    if drain:
        for scenario in (routed_by_policy, streaming, routed_by_the_caller, refusals, cancels, roles_change, leases):
            scenario(cluster)
    out = [cluster.submit(request(prompt, 150)) for prompt in PROMPTS]
    direct = cluster.enqueue_context([context_only(PROMPTS[0], 150)], CONTEXT)
    record = cluster.shutdown(drain=drain)
    check(record is not None, "a first shutdown tells what happened")
    for prompt, (response,) in zip(PROMPTS, cluster.await_responses(out, timeout=0)):
        if drain:
            check(result(response).output_token_ids == expected(prompt, 150), "drained")
        else:
            check(response.has_error and "was shut down" in response.error_msg, response)
    check(len(cluster.await_context_responses(direct[0], timeout=0)) == 1, "the direct one was answered too")
    refused(RuntimeError, lambda: cluster.submit(request(PROMPTS[0], 4)), "is shut down")
    roles = [row.answer for row in record.rows if isinstance(row, DecisionRow) and row.stage == "role"]
    check(not drain or (len(roles) > 7 and "drained" in roles and "refused" not in roles), roles)
    check(all(replay(log) > 0 for log in record.logs.values()), "every log replays")
    last = [cluster.latest_report(executor) for executor in (CONTEXT, GENERATION, MIXED)]
    check(not drain or all(isinstance(report, Report) for report in last), last)
    print("all is well", flush=True)


main()
