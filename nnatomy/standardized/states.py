"""What a recurrent token mixer hands from one position to the next, by position.

A chunked or fused kernel gives the state after the last position alone. So the mixer's own forward is run once more, aside, on
one position after the other, with a copy of what the call began with: the state after each position is what the model itself
keeps there, whatever the recurrence. What is put in its place is what the next position goes on from, as from another cache.

Nothing is known of a mixer but where its states are: in a cache among its arguments, on its modules, or handed in and out as a
tuple. That shows in one call, by what the call has changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import get_ident
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from nnatomy.core.gates import runs, unseen
from nnatomy.standardized.hidden import input_of, output_of
from nnatomy.standardized.kept_state import is_state, states_in

#: The way to something: names of attributes, and entries of dictionaries, lists and tuples.
Path = tuple[tuple[Literal["attribute", "entry"], Any], ...]


class Slot(NamedTuple):
    """Where a mixer keeps a tensor of its state.

    Attributes:
        carrier: what holds it: the caches among the arguments, the mixer's modules, or the arguments themselves.
        path: the way to it from there.
        back: of one that is handed in and out, the way to it from what the mixer returns.
        layer: where the tensor is of all layers, the index of this one in its last axis.
    """

    carrier: Literal["cache", "module", "argument"]
    path: Path
    back: Path = ()
    layer: int | None = None


class MixerCall:
    """One call of a mixer, to be made again. It is made when the call begins.

    Args:
        arguments: (args, kwargs).
        slots: where its states are.
        alone: whether its single steps are to have one prompt each.
        by_prefix: whether it is run on its first position, its first two, ..., and not on one after the other.
        is_first: whether it is of the first step of a pass, in which states kept on modules begin anew.

    Attributes:
        arguments: of the call; they may be set anew, as an edit of them comes later.
    """

    def __init__(
        self,
        module: Module,
        arguments: Any,
        slots: tuple[Slot, ...] = (),
        alone: bool = False,
        by_prefix: bool = False,
        is_first: bool = True,
    ) -> None:
        self.module, self.arguments, self.slots = module, arguments, slots
        self.alone, self.by_prefix = alone, by_prefix
        self._caches = _copied(states_in(arguments), slots)
        self._on_modules = dict(_on_modules(module))
        self._is_first = is_first

    @property
    def given(self) -> Any:
        """What the mixer is given of the stream."""
        return input_of(self.arguments)

    @property
    def stream(self) -> Tensor:
        """The same, which is a tensor."""
        assert isinstance(self.given, Tensor)
        return self.given

    def run(self, forced: dict[int, tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Run it on one position after the other; or, `by_prefix`, on the first, the first two, ..., with nothing forced.

        Args:
            forced: by slot, where in (batch, seq) another state is put after a position, and which. Where its entries are not
                put, their gradient counts still: the state that is there may be asked for it.

        Returns:
            What it gives, (batch, seq, hidden), and of each slot the states after each position, (batch, seq, ...).
        """
        if self.by_prefix:
            assert not forced
            parts = [self.whole(end + 1) for end in range(self.stream.shape[1])]
            after = zip(*(states for _, states in parts), strict=True)
            return torch.cat([given[:, -1:] for given, _ in parts], 1), [torch.stack(one, 1) for one in after]
        batch, forced = self.stream.shape[0], forced or {}
        if self.alone and batch > 1:
            cut = [{i: (where[r : r + 1], new[r : r + 1]) for i, (where, new) in forced.items()} for r in range(batch)]
            rows = [self._prompt(r).run(one) for r, one in enumerate(cut)]
            return torch.cat([given for given, _ in rows]), [
                torch.cat(one) for one in zip(*(kept for _, kept in rows), strict=True)
            ]
        given, kept = [], []
        with self._again() as arguments, torch._C.DisableTorchFunction():
            for t in range(self.stream.shape[1]):
                now = self._part(arguments, slice(t, t + 1))
                returned = self.module(*now["args"], **now["kwargs"])
                states = [read(slot, self.module, now, returned) for slot in self.slots]
                for i, (where, values) in forced.items():
                    there = where[:, t].reshape(-1, *[1] * (states[i].ndim - 1))
                    states[i] = torch.where(there, values[:, t], states[i] + (values[:, t] - values[:, t].detach()))
                for slot, state in zip(self.slots, states, strict=True):
                    put(slot, self.module, arguments, state.clone())
                given.append(output_of(returned))
                kept.append(states)
        return torch.cat(given, 1), [torch.stack(one, 1) for one in zip(*kept, strict=True)]

    def whole(self, end: int, mode: AbstractContextManager[Any] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Run it on its first `end` positions at once, under that mode: what it gives, and the states then."""
        with self._again() as arguments, mode or torch._C.DisableTorchFunction():
            now = self._part(arguments, slice(end))
            returned = self.module(*now["args"], **now["kwargs"])
            return output_of(returned), [read(slot, self.module, now, returned) for slot in self.slots]

    def find(self, returned: Any, layers: int) -> tuple[Slot, ...]:
        """Where the states are, as the call has ended with that; `layers`: how many the model has."""
        found = []
        states = states_in(self.arguments)
        before = dict(_tensors_in(self._caches))
        for path, tensor in _tensors_in(states):
            old = before.get(path)
            if tensor.is_floating_point() and (old is None or not torch.equal(old, tensor)):
                is_of_all = isinstance(states[path[0][1]], list)
                layer = _one_layer(old, tensor, layers) if is_of_all else None
                if layer is not None or not is_of_all:
                    found.append(Slot("cache", path, layer=layer))
        for path, held in _on_modules(self.module):
            if isinstance(held, Tensor) and held is not self._on_modules.get(path):
                found.append(Slot("module", path))
        return tuple(found) or self._handed(returned)

    def _handed(self, returned: Any) -> tuple[Slot, ...]:
        """A tuple of tensors that is among the arguments and, with the same shapes, among what is returned."""
        for back, after in _tuples(returned):
            for path, before in _tuples({"args": tuple(self.arguments[0]), "kwargs": self.arguments[1]}):
                if [one.shape for one in before] == [one.shape for one in after]:
                    ways: list[Path] = [(("entry", i),) for i in range(len(after))]
                    return tuple(Slot("argument", path + way, back + way) for way in ways)
        return ()

    def _prompt(self, row: int) -> MixerCall:
        """The call of one prompt alone: of whatever has as many entries in its first axis as there are prompts."""
        batch = self.stream.shape[0]

        def cut(leaf: Any) -> Any:
            return leaf[row : row + 1] if isinstance(leaf, Tensor) and leaf.shape[:1] == (batch,) else leaf

        one = copy.copy(self)
        one.arguments = pytree.tree_map(cut, self.arguments, is_leaf=is_state)
        one._caches = copy.deepcopy(self._caches, {id(tensor): cut(tensor) for _, tensor in _tensors_in(self._caches)})
        one._on_modules = {path: cut(tensor) for path, tensor in self._on_modules.items()}
        return one

    def empty_cache(self) -> tuple[str, Any] | None:
        """The cache as this call was given it, with nothing in it, and the keyword it comes by; None where it is no such argument."""
        names = [name for name, value in self.arguments[1].items() if is_state(value)]
        if len(names) != 1 or len(self._caches) != 1 or any(slot.carrier != "cache" for slot in self.slots):
            return None
        memo = {id(tensor): tensor.new_empty(0) for _, tensor in _tensors_in(self._caches)}
        return names[0], copy.deepcopy(self._caches[0], memo)

    @contextmanager
    def _again(self) -> Iterator[Any]:
        """Within, it can be called with these arguments; no trace sees it, and nothing is left of it."""
        caches = iter(_copied(self._caches, self.slots))
        arguments = pytree.tree_map_only(is_state, lambda _: next(caches), self.arguments, is_leaf=is_state)
        with ExitStack() as stack:
            stack.callback(_restore, self.module, dict(_on_modules(self.module)))
            if self.module.training:  # dropout
                stack.enter_context(torch.random.fork_rng())
            if runs.get(get_ident()) is not None:
                stack.enter_context(unseen())
            if torch.is_grad_enabled():  # a step may write into what the one before has saved for its gradient
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_copy, _as_it_is))
            began = (
                dict.fromkeys(slot.path for slot in self.slots if slot.carrier == "module") if self._is_first else {}
            )
            _restore(self.module, self._on_modules | began)
            yield {"args": tuple(arguments[0]), "kwargs": dict(arguments[1])}

    def _part(self, arguments: Any, here: slice) -> Any:
        """The arguments of some positions: what has as many entries in its second (or only) axis is cut."""
        seq = self.stream.shape[1]

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:
                return leaf
            if leaf.ndim == 1:
                return leaf[here] if leaf.shape[0] == seq else leaf
            return leaf[:, here] if leaf.shape[1] == seq else leaf

        now = pytree.tree_map(cut, arguments, is_leaf=is_state)
        for slot in self.slots:
            if slot.carrier == "argument":
                _with(now, slot.path, _follow(arguments, slot.path))
        return now


def with_cache(arguments: Any, empty: tuple[str, Any] | None) -> Any:
    """The arguments, with an empty cache where they have none and could have one."""
    if empty is None or states_in(arguments) or arguments[1].get(empty[0]) is not None:
        return arguments
    return arguments[0], {**arguments[1], empty[0]: copy.deepcopy(empty[1])}


def read(slot: Slot, module: Module, arguments: Any, returned: Any) -> Tensor:
    """A state, as a call has left it."""
    if slot.carrier == "argument":
        tensor = _follow(returned, slot.back)
    else:
        tensor = _follow(states_in(arguments) if slot.carrier == "cache" else module, slot.path)
    return (tensor if slot.layer is None else tensor[..., slot.layer]).clone()


def is_kept(slot: Slot, module: Module, arguments: Any, returned: Any) -> bool:
    """Whether a call has left one there."""
    try:
        return isinstance(read(slot, module, arguments, returned), Tensor)
    except (AttributeError, IndexError, KeyError, TypeError):
        return False


def put(slot: Slot, module: Module, arguments: Any, state: Tensor) -> None:
    """Put a state where the next call is given it."""
    root = states_in(arguments) if slot.carrier == "cache" else module if slot.carrier == "module" else arguments
    if slot.layer is not None:
        whole = _follow(root, slot.path).clone()
        whole[..., slot.layer] = state
        state = whole
    _with(root, slot.path, state)


def put_back(slot: Slot, returned: Any, state: Tensor) -> Any:
    """What a mixer returns, with another state in it."""
    return _with(returned, slot.back, state) if slot.carrier == "argument" else returned


def _follow(value: Any, path: Path) -> Any:
    for kind, key in path:
        value = getattr(value, key) if kind == "attribute" else value[key]
    return value


def _with(value: Any, path: Path, new: Any) -> Any:
    """The same, with `new` at the end of that way; what is no tuple is changed in place."""
    if not path:
        return new
    (kind, key), rest = path[0], path[1:]
    if kind == "attribute":
        setattr(value, key, _with(getattr(value, key), rest, new))
        return value
    inner = _with(value[key], rest, new)
    if isinstance(value, tuple):
        return (*value[:key], inner, *value[key + 1 :])
    value[key] = inner
    return value


def _tensors_in(value: Any, path: Path = (), seen: frozenset[int] = frozenset()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in caches of any class, each with the way to it."""
    if isinstance(value, Tensor):
        yield path, value
    if isinstance(value, (Tensor, Module, type)) or callable(value) or id(value) in seen:
        return
    seen = seen | {id(value)}
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _tensors_in(one, (*path, ("entry", key)), seen)
    elif isinstance(value, (list, tuple)):
        for i, one in enumerate(value):
            yield from _tensors_in(one, (*path, ("entry", i)), seen)
    elif hasattr(value, "__dict__"):
        for name, one in vars(value).items():
            yield from _tensors_in(one, (*path, ("attribute", name)), seen)


def _tuples(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The tuples and lists of nothing but tensors."""
    if isinstance(value, (tuple, list)) and len(value) > 1 and all(isinstance(one, Tensor) for one in value):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, one in enumerate(value):
            yield from _tuples(one, (*path, ("entry", i)))
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _tuples(one, (*path, ("entry", key)))


def _copied(states: list[Any], slots: tuple[Slot, ...]) -> list[Any]:
    """Caches, to be changed alone: the tensors of these slots are copied (without any, all), the others are the same ones."""
    own = {slot.path for slot in slots if slot.carrier == "cache"}
    memo: dict[int, Any] = {}
    for path, tensor in _tensors_in(states):
        if id(tensor) not in memo or path in own:
            memo[id(tensor)] = tensor.clone() if not slots or path in own else tensor
    copied: list[Any] = copy.deepcopy(states, memo)
    return copied


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _on_modules(module: Module) -> Iterator[tuple[Path, Tensor | None]]:
    """The tensors that its modules hold beside parameters and buffers, and what holds none now."""
    for name, inside in module.named_modules():
        way: Path = tuple(("attribute", part) for part in name.split(".") if part)
        for key, value in vars(inside).items():
            if value is None or isinstance(value, Tensor):
                yield (*way, ("attribute", key)), value


def _restore(module: Module, held: dict[Path, Tensor | None]) -> None:
    for path, value in held.items():
        if _follow(module, path) is not value:
            _with(module, path, value)


def _one_layer(before: Tensor | None, after: Tensor, layers: int) -> int | None:
    """Where a tensor is of all layers, one in each index of its last axis: the one that has changed."""
    if before is None or after.shape[-1] != layers:
        return None
    changed = (before != after).flatten(0, -2).any(0).nonzero().flatten().tolist()
    return int(changed[0]) if len(changed) == 1 else None
