"""What one call of a recurrent mixer shows of its inside: which states it keeps, and where its time steps and gates are.

Each is proven on that call. States: run on one position after the other the mixer gives what it gave at once, and ends with the
states that the call ended with; run on its first positions at once, it ends with those of the last of them; another state
changes what comes behind it, and nothing else. A state that is a window of the newest inputs moves by one a position. Where
there are three others, they are a sum, its normalizer and a stabilizer: what they stand for, and so the output, is the same
when the first two are divided by e and the third is one more.

Time steps are what a softplus gives by position. The gate is the one of two values by position that multiply one another on the
way to the output projection, which fewer values come of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.core import Slot as PointSlot
from nnatomy.core.points import Axes, Report
from nnatomy.names import CONV_STATES, GATES, OF_MIXERS, ROWS, SSM_STATES, STATES, TIME_STEPS
from nnatomy.standardized.hidden import output_of
from nnatomy.standardized.record import MATRIX_PRODUCTS, LayerSums, Place, Record, Result, Value
from nnatomy.standardized.shown import ShowMode
from nnatomy.standardized.states import MixerCall, Slot, read, with_cache
from nnatomy.validation.near import TOLERANCE, distance

#: Why a recurrent mixer has no state of some name.
NONE_KEPT = "it keeps none"
_MULTIPLIES = {"mul", "__mul__", "__rmul__", "mul_", "__imul__"}


@dataclass
class Inside:
    """What is inside of a mixer.

    Attributes:
        slots: where it keeps its states; `states`: which of them has which name.
        alone: whether its single steps are right for one prompt alone.
        apart: how far its single steps are from what it gives at once, where they are not the same; its states are then those behind
            its first position, its first two, ..., and are not written: no call goes on from one by one position as its scan does.
        cache: for a pass without one, an empty cache, and the keyword it comes by; None where there has to be one.
        shown: where in its code time steps and gates are; `last`: whose positions are in the last axis.
        absent: by name, why it has none.
    """

    slots: tuple[Slot, ...] = ()
    states: dict[str, int] = field(default_factory=dict)
    alone: bool = False
    apart: float = 0.0
    cache: tuple[str, Any] | None = None
    shown: LayerSums = field(default_factory=LayerSums)
    last: dict[str, bool] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


class Layout(NamedTuple):
    """How a value by position stands in the model's own tensor: (batch, seq, ...), with all in one axis, or (batch, channel, seq)."""

    batch: int
    seq: int
    last: bool

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has that form."""
        if self.last:
            return tensor.ndim == 3 and (tensor.shape[0], tensor.shape[2]) == (self.batch, self.seq)
        flat = tensor.ndim == 2 and tensor.shape[0] % (self.batch * self.seq) == 0
        return flat or (tensor.ndim > 2 and tensor.shape[:2] == (self.batch, self.seq))

    def by_position(self, tensor: Tensor) -> Tensor:
        """As (batch, seq, channel)."""
        return tensor.transpose(1, 2) if self.last else tensor.reshape(self.batch, self.seq, -1)

    def as_it_was(self, shown: Tensor, own: Tensor) -> Tensor:
        """In the model's form."""
        return shown.transpose(1, 2) if self.last else shown.reshape(own.shape)


def shaped(name: str, states: Tensor) -> Tensor:
    """A state by position, with the axes of its name: without heads there is one; what is no matrix has one column."""
    axes = len(ROWS[name].axes) - 2
    own = [*states.shape[2:]]
    if name in (SSM_STATES, CONV_STATES) and len(own) == 1:
        own = [*own, 1]
    return states.reshape(*states.shape[:2], *[1] * (axes - len(own)), *own)


def off_by(one: Tensor, other: Tensor) -> float:
    """How far two values are apart, relative to the largest; values of another shape are not to be compared."""
    return distance(one.detach(), other.detach())


def tolerance(value: Tensor) -> float:
    """How far values computed in two ways may be apart, relative to the largest: states are in float32 at most."""
    return max(TOLERANCE.get(value.dtype, 1e-4), TOLERANCE[torch.float32])


def look_inside(call: MixerCall, returned: Any, layers: int) -> Inside:
    """What there is, of a call that has returned that in a model of so many layers."""
    inside = Inside()
    if not isinstance(call.given, Tensor) or call.given.ndim != 3:
        inside.absent = dict.fromkeys(OF_MIXERS, "its input is no stream of (batch, seq, hidden)")
        return inside
    call.slots = inside.slots = call.find(returned, layers)
    try:
        _find_states(inside, call, returned)
    except _NoneError as error:
        inside.absent |= dict.fromkeys(STATES, str(error))
        inside.slots = call.slots = ()
        inside.states.clear()
    _find_values(inside, call)
    for name in OF_MIXERS:
        if name not in inside.states and name not in inside.last:
            inside.absent.setdefault(name, NONE_KEPT)
    return inside


class _NoneError(Exception):
    """There is none to show; the text says why."""


