"""Edits and gradient checkpointing.

A checkpointed part of a model runs once more in `backward`, by the model's own code: an edit made in the
forward pass is not made again there, and the gradients would silently be those of another computation.
So where gradients are recorded, an edit inside a checkpointed part is refused.
"""

from __future__ import annotations

import sys
from operator import is_
from types import FrameType

from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from nnatomy.core.points import Slot, versions
from nnatomy.errors import AssignmentError


def is_recomputed() -> bool:
    """Whether the code at work will run again in `backward`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is checkpoint.__dict__:
            return True
        frame = frame.f_back
    return False


class Unedited:
    """What a slot holds before a block gets it, to see whether the block has edited it."""

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
