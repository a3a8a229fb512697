"""What a model records beside its result: `output_hidden_states`, `output_attentions`, `output_router_logits`, ...

Transformers records by hooks on modules, which see what the module made. An edit comes behind them: the pass goes on with
another tensor than the one recorded. So while something is recorded, the tensors of each module are compared before and after
the edits, and what has been recorded of the old one becomes the new one: the result has the states that the pass went on with.
A pattern, or a router's logits, is edited inside of a module which then returns the old one: there, too.

A module that does not run leaves no record, so that all later ones would be taken for those of the module before: refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree
from transformers.utils import output_capturing

from nnatomy.blocks.rows import is_opaque
from nnatomy.core import Collector, Slot
from nnatomy.core.run import Run
from nnatomy.errors import InputError, a_kind
from nnatomy.standardized.keywords import PIXELS, SOUND
from nnatomy.standardized.media_kinds import KINDS, MEDIA
from nnatomy.standardized.tower import media_encoder

#: What configs may say of every call.
_OF_CONFIGS = ("output_hidden_states", "output_attentions", "output_router_logits")
#: What `generate` collects itself, of each step.
_OF_GENERATE = ("output_scores", "output_logits")
#: What is edited inside of a module that returns it, too.
_INSIDE = (
    "attention_probabilities",
    "cross_attention_probabilities",
    "encoder_attention_probabilities",
    "routers_logits",
)


def recorded_by(arguments: Mapping[str, Any], *configs: Any) -> str | None:
    """The name of the first argument, or setting of a config, by which something of each layer is recorded."""
    settings = {name: any(getattr(one, name, False) for one in configs) for name in _OF_CONFIGS}
    given = {
        name: value for name, value in arguments.items() if name.startswith("output_") and name not in _OF_GENERATE
    }
    return next((name for name, value in (settings | given).items() if value not in (None, False)), None)


def refuse_skip(what: str, by: str) -> InputError:
    """That a module which leaves a record is not run."""
    return InputError(
        f"{what}: with {by}=True the model returns a list with something of each layer that has run. It would be one short, "
        f"and all later ones would be taken for those of the layer before. Leave {by} out, and read what you need by its name."
    )


class Recorded:
    """Keeps what is recorded in one run to what the run goes on with.

    Args:
        model: the view of the model; its names are found.
    """

    def __init__(self, run: Run, model: Any) -> None:
        self._run = run
        self._model = model
        self._by, self._images = "", False
        #: By module and kind of point, the tensors there before anybody has edited them.
        self._made: dict[tuple[Module, str], list[Any]] = {}
        self._inside: list[_Inside] = []

    def look(self, arguments: Mapping[str, Any]) -> None:
        """Begin, if these arguments of the model's forward, or its config, say that something is recorded."""
        by = recorded_by(arguments, self._model.config, self._model.steps_of.config)
        if by is not None and not self._by:
            self._by = by
            accessors: list[Any] = [getattr(self._model, name) for name in _INSIDE]
            self._watch({*self._run.roots[0].modules()}, {"input": None, "output": None})
            for one in accessors:
                self._watch({*one.modules} - {None}, {one.kind: one.tap})
        elif not (self._by or self._images) and any(
            arguments.get(name) is not None for name in (*PIXELS, *SOUND, *MEDIA)
        ):
            # The layers of an encoder of images or sound are recorded, and some of the record is what the language model is given.
            self._images = True
            encoders = (media_encoder(self._model.steps_of, kind) for kind in KINDS)
            inside = {module for encoder in encoders if encoder is not None for module in encoder.modules()}
            if inside:
                self._watch(inside, {"input": None, "output": None})

    def _watch(self, modules: set[Module], kinds: dict[str, Any]) -> None:
        self._run.replace(_Before(self, modules, kinds), 0)
        self._run.collect(_After(self, modules, kinds))

    def before(self, slot: Slot) -> None:
        """A point has been reached."""
        if slot.kind != "input":
            self._made[slot.module, slot.kind] = _leaves(slot.value)

    def after(self, slot: Slot) -> None:
        """All edits there have been made."""
        module = slot.module
        if slot.kind == "input":
            if slot.skipped and _records_now() and any(map(_records, module.modules())):
                raise refuse_skip(f"skip of {a_kind(module)}", self._by or "output_hidden_states")
            return
        leaves = _leaves(slot.value)
        made = self._made.pop((module, slot.kind), leaves)
        for old, new in zip(made, leaves, strict=False):
            if old is not new and isinstance(old, Tensor) and isinstance(new, Tensor):
                found = _put(old, new)
                if slot.kind != "output":
                    self._inside.append(_Inside(module, old, new, found))
        if slot.kind == "output" and self._inside:
            slot.value = pytree.tree_map_only(Tensor, self._returned, slot.value, is_leaf=is_opaque)
            for one in [one for one in self._inside if one.module is module]:
                self._inside.remove(one)
                one.check(leaves[1:], self._by)

    def _returned(self, leaf: Tensor) -> Tensor:
        """What goes on in the place of a tensor that a module returns; also in what has been recorded of it."""
        for one in self._inside:
            if _is_same(leaf, one.old):
                one.found = True
                _put(one.old, one.new)
                return one.new.reshape(leaf.shape)
        return leaf


@dataclass(eq=False)
class _Inside:
    """An edit of a tensor inside of a module that is at work.

    Attributes:
        found: whether the old one has been seen where it is recorded or returned.
    """

    module: Module
    old: Tensor
    new: Tensor
    found: bool

    def check(self, returned: list[Any], by: str) -> None:
        """Raise InputError if the module returns, or has left in a record, what may have come of the old one."""
        newest = [record[-1] for record in _records_now() if record]
        alike = [
            one
            for one in (*returned, *newest)
            if isinstance(one, Tensor) and one.numel() == self.old.numel() and one.is_floating_point()
        ]
        if not self.found and any(not _is_same(one, self.new) for one in alike):
            raise InputError(
                f"{by}=True: what was assigned inside of {a_kind(self.module)} would not be in what the model records "
                f"of it, which is another tensor than the one that was read. Leave {by} out, and read what you need by its name."
            )


class _Before(Collector):
    def __init__(self, recorded: Recorded, modules: set[Module], kinds: dict[str, Any]) -> None:
        self.modules, self.kinds = modules, kinds
        self._recorded = recorded

    def take(self, slot: Slot) -> None:
        self._recorded.before(slot)


class _After(_Before):
    def take(self, slot: Slot) -> None:
        self._recorded.after(slot)


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=is_opaque)


def _records_now() -> list[list[Any]]:
    """What the model that is at work has recorded, in a list for each kind."""
    records = output_capturing._active_collector.get() or {}
    return [record for record in records.values() if isinstance(record, list)]


def _records(module: Module) -> bool:
    """Whether something is recorded by a hook on that module."""
    return any(getattr(hook, "__module__", "") == output_capturing.__name__ for hook in module._forward_hooks.values())


def _put(old: Tensor, new: Tensor) -> bool:
    """Put `new` where the old one is what has been recorded last; whether it was."""
    found = False
    for record in _records_now():
        if record and isinstance(record[-1], Tensor) and _is_same(record[-1], old):
            record[-1], found = new.reshape(record[-1].shape), True
    return found


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, perhaps in another shape."""
    if one is other or one.numel() != other.numel() or one.dtype != other.dtype:
        return one is other
    return bool(torch._C._is_alias_of(one, other))  # type: ignore[attr-defined]
