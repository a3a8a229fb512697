"""The calls and assignments in the text of a function, and a copy of the function that tells of each."""

from __future__ import annotations
import __future__

import ast
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

_REPORT = "__reported__"
#: What is no call of anything, or needs the frame that it stands in.
_LEFT = ("super", "locals", "vars", "dir", "globals")


class Operation(NamedTuple):
    """A call or an assignment in the text of a function.

    Attributes:
        name: by which nnsight knows it (0.8: assignments are counted as well).
        call_name: the same, where calls alone are counted (before 0.8); "" for an assignment.
        torch_name: what the main library calls it, if a torch function is called.
        line, text: where.
    """

    name: str
    call_name: str
    torch_name: str
    line: int
    text: str


class Compiled(NamedTuple):
    """A function that reports its operations.

    Attributes:
        operations: them, in the order in which they end.
        bound: makes the function, from what is told of each call.
    """

    operations: tuple[Operation, ...]
    bound: Callable[[Callable[..., Any]], Callable[..., Any]] | None


@lru_cache(maxsize=500)
def compiled(function: Any) -> Compiled:
    """A function's operations; `bound` is None where no copy of it can be made."""
    try:
        lines, start = inspect.getsourcelines(function.__code__)
        tree: Any = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, AttributeError, SyntaxError):
        return Compiled((), None)
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return Compiled((), None)
    definition.decorator_list = []
    ast.increment_lineno(tree, start - 1)
    wrap = _Wrap(lines, start)
    definition.body = [wrap.visit(statement) for statement in definition.body]
    free = [*function.__code__.co_freevars, _REPORT]
    # In a function that has its free variables, in a class of the owner's name, as private names (`self.__scale`) have that in them.
    *_, owner = ["_", *re.findall(r"(\w+)\.\w+$", function.__qualname__)]
    around: Any = ast.parse(f"class {owner}:\n    def around({', '.join(free)}):\n        return None")
    around.body[0].body[0].body = [definition]
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    inner = compile(ast.fix_missing_locations(around), function.__code__.co_filename, "exec", flags, dont_inherit=True)
    for name in (owner, "around", function.__name__):
        inner = next(one for one in inner.co_consts if isinstance(one, CodeType) and one.co_name == name)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def bound(report: Callable[..., Any]) -> Callable[..., Any]:
        closure = tuple(CellType(report) if name == _REPORT else cells[name] for name in inner.co_freevars)
        copy = FunctionType(inner, function.__globals__, function.__name__, function.__defaults__, closure)
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy

    return Compiled(tuple(wrap.operations), bound if _REPORT in inner.co_freevars else None)


class _Wrap(ast.NodeTransformer):
    """Each call `f(x)` to `report(number, f, x)`, and each assigned value `v` to `report(number, None, v)`."""

    def __init__(self, lines: list[str], start: int) -> None:
        self.operations: list[Operation] = []
        self._lines, self._start = lines, start
        self._all, self._calls, self._torch = Counter[str](), Counter[str](), Counter[str]()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id in _LEFT:
            return node
        self.generic_visit(node)
        parts = _parts(node.func)
        name = "_".join(parts) or "call"
        plain = _parts(node.func, subscripts=False)
        torch_name = plain[-1] if plain else "call"
        names = f"{name}_{self._all[name]}", f"{name}_{self._calls[name]}", torch_name
        number = self._torch[torch_name]
        self._all[name] += 1
        self._calls[name] += 1
        self._torch[torch_name] += 1
        self._add(node, names[0], names[1], f"{torch_name}_{number}" if number else torch_name)
        return self._reported(node, node.func, node.args, node.keywords)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        node.value = self.visit(node.value)
        node.targets = [self.visit(target) for target in node.targets]
        if len(node.targets) == 1:
            node.value = self._assigned(node.targets[0], node.value)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self._assigned(node.target, self.visit(node.value))
        return node

    def _assigned(self, target: ast.expr, value: ast.expr) -> ast.expr:
        parts = [] if isinstance(target, (ast.Tuple, ast.List)) else _parts(target)
        if not parts:
            return value
        name = "_".join(parts)
        self._add(target, f"{name}_{self._all[name]}", "", "")
        self._all[name] += 1
        return self._reported(value, ast.Constant(None), [value], [])

    def _add(self, node: Any, name: str, call_name: str, torch_name: str) -> None:
        text = self._lines[node.lineno - self._start].strip()
        self.operations.append(Operation(name, call_name, torch_name, node.lineno, text))

    def _reported(self, at: ast.AST, function: ast.expr, args: list[Any], keywords: list[Any]) -> ast.expr:
        number = ast.Constant(len(self.operations) - 1)
        call = ast.Call(ast.Name(_REPORT, ast.Load()), [number, function, *args], keywords)
        return ast.copy_location(call, at)


def _parts(node: ast.expr, subscripts: bool = True) -> list[str]:
    """What a callee or a target is called: `self.a.b` is ["self", "a", "b"]; what is behind a call or an operator has no name."""
    if isinstance(node, ast.Attribute):
        return [*_parts(node.value, subscripts), node.attr]
    if isinstance(node, ast.Subscript) and subscripts:
        return _parts(node.value)
    return [node.id] if isinstance(node, ast.Name) else []


def of_forward(forward: Any, bound: Any, report: Callable[..., Any]) -> Any:
    """The forward that tells `report` of its operations, decorated as the module's own is."""
    return decorated(forward, bound(report))


def decorated(function: Any, new: Any) -> Any:
    """Another function, decorated as that one is; None where a decorator does not keep what it decorates in its closure."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return new
    inside = decorated(inner, new)
    names = function.__code__.co_freevars
    cells = dict(zip(names, function.__closure__ or (), strict=True))
    mine = [name for name, cell in cells.items() if cell.cell_contents is inner]
    if inside is None or not mine:
        return None
    closure = tuple(CellType(inside) if name in mine else cells[name] for name in names)
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
