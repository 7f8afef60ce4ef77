"""How a policy is found: by its registered name, by an installed package's entry point, by file and class."""

from __future__ import annotations

import inspect
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Any

import pytest

from disagg.policies import registry
from disagg.policies.interfaces import (
    AdmissionPolicy,
    BatchPolicy,
    PolicyError,
    QueueOrder,
    RoutingPolicy,
)
from disagg.policies.registry import available, create, load, register
from disagg.policies.routing import LeastTokens, PowerOfTwo

TEN_LINES = """\
from disagg.policies import ScoringPolicy


class MostFree(ScoringPolicy):
    '''The executor with the most free blocks.'''

    def __init__(self, *, rng, weight: float = 1.0):
        super().__init__(rng=rng)
        self.weight = weight

    def score(self, request, executors):
        return -executors.kv_blocks_free * self.weight


NOT_A_CLASS = 3
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "my policies" / "mine.py"
    path.parent.mkdir()
    path.write_text(TEN_LINES)
    return path


def test_every_first_policy_is_available_with_its_source_and_a_summary() -> None:
    by_kind: dict[str, list[str]] = {}
    for info in available():
        by_kind.setdefault(info.kind, []).append(info.name)
        assert info.source
        assert info.summary
        told = inspect.getdoc(info.policy) or ""
        assert told.startswith(info.summary)
        assert told.endswith(f"Source: {info.source}.")
        assert issubclass(info.policy, registry.KINDS[info.kind])
    routers = {"round_robin", "random", "least_requests", "least_tokens", "power_of_two", "least_kv"}
    assert routers <= set(by_kind["routing"])
    assert {"accept_all"} <= set(by_kind["admission"])
    assert {"fcfs"} <= set(by_kind["queue_order"])
    assert {"chunked_prefill", "prefill_first"} <= set(by_kind["batching"])
    assert list(by_kind) == sorted(by_kind)


def test_a_policy_is_made_by_name_with_its_parameters_and_a_generator_of_its_own() -> None:
    policy = create("power_of_two", "routing", {"d": 3}, seed="9/router")
    assert isinstance(policy, PowerOfTwo)
    assert policy.d == 3
    assert policy.rng.random() == Random("9/router").random()


def test_an_unknown_name_is_answered_with_what_was_meant_and_what_there_is() -> None:
    with pytest.raises(PolicyError) as caught:
        load("least_token", "routing")
    message = str(caught.value)
    assert "no routing policy 'least_token', did you mean 'least_tokens'?" in message
    assert "round_robin" in message
    assert "path/to/file.py:Class" in message


def test_a_name_like_no_other_gets_no_guess() -> None:
    with pytest.raises(PolicyError) as caught:
        load("zzzz", "routing")
    assert "did you mean" not in str(caught.value)


def test_a_policy_of_another_kind_is_not_found_by_its_name() -> None:
    with pytest.raises(
        PolicyError, match=r"no admission policy 'round_robin'\..*is of another kind: routing\. Available: ac"
    ):
        load("round_robin", "admission")
    with pytest.raises(PolicyError, match=r"no routing policy 'edf'.*'edf' is of another kind: queue order\."):
        load("edf", "routing")


def test_a_file_without_its_class_is_told_how_to_name_it() -> None:
    with pytest.raises(PolicyError, match=r"A file's class is part of its name: mine/least\.py:MyPolicy\."):
        load("mine/least.py", "routing")


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("power_of_two", {"dd": 2}, "unexpected keyword argument 'dd'. It takes: d"),
        ("round_robin", {"d": 2}, "unexpected keyword argument 'd'. It takes: no parameters"),
        ("round_robin", {"rng": 2}, "rng"),
    ],
)
def test_wrong_parameters_are_refused_and_the_right_ones_listed(
    name: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        create(name, "routing", params, seed="")


def test_a_name_is_registered_once_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    class Mine(RoutingPolicy):
        """Mine alone.

        And more about it.
        """

    load("fcfs", "queue_order")
    assert register("fcfs", kind="routing", source="a test")(Mine) is Mine
    info = next(i for i in available() if (i.kind, i.name) == ("routing", "fcfs"))
    assert (info.summary, info.source, info.policy) == ("Mine alone.", "a test", Mine)
    with pytest.raises(PolicyError, match="a routing policy named 'fcfs' is registered already"):
        register("fcfs", kind="routing", source="again")(Mine)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_policy_is_found_in_a_file_by_absolute_path_and_relative_to_the_root(user_file: Path) -> None:
    policy = create(f"{user_file}:MostFree", "routing", {"weight": 2.0}, seed="")
    assert type(policy).__name__ == "MostFree"
    assert policy.weight == 2.0
    same = load("my policies/mine.py:MostFree", "routing", str(user_file.parent.parent))
    assert same is type(policy)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nowhere.py:MostFree", "routing", "there is no file .*nowhere.py"),
        ("mine.py:MostFre", "routing", "has no class 'MostFre'; its classes: MostFree"),
        ("mine.py:NOT_A_CLASS", "routing", "has no class 'NOT_A_CLASS'; its classes: MostFree"),
        ("mine.py:MostFree", "admission", "is no admission policy: it must derive from AdmissionPolicy"),
    ],
)
def test_a_file_without_that_policy_is_an_error_that_says_what_is_there(
    user_file: Path, name: str, kind: str, message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        load(name, kind, str(user_file.parent))


def test_a_file_that_cannot_be_imported_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import disagg\n1 / 0\n")
    for _ in range(2):  # a failed import leaves nothing behind that the second attempt would take for it
        with pytest.raises(PolicyError, match=r"broken\.py could not be imported: ZeroDivisionError"):
            load("broken.py:Any", "routing", str(tmp_path))


# ---- entry points ---------------------------------------------------------------------------------------------------


class _Installed(metadata.Distribution):
    """A package that exists for its entry points only."""

    def __init__(self, entry_points: str) -> None:
        self._files = {
            "entry_points.txt": f"[disagg.policies]\n{entry_points}\n",
            "METADATA": "Metadata-Version: 2.1\nName: fleetwise\nVersion: 1\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(path)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def pretend(entry_points: str) -> None:
        found = _Installed(entry_points).entry_points

        def select(**wanted: Any) -> metadata.EntryPoints:
            return found.select(**wanted)

        monkeypatch.setattr(metadata, "entry_points", select)

    return pretend


def test_an_installed_package_brings_policies_by_entry_point(install: Any) -> None:
    install("fewest = disagg.policies.routing:LeastTokens\nkeen = disagg.policies.admission:AcceptAll")
    assert load("fewest", "routing") is LeastTokens
    info = next(i for i in available() if i.name == "fewest")
    assert (info.kind, info.source, info.policy) == ("routing", "package fleetwise", LeastTokens)
    with pytest.raises(PolicyError, match="did you mean 'fewest'"):
        load("fewwest", "routing")
    with pytest.raises(PolicyError, match="no routing policy 'keen'"):
        load("keen", "routing")


def test_a_built_in_name_wins_over_an_entry_point(install: Any) -> None:
    install("least_tokens = disagg.policies.routing:RoundRobin")
    assert load("least_tokens", "routing") is LeastTokens
    assert next(i for i in available() if i.name == "least_tokens").policy is LeastTokens


def test_an_entry_point_that_cannot_be_loaded_harms_only_those_who_ask_for_it(install: Any) -> None:
    install("broken = no_such_module_anywhere:Policy\nnumber = disagg.policies.views:VECTORISE_FROM")
    assert load("least_tokens", "routing") is LeastTokens
    with pytest.raises(PolicyError, match="'broken' of package fleetwise: no_such_module_anywhere:Policy could not be"):
        load("broken", "routing")
    with pytest.raises(PolicyError, match="16 derives from none of RoutingPolicy, AdmissionPolicy"):
        load("number", "routing")


def test_an_interface_without_its_method_cannot_be_asked() -> None:
    rng = Random(0)
    request: Any = None
    for call in (
        lambda: RoutingPolicy(rng=rng).route_context(request, request),
        lambda: RoutingPolicy(rng=rng).route_generation(request, request),
        lambda: AdmissionPolicy(rng=rng).admit(request, request),
        lambda: QueueOrder(rng=rng).key(request, 0),
        lambda: BatchPolicy(rng=rng).plan(request),
    ):
        with pytest.raises(PolicyError, match="does not define"):
            call()
