"""A measured profile: what calibration found on one kind of device, for one model.

Times are float nanoseconds. A profile holds an entry for each kind of executor (role, tensor and pipeline parallelism) and
for each kind of link that was measured. One that was measured for something else is refused, with what that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise
from typing import Final

import msgspec
from msgspec import Struct

from ..core.devices import Device
from ..core.measured_cost import UNITS_PER_NS, Curve
from ..core.measured_range import Measured
from ..core.model_shapes import ModelShape
from ..core.overheads import LaunchGaps, LinkCost, MessageLatency
from .errors import ConfigError

FORMAT_VERSION: Final = 2


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
    """One kind of link: how KV travelled, from which layout to which.

    `sources`, `readers`: executors of the calibration's own cluster, between which the samples are. Other links may be of
    equal layouts, so layouts alone do not tell; both are empty in a profile of a time that did not tell either.
    """

    transport: str
    source_tp: int
    source_pp: int
    reader_tp: int
    reader_pp: int
    tokens_per_block: int
    cost: LinkCost
    residuals: tuple[Residual, ...]
    throttle_gb_per_s: float | None = None
    sources: tuple[int, ...] = ()
    readers: tuple[int, ...] = ()

    @property
    def kind(self) -> tuple[str, int, int, int, int, float | None]:
        """What no two links of a profile have in common."""
        return self.transport, self.source_tp, self.source_pp, self.reader_tp, self.reader_pp, self.throttle_gb_per_s


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


def shape_hash(shape: ModelShape) -> str:
    """Equal for models of equal shape and dtype, whatever they are called."""
    return sha256(msgspec.json.encode(msgspec.structs.replace(shape, name=""))).hexdigest()[:16]


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


def told_of(for_: MeasuredFor) -> str:
    """In words, for a message."""
    return f"{for_.model} in {for_.dtype} on {for_.device_name}"
