"""A throttle stands for a slower network, and does so alike in both worlds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from disagg.core.kv_layout import KvLayout
from disagg.runtime.transport_throttle import FairLink, Throttle, rank_share
from disagg.simulator.calls import Environment
from disagg.simulator.link import Link

PS_PER_NS = 1000
THROTTLED = """
schema_version: 1
name: throttled
seed: 1
model: {id: tiny-llama, dtype: float32, weights: random, seed: 0}
device: cpu
cluster:
  profile: spec:cpu-2core
  context_servers:
    num_instances: 1
    scheduler: {max_batch_size: 4, max_num_tokens: 512}
    kv_cache: {tokens_per_block: 16, max_tokens: 8192}
  generation_servers:
    num_instances: 1
    scheduler: {max_batch_size: 8}
    kv_cache: {tokens_per_block: 16, max_tokens: 8192}
  cache_transceiver: {backend: auto, throttle_gb_per_s: 0.0005}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: {type: fixed, value: 256}, osl: {type: fixed, value: 4}}
  max_tokens: 4
  phases:
    - {name: profiling, type: constant, rate: 2, requests: 4}
"""


class Clock:
    now = 0

    def __call__(self) -> int:
        return self.now


def test_transfers_on_a_throttle_end_when_they_end_on_the_simulators_link() -> None:
    rng = random.Random(3)
    arrivals = [(rng.randrange(5_000_000), rng.randrange(1, 4_000_000)) for _ in range(200)]
    env = Environment()
    link = Link(env, 2e9, latency=0, rank=0)
    simulated: dict[int, int] = {}
    for number, (at, size) in enumerate(arrivals):

        def done(number: int) -> None:
            simulated[number] = env.now // PS_PER_NS

        def arrive(event: object, number: int = number, size: int = size) -> None:
            link.transfer(size, done, number)

        env.timeout(at * PS_PER_NS).callbacks.append(arrive)
    env.run()

    throttled: dict[int, int] = {}
    fair = FairLink(2e9, 0)
    tickets = {}
    waiting = sorted((at, number) for number, (at, _) in enumerate(arrivals))
    while waiting or len(throttled) < len(arrivals):
        end = fair.next_end()
        if waiting and (end is None or waiting[0][0] <= end):
            at, number = waiting.pop(0)
            for ticket in fair.advance(at):
                throttled[tickets[ticket]] = at
            tickets[fair.enter(arrivals[number][1], at)] = number
        else:
            assert end is not None
            for ticket in fair.advance(end):
                throttled[tickets[ticket]] = end
    assert throttled.keys() == simulated.keys()
    assert max(abs(throttled[n] - simulated[n]) for n in throttled) <= 200  # nanoseconds, of roundings


def test_news_of_an_end_waits_for_the_throttle_and_for_the_bytes() -> None:
    clock = Clock()
    throttle = Throttle(1.0, 0.5, lambda rank: rank // 2, clock)  # half of 1e9 bytes/s
    told: list[str] = []
    first = throttle.enter(2, 1000, False)
    second = throttle.enter(3, 1000, False)  # of the same executor: they share
    other = throttle.enter(4, 1000, False)
    throttle.when_through(first, lambda: told.append("first"))
    throttle.when_through(other, lambda: told.append("other"))
    clock.now = 1999
    assert throttle.due() == []
    clock.now = 2000
    for then in throttle.due():
        then()
    assert told == ["other"]
    clock.now = 4000
    for then in throttle.due():
        then()
    assert told == ["other", "first"]
    throttle.when_through(second, lambda: told.append("second"))  # its bytes came late
    assert told == ["other", "first", "second"]
    assert throttle.seconds_to_next() is None


def test_each_executor_s_link_has_the_rate_that_is_asked_for_it() -> None:
    clock = Clock()
    throttle = Throttle(lambda executor: 4.0 if executor == 1 else 1.0, 0.5, lambda rank: rank // 2, clock)
    told: list[str] = []
    for rank, name in ((2, "fast"), (4, "slow")):
        throttle.when_through(throttle.enter(rank, 1000, True), lambda name=name: told.append(name))
    for at, through in ((499, []), (500, ["fast"]), (1999, ["fast"]), (2000, ["fast", "slow"])):
        clock.now = at
        for then in throttle.due():
            then()
        assert told == through


@pytest.mark.parametrize(("tp", "stages"), [(1, (5,)), (2, (3, 2)), (8, (5,))])
def test_the_ranks_of_an_executor_share_its_rate_out_completely(tp: int, stages: tuple[int, ...]) -> None:
    layout = KvLayout(tp, len(stages), stages, 4, 8, "float32")
    assert sum(rank_share(layout, rank) for rank in range(layout.num_ranks)) == pytest.approx(1)


DOMAINS = THROTTLED.replace(
    THROTTLED[THROTTLED.index("  context_servers") : THROTTLED.index("policy:")],
    """\
  instances:
    - {role: context, domain: a, kv_cache: {tokens_per_block: 16, max_tokens: 8192}}
    - {role: generation, domain: a, kv_cache: {tokens_per_block: 16, max_tokens: 8192}}
    - {role: generation, domain: b, kv_cache: {tokens_per_block: 16, max_tokens: 8192}}
  cache_transceiver: {backend: auto, across_domains_gb_per_s: 0.0005}
