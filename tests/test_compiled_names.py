"""What is done to a module before it is compiled: imported names, and members of enums, are bound once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from disagg.experiments import compiled
from disagg.experiments.compiled_names import bind_names

SOURCE = """
from __future__ import annotations
import heapq
from .events import Report, Wake
from .states import State
from .visit import Visit

LIMIT = State.DONE

def first(things: list[Report], wake: Wake | None = None) -> Report:
    visit = Visit(State.DONE)
    heapq.heappush(things, Report(visit))
    return things[0]

def second(Report: int) -> int:
    return Report

def third(thing: object) -> bool:
    match thing:
        case Wake():
            return isinstance(thing, Wake | Report)
    return type(thing) is Wake
"""

BOUND = """
from __future__ import annotations
import heapq
from .events import Report, Wake
from .states import State
from .visit import Visit
from typing import Final as _Final
_c_Report: _Final = Report
_c_State_DONE: _Final = State.DONE
_c_Wake: _Final = Wake
_c_heapq_heappush: _Final = heapq.heappush

LIMIT = State.DONE

def first(things: list[Report], wake: Wake | None = None) -> Report:
    visit = Visit(_c_State_DONE)
    _c_heapq_heappush(things, _c_Report(visit))
    return things[0]

def second(Report: int) -> int:
    return Report

def third(thing: object) -> bool:
    match thing:
        case Wake():
            return isinstance(thing, Wake | Report)
    return type(thing) is _c_Wake
"""


def test_uses_inside_functions_are_bound_and_annotations_patterns_and_locals_are_not() -> None:
    found = bind_names(SOURCE, compiled={"states", "visit"})
    assert ast.dump(ast.parse(found)) == ast.dump(ast.parse(BOUND))


def test_a_module_without_imports_stays_as_it_is() -> None:
    source = "def double(x: int) -> int:\n    return 2 * x  # a comment\n"
    assert bind_names(source) == source


@pytest.mark.parametrize("module", ["core/executor.py", "simulator/cluster.py"])
def test_every_bound_name_of_a_hot_module_is_defined_once_and_before_its_use(module: str) -> None:
    tree = ast.parse(bind_names((Path(compiled.PACKAGE) / module).read_text()))
    defined = [
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id.startswith("_c_")}
    assert used == {name for name in defined if name.startswith("_c_")}
    assert len(defined) == len(set(defined))


def test_a_class_of_slots_alone_keeps_the_object_dropped_last_for_the_next() -> None:
    source = "class {head}:\n    {body}\n"
    slots = "__slots__ = ('a', 'b')"
    assert "@_mypyc_attr(free_list_len=1)\nclass Value:" in bind_names(source.format(head="Value", body=slots))
    for head, body in (("Value(Base)", slots), ("Value(metaclass=Kind)", slots), ("Value", "a = 1")):
        assert bind_names(source.format(head=head, body=body)) == source.format(head=head, body=body)
