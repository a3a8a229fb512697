"""What a block adds to the residual stream, and the stream between its parts, from what happens in a layer's forward.

From the layer's output back to its input leads a chain of additions, the stream; the other operand of each is what was
added there. What it came of (going back until the stream or a module of the layer's is met) tells whether it is the token
mixer's or the MLP's. This finds post-norms, multipliers, residuals added inside a sublayer, and what is no module.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.nn import Module

from nnatomy.arch_configs import Anatomy
from nnatomy.names import ATTENTIONS, MID, MIXERS, MLPS, SUMS
from nnatomy.names import CROSS_ATTENTIONS as CROSS
from nnatomy.standardized.record import ADDITIONS, LayerSums, Place, Record, Result, Value

_PRODUCTS = {"mul", "__mul__", "__rmul__", "__imul__", "mul_", "div", "__truediv__", "__itruediv__", "div_"}


def find_contributions(anatomy: Anatomy, i: int, record: Record, output: Value) -> LayerSums:
    """What layer `i` adds, where it adds it, from the record of one call; `output` is what it gave."""
    try:
        return _Layer(anatomy, i, record, output).sums()
    except _NoSumError as error:
        return LayerSums(absent=dict.fromkeys(SUMS, str(error)))


class _NoSumError(Exception):
    """The layer's output is not its input and what its parts add; the text says what it is."""


