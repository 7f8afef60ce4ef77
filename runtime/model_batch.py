"""What travels beside a plan, and the decode batch that lives on between plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from msgspec import Struct
from torch import Tensor

from ..core.commands import Joined
from ..policies.vocabulary import SamplingConfig
from .model_sampling import GREEDY


class JoinedFeed(Struct, frozen=True, array_like=True):
    """The world's part of a `Joined`: its next input token, None if this engine sampled it in the plan just before."""

    request_id: int
    next_token: int | None
    sampling: SamplingConfig = GREEDY


class ChunkFeed(Struct, frozen=True, array_like=True):
    """The world's part of a `Chunk`: the ids of its tokens, as many as the chunk is long."""

    request_id: int
    token_ids: tuple[int, ...]
    sampling: SamplingConfig = GREEDY


class PlanFeed(Struct, frozen=True, array_like=True):
    """What a rank must know to run a plan beyond the plan: one entry per joined and per chunk, in its order.

    Chance needs no field: a token is drawn from (sampling.seed, its index in the sequence), which each rank knows.
    """

    joined: tuple[JoinedFeed, ...] = ()
    chunks: tuple[ChunkFeed, ...] = ()


@dataclass(slots=True)
class Decode:
    """One request of the decode batch. `token` is its next input, at position `num_kv_tokens`."""

    request_id: int
    num_kv_tokens: int
    blocks: list[int]
    token: int
    sampling: SamplingConfig


class DecodeBatch:
    """The requests that decode, in order of joining. The padded block tables go to the device once per change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._decodes: dict[int, Decode] = {}
        self._tables: Tensor | None = None
        self._left: dict[int, None] = {}  # since `take_changes`
        self._changed: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._decodes)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._decodes

    def __iter__(self) -> Iterator[Decode]:
        return iter(self._decodes.values())

    def __getitem__(self, request_id: int) -> Decode:
        return self._decodes[request_id]

    @property
    def has_changes(self) -> bool:
        return bool(self._left or self._changed)

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Request ids that left, and that joined or whose blocks changed, since the last call; one that left and
        joined again is in both."""
        left, changed = list(self._left), list(self._changed)
        self._left, self._changed = {}, {}
        return left, changed

    def leave(self, request_id: int) -> None:
        del self._decodes[request_id]
        self._left[request_id] = None
        self._changed.pop(request_id, None)
        self._tables = None

    def join(self, joined: Joined, token: int, sampling: SamplingConfig) -> None:
        self._decodes[joined.request_id] = Decode(
            joined.request_id, joined.num_kv_tokens, list(joined.blocks), token, sampling
        )
        self._changed[joined.request_id] = None
        self._tables = None

    def append(self, request_id: int, blocks: Iterable[int]) -> None:
        self._decodes[request_id].blocks.extend(blocks)
        self._changed[request_id] = None
        self._tables = None

    def forget_unwritten(self, request_id: int, tokens_per_block: int) -> None:
        """Drop what was appended for steps of a span that was cut short: those blocks may be another request's by now."""
        decode = self._decodes[request_id]
        del decode.blocks[-(-decode.num_kv_tokens // tokens_per_block) :]
        self._changed[request_id] = None
        self._tables = None

    def tables(self) -> Tensor:
        """int64 [requests, width of the widest], padded with block 0, which attention masks."""
        if self._tables is None:
            width = max((len(decode.blocks) for decode in self._decodes.values()), default=0)
            rows = [decode.blocks + [0] * (width - len(decode.blocks)) for decode in self._decodes.values()]
            self._tables = torch.tensor(rows, dtype=torch.int64, device=self._device).view(len(rows), width)
        return self._tables
