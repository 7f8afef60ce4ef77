"""One session of a calibration: its requests as few numbers each, what they must fit into, and the load the runtime takes.

Prompts are drawn as a workload's are. Which sessions there are, and why, is `calibration_plan`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from msgspec.structs import replace

from ..core.config import OrchestratorConfig, PolicySpec
from ..core.orchestrator import AT_CONTEXT_DONE, AT_CONTEXT_START
from ..policies.vocabulary import PS_PER_S, Request, Role
from ..runtime.orchestrator_load import LoadPhase, PlannedSubmission
from ..runtime.session_series import Session
from .cluster import cluster_of, shape_of
from .config import Experiment
from .streams import stream

_MOST_NAMES: Final = 1 << 24  # blocks of one prompt
_ROUND_ROBIN: Final = PolicySpec("round_robin")


@dataclass(frozen=True)
class Ask:
    """One request of a session: its lengths, and its instant where the loop is open. `prefix`: (which one it begins with,
    its tokens)."""

    prompt: int
    output: int
    at_s: float | None = None
    prefix: tuple[int, int] | None = None


class ClusterLimits:
    """The limits that a plan must keep, taken from the least of the executors that a phase may go to."""

    def __init__(self, config: Experiment) -> None:
        self.orchestrator: OrchestratorConfig = replace(
            cluster_of(config),
            context_router=_ROUND_ROBIN,
            generation_router=_ROUND_ROBIN,
            mixed_router=_ROUND_ROBIN,
            router=None,
            admission=PolicySpec("accept_all"),
        )
        executors = self.orchestrator.executors
        decoding = [e for e in executors if e.role is Role.GENERATION] or [e for e in executors if e.role is Role.MIXED]
        prefilling = [e for e in executors if e.role is Role.CONTEXT] or [e for e in executors if e.role is Role.MIXED]
        self.hands_over = any(e.role is Role.CONTEXT for e in executors)
        self.sends_early = self.hands_over and all(e.layerwise for e in prefilling)
        self.num_decoding, self.num_prefilling = len(decoding), len(prefilling)
        self.max_batch = min(e.scheduler.max_batch_size for e in decoding)
        self.kv_tokens = min(e.num_blocks * e.tokens_per_block for e in executors)
        self.tokens_per_block = max(e.tokens_per_block for e in executors)
        self.may_share = len({e.tokens_per_block for e in executors}) == 1
        self.step_tokens = min(e.scheduler.max_num_tokens for e in prefilling)
        self.context_batch = min(e.scheduler.max_batch_size for e in prefilling)
        shape = shape_of(config)
        self.longest = min(shape.max_position_embeddings, self.kv_tokens) - 2
        self.vocab_size = shape.vocab_size

    def rounded(self, tokens: int) -> int:
        """What a sequence of so many tokens takes of the KV, in whole blocks."""
        return -(-tokens // self.tokens_per_block) * self.tokens_per_block


class SessionPlan(NamedTuple):
    """One session. `concurrency` None: the requests' own instants. `sends_early`: its steps tell of their layers.
    `shares`: executors reuse the blocks of prefixes.
    """

    name: str
    asks: Sequence[Ask]
    concurrency: int | None
    is_canned: bool = False
    sends_early: bool = False
    shares: bool = False


class PromptIds:
    """The token ids of all prompts, uniform over the vocabulary as a workload's are: what an id takes on its way is up to how
    large it is. Drawn for each prompt anew; what begins with the same prefix in a session begins with the same ids.

    There is one object an id, to which prompts refer: millions of them are held while sessions run, and the process that
    sends them decodes objects of its own.
    """

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._seed = seed
        self._objects = np.arange(vocab_size).astype(object)

    def of_session(self, number: int, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        """Those of each of the `asks` of session `number`."""
        own = stream(self._seed, "prompts of session", number)
        prefixes: dict[tuple[int, int], tuple[int, ...]] = {}
        found = []
        for ask in asks:
            prefix: tuple[int, ...] = ()
            if ask.prefix is not None:
                kind, length = ask.prefix
                if ask.prefix not in prefixes:  # of one kind, a shorter one is the beginning of a longer one
                    prefixes[ask.prefix] = self._drawn(stream(self._seed, "prefix of session", number, kind), length)
                prefix = prefixes[ask.prefix]
            found.append(prefix + self._drawn(own, ask.prompt - len(prefix)))
        return found

    def _drawn(self, generator: np.random.Generator, count: int) -> tuple[int, ...]:
        return tuple(self._objects[generator.integers(0, len(self._objects), count)].tolist())


def session_of(plan: SessionPlan, cluster: ClusterLimits, prompts: Sequence[tuple[int, ...]]) -> Session:
    """The load as the runtime takes it. `prompts`: token ids of each request."""
    longest = max((ask.output for ask in plan.asks), default=1)
    submissions = []
    for number, (ask, ids) in enumerate(zip(plan.asks, prompts, strict=True)):
        # a bound that no sequence reaches: in serving, too, it is the world that ends them
        bound = 1 if ask.output == 1 and not plan.is_canned else longest + 1
        request = Request(number, ask.prompt, bound, input_token_ids=ids)
        if ask.prefix is not None:
            request = replace(request, block_hashes=_names(number, ask, cluster.tokens_per_block))
        offset = round((ask.at_s or 0.0) * PS_PER_S) if plan.concurrency is None else None
        submissions.append(PlannedSubmission(request, offset, ask.output))
    executors = cluster.orchestrator.executors
    if plan.shares:
        executors = tuple(replace(executor, enable_block_reuse=True) for executor in executors)
    orchestrator = replace(
        cluster.orchestrator,
        executors=executors,
        skip_context_phase=plan.is_canned,
        generation_binding=AT_CONTEXT_START if plan.sends_early else AT_CONTEXT_DONE,
    )
    return Session(plan.name, orchestrator, (LoadPhase(tuple(submissions), plan.concurrency, plan.name),))


def _names(number: int, ask: Ask, tokens_per_block: int) -> tuple[int, ...]:
    """Of the full blocks of a prompt: those of its prefix are everybody's of its kind, the others its own."""
    kind, length = ask.prefix or (0, 0)
    shared, all_of_it = length // tokens_per_block, ask.prompt // tokens_per_block
    prefix = [_MOST_NAMES * (1 + kind) + i for i in range(shared)]
    return (*prefix, *(-_MOST_NAMES * (1 + number) - i for i in range(shared, all_of_it)))
