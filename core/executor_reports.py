"""What an executor tells the orchestrator: its answers, and the report that rides on the last of them or goes by itself.

A report is sent with answers, at changes of the batch where that is asked for, and, of anything else that has changed, at most
once in an interval.
"""

from __future__ import annotations

from msgspec.structs import replace

from ..policies.vocabulary import Request
from .agenda import Agenda
from .commands import ORCHESTRATOR, Send
from .config import ExecutorConfig
from .events import Report
from .kv_reader import KvReader
from .scheduler import Scheduler


class ExecutorReports:
    """Counts what has been seen of the orchestrator's requests, and reads the rest off the executor's parts."""

    def __init__(self, config: ExecutorConfig, scheduler: Scheduler, reader: KvReader, agenda: Agenda) -> None:
        self.config = config
        self._scheduler = scheduler
        self._reader = reader
        self._agenda = agenda
        self._seen_requests = 0
        self._seen_tokens = 0
        self._reported_at = -config.report_interval

    def seen(self, request: Request) -> None:
        """A request has come, whatever becomes of it."""
        self._agenda.has_news = True
        self._seen_requests += 1
        self._seen_tokens += request.num_prompt_tokens

    def report(self) -> Report:
        """What would be told now; nothing is changed by asking."""
        scheduler, reader = self._scheduler, self._reader
        free, reserved, used, held, quarantined, cached = scheduler.block_counts()
        cache = scheduler.cache
        limit = self.config.quarantine_max_blocks
        return Report(
            self.config.id,
            self._seen_requests,
            self._seen_tokens,
            reader.num_coming + scheduler.prompts.num_waiting,
            len(scheduler.prefilling) + len(scheduler.joining) + len(scheduler.batch),
            scheduler.prompts.num_queued_tokens,
            scheduler.prompts.num_begun_tokens,
            scheduler.shown_kv + reader.num_kv_tokens,
            free,
            reserved,
            used,
            held,
            quarantined,
            scheduler.shown_steps,
            scheduler.step_time,
            limit is None or quarantined <= limit,
            () if cache is None else cache.news(),
            cached,
        )

    def flush(self, now: int) -> int | None:
        """Say what is due at the end of an instant; when a report is due, if nothing else brings it about before."""
        agenda, scheduler = self._agenda, self._scheduler
        agenda.has_news = agenda.has_news or scheduler.has_changed
        if agenda.responses:
            last = agenda.responses.pop()
            for response in agenda.responses:
                agenda.out.append(Send(ORCHESTRATOR, response))
            agenda.out.append(Send(ORCHESTRATOR, replace(last, report=self.report())))
            self._reported(now)
            if agenda.responses:
                agenda.responses.clear()
        elif scheduler.has_changed and self.config.report_on_batch_change:
            self._send(now)
        if not agenda.has_news:
            return None
        due_at = self._reported_at + self.config.report_interval
        if due_at > now:
            return due_at
        self._send(now)
        return None

    def _send(self, now: int) -> None:
        self._agenda.out.append(Send(ORCHESTRATOR, self.report()))
        self._reported(now)

    def _reported(self, now: int) -> None:
        if self._scheduler.cache is not None:
            self._scheduler.cache.forget_news()
        self._reported_at = now
        self._agenda.has_news = self._scheduler.has_changed = False