""",
)


@pytest.mark.mpi
def test_between_two_domains_kv_takes_longer_in_both_worlds(disagg: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "domains.yaml").write_text(DOMAINS)
    for world in ("simulation", "hardware"):
        assert disagg("run", tmp_path / "domains.yaml", "--backend", world, "--output", tmp_path / world) == 0
        rows = pd.read_parquet(tmp_path / world / "transfers.parquet")
        assert rows["ok"].all()
        seconds = (rows["end_s"] - rows["start_s"]).groupby(rows["reader"]).mean()
        assert seconds[2] < 0.25  # within domain a: the machine's own
        assert seconds[3] == pytest.approx(1.05, rel=0.1)  # 256 tokens of 2,048 bytes at half a MB/s


@pytest.mark.mpi
def test_one_file_with_a_throttle_gives_the_same_transfer_times_in_both_worlds(
    disagg: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "throttled.yaml").write_text(THROTTLED)
    seconds = {}
    for world in ("simulation", "hardware"):
        assert disagg("run", tmp_path / "throttled.yaml", "--backend", world, "--output", tmp_path / world) == 0
        rows = pd.read_parquet(tmp_path / world / "transfers.parquet").sort_values("request_id")
        assert rows["ok"].all()
        seconds[world] = (rows["end_s"] - rows["start_s"]).tolist()
    for simulated, real in zip(*seconds.values(), strict=True):
        assert simulated > 1.0  # half a MB/ms: the throttle, not the machine
        assert real == pytest.approx(simulated, rel=0.10)


@pytest.mark.mpi
@pytest.mark.parametrize("world", ["simulation", "hardware"])
def test_a_transfer_that_times_out_fails_its_request_alone(
    disagg: Callable[..., int], tmp_path: Path, world: str
) -> None:
    """Prompts of two lengths whose transfers never meet: those of the long ones would take longer than they may."""
    rows = "".join(f"2023-11-16 18:15:{40 + 2 * n:02}.0000000,{(40, 400)[n % 2]},4\n" for n in range(6))
    (tmp_path / "two.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    text = THROTTLED[: THROTTLED.index("workload:")].replace(
        "throttle_gb_per_s: 0.0005", "throttle_gb_per_s: 0.0005, kv_transfer_timeout_ms: 600, on_failure: fail"
    )
    phase = "{name: profiling, type: trace, requests: 6, speedup: 2}"
    text += f"workload: {{dataset: {{type: azure, path: two.csv}}, max_tokens: 4, phases: [{phase}]}}\n"
    (tmp_path / "late.yaml").write_text(text)
    assert disagg("run", tmp_path / "late.yaml", "--backend", world, "--output", tmp_path / "out") == 0
    requests = pd.read_parquet(tmp_path / "out" / "requests.parquet").sort_values("request_id")
    is_long = requests["num_prompt_tokens"] == 400
    assert requests["error"].isna().equals(~is_long)
    assert all("the KV transfer took over" in error for error in requests["error"][is_long])
