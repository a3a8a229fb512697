"""`DiffusionTransformer`: a pipeline of diffusers, open to read and edit under standard names, step by step."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch.nn import Module

from nnatomy.diffusion.accessors import Accessor, At
from nnatomy.diffusion.arguments import checked
from nnatomy.diffusion.encoders import encoders_of
from nnatomy.diffusion.halves import Half, Halves, given_to
from nnatomy.diffusion.names import OF_LAYERS, OF_STEPS
from nnatomy.diffusion.stage import Stage, Whole
from nnatomy.diffusion.steps import HalfView, StepNames
from nnatomy.diffusion.trace import DiffusionTrace
from nnatomy.diffusion.validation import Validation, unverified
from nnatomy.errors import (
    AssignmentError,
    InputError,
    LoadError,
    MissingPackageError,
    NoSuchModuleError,
    NotInThisModelError,
    UnknownArchitectureError,
    UsageError,
)
from nnatomy.standardized.pickling import NotPickled
from nnatomy.tracing import ModuleView, Traceable
from nnatomy.validation.report import Report

#: What the module that predicts the noise is called in a pipeline.
_DENOISERS = ("unet", "transformer")


class DiffusionTransformer(NotPickled, StepNames, Traceable):
    """A diffusion pipeline whose denoiser is open under the same names, whatever its architecture.

    `docs/diffusion.md` has the names, and what a step and a half of guidance are.

    Args:
        pipeline: a pipeline of diffusers, or its hub id or folder. It is not changed by anything that is done here.
        validate: prove every name on a small generation of two steps. What cannot be proven is refused, with the reason. With
            False names are found and nothing is checked.
        **kwargs: go to `DiffusionPipeline.from_pretrained`.

    Raises:
        MissingPackageError: if diffusers is not installed.
        LoadError: if the pipeline cannot be loaded.
        InputError: for what is no pipeline, or has no scheduler.
        UnknownArchitectureError: for a pipeline that is not supported; it says why.

    Attributes:
        pipeline: the pipeline.
        denoiser: the module that predicts the noise.
        halves: how its guidance is computed (`nnatomy.diffusion.halves.Halves`).
        validation: a table of each name on each layer: verified or refused, with errors and reasons. (Each text encoder, which has
            the standard names of a transformer of its own, has one as well: `model.text_encoder.validation`.)
    """

    #: What a method of language models that is given one says.
    instead_in_methods = "of a language model; nnatomy.diffusion has methods for pipelines"

    def __init__(self, pipeline: Any, *, validate: bool = True, **kwargs: Any) -> None:
        pipeline = _loaded(pipeline, kwargs)
        denoiser = _denoiser(pipeline, pipeline.components)
        super().__init__(Whole(pipeline.components))
        self.pipeline = pipeline
        self.denoiser = denoiser
        self.steps_of = self._whole.begin
        self.halves = Halves("none", why_not="nothing was checked")
        self._refused = {}
        self._encoders = encoders_of(pipeline.components, self._blocks, validate)
        self._read(validate)

    def _read(self, validate: bool) -> None:
        found = Validation(self)
        found.read()
        self._layers = found.layers
        for name in OF_LAYERS:
            setattr(self, name, found.accessors[name])
        if validate:
            found.check()
        self.validation: Report = found.report() if validate else unverified(found)
        self.halves = found.halves
        for accessor in found.accessors.values():
            accessor._halves = found.halves
        self._refused = {name: why for (name, layer), why in found.refused.items() if layer is None}

    # Running.

    def generate(self, prompt: Any = None, *, early_stop: bool = True, **kwargs: Any) -> DiffusionTrace:
        """Trace a generation: `with model.generate(prompt, num_inference_steps=20) as tracer: ...`.

        In `for step in tracer.iter[:]` names mean that step; outside of such a loop the first one. The text encoders' calls belong
        to the first step, before the loop; the calls of what decodes the latents to the last. `tracer.result` is what the pipeline
        returns: `tracer.result.images[0]`. `model.generate(...).run()` generates with no block.

        Args:
            prompt: a text or a list of texts; for a pipeline of classes a list of their numbers.
            early_stop: end the generation when the block ends; with False it runs to its end.
            **kwargs: go to the pipeline: num_inference_steps, guidance_scale, generator, height, ...

        Raises:
            InputError: for what the pipeline does not take, a missing prompt, a picture of a wrong mode, no scheduler.
        """
        given, images = checked(self.pipeline, prompt, kwargs)
        return self._open(given, images, early_stop)

    def _open(self, given: dict[str, Any], images: int, early_stop: bool) -> DiffusionTrace:
        _check_scheduler(self.pipeline)
        return DiffusionTrace(
            self, Stage(self.pipeline, self._whole, self.denoiser), given, images, early_stop=early_stop
        )

    def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
        """What the pipeline gives, with the lasting edits if there are any."""
        return self.generate(prompt, **kwargs).run()

    def trace(self, *_: Any, **__: Any) -> Any:
        """Raises UsageError: a pipeline is run by `generate`."""
        raise UsageError(
            "A pipeline has no single forward pass: trace its steps, `with model.generate(prompt, num_inference_steps=4) as "
            "tracer: ...`. A trace of the denoiser alone: nnatomy.Traceable(model.denoiser).trace(...)."
        )

    scan = trace

    # Names.

    @property
    def conditional(self) -> HalfView:
        """Every name, of what the denoiser computes with the prompt: `model.conditional.layers_output[3]`."""
        return HalfView(self, "conditional")

    @property
    def unconditional(self) -> HalfView:
        """Every name, of what the denoiser computes without the prompt (or with the negative one)."""
        return HalfView(self, "unconditional")

    @property
    def num_layers(self) -> int:
        """How many blocks the denoiser has."""
        return len(self._layers)

    @property
    def streams(self) -> tuple[At, At] | None:
        """Where the streams of the picture and of the text are before the first block that has both."""
        if "text_layers_input" in self.__dict__ and (layers := self.text_layers_input.layers):
            return self.image_layers_input.at(layers[0]), self.text_layers_input.at(layers[0])
        return None

    @property
    def layers(self) -> list[ModuleView]:
        """The blocks of the denoiser, as views, in the order in which it calls them."""
        paths = {module: path for path, module in self.module.named_modules()}
        return [self[paths[layer.module]] for layer in self._layers]

    def text_first(self, layer: int) -> bool | None:
        """Whether the text's keys come before the picture's in that layer's attention; None where it is not of both."""
        return self._layers[layer].text_first if layer in self.attention_probabilities.layers else None

    def text_tokens(self, layer: int) -> slice:
        return self._text_tokens(layer, None)

    text_tokens.__doc__ = StepNames.text_tokens.__doc__

    def _text_tokens(self, layer: int, half: Half | None) -> slice:
        self.attention_probabilities.at(layer)
        first = self.text_first(layer)
        if first is None:
            raise NotInThisModelError(
                f"text_tokens({layer}): the block's attention is not of picture and text jointly."
            )
        block, call = self._blocks.current("text_tokens"), self.halves.call(half)
        given = given_to(block.run)
        if half is None:
            given.whole_text = f"text_tokens({layer})"
        if (block.step, call) not in given.lengths:
            assert self.streams is not None
            place = self.streams[0]
            given.take(block.reach(place.module, place.kind, f"text_tokens({layer})", call))
        given.check_text(block.step)
        image, text = given.lengths[block.step, call]
        return slice(0, text) if first else slice(image, image + text)

    @property
    def _whole(self) -> Whole:
        whole = self.module
        assert isinstance(whole, Whole)
        return whole

    def _child(self, name: str) -> Any:
        return self._encoders.get(name) or super()._child(name)

    def _no_such(self, name: str) -> NoSuchModuleError:
        error = super()._no_such(name)
        return NoSuchModuleError(f"{error} The standard names are {', '.join((*OF_STEPS, *OF_LAYERS))}.")

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AssignmentError for a name that is one for each layer; NoSuchModuleError for none, in a trace."""
        known = self.__dict__.get(name)
        if isinstance(known, Accessor) and not isinstance(value, Accessor):
            raise AssignmentError(f"{name} is one for each layer: assign {name}[i] = ..., or {name}[:] = [one, ...].")
        if not (name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)):
            blocks = getattr(self, "_blocks", None)
            if blocks is not None and blocks.is_open_here:
                raise self._no_such(name)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<DiffusionTransformer of {type(self.pipeline).__name__}: {self.num_layers} layers>"


def _loaded(pipeline: Any, kwargs: dict[str, Any]) -> Any:
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise MissingPackageError('Pipelines need diffusers: pip install "nnatomy[diffusion]".') from None
    if isinstance(pipeline, (str, Path)):
        try:
            return DiffusionPipeline.from_pretrained(str(pipeline), **kwargs)
        except (OSError, ValueError, ImportError) as error:
            raise LoadError(f"The pipeline {str(pipeline)!r} could not be loaded: {error}") from error
    if not isinstance(pipeline, DiffusionPipeline):
        hint = ""
        if isinstance(pipeline, Module):
            hint = (
                " To look into a denoiser alone, take nnatomy.Traceable(module); of a language model, "
                "StandardizedTransformer."
            )
        raise InputError(f"{type(pipeline).__name__} is no pipeline of diffusers: give one, or its id or folder.{hint}")
    if kwargs:
        raise InputError(f"{', '.join(kwargs)}: arguments of from_pretrained, but the pipeline is already loaded.")
    return pipeline


def _denoiser(pipeline: Any, components: dict[str, Any]) -> Module:
    name = type(pipeline).__name__
    _check_scheduler(pipeline)
    found = [one for one in _DENOISERS if isinstance(components.get(one), Module)]
    others = [
        key
        for key, one in components.items()
        if isinstance(one, Module) and key not in found and key.startswith((*_DENOISERS, "prior", "decoder"))
    ]
    if len(found) != 1 or others:
        has = ", ".join([*found, *others]) or ", ".join(components)
        raise UnknownArchitectureError(
            f"{name} is not supported: a pipeline has one denoiser, its `unet` or its `transformer`; this one has {has}. "
            "docs/diffusion.md lists the pipelines that are. Any module can be looked into with nnatomy.Traceable(module)."
        )
    takes = inspect.signature(getattr(components["scheduler"], "step", str)).parameters
    if not {"model_output", "timestep", "sample"} <= {*takes}:
        raise UnknownArchitectureError(
            f"{name} is not supported: its {type(components['scheduler']).__name__} has no step(model_output, timestep, sample)."
        )
    return components[found[0]]


def _check_scheduler(pipeline: Any) -> None:
    if getattr(pipeline, "scheduler", None) is None:
        raise InputError(
            f"{type(pipeline).__name__} has no scheduler, which makes each step's latents of the prediction: give it one, "
            "pipeline.scheduler = diffusers.DDIMScheduler(), or the one that the model was trained with."
        )
