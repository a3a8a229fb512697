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
from nnatomy.errors import NotInThisModelError, RanksError
from nnatomy.parallel.ranks import ASKS, ENDS, FAILS, Ranks
from nnatomy.parallel.split import Split


class SplitRun(Run):
    """One call of the model, of which this process runs its part. `ranks` and `split` are set before it is asked for anything."""

    ranks: Ranks
    split: Split

    def wait(self, questions: tuple[Question, ...]) -> None:
        super().wait(questions)
        if self._error is not None:
            error = self.ranks.failed(self._error[0])
            self._error = error, self._error[1]

    def arrive(self, module: Module, kind: str, call: int, value: Any, axes: Axes | None = None) -> Slot:
        if (module, kind) not in self.split.cuts:
            return super().arrive(module, kind, call, value, axes)
        slot = super().arrive(module, kind, call, self.split.whole(module, kind, value), axes)
        slot.value = self.split.own(module, kind, slot.value)
        if slot.skipped and (module, "output") in self.split.cuts:
            slot.instead = self.split.own(module, "output", slot.instead)
        return slot


class LockstepRun(SplitRun):
    """The same, where each rank has a block of its own. `device` is set, too."""

    device: torch_device
    _left = False

    def wait(self, questions: tuple[Question, ...]) -> None:
        if self.ended:
            return
        for question in questions:
            if question.kind in ("input", "output") and question.module in self.split.hidden:
                raise NotInThisModelError(
                    f"{question}: each of the {self.ranks.size} ranks has its own slice of it, and nothing says what the whole is. "
                    "Read queries, keys, values, heads_output or neurons, or what the module around it is given and gives."
                )
        if not self.started:
            self.ranks.share_randomness(self.device)
        self.slot, self.questions = None, questions
        self.watch()
        asked = ", ".join(map(str, questions)) or "the end"
        watched = [(module, kind) for module, taps in self.taps.waiting.items() for kind, _ in taps]
        for kind, modules in (("input", self.watched_inputs), ("output", self.watched_outputs)):
            watched += [one for one in self.split.cuts if one[1] == kind and one[0] in modules]
        where = sorted(f"{self.ranks.paths.get(module, '')}:{kind}" for module, kind in watched)
        try:
            self.ranks.agree(
                ASKS, f"asks for {asked}" + f" (and watches {', '.join(where)})" * bool(where), str(user_line())
            )
        except RanksError:
            self._left, self.questions = True, ()
            raise
        super().wait(questions)

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
