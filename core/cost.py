"""What a step costs: the protocol that both worlds evaluate, and the models that need no measurement.

Step times are integers in units of 2^-20 ps, so that sums are exact: step k of an epoch ends at t0 + (T(k) >> 20).
In an epoch of pure decode each step reads `num_decodes` more KV tokens than the one before; everything else is constant.
"""

from __future__ import annotations

from typing import Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from .devices import Device
from .model_shapes import ModelShape

UNIT_BITS: Final = 20
UNITS_PER_S: Final = 10**12 << UNIT_BITS
ENDLESS: Final = 1 << 60  # more steps than there are


class StepFeatures(Struct, frozen=True, gc=False):
    """What one step computes. `chunks`: (tokens before it, tokens computed, whether it yields a token) of each chunk.

    `num_shared_kv`: of `num_kv_tokens`, those that are read again, from blocks that several sequences share.
    """

    num_decodes: int
    num_kv_tokens: int
    chunks: tuple[tuple[int, int, bool], ...] = ()
    num_shared_kv: int = 0

    def after(self, num_steps: int) -> StepFeatures:
        """The features of the decode batch `num_steps` later."""
        return replace(self, num_kv_tokens=self.num_kv_tokens + num_steps * self.num_decodes)


class CostModel(Protocol):
    """Times in 2^-20 ps. It may also have `line(features)`: (time of the first step, how much longer each step takes than
    the one before, for how many steps that is so), of an epoch whose first step has `features`; never less than 0 longer.
    """

    def step_time(self, features: StepFeatures) -> int: ...

    def span_time(self, features: StepFeatures, num_steps: int) -> int:
        """Of `num_steps` steps, the first of which has `features`: the exact sum of their step times."""
        return sum(self.step_time(features.after(i)) for i in range(num_steps))


def affine_span_time(first: int, slope: int, num_steps: int) -> int:
    """Sum of first + slope * i for i in 0 … num_steps - 1."""
    return num_steps * first + slope * (num_steps * (num_steps - 1) // 2)


def end_of_step(model: CostModel, features: StepFeatures, k: int, factor: int = 1 << UNIT_BITS) -> int:
    """Picoseconds from the epoch's start to the end of its step k; `factor` is a noise factor in 2^-20. At least k."""
    units = model.span_time(features, k)
    if factor != 1 << UNIT_BITS:
        units = units * factor >> UNIT_BITS
    return max(units >> UNIT_BITS, k)


class ConstantCost(Struct, frozen=True):
    """For tests: a + b per decode + c per KV token, less `shared` of it for one read again, + d per chunk token, in ps."""

    a: int
    b: int = 0
    c: int = 0
    d: int = 0
    shared: int = 0

    def step_time(self, features: StepFeatures) -> int:
        tokens = sum(length for _, length, _ in features.chunks)
        kv = self.c * features.num_kv_tokens - self.shared * features.num_shared_kv
        return (self.a + self.b * features.num_decodes + kv + self.d * tokens) << UNIT_BITS

    def line(self, features: StepFeatures) -> tuple[int, int, int]:
        return self.step_time(features), (self.c * features.num_decodes) << UNIT_BITS, ENDLESS

    def span_time(self, features: StepFeatures, num_steps: int) -> int:
        return affine_span_time(self.step_time(features), (self.c * features.num_decodes) << UNIT_BITS, num_steps)


class RooflineCost(Struct, frozen=True):
    """A device's specification and a model's shape: each part of a step takes the longer of its arithmetic and its bytes.

    Coefficients in 2^-20 ps: `fixed` per step; `weights` to read them once; `token` of matrix arithmetic per token;
    `sample` of the output head per token sampled; `pair` of attention arithmetic per (query, key); `kv_token` to read one
    token of KV; `collective` per token for the all-reduces of tensor parallelism and the hand-over of pipelines.
    """

    fixed: int
    weights: int
    token: int
    sample: int
    pair: int
    kv_token: int
    collective: int

    def step_time(self, features: StepFeatures) -> int:
        n = features.num_decodes
        sampled = n
        tokens = n
        # one query a decode: pairs = KV tokens, whichever of arithmetic and bytes is slower
        attention = features.num_kv_tokens * max(self.pair, self.kv_token)
        for before, length, yields in features.chunks:
            tokens += length
            sampled += yields
            pairs = length * before + length * (length + 1) // 2
            attention += max(pairs * self.pair, (before + length) * self.kv_token)
        matrices = max(self.weights, tokens * self.token + sampled * self.sample)
        return self.fixed + matrices + attention + tokens * self.collective

    def line(self, features: StepFeatures) -> tuple[int, int, int]:
        return self.step_time(features), features.num_decodes * max(self.pair, self.kv_token), ENDLESS

    def span_time(self, features: StepFeatures, num_steps: int) -> int:
        slope = features.num_decodes * max(self.pair, self.kv_token)
        return affine_span_time(self.step_time(features), slope, num_steps)


def roofline(shape: ModelShape, device: Device, tp: int = 1, pp: int = 1) -> RooflineCost:
    """The roofline of one executor of tp x pp devices; the stages of a pipeline run one after the other in a step.

    FLOPs: 2 per weight and token; attention 4 * heads * head_dim per layer and (query, key) pair (QK^T and PV).
    """

    def units(seconds: float) -> int:
        return round(seconds * UNITS_PER_S)

    flops = device.flops * device.flops_efficiency * tp
    bandwidth = device.memory_bandwidth * device.memory_efficiency * tp
    link = device.link_bandwidth * device.link_efficiency
    layer_weights = shape.num_layer_parameters * shape.num_layers
    head_weights = shape.vocab_size * shape.hidden_size
    width = shape.dtype_bytes
    activations = shape.hidden_size * width
    all_reduce = 2 * shape.num_layers * 2 * (tp - 1) / tp * activations / link  # two ring all-reduces a layer
    launches = 2 * shape.num_layers * device.link_latency_s * 0.5 if tp > 1 else 0.0
    return RooflineCost(
        fixed=units(
            device.step_overhead_s
            + shape.num_layers * device.layer_overhead_s
            + launches
            + (pp - 1) * device.link_latency_s
        ),
        weights=units((layer_weights + head_weights) * width / bandwidth),
        token=units(2 * layer_weights / flops),
        sample=units(2 * head_weights / flops),
        pair=units(4 * shape.num_attention_heads * shape.head_dim * shape.num_layers / flops),
        kv_token=units(shape.kv_bytes_per_token / bandwidth),
        collective=units(all_reduce + (pp - 1) * activations / link),
    )
