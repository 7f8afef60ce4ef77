"""What the executors of a measured profile cost: from what was fitted of one kind of them to the cost model of the core.

A profile's times are float nanoseconds, the core's costs integers. Fits that contradict each other are refused here.
"""

from __future__ import annotations

from ..core.cost import UNIT_BITS
from ..core.measured_cost import UNITS_PER_NS, ZERO, Curve, MeasuredCost
from ..core.measured_range import Measured
from ..core.step_sizes import ROW_MULTIPLE, graph_sizes
from .measured_profile import ChunkFit, DecodeFit, EngineEntry, Profile


def measured_cost(profile: Profile, entry: EngineEntry, max_batch_size: int) -> MeasuredCost:
    """The cost model of an executor of this kind with batches of up to `max_batch_size`.

    Steps of a kind that it never ran cost what they cost its siblings of the same parallelism; `covers` says no.
    """
    siblings = [
        other
        for other in profile.engines
        if (other.tensor_parallel_size, other.pipeline_parallel_size)
        == (entry.tensor_parallel_size, entry.pipeline_parallel_size)
    ]
    decode = entry.decode or next((other.decode for other in siblings if other.decode is not None), None)
    chunks = entry.chunks or next((other.chunks for other in siblings if other.chunks is not None), None)
    is_cuda = profile.measured_for.device_type == "cuda"
    if decode is None and chunks is None:
        raise ValueError("it holds neither decode steps nor steps with chunks")
    rows = chunks.rows.curve() if decode is None and chunks is not None else ZERO
    return MeasuredCost(
        graph_sizes=graph_sizes(max_batch_size) if is_cuda else (),
        row_multiple=row_multiple(profile.measured_for.device_type),
        decode_rows=rows if decode is None else decode.rows.curve(),
        decode_kv=ZERO if decode is None else decode.kv_tokens.curve(),
        decode=0 if decode is None else _units(decode.sequence_ns),
        chunk_rows=decode.rows.curve() if chunks is None and decode is not None else _rows(chunks),
        pair=0 if chunks is None else _units(chunks.pair_ns),
        cached_token=0 if chunks is None else _units(chunks.cached_token_ns),
        chunk=0 if chunks is None else _units(chunks.chunk_ns),
        sample=0 if chunks is None else _units(chunks.sample_ns),
        mixed_kv=_mixed_kv(decode, chunks, entry.measured),
        mixed_decode=0 if chunks is None else _units(chunks.mixed_decode_ns),
        measured=entry.measured,
        chunk_graphs=is_cuda and chunks is not None and chunks.graphs and entry.role != "generation",  # it records none
        launch_floor=0 if chunks is None else _units(chunks.launch_floor_ns),
        **_attention_in_graphs(chunks),
        decode_shared=0 if decode is None else _part(decode.shared_part),
        mixed_shared=_mixed_shared(decode, chunks, entry.measured),
        longest_token=0 if chunks is None else _units(chunks.longest_token_ns),
        full_batch=0 if decode is None else decode.full_batch,
        full_kv=0 if decode is None else _units(decode.full_kv_ns),
        full_shared=0 if decode is None else _full_part(decode),
    )


def _attention_in_graphs(chunks: ChunkFit | None) -> dict[str, int]:
    if chunks is None or chunks.graph_pair_ns is None or chunks.graph_cached_token_ns is None:
        return {}
    return {
        "graph_pair": _units(chunks.graph_pair_ns),
        "graph_cached_token": _units(chunks.graph_cached_token_ns),
    }


def _part(part: float, key: str = "shared_part") -> int:
    if part > 1:
        raise ValueError(f"{key} is {part}; allowed: 0 to 1")
    return round(part * (1 << UNIT_BITS))


def _full_part(decode: DecodeFit) -> int:
    part, most = decode.full_shared_part, decode.shared_part
    if decode.full_batch and part > most:  # a step gets no cheaper by more decodes
        raise ValueError(f"full_shared_part is {part}; allowed: at most shared_part, which is {most}")
    return _part(part, "full_shared_part")


def _mixed_shared(decode: DecodeFit | None, chunks: ChunkFit | None, measured: Measured) -> int:
    if chunks is not None and measured.mixed_decodes:
        return _part(chunks.shared_part)
    return 0 if decode is None else _part(decode.shared_part)


def row_multiple(device_type: str) -> int:
    """What the engine pads the rows of a step with chunks to."""
    return ROW_MULTIPLE if device_type == "cuda" else 1


def _rows(chunks: ChunkFit | None) -> Curve:
    return ZERO if chunks is None else chunks.rows.curve()


def _mixed_kv(decode: DecodeFit | None, chunks: ChunkFit | None, measured: Measured) -> Curve:
    if chunks is not None and measured.mixed_decodes:
        return chunks.mixed_kv_tokens.curve()
    return ZERO if decode is None else decode.kv_tokens.curve()


def _units(ns: float) -> int:
    return round(ns * UNITS_PER_NS)
