"""Admission policies: whether a request enters the cluster, before it is routed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from .interfaces import AdmissionPolicy, PolicyError
from .parameters import number, whole
from .registry import register
from .routing_predicted import predicted_tpot, predicted_ttft
from .views import ExecutorPool, FleetView
from .vocabulary import PS_PER_MS, Admission, Admit, Hold, Reject, Request

_ADMIT = Admit()


@register("accept_all", kind="admission", source="every system's default")
class AcceptAll(AdmissionPolicy):
    """Admit everything."""

    def admit(self, request: Request, fleet: FleetView) -> Admission:
        return _ADMIT


@register("hold_when_full", kind="admission", source="DistServe; llm-d flow control")
class HoldWhenFull(AdmissionPolicy):
    """Hold while every executor that could compute the prompt is full; reject who has waited for `max_wait_ms`.

    Full: `max_active` requests dispatched and unanswered, by default the executor's max_batch_size.
    """

    def __init__(self, *, rng: Random, max_active: int | None = None, max_wait_ms: float | None = None) -> None:
        super().__init__(rng=rng)
        self.max_active = None if max_active is None else whole("hold_when_full", "max_active", max_active)
        wait = None if max_wait_ms is None else number("hold_when_full", "max_wait_ms", max_wait_ms)
        self.max_wait = None if wait is None else round(wait * PS_PER_MS)

    def admit(self, request: Request, fleet: FleetView) -> Admission:
        pool = _context_pool(fleet)
        if not pool.num_healthy or self._has_room(pool):
            return _ADMIT  # without a healthy executor: it is the router's to say so
        if self.max_wait is None:
            return Hold()
        until = request.arrival + self.max_wait
        if fleet.now >= until:
            return Reject(f"waited {self.max_wait / PS_PER_MS:g} ms while every executor was full")
        return Hold(until=until)

    def _has_room(self, pool: ExecutorPool) -> bool:
        if pool.vectorised:
            limit = pool.max_batch_size if self.max_active is None else self.max_active
            return bool(pool.healthy_part(pool.active_requests < limit).any())
        return any(row.active_requests < (self.max_active or row.max_batch_size) for row in pool.healthy_rows)


@register("reject_at_limit", kind="admission", source="vLLM production stack; Triton max_queue_size")
class RejectAtLimit(AdmissionPolicy):
    """Reject while `max_active` requests are with the executors that compute prompts."""

    def __init__(self, *, rng: Random, max_active: int) -> None:
        super().__init__(rng=rng)
        self.max_active = whole("reject_at_limit", "max_active", max_active)

    def admit(self, request: Request, fleet: FleetView) -> Admission:
        pool = _context_pool(fleet)
        active = int(pool.active_requests.sum()) if pool.vectorised else sum(pool.active_requests)
        return _ADMIT if active < self.max_active else Reject(f"{active} requests are active, the limit")


@register("early_rejection", kind="admission", source="Mooncake early rejection based on prediction")
class EarlyRejection(AdmissionPolicy):
    """Reject if the least predicted TTFT, or the least predicted TPOT, of any executor misses its objective * slack."""

    def __init__(self, *, rng: Random, slack: float = 1.0) -> None:
        super().__init__(rng=rng)
        self.slack = number("early_rejection", "slack", slack)

    def admit(self, request: Request, fleet: FleetView) -> Admission:
        generation = fleet.generation if fleet.generation.num_healthy else fleet.mixed
        for name, objective, predict, pool in (
            ("TTFT", request.ttft_objective, predicted_ttft, _context_pool(fleet)),
            ("TPOT", request.tpot_objective, predicted_tpot, generation),
        ):
            if objective is None or not pool.num_healthy:
                continue
            if pool.vectorised:
                least = float(pool.healthy_part(predict(request, pool)).min())
            else:
                least = float(min(predict(request, row) for row in pool.healthy_rows))
            if least > objective * self.slack:
                wanted = objective * self.slack / PS_PER_MS
                return Reject(f"predicted {name} {least / PS_PER_MS:.1f} ms anywhere, objective {wanted:.1f} ms")
        return _ADMIT


@register("shed_sheddable", kind="admission", source="llm-d; probabilistic shedding")
class ShedSheddable(AdmissionPolicy):
    """Reject a sheddable request with probability min(300 * saturation^5, 1).

    Sheddable: of one of `classes`, or of a priority below `below_priority`. Saturation: the mean over executors of the
    greater of queue / queue_limit and KV share in use / kv_limit, over all executors that serve.
    """

    def __init__(
        self,
        *,
        rng: Random,
        classes: Sequence[str] = (),
        below_priority: float = 0.5,
        queue_limit: float = 128,
        kv_limit: float = 1.0,
    ) -> None:
        super().__init__(rng=rng)
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            raise PolicyError(f"shed_sheddable: classes must list traffic classes, got {classes!r}")
        self.classes = frozenset(classes)
        self.below_priority = number("shed_sheddable", "below_priority", below_priority)
        self.queue_limit = number("shed_sheddable", "queue_limit", queue_limit, 1)
        self.kv_limit = number("shed_sheddable", "kv_limit", kv_limit, 1e-6)

    def admit(self, request: Request, fleet: FleetView) -> Admission:
        if request.traffic_class not in self.classes and request.priority >= self.below_priority:
            return _ADMIT
        saturation = self.saturation(fleet)
        probability = min(300 * saturation**5, 1.0)
        if self.rng.random() >= probability:
            return _ADMIT
        return Reject(f"shed at saturation {saturation:.2f}")

    def saturation(self, fleet: FleetView) -> float:
        rows = [row for pool in fleet.pools for row in pool.healthy_rows]
        loads = [
            max(
                (row.queued_requests + row.wire_requests) / self.queue_limit,
                (1 - row.kv_blocks_free / row.kv_blocks_total) / self.kv_limit,
            )
            for row in rows
        ]
        return sum(loads) / len(loads) if loads else 0.0


def _context_pool(fleet: FleetView) -> ExecutorPool:
    return fleet.context if fleet.context.num_healthy else fleet.mixed
