"""Fleets as a policy sees them, set up by hand. Helper of the tests of policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from disagg.core.config import ExecutorConfig, SchedulerConfig
from disagg.core.events import Report
from disagg.core.fleet import Fleet
from disagg.core.links import Links
from disagg.core.prediction import LinkTimes, PredictionConfig, StepTimes, TablePredictor
from disagg.policies.registry import create
from disagg.policies.views import VECTORISE_FROM
from disagg.policies.vocabulary import ContextPhaseParams, Request, Role, Route, RouteMixed, Stage

BLOCK = 10  # tokens, of the KV and of a hash
SIZES = (4, VECTORISE_FROM)  # pools of lists and of arrays
ROLES = {"c": Role.CONTEXT, "g": Role.GENERATION, "m": Role.MIXED}
# one table for all: a prompt token takes 10 ps, a decode step 100 ps + 5 a request + 1 a KV token
TIMES = StepTimes((1, 1000), (10, 10_000), 0.0, (1, 100), (105, 600), 1.0, 10.0)


def fleet_of(
    roles: str,
    num_blocks: int = 100,
    *,
    predicts: bool = False,
    domains: str = "",
    links: tuple[LinkTimes, LinkTimes] | None = None,
    **scheduler: Any,
) -> Fleet:
    """One executor a letter (c, g, m) with ids from 1, in the domains of `domains` (a letter each).

    `links`: within a domain and between two; a KV token is 100 bytes.
    """
    configs = [
        ExecutorConfig(
            i,
            ROLES[role],
            num_blocks,
            tokens_per_block=BLOCK,
            domain=domains[i - 1] if domains else "",
            scheduler=SchedulerConfig(**scheduler),
        )
        for i, role in enumerate(roles, 1)
    ]
    predictor = None
    if predicts:
        predictor = TablePredictor(PredictionConfig((TIMES,), (0,) * len(configs), 7, 2.0), range(1, len(configs) + 1))
    known = None
    if links is not None:
        kinds = (0,) * len(configs)
        known = Links(PredictionConfig((), (), links=links, link_kind_of=kinds, kv_bytes_per_token=100), configs)
    return Fleet(configs, 0, predictor, known)


def report(fleet: Fleet, executor: int, **columns: Any) -> None:
    """The executor reports; what it was sent before is no longer on the wire."""
    seen = fleet._sent[executor]
    free = fleet.configs[executor].num_blocks
    fleet.reported(
        Report(executor, **{"seen_requests": seen[0], "seen_tokens": seen[1], "blocks_free": free, **columns}), 0
    )
    fleet.row(executor)  # whoever asks sees it; a view that a test has kept from before shows it now too


def made(name: str, kind: str = "routing", **params: Any) -> Any:
    return create(name, kind, params, seed="7")


def prompt(blocks: Sequence[int] = (), id: int = 1, tokens: int | None = None, **fields: Any) -> Request:
    """A prompt of these block hashes and half a block more, or of so many tokens."""
    length = len(blocks) * BLOCK + BLOCK // 2 if tokens is None else tokens
    return Request(id, length, 32, block_hashes=tuple(blocks), **fields)


def send(fleet: Fleet, policy: Any, request: Request, executor: int, stage: Stage = Stage.CONTEXT) -> None:
    """The phase was sent there, as the orchestrator would tell."""
    fleet.dispatched(executor, request.num_prompt_tokens, request.block_hashes)
    policy.on_dispatched(request, stage, executor, fleet.at(0))


def context(policy: Any, fleet: Fleet, request: Request, now: int = 0) -> int:
    """Where the context phase goes; a request served whole is told by the same number."""
    answer = policy.route_context(request, fleet.at(now))
    assert isinstance(answer, Route | RouteMixed), answer
    executor = answer.executor if isinstance(answer, RouteMixed) else answer.context
    assert executor is not None
    return executor


def generation(policy: Any, fleet: Fleet, request: Request, source: int | None = 1, now: int = 0) -> int:
    """Where the generation phase goes, of a request whose context phase was `source`'s."""
    view = fleet.at(now)
    view.context_executor = source
    params = ContextPhaseParams(9, source or 0, request.num_prompt_tokens)
    answer = policy.route_generation(replace(request, context_phase_params=params), view)
    assert isinstance(answer, Route), answer
    assert answer.generation is not None
    return answer.generation
