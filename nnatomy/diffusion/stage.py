"""A pipeline's call, arranged for one run: its modules under one root, its scheduler's step and its latents as calls of modules.

The user's pipeline is not touched. A run calls a shallow copy of it, whose scheduler is a copy too; on these, `prepare_latents` and
`scheduler.step` go by way of two modules that compute nothing of their own, so that the latents a step begins with, and what the
scheduler is given and gives, are points as any other.

A step begins when its latents are there (the call of `Latents`, which is the root whose calls are the steps), and ends behind the
scheduler's. So all calls of the denoiser that one step takes are in it. The last step does not end: what decodes its latents
belongs to it, as what encodes the prompt belongs to the first.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import partial, wraps
from threading import get_ident
from typing import Any

from torch import Tensor
from torch.nn import Module

from nnatomy.core.gates import runs
from nnatomy.core.points import Collector, Slot
from nnatomy.errors import InputError, ModelError, a_kind


class Latents(Module):
    """Called with the latents that a step begins with. None where the pipeline does not show them."""

    def forward(self, latents: Any) -> Any:
        return latents


class SchedulerStep(Module):
    """A step of the scheduler, as a module: `model_output`, `timestep` and `sample`, by name; gives what `scheduler.step` gives."""

    def forward(self, *, step: Any, **given: Any) -> Any:
        return step(**given)


class Whole(Module):
    """All modules of a pipeline. Its call is the pipeline's."""

    def __init__(self, components: Mapping[str, Any]) -> None:
        super().__init__()
        for name, component in components.items():
            if isinstance(component, Module):
                self.add_module(name, component)
        self.begin = Latents()
        self.scheduler = SchedulerStep()

    def forward(self, call: Any) -> Any:
        return call()


def latents_of(result: Any) -> Any:
    """The latents in what `scheduler.step` or `prepare_latents` gives."""
    if isinstance(result, Tensor) or result is None:
        return result
    return result["prev_sample"] if isinstance(result, Mapping) else result[0]


def with_latents(result: Any, latents: Any) -> Any:
    """The same, with other latents."""
    if isinstance(result, Tensor):
        return latents
    if isinstance(result, Mapping):
        return type(result)(**{**result, "prev_sample": latents})
    return type(result)((latents, *result[1:]))


class Stage:
    """One call of a pipeline.

    Attributes:
        pipeline: the copy that is called.
        total: how many steps it takes, once the first one has come to its scheduler.
    """

    def __init__(self, pipeline: Any, whole: Whole, denoiser: Module) -> None:
        self.pipeline = copy.copy(pipeline)
        self.scheduler = copy.deepcopy(pipeline.scheduler)
        self.total: int | None = None
        self.count = 0
        # With `strength` or `denoising_end` a pipeline takes a part of the timesteps, after it has set all of them.
        self._takes_part = "strength" in inspect.signature(type(pipeline).__call__).parameters
        self._has_callback = False
        self._behind_step: Any = None  # the latents of a step whose callback has not been called yet
        self._whole = whole
        self._denoiser = denoiser
        self._step = self.scheduler.step
        self._names = list(inspect.signature(self._step).parameters)
        set_timesteps = self.scheduler.set_timesteps
        self.scheduler.set_timesteps = wraps(set_timesteps)(
            lambda *args, **kwargs: self._timed(set_timesteps(*args, **kwargs))
        )
        self._is_timed = False
        self.scheduler.step = wraps(self._step)(lambda *args, **kwargs: self._scheduled(*args, **kwargs))
        attributes = self.pipeline.__dict__
        attributes.pop("_num_timesteps", None)  # of a call before
        attributes["scheduler"] = self.scheduler
        self.prepares = hasattr(pipeline, "prepare_latents")
        if self.prepares:
            prepare = pipeline.prepare_latents.__func__.__get__(self.pipeline)
            attributes["prepare_latents"] = wraps(prepare)(
                lambda *args, **kwargs: self._begun(prepare(*args, **kwargs))
            )

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        """Call the pipeline, in the thread of a run."""
        run = runs[get_ident()]
        if not self.prepares:
            run.replace(_FirstStep(self._denoiser, self._whole))
        self._takes_part = self._takes_part or kwargs.get("denoising_end") is not None
        if (callback := kwargs.get("callback_on_step_end")) is not None:
            self._has_callback = True
            kwargs = {**kwargs, "callback_on_step_end": partial(self._called_back, callback)}
            if hasattr(callback, "tensor_inputs"):  # diffusers' own callbacks say so which tensors they are given
                kwargs["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        return self._whole(lambda: self.pipeline(**kwargs))

    def _timed(self, result: Any) -> Any:
        self._is_timed = True
        return result

    @property
    def steps(self) -> int | None:
        """How many steps the call takes; None before its timesteps are set."""
        if self.total is not None or not self._is_timed:
            return self.total
        known = self.pipeline.__dict__.get("_num_timesteps")
        if known is None and self._takes_part:
            return None
        return int(known or len(self.scheduler.timesteps))

    def _begun(self, result: Any) -> Any:
        latents = latents_of(result)
        shown = self._whole.begin(latents)
        return result if shown is latents else with_latents(result, shown)

    def _scheduled(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.total is not None and self.count > self.total:
            raise ModelError(
                f"{type(self.pipeline).__name__} goes on after the last of the {self.total} timesteps of its "
                f"{type(self.scheduler).__name__}, so that nobody can tell its steps apart."
            )
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if self.total is None:
            self.total = self._count_steps(given["timestep"])
        result = self._whole.scheduler(**given, step=self._step)
        if self.count == self.total:
            return result
        runs[get_ident()].end_step()
        if self._has_callback:  # it may change the latents that the next step begins with
            self._behind_step = latents_of(result)
            return result
        return self._begun(result)

    def _called_back(self, callback: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the user's callback, and begin the next step with the latents that it gives."""
        values = callback(*args, **kwargs)
        if not isinstance(values, Mapping):
            raise InputError(
                f"callback_on_step_end gives {a_kind(values)}, and the pipeline takes a dict of what it changes: return the one that "
                "it is given, or {}."
            )
        if self._behind_step is None:
            return values
        made, self._behind_step = self._behind_step, None
        return {**values, "latents": self._whole.begin(values.get("latents", made))}

    def _count_steps(self, first: Any) -> int:
        known = self.pipeline.__dict__.get("_num_timesteps")
        if known is not None:
            return int(known)
        timesteps = [float(t) for t in self.scheduler.timesteps]
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is None:
            begin = timesteps.index(float(first)) if float(first) in timesteps else 0
        return len(timesteps) - int(begin)


class _FirstStep(Collector):
    """Begins the first step where a pipeline draws its latents itself: at the first call of its denoiser."""

    def __init__(self, denoiser: Module, whole: Whole) -> None:
        self.modules = {denoiser}
        self.kinds = {"input": None}
        self._whole = whole
        self._begun = False

    def take(self, _: Slot) -> None:
        if not self._begun:
            self._begun = True
            self._whole.begin(None)
