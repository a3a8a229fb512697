"""`module.source` under nnsight's names: `attn.source.attention_interface_0.output`, `self_c_proj_0`, `split_1`.

The main library's `module.source` sees torch functions, and rewrites nothing. nnsight's operations are all calls that the
source text of a forward makes, and what it assigns. To see those, the forward of a module whose `source` was asked for is
replaced by a copy that reports them, in that module alone and only while a call of it is at work in a trace. Where that cannot be
had (a forward without a source, or one that is at work already), a name means the torch function that stands there.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from threading import get_ident
from types import MethodType
from typing import Any

from torch.nn import Module
from torch.overrides import TorchFunctionMode

from nnatomy.compat.nnsight.rewriting import Operation, compiled, decorated, of_forward
from nnatomy.core.points import Collector, Report, Slot, Tap
from nnatomy.core.progress import RETURNING
from nnatomy.core.values import Calls, Values
from nnatomy.errors import NoSuchModuleError
from nnatomy.tracing.source import ModuleView, Source


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
            and decorated(forward, inspect.unwrap(forward)) is not None
        )
        self.bound = partial(of_forward, forward, bound) if makes else None

    def tap(self, module: Module, report: Report) -> _Mode:
        """See `core.points.Tap`."""
        return _Mode(self, module, report)


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
