"""What a profile's file may not say though its types are right: numbers that no measurement gives, curves that are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from .measured_profile import Profile

_MOST_ITEMS: Final = 1024
_MOST: Final = 1e18  # picoseconds: eleven days; what is more does not fit the columns of a run
_MOST_BATCH: Final = 1 << 20  # as in an experiment file; a table of graphs is made for it
_MOST_NS_EACH: Final = 1e7  # of what there are millions of in a step
# By key, the least and the most where that is not 0 and `_MOST`. What is divided by is not 0.
_LIMITS: Final[dict[str, tuple[float, float]]] = {
    **dict.fromkeys(
        ("tensor_parallel_size", "pipeline_parallel_size", "tokens_per_block", "max_num_tokens"), (1, _MOST)
    ),
    **dict.fromkeys(("source_tp", "source_pp", "reader_tp", "reader_pp", "kv_bytes_per_token"), (1, _MOST)),
    **dict.fromkeys(("bytes_per_s", "flops", "memory_bandwidth", "memory_bytes", "link_bandwidth"), (1, _MOST)),
    **dict.fromkeys(("flops_efficiency", "memory_efficiency", "link_efficiency", "throttle_gb_per_s"), (1e-6, _MOST)),
    **dict.fromkeys(("pair_ns", "cached_token_ns", "longest_token_ns", "full_kv_ns"), (0, _MOST_NS_EACH)),
    **dict.fromkeys(("graph_pair_ns", "graph_cached_token_ns"), (0, _MOST_NS_EACH)),
    "max_batch_size": (1, _MOST_BATCH),
    "bias": (-_MOST, _MOST),  # the only one that may have either sign
}


def problem_of(profile: Profile) -> str | None:
    """The first that is found, in words that name its key and what is allowed; None for a profile that can be used."""
    if not profile.engines:
        return "profile.engines is empty; allowed: what one kind of executor costs, at least"
    return next(_problems(msgspec.to_builtins(profile), "profile", ""), None)


def _problems(value: Any, place: str, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        if "knots" in value and (len(value["knots"]) != len(value["ns"]) or not value["ns"]):
            counts = f"{len(value['knots'])} knots and {len(value['ns'])} ns"
            yield f"{place} has {counts}; allowed: as many of one as of the other, one at least"
        for name, item in value.items():
            yield from _problems(item, f"{place}.{name}", name)
    elif isinstance(value, list | tuple):
        if len(value) > _MOST_ITEMS:
            yield f"{place} has {len(value)} items; allowed: at most {_MOST_ITEMS}"
        for number, item in enumerate(value[:_MOST_ITEMS]):
            yield from _problems(item, f"{place}.{number}", key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        least, most = _LIMITS.get(key, (0, _MOST))
        if not least <= value <= most:  # nor what is no number
            yield f"{place} is {value}; allowed: {least:g} to {_plain(most)}"


def _plain(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"
