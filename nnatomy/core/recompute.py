"""Edits and gradient checkpointing.

A checkpointed part of a model runs once more in `backward`, by the model's own code: an edit made in the
forward pass is not made again there, and the gradients would silently be those of another computation.
So where gradients are recorded, an edit inside a checkpointed part is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_

from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from nnatomy.core.frames import frames
from nnatomy.core.points import Slot, versions
from nnatomy.errors import AssignmentError


def is_recomputed() -> bool:
    """Whether the code at work will run again in `backward`."""
    return any(frame.f_globals is checkpoint.__dict__ for frame in frames())


@contextmanager
def unchanged(slot: Slot, who: object) -> Iterator[None]:
    """Within, `who` may look at the slot. Raises AssignmentError at the end if it has edited it."""
    value, leaves, before = slot.value, pytree.tree_leaves(slot.value), versions(slot.value)
    yield
    now = pytree.tree_leaves(slot.value)
    same = slot.value is value and len(now) == len(leaves) and all(map(is_, now, leaves))
    if slot.skipped or not same or versions(slot.value) != before:
        raise AssignmentError(
            f"{who} was changed inside a part of the model that is under gradient checkpointing: "
            "`backward` computes that part again, without the change, and would give gradients of "
            "something else. Switch checkpointing off (model.activation_checkpointing_disable(); in older "
            "releases of Transformers gradient_checkpointing_disable()), or trace under torch.no_grad()."
        )
