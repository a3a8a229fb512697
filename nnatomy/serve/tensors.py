"""What a session holds: tensors and other objects by number, and how they stand in a frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils.generic import ModelOutput

from nnatomy.remote.wire import FrameError, decode, encode, layout_of
from nnatomy.serve.limits import Limits
from nnatomy.serve.policy import Refused
from nnatomy.standardized.offloaded import value_of


class Failed:
    """What stands in the place of a tensor whose command has failed: what is told of that, and nothing that the error holds."""

    def __init__(self, error: Exception, command: int) -> None:
        self.type, self.text, self.command = type(error).__name__, str(error)[:4000], command


class FailedBefore(Exception):  # noqa: N818
    """A command that needs a tensor whose own command has failed."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.text)
        self.failed = failed


class Weights:
    """The tensors of a model that all sessions share, and none may change.

    A client names them by negative numbers: -1 is the first. It reads them, and has nothing written into their memory, under
    whatever name or view.
    """

    def __init__(self, model: Module) -> None:
        self.named = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self.numbered = list(self.named.values())
        self._places = [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in self.named]
        held = [one for module in model.modules() for one in _inside(vars(module))]
        memory = (part_here(one).untyped_storage() for one in (*self.numbered, *held) if not one.is_meta)
        self._memory = {one.data_ptr() for one in memory if one.nbytes()}  # what has no elements is all at 0
        #: What forward passes may have changed on modules that have tensors besides parameters: tables that grow with the
        #: longest prompt, and how far they go.
        self._state = [
            (module, dict(module._buffers), {key: one for key, one in vars(module).items() if _is_plain(one)})
            for module in model.modules()
            if module._buffers or any(isinstance(one, Tensor) for one in vars(module).values())
        ]

    def put_back(self) -> None:
        """What a forward pass has changed on the modules is as it was: else one client's prompts would show in another's values."""
        for module, buffers, plain in self._state:
            if any(module._buffers.get(name) is not one for name, one in buffers.items()):
                module._buffers.update(buffers)
            for name, one in plain.items():
                if vars(module).get(name) is not one:
                    vars(module)[name] = one

    def share(self, tensor: Tensor) -> bool:
        """Whether the tensor is one of them, or lies in the memory of one."""
        if any(hasattr(one, "_is_gathered") for one in (tensor, tensor._base)):
            return True
        return part_here(tensor).untyped_storage().data_ptr() in self._memory

    def whole(self, number: int) -> Tensor:
        """The one of that number (0 is the first), a copy where it is offloaded; where each rank has a part of it, all of them:
        every rank has to ask."""
        one = self.numbered[number]
        if not (one.is_meta or isinstance(one, DTensor)):
            return one
        found: Any = one.full_tensor() if isinstance(one, DTensor) else value_of(*self._places[number])
        found._is_gathered = True
        return found


def part_here(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    here: Any = tensor.detach()
    return here.to_local() if isinstance(tensor, DTensor) else tensor


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str, Tensor))


