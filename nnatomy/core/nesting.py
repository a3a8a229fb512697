"""Which modules can go without a gate, because no question concerns them.

Most of a model's modules lie in layers that a block does not ask into, and a gate costs about a microsecond a
call. A module that is called once in each call of one other, its caller, is at work only while that one is. So until a
question concerns the inside of its caller it needs no gate; and when one does, it has been called as often
as its caller: once in this step, or not yet.

Which these are is seen in a whole pass with all gates on, and again after modules have been replaced.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

from torch.nn import Module

from nnatomy.core.points import Collector, Slot

#: After how many passes that were stopped before the end of a step no more are looked at.
TRIES = 3


class _Known(NamedTuple):
    """What is known of a model.

    Attributes:
        modules: all of its modules.
        pairs: a module and its caller, by their places in `modules`.
        tries: how many passes were begun to be looked at.
    """

    modules: list[ref[Module]]
    pairs: list[tuple[int, int]]
    tries: int


_known: WeakKeyDictionary[Module, _Known] = WeakKeyDictionary()


def callers_in(whole: Module, modules: list[Module]) -> dict[Module, Module] | None:
    """The caller of each of the modules that has one; None if a pass has to be looked at."""
    known = _known.get(whole)
    if known is None:
        return None
    if known.modules and [module() for module in known.modules] != modules:
        _known.pop(whole, None)
        return None
    if not known.modules and known.tries < TRIES:
        return None
    return {modules[inner]: modules[outer] for inner, outer in known.pairs}


class Observer(Collector):
    """Looks at a pass with all gates on.

    Args:
        stack: the calls in flight, outermost first.
    """

    def __init__(self, whole: Module, modules: list[Module], stack: list[tuple[Module, int]]) -> None:
        self.modules = set(modules)
        self.kinds = {"input": None}
        self._whole, self._in_order, self._stack = whole, modules, stack
        #: How often each module was called, by whom, and those of which it cannot be said who will.
        self._calls: dict[Module, int] = {}
        self._caller: dict[Module, Module] = {}
        self._others: set[Module] = set()
        known = _known.get(whole)
        _known[whole] = _Known([], [], known.tries + 1 if known else 1)

    def take(self, slot: Slot) -> None:
        module, caller = slot.module, self._stack[-2][0] if len(self._stack) > 1 else None
        self._calls[module] = self._calls.get(module, 0) + 1
        if caller is None or slot.call or self._caller.setdefault(module, caller) is not caller:
            self._others.add(module)

    def finish(self, root: Module) -> None:
        """A whole call of `root`, and perhaps more, has been seen."""
        modules, holders = self._in_order, dict[Module, Module]()
        for module in modules:
            for held in module._modules.values():
                if held is not None and holders.setdefault(held, module) is not module:
                    self._others.add(held)
        callers: dict[Module, Module] = {}
        for module, caller in self._caller.items():  # callers come first
            holder = holders.get(module)
            while holder is not None and holder not in self._calls:  # a list of modules
                holder = holders.get(holder)
            always = holder is caller and self._calls[module] == self._calls[caller]
            if always and module not in self._others and (caller is root or caller in callers):
                callers[module] = caller
        if all(caller is root for caller in callers.values()):
            callers = {}  # of which nothing is gained
        places = {module: i for i, module in enumerate(modules)}
        pairs = [(places[inner], places[outer]) for inner, outer in callers.items()]
        _known[self._whole] = _Known([ref(module) for module in modules] if pairs else [], pairs, TRIES)
