"""Edits and gradient checkpointing.

A checkpointed part of a model runs once more in `backward`, by the model's own code: an edit made in the
forward pass is not made again there, and the gradients would silently be those of another computation.
So where gradients are recorded, an edit inside a checkpointed part is refused.
"""

from __future__ import annotations

from operator import is_

from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from nnatomy.core.frames import frames
from nnatomy.core.points import Slot, versions
from nnatomy.errors import AssignmentError


def is_recomputed() -> bool:
    """Whether the code at work will run again in `backward`."""
    return any(frame.f_globals is checkpoint.__dict__ for frame in frames())


class Unchanged:
    """What a slot holds before somebody gets it, to see whether it has been edited."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._value = slot.value
        self._leaves = pytree.tree_leaves(slot.value)
        self._versions = versions(slot.value)

    def check(self, name: str) -> None:
        """Raise AssignmentError if it has."""
        slot = self._slot
        leaves = pytree.tree_leaves(slot.value)
        same = (
            slot.value is self._value
            and len(leaves) == len(self._leaves)
            and all(map(is_, leaves, self._leaves))
        )
        if slot.skipped or not same or versions(slot.value) != self._versions:
            raise AssignmentError(
                f"{name} was changed inside a part of the model that is under gradient checkpointing: "
                "`backward` computes that part again, without the change, and would give gradients of "
                "something else. Switch checkpointing off (model.activation_checkpointing_disable(); in older "
                "releases of Transformers gradient_checkpointing_disable()), or trace under torch.no_grad()."
            )
