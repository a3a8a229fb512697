"""The values of a call: its arguments, what it returns, and which of several calls is meant."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from nnatomy.core.points import Slot, described
from nnatomy.errors import AssignmentError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Called = TypeVar("Called")


class Values:
    """The values of one call, of a module or of a function inside one. Each can be read, and assigned."""

    __slots__ = ()

    path: str

    def _asking(self, kind: str, name: str) -> Callable[[], Slot]:
        """`Block.reach` for one of these values, which the user calls `name`; for the property to call, so that a traceback
        has not this frame as well."""
        raise NotImplementedError

    @property
    def output(self) -> Any:
        """What the call returns (a tensor, a tuple, ...), of a module after its forward hooks.

        Assigning puts another value in its place.

        Raises:
            OutsideTraceError: if no trace of the model is open here.
            OutOfOrderError: if the forward pass is already past this point.
            NotReachedError: if the forward pass ends without making the call.
        """
        return self._asking("output", "output")().value

    @output.setter
    def output(self, value: Any) -> None:
        self._asking("output", "output")().value = value

    @property
    def inputs(self) -> Inputs:
        """The arguments of the call: (args, kwargs). Assigning replaces both. Errors as `output`."""
        return self._asking("input", "inputs")().value

    @inputs.setter
    def inputs(self, value: Any) -> None:
        two = isinstance(value, (tuple, list)) and len(value) == 2
        if not (two and isinstance(value[0], (tuple, list)) and isinstance(value[1], Mapping)):
            raise AssignmentError(
                f"{self.path}.inputs is all that the module is called with: assign (args, kwargs), a tuple and a dict; got "
                f"{described(value)}."
            )
        self._asking("input", "inputs")().value = tuple(value[0]), dict(value[1])

    @property
    def input(self) -> Any:
        """The first positional argument of the call, or its first keyword argument if there is none.

        Assigning replaces that argument. Errors as `output`.
        """
        args, kwargs = self._asking("input", "input")().value
        return args[0] if args else next(iter(kwargs.values()), None)

    @input.setter
    def input(self, value: Any) -> None:
        slot = self._asking("input", "input")()
        args, kwargs = slot.value
        if kwargs and not args:
            slot.value = args, {**kwargs, next(iter(kwargs)): value}
        else:
            slot.value = (value, *args[1:]), kwargs


class Calls(Generic[Called]):
    """What is called several times in a forward pass (or in a call of a module), by index: `view.calls[1].output`."""

    def __init__(self, name: str, of_call: Callable[[int], Called]) -> None:
        self._name = name
        self._of_call = of_call

    def __getitem__(self, call: int) -> Called:
        if call < 0:
            raise IndexError(
                f"{self._name}.calls[{call}]: calls count from the first, 0; how many there will be is not known."
            )
        return self._of_call(call)
