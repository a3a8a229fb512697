"""A user's own modules at points of a model: sparse autoencoders, probes, adapters.

An attached module is called by the forward pass itself, in its thread, so that its inner values are points like any other and
autograd and the optimizer see it as they see the model. It lives on the view: the model carries nothing of it.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.random import fork_rng
from torch.utils import _pytree as pytree

from nnatomy.core.gates import unseen
from nnatomy.core.points import Collector, Slot, Tap, described
from nnatomy.errors import AssignmentError, UsageError, a_kind


class Point(NamedTuple):
    """Where a module can be attached: a point, and the tensor in its value.

    Attributes:
        get: from the point's value to the tensor.
        put: from the value and another tensor to the value with that.
    """

    name: str
    module: Module
    kind: str
    get: Callable[[Any], Tensor]
    put: Callable[[Any, Tensor], Any]
    tap: Tap | None = None

    def is_at(self, slot: Slot) -> bool:
        """Whether that slot is the point, in some call and step."""
        return slot.module is self.module and slot.kind == self.kind


class Attachment(Collector):
    """A module at a point of another. One of a view's lasting edits.

    Attributes:
        name: what the view calls it.
        module: the attached module.
    """

    def __init__(self, name: str, point: Point, takes: Point, module: Module, how: str) -> None:
        if not isinstance(module, Module):
            raise UsageError(f"attach(point, module): it takes a torch.nn.Module; got {described(module)}.")
        if how not in ("replace", "error", "add", "read"):
            raise UsageError(f"how={how!r}: it is 'replace', 'error', 'add' or 'read'.")
        self.name, self.module, self.how = name, module, how
        self.modules = {point.module, takes.module}
        self.kinds = {point.kind: point.tap, takes.kind: takes.tap}
        self.point, self.takes_point = point, takes
        self._taken: dict[int, Tensor] = {}  # what it is given in which step, until it is called

    def for_run(self) -> "Attachment":
        """The same for one run, which it keeps a value of."""
        return copy.copy(self)

    def take(self, slot: Slot) -> None:
        point, takes = self.point, self.takes_point
        if takes.is_at(slot):
            self._taken = {slot.step: self._tensor(takes, slot)}
        if not point.is_at(slot):
            return
        x, given = self._taken.pop(slot.step, None), self._tensor(point, slot)
        if x is None:
            raise UsageError(f"{self}: the forward pass comes to {point.name} before {takes.name}.")
        x = self._as_parameters(x)
        if self.how == "error":
            # With the same dropout as below.
            with unseen(), torch.no_grad(), fork_rng([x.device] if x.is_cuda else [], enabled=self.module.training):
                error = x - self.module(x)
        try:
            result = self.module(x)
        except RuntimeError as failure:
            failure.add_note(f"That is in {self}, which was given a tensor {described(x)}.")
            raise
        if self.how == "read":
            return
        if not isinstance(result, Tensor) or result.shape != given.shape:
            raise AssignmentError(
                f"{self}: {point.name} is {described(given)}; what the module returned is {described(result)}. For a "
                "module whose output is not to go on through the model, attach it with how='read'."
            )
        if self.how == "error":
            result = result + error
        result = result.to(given.device, given.dtype)
        slot.value = point.put(slot.value, given + result if self.how == "add" else result)

    def _as_parameters(self, x: Tensor) -> Tensor:
        """On the device of the module's parameters, and of their dtype, if it is none of theirs."""
        mine = [p for p in self.module.parameters() if p.is_floating_point()]
        dtypes = dict.fromkeys(p.dtype for p in mine)
        if not mine or x.dtype in dtypes:
            return x.to(mine[0].device) if mine else x
        if len(dtypes) > 1:
            raise UsageError(
                f"{self}: its parameters are of several dtypes ({', '.join(map(str, dtypes))}), and {self.takes_point.name} is "
                f"{x.dtype}: nobody can tell which it takes. Convert the module to one dtype, or the values in its forward."
            )
        return x.to(mine[0].device, mine[0].dtype)

    def _tensor(self, point: Point, slot: Slot) -> Tensor:
        value = point.get(slot.value)
        if not isinstance(value, Tensor):
            raise UsageError(f"{self}: there is no tensor at {point.name}, but {a_kind(value)}.")
        return value

    def __repr__(self) -> str:
        return f"<{self.name}: {type(self.module).__name__} at {self.point.name}, how={self.how!r}>"


def first_tensor(value: Any) -> Any:
    """The first tensor in a point's value."""
    return next((leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)), None)


def with_first_tensor(value: Any, new: Tensor) -> Any:
    """The value with another first tensor."""
    leaves, structure = pytree.tree_flatten(value)
    leaves[next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))] = new
    return pytree.tree_unflatten(leaves, structure)
