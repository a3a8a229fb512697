"""Accessors: one standard name on every layer, `model.layers_output[i]`. `nnatomy.names` has the table of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex, overload

from torch import Tensor
from torch.nn import Module

from nnatomy.blocks.rows import RowSlot
from nnatomy.core import Collector, Slot, Tap
from nnatomy.core.block import Block
from nnatomy.core.frames import hide_our_frames
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Question
from nnatomy.core.progress import Place
from nnatomy.core.run import Run
from nnatomy.errors import (
    AssignmentError,
    LayerIndexError,
    NotInThisModelError,
    NotReachedError,
    OutOfOrderError,
    RowsError,
    UsageError,
    a_kind,
    counted,
)
from nnatomy.names import UNREACHED, Name
from nnatomy.standardized.hidden import input_of, is_closed, output_of, with_input, with_output
from nnatomy.standardized.pickling import NotPickled
from nnatomy.standardized.pieces import Extent, piece_error
from nnatomy.standardized.prompt_trace import RootInputs
from nnatomy.standardized.watched import watcher
from nnatomy.tracing.attach import Point
from nnatomy.whole_number import whole_number

#: How hidden states are got from a point's value, and put there. (What a tap shows is the tensor itself.)
_TENSOR_IN: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "input": (input_of, with_input),
    "output": (output_of, with_output),
}


#: What is said where a slice is asked for behind another: no order of the two will do.
_READ = 'Where that is a slice as well, read both at once: model.read("layers_output", "attention_probabilities").'


class _Described:
    """`__doc__` of a class whose objects each have a text of their own, which `help(model.layers_output)` shows."""

    def __init__(self, of_class: str | None) -> None:
        self.of_class = of_class

    def __get__(self, accessor: LayerAccessor | None, _: type[LayerAccessor]) -> str | None:
        return self.of_class if accessor is None else accessor.described()


class LayerAccessor(NotPickled):
    """A standard name: `accessor[i]` reads it on layer `i`, `accessor[i] = x` puts `x` in its place.

    `i` may be negative. A slice reads several at once, as a list, without stopping the forward pass at
    each; values must then be asked for before the first of these layers has run. Assigning to a slice
    takes one tensor a layer. What is assigned must have the shape, dtype and device of what it replaces.

    Raises:
        LayerIndexError: for a layer that the model does not have.
        NotInThisModelError: for a layer that has no such thing, or computes it in pieces; the text says what it has.
        AssignmentError: for a tensor that does not fit.
        OutsideTraceError, OutOfOrderError, NotReachedError: see `ModuleView.output`.
    """

    def __init__(
        self,
        row: Name,
        modules: Sequence[Module | None],
        blocks: OpenBlocks,
        *,
        tap: Tap | None = None,
        absent: Sequence[str] = (),
        none: str = "the model has no layers",
        layers: Iterable[Module] = (),
    ) -> None:
        self.row = row
        self.name = row.name
        self.modules = tuple(modules)
        self.call = 0  #: which call of the module in a step
        self.kind = row.kind
        self.tap = tap
        self.get, self.put = _TENSOR_IN.get(row.kind, (lambda value: value, lambda _, new: new))
        #: The modules whose value the model itself changes in place later on (Falcon adds the attention's
        #: output into the MLP's). None: not known, so any may be.
        self.changed_later: set[Module] | None = None if tap is None else set()
        self._blocks = blocks
        self._absent = tuple(absent) or ("",) * len(self.modules)
        self._unreached = UNREACHED.get(row.place, "")
        self._none = none
        self._extent = Extent.of(row)
        self._layers = frozenset(layers)

    def described(self) -> str:
        """What it is, of which shape, and on which layers: what `help` says."""
        layers = [layer for layer, module in enumerate(self.modules) if module is not None]
        if layers:
            there = f"The layers are 0 to {len(self) - 1}"
            there += f"; of these {', '.join(map(str, layers))} have it." if len(layers) < len(self) else "."
        else:
            there = f"This model has none: {'; '.join(self.refusals()) or self._none}."
        return (
            f"`{self.name}[layer]`: {self.row.doc}{', of the encoder' * self.of_encoder}.\n\n"
            f"A tensor of ({', '.join(self.row.axes)}), read inside `with model.trace(prompts):`"
            f"{', where it can be assigned' * self.row.assignable}. A slice gives a list.\n\n{there}\n"
        )

    def __repr__(self) -> str:
        return f"<{self.name}[layer]: ({', '.join(self.row.axes)}). {self.row.doc}>"

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, layer: SupportsIndex) -> Tensor: ...

    @overload
    def __getitem__(self, layer: slice) -> list[Tensor]: ...

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return self._read_many(range(len(self))[layer])
        slot = self._reach(layer)
        if self._may_change(slot.module):
            self._part_from_model(slot)
        value = self.get(slot.value)
        if (one := watcher.get()) is not None:
            one.read(self._blocks, self.name, layer, value)
        return value

    @overload
    def __setitem__(self, layer: SupportsIndex, value: Tensor) -> None: ...

    @overload
    def __setitem__(self, layer: slice, value: Sequence[Tensor] | Tensor) -> None: ...

    def __setitem__(self, layer: Any, value: Any) -> None:
        if isinstance(layer, slice):
            for i, one in one_for_each(self.name, layer, len(self), value):
                self[i] = one
            return
        slot = self._reach(layer)
        check_fits(f"{self.name}[{layer}]", self.get(slot.value), value)
        if (one := watcher.get()) is not None:
            one.put(self._blocks, self.name, layer, value)
        slot.value = self.put(slot.value, value.clone() if self._may_change(slot.module) else value)

    if not TYPE_CHECKING:  # to type checkers it is nothing that can be called

        def __call__(self, *layers: Any) -> NoReturn:
            """Raise UsageError: a layer stands in square brackets."""
            raise UsageError(
                f"{self.name}(...): a layer stands in square brackets, {self.name}[{', '.join(map(str, layers)) or 0}]."
            )

    def module(self, layer: Any) -> Module:
        """The module of that layer. Raises LayerIndexError or NotInThisModelError if there is none."""
        count = len(self.modules)
        try:
            layer = whole_number(layer)
        except TypeError:
            several = (
                f' Several: model.read("{self.name}", layers={[*layer]!r}).' if isinstance(layer, (tuple, list)) else ""
            )
            raise LayerIndexError(
                f"{self.name}[{layer!r}]: layers are counted, 0 to {count - 1}, or sliced.{several}"
            ) from None
        if not count:
            raise NotInThisModelError(f"{self.name}: there is none: {self._none}.")
        if not -count <= layer < count:
            raise LayerIndexError(f"{self.name}[{layer}]: the model has {counted(count, 'layer')}, 0 to {count - 1}.")
        module = self.modules[layer]
        if module is None:
            raise NotInThisModelError(f"{self.name}[{layer}]: this layer has none: {self._absent[layer]}.")
        return module

    def point(self, layer: int) -> Point:
        """Where a module can be attached (see `Traceable.attach`). Errors as `module`."""
        module = self.module(layer)
        put = self.put
        if self._may_change(module):
            put = lambda value, new: self.put(value, new.clone())  # noqa: E731
        return Point(f"{self.name}[{layer}]", module, self.kind, self.get, put, self.tap)

    @property
    def of_encoder(self) -> bool:
        """Whether its values are of what an encoder-decoder's encoder reads."""
        return self._extent.of_encoder

    def of_part(self, name: str, blocks: OpenBlocks, call: int = 0) -> LayerAccessor:
        """The same points under another name, in the traces of a model of which this one's is a part, which is called several
        times in a step, perhaps."""
        part = copy.copy(self)
        part.name, part._blocks, part.call = name, blocks, call
        part._extent = part._extent._replace(of_encoder=True)
        return part

    def refuse(self, layer: int, why: str) -> None:
        """Give it on that layer no more, for this reason."""
        self.modules = (*self.modules[:layer], None, *self.modules[layer + 1 :])
        self._absent = (*self._absent[:layer], why, *self._absent[layer + 1 :])

    def refusals(self) -> dict[str, tuple[int, ...]]:
        """Why there is none, and on which layers."""
        reasons: dict[str, tuple[int, ...]] = {}
        for layer, module in enumerate(self.modules):
            if module is None:
                why = self._absent[layer]
                reasons[why] = (*reasons.get(why, ()), layer)
        return reasons

    def _may_change(self, module: Module) -> bool:
        return self.changed_later is None or module in self.changed_later

    def _part_from_model(self, slot: Slot) -> None:
        """Let the model go on with a copy, so that the tensor read stays what it was (or was edited to)."""
        collectors = self._blocks.current(self.name).run.collectors
        old = [collector for collector in collectors if isinstance(collector, _GoOnWithCopy)]
        slot = whole(slot)
        if not any(collector.slot is slot for collector in old):
            for collector in old:
                collectors.remove(collector)
            collectors.append(_GoOnWithCopy(slot, lambda value: self.put(value, self.get(value).clone())))

    def _reach(self, layer: int, block: Block | None = None) -> Slot:
        module = self.module(layer)
        block = block or self._blocks.current(self.name)
        try:
            slot = block.reach(module, self.kind, f"{self.name}[{layer}]", self.call, self.tap)
            self._check_whole(whole(slot), layer, block.run)
            if isinstance(slot, RowSlot) and is_closed(slot.value):
                raise RowsError(
                    f"{self.name}[{layer}] is in {a_kind(slot.value)}, of which nobody can tell which rows are this "
                    "block's. Read it in a block without a prompt (`with tracer.invoke():`), which sees the whole batch."
                )
            return slot
        except NotReachedError as error:
            if not self._unreached:
                raise
            raise type(error)(f"{error} {self._unreached}") from None
        except Exception as error:
            hide_our_frames(error)  # two of ours are enough
            raise

    def _check_whole(self, slot: Slot, layer: int, run: Run) -> None:
        """Raise NotInThisModelError if what is there is a piece of what the name means; note that the module is called once."""
        prompts = next((one for one in run.collectors if isinstance(one, RootInputs)), None)
        if prompts is not None:
            prompts.once[slot.module] = self.name, layer
        value = self.get(slot.value)
        missing = self._extent.missing(value, slot.module, run, prompts, self._layers)
        if missing is not None:
            raise piece_error(f"{self.name}[{layer}]", *missing)

    def _read_many(self, layers: range) -> list[Tensor]:
        try:
            return read_together([(self, layers)])[0]
        except OutOfOrderError as error:
            raise OutOfOrderError(f"{error} {_READ}") from None

    def _check_ahead(self, layers: Sequence[int], block: Block) -> None:
        """Raise OutOfOrderError if one of them has been passed."""
        for layer in layers:
            first = Question(self.module(layer), self.kind, self.call, block.step, self.tap, self.name)
            if block.run.place(first) is Place.PASSED:
                self._reach(layer, block)  # raises


