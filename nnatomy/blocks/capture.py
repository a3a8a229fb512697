"""Taking the body of a `with` statement out of its frame, to run it later.

This is for `tracer.invoke` alone: the prompts of all blocks have to be known before the first block can run. The body is
skipped where it stands, and run later, from the same lines of the same file, with names that are looked up as the
user's frame would, and bound in it at the end. Needs the source; `tracer.invoke(prompt, function)` needs nothing of
this.
"""

from __future__ import annotations

import ast
import ctypes
import dis
import inspect
import linecache
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from threading import Lock
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary

from nnatomy.errors import CaptureError

_parsing = Lock()  # CPython 3.11 counts the depth of all threads' trees in one number: SystemError
_NOTHING = {"RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST"}  # all there is in a body of `pass`
#: Each, by its place in the code around it, with the names that it binds, whether it makes functions, and whether it does
#: nothing. (Codes are equal whatever their files. One that is gone, as those of a notebook's cells are, is forgotten.)
_bodies: WeakKeyDictionary[CodeType, dict[tuple[str, int], tuple[CodeType, frozenset[str], bool, bool]]]
_bodies = WeakKeyDictionary()


class SkipBodyError(BaseException):
    """Leaves a `with` body at once; seen by its `__exit__` alone."""


class Body:
    """The body of the `with` statement whose `__enter__` is being called from `frame`.

    Attributes:
        binds: the names that it binds.
        makes_functions: whether it has functions of its own, which look up names when it is over.
        names: what the frame's names mean when it has been skipped, among them the one after `as`.

    Raises:
        CaptureError: if the source cannot be had, or the body cannot be run anywhere else.
    """

    def __init__(self, frame: FrameType) -> None:
        self.frame = frame
        known, key = _bodies.setdefault(frame.f_code, {}), (frame.f_code.co_filename, frame.f_lasti)
        if key not in known:
            body = _compile(frame)
            instructions = list(dis.get_instructions(body))
            binds = frozenset(i.argval for i in instructions if i.opname in ("STORE_NAME", "STORE_GLOBAL"))
            operations = {i.opname for i in instructions}
            known[key] = body, binds, "MAKE_FUNCTION" in operations, operations <= _NOTHING
        self._code, self.binds, self.makes_functions, self._is_empty = known[key]
        self._globals = _globals_of(frame.f_code, self.binds)
        self.names: dict[str, Any] = {}
        self._before: tuple[Any, Any, bool] | None = None

    def skip(self) -> None:
        """Have SkipBodyError raised where the body begins; where there is nothing to skip, it may run."""
        if self._is_empty:
            return
        frame = self.frame
        self._before = sys.gettrace(), frame.f_trace, frame.f_trace_opcodes

        def step(frame: FrameType, _event: str, _argument: Any) -> Any:
            operation = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if operation.startswith(("STORE_", "UNPACK_", "EXTENDED_ARG")):  # the name after `as`
                return step
            raise SkipBodyError

        frame.f_trace_opcodes = True
        try:
            sys.settrace(lambda *_: None)
        except BaseException:  # Ctrl-C
            self.left(None)
            raise
        frame.f_trace = (
            step  # last: between a call and the body Ctrl-C could come, with nobody to take it off
        )

    def uses(self) -> dict[str, Any]:
        """Those of the frame's names that it uses."""
        return {name: self.names[name] for name in _names_in(self._code) if name in self.names}

    def left(self, error: type[BaseException] | None) -> bool:
        """The body has been left: debuggers and coverage go on. Returns whether it was by skipping it."""
        frame = self.frame
        self.names = dict(frame.f_locals)
        self.names |= {name: frame.f_globals[name] for name in self._globals & frame.f_globals.keys()}
        if self._before is None:
            return False
        trace, frame.f_trace, frame.f_trace_opcodes = self._before
        sys.settrace(trace)
        return error is SkipBodyError

    def forget(self) -> None:
        """Drop the frame, and what its names meant; `run` needs neither."""
        del self.frame, self.names

    def run(self, names: Names) -> None:
        """Run it with those names."""
        exec(self._code, names)

    def bind(self, names: dict[str, Any]) -> None:
        """Give these names their values in the user's frame."""
        frame = self.frame
        frame.f_globals.update({name: value for name, value in names.items() if name in self._globals})
        frame.f_locals.update({name: value for name, value in names.items() if name not in self._globals})
        if sys.version_info < (3, 13):  # before, `f_locals` of a function is a copy
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


