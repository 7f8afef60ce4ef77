"""A simulated cluster on SimPy's clock: one orchestrator, its executors, the links between them, and their messages.

`env.now` is integer picoseconds. Anything of a user's - a client, a fault, an autoscaler - is an ordinary SimPy process on
`cluster.env` that sleeps with `cluster.sleep(seconds)`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any, Final

import simpy

from ..core.commands import ORCHESTRATOR, AbortKv, Deliver, Dispatched, Drained, Record, Send, ServeKv, WakeAt
from ..core.config import OrchestratorConfig
from ..core.event_log import FORMAT, LoggedCore, LogHeader
from ..core.events import Arrive, Cancel, KvReceived, KvTaken, PeerDown, Report, RoleChanged, Wake
from ..core.executor import ExecutorCore
from ..core.grants import Launch
from ..core.orchestrator import OrchestratorCore
from ..core.overheads import LinkCost
from ..policies.vocabulary import PS_PER_S, Request
from .calls import MESSAGE, POLL, Environment
from .executor import SimulatedExecutor
from .layerwise import LayerwiseSends
from .link import Link
from .timing import ModelTiming, Timing

_WAKE: Final = Wake()
_ENDLESS: Final = 1 << 60  # the length of a sequence that nobody waits for any more
_LARGE: Final = 100  # executors


class SimulatedCluster:
    """`records` is given every finished row; `delivered` every Deliver to a user; `log_sink(core id)` gives the sink of
    that core's event log, or None for no log. `users_act` False says that nobody acts upon a Deliver, so that one may come
    after its instant; by default that is so where `delivered` is None. `link_cost(source, reader)` says more of a link than
    a rate and a latency that all have in common. `launch` holds (steps_per_grant, pipeline_depth, plan_ahead) of executors
    that launch more than one step ahead.
    """

    def __init__(
        self,
        config: OrchestratorConfig,
        timing: Timing,
        *,
        kv_bytes_per_token: int,
        link_bytes_per_s: float | Callable[[int, int], float] = 0.0,
        link_latency: int = 0,
        link_cost: Callable[[int, int], LinkCost] | None = None,
        launch: Mapping[int, tuple[int, int] | tuple[int, int, bool]] | None = None,
        records: Callable[[Any], None] | None = None,
        delivered: Callable[[Deliver], None] | None = None,
        log_sink: Callable[[int], Callable[[bytes], object] | None] | None = None,
        users_act: bool | None = None,
    ) -> None:
        self.env = Environment()
        self._calendar = self.env.calendar
        self.config = config
        self.timing = timing
        self.model = timing if type(timing) is ModelTiming else None  # known to be that, for what is asked often
        self._draining = self.model if self.model is not None and self.model.load_drains else None
        self.record = records if records is not None else _ignore
        self._delivered = delivered
        self._kv_bytes_per_token = kv_bytes_per_token
        self._link_rate = link_bytes_per_s
        self._link_latency = link_latency
        self._link_cost = link_cost
        self._links: dict[tuple[int, int], Link] = {}
        self._may_freeze = len(config.executors) >= _LARGE  # once: each time costs a whole collection
        self.layerwise = LayerwiseSends(self.env, kv_bytes_per_token, self._is_alive, self._transfer_over)
        self._mourned: set[tuple[int, int]] = set()  # (core, executor that it knows to be dead)
        self._hidden: dict[int, int] = {}  # user's request id: true output length
        self._lengths: dict[int, int] = {}  # executor-level id: true output length
        self._hidden_hashes: dict[int, tuple[int, ...]] = {}  # as those two, of the blocks of what is generated
        self._refused: int | None = None  # an id in use, until the core has refused another request of that id
        # executor-level id: max_tokens, and hashes of the blocks of what is generated
        self._output_hashes: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._polling = False
        self._may_be_late = timing.may_be_late
        self._users_act = delivered is not None if users_act is None else users_act
        self._late: list[
            tuple[int, int, int, Any]
        ] = []  # heap: (instant, priority, serial, what the orchestrator is told)
        self._reports_due: list[tuple[int, int]] = []  # heap: (instant, executor); stale ones are skipped there
        self._wake_serial = 0  # of the call that will wake the orchestrator, 0 for none
        self._ended: dict[int, list[Callable[[Deliver], object]]] = {}
        self._ended_now: dict[int, Deliver] = {}  # of the instant of the latest end
        self._ended_at = -1
        self.is_drained = False
        # bound once: compiled code would make an object of a method at every use
        self._call_tell: Callable[[tuple[int, Any]], None] = self._tell
        self._call_served: Callable[[tuple[int, ServeKv]], None] = self._served
        sink = log_sink(ORCHESTRATOR) if log_sink is not None else None
        core: Any = OrchestratorCore(config)
        self._is_holding = core.is_holding
        self._orchestrator: OrchestratorCore = core  # to ask it, past the log, what can wait
        self._is_logged = sink is not None
        self.core = core if sink is None else LoggedCore(core, LogHeader(FORMAT, orchestrator=config), sink)
        self.executors: dict[int, SimulatedExecutor] = {}
        for executor in config.executors:
            sink = log_sink(executor.id) if log_sink is not None else None
            core = ExecutorCore(executor, config.policy_root)
            if sink is not None:
                core = LoggedCore(core, LogHeader(FORMAT, executor=executor, policy_root=config.policy_root), sink)
            ahead = Launch(*(launch or {}).get(executor.id, ()))
            self.executors[executor.id] = SimulatedExecutor(executor, core, self, ahead)

    # ---- for users --------------------------------------------------------------------------------------------------

    @property
    def now(self) -> int:
        """Picoseconds since the start."""
        return self._calendar.now

    @property
    def now_s(self) -> float:
        return float(self.env.now) / PS_PER_S

    def sleep(self, seconds: float) -> simpy.Event:
        """An event that fires after `seconds`, rounded to whole picoseconds."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"cannot sleep for {seconds} s")
        return self.env.timeout(round(seconds * PS_PER_S))

    def submit(self, request: Request, num_output_tokens: int, output_hashes: tuple[int, ...] = ()) -> None:
        """A user sends `request` now. The world will end it after `num_output_tokens`; no core is told.

        `output_hashes` go on where `request.block_hashes` end: of the blocks that hold what is generated, for later
        requests whose prompt has the answer in it. A request whose id is in use is refused.
        """
        if request.id in self._hidden:
            self._hear_due()  # of its end, perhaps
        if request.id in self._hidden:
            self._refused = request.id
        else:
            self._hidden[request.id] = num_output_tokens
            if output_hashes:
                self._hidden_hashes[request.id] = output_hashes
        self._give(Arrive(request))

    def submit_at(self, at: int, request: Request, num_output_tokens: int, output_hashes: tuple[int, ...] = ()) -> None:
        """Send `request` at the instant `at` (picoseconds)."""
        self._calendar.call_at(
            at, MESSAGE, lambda item: self.submit(*item), (request, num_output_tokens, output_hashes)
        )

    def finished(self, request_id: int) -> simpy.Event:
        """An event that fires when the request ends; its value is the Deliver. For use in SimPy processes.

        To be asked for once it is submitted, and no later than in the instant of its end: else ValueError.
        """
        self._hear_due()
        event = self.env.event()
        if request_id not in self._hidden:
            if self._ended_at != self.env.now or request_id not in self._ended_now:
                raise ValueError(f"request {request_id} is not under way: it has ended, or was not submitted yet")
            event.succeed(self._ended_now[request_id])
            return event
        self._hurry()  # its end may be on its way already
        self._ended.setdefault(request_id, []).append(lambda deliver: event.succeed(deliver))
        return event

    def cancel(self, request_id: int) -> None:
        self._give(Cancel(request_id))

    def change_role(self, executor: int, role: str) -> None:
        """An operator gives the executor another role: context, generation, mixed or parked. Recorded, also if refused."""
        self._give(RoleChanged(executor, role))

    def kill(self, executor: int, notice_after: int = PS_PER_S) -> None:
        """The executor dies now; the others are told `notice_after` picoseconds later."""
        self.executors[executor].kill()
        for peer in (ORCHESTRATOR, *self.executors):
            if peer != executor:
                self._calendar.call_at(
                    self.env.now + notice_after, MESSAGE + executor, self._tell, (peer, PeerDown(executor))
                )

    def run(self, until_s: float | None = None) -> None:
        """Run until nothing is left to happen, or until `until_s`."""
        freezes, self._may_freeze = self._may_freeze, False
        with _seldom_collected(freezes):
            self._run(until_s)

    def _run(self, until_s: float | None) -> None:
        if until_s is not None:
            until = round(until_s * PS_PER_S)
            self.env.run(until=until)
            self._hear_late(until, 0, 0)
            return
        self.env.run()
        while self._late or self._reports_due:
            soonest = min(heap[0][0] for heap in (self._late, self._reports_due) if heap)
            if self._late and self._late[0][0] == soonest:  # else a report is due, which may have been made since
                self._calendar.now = max(self._calendar.now, soonest)
            self._hear_late(soonest + 1, 0, 0)
            self.env.run()

    def count_events(self) -> int:
        """Calls and SimPy events so far: the simulator's unit of work. What was taken back before its time is none."""
        return self.env.calendar.num_calls

    # ---- the world of the orchestrator's core -----------------------------------------------------------------------

    def _give(self, event: Any) -> None:
        calendar, late = self._calendar, self._late
        now = calendar.now
        if late or self._reports_due:
            self._hear_late(now, calendar.priority, calendar.serial)
        if self._polling:
            self._obey(self._handle(event, now, True), now)
        elif self._users_act or calendar.is_due(now):
            self._obey(self._handle(event, now, True), now)
            if calendar.is_due(now):  # by now a user may have more to say
                self._polling = True
                calendar.call_at(now, POLL, self._poll, None)
            else:
                self._end_instant(now)
        elif late and late[0][0] == now:
            self._obey(self._handle(event, now, True), now)
            self._end_instant(now)
        else:
            self._obey(self._handle(event, now, False), now)

    def _handle(self, event: Any, now: int, more: bool) -> list[Any]:
        if self._is_logged:
            commands: list[Any] = self.core.handle(event, now, more)
            return commands
        return self._orchestrator.handle(event, now, more)  # known to be a core, which a compiled caller calls directly

    def _poll(self, _: None) -> None:
        self._polling = False
        self._end_instant(self._calendar.now)

    def _end_instant(self, now: int) -> None:
        late = self._late
        while late and late[0][0] == now:
            self._obey(self._handle(heappop(late)[3], now, True), now)
        self._obey(self._handle(None, now, False), now)

    # What nobody waits for is heard late: the report of an executor, and the end of a request where no user acts upon it,
    # lie ready, each with its instant and its place in it, until the orchestrator is next given anything. It hears them
    # first, at their own instants, so that it decides, and logs, the same. A report that is due by time alone is asked for
    # then too. While requests are held back every report may start one, and all of this happens in time.

    def _hear_late(self, now: int, priority: int, serial: int) -> None:
        """Give the orchestrator what it should have heard before this place in time."""
        due, late = self._reports_due, self._late
        while due and due[0][0] < now:
            self.executors[heappop(due)[1]].report_if_due(now)
        only_notes = not self._is_logged and self._orchestrator.only_notes_reports
        while late:
            first = late[0]
            if first[0] >= now and (first[0] > now or (first[1], first[2]) >= (priority, serial)):
                return
            at, _, _, message = heappop(late)
            if only_notes and type(message) is Report:
                self._orchestrator.note(message, at)
                continue
            more = at == now or (bool(late) and late[0][0] == at and not only_notes)
            commands = self._handle(message, at, more)
            if commands:
                self._obey(commands, at)

    def _hear_due(self) -> None:
        """Give the orchestrator what it should have heard by now."""
        self._hear_late(self._calendar.now, self._calendar.priority, self._calendar.serial)

    def _hurry(self) -> None:
        """From now on nothing is late."""
        late, calendar = self._late, self._calendar
        while late:
            at, priority, serial, message = heappop(late)
            calendar.call_in_place(at, priority, serial, self._tell, (ORCHESTRATOR, message))
        due, self._reports_due = self._reports_due, []
        for executor in sorted({executor for _, executor in due}):
            self.executors[executor].hurry()

    @property
    def may_be_late(self) -> bool:
        """Whether the orchestrator need not hear at once of what cannot make it act."""
        return self._may_be_late and not self._is_holding

    @property
    def answers_may_be_late(self) -> bool:
        """Whether the same goes for the answers to requests that ended by themselves."""
        return self.may_be_late and not self._users_act and not self._ended and self._orchestrator.can_wait_for_ends

    def report_due(self, at: int, executor: int) -> None:
        """`executor` has something to tell at `at`; to be called only where it may be late."""
        heappush(self._reports_due, (at, executor))

    def _can_wait(self, message: Any) -> bool:
        if not self._may_be_late or self._is_holding:
            return False
        if type(message) is not Report and (self._users_act or self._ended):
            return False
        return self._orchestrator.can_wait(message)

    def _obey(self, commands: list[Any], now: int) -> None:
        for command in commands:
            kind = type(command)
            if kind is Record:
                self.record(command.row)
            elif kind is Send:
                self.send(ORCHESTRATOR, command.to, command.message, now)
            elif kind is Dispatched:
                executor_request = command.executor_request.id
                self._lengths[executor_request] = self._hidden[command.request_id]
                if command.request_id in self._hidden_hashes:
                    hashes = self._hidden_hashes[command.request_id]
                    self._output_hashes[executor_request] = (command.executor_request.max_tokens, hashes)
            elif kind is Deliver:
                self._deliver(command, now)
            elif kind is WakeAt:
                if self._wake_serial:
                    self._calendar.take_back(self._wake_serial)
                    self._wake_serial = 0
                if command.at is not None:
                    at, place = self.timing.wake(ORCHESTRATOR, command.at, now)
                    self._wake_serial = self._calendar.call_at(at, MESSAGE + place, self._wake, None)
            elif kind is Drained:
                self.is_drained = True
        if self._orchestrator.is_holding is not self._is_holding:
            self._is_holding = not self._is_holding
            if self._is_holding:
                self._hurry()

    def _wake(self, _: None) -> None:
        self._wake_serial = 0
        self._give(_WAKE)

    def _deliver(self, deliver: Deliver, now: int) -> None:
        if self._delivered is not None:
            self._delivered(deliver)
        if deliver.finish_reason is not None:
            if deliver.request_id == self._refused:  # the first of that id is served still
                self._refused = None
                return
            if self._ended_at != now:
                self._ended_at = now
                self._ended_now.clear()
            self._ended_now[deliver.request_id] = deliver
            if self._ended:
                for call in self._ended.pop(deliver.request_id, ()):
                    call(deliver)
            self._hidden.pop(deliver.request_id, None)
            self._hidden_hashes.pop(deliver.request_id, None)

    # ---- the world between cores ------------------------------------------------------------------------------------

    def executor(self, executor: int) -> SimulatedExecutor:
        return self.executors[executor]

    def true_length(self, executor_request: int) -> int:
        return self._lengths.get(executor_request, _ENDLESS)

    def forget(self, executor_request: int) -> None:
        """It has been answered."""
        self._lengths.pop(executor_request, None)
        self._output_hashes.pop(executor_request, None)

    @property
    def names_outputs(self) -> bool:
        """Whether the blocks of anything generated have names."""
        return bool(self._output_hashes)

    def output_hashes(self, generated: Iterable[tuple[int, int]]) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Of those of these (request, tokens generated) that have ended, what is known, as `StepsDone.block_hashes` has it."""
        found = []
        for executor_request, num_tokens in generated:
            max_tokens, hashes = self._output_hashes.get(executor_request, (0, ()))
            if hashes and num_tokens >= min(max_tokens, self.true_length(executor_request)):
                found.append((executor_request, hashes))
        return tuple(sorted(found))

    def send(self, sender: int, to: int, message: Any, now: int) -> None:
        if self.model is not None:
            at, place = self.model.message_arrives(sender, to, now, message)
        else:
            at, place = self.timing.message_arrives(sender, to, now, message)
        calendar = self._calendar
        if to == ORCHESTRATOR and self._can_wait(message):
            heappush(self._late, (at, MESSAGE + place, calendar.next_serial(), message))
        else:
            calendar.call_at(at, MESSAGE + place, self._call_tell, (to, message))

    def tell(self, core: int, event: Any) -> None:
        """Give `event` to a core now, as if the world had seen it happen."""
        if type(event) is PeerDown:
            self._mourned.add((core, event.executor))
        if core == ORCHESTRATOR:
            self._give(event)
        else:
            self.executors[core].give(event)

    def _tell(self, item: tuple[int, Any]) -> None:
        core, event = item
        self.tell(core, event)

    def serve_kv(self, source: int, command: ServeKv) -> None:
        if not command.ok:
            self.send(source, command.reader, KvReceived(command.reader_id, False, command.error), self.env.now)
            return
        if self._draining is not None:
            self._draining.kv_leaves(source, self.env.now)
        ends = None if self.model is not None else self.timing.transfer_ends(source, command)  # a model has no such
        if ends is None and command.num_written is not None:
            link = self.link(source, command.reader)
            self.layerwise.begin(source, command, link, self.executors[source].running_step)
            return
        if ends is None:
            num_bytes = command.num_tokens * self._kv_bytes_per_token
            link = self.link(source, command.reader)
            link.transfer(num_bytes, self._call_served, (source, command), len(command.blocks))
            return
        events = (command.reader, KvReceived(command.reader_id, True)), (source, KvTaken(command.request_id))
        for (at, place), item in zip(ends, events, strict=True):
            self._calendar.call_at(at, MESSAGE + place, self._tell, item)

    def _served(self, item: tuple[int, ServeKv]) -> None:
        source, command = item
        self._transfer_over(source, command, None)

    def _transfer_over(self, source: int, command: ServeKv, error: str | None) -> None:
        """The end of a transfer: the reader has its KV and the source is rid of its pin, at one instant."""
        if self._draining is not None:
            self._draining.kv_left(source, self.env.now)
        if self._is_alive(source):  # else the rest of it was never sent, and the reader learns of it otherwise
            self.tell(command.reader, KvReceived(command.reader_id, error is None, error))
        if (source, command.reader) not in self._mourned:  # else it was rid of its pin when it heard of the death
            self.tell(source, KvTaken(command.request_id, error is None))

    def abort_kv(self, source: int, command: AbortKv) -> None:
        """The source sends nothing more: the reader hears of it when a message would get there."""
        serve = self.layerwise.abort(source, command.request_id, command.reason)
        if serve is not None:
            at, place = self.timing.message_arrives(source, serve.reader, self.env.now, command)
            self._calendar.call_at(
                at, MESSAGE + place, lambda reason: self._transfer_over(source, serve, reason), command.reason
            )

    def _is_alive(self, executor: int) -> bool:
        return self.executors[executor].is_alive

    def link(self, source: int, reader: int) -> Link:
        """The link in this direction, made when it is first used."""
        link = self._links.get((source, reader))
        if link is None:
            if self._link_cost is not None:
                cost = self._link_cost(source, reader)
            else:
                rate = self._link_rate(source, reader) if callable(self._link_rate) else self._link_rate
                cost = LinkCost(rate, self._link_latency)
            link = self._links[source, reader] = Link(self.env, cost.bytes_per_s, cost.fixed, source, cost.page)
        return link

    def drained(self, executor: int) -> None:
        """An executor has nothing left after its shutdown."""


@contextmanager
def _seldom_collected(freezes: bool) -> Iterator[None]:
    """Python's collector looks for cycles after every 700 new objects by default; a simulation makes many and hardly any
    cycle. Looking after every 50,000, and with `freezes` never through what was there before, costs a few MB and saves one
    twentieth of a run, more of a large cluster.
    """
    thresholds, freezes = gc.get_threshold(), freezes and not gc.get_freeze_count()
    if thresholds[0]:  # else it is off
        gc.set_threshold(max(50_000, thresholds[0]), *thresholds[1:])
    if freezes:
        gc.collect()  # thawing makes everything old: what an earlier cluster left would wait there for good
        gc.freeze()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if freezes:
            gc.unfreeze()


def _ignore(row: Any) -> None:
    pass
