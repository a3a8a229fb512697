"""An engine that is served: what a client is told of it, and its traces, which stand still wherever their client looks."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any

from torch.nn import Module

from nnatomy.core.points import Collector, Slot
from nnatomy.core.run import Run
from nnatomy.errors import NnatomyError
from nnatomy.names import OF_LAYERS
from nnatomy.serve.forward import Forward
from nnatomy.serve.hello import tokenizer_files, versions, weights_hash
from nnatomy.serve.policy import Refused
from nnatomy.serve.served import Served
from nnatomy.serve.session import Session
from nnatomy.serve.tensors import Weights
from nnatomy.vllm.attention import KeysPlace
from nnatomy.vllm.places import Place
from nnatomy.vllm.run import EngineRun
from nnatomy.vllm.session import EngineSession
from nnatomy.vllm.split import SplitPlace


class EnginePoints:
    """The points of an engine's model as frames name them: modules by number, the sampler last; names by name and layer.

    Attributes:
        holder: the session whose trace the engine runs.
        line: those that wait for it.
        ranks: the processes that the model is split over; None if it is not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.root: Module = model.engine.model
        self.modules = [*self.root.modules(), model.engine.sampler]
        self.layers = [one.module for one in model._anatomy.layers]
        self.numbers = {module: number for number, module in enumerate(self.modules)}
        self.holder: Any = None
        self.line: deque[Any] = deque()
        self.ranks: Any = None

    def module(self, number: Any) -> Module:
        """The module of that number. Raises Refused if there is none."""
        if type(number) is not int or not 0 <= number < len(self.modules):
            raise Refused(f"the model has no module of number {number!r:.40}")
        return self.modules[number]

    def place(self, name: Any, layer: Any, generates: bool) -> Place:
        """Where a name is, on a layer if it has any. Raises Refused, NotInThisModelError or LayerIndexError."""
        if layer is not None and name in OF_LAYERS and type(layer) is int:
            found: Place = getattr(self.model, name).at(layer)
            return found
        if layer is None and name in ("logits", "token_embeddings", "sampled_tokens"):
            found = self.model.place(name, generates)
            return found
        raise Refused(f"there is no name {name!r:.40} on layer {layer!r:.40}")


class EngineServed(Served):
    """A model on an engine, for many clients. It runs one trace at a time: who asks for another waits until that is over."""

    session: type[Session] = EngineSession

    def _known(self, model: Any) -> tuple[Any, Weights, dict[str, Any]]:
        weights = Weights(model.engine.model)
        return EnginePoints(model), weights, hello(model, self.name, weights_hash(weights))


def hello(model: Any, name: str, digest: str) -> dict[str, Any]:
    """All that a client needs to know."""
    engine, points = model.engine, EnginePoints(model)

    def told(place: Place | str) -> Any:
        if isinstance(place, str):
            return place
        part = place.part if isinstance(place, SplitPlace) else place
        return [points.numbers[place.module], place.kind, place.only_read, isinstance(part, KeysPlace)]

    of_steps = {
        f"{name}{' of a generation' * generates}": told(model.place(name, generates))
        for name in ("logits", "token_embeddings", "sampled_tokens")
        for generates in (False, True)
        if name not in model._refused
    }
    return {
        "name": name,
        "engine": f"vLLM {engine.vllm.__version__}",
        "versions": {**versions(), "vllm": engine.vllm.__version__},
        "class": type(engine.model).__name__,
        "revision": engine.config.model_config.revision,
        "config": json.dumps(engine.hf_config.to_dict(), default=str),
        "tokenizer": None if model.tokenizer is None else tokenizer_files(model.tokenizer),
        "hash": digest,
        "whole_methods": False,
        "modules": [[path, type(one).__name__] for path, one in engine.model.named_modules()],
        "layers": [points.numbers[one] for one in points.layers],
        "places": {one: [told(place) for place in getattr(model, one).places] for one in OF_LAYERS},
        "of_steps": of_steps,
        "refused": model._refused,
        "limits": {one: getattr(engine, one) for one in ("max_model_len", "step_tokens", "step_requests")},
        "report": model.validation.to_dict(),
    }


class _Stops(Collector):
    """Has the run stand still at points, from a step on."""

    def __init__(self, run: Run, points: dict[tuple[Module, str], int]) -> None:
        self.modules, self.kinds = {module for module, _ in points}, dict.fromkeys(kind for _, kind in points)
        self._run, self._points = run, points

    def takes(self, module: Module, kind: str) -> bool:
        return (module, kind) in self._points

    def take(self, slot: Slot) -> None:
        if slot.step >= self._points[slot.module, slot.kind]:
            self._run.slot = slot
            self._run.suspend()
            self._run.slot = None