LayerAccessor.__doc__ = _Described(LayerAccessor.__doc__)  # type: ignore[assignment]


def read_together(
    wanted: Sequence[tuple[LayerAccessor, Sequence[int]]], keep: Callable[[Tensor, Name], Tensor] | None = None
) -> list[list[Tensor]]:
    """The values of several names on several layers, in whatever order the model computes them.

    They are taken while the forward pass runs, which stops once for each name at most. Call it before the first of
    these layers has run.

    Args:
        wanted: each name with its layers.
        keep: what to keep of each value, given with its name, in memory of its own; the value itself if None.

    Returns:
        A list for each name, with a tensor for each of its layers, in the order given.
    """
    block = wanted[0][0]._blocks.current(wanted[0][0].name)
    for accessor, layers in wanted:
        accessor._check_ahead(layers, block)
    collected = [_Collected(accessor, block, layers, keep) for accessor, layers in wanted]
    with block.run.collecting(*collected):
        for (accessor, layers), one in zip(wanted, collected, strict=True):
            for layer in sorted(range(len(accessor))[layer] for layer in layers)[::-1]:
                if accessor.modules[layer] not in one.values:
                    one.take(whole(accessor._reach(layer, block)))
    found = [
        [one.values[accessor.module(layer)] for layer in layers]
        for (accessor, layers), one in zip(wanted, collected, strict=True)
    ]
    if (watching := watcher.get()) is not None:
        if len(wanted) > 1:
            watching.refuse(
                "several names are read at once: read one after the other, in the order of the forward pass"
            )
        for layer, value in zip(wanted[0][1], found[0], strict=True):
            watching.read(wanted[0][0]._blocks, wanted[0][0].name, layer, value)
    return found


