"""Names of a module to be compiled, bound once: what mypyc does not do by itself.

mypyc turns names that a module defines into C, but looks each use of an imported name up in the module's dictionary, and
each member of an enum up in its class, every time. A module-level `Final` is a C variable. So in the copy that is compiled

    from .commands import Send                  from .commands import Send
                                                _c_Send: Final = Send
    def f(self): self._out.append(Send(…))      def f(self): self._out.append(_c_Send(…))

and `State.QUEUED` and `heapq.heappush` alike. And of a class with `__slots__` and no other base, which is made and dropped all
the time, the object that was dropped last is kept for the next. Nothing else changes; the source stays as it reads.
"""

from __future__ import annotations

import ast
from collections.abc import Set
from typing import Any, Final

_PREFIX: Final = "_c_"
_ATTRIBUTE: Final = "    from mypy_extensions import mypyc_attr as _mypyc_attr"
# they take types, or names of types, that the type checker must be able to read
_OF_TYPES: Final = frozenset({"cast", "isinstance", "issubclass", "TypeVar"})


def bind_names(source: str, compiled: Set[str] = frozenset()) -> str:
    """The module `source` with its imported names bound. `compiled`: modules, by their last name, that are compiled as
    well: mypyc knows what comes from there, but for members of enums.
    """
    tree = ast.parse(source)
    names: set[str] = set()
    owners: set[str] = set()  # modules and classes, of which attributes are bound
    last = 0
    for i, node in enumerate(tree.body):
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            last = i + 1
            imported = {alias.asname or alias.name for alias in node.names}
            owners |= imported
            if (node.module or "").rpartition(".")[2] not in compiled and node.module not in (
                "typing",
                "collections.abc",
            ):
                names |= imported
        elif isinstance(node, ast.Import):
            last = i + 1
            owners |= {alias.asname or alias.name for alias in node.names if alias.asname or "." not in alias.name}
    binder = _Binder(names, owners)
    body = [binder.visit(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else node for node in tree.body]
    keeps = [node for node in body if isinstance(node, ast.ClassDef) and _is_value(node)]
    if not binder.bound and not keeps:
        return source
    for node in keeps:
        node.decorator_list = [ast.parse("_mypyc_attr(free_list_len=1)", mode="eval").body]
    lines = ["from typing import Final as _Final"]
    if keeps:
        lines += ["from typing import TYPE_CHECKING as _CHECKING", "if _CHECKING:", _ATTRIBUTE]
    lines += [f"{name}: _Final = {expression}" for name, expression in sorted(binder.bound.items())]
    body[last:last] = ast.parse("\n".join(lines)).body
    tree.body = body
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


class _Binder(ast.NodeTransformer):
    """Replaces uses inside functions; never in annotations, defaults, decorators, patterns or what a checker must read."""

    def __init__(self, names: set[str], owners: set[str]) -> None:
        self.bound: dict[str, str] = {}  # new name: what it stands for
        self._names = names
        self._owners = owners
        self._local: list[set[str]] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        self._local.append(_locals_of(node))
        node.body = [self.visit(statement) for statement in node.body]
        self._local.pop()
        return node

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        self._local.append({argument.arg for argument in node.args.args})
        node.body = self.visit(node.body)
        self._local.pop()
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        node.body = [self.visit(item) if isinstance(item, ast.FunctionDef) else item for item in node.body]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id in _OF_TYPES:
            return node
        return self.generic_visit(node)

    def visit_match_case(self, node: ast.match_case) -> Any:
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        return node if isinstance(node.op, ast.BitOr) else self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> Any:
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id in self._owners and self._is_global(owner.id):
            is_member = node.attr.isupper() or owner.id.islower()  # of an enum, or of a module
            if is_member and isinstance(node.ctx, ast.Load):
                return self._bind(f"{_PREFIX}{owner.id}_{node.attr}", f"{owner.id}.{node.attr}")
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> Any:
        if isinstance(node.ctx, ast.Load) and node.id in self._names and self._is_global(node.id):
            return self._bind(_PREFIX + node.id, node.id)
        return node

    def _is_global(self, name: str) -> bool:
        return bool(self._local) and not any(name in names for names in self._local)

    def _bind(self, name: str, expression: str) -> ast.Name:
        self.bound[name] = expression
        return ast.Name(name, ast.Load())


def _is_value(node: ast.ClassDef) -> bool:
    """Whether its objects are all that it says in `__slots__`."""
    if node.bases or node.keywords or node.decorator_list:
        return False
    targets = [item.targets[0] for item in node.body if isinstance(item, ast.Assign)]
    return any(isinstance(target, ast.Name) and target.id == "__slots__" for target in targets)


def _locals_of(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    found = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    found |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.MatchAs | ast.MatchStar | ast.ExceptHandler) and node.name is not None:
            found.add(node.name)
    return found
