"""What compiled code remembers of attributes, structs and heaps (`compiled_caches.h`) changes nothing but its speed."""

from __future__ import annotations

import bisect
import heapq
import importlib
import os
import sys
from collections import deque
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

import msgspec.structs
import values

Pair: Final[Any] = values.Pair
Listed: Final[Any] = values.Listed
Watched: Final[Any] = values.Watched
Chained: Final[Any] = values.Chained
replace: Final[Any] = msgspec.structs.replace
write_list: Final[Any] = list.__setitem__
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


def as_object(number: int) -> Any:
    thing: Any = number
    return thing


def product(a: int, b: int) -> int:
    return a * b


def comparisons(a: Any, b: Any) -> list[Any]:
    return [a < b, a <= b, a == b, a != b, a > b, a >= b]


def item(items: Any, place: Any) -> Any:
    return items[place]


def found(table: dict[Any, Any], key: Any) -> Any:
    return table[key]


def found_or_none(table: dict[Any, Any], key: Any) -> Any:
    return table.get(key)


def popped(thing: Any, *what: Any) -> Any:
    return thing.pop()


def popped_key(table: Any, key: Any) -> Any:
    return table.pop(key, None)


def added(thing: Any, what: Any) -> Any:
    return thing.append(what)


def chained(before: Any) -> Any:
    return Chained(before)


def with_second(value: Any, second: Any) -> Any:
    return replace(value, second=second)


def write(cells: Any, places: Any, items: Any) -> Any:
    return write_list(cells, places, items)
"""
_VALUES = """
import msgspec


class Pair(msgspec.Struct, frozen=True, gc=False):
    first: int
    name: str = "pair"
    second: int | None = None


class Chained(msgspec.Struct, gc=False):
    before: object


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


# around the ends of what is one digit of Python's, two, a machine word's, and what compiled code keeps without an object
_NUMBERS = sorted(
    {sign * ((1 << bits) + near) for bits in (0, 30, 31, 60, 61, 62, 63, 90) for near in (-1, 0, 1) for sign in (-1, 1)}
)


def test_an_integer_is_what_it_was_however_often_others_were_made_meanwhile(small: Any) -> None:
    chance = Random(3)
    for _ in range(3000):
        number = chance.choice((chance.randrange(-300, 3000), chance.getrandbits(62), chance.choice(_NUMBERS)))
        thing = small.as_object(number)
        assert thing == number
        assert type(thing) is int


def test_an_integer_that_somebody_has_stays_as_it_is_when_others_take_its_place(small: Any) -> None:
    random = Random(3)
    kept: list[tuple[Any, str]] = []
    for _ in range(20_000):  # twenty for each place at which one is remembered
        number = random.choice([1, -1]) * random.getrandbits(random.choice([3, 29, 30, 31, 45, 59, 60, 61, 62, 70]))
        made = small.as_object(number)
        assert str(made) == str(number)
        if random.random() < 0.5:
            kept.append((made, str(number)))
        del made
    assert [str(made) for made, _ in kept] == [text for _, text in kept]


def test_products_and_comparisons_of_integers_of_any_size_are_pythons(small: Any) -> None:
    for a in _NUMBERS:
        for b in _NUMBERS:
            assert small.product(a, b) == a * b
            assert small.comparisons(a, b) == [a < b, a <= b, a == b, a != b, a > b, a >= b]
    assert small.comparisons(1, 1.5) == [True, True, False, True, False, False]
    assert small.comparisons(True, 1) == [False, True, True, False, False, True]
    with pytest.raises(TypeError, match="not supported"):
        small.comparisons(1, "a")


