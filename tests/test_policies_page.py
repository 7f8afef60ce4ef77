"""docs/policies.md names every policy with its source, and nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from disagg.experiments.config_workload import SyntheticDataset
from disagg.policies.registry import KINDS, create
from tests.every_policy import names

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "policies.md").read_text()
TITLES = {"routing": "Routing", "admission": "Admission", "queue_order": "Queue order", "batching": "Batching"}
TITLES |= {"capacity": "Capacity", "roles": "Roles", "migration": "Migration"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_has_a_row_with_a_source_and_a_rule_for_each_policy(kind: str) -> None:
    section = PAGE.split(f"\n## {TITLES[kind]}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", section, re.M)
    assert sorted(name for name, _, _ in rows) == sorted(names(kind))
    assert all(source.strip() and rule.strip() for _, source, rule in rows)


def test_what_the_page_composes_can_be_made() -> None:
    (router,) = re.findall(r"    router: (\{name: weighted_scorers.*\})", PAGE)
    params = yaml.safe_load(router)
    assert create(params.pop("name"), "routing", params, seed="1").picker == "max"
    (dataset,) = re.findall(r"    dataset:\n((?:      .*\n)+)", PAGE)
    assert SyntheticDataset.model_validate(yaml.safe_load(dataset)).sessions is not None
