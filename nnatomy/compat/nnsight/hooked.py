"""Calling a module of the user's own as a part of the forward pass: `model.layer.sae(value, hook=True)`."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from nnatomy.core.points import Collector, Slot
from nnatomy.errors import UsageError


class _Part(Module):
    """A call of a module: what it gives is what is left when all blocks have looked at that module's own output."""

    def __init__(self, part: Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(*args, **kwargs)


class _Call(Collector):
    """Makes such a call once, in the forward pass's thread, where that stands."""

    def __init__(self, run: Any, at: Slot, part: _Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.modules, self.kinds = {at.module}, {at.kind: None}
        self._run, self._at, self._call = run, at, (part, args, kwargs)

    def take(self, slot: Slot) -> None:
        if slot is self._at:
            part, args, kwargs = self._call
            self._run.collectors.remove(self)
            self._run.watch()
            part(*args, **kwargs)


def call_as_part(envoy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an envoy's module where the forward pass stands; its values, and those of what is in it, are points then.

    Raises:
        UsageError: where the forward pass stands at no value, or at one of a block with a prompt of its own.
    """
    block = envoy._blocks.current(envoy.path)
    run = block.run
    at = run.slot
    if at is None or getattr(block, "rows", None) is not None:
        raise UsageError(
            f"{envoy.path}(..., hook=True): a module is called as a part of the forward pass where that stands at a value "
            "which the whole trace holds: read one first, in a block without a prompt of its own. Or splice it in once and for "
            "all: model.attach(point, module)."
        )
    part = _Part(envoy.module)
    run.roots += [part, envoy.module]
    run.collect(_Call(run, at, part, args, kwargs))
    held = envoy._naming.held.setdefault(block, {})
    held[at.module, at.kind] = at
    return block.reach(part, "output", f"{envoy.path}.output").value