class _Collected(Collector):
    """The values of a slice, taken while the forward pass runs through its layers."""

    def __init__(
        self,
        accessor: LayerAccessor,
        block: Block,
        layers: Sequence[int],
        keep: Callable[[Tensor, Name], Tensor] | None,
    ) -> None:
        self.modules = {accessor.module(layer) for layer in layers}
        self.kinds = {accessor.kind: accessor.tap}
        self.values: dict[Module, Tensor] = {}
        self._accessor = accessor
        self._keep = keep
        self._block = block
        self._step = block.step

    def take(self, slot: Slot) -> None:
        if slot.step != self._step or slot.call != self._accessor.call or slot.module in self.values:
            return
        accessor = self._accessor
        accessor._check_whole(slot, accessor.modules.index(slot.module), self._block.run)
        value = accessor.get(self._block.peek(slot).value)
        if self._keep is not None:
            value = self._keep(value, accessor.row)
        elif accessor._may_change(slot.module):
            value = value.clone()
        self.values[slot.module] = value


class _GoOnWithCopy(Collector):
    """Puts a copy in the place of one slot's value when the block is done with it."""

    def __init__(self, slot: Slot, copy: Callable[[Any], Any]) -> None:
        self.slot = slot
        self.modules = {slot.module}
        self.kinds = {slot.kind: None}
        self._copy = copy

    def take(self, slot: Slot) -> None:
        if slot is self.slot:
            slot.value = self._copy(slot.value)