class Names(dict[str, Any]):
    """The names of one body: its own bindings, and what `look_up` finds of the others (or raises KeyError)."""

    def __init__(self, look_up: Callable[[str], Any]) -> None:
        super().__init__()
        self.look_up = look_up

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name) if name in self else self.look_up(name)

    def own(self) -> dict[str, Any]:
        """What the body has bound."""
        return {name: value for name, value in self.items() if name != "__builtins__"}


def _globals_of(code: CodeType, names: frozenset[str]) -> frozenset[str]:
    """Those of the names that are global in a function, as it declares them so."""
    if not code.co_flags & inspect.CO_OPTIMIZED:
        return frozenset()
    return names.difference(code.co_varnames, code.co_cellvars, code.co_freevars)


def _names_in(code: CodeType) -> set[str]:
    inner = (_names_in(part) for part in code.co_consts if isinstance(part, CodeType))
    return {*code.co_names}.union(*inner)


def _compile(frame: FrameType) -> CodeType:
    code, filename = frame.f_code, frame.f_code.co_filename
    where = f"{filename}:{frame.f_lineno}"
    lines = linecache.getlines(filename, frame.f_globals)
    instead = "Give the block as a function: tracer.invoke(prompt, function)."
    if not lines:
        raise CaptureError(
            f"The source of the `with tracer.invoke(...)` block at {where} cannot be had (typed into a plain "
            f"Python prompt, or passed to `exec`), so it cannot be run together with the others. {instead}"
        )
    source = "".join(lines)
    try:
        statements = [node for node in ast.walk(parsed(source)) if isinstance(node, ast.With)]
    except SyntaxError as error:
        raise CaptureError(f"The source at {where} is no Python file: {error}. {instead}") from None
    statement = _find(statements, list(code.co_positions())[frame.f_lasti // 2])
    if statement is None:
        raise CaptureError(
            f"The `with tracer.invoke(...)` block at {where} is not what its source file says now. Load the "
            f"module again after editing it. {instead}"
        )
    if len(statement.items) > 1:
        raise CaptureError(
            f"The block at {where} has to be a `with` of its own, with tracer.invoke(...) alone."
        )
    try:
        in_function = _InFunction(code.co_qualname)
        body = [in_function.visit(deepcopy(part)) for part in statement.body]
        return compile(ast.Module(body, []), filename, "exec", dont_inherit=True)
    except SyntaxError as error:  # return, yield, await, or a break of an outer loop
        raise CaptureError(
            f"The block of `with tracer.invoke(...)` at {where} runs later, apart from what stands around it: "
            f"{error.msg} (line {error.lineno})."
        ) from None


@lru_cache(maxsize=8)
def parsed(source: str) -> ast.Module:
    """The tree of a source text. Raises SyntaxError."""
    with _parsing:
        return ast.parse(source)


class _InFunction(ast.NodeTransformer):
    """What the compiler does to code in a function, or in a method: private names have the class's name in them
    (`self.__scale`), and annotations of variables are not evaluated."""

    def __init__(self, name: str) -> None:
        owners = [part.split(".") for part in name.split(".<locals>.")]
        methods = [names for names in owners if len(names) > 1]
        self._class = methods[-1][-2].lstrip("_") if methods else ""
        self._is_module = name == "<module>"

    def _mangled(self, name: str) -> str:
        private = name.startswith("__") and not name.endswith("__") and self._class
        return f"_{self._class}{name}" if private else name

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        node.attr = self._mangled(node.attr)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._mangled(node.id)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if self._is_module:
            return self.generic_visit(node)
        new = ast.Pass() if node.value is None else ast.Assign([node.target], node.value)
        return self.generic_visit(ast.fix_missing_locations(ast.copy_location(new, node)))

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node  # which has private names and annotations of its own


def _find(statements: list[ast.With], position: tuple[int | None, ...]) -> ast.With | None:
    """The one at that position, which is its own or that of its expression."""
    line, _, column, _ = position  # columns are in bytes in both
    for node in statements:
        places: list[Any] = [node, *(item.context_expr for item in node.items)]
        if any((place.lineno, place.col_offset) == (line, column) for place in places):
            return node
    return None
