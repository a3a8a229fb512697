"""One run of a block, watched: which points it reads and puts, and each function of their values.

A dispatch mode of the block's thread sees the functions (the model runs in another thread, and is not seen); a function mode
keeps those whole that PyTorch would take apart, and sees how values leave the tensors. What is made
without any tensor is a constant, should the block use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nnatomy.core.frames import frames, is_ours
from nnatomy.errors import PlanError
from nnatomy.names import row_of as any_row
from nnatomy.plans.graph import GIVEN, Node, Ref, alive, function, row_of
from nnatomy.plans.identity import weights
from nnatomy.serve.policy import GIVE_VALUES, Refused
from nnatomy.standardized.positions import is_fake, is_one
from nnatomy.standardized.watched import watcher

_MATMUL = torch.ops.aten.matmul.default
_OF_TENSOR: Any = Tensor
#: What PyTorch takes apart in a way that depends on shapes and on who needs a gradient, and how it is called in a replay.
WHOLE: dict[str, Any] = {
    "aten.matmul.default": torch.matmul,
    "aten.linear.default": F.linear,
    "aten.rms_norm.default": torch.rms_norm,
}
_WHOLE_OPS: dict[Any, Any] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _MATMUL),
    F.linear: torch.ops.aten.linear.default,
    torch.rms_norm: torch.ops.aten.rms_norm.default,
}
#: What looks at a tensor for people, and is no part of what is done.
_SHOWS = (Tensor.__repr__, Tensor.__format__)
_LEAVES = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr)


def line() -> str:
    """The innermost line that is neither ours nor torch's."""
    frame = _frame()
    return "?" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _frame() -> FrameType | None:
    theirs = ("torch.", "contextlib", "einops.", "threading")
    names = ((frame, frame.f_globals.get("__name__", "")) for frame in frames() if not is_ours(frame))
    return next((frame for frame, name in names if not name.startswith(theirs)), None)


def memory(tensor: Tensor) -> int:
    """What is the same for tensors that share memory. (Those without elements share none.)"""
    changes = getattr(tensor, "_changes", None)  # of a remote one
    if changes is not None:
        return id(changes)
    with torch._C.DisableTorchFunction():
        storage = tensor.untyped_storage()
        return int(storage._cdata if is_fake(tensor) else storage.data_ptr()) or id(tensor)


