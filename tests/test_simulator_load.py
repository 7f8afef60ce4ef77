"""Steps with chunks that follow each other get slower, and a rest mends that: at once, or as the load drains."""

from __future__ import annotations

from random import Random

import pytest

from disagg.core.commands import Chunk, RunSteps
from disagg.core.cost import UNIT_BITS, ConstantCost, StepFeatures
from disagg.core.epoch_times import EpochTimes
from disagg.core.overheads import LaunchGaps
from disagg.simulator.timing import ModelTiming
from tests.simulation_helpers import World, executors

MS = 10**9
RESETS = LaunchGaps(millionths_under_load=100_000, load_after=20 * MS)
DRAINS = LaunchGaps(millionths_under_load=100_000, load_after=20 * MS, load_drain=3)


def decodes(epoch: int) -> RunSteps:
    return RunSteps(epoch, epoch, 1, 1, num_decodes=1, num_kv_tokens=10)


def chunk(epoch: int) -> RunSteps:
    return RunSteps(epoch, epoch, 1, 1, chunks=(Chunk(1, 0, 10, True, ()),), decodes=False)


class OneExecutor:
    """Its steps take 10 ms, and longer under load."""

    def __init__(self, gaps: LaunchGaps) -> None:
        self.timing = ModelTiming({1: ConstantCost(10 * MS)}, 1, gaps={1: gaps})
        self.now = 0
        self._epoch = 0

    def step(self, has_chunks: bool = True) -> int:
        """Picoseconds that the next step takes, from now on."""
        self._epoch += 1
        self.timing.begin(1, chunk(self._epoch) if has_chunks else decodes(self._epoch), self.now)
        began, self.now = self.now, self.timing.end_of_step(1, 1)
        return self.now - began

    def steps(self, count: int) -> OneExecutor:
        for _ in range(count):
            self.step()
        return self

    def rest(self, ps: int) -> OneExecutor:
        self.now += ps
        return self

    def kv_leaves(self) -> OneExecutor:
        self.timing.kv_leaves(1, self.now)
        return self

    def kv_left(self) -> OneExecutor:
        self.timing.kv_left(1, self.now)
        return self


def longer(load_ms: float) -> float:
    """Picoseconds of a step that begins after so many ms of load."""
    return 10 * MS * (1 + 0.1 * min(1.0, load_ms / 20))


def near(ms: float) -> object:
    return pytest.approx(longer(ms), rel=2e-6)


def test_a_rest_takes_its_part_of_the_load_at_its_rate_and_steps_that_follow_add_to_what_is_left() -> None:
    one = OneExecutor(DRAINS).steps(3)  # 10 + 10.5 + 11 ms: more than counts
    one.rest(2 * MS)
    assert one.step() == near(20 - 3 * 2)
    assert one.step() == near(14 + 10.7)  # in full again
    one.rest(5 * MS)
    assert one.step() == near(20 - 3 * 5)
    assert one.rest(MS).step() == near(5 + 10.25 - 3)
    less = OneExecutor(DRAINS).steps(1).rest(MS)
    assert less.step() == near(10 - 3)


def test_a_rest_of_what_counts_of_a_load_over_its_rate_ends_it_whatever_came_before() -> None:
    for count in (2, 50):
        assert OneExecutor(DRAINS).steps(count).rest(20 * MS // 3 + 1).step() == 10 * MS
        assert OneExecutor(DRAINS).steps(count).rest(20 * MS // 3 - MS // 10).step() > 10 * MS


def test_decodes_end_a_load_at_once_before_a_rest_after_it_and_without_one() -> None:
    for before, after in ((0, 0), (1, 0), (0, 1), (1, 1)):
        one = OneExecutor(DRAINS).steps(4).rest(before)
        assert one.step(has_chunks=False) == 10 * MS
        assert one.rest(after).step() == 10 * MS


def test_while_kv_leaves_in_a_rest_the_load_stays_as_it_is() -> None:
    loaded = OneExecutor(DRAINS).steps(4)
    assert loaded.kv_leaves().rest(50 * MS).step() == near(20)  # on its way still
    assert loaded.rest(MS).kv_left().rest(2 * MS).step() == near(20 - 3 * 2)  # of three ms of rest
    # two at a time are not twice as many; before and between them it drains
    one = OneExecutor(DRAINS).steps(4).rest(MS).kv_leaves().rest(4 * MS).kv_leaves().rest(4 * MS).kv_left()
    one.rest(4 * MS).kv_left().rest(MS).kv_leaves().rest(4 * MS).kv_left().rest(MS)
    assert one.step() == near(20 - 3 * 3)
    # what left while a step ran, or in an earlier rest, is no matter of the next rest
    one = OneExecutor(DRAINS).steps(4).kv_leaves().rest(4 * MS).kv_left()
    one.step()
    one.timing.kv_leaves(1, one.now - 8 * MS)
    one.timing.kv_left(1, one.now - 5 * MS)
    assert one.rest(4 * MS).step() == near(20 - 3 * 4)


@pytest.mark.parametrize("seed", range(20))
def test_without_a_rate_any_rest_ends_a_load_to_the_picosecond(seed: int) -> None:
    """The formula as it was: the factor by the time since the first of the steps that follow each other began."""
    random = Random(seed)
    gaps = LaunchGaps(millionths_under_load=random.randrange(200_000), load_after=random.randrange(1, 100 * MS))
    one = OneExecutor(gaps)
    since, follows = 0, False
    for _ in range(300):
        has_chunks, rest = random.random() < 0.8, random.choice((0, 0, 0, 1, random.randrange(20 * MS)))
        one.rest(rest)
        if not (follows and has_chunks and not rest):
            since = one.now
        millionths = gaps.millionths_under_load * min(one.now - since, gaps.load_after) // gaps.load_after
        factor = (1 << UNIT_BITS) * (1_000_000 + millionths) // 1_000_000
        assert one.step(has_chunks) == EpochTimes(ConstantCost(10 * MS), StepFeatures(0, 0), factor).end_of(1)
        follows = has_chunks


def test_a_cluster_tells_of_its_transfers_where_a_load_drains() -> None:
    """A prompt every 11 ms on a context executor whose steps take 8 ms; the KV of each takes its time over the link."""

    def steps_of(gaps: LaunchGaps, link_bytes_per_s: float) -> list[int]:
        world = World(
            executors("cg", max_num_tokens=100, num_blocks=1000),
            cost=ConstantCost(8 * MS),
            gaps=gaps,
            link_bytes_per_s=link_bytes_per_s,
        )
        for number in range(1, 13):
            world.submit(number, number * 11 * MS, 100, 2)
        world.run()
        return [row.end_ps - row.start_ps for row in world.table("Step") if row.executor == 1]

    fast, slow = 1e12, 100_000 / 0.025
    resets, drains = (LaunchGaps(millionths_under_load=100_000, load_after=20 * MS, load_drain=d) for d in (0, 3))
    assert steps_of(resets, slow) == steps_of(resets, fast) == [8 * MS] * 12
    assert steps_of(drains, fast) == [8 * MS] * 12  # 3 ms of rest take 9 ms
    assert steps_of(drains, slow)[-1] == pytest.approx(8 * MS * 1.1, rel=2e-6)  # something leaves all the time