def _inside(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors in what a module has among its attributes, other modules aside."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values() if depth else ():
            yield from _inside(one, depth - 1)
    elif isinstance(value, (list, tuple, set)):
        for one in value if depth else ():
            yield from _inside(one, depth - 1)
    elif hasattr(value, "__dict__") and not isinstance(value, (Module, type)) and depth:
        yield from _inside(vars(value), depth - 1)


class _Output:
    """What is held of what a model has returned, whose tensors have numbers of their own: its class."""

    def __init__(self, kind: type[ModelOutput]) -> None:
        self.kind = kind


class Tensors:
    """The tensors and other objects of one session.

    The client numbers what it has made (even numbers), the server what it hands out (odd ones).

    Attributes:
        bytes: of the memory that they hold.
    """

    def __init__(self, weights: Weights, limits: Limits, device: torch.device, new_cache: Callable[[], Any]) -> None:
        self.bytes = 0
        self._weights, self._limits, self._device, self._new_cache = weights, limits, device, new_cache
        self._held: dict[int, Any] = {}
        self._memory: dict[int, list[int]] = {}
        self._numbers = count(1, 2)

    def __iter__(self) -> Iterator[Tensor]:
        return (one for one in self._held.values() if isinstance(one, Tensor))

    def get(self, number: Any) -> Any:
        """What has that number. Raises Refused if nothing has, FailedBefore if its command has failed."""
        if type(number) is int and -len(self._weights.numbered) <= number < 0:
            return self._weights.whole(-number - 1)
        if type(number) is not int or number not in self._held:
            raise Refused(f"this session has nothing of the number {number!r:.40}")
        found = self._held[number]
        if isinstance(found, Failed):
            raise FailedBefore(found)
        return found

    def tensor(self, number: Any) -> Tensor:
        """The tensor of that number. Errors as `get`, and Refused if it is none."""
        found = self.get(number)
        if not isinstance(found, Tensor):
            raise Refused(f"number {number} is no tensor")
        return found

    def tensor_or_none(self, number: Any) -> Tensor | None:
        """The tensor of that number, or None if there is none."""
        found = self._held.get(number) if type(number) is int else None
        return found if isinstance(found, Tensor) else None

    def own(self, number: Any) -> Tensor:
        """The same, where it is to be changed. Raises Refused for what lies in the model's memory."""
        found = self.tensor(number)
        self.check_own(found)
        return found

    def check_own(self, tensor: Tensor) -> None:
        if self._weights.share(tensor):
            raise Refused("the model's own parameters and buffers are everybody's, and are not changed")

    def keep(self, number: Any, value: Any) -> None:
        """Give that number, one of the client's, to something."""
        if type(number) is not int or not 0 <= number < 2**53 or number % 2:
            raise Refused("a client's numbers are even, from 0 on")
        self._keep(number, value)

    def _keep(self, number: int, value: Any) -> None:
        self.drop(number)
        if len(self._held) >= self._limits.tensors:
            raise Refused(f"a session holds {self._limits.tensors:,} tensors at most: drop some", "tensors")
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            users = self._memory.setdefault(storage._cdata, [0, storage.nbytes()])
            if not users[0]:
                self.bytes += users[1]
            users[0] += 1
            if self.bytes > self._limits.held_bytes:
                self._let_go(value)
                raise Refused(f"the session would hold more than {self._limits.held_bytes:,} bytes", "held_bytes")
        self._held[number] = value

    @property
    def objects(self) -> int:
        """How many it holds that are no tensors."""
        return sum(1 for one in self._held.values() if not isinstance(one, (Tensor, Failed)))

    def check_room(self) -> None:
        """Raise Refused if KV caches and other objects hold more, with the tensors, than the session may.

        Caches grow after they have been told of.
        """
        others = [one for one in self._held.values() if not isinstance(one, (Tensor, Failed))]
        tensors = {id(one): one for other in others for one in _inside(other, 8)}
        size = sum(
            one.numel() * one.element_size()
            for one in tensors.values()
            if one.untyped_storage()._cdata not in self._memory
        )
        if self.bytes + size > self._limits.held_bytes:
            raise Refused(f"the session would hold more than {self._limits.held_bytes:,} bytes", "held_bytes")

    def drop(self, number: Any) -> None:
        """Forget what has that number."""
        value = self._held.pop(number, None) if type(number) is int else None
        if isinstance(value, Tensor):
            self._let_go(value)

    def _let_go(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        users = self._memory[key]
        users[0] -= 1
        if not users[0]:
            self.bytes -= self._memory.pop(key)[1]

    def clear(self) -> None:
        self._held.clear()
        self._memory.clear()
        self.bytes = 0

    # Values in frames.

    def read(self, value: Any, own: bool = False) -> Any:
        """What a value in a frame is.

        Args:
            own: tensors in memory of their own: the model's code may change in place what it is given, and the client
                what it holds.
        """

        copied = 0

        def copy(tensor: Tensor) -> Tensor:
            nonlocal copied
            copied += tensor.numel() * tensor.element_size()
            if copied > self._limits.result_bytes:
                raise Refused(f"copies of more than {self._limits.result_bytes:,} bytes", "result_bytes")
            return tensor.clone()

        def other(kind: str, of: Any) -> Any:
            if kind == "t":
                return copy(self.tensor(of)) if own else self.tensor(of)
            if kind == "object":
                found = self.get(of)
                if isinstance(found, Tensor):
                    raise Refused(f"number {of} is a tensor")
                return found
            if kind == "cache":
                self.keep(of, self._new_cache())
                return self.get(of)
            if kind == "output" and isinstance(of, list) and len(of) == 2:
                found = self.get(of[0])
                if isinstance(found, _Output):
                    return found.kind(**{key: self.read(one, own) for key, one in of[1]})
            raise FrameError(f"a value of no kind: {kind!r:.40}")

        return decode(value, other, self._device)

    def tell(self, value: Any) -> Any:
        """A value for a frame; its tensors and objects have numbers from now on."""
        return encode(value, self._tell_tensor, self._tell_other)

    def _number(self, value: Any) -> int:
        number = next(self._numbers)
        self._keep(number, value)
        return number

    def _tell_tensor(self, tensor: Tensor) -> Any:
        return {"t": [self._number(tensor), *layout_of(tensor)]}

    def _tell_other(self, value: Any) -> Any:
        if type(value).__name__ in ("list", "dict") or not isinstance(value, ModelOutput):
            return {"object": [self._number(value), type(value).__name__]}
        fields = [
            [key, self._tell_cache(one) if isinstance(one, DynamicCache) else self.tell(one)]
            for key, one in value.items()
        ]
        return {"output": [self._number(_Output(type(value))), type(value).__name__, fields]}

    def _tell_cache(self, cache: DynamicCache) -> Any:
        def held(layer: Any) -> Any:
            return [self.tell(layer.keys), self.tell(layer.values)] if layer.is_initialized else None

        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        layers = [held(layer) for layer in cache.layers] if plain else None
        number = next((key for key, one in self._held.items() if one is cache), None)
        return {"cache": [self._number(cache) if number is None else number, layers]}
