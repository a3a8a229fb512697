"""The inside of token mixers without a softmax: their states by position, their time steps and gates.

Once, at load, one call of each is looked into (`mixer_anatomy`); in a trace `MixerMode` shows what has been found there. States
come last in the call: only then is it known whether what has been computed aside is what the call itself has ended with.
"""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module

from nnatomy.arch_configs import Anatomy
from nnatomy.core import Collector, Slot
from nnatomy.core.frames import frames
from nnatomy.core.gates import is_gate
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Axes, Report
from nnatomy.core.progress import ENTERING
from nnatomy.errors import NotInThisModelError, a_kind
from nnatomy.names import OF_MIXERS, ROWS, STATES
from nnatomy.standardized.accessors import LayerAccessor
from nnatomy.standardized.hidden import input_of, output_of, with_output
from nnatomy.standardized.kept_state import states_in
from nnatomy.standardized.mixer_anatomy import Inside, Layout, look_inside, off_by, shaped, tolerance
from nnatomy.standardized.sdpa import awaits_gradient
from nnatomy.standardized.shown import ShowMode
from nnatomy.standardized.states import MixerCall, is_kept, put, put_back, read, with_cache

#: Why layers have none of it.
NO_RECURRENCE = "no token mixer of it is recurrent"
#: Two prompts of this many positions are what it is found on: as many as hardly anything else in a model is.
_PROMPTS, _POSITIONS = 2, 7


class Mixers:
    """What is shown inside of all recurrent mixers of a model; the tap of the names that speak of it.

    Attributes:
        found: by mixer, what has been found in it; None until somebody has looked.
    """

    def __init__(self, anatomy: Anatomy, blocks: OpenBlocks, is_split: bool) -> None:
        self.found: dict[Module, Inside] | None = None
        self._mixers = [_recurrent(anatomy, i) for i in range(len(anatomy.layers))]
        self._blocks, self._is_split = blocks, is_split
        layers = anatomy.layers
        first = [mixers[0] if mixers else layer for mixers, layer in zip(self._mixers, layers, strict=True)]
        self.accessors = {name: MixerAccessor(ROWS[name], first, blocks, tap=self, layers=layers) for name in OF_MIXERS}
        for one in self.accessors.values():
            one.mixers = self

    def __call__(self, module: Module, report: Report) -> MixerMode:
        return MixerMode(module, (self.found or {}).get(module, Inside()), report)

    def find(self) -> None:
        """Find it on a short prompt, once."""
        if self.found is not None:
            return
        self.found = {}
        each = [mixer for mixers in self._mixers for mixer in mixers]
        why = "its states are split over processes" if self._is_split else ""
        why = why or ("" if len(set(each)) == len(each) else "a mixer is that of several layers")
        finder = _Finder({*each} if not why else set(), len(self._mixers))
        if finder.modules:
            assert self._blocks.example is not None
            try:
                with self._blocks.example(self._blocks, _PROMPTS, _POSITIONS, use_cache=True) as tracer:
                    tracer.block.run.collect(finder)
                    tracer.result  # noqa: B018
            except Exception as error:  # noqa: BLE001 - it is what each layer then says
                why = f"its inside does not show, as the model cannot be run on token ids alone ({error})"
        self.found = finder.found
        for i, mixers in enumerate(self._mixers):
            self._learn(i, mixers, why)

    def _learn(self, i: int, mixers: tuple[Module, ...], why: str) -> None:
        """What layer `i` has."""
        assert self.found is not None
        if not mixers:
            for accessor in self.accessors.values():
                accessor.refuse(i, NO_RECURRENCE)
            return
        there = [one for one in mixers if one in self.found and self.found[one].slots]
        which = there[0] if len(there) == 1 else mixers[0]
        why = why or ("it has several recurrent mixers" if len(there) > 1 else "")
        inside = self.found.get(which, Inside(absent=dict.fromkeys(OF_MIXERS, why or "it is not called once")))
        for name, accessor in self.accessors.items():
            accessor.modules = (*accessor.modules[:i], which, *accessor.modules[i + 1 :])
            if because := why or inside.absent.get(name, ""):
                accessor.refuse(i, because)


