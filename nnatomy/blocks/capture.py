"""Taking the body of a `with` statement out of its frame, to run it later.

This is for `tracer.invoke` (the prompts of all blocks have to be known before the first block can run) and for lasting edits.
The body is skipped where it stands, and run later, from the same lines of the same file, with names that are looked up as the
user's frame would, and bound in it at the end. Needs the source; a block that is given as a function needs nothing of this.
"""

import __future__

import ast
import ctypes
import dis
import inspect
import linecache
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

from nnatomy.call_sites import parsed
from nnatomy.core.frames import frame_of_with
from nnatomy.errors import CaptureError


class SkipBodyError(BaseException):
    """Leaves a `with` body at once; seen by its `__exit__` alone."""


class Body:
    """The body of the `with` statement whose `__enter__` is being called.

    Attributes:
        frame: the user's.
        binds: the names that the body binds.
        outer: what the frame's names mean when the body has been skipped, among them the one after `as`.

    Raises:
        CaptureError: if the source cannot be had, or the body cannot be run anywhere else.
    """

    def __init__(self) -> None:
        self.frame = frame = frame_of_with()
        self.outer: dict[str, Any] = {}
        code = frame.f_code
        linecache.lazycache(code.co_filename, frame.f_globals)
        self._code, self.binds, self._is_empty = compiled_body(code, code.co_filename, frame.f_lasti)
        self._module_names = frame.f_globals
        # In a function, what it binds and has no place for is what it declares to be global.
        local = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
        self._globals = self.binds - local if code.co_flags & inspect.CO_OPTIMIZED else frozenset()
        self._tracing_before: tuple[Any, Any, bool] | None = None

    def skip(self) -> None:
        """Have SkipBodyError raised where the body begins; where there is nothing to skip, it may run."""
        if self._is_empty:
            return
        frame = self.frame
        self._tracing_before = sys.gettrace(), frame.f_trace, frame.f_trace_opcodes

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
        # This is last: if Ctrl-C came between it and the body, nobody would take it off again.
        frame.f_trace = step

    def left(self, error: type[BaseException] | None) -> bool:
        """The body has been left: debuggers and coverage go on. Returns whether it was by skipping it."""
        frame = self.frame
        own_globals = {name: frame.f_globals[name] for name in self._globals & frame.f_globals.keys()}
        self.outer = {**frame.f_locals, **own_globals}
        if self._tracing_before is None:
            return False
        trace, frame.f_trace, frame.f_trace_opcodes = self._tracing_before
        sys.settrace(trace)
        return error is SkipBodyError

    def run(self, names: "Names") -> None:
        """Run it with those names."""
        exec(self._code, names)

    def look_up(self, name: str) -> Any:
        """What a name that the body has not bound meant in the frame. Raises KeyError: it is a builtin, or nothing."""
        return self.outer[name] if name in self.outer else self._module_names[name]

    def bind(self, names: dict[str, Any]) -> None:
        """Give these names their values in the user's frame."""
        frame = self.frame
        frame.f_globals.update({name: value for name, value in names.items() if name in self._globals})
        frame.f_locals.update({name: value for name, value in names.items() if name not in self._globals})
        if sys.version_info < (3, 13):  # before, `f_locals` of a function is a copy
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))

    def forget(self) -> None:
        """Drop the frame, and of its names those that the body does not use; `run` and `look_up` need neither."""
        del self.frame
        self.outer = {name: self.outer[name] for name in _names_in(self._code) & self.outer.keys()}


class Names(dict[str, Any]):
    """The names of a body that runs: those that it has bound, and what `look_up` finds of the others (or raises KeyError)."""

    def __init__(self, look_up: Callable[[str], Any]) -> None:
        super().__init__()
        self.look_up = look_up

    def __missing__(self, name: str) -> Any:
        return self.look_up(name)

    def bound(self) -> dict[str, Any]:
        """What the body has bound. (What Python itself puts there, as `__builtins__`, is none of it.)"""
        return {name: value for name, value in self.items() if not re.fullmatch("__.*__", name)}