def _find_states(inside: Inside, call: MixerCall, returned: Any) -> None:
    if not inside.slots:
        raise _NoneError("its call keeps nothing for the next one")
    own = output_of(returned)
    allowed = tolerance(own)
    ends = [read(slot, call.module, call.arguments, returned) for slot in inside.slots]
    # RWKV's single step takes the prompts for positions; that of Zamba2 and Nemotron-H does not limit the time steps.
    apart: list[float] = []
    for call.alone, call.by_prefix in ((False, False), (True, False), (False, True)):
        try:
            given, states = call.run()
            parts = [(end, call.whole(end)[1]) for end in (3, 5)]
        except Exception as error:  # noqa: BLE001 - it is what the layer then says
            why = f"it does not run on one position after the other ({error})"
            continue
        pairs = [(given, own), *((one[:, -1], end) for one, end in zip(states, ends, strict=True))]
        pairs += [(one[:, end - 1], two) for end, part in parts for one, two in zip(states, part, strict=True)]
        apart.append(max(off_by(one, other) for one, other in pairs))
        if apart[-1] <= allowed:
            break
        why = "its own single steps, with which a generation goes on, give something else than it gives at once: "
        why += f"{apart[0]:.1e} of it"
    else:
        raise _NoneError(why)
    inside.alone, inside.apart = call.alone, apart[0] if call.by_prefix and len(apart) > 1 else 0.0
    inside.cache = _empty_cache(call, given)
    windows = [i for i, one in enumerate(states) if _is_window(one, call.stream)]
    rest = [i for i in range(len(states)) if i not in windows]
    if len(windows) > 1 or len(rest) not in (0, 1, 3):
        raise _NoneError(f"it keeps {len(windows)} windows of its inputs and {len(rest)} other states")
    names = dict(zip([name for name in STATES if name != CONV_STATES], rest, strict=False))
    names |= dict.fromkeys([CONV_STATES][: len(windows)], windows[0] if windows else 0)
    for name, i in names.items():
        if states[i].ndim > len(ROWS[name].axes):
            raise _NoneError(f"{name} would have {states[i].ndim} axes")
        inside.states[name] = i
    if call.by_prefix:
        return
    if rest:
        _check_written(call, given, states, rest)
    for i in windows if not rest else ():
        _check_written(call, given, states, [i])


def _empty_cache(call: MixerCall, given: Tensor) -> tuple[str, Any] | None:
    """An empty cache, where one prompt alone comes to the same with it."""
    empty = call.empty_cache()
    if empty is None:
        return None
    args, kwargs = call._prompt(0).arguments
    bare = with_cache((args, {**kwargs, empty[0]: None}), empty)
    try:
        again, _ = MixerCall(call.module, bare, call.slots, call.alone, call.by_prefix).run()
    except Exception:  # noqa: BLE001 - a cache that is not made for prompts to come: then there has to be one
        return None
    return empty if off_by(again, given[:1]) <= tolerance(given) else None


def _is_window(states: Tensor, stream: Tensor) -> bool:
    """Whether it is of the newest inputs: of several, which move by one a position, or of one, which is the mixer's own."""
    if states[:, 0].shape == stream[:, 0].shape and torch.equal(states, stream.to(states.dtype)):
        return True
    if states.ndim != 4 or states.shape[-1] == 1:
        return False
    # Of prompts of other lengths the same inputs may be computed with other roundings.
    moves = off_by(states[:, 1:, :, :-1], states[:, :-1, :, 1:]) <= tolerance(states)
    return moves and off_by(states[:, 0], states[:, 1]) > tolerance(states)


def _check_written(call: MixerCall, given: Tensor, states: list[Tensor], which: list[int]) -> None:
    """That another state of the first prompt changes what comes behind it, and that three are what three have to be."""
    place = 3
    where = torch.zeros(states[0].shape[:2], dtype=torch.bool, device=given.device)
    where[0, place] = True

    def written(changes: dict[int, Tensor]) -> Tensor:
        with torch.no_grad():
            return call.run({i: (where, one) for i, one in changes.items()})[0]

    first = which[0]
    now = written({first: states[first] * 2 + states[first].abs().max()})
    if not torch.equal(now[0, : place + 1], given[0, : place + 1]) or not torch.equal(now[1], given[1]):
        raise _NoneError("writing it changes more than what comes behind it")
    if torch.equal(now[0, place + 1], given[0, place + 1]):
        raise _NoneError("writing it changes nothing")
    if len(which) == 3:
        total, normalizer, stabilizer = which
        factor = torch.tensor(-1.0, device=given.device).exp()
        same = {i: states[i] * factor for i in (total, normalizer)} | {stabilizer: states[stabilizer] + 1}
        off = off_by(written(same), given)
        if off > 10 * tolerance(given):
            raise _NoneError(f"its three states are no sum, normalizer and stabilizer, off by {off:.1e}")


# Time steps and gates.


