"""One simulated executor: turns its core's commands into instants of virtual time. Decides nothing.

It is the world to its core: it alone knows the true output lengths, and it ends sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ..core.commands import (
    AbortKv,
    Drained,
    PrepareReceive,
    ReceiveKv,
    Record,
    RunSteps,
    Send,
    ServeKv,
    StopAfterStep,
    WakeAt,
)
from ..core.config import ExecutorConfig
from ..core.events import (
    Enqueue,
    KvRequested,
    Report,
    Response,
    StepsCommitted,
    StepsDone,
    Stopped,
    Wake,
    stops_in_order,
)
from ..core.grants import Launch, granted_through, grants_out, may_commit
from ..policies.vocabulary import FinishReason, RequestType
from .calls import MESSAGE, POLL, STEP_END
from .layerwise import RunningStep
from .sequences import Sequences

if TYPE_CHECKING:
    from ..core.executor import ExecutorCore
    from .cluster import SimulatedCluster

_WAKE: Final = Wake()
BlockHashes = tuple[tuple[int, tuple[int, ...]], ...]  # as in StepsDone


class _Tail:
    """A committed plan: when each of its grants that are out will be reported, and who stops in them.

    `block_hashes`: of the blocks of who ends in any of its steps.
    """

    __slots__ = ("block_hashes", "grant_ends", "num_steps", "run", "stopped")

    def __init__(
        self, run: RunSteps, num_steps: int, grant_ends: list[int], stopped: list[Stopped], block_hashes: BlockHashes
    ) -> None:
        self.run = run
        self.num_steps = num_steps
        self.grant_ends = grant_ends
        self.stopped = stopped
        self.block_hashes = block_hashes


class SimulatedExecutor:
    def __init__(self, config: ExecutorConfig, core: Any, cluster: SimulatedCluster, launch: Launch) -> None:
        self.config = config
        self.id = config.id
        self.core = core
        self._core: ExecutorCore = getattr(core, "core", core)  # to ask it, past the log, what may be told late
        self._is_logged = core is not self._core
        self.is_alive = True
        self._cluster = cluster
        self._calendar = cluster.env.calendar
        self._timing = cluster.timing
        self._model = cluster.model  # the same, if it is one: a compiled caller calls it directly
        self._steps_per_grant = launch.steps_per_grant
        self._depth = launch.depth
        self._plan_ahead = launch.plan_ahead
        self._polling = False
        self._tails: deque[_Tail] = deque()
        self._grant_serial = 0  # of the call at the report of the next grant of `_tails`, 0 for none
        self._late_end: int | None = None  # when that grant is reported, instead, where it may be told late
        self._run: RunSteps | None = None  # the plan whose end is open
        self._end_step = 0  # of the epoch, as scheduled
        self._end_serial = 0  # of the call at that end, or before it at the commit; 0 for none
        self._may_commit = False  # the open plan, as soon as this instant is planned
        self.running_step: RunningStep | None = None  # where it holds chunks
        self._done = 0  # steps of the epoch that the core knows to be done, or certain
        self._wake_at: int | None = None  # as the core asked
        self._wake_serial = 0  # of the call that will wake it, 0 for none
        self._wake_due = 0  # the instant of that call
        self._report_at: int | None = None  # a wake-up for nothing but a report, which may be given late
        self._sequences = Sequences(cluster.true_length)
        # bound once: compiled code would make an object of a method at every use
        self._call_end: Callable[[int], None] = self._end
        self._call_commit: Callable[[int], None] = self._commit_at
        self._call_grant_ends: Callable[[None], None] = self._grant_ends
        self._call_wake: Callable[[None], None] = self._wake

    # ---- into the core ----------------------------------------------------------------------------------------------

    def give(self, event: Any) -> None:
        """Hand an event to the core; it plans when the last event of the instant has been given."""
        if not self.is_alive:
            return
        calendar = self._calendar
        now = calendar.now
        if self._report_at is not None or self._late_end is not None:
            self._catch_up(now, calendar.priority)
            self._tell_end_in_time()
        if type(event) is Enqueue and event.request.request_type is RequestType.GENERATION_ONLY:
            params = event.request.context_phase_params  # its first token, or all that it has, come with the KV
            self._sequences.received(event.request.id, 1 if params is None else params.num_generated)
        if self._run is not None or self._polling or calendar.is_due(now) or self._report_at == now:
            # a plan that is asked to stop may end, or be committed, in this very instant
            self._obey(self._handle(event, now, True), now)
            self._settle()
        else:
            self._obey(self._handle(event, now, False), now)
            self._commit_those_launched(now)

    def _take(self, event: Any) -> None:
        """Hand an event of the driver's own to the core, which plans later."""
        now = self._calendar.now
        self._catch_up(now, self._calendar.priority)
        self._obey(self._handle(event, now, True), now)

    def _handle(self, event: Any, now: int, more: bool) -> list[Any]:
        if self._is_logged:
            commands: list[Any] = self.core.handle(event, now, more)
            return commands
        return self._core.handle(event, now, more)  # known to be a core, which a compiled caller calls directly

    def _settle(self) -> None:
        """Let the core plan, now or when the other events of the instant have been given."""
        if self._polling:
            return
        calendar = self._calendar
        if calendar.is_due(calendar.now):
            self._polling = True
            calendar.call_at(calendar.now, POLL + self.id, self._poll, None)
        else:
            self._plan()

    def _poll(self, _: None) -> None:
        self._polling = False
        if self.is_alive:
            self._plan()

    def _plan(self) -> None:
        now = self._calendar.now
        if self._report_at is not None:
            self._catch_up(now, POLL)
        self._obey(self._handle(None, now, False), now)
        self._commit_those_launched(now)

    def kill(self) -> None:
        """From now on it does nothing and answers nobody."""
        self._catch_up(self._calendar.now, 0)
        self.is_alive = False
        self._report_at = self._wake_at = self._late_end = None
        self._take_back_wake()

    # ---- wake-ups ---------------------------------------------------------------------------------------------------

    def _wake_up_at(self, at: int | None, report_at: int | None, now: int) -> None:
        """The core wants to be woken. A wake-up for nothing but a report may be given late: see `report_if_due`."""
        if report_at is not None and not self._cluster.may_be_late:
            at = report_at if at is None or report_at < at else at
            report_at = None
        if report_at != self._report_at:
            self._report_at = report_at
            if report_at is not None:
                self._cluster.report_due(report_at, self.id)
        self._wake_at = at
        if at is None:
            return
        if self._model is not None:
            at, place = self._model.wake(self.id, at, now)
        else:
            at, place = self._timing.wake(self.id, at, now)
        if self._wake_serial:
            if self._wake_due == at or (self._wake_due < at and self._timing.may_be_late):
                return  # the call that is outstanding asks for another if it comes too early
            self._calendar.take_back(self._wake_serial)
        self._wake_due = at
        self._wake_serial = self._calendar.call_at(at, MESSAGE + place, self._call_wake, None)

    def _wake(self, _: None) -> None:
        self._wake_serial = 0
        self.report_if_due(self._calendar.now)
        at, now = self._wake_at, self._calendar.now
        if at is None or self._wake_serial:
            self._calendar.disregard()
            return
        if at > now and self._timing.may_be_late:
            self._wake_up_at(at, self._report_at, now)
            self._calendar.disregard()
            return
        self._wake_at = None
        self.give(_WAKE)

    # ---- what is told late ------------------------------------------------------------------------------------------

    def report_if_due(self, now: int) -> None:
        """Tell the core what was due here before `now`, with its own instant: nothing else has happened here since."""
        if self.is_alive:
            self._catch_up(now, 0)

    def _catch_up(self, now: int, priority: int) -> None:
        """Give the wake-ups for reports, and the end of a committed plan, that were due before this place in time."""
        while True:
            report_at, end_at = self._report_at, self._late_end
            if report_at is not None and (end_at is None or report_at <= end_at):
                if report_at > now or (report_at == now and MESSAGE + self.id > priority):
                    return
                self._report_at = self._wake_at = None
                self._give_late(_WAKE, report_at, report_at in (now, end_at))
                self._take_back_unwanted_wake()
            elif end_at is not None and end_at < now:
                self._late_end = None
                self._give_late(self._end_of(self._tails.popleft()), end_at, False)
            else:
                return

    def _give_late(self, event: Any, at: int, more: bool) -> None:
        commands = self._handle(event, at, more)
        for command in commands:
            kind = type(command)
            if kind is Send:
                kind = type(command.message)
            if (
                kind is not Report
                and kind is not WakeAt
                and (event is _WAKE or (kind is not Record and kind is not Response))
            ):
                raise RuntimeError(f"executor {self.id} was told of {event} at {at} ps late, and did {command}")
        self._obey(commands, at)

    def _may_be_told_late(self, tail: _Tail) -> bool:
        """Whether nobody can act upon the end of a committed plan, as things are."""
        if len(tail.grant_ends) > 1 or tail.stopped or not self._cluster.may_be_late or not self._core.is_end_quiet:
            return False
        return self._cluster.answers_may_be_late or not self._core.is_end_awaited

    def _tell_end_in_time(self) -> None:
        """Something happens before the end that was to be told late, and may make it matter."""
        if self._late_end is not None:
            self._late_end = None
            self._take_back_end()
            self._call_at_grant()

    def _take_back_unwanted_wake(self) -> None:
        """A method of its own: the compiler takes what a method has set for what it still is after `_obey`."""
        if self._wake_at is None:  # no time limit matters any more
            self._take_back_wake()

    def _take_back_wake(self) -> None:
        if self._wake_serial:
            self._calendar.take_back(self._wake_serial)
            self._wake_serial = 0

    def hurry(self) -> None:
        """What is told late is waited for: it is told at its instant."""
        self._tell_end_in_time()
        at, self._report_at = self._report_at, None
        if at is None:
            return
        self._take_back_wake()
        self._wake_at = self._wake_due = at
        self._wake_serial = self._calendar.call_at(at, MESSAGE + self.id, self._call_wake, None)

    # ---- out of the core --------------------------------------------------------------------------------------------

    def _obey(self, commands: list[Any], now: int) -> None:
        cluster = self._cluster
        for command in commands:
            kind = type(command)
            if kind is Record:
                cluster.record(command.row)
            elif kind is Send:
                message = command.message
                if type(message) is Response:
                    self._sequences.forget(message.request_id)
                    cluster.forget(message.request_id)
                cluster.send(self.id, command.to, message, now)
            elif kind is WakeAt:
                self._wake_up_at(command.at, command.report_at, now)
            elif kind is RunSteps:
                self._start(command)
            elif kind is StopAfterStep:
                self._stop()
            elif kind is ReceiveKv or kind is PrepareReceive:
                present = command.num_present if kind is ReceiveKv else 0
                request = KvRequested(command.source_id, self.id, command.request_id, present)
                cluster.send(self.id, command.source, request, now)
            elif kind is ServeKv:
                cluster.serve_kv(self.id, command)
            elif kind is AbortKv:
                cluster.abort_kv(self.id, command)
            elif kind is Drained:
                cluster.drained(self.id)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _start(self, run: RunSteps) -> None:
        self._run = run
        self._sequences.change_batch(run)
        start = self._tails[-1].grant_ends[-1] if self._tails else self._calendar.now
        if run.first_step == 1:
            self._done = 0
        if self._model is not None:
            self._model.begin(self.id, run, start)
        else:
            self._timing.begin(self.id, run, start)
        self._end_step = self._planned_end(run)
        self._schedule_end()
        self.running_step = None
        if run.chunks:
            end = max(self._end_of_step(self._end_step), self._calendar.now)
            self.running_step = RunningStep(start, end, run.chunks)
            self._cluster.layerwise.compute(self.id, self.running_step)

    def _end_of_step(self, step: int) -> int:
        model = self._model
        return self._timing.end_of_step(self.id, step) if model is None else model.end_of_step(self.id, step)

    def _planned_end(self, run: RunSteps) -> int:
        """The span's last step, or where a sequence ends before it, with what has been launched by then."""
        if not run.num_decodes:
            return run.last_step
        steps = self._sequences.steps_until_end()
        if steps is None or self._done + steps > run.last_step:
            return run.last_step
        return self._launched_by(max(self._done + steps, run.first_step), run)

    def _launched_by(self, done: int, run: RunSteps) -> int:
        """The last step already granted when step `done` is reported: with one grant of one step, `done` itself."""
        steps_per_grant, depth = self._steps_per_grant, self._depth
        if steps_per_grant == depth == 1:
            return done
        return granted_through(done - 1, run.first_step, run.last_step, steps_per_grant, depth)

    def _schedule_end(self) -> None:
        """The last step of the open plan is known: it is committed when the grants that are out leave room, or it ends."""
        run = self._run
        self._take_back_end()
        if run is None:
            return
        surplus = self._num_grants_out() - self._depth
        if may_commit(self._plan_ahead, self._depth, bool(run.chunks), 0):
            self._may_commit = surplus < 0
        if not self._may_commit and not self._tails:  # else in this instant, or as the grants before it are reported
            self._call_at_end(run, surplus, self._calendar.now)

    def _call_at_end(self, run: RunSteps, surplus: int, after: int) -> bool:
        """Ask for the call at which the open plan, the only one, is committed or ends; False: not before `after`.

        `surplus`: its grants that have to be reported before it may be committed, less one.
        """
        step = self._end_step
        call = self._call_end
        if may_commit(self._plan_ahead, self._depth, bool(run.chunks), 0):
            reported = run.first_step + (surplus + 1) * self._steps_per_grant - 1
            if reported < step:
                call, step = self._call_commit, reported
        at = max(self._end_of_step(step), self._calendar.now)
        if at < after:
            return False
        self._end_serial = self._calendar.call_at(at, STEP_END + self.id, call, step)
        return True

    def _take_back_end(self) -> None:
        if self._end_serial:
            self._calendar.take_back(self._end_serial)
            self._end_serial = 0

    def _num_grants_out(self) -> int:
        """Of committed plans, and all that the open one will have, none of which has been reported."""
        run = self._run
        own = 0
        if run is not None:
            own = grants_out(run.first_step - 1, run.first_step, self._end_step, self._steps_per_grant)
        if self._tails:
            for tail in self._tails:
                own += len(tail.grant_ends)
        return own

    def _stop(self) -> None:
        run, now = self._run, self._calendar.now
        if run is None:
            return
        if self._tails:  # none of its steps has been reported
            num_out = sum(len(tail.grant_ends) for tail in self._tails)
            steps_per_grant, depth = self._steps_per_grant, self._depth
            end = granted_through(run.first_step - 1, run.first_step, run.last_step, steps_per_grant, depth - num_out)
        else:
            if self._model is not None:
                boundary = self._model.step_by(self.id, self._done, now, self._end_step)
            else:
                boundary = self._timing.step_by(self.id, self._done, now, self._end_step)
            end = self._launched_by(boundary, run)
        if end < self._end_step:
            self._end_step = end
            self._schedule_end()

    def _end(self, _: int) -> None:
        """The open plan ends, and was not committed."""
        run = self._run
        self._end_serial = 0
        if run is None or not self.is_alive:
            return
        if self._late_end is not None:
            self._catch_up(self._calendar.now, STEP_END)
        self.running_step = None
        stopped, _late, hashes = self._close(run, self._end_step)
        for chunk in run.chunks:
            if chunk.is_last:
                generated = self._sequences.prefilled(chunk.request_id)
                if generated >= self._cluster.true_length(chunk.request_id):
                    stopped.append(Stopped(chunk.request_id, 1, FinishReason.STOP))
                if self._cluster.names_outputs:
                    hashes += self._cluster.output_hashes(((chunk.request_id, generated),))
        self.give(
            StepsDone(
                run.plan,
                run.epoch,
                self._end_step,
                stops_in_order(stopped) if len(stopped) > 1 else tuple(stopped),
                block_hashes=hashes,
            )
        )

    def _close(self, run: RunSteps, reported: int) -> tuple[list[Stopped], list[Stopped], BlockHashes]:
        """All its steps are done, or certain: sequences that stop in those up to `reported`, and in those after it; and
        the names of the blocks of those that end in any of them, which only a world with prefix caching has.
        """
        steps, start = self._end_step - self._done, self._done
        self._run, self._may_commit = None, False
        self._take_back_end()
        self._done = self._end_step
        known: list[Stopped] = []
        late: list[Stopped] = []
        hashes: BlockHashes = ()
        if run.num_decodes:
            if self._cluster.names_outputs:
                hashes = self._cluster.output_hashes(self._sequences.lengths(steps))
            for request_id, step in self._sequences.advance(steps):
                (known if start + step <= reported else late).append(Stopped(request_id, start + step))
        return known, late, hashes

    # ---- planning ahead ---------------------------------------------------------------------------------------------

    def _commit_at(self, reported: int) -> None:
        self._end_serial = 0
        if self.is_alive:
            if self._late_end is not None:
                self._catch_up(self._calendar.now, STEP_END)
            self.give(self._commit(reported))

    def _commit_those_launched(self, now: int) -> None:
        """After a planning pass: plans whose steps are all launched are committed, and others are made."""
        while self._may_commit:
            self._obey(self._handle(self._commit(self._done), now, False), now)
        if self._tails and not self._grant_serial and self._late_end is None:
            self._await_grant()

    def _commit(self, reported: int) -> StepsCommitted | None:
        """The open plan's steps are all launched; those up to `reported`, counted in its epoch, have been reported.

        What the core is to be told of it.
        """
        run, size = self._run, self._steps_per_grant
        if run is None:
            return None
        first, last = run.first_step, self._end_step
        finished = (reported - first + 1) // size
        steps = [min(last, end) for end in range(first - 1 + (finished + 1) * size, last + size, size)]
        now = self._calendar.now
        stopped, late, hashes = self._close(run, reported)
        ends = [max(now, self._end_of_step(step)) for step in steps]
        self._tails.append(_Tail(run, last, ends, late, hashes))
        if ends[0] == now:  # in this very instant, before the core plans
            self._call_at_grant()
        return StepsCommitted(
            run.plan, run.epoch, last, stops_in_order(stopped) if len(stopped) > 1 else tuple(stopped)
        )

    def _await_grant(self) -> None:
        """The next grant to be reported is of the first committed plan. Where nobody can act upon it, it is told late.

        That is so of most changes of a batch: whoever joins does so by the commit, and whoever left is answered at the end.
        """
        run, tail = self._run, self._tails[0]
        at = tail.grant_ends[0]
        if len(self._tails) == 1 and at > self._calendar.now and self._may_be_told_late(tail):
            surplus = self._num_grants_out() - 1 - self._depth
            has_room = (
                run is not None and surplus < 0 and may_commit(self._plan_ahead, self._depth, bool(run.chunks), 0)
            )
            if run is None or (not has_room and self._call_at_end(run, surplus, at + 1)):
                self._late_end = at
                self._cluster.report_due(at, self.id)
                return
        self._call_at_grant()

    def _call_at_grant(self) -> None:
        """Grants are reported in order: one call at a time."""
        if not self._grant_serial:
            at = self._tails[0].grant_ends[0]
            self._grant_serial = self._calendar.call_at(at, STEP_END + self.id, self._call_grant_ends, None)

    def _end_of(self, tail: _Tail) -> StepsDone:
        stopped = stops_in_order(tail.stopped) if len(tail.stopped) > 1 else tuple(tail.stopped)
        return StepsDone(tail.run.plan, tail.run.epoch, tail.num_steps, stopped, block_hashes=tail.block_hashes)

    def _grant_ends(self, _: None) -> None:
        """The first grant of the first committed plan is reported."""
        self._grant_serial = 0
        if not self.is_alive:
            return
        tail = self._tails[0]
        is_over = len(tail.grant_ends) == 1
        if is_over:  # what the core asks for now comes before this report makes room for another grant
            self._take(self._end_of(tail))
            self._tails.popleft()
        else:
            del tail.grant_ends[0]
        if self._tails:
            self._call_at_grant()
        run = self._run
        has_room = run is not None and may_commit(
            self._plan_ahead, self._depth, bool(run.chunks), self._num_grants_out()
        )
        if has_room:
            self._take(self._commit(self._done))
        elif not self._tails:
            self._schedule_end()
        if is_over or has_room:
            self._settle()
