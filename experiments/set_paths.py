"""Files in the values of `--set`: whoever types one sees the working folder, and not that of the experiment file.

A path in a file stays relative to that file. Knows which keys hold paths, and nothing of what their files hold.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from ..core.model_shapes import PRESETS
from .config_loader import KEY_ALIASES
from .errors import ConfigError
from .profile_file import is_path

_CLASS: Final = re.compile(r"(?P<file>[^:]+\.py)(?P<name>:\w+)")  # of a policy in a file
_WORDS: Final = {
    ("model", "weights"): ("random",),
    ("model", "id"): tuple(PRESETS),
    ("workload", "dataset", "path"): (),
}


def from_working_folder(dotted: str, value: Any, root: Path, place: str) -> Any:
    """`value` of the key `dotted`, with each relative path to something in the working folder made absolute.

    What is not there stays as it is: relative to `root`, the experiment file's folder. Raises ConfigError for the file of
    a profile that is in neither; `place` leads its message.
    """
    return _seen(tuple(KEY_ALIASES.get(key, key) for key in dotted.split(".")), value, root, place)


def _seen(keys: tuple[str, ...], value: Any, root: Path, place: str) -> Any:
    if isinstance(value, dict):
        # keys of a sweep are key paths themselves
        inner = {key: (() if keys == ("sweep",) else keys) + tuple(str(key).split(".")) for key in value}
        return {key: _seen(inner[key], item, root, place) for key, item in value.items()}
    if isinstance(value, list):
        return [_seen(keys, item, root, place) for item in value]
    if not isinstance(value, str):
        return value
    in_file = _CLASS.fullmatch(value)
    if in_file is not None and keys[0] in ("policy", "cluster", "plan"):
        return _found(in_file["file"], root) + in_file["name"]
    if keys[0] == "cluster" and keys[-1] == "profile" and is_path(value):
        found = _found(value, root)
        if not os.path.exists(root / found):
            tried = dict.fromkeys(str(folder.absolute() / value) for folder in (Path.cwd(), root))
            raise ConfigError(
                f"{place}: {'.'.join(keys)}: there is no profile {' and no '.join(tried)}; allowed: a file from the working"
                " folder or from the experiment file's, or a name of `disagg list profiles`"
            )
        return found
    if keys in _WORDS and value not in _WORDS[keys]:
        return _found(value, root)
    return value


def _found(name: str, root: Path) -> str:
    """Absolute if it is in the working folder and that is not `root`, else `name`."""
    here = Path.cwd() / name
    if not os.path.exists(here) or here.resolve() == (root / name).resolve():
        return name
    return str(here.resolve())