def _find_values(inside: Inside, call: MixerCall) -> None:
    record = Record(call.stream)
    try:
        output, _ = call.whole(call.stream.shape[1], record)
    except Exception as error:  # noqa: BLE001 - it is what the layer then says
        inside.absent |= dict.fromkeys((TIME_STEPS, GATES), f"it cannot be called once more ({error})")
        return
    end = record.value(output)
    for name, find in ((TIME_STEPS, _time_steps), (GATES, _gate)):
        try:
            reading, place = find(record, end)
            value = reading if isinstance(place, Result) else reading.inputs[reading.places.index(place)]
            if reading.where is None or not record.is_once(reading.where):
                raise _NoneError("it is computed in a loop")
            layout = _layout(call.stream, value.tensor)
            sums = LayerSums()
            sums.add(name, reading, place)
            _check_value(name, call, sums, layout, output)
        except _NoneError as error:
            inside.absent[name] = str(error)
        else:
            inside.last[name] = layout.last
            inside.shown.add(name, reading, place)


def _time_steps(record: Record, _end: Value) -> tuple[Value, Place]:
    steps = [one for one in record.order if _is_softplus(one) and _comes_of(one, record.stream)]
    if len(steps) != 1:
        why = (
            f"{len(steps)} softpluses give some"
            if steps
            else "no softplus gives any that torch sees (a fused kernel shows none)"
        )
        raise _NoneError(why)
    limited = [one for one in record.order if one.function == "clamp" and steps[0] in one.inputs]
    return (limited or steps)[0], Result((limited or steps)[0].leaf)


def _is_softplus(value: Value) -> bool:
    """Whether it is one, or written out as one that cannot overflow."""
    if value.function != "where":
        return value.function == "softplus"
    alike = [
        one.tensor for one in value.inputs if one.tensor.shape == value.tensor.shape and one.tensor.is_floating_point()
    ]
    return any(off_by(torch.nn.functional.softplus(one), value.tensor) < 1e-5 for one in alike)


def _gate(record: Record, end: Value) -> tuple[Value, Place]:
    products = [one for one in end.back(lambda one: one.function in MATRIX_PRODUCTS) if one.function in MATRIX_PRODUCTS]
    if len(products) != 1:
        raise _NoneError(f"what it gives comes of {len(products)} matrices, not of one")
    (value,) = _by_position(products[0], record, whole=False) or (record.stream,)
    while True:
        before = _by_position(value, record, whole=True)
        if len(before) == 2 and value.function in _MULTIPLIES:
            counts = [len(one.back(lambda _: False)) for one in before]
            gate = before[counts.index(min(counts))]
            if counts[0] == counts[1]:
                raise _NoneError("which of two factors is the gate does not show")
            return value, value.places[value.inputs.index(gate)]
        if len(before) != 1 or value.function in MATRIX_PRODUCTS:
            raise _NoneError("nothing multiplies what its output projection reads")
        value = before[0]


def _by_position(value: Value, record: Record, whole: bool) -> list[Value]:
    """What it came of that is computed from the stream; `whole`: and has as many entries."""
    found = [one for one in value.inputs if one is not record.stream and _comes_of(one, record.stream)]
    return [one for one in found if not whole or one.tensor.numel() == value.tensor.numel()]


def _comes_of(value: Value, stream: Value) -> bool:
    return stream in value.back(lambda one: one is stream)


def _layout(stream: Tensor, tensor: Tensor) -> Layout:
    batch, seq = stream.shape[:2]
    fit = [layout for layout in (Layout(batch, seq, last=False), Layout(batch, seq, last=True)) if layout.fits(tensor)]
    if len(fit) != 1:
        raise _NoneError(f"which axis of {tuple(tensor.shape)} is of positions does not show")
    return fit[0]


def _check_value(name: str, call: MixerCall, sums: LayerSums, layout: Layout, clean: Tensor) -> None:
    """That it is by position: another one, of the first prompt, changes what is given there (and behind, if that), and no more."""
    place = 3
    report = _Changes(place, call.module, 0, name)
    shows = _Shows(call.module, sums, report, layout)
    with torch.no_grad():
        now, _ = call.whole(clean.shape[1], shows)
    behind = place + 1 if name == GATES else clean.shape[1]
    if torch.equal(now[0, place], clean[0, place]):
        raise _NoneError("writing it changes nothing")
    off = max(off_by(now[1], clean[1]), off_by(now[0, :place], clean[0, :place]))
    if behind < clean.shape[1]:
        off = max(off, off_by(now[0, behind:], clean[0, behind:]))
    if off > tolerance(clean):
        raise _NoneError(f"writing it changes what other positions give, off by {off:.1e}")


class _Changes(Report):
    """Stands for a trace in which everything is waited for, and changed for the first prompt at one position, its `run`."""

    def __call__(self, value: Any, kind: str = "", axes: Axes | None = None) -> PointSlot:
        new = value.clone()
        new[0, self.run] = 2 * new[0, self.run] + 1
        return PointSlot(self.module, kind, 0, 0, new, axes)

    def awaited(self, kind: str) -> bool:  # noqa: ARG002
        return True


class _Shows(ShowMode):
    """Shows one value by position."""

    def __init__(self, module: Module, sums: LayerSums, report: Any, layout: Layout) -> None:
        super().__init__(module, sums, report)
        self._layout = layout

    def _show(self, name: str, tensor: Tensor) -> Tensor:
        return self._layout.as_it_was(self._visited(name, self._layout.by_position(tensor)), tensor)
