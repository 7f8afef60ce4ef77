"""What the device here is called, to tell whether a profile was measured on its like."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Final

from .errors import ConfigError
from .measured_profile import Profile

UNKNOWN: Final = "unknown GPU"


def device_name(device_type: str) -> str:
    """Of the first GPU by `nvidia-smi`, which takes no memory of it; of the processor and its cores on a CPU."""
    if device_type == "cuda":
        try:
            done = subprocess.run(
                ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return UNKNOWN
        return next(iter(done.stdout.splitlines()), "").strip() or UNKNOWN
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores"


def check_device_name(profile: Profile | None) -> None:
    """Raises ConfigError if the GPU here is another than the profile was measured on.

    Processors are not compared: names of virtual machines' say little of how fast they are.
    """
    if profile is None or profile.measured_for.device_type != "cuda":
        return
    here = device_name("cuda")
    if here not in (UNKNOWN, profile.measured_for.device_name):
        raise ConfigError(
            f"profile {profile.name} was measured on {profile.measured_for.device_name}, and here is {here};"
            " allowed: a profile of this device, or spec:…"
        )
