"""Whether an experiment's policies are told what nobody can know: true output lengths."""

from __future__ import annotations

from ..policies.registry import load
from .config import Experiment


def uses_oracle(config: Experiment) -> bool:
    """Whether a routing policy of `config` declares that it must be told true output lengths."""
    policy = config.policy
    choices = (policy.context_router, policy.generation_router, policy.mixed_router, policy.router)
    return any(
        bool(getattr(load(choice.name, "routing", str(config.root)), "is_oracle", False))
        for choice in choices
        if choice is not None
    )