def _recurrent(anatomy: Anatomy, i: int) -> tuple[Module, ...]:
    """The mixers of a layer without a softmax."""
    mixers, kinds = anatomy.mixers[i], anatomy.kinds[i].split(" + ")
    if len(kinds) != len(mixers):
        return ()
    attentions = (anatomy.attentions[i], anatomy.cross_attentions[i])
    pairs = zip(mixers, kinds, strict=True)
    return tuple(
        one for one, kind in pairs if "attention" not in (kind, kind.removeprefix("cross-")) and one not in attentions
    )


class MixerAccessor(LayerAccessor):
    """One of the names that speak of the inside of a recurrent mixer."""

    mixers: Mixers

    def module(self, layer: Any) -> Module:
        self.mixers.find()
        return super().module(layer)


class _Finder(Collector):
    """Looks into one call of each mixer."""

    def __init__(self, modules: set[Module], layers: int) -> None:
        self.modules = modules
        self.kinds = {"input": None, "output": None}
        self.found: dict[Module, Inside] = {}
        self._layers = layers
        self._calls: dict[Module, MixerCall] = {}

    def take(self, slot: Slot) -> None:
        if slot.kind == "input":
            self._calls[slot.module] = MixerCall(slot.module, slot.value)
        elif slot.module in self.found:
            why = "it is called several times in a forward pass"
            self.found[slot.module] = Inside(absent=dict.fromkeys(OF_MIXERS, why))
        else:
            self.found[slot.module] = look_inside(self._calls.pop(slot.module), slot.value, self._layers)


