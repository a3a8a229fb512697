"""A block that shares its forward pass with others: it sees its own rows of the joined batch, and waits for its turn."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.blocks.rows import FIRST, Rows, RowSlot, flatten, merge
from nnatomy.core.block import Block
from nnatomy.core.frames import hide_our_frames
from nnatomy.core.points import Collector, Question, Slot
from nnatomy.core.progress import Place
from nnatomy.core.run import Run
from nnatomy.errors import RowsError, a_kind


class Waiting(NamedTuple):
    """What a block waits for.

    Attributes:
        until: whether it has come, or will not come.
        others: what it wants of other blocks, to say so; "" if it waits for the forward pass.
        question: for which point of it; None if for its end.
    """

    until: Callable[[], bool]
    others: str = ""
    question: Question | None = None


class Batch(Collector):
    """The joined batch of all blocks of a run, and what they make of the slot where the forward pass stands.

    Attributes:
        shape: how many rows and positions the root is given in the newest step (a generation may give more rows than prompts).
        views: that slot as each block that has asked for it sees its rows.
    """

    def __init__(self, run: Run) -> None:
        self.modules = {run.root}
        self.kinds = {"input": None}
        self.shape: tuple[int, int] | None = None
        self.views: dict[SharedBlock, RowSlot] = {}
        self._run = run

    def take(self, slot: Slot) -> None:
        leaves, _ = flatten(slot.value)
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 1]
        self.shape = (shapes[0][0], shapes[0][1]) if shapes else None

    def replaced(self) -> set[int]:
        """The leaves of the slot's value in which blocks have put other rows, which are not made in it yet."""
        return {edit.leaf for view in self.views.values() for edit in view.edits if not edit.only_read}

    def merge_edits(self) -> None:
        """Make what the blocks have edited in the slot. They see it anew from here on."""
        views, self.views = self.views, {}
        slot = self._run.slot
        if slot is None:  # the forward pass has been stopped
            return
        edited = [edit for view in views.values() for edit in view.edits]
        merge(slot, views.values())
        copied = {one.leaf for one in edited} - {one.leaf for one in edited if not one.only_read}
        if slot.kind == "input" and copied:
            leaves, _ = flatten(slot.value)
            self._run.replace(_StaysAsRead(self._run, slot, [leaves[leaf] for leaf in copied]))


