"""From a planned request to what the orchestrator is told of it, the same in both worlds."""

from __future__ import annotations

from ..policies.vocabulary import PS_PER_MS, Request, SamplingConfig
from .config import Experiment
from .workload import PlannedRequest


class RequestForm:
    """What all requests of one experiment have in common."""

    def __init__(self, config: Experiment) -> None:
        self._sampling = _sampling(config)
        self._end_id = config.sampling.end_id
        self._streaming = config.workload.streaming
        self._ttft_objective = _objective(config, "ttft_ms")
        self._tpot_objective = _objective(config, "tpot_ms")

    def request_of(self, planned: PlannedRequest) -> Request:
        """Everything but the true output length, which only an oracle is told. `arrival`: the planned offset, or 0."""
        return Request(
            planned.id,
            planned.num_prompt_tokens,
            planned.max_tokens,
            arrival=planned.offset or 0,
            priority=planned.priority,
            input_token_ids=planned.input_token_ids,
            sampling=self._sampling,
            end_id=self._end_id,
            streaming=self._streaming,
            ttft_objective=self._ttft_objective,
            tpot_objective=self._tpot_objective,
            session=planned.session,
            traffic_class=planned.traffic_class,
            block_hashes=planned.block_hashes,
            true_output_tokens=planned.num_output_tokens if planned.is_told else None,
        )


def request_of(planned: PlannedRequest, config: Experiment) -> Request:
    """One request; for many of one experiment see RequestForm."""
    return RequestForm(config).request_of(planned)


def true_length(planned: PlannedRequest) -> int:
    """Where the world ends the sequence: past `max_tokens` for an output that is cut there."""
    return planned.max_tokens + 1 if planned.output_cut else planned.num_output_tokens


def _sampling(config: Experiment) -> SamplingConfig | None:
    keys = config.sampling
    chosen = SamplingConfig(
        **{name: getattr(keys, name) for name in SamplingConfig.__struct_fields__ if hasattr(keys, name)}
    )
    return None if chosen == SamplingConfig() else chosen


def _objective(config: Experiment, key: str) -> int | None:
    milliseconds = None if config.slo is None else getattr(config.slo, key)
    return None if milliseconds is None else round(milliseconds * PS_PER_MS)
