"""One of the several blocks on one forward pass, and its rows of the joined batch."""

from __future__ import annotations

from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from nnatomy.core.block import Block
from nnatomy.core.blocks.rows import Rows, RowSlot, is_opaque
from nnatomy.core.frames import user_line
from nnatomy.core.points import Collector, Slot, Want
from nnatomy.core.threads.interrupts import Interruptible
from nnatomy.core.threads.worker import Job, Worker
from nnatomy.errors import RowsError

if TYPE_CHECKING:
    from nnatomy.core.blocks.ensemble import Ensemble
    from nnatomy.core.blocks.invoke import Invoke

#: What a block waits for that wants the forward pass to run to its end.
END = "end"


class Member(Block):
    """One of several blocks.

    Attributes:
        rows: its rows of the joined batch; None for all of them.
        want: the point it waits for.
        looked_at: after how many moves of the forward pass it was seen that the point has not come.
        waits_for: the name that it waits for another block to bind, and where it does so.
    """

    alone = False

    def __init__(self, ensemble: Ensemble, lasting: bool = False) -> None:
        super().__init__(ensemble.run)
        self.ensemble = ensemble
        self.line = user_line()
        self.rows: Rows | None = None
        self.want: Want | None = None
        self.looked_at = -1
        self.waits_for: tuple[str, Invoke, str] | None = None
        self.at_barrier = False
        self.done = False
        #: Whether it stays in the background: the trace does not wait for its end.
        self.lasting = lasting
        self.failure: BaseException | None = None
        self.thread = 0
        self.at_work = Interruptible()
        self.job: Job | None = None
        self._begin = Lock()  # taken by its thread when it begins, or else by `keep_from_beginning`
        self.alarm = Lock()  # released to have it look whose turn it is
        self.alarm.acquire()
        self._view: tuple[Slot, RowSlot] | None = None

    def wait(self, want: Want | None) -> None:
        self.want, self.looked_at = want or Want(self.run.root, END, 0, 0, None, "the result"), -1
        self.halt()

    def halt(self) -> None:
        """Let all others go on until what this block waits for has come."""
        self.settle()
        self.ensemble.give_way(self)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def wake(self) -> None:
        """Have it look whose turn it is."""
        if self.job is not None:
            job, self.job = self.job, None
            Worker.start(job, computes=False)
        else:
            with suppress(RuntimeError):  # somebody has done so already
                self.alarm.release()

    def begin(self) -> bool:
        """Called by its thread: whether it may."""
        return self._begin.acquire(blocking=False)

    def keep_from_beginning(self) -> bool:
        """If it has not begun, it never will. Returns whether that is so."""
        kept = self._begin.acquire(blocking=False)
        self.done = self.done or kept
        return kept

    def view(self, slot: Slot) -> Slot:
        if self.rows is None:
            slot.fresh = ()
            return slot
        if self._view is None or self._view[0] is not slot:
            self.settle()
            self._view = slot, self._row_slot(slot)
        return self._view[1]

    def peek(self, slot: Slot) -> Slot:
        return slot if self.rows is None else self._row_slot(slot)

    def own(self, result: Any) -> Any:
        if self.rows is None:
            return result
        rows = self.rows
        first = next(
            (leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.ndim), None
        )
        if first is not None:
            rows = rows.times(first.shape[0])
        if (
            isinstance(result, Tensor) and result.ndim == 2 and not result.is_floating_point()
        ):  # generated tokens
            rows = rows._replace(seq=result.shape[1])
        return RowSlot(Slot(self.run.root, "output", 0, 0, result), rows, None).value

    def _row_slot(self, slot: Slot) -> RowSlot:
        assert self.rows is not None
        return RowSlot(slot, self._rows_at(slot), lambda value: self._replace(slot, value))

    def _rows_at(self, slot: Slot) -> Rows:
        assert self.rows is not None
        rows, (batch, seq) = self.rows, self.ensemble.given.shape or self.rows[2:4]
        rows = rows.times(batch)
        if not slot.step:
            return rows if slot.axes is None else rows._replace(axes=(*slot.axes.here, *slot.axes.so_far))
        all_anew = seq > 1  # there is no KV cache
        if slot.kind in ("input", "output"):
            return rows._replace(seq=seq, pad=rows.pad if all_anew else 0, axes=(1,))
        if slot.axes is not None:
            axes = (*slot.axes.here, *slot.axes.so_far) if all_anew else slot.axes.so_far
            return rows._replace(seq=rows.seq + slot.step, axes=axes)
        if rows.pad:
            raise RowsError(
                "In a later step of a generation nobody can tell which axes of a value inside a module hold "
                "padded positions. Read it in a block without a prompt, or give prompts of one length."
            )
        return rows._replace(seq=seq)

    def settle(self) -> None:
        """The block is through with the slot it held."""
        if self._view is not None:
            self._view[1].settle()
            self._view = None

    def _replace(self, slot: Slot, value: Any) -> None:
        # Before modules that are attached, after what has been skipped before (the same call, perhaps).
        first = sum(isinstance(one, _ReplaceOutput) for one in self.run.replacements)
        self.run.replacements.insert(first, _ReplaceOutput(self, slot, value))
        self.run.watch()


class _ReplaceOutput(Collector):
    """Puts a value in the place of one block's rows of a module's output."""

    def __init__(self, member: Member, at: Slot, value: Any) -> None:
        self.modules = {at.module}
        self.kinds = {"output": None}
        self._member, self._at, self._value = member, at, value

    def take(self, slot: Slot) -> None:
        if (slot.call, slot.step) == (self._at.call, self._at.step):
            mine = self._member._row_slot(slot)
            now, structure = pytree.tree_flatten(mine.value, is_leaf=is_opaque)
            new = pytree.tree_leaves(self._value, is_leaf=is_opaque)
            # What a skipped layer gives beside its hidden states is nothing.
            merged = [
                there if isinstance(there, Tensor) else here for here, there in zip(now, new, strict=True)
            ]
            mine.value = pytree.tree_unflatten(merged, structure)

    def __str__(self) -> str:
        return f"skip of {type(self._at.module).__name__}"


class Given(Collector):
    """How many rows and positions the root is given in the newest step (a generation may give more rows than prompts)."""

    def __init__(self, root: Module) -> None:
        self.modules = {root}
        self.kinds = {"input": None}
        self.shape: tuple[int, int] | None = None

    def take(self, slot: Slot) -> None:
        leaves = pytree.tree_leaves(slot.value, is_leaf=is_opaque)
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 1]
        self.shape = (shapes[0][0], shapes[0][1]) if shapes else None
