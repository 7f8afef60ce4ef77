"""A small measured profile, made by hand, and an experiment that uses it; for the tests."""

from __future__ import annotations

from typing import Any

from disagg.core.devices import DEVICES
from disagg.core.measured_range import Measured
from disagg.core.model_shapes import preset
from disagg.core.overheads import LaunchGaps, LinkCost, MessageLatency
from disagg.experiments.measured_profile import (
    ChunkFit,
    CurveFit,
    DecodeFit,
    EngineEntry,
    LinkEntry,
    MeasuredFor,
    Profile,
    shape_hash,
)

EXPERIMENT = """
schema_version: 1
name: from_profile
model: {id: tiny-llama, dtype: float32}
device: cpu
cluster:
  profile: ./measured.json
  context_servers: {kv_cache: {tokens_per_block: 16, max_tokens: 4096}, scheduler: {max_batch_size: 8}}
  generation_servers: {kv_cache: {tokens_per_block: 16, max_tokens: 4096}, scheduler: {max_batch_size: 8}}
  cache_transceiver: {backend: mpi}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: 100, osl: 10}
  max_tokens: 16
  phases: [{name: profiling, type: poisson, rate: 20, requests: 20}]
"""


def entry(role: str, **other: Any) -> EngineEntry:
    chunks = ChunkFit(CurveFit((0, 512), (2e6, 9e6), 1.5e4), 10.0, 1.0, 1e5, 0.0, CurveFit(), 0.0)
    decode = DecodeFit(CurveFit((0, 8), (1e6, 2e6), 1e5), CurveFit((0, 4000), (0.0, 4e5), 100.0), 5e3)
    values: dict[str, Any] = {
        "role": role,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "layers_per_stage": (preset("tiny-llama", "float32").num_layers,),
        "tokens_per_block": 16,
        "num_blocks": 256,
        "max_batch_size": 8,
        "max_num_tokens": 8192,
        "steps_per_grant": 1,
        "pipeline_depth": 1,
        "plan_ahead": False,
        "decode": None if role == "context" else decode,
        "chunks": None if role == "generation" else chunks,
        "gaps": LaunchGaps(decode_after_idle=10**9),
        "measured": Measured(8, 4000, 512, 4, 10**6, 512),
        "residuals": (),
    }
    return EngineEntry(**(values | other))


def a_profile(**other: Any) -> Profile:
    shape = preset("tiny-llama", "float32")
    values: dict[str, Any] = {
        "format_version": 1,
        "name": "measured",
        "created": "2026-11-22T00:00:00+00:00",
        "measured_for": MeasuredFor("a processor", "cpu", shape.name, shape_hash(shape), shape.dtype),
        "device": DEVICES["cpu-2core"],
        "engines": (entry("context"), entry("generation")),
        "links": (LinkEntry("mpi", 1, 1, 1, 1, 16, LinkCost(1e9, 2 * 10**9), ()),),
        "messages": MessageLatency(10**9, 2 * 10**9, 3 * 10**9),
        "message_residuals": {},
        "dispatch_delay_ps": 3 * 10**8,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "versions": {},
        "git_commit": None,
        "num_sessions": 1,
        "measured_s": 1.0,
    }
    return Profile(**(values | other))