class SharedBlock(Block):
    """One of several blocks: the trace's own body (`Schedule`), or one of `invoke`.

    Attributes:
        batch: that of all of them.
        rows: its rows of the batch; None for all of them.
        waits: what it waits for, while it does.
    """

    def __init__(self, run: Run, batch: Batch) -> None:
        super().__init__(run)
        self.batch = batch
        self.rows: Rows | None = None
        self.waits: Waiting | None = None

    # Waiting.

    @property
    def is_ready(self) -> bool:
        """Whether it waits for nothing, or for what has come or will not come."""
        return self.waits is None or self.waits.until()

    def wait(self, question: Question | None) -> None:
        run = self.run

        def has_come() -> bool:
            return run.ended if question is None else run.place(question) is not Place.AHEAD

        self.let_others_go_on(Waiting(has_come, question=question))

    def let_others_go_on(self, waits: Waiting) -> None:
        """Let the forward pass and the other blocks go on until what this one waits for has come."""
        self.note_edits()
        self.waits = waits
        try:
            self._give_way()
        except BaseException as error:  # noqa: BLE001
            raise hide_our_frames(error)  # noqa: B904
        finally:
            self.waits = None

    def _give_way(self) -> None:
        raise NotImplementedError

    # Rows.

    def view(self, slot: Slot) -> Slot:
        batch = self.batch
        if self.rows is None:
            if batch.views:
                batch.merge_edits()
            return slot
        if self not in batch.views:
            batch.views[self] = RowSlot(slot, self._rows_at(slot), batch.replaced())
        return batch.views[self]

    def note_edits(self) -> None:
        """Whoever is at work next has to know what the block has edited of the slot that it holds."""
        view = self.batch.views.get(self)
        if view is None:
            return
        view.note_edits()
        if view.skipped:
            view.skipped = False
            # It comes before modules that are attached, and after what has been skipped before (the same call, perhaps).
            replacements = self.run.replacements
            skips = sum(isinstance(one, _ReplaceOutput) for one in replacements)
            self.run.replace(_ReplaceOutput(self, view.whole, view.instead), replacements.index(self.batch) + 1 + skips)

    def peek(self, slot: Slot) -> Slot:
        return slot if self.rows is None else RowSlot(slot, self._rows_at(slot))

    def own(self, result: Any) -> Any:
        if self.rows is None:
            return result
        rows = self.rows
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.ndim]
        if tensors:
            rows = rows.times(tensors[0].shape[0])
        if isinstance(result, Tensor) and result.ndim == 2 and not result.is_floating_point():  # tokens, generated
            rows = rows._replace(seq=result.shape[1])
        return RowSlot(Slot(self.run.root, "output", 0, 0, result), rows).value

    def _rows_at(self, slot: Slot) -> Rows:
        """Its rows as they are at that slot: how many there are, how many positions, and which axes those are."""
        assert self.rows is not None
        batch, seq = self.batch.shape or self.rows[2:4]
        rows = self.rows.times(batch)
        if not slot.step:
            return rows._replace(axes=slot.axes)
        all_anew = seq > 1  # there is no KV cache
        if slot.kind in ("input", "output"):
            return rows._replace(seq=seq, pad=rows.pad if all_anew else 0, axes=FIRST)
        if slot.axes is not None:
            axes = slot.axes if all_anew else slot.axes._replace(here=())
            return rows._replace(seq=rows.seq + slot.step, axes=axes)
        if rows.pad:
            raise RowsError(
                "In a later step of a generation nobody can tell which axes of a value inside a module hold "
                "padded positions. Read it in a block without a prompt, or give prompts of one length."
            )
        return rows._replace(seq=seq)


class _StaysAsRead(Collector):
    """Sees to it that a module does not change its inputs in place where they are copies, made for the gradients of what blocks
    have read: whoever else has the tensor that was copied would not see the change."""

    def __init__(self, run: Run, at: Slot, copies: list[Tensor]) -> None:
        self.modules = {at.module}
        self.kinds = {"output": None}
        self._run, self._at, self._copies = run, (at.call, at.step), copies
        self._versions = [copy._version for copy in copies]

    def take(self, slot: Slot) -> None:
        if (slot.call, slot.step) == self._at:
            self._run.replacements.remove(self)
            self._run.watch()
            if [copy._version for copy in self._copies] != self._versions:
                raise RowsError(
                    f"An input of {a_kind(slot.module)} was read in a block of tracer.invoke, with gradients, and is "
                    "changed in place in that module. For the gradients the model goes on with a copy, and whoever else has "
                    "the tensor would not see the change. Read it where it is made (the output of the module before), or trace "
                    "under torch.no_grad()."
                )


class _ReplaceOutput(Collector):
    """Puts a value in the place of one block's rows of a module's output: the block has skipped the module, which runs for the
    others."""

    def __init__(self, block: SharedBlock, at: Slot, value: Any) -> None:
        self.modules = {at.module}
        self.kinds = {"output": None}
        self._block, self._at, self._value = block, at, value

    def take(self, slot: Slot) -> None:
        if (slot.call, slot.step) == (self._at.call, self._at.step):
            mine = self._block.peek(slot)
            assert isinstance(mine, RowSlot)
            # Where the value has no tensor (a skipped layer gives nothing beside its hidden states), the module's own stays.
            leaves, structure = flatten(mine.value)
            both = zip(flatten(self._value)[0], leaves, strict=True)
            leaves = [new if isinstance(new, Tensor) else old for new, old in both]
            mine.value = pytree.tree_unflatten(leaves, structure)
            merge(slot, [mine])
            self._block.run.replacements.remove(self)  # the call is over: a generation makes many
            self._block.run.watch()

    def __str__(self) -> str:
        return f"skip of {type(self._at.module).__name__}"
