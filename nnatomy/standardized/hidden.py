"""The hidden states in what a module is given and gives, in whatever form that is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from nnatomy.errors import a_kind

#: The name of the argument that holds the hidden states, where they are passed by name.
_HIDDEN = "hidden_states"


def output_of(value: Any) -> Any:
    """The hidden states in what a module returned: a tensor, the first of a tuple, in a dict, ModelOutput or dataclass."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return output_of(value[0])
    return output_of(_fields(value)[_state(_fields(value))])


def with_output(value: Any, new: Any) -> Any:
    """What a module returned, with other hidden states in it."""
    if isinstance(value, Tensor) or value is None:
        return new
    if isinstance(value, tuple):
        rest = (with_output(value[0], new), *value[1:])
        return type(value)(*rest) if hasattr(value, "_fields") else rest
    if isinstance(value, list):
        return [with_output(value[0], new), *value[1:]]
    fields = _fields(value)
    name = _state(fields)
    changed = with_output(fields[name], new)
    if isinstance(value, Mapping):
        return type(value)(**{**value, name: changed})
    other = copy.copy(value)
    object.__setattr__(other, name, changed)  # it may be frozen
    return other


def input_of(value: Any) -> Any:
    """The hidden states in a module's arguments: (args, kwargs)."""
    args, kwargs = value
    place = _place(args, kwargs)
    return output_of(args[place] if isinstance(place, int) else kwargs[place])


def with_input(value: Any, new: Any) -> Any:
    """A module's arguments with other hidden states in them."""
    args, kwargs = value
    place = _place(args, kwargs)
    if isinstance(place, int):
        return (*args[:place], with_output(args[place], new), *args[place + 1 :]), kwargs
    return args, {**kwargs, place: with_output(kwargs[place], new)}


def is_closed(value: Any) -> bool:
    """Whether it is an object that pytree does not look into: a dataclass, also one in a tuple."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return dataclasses.is_dataclass(value) and not isinstance(value, Mapping)


def _place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Which argument holds them."""
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return 0
    if _HIDDEN in kwargs:
        return _HIDDEN
    return _stream([*enumerate(args), *kwargs.items()])


def _state(fields: dict[str, Any]) -> str:
    named = "last_hidden_state" if "last_hidden_state" in fields else _HIDDEN
    if isinstance(fields.get(named), Tensor):
        return named
    return str(_stream(fields.items()))


def _stream(named: Iterable[tuple[Any, Any]]) -> Any:
    """The first that has the form of a stream, or else the first."""
    every = list(named)
    return next((name for name, value in every if _is_stream(value)), every[0][0])


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _fields(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(a_kind(value))
