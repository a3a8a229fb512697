"""A plan's block as an edit: what it did is done to the values of whatever trace is open, by the standard names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.errors import PlanError, counted
from nnatomy.plans.graph import Block, Node, Of, Part, Ref, Size, mapped
from nnatomy.plans.identity import weights
from nnatomy.plans.recorder import WHOLE, memory
from nnatomy.plans.rows import Row, Rows
from nnatomy.remote.shapes import Shapes
from nnatomy.serve.limits import operations
from nnatomy.standardized.accessors import check_fits

if TYPE_CHECKING:
    from nnatomy.plans.plan import Plan

#: How many elements a function of a file's may give, and how many times those of the largest value in the block.
_ELEMENTS, _TIMES = 1 << 22, 16
_OPERATIONS = 10**13
_shapes = Shapes(5_000)
#: What was at a point before a plan changed it, and after: see `Replay.seen`.
Seen = dict[str, list[Any]]


class Replay:
    """One block of a plan, as a function for `model.edit`.

    Args:
        number: which block.
        model: a view of the model that it is to be done to.

    Attributes:
        seen: where it is a dict, it is given the values at each point that is changed, before and after.
    """

    def __init__(self, plan: Plan, number: int, model: Any) -> None:
        self.plan, self.number, self.model = plan, number, model
        self.block: Block = plan.blocks[number]
        self.seen: Seen | None = None
        self._constants: dict[tuple[str, torch.device], Tensor] = {}
        self.kept_apart: set[int] = set()
        self._weights: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        return f"<block {self.number} of a plan: {self.plan.summary(self.number)}>"

    def __call__(self) -> None:
        step = self.model._blocks.current("a plan").step
        part = self.block.part(step)
        if not (part.nodes or part.why):
            return
        rows = Rows(self.model, self.block.together)
        if step and part.why and rows.is_all:
            part = self.block.parts[0]  # without a cache every step is like the first
        if not part.nodes:
            return
        if self.plan.only is not None:
            self.plan.check_prompt(rows.ids, rows.each)
        _Pass(self, part, rows).run()

    # What the nodes mean on this model.

    def constant(self, name: str, device: torch.device) -> Tensor:
        """A constant of the plan, in the model's dtype if it was in that of the model it comes from."""
        if (name, device) not in self._constants:
            tensor = self.plan.constants[name]
            if tensor.dtype == self.plan.dtype:
                tensor = tensor.to(self.dtype)
            self._constants[name, device] = tensor.to(device)
        tensor = self._constants[name, device]
        self.kept_apart.add(memory(tensor))
        return tensor

    def weight(self, path: str) -> Tensor:
        """A parameter or buffer of the model."""
        if self._weights is None:
            self._weights = weights(self.model.hf_model)
        if path not in self._weights:
            raise PlanError(f"The plan uses a weight {path!r}, which {type(self.model.hf_model).__name__} has not.")
        self.kept_apart.add(memory(self._weights[path]))
        return self._weights[path]

    def apart(self, tensor: Tensor) -> Tensor:
        """A copy, where it shares memory with a weight, or a constant of the plan."""
        return tensor.clone() if memory(tensor) in self.kept_apart else tensor

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        dtype: torch.dtype = self.model.hf_model.dtype
        return dtype