class MixerMode(ShowMode):
    """Shows what has been found, in one call of a mixer."""

    def __init__(self, module: Module, inside: Inside, report: Report) -> None:
        super().__init__(module, inside.shown, report)
        self._inside = inside
        self._call: MixerCall | None = None
        self._keeps = True  # whether the pass itself keeps states
        progress, gate = report.run.progress, _gate_of(module)
        stage = next(stage for entered, _, stage in reversed(progress.stack) if entered is module)
        if inside.slots and gate is not None and stage == ENTERING:  # later it may have begun to write into its cache
            given = gate.f_locals["args"], gate.f_locals["kwargs"]
            self._keeps = bool(states_in(given)) or inside.cache is None
            self._call = MixerCall(
                module,
                with_cache(given, inside.cache),
                inside.slots,
                inside.alone,
                bool(inside.apart),
                is_first=progress.step == 0,
            )

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        gate = _gate_of(self._module)
        if self._call is not None and gate is not None and "output" in gate.f_locals:  # it has not failed
            here = gate.f_locals
            self._call.arguments = with_cache((here["args"], here["kwargs"]), self._inside.cache)
            self._show_states(self._call, here["output"])

    def _show(self, name: str, tensor: Tensor) -> Tensor:
        gate = _gate_of(self._module)
        if gate is None or not self._report.awaited(name):
            return tensor
        stream = input_of((gate.f_locals["args"], gate.f_locals["kwargs"]))
        layout = Layout(stream.shape[0], stream.shape[1], self._inside.last[name])
        if not layout.fits(tensor):
            return self._visited(name, tensor)
        shown = layout.by_position(tensor)
        new = self._visited(name, shown)
        return tensor if new is shown and shown.data_ptr() == tensor.data_ptr() else layout.as_it_was(new, tensor)

    def _show_states(self, call: MixerCall, returned: Any) -> None:
        if self._keeps and not all(is_kept(slot, self._module, call.arguments, returned) for slot in call.slots):
            return
        run: tuple[Tensor, list[Tensor]] | None = None
        forced: dict[int, tuple[Tensor, Tensor]] = {}
        changed: list[Tensor] = []
        for name in STATES:
            if name not in self._inside.states or not self._report.awaited(name):
                continue
            if run is None:
                run = call.run()
                self._check(call, returned, *run)
            i = self._inside.states[name]
            state = run[1][i]
            shown = shaped(name, state).clone()  # no view, for `detach_`
            before = shown.detach().clone()
            new = self._report(shown, name, Axes(ROWS[name].here)).value
            where = (new.detach() != before).flatten(2).any(-1)
            if isinstance(where, FakeTensor):
                continue
            if (awaited := awaits_gradient(shown)) or bool(where.any()):
                if call.by_prefix:
                    raise NotInThisModelError(
                        f"{name} of {a_kind(self._module)} cannot be assigned, nor its gradient be asked for: its single step, with "
                        "which a generation goes on from a state, gives something else than its scan of a prompt "
                        f"({self._inside.apart:.1e} of it, relative), and no call of it goes on with its scan by one position."
                    )
                if shown.retains_grad and new is shown and not bool(where.any()):
                    # All that it is computed from is in the steps that are made now, too, and would count twice.
                    shown.detach_().requires_grad_()
                forced[i] = where, new.reshape(state.shape)
                changed.append(where | awaited)
                run = call.run(forced)
        if run is not None and changed:
            self._go_on(call, returned, *run, torch.stack(changed).any(0))

    def _check(self, call: MixerCall, returned: Any, given: Tensor, states: list[Tensor]) -> None:
        """Raise NotInThisModelError if the single steps have not ended where the call has.

        In half precision that leaves room for much. So the same call is made again, from which it differs where something inside is
        changed; and a state that it does not go on from shows at the first position, where few roundings have added up.
        """
        if isinstance(given, FakeTensor) or given.is_meta:
            return
        slots, output = call.slots if self._keeps else (), output_of(returned)
        own = [output, *(read(slot, self._module, call.arguments, returned) for slot in slots)]
        with torch.no_grad():
            again, kept = call.whole(given.shape[1])
        allowed, ends = 10 * tolerance(output), [given, *(one[:, -1] for one in states)]
        limits = [(off_by(one, other), allowed) for one, other in zip(ends, own, strict=False)]
        limits += [(off_by(one, other), _untouched(other)) for one, other in zip([again, *kept], own, strict=False)]
        limits.append((off_by(given[:, :1], output[:, :1]), allowed / 5))
        if wrong := [off for off, limit in limits if off > limit]:
            raise NotInThisModelError(
                f"the states of {a_kind(self._module)} by position: this call has ended elsewhere than its own single "
                f"steps, from which they are computed (off by {max(wrong):.1e}, relative). Something inside of it has been changed "
                "in this pass (time_steps, mixer_gates, one of its modules), it was given packed sequences, or several tokens behind "
                "a state that it does not go on from. Read the states in a pass without that."
            )

    def _go_on(self, call: MixerCall, returned: Any, given: Tensor, states: list[Tensor], where: Tensor) -> None:
        """Let the model go on with what comes of other states at these positions."""
        behind = where.cumsum(1) > where.long()
        output = torch.where(behind[..., None], given.to(output_of(returned).dtype), output_of(returned))
        instead = with_output(returned, output)
        rows = where.any(1)
        for slot, state in zip(call.slots if self._keeps else (), states, strict=self._keeps):
            own = read(slot, self._module, call.arguments, returned)
            last = torch.where(rows.reshape(-1, *[1] * (own.ndim - 1)), state[:, -1], own)
            instead = put_back(slot, instead, last)
            if slot.carrier != "argument":
                put(slot, self._module, call.arguments, last)
        self._report.run.replace(_Instead(self._module, instead, self._report.run), 0)


class _Instead(Collector):
    """Puts something else in the place of what a module, which is about to return, returns."""

    def __init__(self, module: Module, instead: Any, run: Any) -> None:
        self.modules, self.kinds = {module}, {"output": None}
        self._instead, self._run = instead, run

    def take(self, slot: Slot) -> None:
        slot.value = self._instead
        self._run.replacements.remove(self)


def _untouched(value: Tensor) -> float:
    """How far the same call made again may be apart, relative to the largest."""
    return max(1e-5, 2 * torch.finfo(value.dtype).eps)


def _gate_of(module: Module) -> FrameType | None:
    """The gate that the newest call of a module came through."""
    return next((one for one in frames() if is_gate(one) and one.f_locals["self"] is module), None)
