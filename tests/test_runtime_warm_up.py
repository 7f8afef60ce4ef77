"""Warm-up before a run, against a driver that answers at once."""

from __future__ import annotations

from typing import Any

import pytest

from disagg.policies.vocabulary import ContextPhaseParams, FinishReason, RequestType
from disagg.runtime.cluster_error import ClusterError
from disagg.runtime.executor_inbox import Submitted
from disagg.runtime.executor_spec import ModelSource, check_spec
from disagg.runtime.orchestrator_main import warm_up
from tests.runtime_programs.clusters import cluster, context, generation, mixed
from tests.tiny_models import SHAPES


class AnsweringDriver:
    """Answers every request as its executor would; `broken` is an executor that fails."""

    def __init__(self, layouts: list[Any], broken: int | None = None) -> None:
        self.roster = check_spec(cluster(ModelSource(SHAPES["llama"], seed=0), layouts))
        self.listener: Any = None
        self.asked: list[Submitted] = []
        self.sessions: list[bool] = []
        self._broken = broken

    def open_session(self, record: bool = True) -> None:
        self.sessions.append(record)

    def close_session(self) -> None:
        self.sessions.append(False)

    def submit(self, submitted: Submitted) -> None:
        self.asked.append(submitted)
        request, executor = submitted.request, submitted.executor
        assert executor is not None
        if executor == self._broken:
            self.listener.ended(request.id, FinishReason.ERROR, "its GPU is on fire", None)
        elif request.request_type is RequestType.CONTEXT_ONLY:
            params = ContextPhaseParams(request.id, executor, request.num_prompt_tokens, (1,))
            self.listener.ended(request.id, None, None, params)
        else:
            self.listener.ended(request.id, FinishReason.LENGTH, None, None)


def test_warm_up_goes_over_every_pair_and_every_mixed_executor_and_is_not_recorded() -> None:
    driver: Any = AnsweringDriver([context(), generation(), context(), generation(), mixed()])
    warm_up(driver)
    pairs = [
        (asked.request.context_phase_params.executor, asked.executor)
        for asked in driver.asked
        if asked.request.request_type is RequestType.GENERATION_ONLY
    ]
    assert sorted(pairs) == [(1, 2), (1, 4), (3, 2), (3, 4)]
    both = [a.executor for a in driver.asked if a.request.request_type is RequestType.CONTEXT_AND_GENERATION]
    assert both == [5]
    assert len({asked.request.id for asked in driver.asked}) == len(driver.asked)
    assert driver.sessions == [False, False]


def test_an_executor_that_fails_its_warm_up_ends_the_run_by_name() -> None:
    driver: Any = AnsweringDriver([context(), generation()], broken=2)
    with pytest.raises(ClusterError, match="warm-up of executor 2 failed: its GPU is on fire"):
        warm_up(driver)
