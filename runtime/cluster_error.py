"""Why a cluster cannot be built, or cannot go on, and whose fault that is: a rank says it, the exit code tells it on."""

from __future__ import annotations

from typing import Final

from .executor_spec import EXIT_CONFIGURATION
from .launcher import EXIT_RESOURCES

BROKE_CONTRACT: Final = "a policy broke its contract: "
_USER_ERRORS: Final = ("SpecError", "TransportError", "ModelError", "PolicyError")
_RESOURCE_ERRORS: Final = ("DeviceError", "LaunchError", "WorldError")


class ClusterError(RuntimeError):
    """The cluster cannot be built, or cannot go on: a rank says why."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def rank_error(text: str, said: str) -> ClusterError:
    """`said` begins with the name of the rank's exception: some of them are the configuration's fault, or resources."""
    name, _, words = said.partition(": ")
    if name in _RESOURCE_ERRORS:
        return ClusterError(text + words, EXIT_RESOURCES)
    return ClusterError(text + said, EXIT_CONFIGURATION if name in _USER_ERRORS else 1)


def session_error(executor: int, said: str) -> ClusterError:
    """What a running executor failed with: by now its policies are loaded, and theirs is the run's failure."""
    name, _, words = said.partition(": ")
    if name == "PolicyError":
        return ClusterError(f"{BROKE_CONTRACT}executor {executor}: {words}")
    return ClusterError(f"executor {executor}: {said}")
