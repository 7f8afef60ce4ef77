"""The file of a measured profile: versioned JSON, shipped by name or a user's own, read with care and written whole."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec

from .errors import ConfigError, did_you_mean
from .measured_profile import FORMAT_VERSION, Profile
from .profile_checks import problem_of
from .profile_cost import measured_cost

_FORMATS: Final = (1, 2)  # 1: steps of a GPU whose chunks were behind cached KV, or more than eight, had no graph
SPEC_PREFIX: Final = "spec:"  # of `cluster.profile`: a device's data sheet
SHIPPED: Final = Path(__file__).resolve().parent / "profiles"
_MOST_BYTES: Final = 4 << 20
_decoder: Final = msgspec.json.Decoder(Profile)


def shipped_profiles() -> list[str]:
    """Names that `cluster.profile` can give without a path."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def is_path(name: str) -> bool:
    return "/" in name or name.endswith(".json")


def profile_path(name: str, root: Path) -> Path:
    """Of a shipped profile by name, or of a file from `root`. Raises ConfigError for a name that is not shipped."""
    if is_path(name):
        return root / name
    if name.startswith(SPEC_PREFIX):
        raise ConfigError(
            f"{name} is a data sheet, of which nothing was measured; allowed: a file, or {', '.join(shipped_profiles())}"
        )
    path = SHIPPED / f"{name}.json"
    if name not in shipped_profiles():
        allowed = f"a file (.json), or {', '.join(shipped_profiles())}"
        raise ConfigError(f"unknown profile '{name}'{did_you_mean(name, shipped_profiles())} (allowed: {allowed})")
    return path


def load_profile(path: Path) -> Profile:
    """Raises ConfigError for a file that cannot be read or holds no such profile."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"profile {path}: cannot be read: {error.strerror or error}") from None
    return _load(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _load(path: Path, mtime_ns: int, size: int) -> Profile:
    if size > _MOST_BYTES:
        raise ConfigError(f"profile {path}: {size} bytes; allowed: at most {_MOST_BYTES}")
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=dict[str, Any]).get("format_version")
        if version not in _FORMATS:
            raise ConfigError(f"profile {path}: of format {version}; allowed: {', '.join(map(str, _FORMATS))}")
        profile = _decoder.decode(data)
    except OSError as error:
        raise ConfigError(f"profile {path}: cannot be read: {error.strerror or error}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"profile {path}: {error}") from None
    if profile.format_version < FORMAT_VERSION and profile.measured_for.device_type == "cuda":
        raise ConfigError(
            f"profile {path}: of format {profile.format_version}, measured on an engine that ran other steps as CUDA graphs;"
            f" allowed: {FORMAT_VERSION}, by calibrating again"
        )
    problem = problem_of(profile)
    if problem is not None:
        raise ConfigError(f"{path}: {problem}")
    for entry in profile.engines:
        try:
            measured_cost(profile, entry, entry.max_batch_size)
        except ValueError as error:
            raise ConfigError(f"profile {path}: {entry.title}: {error}") from None
    return profile


def save_profile(profile: Profile, path: Path) -> None:
    """Written whole or not at all, its folder too where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
    partial.replace(path)