def whole(slot: Slot) -> Slot:
    """The slot itself, where a block sees some rows of it."""
    return slot.whole if isinstance(slot, RowSlot) else slot


def _written(layers: slice) -> str:
    """The slice as one writes it."""
    parts = [layers.start, layers.stop] + [layers.step] * (layers.step is not None)
    return ":".join("" if one is None else str(one) for one in parts)


def one_for_each(name: str, layers: slice, count: int, value: Any) -> Iterator[tuple[int, Any]]:
    """Each of these of `count` layers, with what is assigned to it. Raises AssignmentError for another number of values."""
    numbers = range(count)[layers]
    found = (
        len(value) if isinstance(value, (Sequence, Tensor)) and (isinstance(value, Sequence) or value.ndim) else None
    )
    if found != len(numbers):
        given = f"{a_kind(value)} was" if found is None else f"{found} were"
        raise AssignmentError(
            f"{name}[{_written(layers)}] is {counted(len(numbers), 'layer')}; {given} assigned. "
            "Give a list of one tensor for each."
        )
    return zip(numbers, value, strict=True)


def check_fits(name: str, old: Any, new: Any) -> None:
    """Raise AssignmentError unless `new` is a tensor of the shape, dtype and device of `old`."""
    if getattr(new, "ndim", 0) and not isinstance(new, Tensor):
        raise AssignmentError(f"{name} is a tensor; {a_kind(new)} was assigned: assign torch.as_tensor(array).")
    if not isinstance(new, Tensor):
        raise AssignmentError(
            f"{name} is a tensor; {a_kind(new)} was assigned. For one number in all entries, assign "
            f"torch.full_like({name}, number); to scale it, {name} * number."
        )
    if old.shape == new.shape and old.dtype == new.dtype and old.device == new.device:
        return
    is_, was = (f"{t.dtype} of shape {tuple(t.shape)} on {t.device}" for t in (old, new))
    mend = []
    if old.shape != new.shape:
        mend.append(f"give it the shape {tuple(old.shape)} (x.expand({', '.join(map(str, old.shape))}) broadcasts)")
    if old.dtype != new.dtype or old.device != new.device:
        mend.append(f"convert it with x.to({str(old.device)!r}, {old.dtype})")
    raise AssignmentError(f"{name} is {is_}; what was assigned is {was}: {' and '.join(mend)}.")
