"""What compiled code remembers of attributes, structs and heaps (`compiled_caches.h`) changes nothing but its speed."""

from __future__ import annotations

import bisect
import heapq
import importlib
import os
from random import Random
from typing import Any

import msgspec
import pytest

from disagg.experiments import compiled
from tests.test_compiled import COPY

_MODULE = """
import bisect
import heapq
from typing import Any, Final

import values

Pair: Final[Any] = values.Pair
Listed: Final[Any] = values.Listed
Watched: Final[Any] = values.Watched
push: Final[Any] = heapq.heappush
pop: Final[Any] = heapq.heappop
bisect_left: Final[Any] = bisect.bisect_left
bisect_right: Final[Any] = bisect.bisect_right


def name_of(thing: Any) -> Any:
    return thing.name


def pair(a: Any) -> Any:
    return Pair(a, second=a)


def pair_of(kind: Any, a: Any) -> Any:
    return kind(a)


def listed() -> Any:
    return Listed(1)


def watched(a: Any) -> Any:
    return Watched(a)


def push_all(heap: list[Any], items: list[Any]) -> None:
    for item in items:
        push(heap, item)


def pop_one(heap: list[Any]) -> Any:
    return pop(heap)


def place(items: Any, item: Any, is_right: bool) -> Any:
    return bisect_right(items, item) if is_right else bisect_left(items, item)
"""
_VALUES = """
import msgspec


class Pair(msgspec.Struct, frozen=True, gc=False):
    first: int
    name: str = "pair"
    second: int | None = None


class Listed(msgspec.Struct, gc=False):
    number: int
    names: list[str] = []


class Watched(msgspec.Struct, gc=False):
    number: int

    def __post_init__(self):
        if self.number < 0:
            raise ValueError("below 0")
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A module compiled as the copy is."""
    if not os.environ.get("CI") and not (COPY / compiled.SOURCES).is_file():
        pytest.skip("nothing was compiled here: make compiled")
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.py").write_text(_MODULE)
    (folder / "values.py").write_text(_VALUES)
    with pytest.MonkeyPatch.context() as patch:
        compiled.compile_modules(folder, ["small.py"])
        patch.syspath_prepend(str(folder))
        module = importlib.import_module("small")
    assert not str(module.__file__).endswith(".py")
    return module


class Slotted:
    __slots__ = ("name",)


class Other:
    def __init__(self) -> None:
        self.name = "of a dictionary"


def test_an_attribute_is_the_one_that_the_object_has_now(small: Any) -> None:
    thing, other = Slotted(), Other()
    thing.name = "slot"
    assert [small.name_of(each) for each in (thing, thing, other, thing, other)] == [
        "slot",
        "slot",
        "of a dictionary",
        "slot",
        "of a dictionary",
    ]
    thing.name = "changed"
    assert small.name_of(thing) == "changed"
    del thing.name
    with pytest.raises(AttributeError, match="name"):
        small.name_of(thing)


def test_a_class_that_changes_is_read_anew(small: Any) -> None:
    class Base:
        __slots__ = ("name",)

    class Derived(Base):
        __slots__ = ()

    thing: Any = Derived()
    thing.name = "slot"
    assert small.name_of(thing) == small.name_of(thing) == "slot"
    Derived.name = property(lambda self: "property")  # type: ignore[misc, assignment]
    assert small.name_of(thing) == "property"
    del Derived.name
    assert small.name_of(thing) == "slot"
    Derived.__getattribute__ = lambda self, name: f"asked for {name}"  # type: ignore[assignment]
    assert small.name_of(thing) == "asked for name"


def test_a_struct_is_the_one_that_msgspec_makes(small: Any) -> None:
    made = [small.pair(number) for number in (1, 2, 3)]
    assert made == [small.Pair(number, "pair", number) for number in (1, 2, 3)]
    assert msgspec.json.encode(made[2]) == b'{"first":3,"name":"pair","second":3}'
    with pytest.raises(AttributeError, match="immutable"):
        made[2].first = 4
    assert [small.pair_of(kind, 1) for kind in (small.Pair, str, small.Pair)] == [small.Pair(1), "1", small.Pair(1)]
    with pytest.raises(TypeError, match="argument"):
        small.pair_of(lambda: None, 1)


def test_what_a_struct_makes_for_itself_or_checks_is_its_own(small: Any) -> None:
    first, second = small.listed(), small.listed()
    first.names.append("mine")
    assert second.names == small.listed().names == []
    assert small.watched(1).number == small.watched(2).number - 1 == 1
    with pytest.raises(ValueError, match="below 0"):
        small.watched(-1)


def test_a_heap_is_the_one_that_heapq_makes(small: Any) -> None:
    chance = Random(1)
    scale = (1, 1 << 29, 1 << 31, 1 << 61, 1 << 90)
    items = [(chance.randrange(-9, 9) * chance.choice(scale), chance.choice((0, 1, 0.5, True)), i) for i in range(500)]
    items += [(chance.randrange(9), chance.choice("ab"), i, None) for i in range(500)]  # a tie of numbers and words
    ours: list[Any] = []
    theirs: list[Any] = []
    for part in (items[:500], items[500:]):
        small.push_all(ours, part)
        for item in part:
            heapq.heappush(theirs, item)
        assert ours == theirs
        for _ in range(500):
            assert small.pop_one(ours) == heapq.heappop(theirs)
            assert ours == theirs
    with pytest.raises(IndexError):
        small.pop_one(ours)


def test_what_cannot_be_compared_says_so(small: Any) -> None:
    class Emptying:
        def __lt__(self, other: Any) -> bool:
            heap.clear()
            return True

    with pytest.raises(TypeError, match="not supported"):
        small.push_all([], [(1, "a"), (1, 2)])
    heap: list[Any] = []
    with pytest.raises(RuntimeError, match="changed size"):
        small.push_all(heap, [(1, Emptying()), (1, Emptying())])


def test_a_place_among_integers_is_bisects(small: Any) -> None:
    chance = Random(2)
    for kind in (tuple, list):
        for _ in range(200):
            items = kind(
                sorted(chance.randrange(-5, 5) << chance.choice((0, 31, 70)) for _ in range(chance.randrange(9)))
            )
            item = chance.choice([*items, 0, 1 << 31, -1 << 71])
            assert small.place(items, item, False) == bisect.bisect_left(items, item)
            assert small.place(items, item, True) == bisect.bisect_right(items, item)
    assert [small.place((0.5, True, 2), 1, is_right) for is_right in (False, True)] == [1, 2]
    with pytest.raises(TypeError, match="not supported"):
        small.place((1, "a", 3), 2, True)
