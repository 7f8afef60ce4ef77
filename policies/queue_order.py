"""Queue orders: which of the waiting requests is served first. Equal keys keep the order of arrival."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from random import Random
from typing import Any, Final

from .interfaces import PolicyError, QueueOrder
from .parameters import number, whole
from .registry import register
from .vocabulary import Request

_LEAST_WEIGHT: Final = 1e-6


@register("fcfs", kind="queue_order", source="every system's default")
class FirstComeFirstServed(QueueOrder):
    """In order of arrival at the queue."""

    def key(self, request: Request, now: int) -> Any:
        return 0


@register("lcfs", kind="queue_order", source="queueing theory")
class LastComeFirstServed(QueueOrder):
    """The latest arrival at the queue first."""

    def key(self, request: Request, now: int) -> Any:
        return -now


@register("priority", kind="queue_order", source="vLLM priority scheduling; TensorRT-LLM request priority")
class Priority(QueueOrder):
    """The highest priority first."""

    def key(self, request: Request, now: int) -> Any:
        return -request.priority


@register("shortest_prompt_first", kind="queue_order", source="shortest job first, by what is known")
class ShortestPromptFirst(QueueOrder):
    """The fewest prompt tokens first."""

    def key(self, request: Request, now: int) -> Any:
        return request.num_prompt_tokens


@register("wspt", kind="queue_order", source="Smith's rule")
class WeightedShortestPrompt(QueueOrder):
    """The most priority per prompt token first: weighted shortest processing time, a weight being the priority."""

    def key(self, request: Request, now: int) -> Any:
        return request.num_prompt_tokens / max(request.priority, _LEAST_WEIGHT)


@register("edf", kind="queue_order", source="earliest deadline first")
class EarliestDeadlineFirst(QueueOrder):
    """The least arrival + TTFT objective first; requests without an objective last."""

    def key(self, request: Request, now: int) -> Any:
        return inf if request.ttft_objective is None else request.arrival + request.ttft_objective


@register(
    "deficit_round_robin", kind="queue_order", source="Shreedhar and Varghese; fair queueing in llm-d flow control"
)
class DeficitRoundRobin(QueueOrder):
    """Rounds over traffic classes, in each of which a class may send `quantum` tokens times its weight.

    A request's key is the round in which its class's deficit, filled by a quantum each round, covers its prompt and those
    before it. A class that was away joins the round that is being served: it saves nothing up. That round is learnt from
    requests that leave the queue, the orchestrator's or an executor's.
    """

    def __init__(self, *, rng: Random, quantum: int = 4096, weights: Mapping[str, float] | None = None) -> None:
        super().__init__(rng=rng)
        self.quantum = whole("deficit_round_robin", "quantum", quantum)
        if weights is not None and not isinstance(weights, Mapping):
            raise PolicyError(f"deficit_round_robin: weights must map traffic classes to numbers, got {weights!r}")
        self.weights = {
            name: number("deficit_round_robin", f"weights.{name}", weight, _LEAST_WEIGHT)
            for name, weight in (weights or {}).items()
        }
        self._round = 0  # that is being served
        self._classes: dict[str, tuple[int, float]] = {}  # of its last request: the round, deficit left in it

    def key(self, request: Request, now: int) -> Any:
        name = request.traffic_class
        quantum = self.quantum * self.weights.get(name, 1.0)
        last, left = self._classes.get(name, (-1, 0.0))
        if last < self._round:
            last, left = self._round, quantum
        if left < request.num_prompt_tokens:
            rounds = -int(-(request.num_prompt_tokens - left) // quantum)
            last, left = last + rounds, left + rounds * quantum
        self._classes[name] = (last, left - request.num_prompt_tokens)
        return last

    def on_served(self, request: Request, key: Any, now: int) -> None:
        self._round = max(self._round, key)
