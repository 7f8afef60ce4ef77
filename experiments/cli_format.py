"""How a command prints data: as text, or as JSON and nothing else. Every command that prints data takes these options."""

from __future__ import annotations

from typing import Annotated

import typer

from .errors import ConfigError

Format = Annotated[str, typer.Option("--format", help="text or json.")]
Json = Annotated[bool, typer.Option("--json", help="Short for --format json.")]


def wants_json(format: str, json: bool) -> bool:
    """Raises ConfigError for another format."""
    if format not in ("text", "json"):
        raise ConfigError(f"--format {format}: must be text or json")
    return json or format == "json"
