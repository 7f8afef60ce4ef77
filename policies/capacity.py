"""Capacity policies: how many KV blocks a request has when it begins, and what happens when they run out."""

from __future__ import annotations

from .interfaces import CapacityPolicy
from .registry import register


@register("guaranteed_no_evict", kind="capacity", source="TensorRT-LLM capacity scheduler")
class GuaranteedNoEvict(CapacityPolicy):
    """Blocks for prompt + max_tokens - 1 when it begins (a context phase: for its prompt); nobody is ever paused."""

    evicts = False


@register("max_utilization", kind="capacity", source="TensorRT-LLM capacity scheduler; vLLM preemption by recompute")
class MaxUtilization(CapacityPolicy):
    """Blocks as they are written; when they run out the youngest is paused, computed again, and resumes first."""

    evicts = True
