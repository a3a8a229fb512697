"""Views are of this process: what to save and send instead of them."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from nnatomy.errors import UsageError, a_kind


class NotPickled:
    """A view of a model, which can be copied, with the model in it or without, but not taken to another process."""

    __slots__ = ()

    def __copy__(self) -> Any:
        return _with(object.__new__(type(self)), _attributes(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        view = memo[id(self)] = object.__new__(type(self))
        return _with(view, {name: copy.deepcopy(value, memo) for name, value in _attributes(self).items()})

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise UsageError(
            f"{a_kind(self, 'A')} is a view of a model in this process, and cannot be pickled (saved, or sent to another "
            "process). Save what it is a view of: model.hf_model.save_pretrained(folder) and "
            "model.tokenizer.save_pretrained(folder); there, StandardizedTransformer(folder)."
        )


def _attributes(view: Any) -> dict[str, Any]:
    state: Any = object.__getstate__(view)
    own, slots = state if isinstance(state, tuple) else (state, None)
    return {**(own or {}), **(slots or {})}


def _with(view: Any, attributes: dict[str, Any]) -> Any:
    for name, value in attributes.items():
        object.__setattr__(view, name, value)
    return view
