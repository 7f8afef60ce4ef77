"""What `disagg calibrate` runs: small loads that drive a warm cluster through the steps whose time is to be known.

Each session is an ordinary load on the ordinary serving path. Decode batches are filled with canned contexts (nothing is
computed, KV is left as it is), so that a full batch of long sequences costs nothing; their ends are staggered, so that one
session goes through every batch size on its way down. Contexts alone end with their first token. Where sequences share a
prefix, it is computed once, and executors reuse its blocks in those sessions. The serving sessions have the lengths of the
experiment file's own workload.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Final

from ..core.cost import UNITS_PER_S, RooflineCost, StepFeatures
from ..core.step_sizes import CHUNK_SLOTS, graph_sizes
from ..runtime.session_series import Session
from .calibration_session import Ask, ClusterLimits, PromptIds, SessionPlan, session_of
from .config import Experiment
from .workload import Workload

_MOST_BUSY: Final = 1000  # prompts without a rest, where each takes next to nothing
_MOST_KV_TOKENS: Final = 1 << 18  # in one decode batch
_LEVELS: Final = (16, 128, 512, 1024, 2048, 4096, 8192, 16384)
_PROMPTS: Final = (
    *(16, 32, 64, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1664, 1792, 1920, 2048),
    *(2304, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192),
)
_BURSTS: Final = ((2, 32), (4, 128), (8, 128), (2, 512), (4, 512), (8, 1024), (16, 64), (32, 256))
_LAUNCHED: Final = (16, 64, 128, 256, 384, 512)  # so short that the host takes longer to launch than a device to run
_TOO_MANY: Final = (3 * CHUNK_SLOTS // 2, 4)  # prompts of so many tokens: more than a graph has room for, few rows
_SHARED: Final = ((1024, 4), (2048, 2), (4096, 8))  # prefixes of so many tokens, each of so many sequences
_MOST_ALIKE: Final = 48  # sequences that share prefixes
_BEHIND: Final = 512  # tokens of a prompt behind its prefix, at most
# (cached tokens, prompts at once, tokens of each behind them)
_CACHED: Final = tuple(
    (cached, count, own)
    for cached in (1024, 3072, 8192)
    for count, own in (
        *((1, 32), (1, 128), (1, 256), (1, 384), (1, 512), (1, 896)),
        *((2, 64), (2, 256), (3, 192), (4, 128), (8, 48)),
        *((2, 640), (3, 512), (4, 384), (8, 160)),  # more rows than a graph has
    )
)
# Bursts of so long each, behind rests that are as even as the length of a burst is foreseen; the first prompt of each is
# the one that is behind the rest.
_BURST_S: Final = 0.12
_RESTS_S: Final = tuple(0.002 + 0.005 * i for i in range(12))
_LONGER: Final = 1.1  # than a data sheet says: better a rest too long than none
_LONG_REST_S: Final = 0.1
_RESTED_IN_A_ROW: Final = 6  # bursts
_RESTED: Final = (256, 1024, 2048)  # tokens of the first prompt, about
_LOADING: Final = 1024  # tokens of each of the others
_AT_ONCE: Final = 18  # prompts of a step, of those that are handed over without a rest


@dataclass(frozen=True)
class Effort:
    """How much is measured. `hold`: decode steps at each batch size; `share`: of the prompt lengths and levels, every
    so many; `serving`: (concurrency, requests) of closed loops.
    """

    hold: int
    rounds: int  # over all decode batches
    repeats: int
    share: int
    serving: tuple[tuple[int, int], ...]
    poisson: int
    most_tokens: int  # of one prompt
    busy: tuple[tuple[int | None, float], ...]  # (prompts at a time, seconds) without a rest; None: two full batches
    rests: int  # of each length, behind a load
    handed_over_s: float  # seconds of hand-overs without a rest


STANDARD: Final = Effort(
    hold=12,
    rounds=2,
    repeats=4,
    share=1,
    serving=((1, 12), (4, 30), (16, 80), (64, 180), (128, 260)),
    poisson=60,
    most_tokens=32_768,
    busy=((2, 2.0), (6, 3.0), (None, 5.0)),
    rests=3,
    handed_over_s=4.0,
)
QUICK: Final = Effort(5, 1, 2, 3, ((1, 4), (6, 24)), 12, 1024, (), 0, 0.0)


def plan_sessions(config: Experiment, cost: RooflineCost, effort: Effort = STANDARD) -> tuple[Session, ...]:
    """All sessions, in order. `cost`: about how long steps take, to space what must not meet."""
    cluster = ClusterLimits(config)
    plans = [
        *_contexts(cluster, effort, cost),
        *_launches(cluster, effort, cost),
        *_cached(cluster, effort, cost),
        *_decodes(cluster, effort),
        *_shared(cluster, effort, cost),
        *_serving(config, cluster, effort, cost),
        *_loads(cluster, effort, cost),
    ]
    prompts = PromptIds(config.seed, cluster.vocab_size)
    return tuple(session_of(plan, cluster, prompts.of_session(number, plan.asks)) for number, plan in enumerate(plans))


def _contexts(cluster: ClusterLimits, effort: Effort, cost: RooflineCost) -> Iterator[SessionPlan]:
    """Prompts one at a time, several at once, and longer than a step holds."""
    most = min(cluster.longest, effort.most_tokens)
    lengths = [n for n in _PROMPTS[:: effort.share] if n <= min(most, cluster.step_tokens)]
    lengths += [n * cluster.step_tokens + 100 for n in (1, 3) if n * cluster.step_tokens + 100 <= most]
    singles = [Ask(n, 1) for _ in range(effort.repeats) for n in lengths for _ in range(cluster.num_prefilling)]
    yield SessionPlan("contexts one at a time", singles, cluster.num_prefilling)
    bursts: list[Ask] = []
    at = 0.0
    for _ in range(effort.repeats):
        for count, length in _BURSTS[:: effort.share]:
            count = min(count, cluster.context_batch)
            if length > most or cluster.rounded(length) * (count + 1) > cluster.kv_tokens:
                continue
            bursts += [Ask(length, 1, at)] * ((count + 1) * cluster.num_prefilling)  # the first one runs alone
            chunk = StepFeatures(0, 0, ((0, length, True),))
            at += 2.5 * (count + 1) * cost.step_time(chunk) / UNITS_PER_S + 0.01
    yield SessionPlan("contexts in bursts", bursts, None)


def _launches(cluster: ClusterLimits, effort: Effort, cost: RooflineCost) -> Iterator[SessionPlan]:
    """Short prompts in steps that are no graph: they take as long as the host launches kernels.

    Such are all that tell of their layers, and those with more prompts than a graph has room for.
    """
    if cluster.sends_early:
        most = min(cluster.longest, effort.most_tokens, cluster.step_tokens)
        lengths = [n for n in _LAUNCHED[:: effort.share] if n <= most]
        asks = [Ask(n, 1) for _ in range(effort.repeats) for n in lengths for _ in range(cluster.num_prefilling)]
        yield SessionPlan("contexts kernel by kernel", asks, 2 * cluster.num_prefilling, sends_early=True)
    count, length = _TOO_MANY
    long = min(cluster.step_tokens, effort.most_tokens, cluster.longest)  # the others come while it fills a step
    room = cluster.kv_tokens - cluster.rounded(long)
    if (
        cluster.context_batch > count
        and count * length < cluster.step_tokens
        and count * cluster.rounded(length) <= room
    ):
        every_s = 0.06 + 2.5 * cost.step_time(StepFeatures(0, 0, ((0, long, True),))) / UNITS_PER_S
        bursts = [
            Ask(tokens, 1, every_s * number)
            for number in range(2 * effort.repeats)
            for tokens in (long, *(length,) * count)
            for _ in range(cluster.num_prefilling)
        ]
        yield SessionPlan("more contexts than a graph holds", bursts, None)


def _cached(cluster: ClusterLimits, effort: Effort, cost: RooflineCost) -> Iterator[SessionPlan]:
    """Prompts behind prefixes that were computed before, one and several at once: steps with few rows behind much KV."""
    most = min(cluster.longest, effort.most_tokens)
    asks: list[Ask] = []
    at = 0.0
    computed: set[int] = set()
    for _ in range(-(-effort.repeats // 2) if cluster.may_share else 0):
        for cached, count, own in _CACHED[:: effort.share]:
            prefix = min(cached, most // 2) // cluster.tokens_per_block * cluster.tokens_per_block
            count = min(count, cluster.context_batch)
            taken = cluster.rounded(prefix) * len({*computed, prefix}) + cluster.rounded(own) * (count + 1)
            if not prefix or prefix + own > most or own > cluster.step_tokens or taken > cluster.kv_tokens // 2:
                continue
            if prefix not in computed:
                computed.add(prefix)
                asks += [Ask(prefix + 1, 1, at, (prefix, prefix))] * cluster.num_prefilling
                at += 1.5 * cost.step_time(StepFeatures(0, 0, ((0, prefix + 1, True),))) / UNITS_PER_S + 0.01
            # the first one runs alone, while the others come
            asks += [Ask(prefix + own, 1, at, (prefix, prefix))] * ((count + 1) * cluster.num_prefilling)
            at += 2.5 * (count + 1) * cost.step_time(StepFeatures(0, 0, ((prefix, own, True),))) / UNITS_PER_S + 0.01
    if asks:
        yield SessionPlan("contexts behind cached tokens", asks, None, shares=True)


def _decodes(cluster: ClusterLimits, effort: Effort) -> Iterator[SessionPlan]:
    """Full batches at several mean context lengths whose sequences end one batch size after another.

    Lengths are unlike in each, as users' are: attention over such a batch takes longer than over one of equal lengths.
    """
    for number in range(effort.rounds):
        random = Random(17 + number)
        for level in _LEVELS[:: effort.share if number % 2 == 0 else -effort.share]:
            ends = _staggered(_batch_at(cluster, level, effort), effort.hold)
            if ends and level <= effort.most_tokens and level + max(ends) + 2 <= cluster.longest:
                lengths = _spread(level, len(ends), cluster.longest - max(ends) - 2, random)
                asks = [Ask(n, end) for n, end in zip(lengths, ends, strict=True) for _ in range(cluster.num_decoding)]
                yield SessionPlan(f"decodes at {level} tokens", asks, None, is_canned=True)
        unlike = list(_unlike(cluster, effort, Random(7 + number)))
        yield SessionPlan("decodes at mixed lengths", unlike, None, is_canned=True)


def _spread(mean: int, count: int, most: int, random: Random) -> list[int]:
    """Lengths about a mean, a third of it to twice as long: their sum is not above that of as many of the mean."""
    shares = [min(2.0, max(1 / 3, random.lognormvariate(0, 0.6))) for _ in range(count)]
    scale = mean * count / sum(shares)
    return [max(1, min(most, int(share * scale))) for share in shares]


def _unlike(cluster: ClusterLimits, effort: Effort, random: Random) -> Iterator[Ask]:
    """Sequences of lengths as users have them, ending in no order of length."""
    ends = _staggered(_batch_at(cluster, 1024, effort), effort.hold)
    typical = min(1024, cluster.longest // 4, effort.most_tokens)
    for end in random.sample(ends, len(ends)):
        for _ in range(cluster.num_decoding):
            length = max(1, min(round(random.lognormvariate(0, 0.8) * typical * 0.7), cluster.longest // 2))
            yield Ask(length, end)


def _shared(cluster: ClusterLimits, effort: Effort, cost: RooflineCost) -> Iterator[SessionPlan]:
    """Decode batches whose sequences begin alike, some in each of several ways: KV of theirs is read again in every step.

    Prompts alone compute the prefixes. Then the sequences come one by one, in no order of kind: their prompts are short
    ones behind cached KV. All go on until the last has come, and end one after another.
    """
    for number, (tokens, alike) in enumerate(_SHARED[:: effort.share] if cluster.may_share else ()):
        longest = min(effort.most_tokens // 4, cluster.longest // 4, cluster.kv_tokens // 16)
        prefix = min(tokens, longest) // cluster.tokens_per_block * cluster.tokens_per_block
        behind = min(_BEHIND, prefix // 2)
        batch = min(cluster.max_batch, _MOST_ALIKE, cluster.kv_tokens * 9 // 10 // cluster.rounded(prefix + behind + 1))
        kinds = batch // alike
        if not prefix or not kinds:
            continue
        batch = kinds * alike
        next_s = 1.5 * cost.step_time(StepFeatures(batch, 0, ((prefix, behind, True),))) / UNITS_PER_S
        decode_s = cost.step_time(StepFeatures(batch, batch * prefix)) / UNITS_PER_S
        outputs = [batch * (1 + int(next_s / decode_s)) + end for end in reversed(_staggered(batch, effort.hold))]
        most = prefix + behind + outputs[-1] + 2
        if most > cluster.longest or batch * cluster.rounded(most) > cluster.kv_tokens:
            continue
        alone_s = 1.5 * cost.step_time(StepFeatures(0, 0, ((0, prefix + 1, True),))) / UNITS_PER_S
        random = Random(29 + number)
        asks, at = [], 0.0
        for kind in range(kinds):
            asks += [Ask(prefix + 1, 1, at, (kind, prefix))] * cluster.num_decoding
            at += alone_s
        all_kinds = [kind for kind in range(kinds) for _ in range(alike)]
        for kind, output in zip(random.sample(all_kinds, batch), outputs, strict=True):
            prompt = prefix + random.randint(1, behind)
            asks += [Ask(prompt, output, at, (kind, prefix))] * cluster.num_decoding
            at += next_s
        yield SessionPlan(f"decodes that share {prefix} tokens, {alike} at a time", asks, None, shares=True)


def _batch_at(cluster: ClusterLimits, level: int, effort: Effort) -> int:
    """Sequences of `level` tokens that fit into a decode batch, with the tokens that they will generate."""
    longest = level + effort.hold * (len(graph_sizes(cluster.max_batch)) + 2) + cluster.max_batch // 8
    return min(cluster.max_batch, cluster.kv_tokens * 9 // 10 // cluster.rounded(longest), _MOST_KV_TOKENS // level)


def _staggered(batch: int, hold: int) -> list[int]:
    """Output lengths of a batch that stays `hold` steps at each of its graph sizes on the way down.

    At the largest a little longer: until the last sequence has come.
    """
    sizes = sorted(graph_sizes(batch), reverse=True) if batch > 0 else []
    return [2 + hold + batch // 8 + hold * sum(size > i for size in sizes) for i in range(batch)]


def _serving(config: Experiment, cluster: ClusterLimits, effort: Effort, cost: RooflineCost) -> Iterator[SessionPlan]:
    """Requests of the file's own lengths, at several loads; and hand-overs of every length."""
    lengths = cycle(Ask(*pair) for pair in _lengths(config, cluster, effort))
    if cluster.hands_over:
        sizes = [n for n in _PROMPTS[1 :: max(2, effort.share)] if n <= min(cluster.longest - 2, effort.most_tokens)]
        yield SessionPlan("hand-overs one at a time", [Ask(n, 2) for n in sizes for _ in range(effort.repeats)], 1)
        burst = [Ask(n, 3) for n in (64, 256) for _ in range(min(8, cluster.context_batch))]
        yield SessionPlan("hand-overs at once", [ask for ask in burst if ask.prompt < cluster.longest - 4], 8)
    most = cluster.max_batch * cluster.num_decoding
    for concurrency, count in effort.serving:
        if concurrency <= most:
            scale = 1 if concurrency == 1 else cluster.num_decoding
            asks = list(islice(lengths, count * scale))
            yield SessionPlan(f"serving, {concurrency * scale} at a time", asks, concurrency * scale)
    for at_a_time, seconds in effort.busy:
        count = min(at_a_time or 2 * cluster.context_batch, 2 * cluster.context_batch)
        if busy := list(_busy(lengths, cluster, seconds, cost)):
            yield SessionPlan(f"contexts without a rest, {count} at a time", busy, count * cluster.num_prefilling)
    asks = list(islice(lengths, effort.poisson))
    yield SessionPlan("serving, open loop", list(_spaced(asks, cost, cluster)), None)