class _Pass:
    """One part of a block, done in one step: node by node, each to all rows."""

    def __init__(self, replay: Replay, part: Part, rows: Rows) -> None:
        self._replay, self._part, self._rows = replay, part, rows
        self._model = replay.model
        #: By row, the values so far.
        self._values: list[list[Tensor]] = [[] for _ in rows.each]
        self._device = self._model.device
        self._most = max([_ELEMENTS // _TIMES, *(one.numel() for one in replay.plan.constants.values())])
        self._written = {value for node in part.nodes for value in node.writes}
        #: The points that were read, with their values.
        self._points: dict[str, Tensor] = {}

    def run(self) -> None:
        for node in self._part.nodes:
            getattr(self, f"_do_{node.kind}")(node)

    def _give(self, give: Callable[[Row, list[Tensor]], list[Tensor]]) -> None:
        """Some more values for each row."""
        for row, values in zip(self._rows.each, self._values, strict=True):
            values += give(row, values)

    def _do_constant(self, node: Node) -> None:
        number = len(self._values[0])
        tensor = self._replay.constant(node.name, self._device)
        self._give(lambda *_: [tensor.clone() if number in self._written else tensor])

    def _do_weight(self, node: Node) -> None:
        tensor = self._replay.weight(node.name)
        self._give(lambda *_: [tensor])

    def _do_chosen(self, node: Node) -> None:
        self._give(lambda row, _: [self._rows.chosen(node.args[0], row).to(self._device)])

    def _do_read(self, node: Node) -> None:
        value = self._value_at(node)
        self._replay.plan.check_sizes(node, value)
        self._device, self._most = value.device, max(self._most, value.numel())
        if self._replay.seen is not None:
            self._points[node.point] = value
            self._replay.seen.setdefault(node.point, [value.detach().clone(), None])
        self._give(lambda row, _: [self._part_of(row, node.name, value)])

    def _do_put(self, node: Node) -> None:
        old = self._value_at(node)
        rows, whole = self._rows.each, old
        for row, values in zip(rows, self._values, strict=True):
            new = self._replay.apart(values[node.args[0].value])
            if new.dtype != old.dtype and self._replay.plan.dtype != self._replay.dtype:
                new = new.to(old.dtype)
            place = row.place(node.name, old, self._rows.keys(row, node.name, old))
            check_fits(f"{node.point} of a plan", old[place], new)
            if len(rows) == 1 and row.number is None:
                whole = new
            else:
                whole = whole.clone() if whole is old else whole
                whole[place] = new
        if node.layer is None:
            setattr(self._model, node.name, whole)
        else:
            getattr(self._model, node.name)[node.layer] = whole
        if self._replay.seen is not None:
            self._replay.seen.setdefault(node.point, [old.detach().clone(), None])[1] = whole.detach().clone()

    def _do_skip(self, node: Node) -> None:
        first, last, ref = node.args
        whole: Tensor | None = None
        if ref is not None:
            whole = self._model.layers_input[first].clone()
            for row, values in zip(self._rows.each, self._values, strict=True):
                place = row.place("layers_input", whole, None)
                check_fits(f"skip_layers({first}, {last}) of a plan", whole[place], values[ref.value])
                whole[place] = values[ref.value]
        self._model.skip_layers(first, last, whole)

    def _do_op(self, node: Node) -> None:
        self._give(lambda row, values: self._one_op(node, row, values))
        if self._replay.seen is not None:
            written = {memory(values[one]) for values in self._values for one in node.writes}
            for point, value in self._points.items():
                if memory(value) in written:
                    self._replay.seen[point][1] = value.detach().clone()

    def _one_op(self, node: Node, row: Row, values: list[Tensor]) -> list[Tensor]:
        def meant(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return self._near(values[leaf.value])
            if isinstance(leaf, Size):
                return leaf.of(row.sizes)
            if isinstance(leaf, Of):
                return self._replay.dtype if leaf is Of.DTYPE else self._device
            return leaf

        args, kwargs = mapped(node.args, meant), {key: mapped(one, meant) for key, one in node.kwargs.items()}
        if any(memory(values[one]) in self._replay.kept_apart for one in node.writes):
            raise PlanError(f"{node.name} of a plan would write into a weight of the model, or a constant of the plan.")
        try:
            if self._replay.plan.from_file:
                self._check_size(node, args, kwargs)
            result = WHOLE.get(node.name, node.op)(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError, OverflowError, AttributeError) as error:
            given = ", ".join(str(tuple(one.shape)) for one in pytree.tree_leaves(args) if isinstance(one, Tensor))
            raise PlanError(f"{node.name} of a plan cannot be done to tensors of {given}: {error}") from None
        made = [] if node.gives == 0 else [one for one in pytree.tree_leaves(result) if isinstance(one, Tensor)]
        if len(made) != node.gives:
            raise PlanError(f"{node.name} of a plan gives {counted(len(made), 'tensor')}, and not {node.gives}.")
        return made

    def _near(self, tensor: Tensor) -> Tensor:
        """A constant where the values are, if these are on several devices."""
        moved = tensor.device != self._device and memory(tensor) in self._replay.kept_apart
        return tensor.to(self._device) if moved else tensor

    def _check_size(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> None:
        count = operations(
            node.name.split(".")[1], [one for one in pytree.tree_leaves(args) if isinstance(one, Tensor)]
        )
        if count > _OPERATIONS:
            raise PlanError(f"{node.name} of a plan needs {count:,} operations: it is not run.")
        try:
            made = [one for one in pytree.tree_leaves(_shapes.of(node.op, args, kwargs)) if isinstance(one, Tensor)]
        except (NotImplementedError, RuntimeError):  # its shape is not known before, or does not fit, as it will say
            return
        if (most := max((one.numel() for one in made), default=0)) > _TIMES * self._most:
            raise PlanError(
                f"{node.name} of a plan gives {most:,} elements, where the values in it have {self._most:,}: it is not run."
            )

    def _value_at(self, node: Node) -> Tensor:
        found: Any = getattr(self._model, node.name)
        value: Tensor = found if node.layer is None else found[node.layer]
        return value

    def _part_of(self, row: Row, name: str, value: Tensor) -> Tensor:
        return value if row.number is None else value[row.place(name, value, self._rows.keys(row, name, value))]
