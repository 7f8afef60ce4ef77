"""The words of a report's page: what was run, which policy is best and how sure that is, what a reader is warned of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from .case_labels import in_order
from .comparison import Cell, Section, label_of, split_key
from .drawing import scale_of
from .runs import Run
from .tables import number, signed_percent

_HEADLINES: Final = ("mean_ttft_s", "p99_ttft_s", "mean_tpot_s", "slo_attainment")


def headlines(table: Sequence[Sequence[Cell]]) -> list[str]:
    """For a few metrics: which policy is best, and from which others the data cannot tell it."""
    sentences = []
    for cells in table:
        best = next((cell for cell in cells if cell.is_best), None)
        if best is None or best.key not in _HEADLINES or best.estimate.value is None:
            continue
        _, metric = split_key(best.key)
        factor, unit = scale_of([best.estimate.value], metric.unit)
        word = "Highest" if metric.better == "higher" else "Lowest"
        unit = "" if unit == "share" else f" {unit}"
        sentence = f"{word} {label_of(best.key)}: {best.policy}, {number(best.estimate.value * factor)}{unit}"
        same = [cell.policy for cell in cells if cell.distinguishable is False]
        worse = [cell.policy for cell in cells if cell.distinguishable]
        unknown = [
            c.policy for c in cells if not c.is_best and c.distinguishable is None and c.estimate.value is not None
        ]
        if same:
            sentence += f"; not distinguishable from it: {', '.join(same)}"
        if worse:
            sentence += f"; worse: {', '.join(worse)}"
        if unknown:
            sentence += f"; the data cannot tell for {', '.join(unknown)}"
        sentences.append(sentence + ".")
    return sentences


def error_headlines(errors: dict[str, Any]) -> list[str]:
    sentences = []
    for key in ("mean_ttft_s", "mean_tpot_s", "throughput"):
        values = [
            e.relative.value
            for found in errors.values()
            for e in found
            if e.key == key and e.relative.value is not None
        ]
        if values:
            low, high = signed_percent(min(values)), signed_percent(max(values))
            sentences.append(f"{label_of(key)}: {low if low == high else f'{low} to {high}'} of the hardware's.")
    return sentences


_NUMBER: Final = re.compile(r"\d[\d.,]*\d|\d")


def warnings(section: Section) -> list[dict[str, Any]]:
    """Each kind of warning once, its numbers as ranges over the runs that it is about."""
    found: dict[str, list[tuple[list[str], str]]] = {}
    for case in section.cases:
        name = ", ".join(part for part in (case.policy, case.run.backend, case.condition) if part)
        for text in case.summary["warnings"]:
            found.setdefault(_NUMBER.sub("#", text), []).append((_NUMBER.findall(text), name))
    views = []
    for kind, cases in found.items():
        numbers = [_range(column) for column in zip(*(values for values, _ in cases))]
        words = kind.split("#")
        names = list(dict.fromkeys(name for _, name in cases))
        everyone = len(cases) == len(section.cases) > 1
        views.append(
            {
                "text": "".join(part for pair in zip(words, [*numbers, ""]) for part in pair),
                "who": "all runs"
                if everyone
                else f"{len(cases)} of {len(section.cases)} runs: " + "; ".join(names[:6]),
                "more": 0 if everyone else max(0, len(names) - 6),
            }
        )
    return views


def _range(texts: Sequence[str]) -> str:
    if len(set(texts)) == 1:
        return texts[0]
    ordered = sorted(texts, key=lambda text: float(text.replace(",", "")))
    return f"{ordered[0]} to {ordered[-1]}"


def facts(section: Section) -> list[tuple[str, str]]:
    """What was run, as (term, description)."""
    run = section.cases[0].run
    config = run.config
    model, workload = _dict(config.get("model")), _dict(config.get("workload"))
    seeds = sorted({case.run.seed for case in section.cases if case.run.seed is not None})
    found = [
        ("Runs", f"{len(section.cases)}: {len(section.policies)} policies, {' and '.join(section.backends)}"),
        (
            "Model",
            ", ".join(filter(None, (str(model.get("id", "")), _inline({k: model[k] for k in model if k != "id"})))),
        ),
        ("Cluster", _cluster(run)),
        ("Policies", _policies(section)),
        *((f"“{label}”", text) for label, text in section.full_names.items()),
        ("Dataset", _inline(_dict(workload.get("dataset"))) + f"; max_tokens {_inline(workload.get('max_tokens'))}"),
        ("Load", "; ".join(_phase(_dict(phase)) for phase in workload.get("phases") or [])),
        ("Objectives", _objectives(run)),
        ("Varied", _varied(section)),
        ("Seeds", ", ".join(map(str, seeds[:12])) + (" …" if len(seeds) > 12 else "")),
    ]
    for key, term in (
        ("git_commit", "Commit"),
        ("device", "Device"),
        ("driver", "Driver"),
        ("profile_hash", "Profile"),
    ):
        values = sorted({_inline(case.run.manifest[key]) for case in section.cases if case.run.manifest.get(key)})
        found.append((term, " · ".join(values)))
    versions = {_inline(case.run.manifest["versions"]) for case in section.cases if case.run.manifest.get("versions")}
    found.append(("Versions", " · ".join(sorted(versions))))
    return [(term, text) for term, text in found if text]


def _policies(section: Section) -> str:
    """Each decision with every policy that took it in some run, `none` where only some runs had one."""
    found: dict[str, dict[str, None]] = {}
    for case in section.cases:
        for key, value in _dict(case.run.config.get("policy")).items():
            found.setdefault(key, {})[_inline(value).removeprefix("name ") or "none"] = None
    return "; ".join(f"{key} {' | '.join(texts)}" for key, texts in found.items() if set(texts) != {"none"})


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _inline(value: Any) -> str:
    """A value of the configuration on one line, missing parts left out."""
    if isinstance(value, dict):
        if set(value) == {"name"}:
            return str(value["name"])
        parts = ((key, _inline(item)) for key, item in value.items())
        return ", ".join(f"{key} ({text})" if "," in text else f"{key} {text}" for key, text in parts if text)
    if isinstance(value, list):
        return ", ".join(map(_inline, value[:8])) + (" …" if len(value) > 8 else "")
    if value is None or value == "":
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cluster(run: Run) -> str:
    cluster = _dict(run.config.get("cluster"))
    parts = []
    for role in ("context", "generation", "mixed"):
        group = _dict(cluster.get(f"{role}_servers"))
        if group.get("num_instances"):
            tp, pp = group.get("tensor_parallel_size", 1), group.get("pipeline_parallel_size", 1)
            parts.append(f"{group['num_instances']} {role}" + (f" (tp {tp}, pp {pp})" if (tp, pp) != (1, 1) else ""))
    instances = cluster.get("instances") or []
    for role in dict.fromkeys(str(_dict(instance).get("role")) for instance in instances):
        parts.append(f"{sum(_dict(i).get('role') == role for i in instances)} {role}")
    devices = f", {run.num_devices} devices" if run.num_devices else ""
    return f"{' + '.join(parts)} executors{devices}, {cluster.get('profile', '')}" if parts else ""


def _phase(phase: dict[str, Any]) -> str:
    left_out = " (not in results)" if phase.get("exclude_from_results") else ""
    hidden = ("name", "type", "exclude_from_results", "traffic_class", "priority")
    numbers = _inline({key: value for key, value in phase.items() if key not in hidden})
    return f"{phase.get('name', '')}: {phase.get('type', '')} {numbers}{left_out}"


def _objectives(run: Run) -> str:
    words = [
        f"{name} ≤ {number(1000 * run.objectives[key])} ms"
        for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_latency_s", "E2E"))
        if key in run.objectives
    ]
    if words and "attainment" in run.objectives:
        words.append(f"for {run.objectives['attainment']:.0%} of requests")
    return ", ".join(words)


def _varied(section: Section) -> str:
    values: dict[str, list[Any]] = {}
    for case in section.cases:
        for key, value in case.condition_values.items():
            values.setdefault(key, []).append(value)
    return "; ".join(f"{key}: {', '.join(map(_inline, in_order(found)))}" for key, found in values.items())