def _busy(lengths: Iterable[Ask], cluster: ClusterLimits, seconds: float, cost: RooflineCost) -> Iterator[Ask]:
    """Prompts alone for so long that a device gets as warm, and its clock as low, as under a load that does not end."""
    left = seconds * UNITS_PER_S * cluster.num_prefilling
    for ask in islice(lengths, _MOST_BUSY):
        left -= cost.step_time(StepFeatures(0, 0, ((0, ask.prompt, True),)))
        if left < 0:
            return
        yield Ask(ask.prompt, 1)


def _loads(cluster: ClusterLimits, effort: Effort, cost: RooflineCost) -> Iterator[SessionPlan]:
    """What a rest takes of a load: prompts alone, in bursts that rests part, and, on executors that hand over, so many small
    ones that KV leaves all the time.
    """
    if rested := _rested(cluster, effort, cost):
        yield SessionPlan("contexts after rests", rested, None)
    if not cluster.hands_over or not effort.handed_over_s:
        return
    mean = min(cluster.step_tokens // _AT_ONCE, cluster.longest // 4, effort.most_tokens)
    at_once = min(_AT_ONCE, cluster.context_batch)
    if mean < _PROMPTS[0] or cluster.rounded(2 * mean) * at_once > cluster.kv_tokens:
        return
    step_s = cost.step_time(StepFeatures(0, 0, ((0, mean, True),) * at_once)) / UNITS_PER_S
    count = min(_MOST_BUSY, round(effort.handed_over_s * at_once / step_s)) * cluster.num_prefilling
    asks = [Ask(n, 2) for n in _spread(mean, count, 2 * mean, Random(31))]
    yield SessionPlan("hand-overs without a rest", asks, 3 * at_once * cluster.num_prefilling)  # some are on their way


def _rested(cluster: ClusterLimits, effort: Effort, cost: RooflineCost) -> list[Ask]:
    """Bursts each of which begins with one prompt alone; the others come while it runs. Some come after so long a rest that
    none before is still running. None at all where one of them does not fit.
    """

    def seconds(*prompts: int) -> float:
        return cost.step_time(StepFeatures(0, 0, tuple((0, n, True) for n in prompts))) / UNITS_PER_S

    asks: list[Ask] = []
    random, at = Random(37), 0.0
    rests = [rest for rest in _RESTS_S for _ in range(effort.rests)]
    rests = random.sample(rests, len(rests))
    for i in range(len(rests) - _RESTED_IN_A_ROW, 0, -_RESTED_IN_A_ROW):
        rests.insert(i, _LONG_REST_S)
    for number, rest in enumerate(rests):
        first = random.randint(*(round(_RESTED[number % len(_RESTED)] * by) for by in (0.9, 1.0)))
        alone_s, each_s = seconds(first), seconds(_LOADING, _LOADING) / 2
        count = max(1, round((_BURST_S - alone_s) / each_s))
        others = (_LOADING,) * count
        fits = cluster.rounded(first) + count * cluster.rounded(_LOADING) <= cluster.kv_tokens // 2
        if not fits or count > cluster.context_batch or first > cluster.step_tokens:
            return []  # of a device that is too small or too fast for such a load
        asks += [Ask(first, 1, at)] * cluster.num_prefilling
        asks += [Ask(n, 1, at + alone_s / 3) for n in others for _ in range(cluster.num_prefilling)]
        at += _LONGER * (alone_s + seconds(*others)) + rest
    return asks


def _lengths(config: Experiment, cluster: ClusterLimits, effort: Effort) -> list[tuple[int, int]]:
    """(prompt, output) as the file's workload draws them, as far as they fit."""
    found = []
    for planned in islice(Workload(config, with_block_hashes=False), 1000):
        prompt = min(planned.num_prompt_tokens, cluster.longest // 2, effort.most_tokens)
        found.append((prompt, max(2, min(planned.num_output_tokens, cluster.longest // 4))))
    return found


def _spaced(asks: Iterable[Ask], cost: RooflineCost, cluster: ClusterLimits) -> Iterator[Ask]:
    """At random instants, at about a third of what the prefilling executors would bear."""
    random, at = Random(11), 0.0
    for ask in asks:
        yield Ask(ask.prompt, ask.output, at)
        chunk = StepFeatures(0, 0, ((0, ask.prompt, True),))
        at += random.expovariate(1.0) * 3 * cost.step_time(chunk) / UNITS_PER_S / cluster.num_prefilling
