"""How far the oracle is from the best of all routings, on instances small enough to try every one of them.

An instance is the first few requests of an experiment under a seed of its own. A routing names the executors of each
request's phases; all are simulated, through the interface of every policy (`forced_routes.py`). What is not tried: to
hold a request back. Where the oracle's latency is the best one, and there only, it is a bound.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Final

from ..core.tables import RequestRow
from ..policies.vocabulary import PS_PER_S, FinishReason, Role
from .cluster import cluster_of
from .config import Experiment
from .config_keys import PolicyChoice
from .errors import ConfigError, ExperimentError
from .forced_routes import Choice, Recorded
from .simulated_rows import simulate_into
from .streams import repeat_seed
from .sweep_task import experiment_from, plain_of

MOST_REQUESTS: Final = 8
MOST_ROUTINGS: Final = 100_000  # of one instance
_COMPLETED: Final = (FinishReason.STOP.value, FinishReason.LENGTH.value)

# the answers at the context and at the generation stage
Option = tuple[Choice, Choice | None]


@dataclass(frozen=True)
class Gap:
    """One instance. Latencies are means over its requests, in seconds; a policy that lost a request has None.

    `best_routing` names each request's executors in the order of arrival, `context→generation` or one of them alone.
    """

    seed: int
    num_routings: int
    best_s: float
    best_routing: tuple[str, ...]
    policies: dict[str, float | None]

    def gap(self, policy: str) -> float | None:
        """Share by which the policy's latency is over the best one."""
        found = self.policies[policy]
        return None if found is None else found / self.best_s - 1


def options_of(config: Experiment) -> list[Option]:
    """Where one request may go: a context and a generation executor, or a mixed one for both phases."""
    executors = cluster_of(config).executors
    ids = {role: [e.id for e in executors if e.role is role] for role in Role}
    generation = ids[Role.GENERATION] or ids[Role.MIXED]
    found: list[Option] = [
        ((0, "route", context, None), (0, "route", reader, None))
        for context in ids[Role.CONTEXT]
        for reader in generation
    ]
    return found + [((0, "mixed", mixed, None), None) for mixed in ids[Role.MIXED]]


def instance_of(config: Experiment, num_requests: int, number: int) -> Experiment:
    """Instance `number`: the first requests of the first phase that counts, under a seed of its own."""
    phase = next((p for p in config.workload.phases if not p.exclude_from_results), config.workload.phases[0])
    phase = phase.model_copy(update={"requests": num_requests})
    workload = config.workload.model_copy(update={"phases": [phase]})
    return config.model_copy(update={"workload": workload, "seed": repeat_seed(config.seed, number)})


def with_router(config: Experiment, name: str) -> Experiment:
    """`config` with the policy `name` at every stage."""
    routers = dict.fromkeys(("context_router", "generation_router", "mixed_router"))
    choice = PolicyChoice(name=name)
    return config.model_copy(update={"policy": config.policy.model_copy(update={**routers, "router": choice})})


def latency_of(config: Experiment) -> float | None:
    """Mean latency of the requests of `config` in seconds; None if one did not complete."""
    latencies: list[int] = []
    is_whole = True

    def record(row: Any, planned: Any) -> None:
        nonlocal is_whole
        if type(row) is RequestRow:
            latencies.append(row.end_ps - row.arrival_ps)
            is_whole = is_whole and row.finish_reason in _COMPLETED

    simulate_into(config, record)
    return sum(latencies) / len(latencies) / PS_PER_S if is_whole else None


def check_size(config: Experiment, num_requests: int) -> int:
    """The number of routings of an instance. Raises ConfigError if they are too many to try."""
    if not 1 <= num_requests <= MOST_REQUESTS:
        raise ConfigError(f"--requests {num_requests}: must be 1 to {MOST_REQUESTS}")
    num_options = len(options_of(config))
    if num_options**num_requests > MOST_ROUTINGS:
        most = max(n for n in range(MOST_REQUESTS + 1) if num_options**n <= MOST_ROUTINGS)
        raise ConfigError(
            f"--requests {num_requests}: {num_options} choices for each make {num_options**num_requests} routings,"
            f" and up to {MOST_ROUTINGS} are tried; allowed for this cluster: 1 to {most}, or fewer executors"
        )
    return int(num_options**num_requests)


def measure_gap(config: Experiment, policies: Sequence[str]) -> Gap:
    """Every routing of the instance `config`, and what each of `policies` makes of it."""
    num_requests = sum(phase.requests or 0 for phase in config.workload.phases)
    best: tuple[float, tuple[Option, ...]] | None = None
    num_routings = 0
    for routing in _routings(config, num_requests):
        num_routings += 1
        found = latency_of(_forced(routing).applied(config, with_dispatch=False))
        if found is not None and (best is None or found < best[0]):
            best = (found, routing)
    if best is None:
        raise ExperimentError(f"seed {config.seed}: no routing serves all {num_requests} requests")
    latencies = {name: latency_of(with_router(config, name)) for name in policies}
    return Gap(config.seed, num_routings, best[0], tuple(map(_told, best[1])), latencies)


def _routings(config: Experiment, num_requests: int) -> Iterator[tuple[Option, ...]]:
    return product(options_of(config), repeat=num_requests)


def _forced(routing: Sequence[Option]) -> Recorded:
    context = {str(number): [option[0]] for number, option in enumerate(routing)}
    generation = {str(number): [option[1]] for number, option in enumerate(routing) if option[1] is not None}
    return Recorded(context, generation, {}, {})


def _told(option: Option) -> str:
    context, generation = option
    return f"{context[2]}" if generation is None else f"{context[2]}→{generation[2]}"


# ---- as a worker's task ---------------------------------------------------------------------------------------------


def gap_text(config: Experiment, policies: Sequence[str]) -> str:
    return json.dumps({"experiment": plain_of(config), "policies": list(policies)})


def gap_task(text: str) -> str:
    """A worker's deed: `measure_gap` of `gap_text`, as JSON."""
    data = json.loads(text)
    return json.dumps(asdict(measure_gap(experiment_from(data["experiment"]), data["policies"])))


def gap_of(text: str) -> Gap:
    data = json.loads(text)
    data["best_routing"] = tuple(data["best_routing"])
    return Gap(**data)
