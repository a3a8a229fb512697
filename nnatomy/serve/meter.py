"""What a method that runs here whole may use: each function of PyTorch's that it calls is looked at, before and after.

The caps are those that commands have. A function that the method itself calls may give and need as much as one that a client asks
for; the model's own forward as many tokens; and what lies in memory at once, the forward's values included, is as much as a session
may hold. Between two functions the method can be stopped, and stands aside for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from threading import get_ident
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nnatomy.remote.shapes import on_meta
from nnatomy.serve.limits import Limits, Used, operations
from nnatomy.serve.policy import Refused
from nnatomy.serve.tensors import Weights

#: What draws random numbers of the process's generator, which is everybody's, unless it is given one.
_DRAWS = frozenset(
    "rand randn randint randperm normal multinomial bernoulli poisson rand_like randn_like randint_like normal_ uniform_ random_ "
    "bernoulli_ exponential_ geometric_ cauchy_ log_normal_ gumbel_softmax".split()
)
#: What gives nothing that is new.
_NOTHING_NEW = frozenset(
    "__get__ __set__ size dim numel item tolist __len__ __bool__ requires_grad_ retain_grad".split()
)
_BACKWARD = ("backward", "grad")
#: Of the functions in the model's forward those are looked at before that read a tensor of so many elements.
_LARGE = 1 << 20
#: Tensors of less bytes are not counted.
_SMALL = 4096
_PRODUCTS = {"__matmul__": "matmul", "__rmatmul__": "matmul"}

#: Elements and bytes of what functions give, by the shapes of their arguments.
_sizes: dict[Any, tuple[int, int]] = {}


class Stopped(BaseException):
    """The method is not to go on. No method catches it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class NotWholeError(Exception):
    """A method that has to run where its client is."""


