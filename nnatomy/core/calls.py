"""Calls: their arguments, and which of several is meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Called = TypeVar("Called")


def first_argument(inputs: Inputs) -> Any:
    """The first positional argument, or the first keyword argument if there is none."""
    args, kwargs = inputs
    return args[0] if args else next(iter(kwargs.values()), None)


def with_first_argument(inputs: Inputs, new: Any) -> Inputs:
    """The arguments with another in the place of that one."""
    args, kwargs = inputs
    return (args, {**kwargs, next(iter(kwargs)): new}) if kwargs and not args else ((new, *args[1:]), kwargs)


class Calls(Generic[Called]):
    """What is called several times in a forward pass (or in a call of a module), by index: `view.calls[1].output`."""

    def __init__(self, name: str, of_call: Callable[[int], Called]) -> None:
        self._name = name
        self._of_call = of_call

    def __getitem__(self, call: int) -> Called:
        if call < 0:
            raise IndexError(
                f"{self._name}.calls[{call}]: how often it is called is not known beforehand, so calls count "
                "from the first, 0."
            )
        return self._of_call(call)
