"""Where a call stands in a source text, and what it is called there: `softmax`, and `softmax_1` for the second one in a function.

Of a torch function that is being called, the frames of the model's own that led to it tell the text and the place; the text's tree
gives the names, so that a call has the same one each time it is made.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections import Counter
from functools import lru_cache
from itertools import islice
from threading import Lock
from types import CodeType, FrameType
from typing import NamedTuple

from torch.nn import Module

from nnatomy.core.frames import frames, is_ours
from nnatomy.core.gates import is_call

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
_parsing = Lock()  # CPython 3.11 counts the depth of all threads' trees in one number: SystemError


def forward_code(module: Module) -> CodeType | None:
    """The code of a module's forward, whatever decorates it."""
    return getattr(inspect.unwrap(module.forward), "__code__", None)


def frames_from(forward: CodeType | None) -> list[FrameType]:
    """The frames of the model's own from that forward to the torch function that is being called, outermost first."""
    found: list[FrameType] = []
    for frame in frames():
        if is_call(frame):
            break
        is_forward = frame.f_code is forward
        name = frame.f_globals.get("__name__", "")
        of_torch = name.startswith("torch.") and not name.startswith("torch.nn.modules.") and not found
        if is_forward or not (of_torch or name == "torch.nn.modules.module" or is_ours(frame)):
            found.append(frame)
        if is_forward:
            break
    return found[::-1]


def call_sites(forward: CodeType | None) -> list[Site]:
    """Where that forward calls a helper, where that calls the next one, and so on to the torch function that is being called."""
    outer = frames_from(forward)
    if not outer or (forward is not None and outer[0].f_code is not forward):
        return []  # it was called by a hook, a decorator, or a module that the model does not know
    inner = [*outer[1:], None]
    return [
        _site(frame.f_code.co_filename, frame.f_code, frame.f_lasti)
        for frame, called in zip(outer, inner, strict=True)
        if called is None or called.f_code.co_name not in _COMPREHENSIONS
    ]


class Site(NamedTuple):
    """A call in the source. `place`: its file, its line, and the text of that."""

    name: str
    in_loop: bool
    place: tuple[str, int, str]


@lru_cache(maxsize=10_000)
def _site(file: str, code: CodeType, instruction: int) -> Site:
    line, end_line, column, end_column = next(islice(code.co_positions(), instruction // 2, None))
    calls = _calls("".join(linecache.getlines(file)))
    found = calls.get((line, column, end_line, end_column)) or calls.get((end_line, end_column))
    name, in_loop = found or (f"line{line}", True)  # there is no source, or no call in it (`for x in tensor`)
    return Site(name, in_loop, (file, line or 0, linecache.getline(file, line or 0).strip()))


@lru_cache(maxsize=100)
def _calls(source: str) -> dict[tuple[int | None, ...], tuple[str, bool]]:
    """The calls and operators in a source text, by where they begin and end, or a method's by where it ends."""
    found: dict[tuple[int | None, ...], tuple[str, bool]] = {}

    def walk(node: ast.AST, counts: Counter[str], in_loop: bool) -> None:
        name, mine = _name(node), counts
        if isinstance(node, _FUNCTIONS):
            # How often a lambda is called, the text does not say.
            mine, in_loop = Counter(), isinstance(node, ast.Lambda)
        for child in ast.iter_child_nodes(node):  # first: in the order of evaluation
            walk(child, mine, in_loop or isinstance(node, _LOOPS))
        if name is not None:
            assert isinstance(node, (ast.expr, ast.stmt))
            number = counts[name]
            counts[name] += 1
            entry = f"{name}_{number}" if number else name, in_loop
            found[node.lineno, node.col_offset, node.end_lineno, node.end_col_offset] = entry
            if isinstance(node, ast.Call):
                found[node.end_lineno, node.end_col_offset] = entry

    walk(parsed(source), Counter(), False)
    return found


def _name(node: ast.AST) -> str | None:
    match node:
        case ast.Call(func=ast.Attribute(attr=name)) | ast.Call(func=ast.Name(id=name)):
            return name
        case ast.Call():
            return "call"
        case ast.UnaryOp(operand=ast.Constant()) | ast.Subscript(value=ast.Attribute(attr="shape")):
            return None
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) | ast.Compare(ops=[op]) | ast.AugAssign(op=op):
            operator = _OPERATORS.get(type(op).__name__, type(op).__name__.lower())
            return f"i{operator}" if isinstance(node, ast.AugAssign) else operator
        case ast.Subscript(ctx=ctx):
            return "setitem" if isinstance(ctx, ast.Store) else "getitem"
    return None


# fmt: off
#: Those whose names in Python's module `operator` are others than in its module `ast`. (`not` is no operator of tensors.)
_OPERATORS = {
    "Mult": "mul", "MatMult": "matmul", "Div": "truediv", "USub": "neg", "UAdd": "pos", "Not": None,
    "BitAnd": "and_", "BitOr": "or_", "BitXor": "xor",
}
# fmt: on


@lru_cache(maxsize=8)
def parsed(source: str) -> ast.Module:
    """The tree of a source text: an empty one if that is no Python, which a file may be that is just being edited."""
    try:
        with _parsing:
            return ast.parse(source)
    except SyntaxError:
        return ast.Module([], [])