class EditBlock:
    """A `with` whose body becomes an edit.

    Args:
        with_edit: takes an edit, a function without arguments, and makes the view that has it, which `with` gives.
    """

    def __init__(self, with_edit: Callable[[Callable[[], None]], Any]) -> None:
        self._with_edit = with_edit

    def __enter__(self) -> Any:
        body = self._body = Body()
        edited = self._with_edit(lambda: body.run(Names(body.look_up)))
        body.skip()
        return edited

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool | None:  # to a type checker the body runs
        skipped = self._body.left(kind)
        self._body.forget()
        return skipped


def _names_in(code: CodeType) -> set[str]:
    inner = (_names_in(part) for part in code.co_consts if isinstance(part, CodeType))
    return {*code.co_names}.union(*inner)


@lru_cache(maxsize=1_000)
def compiled_body(code: CodeType, filename: str, instruction: int) -> tuple[CodeType, frozenset[str], bool]:
    """The body of the `with` that this instruction enters: its code, the names that it binds, and whether it does nothing.
    (Codes are equal whatever their files.)"""
    line, _, column, _ = list(code.co_positions())[instruction // 2]  # columns are in bytes, as in the tree
    where = f"{filename}:{line}"
    lines = linecache.getlines(filename)
    instead = "Give the block as a function, as in tracer.invoke(prompt, function) or model.edit(function)."
    if not lines:
        raise CaptureError(
            f"The source of the `with` block at {where} cannot be had (typed into a plain Python prompt, or passed to `exec`), so it "
            f"cannot be run later. {instead}"
        )
    for statement in ast.walk(parsed("".join(lines))):
        if isinstance(statement, ast.With):
            # Which of these the instruction's position is differs between versions of Python.
            starts: list[Any] = [statement, *(item.context_expr for item in statement.items)]
            if any((node.lineno, node.col_offset) == (line, column) for node in starts):
                break
    else:
        raise CaptureError(
            f"The `with` block at {where} is not what its source file says now. Load the "
            f"module again after editing it. {instead}"
        )
    if len(statement.items) > 1:
        raise CaptureError(f"The block at {where} has to be a `with` of its own, with nothing else in it.")
    # It is compiled as the body of a class: in a method, of the method's, as private names (`self.__scale`) have its name in
    # them; else of one called `_`, which changes no names.
    owners = ["_", *re.findall(r"(\w+)\.\w+(?=\.<locals>|$)", code.co_qualname)]
    around: Any = deepcopy(parsed(f"class {owners[-1]}: pass"))
    around.body[0].body = [_InFunction().visit(deepcopy(part)) for part in statement.body]
    postponed = code.co_flags & __future__.annotations.compiler_flag
    try:
        module = compile(around, filename, "exec", postponed, dont_inherit=True)
    except SyntaxError as error:  # return, yield, await, or a break of an outer loop
        raise CaptureError(
            f"The block of `with tracer.invoke(...)` at {where} runs later, apart from what stands around it: "
            f"{error.msg} (line {error.lineno})."
        ) from None
    body = next(constant for constant in module.co_consts if isinstance(constant, CodeType))
    stores = (i.argval for i in dis.get_instructions(body) if i.opname in ("STORE_NAME", "STORE_GLOBAL"))
    # A notebook looks for the lines around an error in the scope that the name tells.
    return body.replace(co_name="<module>"), frozenset(stores), all(map(_does_nothing, around.body[0].body))


def _does_nothing(statement: ast.stmt) -> bool:
    is_remark = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_remark or isinstance(statement, (ast.Pass, ast.Global))


class _InFunction(ast.NodeTransformer):
    """What the compiler does to code in a function: annotations of variables are not evaluated."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        new = ast.Pass() if node.value is None else ast.Assign([node.target], node.value)
        return self.generic_visit(ast.fix_missing_locations(ast.copy_location(new, node)))

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node  # which has annotations of its own
