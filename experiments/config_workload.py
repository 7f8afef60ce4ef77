"""The `workload` of an experiment file: which requests there are, how long, and when they come."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from .config_keys import Keys, Name, Rate

Tokens = Annotated[int, Field(ge=1, le=1 << 24)]
PositiveTokens = Annotated[float, Field(ge=1, le=1 << 24)]


class FixedLength(Keys):
    type: Literal["fixed"]
    value: Tokens


class NormalLength(Keys):
    """Rounded and clamped to [min, max]."""

    type: Literal["normal"]
    mean: PositiveTokens
    stddev: Annotated[float, Field(ge=0, le=1 << 24)] = 0.0
    min: Tokens = 1
    max: Tokens | None = None


class LognormalLength(Keys):
    """`mean` and `stddev` of the length itself, not of its logarithm, before clamping to [min, max]."""

    type: Literal["lognormal"]
    mean: PositiveTokens
    stddev: Annotated[float, Field(gt=0, le=1 << 30)]
    min: Tokens = 1
    max: Tokens | None = None


class UniformLength(Keys):
    """Whole numbers from min to max, both included."""

    type: Literal["uniform"]
    min: Tokens
    max: Tokens


class ExponentialLength(Keys):
    type: Literal["exponential"]
    mean: PositiveTokens
    min: Tokens = 1
    max: Tokens | None = None


class EmpiricalLength(Keys):
    type: Literal["empirical"]
    values: Annotated[list[Tokens], Field(min_length=1, max_length=1 << 20)]
    weights: list[Annotated[float, Field(ge=0, le=1e12)]] | None = None


LENGTH_TYPES: Final = ("fixed", "normal", "lognormal", "uniform", "exponential", "empirical")


def _length(value: Any) -> Any:
    """A whole number is a fixed length; the type may be left out where the keys tell it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"type": "fixed", "value": value}
    if isinstance(value, dict) and "type" not in value:
        if "values" in value:
            value["type"] = "empirical"
        elif "mean" in value:
            value["type"] = "normal"
        elif "min" in value or "max" in value:
            value["type"] = "uniform"
    return value


Length = Annotated[
    FixedLength | NormalLength | LognormalLength | UniformLength | ExponentialLength | EmpiricalLength,
    Field(discriminator="type"),
    BeforeValidator(_length),
]


class SharedPrefixes(Keys):
    """Prefixes, such as system prompts, each shared by the requests of a group; they come on top of `isl`."""

    groups: Annotated[int, Field(ge=1, le=1 << 20)]
    length: Length
    skew: Annotated[float, Field(ge=0, le=10)] = Field(0.0, description="popularity ~ rank^-skew; 0: all equal")
    share: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="of requests, or sessions, that have one")


class Sessions(Keys):
    """Conversations: each turn's prompt holds the earlier prompts and answers. They take turns in sending."""

    concurrent: Annotated[int, Field(ge=1, le=1 << 20)] = Field(
        32, description="sessions at a time; a session's turns are as many requests apart"
    )
    turns: Length = Field(description="requests of a session")
    turn_isl: Length | None = Field(None, description="tokens that a later turn adds; default: isl")


class TrafficClass(Keys):
    """One of several kinds of requests that are mixed in the same phase."""

    name: str = Field(max_length=200)
    share: Annotated[float, Field(gt=0, le=1e6)] = Field(1.0, description="relative to the other classes'")
    isl: Length | None = None
    osl: Length | None = None
    priority: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="default: the phase's")


class SyntheticDataset(Keys):
    """Lengths drawn by seed. `osl` is the true output length, hidden from policies."""

    type: Literal["synthetic"]
    isl: Length
    osl: Length
    shared_prefixes: SharedPrefixes | None = None
    sessions: Sessions | None = None
    classes: Annotated[list[TrafficClass], Field(min_length=1, max_length=1000)] | None = None


class TraceDataset(Keys):
    """A public trace, or conversations (ShareGPT) or samples (TensorRT-LLM's benchmarks), which have no times.

    `path` from the experiment file's folder, else from $DISAGG_TRACES.
    """

    type: Literal["azure", "burstgpt", "mooncake", "sharegpt", "tensorrt_llm"]
    path: str = Field(min_length=1, max_length=4096)
    skip: Annotated[int, Field(ge=0, le=10**9)] = Field(0, description="rows before the first one that is sent")


Dataset = Annotated[SyntheticDataset | TraceDataset, Field(discriminator="type")]


class Quantile(Keys):
    quantile: Annotated[float, Field(gt=0, le=1)]


class PhaseKeys(Keys):
    name: Name
    requests: Annotated[int, Field(ge=1, le=10**9)]
    exclude_from_results: bool = False
    traffic_class: str = Field("", max_length=200)
    priority: Annotated[float, Field(ge=0, le=1)] = 0.5


class PoissonPhase(PhaseKeys):
    type: Literal["poisson"]
    rate: Rate


class GammaPhase(PhaseKeys):
    """Gaps of mean 1/rate and squared coefficient of variation 1/burstiness (1 = Poisson, less is burstier)."""

    type: Literal["gamma"]
    rate: Rate
    burstiness: Annotated[float, Field(ge=1e-6, le=1e6)]


class ConstantPhase(PhaseKeys):
    type: Literal["constant"]
    rate: Rate


class ConcurrencyPhase(PhaseKeys):
    """Closed loop: a new request is sent when one ends."""

    type: Literal["concurrency"]
    concurrency: Annotated[int, Field(ge=1, le=1 << 20)]


class TracePhase(PhaseKeys):
    """Arrivals at the trace's own times, divided by `speedup`. Without `requests`: to the end of the trace."""

    type: Literal["trace"]
    requests: Annotated[int, Field(ge=1, le=10**9)] | None = None  # type: ignore[assignment]
    speedup: Annotated[float, Field(ge=1e-6, le=1e9)] = 1.0


Phase = Annotated[
    PoissonPhase | GammaPhase | ConstantPhase | ConcurrencyPhase | TracePhase, Field(discriminator="type")
]


MaxTokens = Annotated[
    Annotated[Tokens, Tag("tokens")] | Annotated[Quantile, Tag("quantile")],
    Discriminator(lambda value: "quantile" if isinstance(value, dict | Quantile) else "tokens"),
]


class Workload(Keys):
    dataset: Dataset
    max_tokens: MaxTokens = Field(description="the declared bound that policies see; longer outputs are cut")
    max_prompt_tokens: Tokens | None = Field(None, description="longer prompts are cut at their end")
    streaming: bool = Field(True, description="off: the tokens of a phase reach the orchestrator with its end")
    phases: Annotated[list[Phase], Field(min_length=1, max_length=1000)]