class Recorder:
    """What a block does, from when it is opened on.

    Args:
        model: the view whose trace is open.
        any_prompt: whether what is true for this prompt alone is an error at once.

    Attributes:
        nodes: what it has done so far.
        constants: by the number of their value, as they were when the block first used them.
        only: why it is true for this prompt alone; "" if nothing has shown that.
        steps: how many steps have to be seen to know what it does.
    """

    def __init__(self, model: Any, block: Any, any_prompt: bool) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[int, Tensor] = {}
        self.only = ""
        self.steps = 0
        self._model, self._block, self._any_prompt = model, block, any_prompt
        self._paused = 0
        self._values: list[Tensor] = []
        self._roots: list[int] = []
        self._known: dict[int, int] = {}
        self._of_prompt: set[int] = set()  # values that depend on what the model was given
        self._random: dict[int, tuple[Tensor, str]] = {}
        self._point_roots: set[int] = set()
        self._put_roots: set[int] = set()
        self._here = 0
        self._paths = {id(one): path for path, one in reversed(weights(model.hf_model).items())}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within, it sees what is done."""
        before = watcher.set(self)
        try:
            with _Functions(self), _Dispatch(self):
                yield
        finally:
            watcher.reset(before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = watcher.set(None)
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            watcher.reset(before)

    @property
    def is_paused(self) -> bool:
        return self._paused > 0

    def done(self) -> list[Node]:
        """What has an effect of it. Raises PlanError for what cannot be in a plan."""
        found = alive(self.nodes, self._roots)
        refused = [node for node in found if node.refused]
        for node in sorted(refused, key=lambda one: one.refused != _RANDOM):
            raise PlanError(f"{node.line}: {node.refused}")
        return found

    # What the names tell: see `Watcher`.

    def read(self, of: Any, name: str, layer: int | None, value: Any) -> None:
        self._check(of, name)
        layer = None if layer is None else index(layer)
        node = self._add(Node("read", name, layer, sizes=self._sizes(name, value)), (value,))
        self._of_prompt.add(node)
        if name not in GIVEN:
            self._here = self._roots[node]
            self._point_roots.add(self._here)

    def put(self, of: Any, name: str, layer: int | None, value: Any) -> None:
        self._check(of, name)
        layer = None if layer is None else index(layer)
        self._add(Node("put", name, layer, [Ref(self._value(value))], gives=0, sizes=self._sizes(name, value)))
        self._put_roots.add(memory(value))

    def skip(self, model: Any, layers: tuple[int, int], skip_with: Any) -> None:
        given = None if skip_with is None else Ref(self._value(skip_with))
        self._add(Node("skip", args=[*map(index, layers), given], gives=0))
        with self.paused():
            model.skip_layers(*layers, skip_with)

    def chosen(self, own: Any, where: Any) -> Any:
        with self.paused():
            found = own.chosen(where)
        if isinstance(where, slice):
            where = slice(*(None if one is None else index(one) for one in (where.start, where.stop)))
        elif where is not None:
            where = index(where) if is_one(where) else [index(one) for one in where]
        self._of_prompt.add(self._add(Node("chosen", args=[where]), (found,)))
        return found

    def asked_step(self, step: int) -> None:
        self.steps = max(self.steps, step + 2)

    def refuse(self, why: str) -> None:
        raise PlanError(f"{line()}: {why}.")

    def _check(self, of: Any, name: str) -> None:
        if of is not self._model._blocks or of.current(name) is not self._block:
            self.refuse(
                f"{name} is read in a trace of its own within the block: trace before, and use what that has given"
            )
        if row_of(name) is None:
            self.refuse(f"a plan has no {name}: of encoder-decoders and their encoders no plans are made yet")

    def _sizes(self, name: str, value: Tensor) -> dict[str, int]:
        axes = any_row(name).axes
        fixed = dict(zip(axes, value.shape, strict=True)) if len(axes) == value.ndim else {}
        return {axis: size for axis, size in fixed.items() if axis not in ("batch", "seq", "query", "key")}

    # What the modes tell.

    def op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Any = None) -> Any:
        """A function is to be done."""
        call = call or func
        given = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        draws = torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func._schema.name
        base = func._schema.name.removeprefix("aten::")
        name = f"aten.{base}.{func._schema.overload_name or 'default'}"
        if not any(id(one) in self._known for one in given) and (draws or not given or _why_not(name)):
            result = call(*args, **kwargs)
            if self._any_prompt and draws:
                for one in pytree.tree_leaves(result):
                    if isinstance(one, Tensor):
                        self._random[id(one)] = one, line()
            return result
        of_prompt = any(self._known.get(id(one)) in self._of_prompt for one in given)
        if of_prompt and (why := _decided(func, base, args)):
            self.stop(f"{why} is decided by what the model has computed of this prompt")
        if base in GIVE_VALUES or (base == "copy_" and _is_same(*args[:2])):
            return call(*args, **kwargs)
        name = name.replace("empty", "zeros") if base in ("empty_like", "new_empty") else name
        node = Node("op", name, line=line(), refused=_RANDOM if draws else _why_not(name))
        if node.refused and not self._any_prompt:
            return call(*args, **kwargs)  # what it gives is a constant of that prompt
        encoded = pytree.tree_map(lambda one: Ref(self._value(one)) if isinstance(one, Tensor) else one, (args, kwargs))
        node.args, node.kwargs = list(encoded[0]), encoded[1]
        targets = [] if node.refused else node.writes
        for target in targets:
            self._check_write(target)
        result = call(*args, **kwargs)
        made = [] if targets else [one for one in pytree.tree_leaves(result) if isinstance(one, Tensor)]
        node.gives = len(made)
        first = self._add(node, tuple(made))
        if of_prompt:
            self._of_prompt.update((*range(first, first + len(made)), *targets))
        return result

    def stop(self, why: str) -> None:
        """It is true for this prompt alone."""
        if self._any_prompt:
            raise PlanError(
                f"{line()}: {why}, so that a plan of it would be true for this prompt alone. Write it with functions of tensors "
                "(torch.where, masks), or record(..., any_prompt=False) for a plan for this prompt."
            )
        self.only = self.only or f"{line()}: {why}"

    def _check_write(self, target: int) -> None:
        root = self._roots[target]
        if root in self._put_roots:
            self.refuse("a tensor is changed in place after it has been assigned: assign it last")
        if root in self._point_roots and root != self._here:
            self.refuse(
                "a value is changed in place after the block has gone on to another: change it before, or assign it"
            )

    # Values.

    def _add(self, node: Node, given: tuple[Tensor, ...] = ()) -> int:
        """The number of its first value."""
        node.line = node.line or line()
        if node.line == "?" and self.nodes:  # in another thread, for the line before
            node.line = self.nodes[-1].line
        self.nodes.append(node)
        first = len(self._values)
        for one in given:
            self._known[id(one)] = len(self._values)
            self._values.append(one)
            self._roots.append(memory(one))
        return first

    def _value(self, tensor: Tensor) -> int:
        """The number of a tensor; a constant if it is none of those known."""
        known = self._known.get(id(tensor))
        if known is not None:
            return known
        if self._any_prompt and memory(tensor) in {self._roots[one] for one in self._of_prompt}:
            self.refuse(
                "a tensor shares memory with a value of the model's in a way that is not seen: read it by its name"
            )
        if id(tensor) in self._paths:
            return self._add(Node("weight", self._paths[id(tensor)]), (tensor,))
        node = Node("constant", _name_of(tensor), refused=_RANDOM if id(tensor) in self._random else "")
        if node.refused:
            node.line = self._random[id(tensor)][1]
        number = self._add(node, (tensor,))
        node.args = [number]  # which constant; a name later
        self.constants[number] = tensor.detach().clone()
        return number


_RANDOM = "a random number is drawn in the block, which would be another each time: draw it before, for a constant of the plan."


def _name_of(tensor: Tensor) -> str:
    """What the user's innermost function calls it; "" if it has no name."""
    frame = _frame()
    names = {} if frame is None else {**frame.f_globals, **frame.f_locals}
    return next((name for name, one in names.items() if one is tensor and _is_good(name)), "")


