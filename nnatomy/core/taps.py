"""Taps: torch function modes that are on inside a module's call, where somebody waits for a value in it."""

from typing import Any

from torch.nn import Module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from nnatomy.core.points import Report, Tap
from nnatomy.core.progress import RETURNING


class Taps:
    """The taps of one run.

    Attributes:
        waiting: those that somebody waits for, by module: (kind, tap).
        modes: the modes of those that are on, outermost call first: (depth in the stack of calls, tap, mode).
    """

    def __init__(self) -> None:
        self.waiting: dict[Module, list[tuple[str, Tap]]] = {}
        self.modes: list[tuple[int, Tap, TorchFunctionMode]] = []

    def enter(self, run: Any) -> None:
        """Put on the modes of the taps that are waited for inside the calls in flight.

        A tap asked for while its module is in flight goes on top of whatever modes the model's own
        code has entered since; should that code leave one of them before the module is done, torch
        pops ours instead, and the point comes as not reached.
        """
        for depth, (entered, call, stage) in enumerate(run.progress.stack):
            for kind, tap in self.waiting.get(entered, ()) if stage != RETURNING else ():
                if not any(mode[:2] == (depth, tap) for mode in self.modes):
                    # Below the modes of deeper calls, which are left first. (While a mode handles a function, torch has taken it
                    # off the stack, and puts it back on top afterwards.)
                    deeper = [mode for mode in self.modes if mode[0] > depth]
                    on_stack = _get_current_function_mode_stack()
                    above = [_pop_mode() for mode in deeper if any(mode[2] is one for one in on_stack)]
                    mode = tap(entered, Report(run, entered, call, kind))
                    mode.__enter__()
                    for one in reversed(above):
                        _push_mode(one)
                    self.modes.insert(len(self.modes) - len(deeper), (depth, tap, mode))

    def leave(self, depth: int) -> None:
        """The call at that depth is over, or was left by an exception."""
        while self.modes and self.modes[-1][0] == depth:
            self.modes.pop()[2].__exit__(None, None, None)
