"""What a cluster costs beside its steps, as measured: messages, links, and what lies between two plans. Values only."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from .events import Enqueue


class LaunchGaps(Struct, frozen=True):
    """Picoseconds that the first step of a plan takes longer than such a step takes inside a plan.

    By what the executor did before (nothing, decodes, chunks) and what it does now; `joined` and `left` are for each
    sequence that enters and leaves the decode batch, `sequence_after_chunk` for each in it where a step with chunks came
    before: the host sees to all of them then. A plan that goes on with its epoch has `continued`. `kernels` is for a step
    with chunks that no graph runs: before its first kernel the host has more to do, which is hidden behind decodes only.
    `decodes_after_chunk` is for a step with chunks that follows another while sequences decode: the host sees to these first.

    No gap, but by what came before, too: where steps with chunks follow each other without a rest, a device's clock falls. They
    take `millionths_under_load` of their own time longer once that has gone on for `load_after`, in proportion before.
    In a rest behind them the load falls by `load_drain` ps a ps, from `load_after` at most, but not while KV leaves the
    executor; with 0 any rest ends it at once. Decodes always do.
    """

    decode_after_idle: int = 0
    decode_after_decode: int = 0
    decode_after_chunk: int = 0
    chunk_after_idle: int = 0
    chunk_after_decode: int = 0
    chunk_after_chunk: int = 0
    continued: int = 0
    joined: int = 0
    left: int = 0
    sequence_after_chunk: int = 0
    kernels: int = 0
    decodes_after_chunk: int = 0
    millionths_under_load: int = 0
    load_after: int = 0
    load_drain: int = 0

    def slower(self, under_load: int) -> int:
        """Millionths that a step with chunks takes longer where only such steps have run for `under_load` ps before it."""
        if under_load >= self.load_after:
            return self.millionths_under_load if under_load else 0
        return self.millionths_under_load * under_load // self.load_after

    def left_after_rest(self, under_load: int, rest: int) -> int:
        """What is left of a load of `under_load` ps when `rest` ps have passed in which it could fall: picoseconds."""
        if not self.load_drain:
            return 0
        return max(0, min(under_load, self.load_after) - self.load_drain * rest)


class MessageLatency(Struct, frozen=True):
    """Picoseconds from the instant that makes a core send to the instant at which another is given the message.

    A message to an executor takes `prompt_token` longer for each token id that it carries (`num_token_ids`).
    """

    into_executor: int
    from_executor: int
    between_executors: int
    prompt_token: int = 0

    @classmethod
    def same(cls, latency: int) -> MessageLatency:
        """All alike."""
        return cls(latency, latency, latency)


def num_token_ids(message: object) -> int:
    """Of a message to an executor, the ids that it carries on hardware: each phase is sent with its prompt, a generation
    phase also with what has been generated so far. Messages without a prompt count as carrying none.

    Counted by what is said of them, since a simulation has no ids.
    """
    if type(message) is not Enqueue:
        return 0
    request, params = message.request, message.request.context_phase_params
    if params is None or params.is_promised:
        return request.num_prompt_tokens
    return request.num_prompt_tokens + params.num_generated


class LinkCost(Struct, frozen=True):
    """Of one direction between two executors: `fixed` picoseconds a transfer and `page` a KV block, which take no
    bandwidth, and bytes at `bytes_per_s`, which transfers share.
    """

    bytes_per_s: float
    fixed: int
    page: int = 0


NO_GAPS: Final = LaunchGaps()
