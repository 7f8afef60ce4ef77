"""Commands about experiment files: validate, expand, schema, list, init."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from .errors import ConfigError, did_you_mean

TEMPLATES: Final = Path(__file__).resolve().parent / "templates"


def validate_file(file: Path, overrides: Sequence[str], backend: str | None) -> None:
    from .experiment_file import load_experiment

    loaded = load_experiment(file, overrides, backend=backend)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    runs = len(loaded.points) * loaded.experiment.repeats
    print(f"{file}: valid; {runs} {'run' if runs == 1 else 'runs'}")


def expand_file(file: Path, overrides: Sequence[str], backend: str | None, *, as_json: bool) -> None:
    from .config_loader import dump_yaml
    from .experiment_file import load_experiment

    plain = load_experiment(file, overrides, backend=backend).experiment.expanded()
    sys.stdout.write(json.dumps(plain, indent=2) + "\n" if as_json else dump_yaml(plain))


def print_schema() -> None:
    from .config import json_schema

    print(json.dumps(json_schema(), indent=2))


def list_names(what: str, *, as_json: bool) -> None:
    listers = {"policies": _policies, "profiles": _profiles, "models": _models}
    if what not in listers:
        raise ConfigError(f"list {what}: must be one of {', '.join(listers)}{did_you_mean(what, listers)}")
    rows = listers[what]()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = list(rows[0]) if rows else []
    widths = [max(len(name), *(len(str(row[name])) for row in rows)) for name in columns]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(str(row[name]).ljust(width) for name, width in zip(columns, widths, strict=True)).rstrip())


def _policies() -> list[dict[str, Any]]:
    from ..policies.registry import available

    return [{"kind": i.kind, "name": i.name, "summary": i.summary, "source": i.source} for i in available()]


def _profiles() -> list[dict[str, Any]]:
    from ..core.devices import DEVICES
    from .profile_file import SHIPPED, SPEC_PREFIX, load_profile, shipped_profiles

    specified = [
        {
            "name": f"{SPEC_PREFIX}{device.name}",
            "memory_gb": round(device.memory_bytes / 1e9, 1),
            "tflops": round(device.flops / 1e12, 2),
            "memory_tb_per_s": round(device.memory_bandwidth / 1e12, 3),
            "link_gb_per_s": round(device.link_bandwidth / 1e9, 1),
            "source": device.source,
        }
        for device in DEVICES.values()
    ]
    measured = []
    for name in shipped_profiles():
        profile = load_profile(SHIPPED / f"{name}.json")
        for_ = profile.measured_for
        what = f"{for_.model} ({for_.dtype}) on {for_.device_name}: {', '.join(e.title for e in profile.engines)}"
        gigabytes, link = round(profile.device.memory_bytes / 1e9, 1), round(profile.device.link_bandwidth / 1e9, 1)
        row = {"name": name, "memory_gb": gigabytes, "tflops": None, "memory_tb_per_s": None, "link_gb_per_s": link}
        measured.append({**row, "source": f"measured {profile.created[:10]}, {what}"})
    return [*specified, *measured]


def _models() -> list[dict[str, Any]]:
    from ..core.model_shapes import PRESETS

    return [
        {
            "name": name,
            "parameters": shape.num_parameters,
            "layers": shape.num_layers,
            "attention_heads": shape.num_attention_heads,
            "kv_heads": shape.num_kv_heads,
            "dtype": shape.dtype,
            "kv_bytes_per_token": shape.kv_bytes_per_token,
        }
        for name, shape in PRESETS.items()
    ]


def init_file(template: str, output: Path, *, overwrite: bool) -> None:
    names = sorted(path.stem for path in TEMPLATES.glob("*.yaml"))
    if template == "list":
        print("\n".join(names))
        return
    if template not in names:
        raise ConfigError(
            f"--template {template}: unknown{did_you_mean(template, names)} (allowed: {', '.join(names)})"
        )
    text = (TEMPLATES / f"{template}.yaml").read_text(encoding="utf-8")
    if str(output) == "-":
        sys.stdout.write(text)
        return
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output}: exists; allowed: --overwrite, or another file")
    output.write_text(text, encoding="utf-8")
    print(f"wrote {output}; next: disagg {'plan' if template == 'plan' else 'run'} {output}")
