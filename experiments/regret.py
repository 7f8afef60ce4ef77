"""What a decision cost: the run again with that one request sent elsewhere, every other decision as it was.

The regret of a decision is how much shorter all requests' latencies together would have been with the best of the other
executors, in hindsight; 0 where none is better. It counts what the decision did to the others, too. Hindsight is that of
one decision: what the policy would have decided after it is not asked again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ..core.tables import RequestRow
from ..policies.vocabulary import PS_PER_S, FinishReason, Role
from .cluster import cluster_of
from .config import Experiment
from .errors import ExperimentError
from .forced_routes import Choice, Recorded, choices_of
from .simulated_rows import SimulatedRows, simulate_into, simulate_rows
from .streams import stream
from .sweep_task import experiment_from, plain_of

if TYPE_CHECKING:
    import pandas as pd

_COMPLETED: Final = (FinishReason.STOP.value, FinishReason.LENGTH.value)


@dataclass(frozen=True)
class Regret:
    """One decision of a run. Times in seconds; `chosen` and `best` name executors, `context→generation` where both were bound.

    `regret_s`: latency of all requests together that the best alternative would have saved; `own_s`: of it, this
    request's own (negative: it would have paid for the others). `rank` is the choice's place among all, from 1.
    """

    request_id: int
    stage: str
    at_s: float
    num_prompt_tokens: int
    view_age_s: float | None
    chosen: str
    best: str
    num_alternatives: int
    rank: int
    regret_s: float
    own_s: float


def regrets_of(
    config: Experiment,
    num_requests: int,
    rows: SimulatedRows | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Regret]:
    """Of all decisions on `num_requests` requests drawn by the run's seed, in order of time; `rows` is the run if it is had.

    A decision is left out if it was a rejection, was made again after a failure, or had no alternative. Raises ExperimentError.
    """
    run = simulate_rows(config) if rows is None else rows
    choices = choices_of(run.decisions, run.requests)
    ids = sorted(int(i) for i in run.counted["request_id"])
    drawn = stream(config.seed, "regret").permutation(len(ids))[:num_requests]
    executors = cluster_of(config).executors
    pools = {role: [e.id for e in executors if e.role is role] for role in Role}
    actual = _latencies(run.requests)
    table = run.decisions.set_index(["request_id", "stage"])
    prompts = dict(zip(run.requests["request_id"], run.requests["num_prompt_tokens"]))
    found: list[Regret] = []
    for number, request in enumerate(sorted(ids[place] for place in drawn)):
        progress(number, len(drawn))
        for stage in ("context", "generation"):
            others = list(_alternatives(choices, request, stage, pools))
            if not others:
                continue
            totals = [(_simulated(config, changed), name) for name, changed in others]
            compared = [(values, name) for values, name in totals if values is not None and set(values) == set(actual)]
            if not compared:
                continue
            saved = [(sum(actual.values()) - sum(values.values()), values, name) for values, name in compared]
            most, values, name = max(saved, key=lambda each: each[0])
            is_better = most > 0
            row = table.loc[[(request, stage)]].iloc[-1]
            chosen = _name(getattr(choices, stage)[str(request)][0])
            found.append(
                Regret(
                    request_id=request,
                    stage=stage,
                    at_s=float(row["at_s"]),
                    num_prompt_tokens=int(prompts[request]),
                    view_age_s=_number(row["max_age_s"]),
                    chosen=chosen,
                    best=name if is_better else chosen,
                    num_alternatives=len(compared),
                    rank=1 + sum(each[0] > 0 for each in saved),
                    regret_s=most / PS_PER_S if is_better else 0.0,
                    own_s=(actual[request] - values[request]) / PS_PER_S if is_better else 0.0,
                )
            )
    return sorted(found, key=lambda each: (each.at_s, each.request_id, each.stage))


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def _alternatives(
    choices: Recorded, request: int, stage: str, pools: dict[Role, list[int]]
) -> Iterator[tuple[str, Recorded]]:
    """Every other executor that the cluster allows at this stage: its name, and the run's choices with it."""
    key = str(request)
    made: dict[str, list[Choice]] = getattr(choices, stage)
    if len(made.get(key, ())) != 1:
        return
    wait, answer, executor, generation = made[key][0]
    if answer == "reject" or executor is None:
        return
    if stage == "generation":
        partner = choices.context.get(key, [(0, "", None, None)])[0][2]
        for other in (*pools[Role.GENERATION], *pools[Role.MIXED]):
            if other not in (executor, partner):
                yield _with(choices, stage, key, (wait, "route", other, None))
        return
    decided = generation is not None or key in choices.generation
    readers: Sequence[int | None] = (generation,) if decided else pools[Role.GENERATION]
    for other in pools[Role.CONTEXT]:
        if other != executor:
            for reader in readers:
                yield _with(choices, stage, key, (wait, "route", other, reader))
    if generation is not None:
        for reader in pools[Role.GENERATION]:
            if reader != generation:
                yield _with(choices, stage, key, (wait, answer, executor, reader))
    for other in pools[Role.MIXED]:
        if other != executor:
            yield _with(choices, stage, key, (wait, "mixed", other, None))


def _with(choices: Recorded, stage: str, key: str, choice: Choice) -> tuple[str, Recorded]:
    changed = {**getattr(choices, stage), key: [choice]}
    return _name(choice), replace(choices, **{stage: changed})


def _name(choice: Choice) -> str:
    _, answer, executor, generation = choice
    whole = " whole" if answer == "mixed" else ""
    return f"{executor}{whole}" if generation is None else f"{executor}→{generation}"


def _latencies(requests: pd.DataFrame) -> dict[int, int]:
    """Picoseconds from arrival to end of each request that completed."""
    done = requests[requests["finish_reason"].isin(_COMPLETED)]
    ends = zip(done["request_id"], done["arrival_s"], done["end_s"])
    return {int(i): round(end * PS_PER_S) - round(arrival * PS_PER_S) for i, arrival, end in ends}


def _simulated(config: Experiment, choices: Recorded) -> dict[int, int] | None:
    """The latencies under these choices; None where they cannot be carried out."""
    found: dict[int, int] = {}

    def record(row: Any, planned: Any) -> None:
        if type(row) is RequestRow and row.finish_reason in _COMPLETED:
            found[row.request_id] = row.end_ps - row.arrival_ps

    try:
        simulate_into(choices.applied(config, with_dispatch=False), record)
    except ExperimentError:
        return None
    return found


# ---- as a worker's task ---------------------------------------------------------------------------------------------


def regret_text(config: Experiment, num_requests: int) -> str:
    return json.dumps({**plain_of(config), "num_requests": num_requests}, sort_keys=True)


def regret_task(text: str) -> str:
    """A worker's deed: `regrets_of` of `regret_text`, as JSON with `regrets`, or with `error`."""
    data = json.loads(text)
    try:
        found = regrets_of(experiment_from(data), data["num_requests"])
    except ExperimentError as error:
        return json.dumps({"error": "; ".join(error.problems)})
    return json.dumps({"regrets": [asdict(each) for each in found]})