class Meter(TorchFunctionMode):
    """While this is on, functions of PyTorch's are measured.

    Args:
        weights: are not counted.
        used: what the session has used so far.
        table: the weights of the model's token embeddings, by which passes are known.
        check: called before each function.
        stop: called before each gradient of a backward pass: what it raises ends the pass.

    Attributes:
        bytes: of all tensors that are alive.
    """

    def __init__(
        self,
        limits: Limits,
        weights: Weights,
        check: Callable[[], None],
        used: Used | None = None,
        table: Any = None,
        stop: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.bytes = 0
        self._limits, self._weights, self._check = limits, weights, check
        self._used, self._table, self._stop = used or Used(limits), table, stop
        self._parameters = sum(one.numel() for one in weights.numbered)
        self._main = get_ident()
        self._live: dict[int, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # most of all
            return func(*args)
        kwargs = kwargs or {}
        self._check()
        if name in _BACKWARD and self._stop is not None:
            with _stopped_by(self._stop, args[0] if args else ()):
                return func(*args, **kwargs)
        if name in _NOTHING_NEW:
            return func(*args, **kwargs)
        if name in _DRAWS and kwargs.get("generator") is None:
            raise Stopped(NotWholeError(f"{name} draws random numbers: they are drawn by its client's generator"))
        if func is F.embedding and (count := args[0].numel()) > self._limits.tokens:
            raise Stopped(Refused(f"{count:,} tokens in a forward pass; {self._limits.tokens:,} are allowed"))
        if func is F.embedding and args[1] is self._table:
            self._use(count, count * self._parameters)
        read = _tensors(args)
        if kwargs:
            read += _tensors(kwargs.values())
        if get_ident() == self._main:
            self._check_size(func, name, args, kwargs, read)
        elif any(one.numel() > _LARGE for one in read):
            self._check_held(self._predicted(func, args, kwargs, read)[1])
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._count(result)
        elif type(result) in (tuple, list):
            for one in _tensors(result):
                self._count(one)
        return result

    def _check_size(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], read: list[Tensor]) -> None:
        limits, (elements, size) = self._limits, self._predicted(func, args, kwargs, read)
        if (most := max([elements, *(one.numel() for one in read)])) > limits.elements:
            raise Stopped(Refused(f"{name}: {most:,} elements; {limits.elements:,} are allowed"))
        if size > limits.result_bytes:
            raise Stopped(Refused(f"{name}: its result has {size:,} bytes; {limits.result_bytes:,} are allowed"))
        self._check_held(size)
        count = _einsum(args) if name == "einsum" else operations(_PRODUCTS.get(name, name), read)
        if count > limits.operations:
            raise Stopped(Refused(f"{name}: {count:,} operations; {limits.operations:,} are allowed"))
        self._use(0, count)

    def _use(self, tokens: int, operations: int) -> None:
        try:
            self._used.add(tokens, operations)
        except Refused as error:
            raise Stopped(error) from None

    def _check_held(self, more: int) -> None:
        if self.bytes + more > self._limits.held_bytes:
            raise Stopped(Refused(f"the method would hold more than {self._limits.held_bytes:,} bytes at once"))

    def _predicted(self, func: Any, args: Any, kwargs: dict[str, Any], read: list[Tensor]) -> tuple[int, int]:
        """Elements and bytes of what is new in a result; zeros where only values tell, which is no more than what is read."""
        key: Any = None
        if any(isinstance(one, FakeTensor) or one.is_meta for one in read):
            return 0, 0
        try:
            key = func, *map(_key, args), *((one, _key(kwargs[one])) for one in sorted(kwargs))
            if key in _sizes:
                return _sizes[key]
        except TypeError:
            pass  # something that has no hash
        try:
            given, named = _without_elements([*args]), _without_elements(kwargs)
            with torch.no_grad():
                made = func(*given, **named) if read else func(*given, **{**named, "device": "meta"})
            before = {
                one.untyped_storage()._cdata for one in pytree.tree_leaves((given, named)) if isinstance(one, Tensor)
            }
            new = [one for one in pytree.tree_leaves(made) if isinstance(one, Tensor) and one.is_meta]
            new = [one for one in new if one.untyped_storage()._cdata not in before]
            found = max((one.numel() for one in new), default=0), sum(one.untyped_storage().nbytes() for one in new)
        except Exception:  # noqa: BLE001 - it has no shape without values, or raises in a moment what it raises now
            found = 0, 0
        if key is not None:
            if len(_sizes) > 20_000:
                _sizes.clear()
            _sizes[key] = found
        return found

    def _count(self, tensor: Tensor) -> None:
        if tensor.nbytes < _SMALL or tensor.is_meta or isinstance(tensor, FakeTensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or self._weights.share(tensor):
            return
        size = storage.nbytes()
        self._live[key] = ref(storage, partial(self._let_go, key, size))
        self.bytes += size
        self._check_held(0)

    def _let_go(self, key: int, size: int, _: Any) -> None:
        self._live.pop(key, None)
        self.bytes -= size


@contextmanager
def _stopped_by(check: Callable[[], None], outputs: Any) -> Iterator[None]:
    """Within, `check` is called before each gradient that is computed for these outputs."""
    nodes: set[Any] = {one.grad_fn for one in ([outputs] if isinstance(outputs, Tensor) else outputs)} - {None}
    new = list(nodes)
    while new:
        more: set[Any] = {node for one in new for node, _ in one.next_functions} - nodes - {None}
        nodes |= more
        new = list(more)

    def before(_: Any) -> None:
        check()

    handles = [one.register_prehook(before) for one in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(values: Any) -> list[Tensor]:
    """Those among the values, and among the values of lists."""
    found = []
    for one in values:
        if isinstance(one, Tensor):
            found.append(one)
        elif type(one) in (list, tuple):
            found += [other for other in one if isinstance(other, Tensor)]
    return found


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_key, value))
    if isinstance(value, slice):
        return "slice", _key(value.start), _key(value.stop), _key(value.step)
    return type(value), value


def _without_elements(value: Any) -> Any:
    return pytree.tree_map_only((Tensor, torch.device), on_meta, value)


def _einsum(args: Any) -> int:
    """The multiplications of `einsum("ab,bc->ac", x, y)`: one for each value of all its letters."""
    if not isinstance(args[0], str):
        return 0
    tensors = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    terms = args[0].partition("->")[0].replace(" ", "").split(",")
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, tensors, strict=False):
        before, _, behind = term.partition("...")
        rest = tensor.shape[len(before) : tensor.ndim - len(behind)] if "..." in term else ()
        sizes.update(zip(before, tensor.shape, strict=False))
        sizes.update(zip(reversed(behind), reversed(tensor.shape), strict=False))
        sizes["..."] = max(sizes.get("...", 1), prod(rest))
    return prod(sizes.values())
