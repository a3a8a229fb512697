"""A forward pass of the model that stands still wherever its client looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from nnatomy.core import Collector, Slot, Tap
from nnatomy.core.run import Run
from nnatomy.core.thread_state import ThreadState
from nnatomy.serve.policy import Refused
from nnatomy.standardized.pieces import keys_seen, stream_given
from nnatomy.tracing.source import SourceMode

#: What the kinds of the points of `module.source` begin with.
_SOURCE = "source "


class Points:
    """The points of a model, as frames name them: modules by number, in the order of `named_modules`."""

    def __init__(self, model: Any) -> None:
        self.root: Module = model.steps_of
        self.modules = list(model.hf_model.modules())
        self.layers = model._anatomy.layers
        self.numbers = {module: number for number, module in enumerate(self.modules)}
        self._taps = {
            (module, accessor.kind): accessor.tap
            for accessor in accessors(model).values()
            if accessor.tap is not None
            for module in accessor.modules
            if module is not None
        }

    def module(self, number: Any) -> Module:
        """The module of that number. Raises Refused if there is none, or it is the whole."""
        if type(number) is not int or not 0 < number < len(self.modules):
            raise Refused(f"the model has no module of number {number!r:.40}")
        return self.modules[number]

    def tap(self, module: Module, kind: Any) -> Tap | None:
        """What finds that kind of point in the module. Raises Refused if there is no such point."""
        if kind in ("input", "output"):
            return None
        if isinstance(kind, str) and kind.startswith(_SOURCE) and len(kind) < 200:
            if "empty" in kind:
                raise Refused("what `empty` gives is memory that somebody else has written")
            return SourceMode
        if not isinstance(kind, str) or (module, kind) not in self._taps:
            raise Refused(f"the module has no point {kind!r:.60}")
        return self._taps[module, kind]


def accessors(model: Any) -> dict[str, Any]:
    """The standard names that take a layer."""
    from nnatomy.standardized.accessors import LayerAccessor

    return {name: one for name, one in vars(model).items() if isinstance(one, LayerAccessor)}


class _Stops(Collector):
    """Has the pass stand still at one kind of point of some modules."""

    def __init__(self, run: Run, kind: str, tap: Tap | None, modules: set[Module]) -> None:
        self.modules, self.kinds = modules, {kind: tap}
        self._run = run

    def take(self, slot: Slot) -> None:
        self._run.slot = slot
        self._run.suspend()
        self._run.slot = None


class _Takes(Collector):
    """Has something done at one kind of point of some modules, and the pass goes on."""

    def __init__(self, kind: str, tap: Tap | None, modules: set[Module], take: Callable[[Slot], None]) -> None:
        self.modules, self.kinds = modules, {kind: tap}
        self._take = take

    def take(self, slot: Slot) -> None:
        self._take(slot)


class Forward:
    """One forward pass of one session.

    Args:
        call: what to run.
        most: how many bytes of what it passes by are copied until it stops.
        check: called before each layer: what it raises ends the pass.

    Attributes:
        passed: what is told of the points that it has passed by since it was last let go.
    """

    def __init__(
        self, points: Points, call: Callable[[], Any], most: int, check: Callable[[], None] = lambda: None
    ) -> None:
        self._most, self._copied, self._check = most, 0, check
        self.passed: list[tuple[dict[str, Any], Any]] = []
        self._points, self._layers = points, set(points.layers)
        self._calls: dict[Module, int] = {}
        self._run = Run(points.root, points.root, call, ThreadState())
        self._told: dict[Module, int] = {}

    def go(self, watched: Any, passing: Any) -> Slot | None:
        """Let it go on to the first of the points that are watched; None if it has ended.

        Args:
            watched: [[module, kind], ...].
            passing: others, whose values are copied, and where it does not stop.

        Raises:
            Exception: what the model has raised.
        """
        run, self.passed, self._copied = self._run, [], 0
        run.replacements = [
            *(_Stops(run, kind, tap, modules) for kind, tap, modules in self._grouped(watched)),
            *(_Takes(kind, tap, modules, self._pass_by) for kind, tap, modules in self._grouped(passing)),
            _Takes("output", None, {self._points.root}, self._note_calls),
            _Takes("input", None, self._layers, lambda _: self._check()),
        ]
        run.wait(())
        if run.error is not None:
            raise run.error
        return run.slot

    def _grouped(self, points: Any) -> list[tuple[str, Tap | None, set[Module]]]:
        if not isinstance(points, list) or len(points) > 100_000:
            raise Refused("points are a list of [module, kind]")
        found: dict[tuple[str, Tap | None], set[Module]] = {}
        for point in points:
            if not isinstance(point, list) or len(point) != 2:
                raise Refused("a point is [module, kind]")
            module = self._points.module(point[0])
            found.setdefault((point[1], self._points.tap(module, point[1])), set()).add(module)
        return [(kind, tap, modules) for (kind, tap), modules in found.items()]

    def _pass_by(self, slot: Slot) -> None:
        self._copied += sum(
            x.numel() * x.element_size() for x in pytree.tree_leaves(slot.value) if isinstance(x, Tensor)
        )
        if self._copied > self._most:
            raise Refused(f"more than {self._most:,} bytes at once: ask for less", "held_bytes")
        self.passed.append((self.told(slot), pytree.tree_map_only(Tensor, Tensor.clone, slot.value)))

    def _note_calls(self, _: Slot) -> None:
        """At the end of the pass, before they are counted anew."""
        self._calls = dict(self._run.progress.calls)

    def told(self, slot: Slot) -> dict[str, Any]:
        """Of a slot, all but the value."""
        return {
            "at": [self._points.numbers[slot.module], slot.kind, slot.call],
            "axes": None if slot.axes is None else [list(one) for one in slot.axes],
            "given": stream_given(self._run, self._points.layers),
            "keys": keys_seen(self._run, slot.module),
        }

    @property
    def slot(self) -> Slot:
        """Where it stands. Raises Refused if it does not."""
        if self._run.slot is None:
            raise Refused("the forward pass stands at no point")
        return self._run.slot

    @property
    def result(self) -> Any:
        return self._run.result

    def progress(self) -> dict[str, Any]:
        """How far it has come, since it was last told: see `nnatomy.core.progress`."""
        progress, numbers = self._run.progress, self._points.numbers
        root, ended = self._points.root, self._run.ended
        # A module that is in no place of the model (a kernel's own) has no number, and no client asks for it.
        all_calls = self._calls if ended else progress.calls
        calls = {one: count for one, count in all_calls.items() if one is not root and one in numbers}
        new = [[numbers[module], count] for module, count in calls.items() if self._told.get(module) != count]
        self._told = calls
        return {
            "calls": new,
            "stack": [
                [numbers[one], call, stage] for one, call, stage in progress.stack if one is not root and one in numbers
            ],
            "found": [[numbers[one], call, kind] for one, call, kind in progress.found if one in numbers],
        }

    def end(self) -> None:
        self._run.cancel()
        self._run.forget()