class _Looks(Collector):
    """Has something looked at before each of some modules."""

    def __init__(self, modules: set[Module], look: Callable[[], None]) -> None:
        self.modules, self.kinds, self._look = modules, {"input": None}, look

    def take(self, _: Slot) -> None:
        self._look()


class EngineForward(Forward):
    """A trace on the engine: all of its steps.

    Args:
        check: called before each layer: what it raises ends the trace. `begins` is called before each step.
    """

    _run: EngineRun

    def __init__(
        self, points: EnginePoints, run: EngineRun, check: Callable[[], None], begins: Callable[[], None]
    ) -> None:
        self._points: Any = points
        self._run, self._told, self._step = run, {}, -1
        self.watched: list[Any] = []
        run.replace(_Looks({points.root}, begins))
        run.replace(_Looks(set(points.layers), check))

    def go(self, watched: Any, _: Any = ()) -> Slot | None:
        """Let it go on to the first of the points that are watched, or to where a step begins after the first that is asked
        for; None if it has ended.

        Args:
            watched: [[module, kind, from which step on, name or None, layer or None], ...].
        """
        run, points, stops = self._run, self._points, dict[tuple[Module, str], int]()
        if not isinstance(watched, list) or len(watched) > 100_000:
            raise Refused("points are a list of [module, kind, step, name, layer]")
        for one in watched:
            if (
                not isinstance(one, list)
                or len(one) != 5
                or one[1] not in ("input", "output")
                or type(one[2]) is not int
            ):
                raise Refused("a point is [module, 'input' or 'output', step, name, layer]")
            at = points.module(one[0]), one[1]
            stops[at] = min(one[2], stops.get(at, one[2]))
        if stops:
            begins = points.root, "input"
            stops[begins] = min(stops.get(begins, 1 << 60), min(stops.values()) + 1)
        self.watched = watched
        run.replacements = [one for one in run.replacements if not isinstance(one, _Stops)] + [_Stops(run, stops)]
        run.wait(())
        if run.error is not None:
            raise run.error if points.ranks is None else points.ranks.failed(run.error)
        return run.slot

    @property
    def generates(self) -> bool:
        return self._run.generates

    def read(self, name: Any, layer: Any) -> Any:
        """The value of a name where it stands. Raises Refused if that is somewhere else."""
        return self._place(name, layer).read(self.slot, self._run.layout)  # type: ignore[arg-type]

    def write(self, name: Any, layer: Any, new: Any) -> None:
        """Put another one in its place. Errors as `read`, and AssignmentError."""
        place = self._place(name, layer)
        if place.only_read:
            raise Refused(f"{name} can be read, and not assigned: {place.only_read}")
        self._run.once(place.write(self.slot, self._run.layout, new))  # type: ignore[arg-type]

    def _place(self, name: Any, layer: Any) -> Place:
        place: Place = self._points.place(name, layer, self.generates)
        if (place.module, place.kind) != (self.slot.module, self.slot.kind):
            raise Refused(f"{name} is not where the trace stands")
        return place

    def asked_for_here(self) -> list[tuple[str, Any, Any]]:
        """The names that are asked for at this point and in this step, with their layers and values.

        One that cannot be had is left out: its client asks for it once more, and is told why.
        """
        slot, found = self.slot, {}
        here = [self._points.numbers[slot.module], slot.kind, slot.step]
        for *at, name, layer in self.watched:
            if at == here and name is not None:
                try:
                    found[name, layer] = self.read(name, layer)
                except (NnatomyError, Refused):
                    continue
        return [(*key, value) for key, value in found.items()]

    def progress(self) -> dict[str, Any]:
        """How far it has come since it was last told, with the rows of the step if that is a new one."""
        run, numbers = self._run, self._points.numbers
        progress = run.progress
        told: dict[str, Any] = {"step": progress.step - run.ended}  # the last one, if all are over
        if told["step"] != self._step:
            self._step, self._told = told["step"], {}
            if (layout := run.layout) is not None:
                told["layout"] = [list(one) for one in (layout.requests, layout.starts, layout.lengths, layout.before)]
        calls = {self._points.root: 1} if run.ended else progress.calls
        told["calls"] = [
            [numbers[one], count] for one, count in calls.items() if one in numbers and self._told.get(one) != count
        ]
        self._told = dict(calls)
        told["stack"] = [[numbers[one], call, stage] for one, call, stage in progress.stack if one in numbers]
        return told

    def token_ids(self) -> Any:
        """What this step's tokens are, in one axis; None if the engine calls the model with embeddings."""
        args, kwargs = self._run.inputs
        return kwargs.get("input_ids", args[0] if args else None)
