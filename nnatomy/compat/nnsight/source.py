"""`module.source` under nnsight's names: `attn.source.attention_interface_0.output`, `self_c_proj_0`, `split_1`.

The main library's `module.source` sees torch functions, and rewrites nothing. nnsight's operations are all calls that the
source text of a forward makes, and what it assigns. To see those, the forward of a module whose `source` was asked for is
replaced by a copy that reports them, in that module alone and only while a call of it is at work in a trace. Where that cannot be
had (a forward without a source, or one that is at work already), a name means the torch function that stands there.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from threading import get_ident
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch.nn import Module
from torch.overrides import TorchFunctionMode

from nnatomy.core.points import Collector, Report, Slot, Tap
from nnatomy.core.progress import RETURNING
from nnatomy.core.values import Calls, Values
from nnatomy.errors import NoSuchModuleError
from nnatomy.tracing.source import ModuleView, Source

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
    around: Any = ast.parse(f"def around({', '.join(free)}):\n    return None")
    around.body[0].body = [definition]
    code = compile(ast.fix_missing_locations(around), function.__code__.co_filename, "exec", dont_inherit=True)
    outer = next(one for one in code.co_consts if inspect.iscode(one))
    inner = next(one for one in outer.co_consts if inspect.iscode(one) and one.co_name == function.__name__)
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


class Operations:
    """The operations of one module's forward.

    Attributes:
        of: what they are.
        bound: makes the forward that reports them, or None.
    """

    def __init__(self, module: Module) -> None:
        forward = type(module).forward
        self.of, bound = compiled(inspect.unwrap(forward))
        makes = (
            bound is not None
            and "forward" not in vars(module)
            and _decorated(forward, inspect.unwrap(forward)) is not None
        )
        self.bound = partial(_of_forward, forward, bound) if makes else None

    def tap(self, module: Module, report: Report) -> _Mode:
        """See `core.points.Tap`."""
        return _Mode(self, module, report)


def _of_forward(forward: Any, bound: Any, report: Callable[..., Any]) -> Any:
    return _decorated(forward, bound(report))


def _decorated(function: Any, new: Any) -> Any:
    """Another function, decorated as that one is; None where a decorator does not keep what it decorates in its closure."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return new
    inside = _decorated(inner, new)
    names = function.__code__.co_freevars
    cells = dict(zip(names, function.__closure__ or (), strict=True))
    mine = [name for name, cell in cells.items() if cell.cell_contents is inner]
    if inside is None or not mine:
        return None
    closure = tuple(CellType(inside) if name in mine else cells[name] for name in names)
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class _Mode(TorchFunctionMode):
    """While it is on, the module's forward is the one that reports."""

    @staticmethod
    def hint(name: str) -> str:
        """What may help where an operation has not come."""
        return f" print({name.rpartition('.source.')[0]}.source) lists them."

    def __init__(self, operations: Operations, module: Module, report: Report) -> None:
        super().__init__()
        self._operations, self._module, self._report = operations, module, report
        self._thread = get_ident()
        self._times: Counter[str] = Counter()

    def __enter__(self) -> Any:
        if self._operations.bound is not None:
            forward: Any = self._operations.bound(partial(self._reported, self._operations.of, ""))
            vars(self._module)["forward"] = MethodType(forward, self._module)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        vars(self._module).pop("forward", None)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

    def _reported(
        self, operations: tuple[Operation, ...], above: str, number: int, function: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        if get_ident() != self._thread:
            return args[0] if function is None else function(*args, **kwargs)
        report = self._report
        name = above + operations[number].name
        time = self._times[name]
        self._times[name] += 1
        if report.awaited(kind(name, time, "input")):
            slot = report((args, kwargs), kind(name, time, "input"))
            args, kwargs = slot.value
            if slot.skipped:
                return report(slot.instead, kind(name, time, "output")).value
        result = args[0] if function is None else self._with_inner(function, name)(*args, **kwargs)
        output = kind(name, time, "output")
        return report(result, output).value if report.awaited(output) else result

    def _with_inner(self, function: Any, name: str) -> Any:
        """The function, or one that reports its own operations where these are asked for."""
        inside = f"operation {name}."
        waiting = self._report.run.taps.waiting.get(self._module, ())
        if not any(waited.startswith(inside) for waited, _ in waiting) or not inspect.isfunction(function):
            return function
        operations, bound = compiled(function)
        return function if bound is None else bound(partial(self._reported, operations, f"{name}."))


def kind(name: str, time: int, what: str) -> str:
    """The kind of point that an operation's value is."""
    return f"operation {name}[{time}].{what}"


class FromTheStart(Collector):
    """Has every call of modules whose `source` has been asked for report, so that later questions find their values."""

    def __init__(self, modules: Iterable[Module], tap: Tap) -> None:
        self.modules, self.kinds = {*modules}, {"operations": tap}


class OperationsView(Values):
    """`envoy.source`: printing it lists the operations; each is an attribute."""

    def __init__(self, envoy: Any, operations: Operations) -> None:
        self._envoy, self._operations = envoy, operations
        self.path = f"{envoy.path}.source"

    def __getattr__(self, name: str) -> OperationView:
        if name.startswith("__"):
            raise AttributeError(name)
        of = self._operations.of
        found = next((one for one in of if one.call_name == name), None) or next(
            (one for one in of if one.name == name), None
        )
        if found is None:
            names = ", ".join(dict.fromkeys(one.call_name or one.name for one in of)) or "none, as there is no source"
            raise NoSuchModuleError(f"{self.path} has no operation {name!r}. It has: {names}.")
        return OperationView(self._envoy, self._operations, found.name, found.torch_name)

    def __str__(self) -> str:
        of = self._operations.of
        width = max((len(one.call_name or one.name) for one in of), default=0)
        return "\n".join(f"{one.line:5}  {one.call_name or one.name:{width}}  {one.text}" for one in of)

    def __repr__(self) -> str:
        return f"<{self.path}: print it to list its operations>"


class OperationView(Values):
    """One operation: `.input`, `.inputs` and `.output`, which can be assigned; `.skip(value)`; `.source` of what it calls."""

    def __init__(self, envoy: Any, operations: Operations, name: str, torch_name: str, time: int = 0) -> None:
        self._envoy, self._operations, self._name, self._torch_name, self._time = (
            envoy,
            operations,
            name,
            torch_name,
            time,
        )
        self.path = f"{envoy.path}.source.{name}"

    @property
    def calls(self) -> Calls[OperationView]:
        """The times that it is made in one call of the module."""
        return Calls(self.path, partial(OperationView, self._envoy, self._operations, self._name, self._torch_name))

    @property
    def source(self) -> Any:
        """The operations of what it calls, by name; they are looked for when it is called."""
        return _Inner(self)

    def skip(self, value: Any) -> None:
        """Do not make the call: `value` is what it gives."""
        self._asking("input", "skip")().skip(value)

    def _asking(self, which: str, name: str) -> Callable[[], Slot]:
        envoy, operations = self._envoy, self._operations
        block = envoy._blocks.current(self.path)
        run, module = block.run, envoy.module
        at_work = any(entered is module and stage != RETURNING for entered, _, stage in run.progress.stack)
        seen = "forward" in vars(module)
        if operations.bound is None or (
            at_work and not seen and run.slot is not None and run.slot.module is not module
        ):
            return Source(envoy, self._torch_name, self._time)._asking(which, name)
        written = f"source.{self._name}.{name}"
        tap = envoy._naming.tap
        call = envoy._naming.calls.get(block, 0)
        if call and run.root is module:  # it is called once, and the loop over calls is over those of the operation
            return ModuleView._asking(envoy, kind(self._name, call, which), written, tap)
        asked: Callable[[], Slot] = envoy._asking(kind(self._name, self._time, which), written, tap)
        return asked

    def __repr__(self) -> str:
        return f"<{self.path}>"


class _Inner:
    """`operation.source`: what is called there is not known before it is called."""

    def __init__(self, outer: OperationView) -> None:
        self._outer = outer

    def __getattr__(self, name: str) -> OperationView:
        if name.startswith("__"):
            raise AttributeError(name)
        outer = self._outer
        torch_name = name.rpartition("_")[0].rpartition("_")[2]
        return OperationView(outer._envoy, outer._operations, f"{outer._name}.{name}", torch_name)


def operations_of(envoy: Any) -> OperationsView:
    """The operations of an envoy's module, which reports them from now on."""
    known = envoy._naming.with_operations
    if envoy.module not in known:
        known[envoy.module] = Operations(envoy.module)
    return OperationsView(envoy, known[envoy.module])