class _Layer:
    """What one layer adds to the stream, from the record of one call."""

    def __init__(self, anatomy: Anatomy, i: int, record: Record, output: Value) -> None:
        self.layer = anatomy.layers[i]
        self.mixers: set[Module | None] = {*anatomy.mixers[i]}
        self.crossing: set[Module | None] = {anatomy.cross_attentions[i]} - {None}
        self.mixing = self.mixers | self.crossing
        self.attention, self.mlp = anatomy.attentions[i], anatomy.mlps[i]
        self.no_mlp, self.no_attention = anatomy.absent["mlp"][i], anatomy.absent["attention"][i]
        self.record = record
        self.output = output
        self._carries: dict[Value, bool] = {record.stream: True}
        #: The stream after each addition, its input first; and what was added: (the addition, 0 or 1).
        self.states: list[Value] = []
        self.summands: list[tuple[Value, int]] = []

    def sums(self) -> LayerSums:
        """Raises _NoSumError where the output is not the input and what is added."""
        self._follow()
        found = LayerSums()
        mixing, crossing, rest, other = [], [], [], []
        for summand in self.summands:
            origins = self._origins(self._value(summand))
            if origins & self.mixers:
                mixing.append(summand)
            if origins & self.crossing:
                crossing.append(summand)
            if self.mlp in origins or (self.mlp is None and not origins & self.mixing):
                rest.append(summand)
            if not origins & {*self.mixing, self.mlp} and self.mlp is not None:
                other.append(summand)
        if other:
            raise _NoSumError(f"something else is added to the stream too, {self._at(other[0])}")
        for several, whose in (
            (mixing, "its token mixers add"),
            (crossing, "its cross-attention adds"),
            (rest, "what mixes no tokens adds"),
        ):
            if len(several) > 1:
                raise _NoSumError(f"{whose} to the stream in several places")
        self._show_mid(found, crossing or mixing, rest)
        found.absent[CROSS] = "it has no one cross-attention"
        if crossing:
            del found.absent[CROSS]
            self._show(found, CROSS, self._part(crossing[0], self.crossing, self.mixers | {self.mlp}))
        if mixing:
            mixer = self._part(mixing[0], self.mixers, self.crossing | {self.mlp})
            if self.mlp is None and not rest:
                self._check_whole(mixer)
            self._show(found, MIXERS, mixer)
            if self.attention is None:
                found.absent[ATTENTIONS] = self.no_attention
            elif self.attention not in self._origins(self._value(mixer)):
                found.absent[ATTENTIONS] = (
                    "what its attention gives is not added to the stream, but read by another part"
                )
            elif self.mixers == {self.attention}:
                found.values[ATTENTIONS] = found.values[MIXERS]
            else:
                part = self._part(mixer, {self.attention}, {*self.mixing, self.mlp} - {self.attention})
                self._show(found, ATTENTIONS, part)
        else:
            found.absent[ATTENTIONS] = found.absent[MIXERS] = "it adds nothing of a token mixer's to the stream"
        if rest:
            self._show(found, MLPS, self._part(rest[0], {self.mlp}, self.mixing))
        else:
            found.absent[MLPS] = self.no_mlp or "it adds nothing of an MLP's to the stream"
        return found

    def _follow(self) -> None:
        """From the output back to the input, along the stream."""
        value = self.output
        if not self._is_stream(value):
            raise _NoSumError(self._why_none(value))
        while value is not self.record.stream:
            if not value.operands:
                assert value.same_as is not None
                value = value.same_as
                continue
            one, other = value.inputs
            if self._is_stream(one) and self._is_stream(other):
                raise _NoSumError(f"the stream is added to itself, {self._at((value, 0))}")
            summand = 1 if self._is_stream(one) else 0
            self.summands.insert(0, (value, summand))
            self.states.insert(0, value)
            value = value.inputs[1 - summand]
        self.states.insert(0, value)
        if not self.summands:
            raise _NoSumError("its output is its input")

    def _is_stream(self, value: Value) -> bool:
        """Whether it is the layer's input, or that and something added."""
        if value not in self._carries:
            before = value.inputs if value.operands else [value.same_as] if value.same_as else []
            self._carries[value] = any(map(self._is_stream, before))
        return self._carries[value]

    def _why_none(self, value: Value) -> str:
        ways: list[tuple[Value, str]] = [(value, "")]  # with what happens to the stream on the way to it
        seen = {value}
        for one, how in ways:
            if one is self.record.stream:
                return f"the stream is {how} on its way through the layer, so that input and contributions are not the output"
            if any("norm" in type(module).__name__.lower() for module in one.modules):
                how = "normalised"
            elif one.function in _PRODUCTS or (one.function in ADDITIONS and not one.operands):
                how = "scaled" if one.function in _PRODUCTS else how or "shifted"
            elif not (one.operands or one.same_as):
                continue
            ways += [(before, how) for before in one.inputs if before not in seen]
            seen.update(one.inputs)
        return "its output does not come of its input by additions"

    def _origins(self, value: Value) -> set[Module | None]:
        """The mixers, the cross-attention and the MLP that it was computed in, or from, without going back beyond the stream."""
        origins: set[Module | None] = set()
        for one in self._back(value, lambda one: bool(one.modules & {*self.mixing, self.mlp})):
            origins |= one.modules & {*self.mixing, self.mlp}
        return origins

    def _back(self, value: Value, until: Callable[[Value], bool]) -> list[Value]:
        """What it came of, back to the stream or where `until` says."""
        seen, found = {value}, [value]
        for one in found:
            if one not in self.states and not until(one):
                new = [before for before in one.inputs if before not in seen]
                seen.update(new)
                found += dict.fromkeys(new)
        return [one for one in found if one not in self.states]

    def _value(self, summand: tuple[Value, int]) -> Value:
        addition, which = summand
        return addition.inputs[which]

    def _part(
        self, summand: tuple[Value, int], wanted: set[Module | None], others: set[Module | None]
    ) -> tuple[Value, int]:
        """Of a summand that is a sum itself, what comes of those wanted and of no other."""
        value = self._value(summand)
        origins = self._origins(value)
        apart = self.mlp is None and wanted == {None}  # the MLP is what does not come of a mixer
        if not origins & (others - {None}):
            return summand
        while value.same_as is not None:
            value = value.same_as
        if not value.operands:
            raise _NoSumError(f"what its parts add is added up, {self._at(summand)}, and cannot be told apart")
        parts = [(value, which) for which in (0, 1)]
        mine = [
            part for part in parts if apart != bool(self._origins(self._value(part)) & (others if apart else wanted))
        ]
        if len(mine) != 1:
            raise _NoSumError(f"its parts add to the stream in several places, one is {self._at(summand)}")
        return self._part(mine[0], wanted, others)

    def _check_whole(self, mixer: tuple[Value, int]) -> None:
        """Where nobody knows the MLP: that it is not added to what the mixer gives."""
        value = self._value(mixer)
        while value.same_as is not None:
            value = value.same_as
        if value.operands and not all(self._origins(one) & self.mixers for one in value.inputs):
            raise _NoSumError(f"what its parts add is added up, {self._at(mixer)}, and cannot be told apart")

    def _show_mid(self, found: LayerSums, mixing: list[tuple[Value, int]], rest: list[tuple[Value, int]]) -> None:
        if not mixing or not rest:
            found.absent[MID] = "it has no token mixer and MLP, one after the other"
            return
        (addition, _), last = mixing[0], rest[0]
        reads: set[Value] = set()
        for one in self._back(self._value(last), lambda _: False):
            reads |= {before for before in one.inputs if before in self.states}
        if addition in reads:
            self._add(found, MID, addition, Result())
            found.values[MID] = addition.operands[2]
        elif self.states.index(addition) > self.states.index(last[0]):
            found.absent[MID] = "its MLP comes before its token mixer"
        else:
            found.absent[MID] = "its token mixer and its MLP read the same stream (a parallel block)"

    def _show(self, found: LayerSums, name: str, summand: tuple[Value, int]) -> None:
        addition, which = summand
        self._add(found, name, addition, addition.places[which])
        found.values[name] = addition.operands[which].view_as(self.record.stream.tensor)

    def _add(self, found: LayerSums, name: str, addition: Value, place: Place) -> None:
        assert addition.where is not None
        if not self.record.is_once(addition.where):
            raise _NoSumError(f"it adds to the stream in a loop, {self._at((addition, 0))}")
        found.add(name, addition, place)

    def _at(self, summand: tuple[Value, int]) -> str:
        """Where that is, in words: its innermost module."""
        paths = {module: path for path, module in self.layer.named_modules() if path}
        inside = [paths[module] for module in summand[0].modules if module in paths]
        return f"in its {max(inside, key=len)}" if inside else "in its own forward"