def test_items_of_lists_and_of_what_reads_as_a_list(small: Any) -> None:
    class Cells(list[Any]):
        pass

    class Doubled(list[Any]):
        def __getitem__(self, place: Any) -> Any:
            return 2 * super().__getitem__(place)

    for _ in range(2):
        assert [small.item(kind([1, 2, 3]), 1) for kind in (list, Cells, Doubled, tuple)] == [2, 2, 4, 2]
        assert small.item(Cells([1, 2]), -1) == 2
        assert small.item(Cells([1, 2]), slice(1, 2)) == [2]
        assert small.item({1: "one"}, 1) == "one"
        with pytest.raises(IndexError):
            small.item(Cells([1]), 1)
    Cells.__getitem__ = lambda self, place: "changed"
    assert small.item(Cells([1]), 0) == "changed"
    assert Cells([1])[0] == "changed"


def test_a_dictionary_is_asked_for_any_key(small: Any) -> None:
    keys: list[Any] = [*_NUMBERS, True, "a", (1, 2), None, 0.5]
    for key in keys:
        assert small.found({key: "there", "other": 0}, key) == "there"
        assert small.found_or_none({key: "there"}, key) == "there"
        assert small.found_or_none({"other": 0}, key) is None
        with pytest.raises(KeyError):
            small.found({"other": 0}, key)
    assert small.found({1: "one"}, True) == "one"
    with pytest.raises(TypeError, match="unhashable"):
        small.found_or_none({}, [])


def test_a_method_is_the_one_that_the_object_has_now(small: Any) -> None:
    class Own(deque[Any]):
        def append(self, what: Any) -> None:
            super().append((what, "mine"))

    class Silent(list[Any]):
        pass

    things: list[Any] = [deque(), [], Own(), Silent(), deque()]
    for thing in things:
        small.added(thing, 1)
        small.added(thing, 2)
    assert [list(thing) for thing in things] == [[1, 2], [1, 2], [(1, "mine"), (2, "mine")], [1, 2], [1, 2]]
    things[3].append = lambda what: "not taken"
    assert small.added(things[3], 3) == "not taken"
    assert [small.popped(thing) for thing in (deque([1, 2]), [3], {4})] == [2, 3, 4]
    table = {1: "one"}
    assert [small.popped_key(table, 1), small.popped_key(table, 1), table] == ["one", None, {}]
    with pytest.raises(IndexError):
        small.popped(deque())


def test_a_struct_lets_go_of_what_it_held_and_its_place_holds_another(small: Any) -> None:
    class Held:
        pass

    held = Held()
    before = sys.getrefcount(held)
    for _ in range(3):
        pairs = [small.pair(held) for _ in range(200)]
        assert sys.getrefcount(held) == before + 400
        del pairs
        assert sys.getrefcount(held) == before
    assert small.pair(1) == small.pair(1)
    assert [small.pair(number).second for number in range(3)] == [0, 1, 2]


def test_a_long_chain_of_structs_is_dropped(small: Any) -> None:
    chain = None
    for _ in range(3000):
        chain = small.chained(chain)
    del chain
    assert small.chained(1).before == 1


def test_replace_gives_what_msgspecs_gives(small: Any) -> None:
    made = small.pair(1)
    for value in (made, type(made)(3, "name", 4)):
        for second in (None, 5, "any"):
            replaced = small.with_second(value, second)
            assert replaced == msgspec.structs.replace(value, second=second)
            assert type(replaced) is type(value)
    assert made == small.pair(1)
    with pytest.raises(TypeError):
        small.with_second(small.listed(), 1)


def test_cells_of_a_list_are_written_as_python_writes_them(small: Any) -> None:
    for places, items in (
        (slice(1, 3), ("a", "b")),
        (slice(1, 3), ("a",)),
        (slice(1, 3), ("a", "b", "c")),
        (slice(-2, None), ("a", "b")),
        (slice(0, 4, 2), ("a", "b")),
        (slice(3, 9), ("a", "b")),
        (slice(1, 2), ["a"]),
        (1, "a"),
    ):
        cells, expected = [1, 2, 3, 4], [1, 2, 3, 4]
        small.write(cells, places, items)
        expected[places] = items  # type: ignore[call-overload]
        assert cells == expected
    with pytest.raises(IndexError):
        small.write([1], 1, 2)
