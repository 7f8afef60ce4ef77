"""Requests that move while something happens to them or to an executor: 1 context and 3 generation executors, of which the
second has two ranks. Rank 0 checks.

Moves are ordered, and what is to happen is hung upon their moments: a request was told to move; its generation phase has just
been sent to where it goes on, which has yet to ask for the KV that its former executor holds.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from disagg.core.config import PolicySpec
from disagg.core.event_log import read_log, replay_frames
from disagg.core.executor import ExecutorCore
from disagg.core.tables import RequestRow
from disagg.policies import MigrationPolicy, MoveRequest, RoutingPolicy, registry
from disagg.policies.vocabulary import PS_PER_MS, FinishReason, Request, Route, Stage
from disagg.runtime.api import DisaggExecutorOrchestrator, request, serve
from disagg.runtime.executor_spec import ModelSource
from disagg.runtime.launcher import inside_mpi
from tests.runtime_programs.clusters import cluster, context, generation
from tests.tiny_models import SHAPES, Script, make_engine, prompts

SHAPE = SHAPES["llama"]
CONTEXT, GENERATION = 1, (2, 3, 4)
NUM_TOKENS = 200
NUM_BLOCKS = 800
PROMPTS = prompts(SHAPE, [5, 19, 12, 7, 9, 14], seed=5)
Hook = Callable[[], object]

to_start_at: dict[int, int] = {}  # request: the executor that is to generate for it
to_move: dict[int, int] = {}  # request: where it is to go on
when_told: dict[int, Hook] = {}
after_told: list[Hook] = []  # when the policy is asked the next time
when_sent: dict[int, Hook] = {}


@registry.register("as ordered", kind="routing", source="this test")
class AsOrdered(RoutingPolicy):
    """Where a request was to start; anywhere if that is gone."""

    def route_context(self, request: Request, fleet: Any) -> Route:
        return Route(context=CONTEXT)

    def route_generation(self, request: Request, fleet: Any) -> Route:
        healthy = [row.executor_id for row in fleet.generation.healthy_rows]
        first = to_start_at.get(request.id)
        return Route(generation=first if first in healthy else healthy[-1])

    def on_dispatched(self, request: Request, stage: Stage, executor: int, fleet: Any) -> None:
        if stage is Stage.GENERATION and executor != to_start_at.get(request.id):
            when_sent.pop(request.id, int)()


@registry.register("as ordered", kind="migration", source="this test")
class MovesAsOrdered(MigrationPolicy):
    """Tells a request to move as soon as it is where it was to start."""

    interval_ps = PS_PER_MS

    def migrate(self, fleet: Any, movable: Mapping[int, Sequence[Request]]) -> list[MoveRequest]:
        while after_told:
            after_told.pop()()
        here = [each.id for requests in movable.values() for each in requests if each.id in to_move]
        moves = [MoveRequest(request_id, to_move.pop(request_id)) for request_id in here]
        for move in moves:
            when_told.pop(move.request_id, int)()
        return moves


def spec() -> Any:
    layouts = [context(), *(generation(tp=2 if e == 3 else 1, num_blocks=NUM_BLOCKS) for e in GENERATION)]
    made = cluster(
        ModelSource(SHAPE, seed=3), layouts, steps_per_grant=2, pipeline_depth=2, plan_ahead=True, record_margins=False
    )
    ordered = PolicySpec("as ordered")
    config = replace(made.orchestrator, context_router=None, generation_router=None, router=ordered, migration=ordered)
    return replace(made, orchestrator=config)


def check(condition: object, what: object) -> None:
    if not condition:
        raise RuntimeError(f"not so: {what}")


def expected(prompt: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(Script([make_engine(SHAPE)]).generate(0, prompt, NUM_TOKENS))


class Moving:
    def __init__(self) -> None:
        self.cluster = DisaggExecutorOrchestrator(spec())
        self.pids = {info.executor: info.pid for info in self.cluster.ranks}  # of the last of its ranks
        self.answers = {prompt: expected(prompt) for prompt in PROMPTS}
        self.tokens: dict[int, tuple[int, ...]] = {}  # that have come, by request

    def start(self, prompt: tuple[int, ...], executor: int) -> int:
        """It runs on `executor`: a few of its tokens are out."""
        request_id = len(self.tokens) + 1
        to_start_at[request_id] = executor
        given = self.cluster.submit(request(prompt, NUM_TOKENS, streaming=True))
        check(given == request_id, "ids count up")
        self.tokens[request_id] = ()
        while len(self.tokens[request_id]) < 3:
            check(self._take(request_id) is None, "it runs on")
        return request_id

    def _take(self, request_id: int) -> FinishReason | None:
        """The tokens that have come since; the reason, if it has ended."""
        for response in self.cluster.await_responses(request_id, timeout=60):
            check(not response.has_error, response)
            self.tokens[request_id] += response.result.output_token_ids
            if response.result.is_final:
                return response.result.finish_reasons[0]
        return None

    def end(self, request_id: int) -> FinishReason:
        while (reason := self._take(request_id)) is None:
            pass
        return reason

    def kill(self, executor: int) -> None:
        """One of its ranks, which does not lead it where it has two."""
        os.kill(self.pids[executor], signal.SIGKILL)

    def check_whole(self, request_id: int, prompt: tuple[int, ...]) -> None:
        check(self.end(request_id) is FinishReason.LENGTH, "it went on to its end")
        check(self.tokens[request_id] == self.answers[prompt], f"request {request_id} says what one engine says")

    # ---- what happens -----------------------------------------------------------------------------------------------

    def cancelled_at_every_moment(self) -> None:
        """Told to move and not answered; answered, which nobody has heard; sent on; and some tenths of a millisecond later,
        while its KV travels or has come.
        """
        out = []
        stays = self.start(PROMPTS[0], 2)
        for delay_s in (None, 0.0, 0.0002, 0.0005, 0.001, 0.003):
            request_id = self.start(PROMPTS[1], 2)
            out.append(request_id)

            def cancel(request_id: int = request_id, delay_s: float | None = delay_s) -> None:
                if delay_s:
                    threading.Timer(delay_s, self.cluster.cancel_request, (request_id,)).start()
                else:
                    self.cluster.cancel_request(request_id)

            (when_told if delay_s is None else when_sent)[request_id] = cancel
            to_move[request_id] = 3
        crossing = self.start(PROMPTS[1], 2)
        out.append(crossing)

        def cancel_late() -> None:
            time.sleep(0.05)  # in the orchestrator's thread: the answer comes meanwhile, and is heard after the cancel
            self.cluster.cancel_request(crossing)

        when_told[crossing] = lambda: after_told.append(cancel_late)
        to_move[crossing] = 3
        for request_id in out:
            check(self.end(request_id) is FinishReason.CANCELLED, f"request {request_id} was cancelled")
            told = self.tokens[request_id]
            check(told == self.answers[PROMPTS[1]][: len(told)] and len(told) < NUM_TOKENS, "cut short, nothing else")
        self.check_whole(stays, PROMPTS[0])
        self.check_nothing_is_held(2, 3)

    def check_nothing_is_held(self, *executors: int) -> None:
        deadline = time.monotonic() + 20
        for executor in executors:
            while (report := self.cluster.latest_report(executor)) is None or report.blocks_free < NUM_BLOCKS:
                check(time.monotonic() < deadline, f"all blocks of executor {executor} come free: {report}")
                time.sleep(0.01)

    def target_dies(self) -> None:
        """With one request on its way to it, one that it runs, and one that it has nothing to do with."""
        there, elsewhere, moving = self.start(PROMPTS[3], 3), self.start(PROMPTS[0], 2), self.start(PROMPTS[2], 2)
        when_sent[moving] = lambda: self.kill(3)
        to_move[moving] = 3
        for request_id, prompt in ((moving, PROMPTS[2]), (there, PROMPTS[3]), (elsewhere, PROMPTS[0])):
            self.check_whole(request_id, prompt)

    def source_dies(self) -> None:
        """While it holds the KV of one request that was sent on, and runs one, and holds none of a third."""
        there, elsewhere, moving = self.start(PROMPTS[5], 2), self.start(PROMPTS[0], 4), self.start(PROMPTS[4], 2)
        when_sent[moving] = lambda: self.kill(2)
        to_move[moving] = 4
        for request_id, prompt in ((moving, PROMPTS[4]), (there, PROMPTS[5]), (elsewhere, PROMPTS[0])):
            self.check_whole(request_id, prompt)

    def shut_down(self) -> None:
        record = self.cluster.shutdown()
        check(record is not None, "a first shutdown tells what happened")
        check(not (to_move or when_told or when_sent), (to_move, when_told, when_sent))
        attempts = [row.num_attempts for row in record.rows if isinstance(row, RequestRow)]
        # twice, where a reader hears of a death before the orchestrator, which then sends the request to the dead once more
        again = [number for number in attempts if number > 1]
        check(len(attempts) == 14 and len(again) == 4, f"who lost its KV was computed again: {attempts}")
        for executor in (CONTEXT, 4):
            header, frames = read_log(record.logs[executor])
            check(header.executor is not None, executor)
            core = ExecutorCore(header.executor)
            check(replay_frames(core, frames) > 0, "its log replays")
            core.check()
            check(not core.visits and core.blocks.num_free == header.executor.num_blocks, f"{executor} holds nothing")


def main() -> None:
    world = inside_mpi()
    if world is None or world.rank != 0:
        serve(spec())
        return
    moving = Moving()
    moving.cancelled_at_every_moment()
    moving.target_dies()
    moving.source_dies()
    moving.shut_down()
    print("all is well", flush=True)


main()
