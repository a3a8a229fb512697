"""What a model keeps from one pass to the next: KV caches, recurrent states, of any class.

Nothing is known of these classes but that they are Python: objects, dictionaries, lists and tuples, with tensors in them. So
what a pass (or one layer) has done to them is seen by looking before and after, and can be taken back or made unusable.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

#: Layers of a cache that put a new tensor in the place of the old one, and never write into it.
_REPLACING = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)


def states_in(arguments: Any) -> list[Any]:
    """The caches and states among the arguments of a call, also in dictionaries, lists and tuples."""
    return [leaf for leaf in pytree.tree_leaves(arguments, is_leaf=is_state) if is_state(leaf)]


def is_state(value: Any) -> bool:
    """Whether it is a cache or a state."""
    if isinstance(value, list):  # RWKV's
        return bool(value) and all(isinstance(one, Tensor) for one in value)
    return isinstance(value, Cache) or "Cache" in type(value).__name__


def copies_of_states(arguments: Any) -> Any:
    """The arguments, with a copy in the place of each cache or state."""
    return pytree.tree_map_only(is_state, copy.deepcopy, arguments, is_leaf=is_state)


class Kept:
    """What some states held when this was made.

    Args:
        states: caches, or whatever else holds tensors.
        copied: whether to copy the tensors that may be written into, so that they can be put back.
    """

    def __init__(self, states: list[Any], copied: bool) -> None:
        self._states = states
        holders = list(_holders(states))
        self._entries = [(holder, holder.copy()) for holder, _ in holders if not isinstance(holder, tuple)]
        # Held, so that no other tensor gets the identity of one of them.
        self._tensors = {id(tensor): tensor for holder, _ in holders for tensor in _tensors_of(holder)}
        self._versions = {key: _version(tensor) for key, tensor in self._tensors.items()}
        self._copies: dict[int, Tensor] = {}
        for holder, replaces in holders:
            shared = any(holder is state for state in states)  # its tensors are of all layers
            for tensor in _tensors_of(holder):
                if (copied and not replaces) or shared or _version(tensor) is None:
                    self._copies[id(tensor)] = tensor.detach().clone()

    def restore(self) -> None:
        """Put back what they held."""
        for holder, entries in self._entries:
            if isinstance(holder, list):
                holder[:] = entries
            else:
                holder.clear()
                holder.update(entries)
        for key, before in self._copies.items():
            if self._has_changed(key):
                with torch.no_grad():
                    self._tensors[key].detach_().copy_(before)  # with no history of the pass that is taken back

    def spoil(self) -> None:
        """Make no numbers of what has been written since, so that whatever is computed of it shows that."""
        for holder, _ in list(_holders(self._states)):
            for name, tensor in _items(holder):
                if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                    continue
                if id(tensor) in self._tensors and not self._has_changed(id(tensor)):
                    continue
                if id(tensor) not in self._tensors and not isinstance(holder, tuple):
                    holder[name] = torch.full_like(tensor, torch.nan)  # the pass may go on with the other
                    continue
                before = self._copies.get(id(tensor))
                with torch.no_grad():
                    if before is None:
                        tensor.fill_(torch.nan)
                    else:
                        tensor.masked_fill_(tensor != before, torch.nan)

    def _has_changed(self, key: int) -> bool:
        before = self._versions[key]
        if before is None:
            return not torch.equal(self._tensors[key], self._copies[key])
        return _version(self._tensors[key]) != before


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _holders(states: list[Any]) -> Iterator[tuple[Any, bool]]:
    """Whatever holds something in these objects, each with whether what it holds is replaced and never written into."""
    seen: set[int] = set()
    found: list[tuple[Any, bool]] = [(state, False) for state in states]
    for value, replaces in found:
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (dict, list, tuple)):
            yield value, replaces
            found += [(one, replaces) for _, one in _items(value) if _may_hold(one)]
        elif hasattr(value, "__dict__"):
            found.append((value.__dict__, type(value) in _REPLACING))


def _may_hold(value: Any) -> bool:
    if isinstance(value, Tensor):
        return is_traceable_wrapper_subclass(value)  # quantized: its scales, in its attributes
    return not isinstance(value, (Module, type, torch.device, torch.dtype)) and not callable(value)


def _items(holder: Any) -> list[tuple[Any, Any]]:
    return list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))


def _tensors_of(holder: Any) -> Iterator[Tensor]:
    return (one for _, one in _items(holder) if isinstance(one, Tensor))


def undone_unless_it_returns(call: Callable[[], Any], arguments: Any) -> Callable[[], Any]:
    """The call; if it raises, or is cancelled, the states among its arguments are as they were before."""
    if not (states := states_in(arguments)):
        return call

    def whole() -> Any:
        before = Kept(states, copied=True)
        try:
            return call()
        except BaseException:
            before.restore()
            raise

    return whole