def _is_good(name: str) -> bool:
    return name.isidentifier() and len(name) < 40 and name[0] != "_"


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether they are the very same elements: `h[:, -1] += v` ends with a copy of such."""
    if getattr(one, "_changes", None) is not None:  # of a remote one nobody can tell
        return False
    with torch._C.DisableTorchFunction():
        same = one.data_ptr() == other.data_ptr() and one.dtype == other.dtype
    return same and one.shape == other.shape and one.stride() == other.stride()


def _why_not(name: str) -> str:
    try:
        function(name)
    except Refused as error:
        return f"a plan cannot have {error}."
    return ""


def _decided(func: Any, base: str, args: tuple[Any, ...]) -> str:
    """What is decided by values: a number that leaves the tensors, or a size."""
    if base in GIVE_VALUES:
        return "a number or a yes and no (item, bool, equal)"
    masks = [one for one in pytree.tree_leaves(args[1:]) if isinstance(one, Tensor) and one.dtype == torch.bool]
    if torch.Tag.dynamic_output_shape in func.tags and (base != "index" or masks):
        return f"a size (of {base})"
    return ""


class _Dispatch(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._recorder.is_paused:
            return func(*args, **(kwargs or {}))
        return self._recorder.op(func, tuple(args), dict(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, kwargs = self._recorder, dict(kwargs or {})
        if recorder.is_paused:
            return func(*args, **kwargs)
        if func in _SHOWS:
            with recorder.paused():
                return func(*args, **kwargs)
        if func is _OF_TENSOR.data.__get__:
            return args[0].detach()
        known = recorder._known.get(id(args[0])) if args else None
        if func in _LEAVES and known in recorder._of_prompt:
            recorder.stop(f"{func.__name__} takes what the model has computed of this prompt out of its tensors")
        op = _WHOLE_OPS.get(func)
        if op is None or kwargs.keys() - {one.name for one in op._schema.arguments}:
            return func(*args, **kwargs)

        def whole(*args: Any, **kwargs: Any) -> Any:
            with recorder.paused():
                return func(*args, **kwargs)

        return recorder.op(op, tuple(args), kwargs, whole)
