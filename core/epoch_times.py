"""When the steps of one epoch end: `cost.end_of_step` and its inverse, at a few operations a question.

As long as every step takes as much longer than the one before, T(k) is a polynomial in integers. A cost model that has a
`line` says how far that goes; beyond, and for models without one, its `span_time` is asked.
"""

from __future__ import annotations

from typing import Final

from .cost import UNIT_BITS, CostModel, StepFeatures, end_of_step
from .measured_cost import MeasuredCost

_NO_NOISE: Final = 1 << UNIT_BITS


class EpochTimes:
    """The epoch whose first step has `features`; `factor` is a noise factor in 2^-20. Times since its beginning."""

    __slots__ = ("_factor", "_features", "_first", "_model", "_num_steps", "_slope")

    def __init__(self, model: CostModel, features: StepFeatures, factor: int) -> None:
        self._model = model
        self._features = features
        self._factor = factor
        self._first = 0
        self._slope = 0
        self._num_steps = 0  # of the line
        if isinstance(model, MeasuredCost):  # a compiled caller calls it directly
            self._first, self._slope, self._num_steps = model.line(features)
            return
        line = getattr(model, "line", None)
        if line is not None:
            self._first, self._slope, self._num_steps = line(features)

    def end_of(self, k: int) -> int:
        """The end of step k in picoseconds."""
        if k > self._num_steps:
            return end_of_step(self._model, self._features, k, self._factor)
        units = k * self._first + self._slope * (k * (k - 1) >> 1)
        if self._factor != _NO_NOISE:
            units = units * self._factor >> UNIT_BITS
        end = units >> UNIT_BITS
        return end if end > k else k

    def step_by(self, elapsed: int, at_most: int) -> int:
        """The least k >= 1 that ends at or after `elapsed`, or `at_most`: found on the same integer function that says when
        steps end, never by a float inverse.
        """
        low, high = 1, at_most
        if self._num_steps and self._factor == _NO_NOISE:
            # no step is shorter than the first, so that many are enough; one may be too few by rounding
            enough = (elapsed << UNIT_BITS) // self._first + 2 if self._first else at_most
            high = max(1, min(high, enough))
        while low < high:
            middle = low + high >> 1
            if self.end_of(middle) >= elapsed:
                high = middle
            else:
                low = middle + 1
        return low
