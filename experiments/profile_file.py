"""A measured profile: what calibration found on one kind of device, for one model, as a versioned JSON file.

Times are float nanoseconds. A profile holds an entry for each kind of executor (role, tensor and pipeline parallelism) and
for each kind of link that was measured. One that was measured for something else is refused, with what that was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from ..core.cost import UNIT_BITS
from ..core.devices import Device
from ..core.measured_cost import UNITS_PER_NS, ZERO, Curve, MeasuredCost
from ..core.measured_range import Measured
from ..core.model_shapes import ModelShape
from ..core.overheads import LaunchGaps, LinkCost, MessageLatency
from ..core.step_sizes import ROW_MULTIPLE, graph_sizes
from .errors import ConfigError, did_you_mean

FORMAT_VERSION: Final = 2
_FORMATS: Final = (1, 2)  # 1: steps of a GPU whose chunks were behind cached KV, or more than eight, had no graph
SHIPPED: Final = Path(__file__).resolve().parent / "profiles"
_MOST_BYTES: Final = 4 << 20
_MOST_ITEMS: Final = 1024
_MOST_NS: Final = 1e15
_PS_PER_NS: Final = 1000


class CurveFit(Struct, frozen=True, forbid_unknown_fields=True):
    """Nanoseconds at each knot (a count, from 0 up), and for each one more after the last."""

    knots: tuple[int, ...] = (0,)
    ns: tuple[float, ...] = (0.0,)
    ns_beyond: float = 0.0

    def curve(self) -> Curve:
        """Raises ValueError for what is no monotone function."""
        points = zip(self.knots, self.ns, strict=True)
        slopes = [round((b - a) / (y - x) * UNITS_PER_NS) for (x, a), (y, b) in pairwise(points) if x < y]
        return Curve.of(round(self.ns[0] * UNITS_PER_NS), self.knots, [*slopes, round(self.ns_beyond * UNITS_PER_NS)])


class DecodeFit(Struct, frozen=True, forbid_unknown_fields=True):
    """Of steps of decodes only; see `core.measured_cost.MeasuredCost`. From `full_batch` sequences on (0: never) a KV token
    takes `full_kv_ns` more, and `full_shared_part` holds in place of `shared_part`.
    """

    rows: CurveFit
    kv_tokens: CurveFit
    sequence_ns: float = 0.0
    shared_part: float = 0.0  # of reading a KV token, what it does not cost where it is read again
    full_batch: int = 0
    full_kv_ns: float = 0.0
    full_shared_part: float = 0.0


class ChunkFit(Struct, frozen=True, forbid_unknown_fields=True):
    """Of steps with chunks of prompts. `graph_…`: where they run as graphs, if those were told apart.

    Kernel by kernel, attention takes `pair_ns` a pair, `cached_token_ns` a token before the chunks and `longest_token_ns` one
    of the longest KV before one of them; in a graph `graph_pair_ns` a pair, or `graph_cached_token_ns` a token of the
    longest KV before one of them, whichever is more.
    """

    rows: CurveFit
    pair_ns: float
    cached_token_ns: float
    chunk_ns: float
    sample_ns: float
    mixed_kv_tokens: CurveFit
    mixed_decode_ns: float
    graphs: bool = False  # short prompts ran as graphs
    launch_floor_ns: float = 0.0  # the host's time for a step that it launches kernel by kernel
    graph_pair_ns: float | None = None
    graph_cached_token_ns: float | None = None
    shared_part: float = 0.0  # as in `DecodeFit`, of the decodes that run along
    longest_token_ns: float = 0.0


class Residual(Struct, frozen=True, forbid_unknown_fields=True):
    """How far the points of one family lie from the fit, relative to it.

    `bias`: of the sum of all samples. `jitter`: standard deviation of single samples around the fit.
    """

    family: str
    num_points: int
    num_samples: int
    num_outliers: int
    mean: float
    p90: float
    max: float
    bias: float
    jitter: float


class EngineEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of executor. `decode` or `chunks` None: it never ran such a step. Gaps in picoseconds."""

    role: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    layers_per_stage: tuple[int, ...]
    tokens_per_block: int
    num_blocks: int
    max_batch_size: int
    max_num_tokens: int
    steps_per_grant: int
    pipeline_depth: int
    plan_ahead: bool
    decode: DecodeFit | None
    chunks: ChunkFit | None
    gaps: LaunchGaps
    measured: Measured
    residuals: tuple[Residual, ...]
    executors: tuple[int, ...] = ()  # of the calibration's own cluster: whose the samples are
    transfer_slowdown: float | None = None  # of decode steps while KV comes in; told, not used

    @property
    def title(self) -> str:
        return f"{self.role} tp {self.tensor_parallel_size} pp {self.pipeline_parallel_size}"


class LinkEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of link: how KV travelled, from which layout to which."""

    transport: str
    source_tp: int
    source_pp: int
    reader_tp: int
    reader_pp: int
    tokens_per_block: int
    cost: LinkCost
    residuals: tuple[Residual, ...]
    throttle_gb_per_s: float | None = None


class MeasuredFor(Struct, frozen=True, forbid_unknown_fields=True):
    """What a profile holds good for."""

    device_name: str
    device_type: str  # cuda or cpu
    model: str
    shape_hash: str
    dtype: str


class Profile(Struct, frozen=True, forbid_unknown_fields=True):
    """`created`: ISO time by the clock of whoever calibrated. `device`: memory and names; its speeds are not used where
    an entry says better. `dispatch_delay_ps`: from a request's intended send to the orchestrator's being given it.
    """

    format_version: int
    name: str
    created: str
    measured_for: MeasuredFor
    device: Device
    engines: tuple[EngineEntry, ...]
    links: tuple[LinkEntry, ...]
    messages: MessageLatency
    message_residuals: dict[str, float]  # standard deviation in picoseconds, by pair
    dispatch_delay_ps: int
    kv_bytes_per_token: int
    versions: dict[str, str]
    git_commit: str | None
    num_sessions: int
    measured_s: float


_decoder: Final = msgspec.json.Decoder(Profile)


# ---- files ----------------------------------------------------------------------------------------------------------


def shipped_profiles() -> list[str]:
    """Names that `cluster.profile` can give without a path."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def is_path(name: str) -> bool:
    return "/" in name or name.endswith(".json")


