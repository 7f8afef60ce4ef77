"""How a visit to an executor ends: finished, failed, cancelled, or done here and its KV held for where it goes on.

Each visit is answered exactly once. Its blocks are freed when nothing touches them any more: after the last plan that names
them, and after the last transfer that reads or writes them; until then they are quarantined, and the visit is doomed.
"""

from __future__ import annotations

from ..policies.vocabulary import ContextPhaseParams, FinishReason
from .agenda import CANCELLED, Agenda
from .commands import ORCHESTRATOR, Record, RunSteps, Send
from .config import ExecutorConfig
from .events import Cancel, KvReceived, KvTaken, Response
from .kv_reader import KvReader
from .kv_source import KvSource
from .life_cycle import FINAL, Cause, State
from .scheduler import Scheduler
from .timers import Timers
from .visit import Visit, is_canned, params_of
from .visit_rows import stay_row, transfer_row


class VisitEnds:
    """`visits` are all of the executor's, by request id; who is over is no longer among them."""

    def __init__(
        self,
        config: ExecutorConfig,
        scheduler: Scheduler,
        visits: dict[int, Visit],
        source: KvSource,
        reader: KvReader,
        timers: Timers,
        agenda: Agenda,
    ) -> None:
        self.config = config
        self._scheduler = scheduler
        self._blocks = scheduler.blocks
        self._visits = visits
        self._source = source
        self._reader = reader
        self._timers = timers
        self._agenda = agenda

    # ---- done here --------------------------------------------------------------------------------------------------

    def finish(self, visit: Visit, reason: FinishReason, now: int, last_step: int) -> None:
        """A visit's last token is out; it is out of the batch, and its blocks are quiet unless an early reader is there."""
        self._agenda.has_news = True
        visit.advance(Cause.FINISH)
        if visit.output_hashes and not is_canned(visit.request):
            self._scheduler.note_generated(visit)
        self._source.turn_away(visit, f"request {visit.id} ended with its first token")
        if visit.pinned_by is not None:
            self._blocks.quarantine(visit.id)
        else:
            self._blocks.free(visit.id)
            del self._visits[visit.id]
        self._respond(visit, reason, visit.num_generated, last_token=now)
        self._record_stay(visit, now, last_step)

    def context_done(self, visit: Visit, token: int | None, now: int) -> None:
        """Answer with the first token, and hold the KV under a lease, unless it has all been read already."""
        visit.advance(Cause.CONTEXT_ENDS)
        if visit.is_read:
            visit.advance(Cause.FINISH)
            self._blocks.free(visit.id)
            del self._visits[visit.id]
        else:
            self._hold(visit, now)
            self._source.serve(visit)
        overlap = None if visit.served_at is None else now - visit.served_at
        first_tokens = () if token is None else (token,)
        params = ContextPhaseParams(visit.id, self.config.id, visit.request.num_prompt_tokens, first_tokens)
        self._respond(visit, None, 1, context_phase_params=params, last_token=now, kv_overlap=overlap)
        self._record_stay(visit, now, self._scheduler.num_steps)

    def move(self, visit: Visit, now: int) -> None:
        """No plan names it any more: its KV waits for the executor where it goes on, as that of a context phase does."""
        self._agenda.has_news = True
        self._scheduler.remove(visit, visit.state)
        visit.advance(Cause.MOVE)
        self._blocks.trim(visit.id, self._scheduler.capacity.blocks_for(visit.num_kv_tokens))
        self._hold(visit, now)
        params = ContextPhaseParams(visit.id, self.config.id, visit.num_kv_tokens, num_generated=visit.num_generated)
        self._respond(visit, None, visit.num_generated, context_phase_params=params, last_token=now)
        self._record_stay(visit, now, self._scheduler.num_steps if visit.left_at is None else visit.left_at)
        self._reader.blocks_came_free()

    def _hold(self, visit: Visit, now: int) -> None:
        self._blocks.hold(visit.id)
        visit.lease_until = now + self.config.lease
        self._timers.set(visit.lease_until, "lease", visit.id)

    # ---- transfers that are over ------------------------------------------------------------------------------------

    def kv_taken(self, event: KvTaken) -> None:
        """No reader touches it any more: a context phase that is done is over with that."""
        visit = self._visits.get(event.request_id)
        if visit is None or visit.pinned_by is None:
            return
        self._agenda.has_news = True
        if visit.state not in FINAL and visit.state is not State.CONTEXT_DONE:  # read, or given up, before its end
            visit.pinned_by = None
            visit.is_read = event.ok
            visit.served_at = visit.served_at if event.ok else None
            return
        self._blocks.free(visit.id)
        del self._visits[visit.id]
        if visit.state is State.CONTEXT_DONE:
            visit.advance(Cause.FINISH if event.ok else Cause.FAIL)
        self._reader.blocks_came_free()

    def kv_received(self, event: KvReceived, now: int) -> None:
        """Nothing writes to its blocks any more: it goes on with its KV, or was given up, or fails for want of it."""
        visit = self._reader.in_flight.pop(event.request_id, None)
        if visit is None:
            return
        self._agenda.has_news = True
        self._record_transfer(visit, now, event.ok and visit.doom is None, event.error or visit.doom)
        if visit.doom is not None:  # answered when it was given up
            self._blocks.free(visit.id)
            del self._visits[visit.id]
            self._reader.blocks_came_free()
        elif event.ok:
            self._reader.arrived(visit, now)
            if self._scheduler.num_free_slots > 0:
                self._scheduler.ask_to_stop()
        else:
            self.fail(visit, event.error or "the KV transfer failed", now, recomputable=True)

    # ---- given up ---------------------------------------------------------------------------------------------------

    def give_up(self, visit: Visit | None, why: str, now: int, recomputable: bool = False) -> None:
        """Cancel or fail a visit in any state: at once where nothing touches its blocks, else marked until then."""
        if visit is None or visit.doom is not None or visit.state in FINAL:
            return
        self._agenda.has_news = self._agenda.must_plan = True
        match visit.state:
            case State.CONTEXT_DONE:  # answered already
                visit.advance(Cause.CANCEL if why is CANCELLED else Cause.FAIL)
                if visit.pinned_by is not None:
                    visit.doom = why
                    self._blocks.quarantine(visit.id)
                else:
                    self._blocks.free(visit.id)
                    del self._visits[visit.id]
                    self._reader.blocks_came_free()
            case State.KV_IN_FLIGHT:
                visit.doom = why
                visit.advance(Cause.CANCEL if why is CANCELLED else Cause.FAIL)
                self._blocks.quarantine(visit.id)
                self._reader.forget(visit, State.KV_IN_FLIGHT)
                self._answer_failure(visit, why, now, recomputable)
            case State.CONTEXT_RUNNING | State.GENERATION_RUNNING if self._scheduler.is_in_plan(visit):
                visit.doom = why
                self._scheduler.has_doomed = True
                self._scheduler.ask_to_stop()
            case _:
                self.fail(visit, why, now, recomputable)

    def fail(self, visit: Visit, why: str, now: int, recomputable: bool = False) -> None:
        """End a visit that no plan and no transfer touches."""
        self._agenda.has_news = True
        state = visit.state
        self._scheduler.remove(visit, state)
        self._reader.forget(visit, state)
        if state is State.GENERATION_QUEUED:
            self._let_go(visit, why, now)
        visit.advance(Cause.CANCEL if why is CANCELLED else Cause.FAIL)
        self._source.turn_away(visit, f"the context phase of request {visit.id} was given up: {why}")
        if visit.pinned_by is not None:  # an early reader is at its blocks
            visit.doom = why
            self._blocks.quarantine(visit.id)
            self._source.abort(visit, f"the context phase of request {visit.id} was given up: {why}")
            self._reader.blocks_came_free()  # not they, but its place in the batch
        else:
            del self._visits[visit.id]
            if self._blocks.free(visit.id) or state in (State.QUEUED, State.GENERATION_QUEUED):
                self._reader.blocks_came_free()  # or it was at the head of a line, and whoever is next needs fewer
        self._answer_failure(visit, why, now, recomputable)

    def _let_go(self, visit: Visit, why: str, now: int) -> None:
        """Whoever holds the KV that it waited for need not wait for its lease to run out."""
        params = params_of(visit.request)
        if params.executor == self.config.id:
            self.give_up(self._reader.local.source_of(visit), why, now)
        elif params.executor != ORCHESTRATOR and not visit.awaits_token:
            self._agenda.out.append(Send(params.executor, Cancel(params.req_id)))

    def fail_plan(self, run: RunSteps, error: str, now: int) -> None:
        """The world could not run a plan: whoever was in it has failed."""
        for chunk in run.chunks:
            self.fail(self._visits[chunk.request_id], error, now)
        if run.decodes:
            for visit in list(self._scheduler.batch.members.values()):
                self.fail(visit, error, now)

    def _answer_failure(self, visit: Visit, why: str, now: int, recomputable: bool) -> None:
        cancelled = why is CANCELLED
        reason = FinishReason.CANCELLED if cancelled else FinishReason.ERROR
        error = None if cancelled else why
        self._respond(visit, reason, visit.num_generated, error=error, recomputable=recomputable)
        self._record_stay(visit, now, self._scheduler.num_steps if visit.left_at is None else visit.left_at)

    # ---- answers and rows -------------------------------------------------------------------------------------------

    def refuse(self, request_id: int, error: str, recomputable: bool = False) -> None:
        """The answer to a request that did not become a visit."""
        response = Response(request_id, self.config.id, FinishReason.ERROR, 0, error, recomputable=recomputable)
        self._agenda.responses.append(response)

    def _respond(
        self,
        visit: Visit,
        reason: FinishReason | None,
        num_tokens: int,
        *,
        error: str | None = None,
        recomputable: bool = False,
        context_phase_params: ContextPhaseParams | None = None,
        last_token: int | None = None,
        kv_overlap: int | None = None,
    ) -> None:
        """The one answer to a visit, with the instants that its row wants."""
        response = Response(
            visit.id,
            self.config.id,
            reason,
            num_tokens,
            error,
            recomputable,
            context_phase_params,
            visit.started_at,
            visit.transfer_start_at,
            visit.kv_usable_at,
            last_token,
            None,
            kv_overlap,
            visit.num_cached_tokens,
        )
        self._agenda.responses.append(response)

    def _record_stay(self, visit: Visit, now: int, last_step: int) -> None:
        self._agenda.out.append(Record(stay_row(self.config.id, visit, now, last_step)))

    def _record_transfer(self, visit: Visit, now: int, ok: bool, error: str | None) -> None:
        num_blocks = self._scheduler.capacity.blocks_for(
            params_of(visit.request).num_kv_tokens - visit.num_cached_tokens
        )
        self._agenda.out.append(Record(transfer_row(self.config.id, visit, num_blocks, now, ok, error)))
