"""Routing by what nobody can know: true output lengths. For comparison only; reports mark such runs."""

from __future__ import annotations

from random import Random

from .interfaces import RoutingPolicy
from .registry import register
from .routing_predicted import predicted_ttft
from .views import ExecutorRow, FleetView
from .vocabulary import Request, Route, RouteMixed, Routing, Stage


@register("oracle", kind="routing", source="this project")
class Oracle(RoutingPolicy):
    """Least predicted finish, of each phase by itself, with true output lengths known; greedy, so no bound in general.

    Context: predicted TTFT. Generation of `o` tokens: o steps at the mean batch that it will meet there, which is each
    present request's overlap min(o, left of it) / o summed, and at half its own growth of KV.
    """

    is_oracle = True

    def __init__(self, *, rng: Random) -> None:
        super().__init__(rng=rng)
        self._present: dict[int, dict[int, tuple[int, int]]] = {}  # executor: request id: (tokens, since)

    def route_context(self, request: Request, fleet: FleetView) -> Routing:
        if fleet.context.num_healthy:
            rows = fleet.context.healthy_rows
            return Route(context=min(rows, key=lambda row: predicted_ttft(request, row)).executor_id)
        rows = fleet.mixed.healthy_rows
        best = min(rows, key=lambda row: predicted_ttft(request, row) + self.generation_time(request, row))
        return RouteMixed(best.executor_id)

    def route_generation(self, request: Request, fleet: FleetView) -> Routing:
        pool = fleet.generation if fleet.generation.num_healthy else fleet.mixed
        return Route(generation=min(pool.healthy_rows, key=lambda row: self.generation_time(request, row)).executor_id)

    def generation_time(self, request: Request, row: ExecutorRow) -> float:
        """Picoseconds to generate its tokens there."""
        own = _tokens(request)
        predictor = row.predictor
        step = max(float(predictor.step_time(row)), 1.0)
        present = self._present.get(row.executor_id, {}).values()
        overlap = sum(min(own, max(tokens - (row.now - since) / step, 1)) / own for tokens, since in present)
        counted = row.running_requests + row.queued_requests + row.wire_requests
        kv = row.decode_kv_tokens + row.wire_tokens
        gone = 1 - overlap / len(present) if present else 1.0  # of the KV that is there now, over its own time
        mean_step = predictor.step_time(row, 1 + overlap - counted, request.num_prompt_tokens + own // 2 - gone * kv)
        return own * float(mean_step)

    def on_dispatched(self, request: Request, stage: Stage, executor: int, fleet: FleetView) -> None:
        if stage is not Stage.CONTEXT:
            self._present.setdefault(executor, {})[request.id] = (_tokens(request), fleet.now)

    def on_finished(self, request: Request, stage: Stage, executor: int, ok: bool, fleet: FleetView) -> None:
        if stage is not Stage.CONTEXT:
            self._present.get(executor, {}).pop(request.id, None)


def _tokens(request: Request) -> int:
    known = request.true_output_tokens
    return request.max_tokens if known is None else min(known, request.max_tokens)