def profile_path(name: str, root: Path) -> Path:
    """Of a shipped profile by name, or of a file from `root`. Raises ConfigError for a name that is not shipped."""
    if is_path(name):
        return root / name
    path = SHIPPED / f"{name}.json"
    if name not in shipped_profiles():
        raise ConfigError(f"unknown profile '{name}'{did_you_mean(name, shipped_profiles())}")
    return path


def load_profile(path: Path) -> Profile:
    """Raises ConfigError for a file that cannot be read or holds no such profile."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"profile {path}: cannot be read: {error.strerror or error}") from None
    return _load(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _load(path: Path, mtime_ns: int, size: int) -> Profile:
    if size > _MOST_BYTES:
        raise ConfigError(f"profile {path}: {size} bytes; allowed: at most {_MOST_BYTES}")
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=dict[str, Any]).get("format_version")
        if version not in _FORMATS:
            raise ConfigError(f"profile {path}: of format {version}; allowed: {', '.join(map(str, _FORMATS))}")
        profile = _decoder.decode(data)
    except OSError as error:
        raise ConfigError(f"profile {path}: cannot be read: {error.strerror or error}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"profile {path}: {error}") from None
    if profile.format_version < FORMAT_VERSION and profile.measured_for.device_type == "cuda":
        raise ConfigError(
            f"profile {path}: of format {profile.format_version}, measured on an engine that ran other steps as CUDA graphs;"
            f" allowed: {FORMAT_VERSION}, by calibrating again"
        )
    problem = next(_problems(msgspec.to_builtins(profile), "profile"), None)
    if problem is not None:
        raise ConfigError(f"{path}: {problem}")
    for entry in profile.engines:
        try:
            measured_cost(profile, entry, entry.max_batch_size)
        except ValueError as error:
            raise ConfigError(f"profile {path}: {entry.title}: {error}") from None
    return profile


def _problems(value: Any, place: str) -> Iterator[str]:
    """Numbers that no measurement gives: negative, not finite, absurdly large; lists without end."""
    if isinstance(value, dict):
        for key, item in value.items():
            # a bias may have either sign
            yield from _problems(abs(item) if key == "bias" and isinstance(item, float) else item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        if len(value) > _MOST_ITEMS:
            yield f"{place} has {len(value)} items; allowed: at most {_MOST_ITEMS}"
        for item in value[:_MOST_ITEMS]:
            yield from _problems(item, place)
    elif isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value <= _MOST_NS * _PS_PER_NS:
        yield f"{place} is {value}; allowed: 0 to {_MOST_NS * _PS_PER_NS:g}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}"


def save_profile(profile: Profile, path: Path) -> None:
    """Written whole or not at all, its folder too where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
    partial.replace(path)


def profile_hash(profile: Profile) -> str:
    return sha256(msgspec.json.encode(profile)).hexdigest()


def shape_hash(shape: ModelShape) -> str:
    """Equal for models of equal shape and dtype, whatever they are called."""
    return sha256(msgspec.json.encode(msgspec.structs.replace(shape, name=""))).hexdigest()[:16]


# ---- evaluation -----------------------------------------------------------------------------------------------------


def find_engine(profile: Profile, role: str, tp: int, pp: int) -> EngineEntry:
    """Raises ConfigError with what there is."""
    for entry in profile.engines:
        if (entry.role, entry.tensor_parallel_size, entry.pipeline_parallel_size) == (role, tp, pp):
            return entry
    there = ", ".join(entry.title for entry in profile.engines)
    raise ConfigError(f"profile {profile.name} was measured for {there} executors, not for {role} tp {tp} pp {pp}")


def find_link(profile: Profile, transport: str | None, layouts: Sequence[int], throttle: float | None) -> LinkEntry:
    """`layouts`: tp and pp of the source, then of the reader. `transport` None or `auto`: whichever was measured.

    A link that was measured with the same throttle, or with none. Raises ConfigError with what there is.
    """
    fitting = [
        entry
        for entry in profile.links
        if [entry.source_tp, entry.source_pp, entry.reader_tp, entry.reader_pp] == list(layouts)
        and (transport in (None, "auto") or entry.transport == transport)
        and entry.throttle_gb_per_s in (None, throttle)
    ]
    if fitting:
        return max(fitting, key=lambda entry: entry.throttle_gb_per_s == throttle)
    there = ", ".join(
        f"{e.transport} from tp {e.source_tp} pp {e.source_pp} to tp {e.reader_tp} pp {e.reader_pp}"
        for e in profile.links
    )
    wanted = f"{transport or 'any'} from tp {layouts[0]} pp {layouts[1]} to tp {layouts[2]} pp {layouts[3]}"
    raise ConfigError(f"profile {profile.name} was measured for KV over {there or 'no link'}, not {wanted}")


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


def told_of(for_: MeasuredFor) -> str:
    """In words, for a message."""
    return f"{for_.model} in {for_.dtype} on {for_.device_name}"
