"""A run of a model that is split over ranks: each goes on to the next point when all ask for the same one."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import device as torch_device
from torch.nn import Module

from nnatomy.core.coroutine import State
from nnatomy.core.frames import user_line
from nnatomy.core.points import Axes, Question, Slot
from nnatomy.core.run import Run
from nnatomy.errors import RanksError
from nnatomy.parallel.ranks import ASKS, ENDS, FAILS, Ranks


class LockstepRun(Run):
    """One call of the model, on every rank. `ranks` and `device` are set before it is asked for anything."""

    ranks: Ranks
    device: torch_device
    _left = False

    def wait(self, questions: tuple[Question, ...]) -> None:
        if self.ended:
            return
        if not self.started:
            self.ranks.share_randomness(self.device)
        self.slot, self.questions = None, questions
        self.watch()
        asked = ", ".join(map(str, questions)) or "the end"
        where = sorted(
            f"{self.ranks.paths.get(module, '')}:{kind}" for module, taps in self.taps.waiting.items() for kind, _ in taps
        )
        try:
            self.ranks.agree(ASKS, f"asks for {asked}" + f" (and watches {', '.join(where)})" * bool(where), user_line())
        except RanksError:
            self._left, self.questions = True, ()
            raise
        super().wait(questions)
        if self._error is not None:
            error = self.ranks.failed(self._error[0])
            self._error = error, self._error[1]

    def end(self) -> None:
        """The block is over here: so it has to be on all ranks."""
        self._agree_last(ENDS, "is at the block's end")

    def fail(self, error: BaseException) -> None:
        """The block has raised that on this rank: the others are told, and it goes on."""
        with suppress(RanksError):
            self._agree_last(FAILS, f"{type(error).__name__}: {error}")

    def _agree_last(self, what: int, text: str) -> None:
        if not self._left:
            self._left = True
            self.ranks.agree(what, text)

    def cancel(self) -> None:
        stood = self.state is not State.RUNNING
        super().cancel()
        if not stood:
            self.ranks.break_off("The forward pass was interrupted on this rank.")

    def arrive(self, module: Module, kind: str, call: int, value: Any, axes: Axes | None = None) -> Slot:
        if module is self.root and kind == "input" and not self.cancelled:
            self.ranks.same(value, "The prompts (or what else the model is given)")
        return super().arrive(module, kind, call, value, axes)
