"""The simulated world: the same cores as on hardware, on SimPy's virtual time."""

from .calls import Environment, FloatDelayError
from .cluster import SimulatedCluster
from .link import Link
from .timing import ModelTiming, Timing

__all__ = ["Environment", "FloatDelayError", "Link", "ModelTiming", "SimulatedCluster", "Timing"]
