"""Routing and scheduling policies for disaggregated LLM serving, in simulation and on hardware.

`disagg.policies` is what a policy is written with, `disagg.simulator` and `disagg.runtime` are the two worlds that run it,
`disagg.core` is the mechanism both drive, `disagg.experiments` the command line, `disagg.reports` the comparisons.
"""

from importlib import metadata

try:
    __version__ = metadata.version("disagg")
except metadata.PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
