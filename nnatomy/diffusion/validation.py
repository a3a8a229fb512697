"""What the standard names promise of a pipeline, checked on a small generation of two steps. What is not proven is refused.

1. The pipeline is called as it is; then with everything recorded: the picture is the same, bit for bit. (Reading changes nothing.)
2. The latents that a step begins with are what the scheduler is given as its sample. The prediction that the scheduler is given is
   the denoiser's two predictions by the formula of guidance, u + s (c - u), which tells the halves apart.
3. Latents, timestep and prediction are put back as read, which leaves all as it was, and are changed, which does not.
4. Each block is called again on what it was given (`blocks`).
5. The streams and what the heads give are put back as read in all blocks and steps at once, and the picture is the same, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.core.points import Slot
from nnatomy.diffusion.accessors import Accessor, At
from nnatomy.diffusion.anatomy import (
    Layer,
    find_blocks,
    inside,
    is_attention,
    layers_of,
    modulations,
    stream_at,
    timestep_argument,
)
from nnatomy.diffusion.arguments import GUIDANCE, STEPS, example
from nnatomy.diffusion.blocks import BlockCheck, classify
from nnatomy.diffusion.halves import Halves
from nnatomy.diffusion.names import OF_LAYERS, OF_STEPS, ROWS, TABLE
from nnatomy.diffusion.recording import Recorder, tensor_of
from nnatomy.errors import InputError, UnknownArchitectureError, a_kind
from nnatomy.validation.near import TOLERANCE, distance, is_same
from nnatomy.validation.report import Findings, Place, Report, Row

#: The names that are put back as read in all blocks at once, in the order in which a block computes them.
_BACK = (
    *("layers_input", "image_layers_input", "text_layers_input", "heads_output", "cross_heads_output"),
    *("layers_output", "image_layers_output", "text_layers_output"),
)


class Validation:
    """The checks of one pipeline, as they go.

    Attributes:
        layers: the denoiser's blocks.
        accessors: by name.
        refused: by place, why.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers: list[Layer] = []
        self.accessors: dict[str, Accessor] = {}
        self.refused: dict[Place, str] = {}
        self.halves = Halves("none")
        self.findings = Findings()
        self._given = example(model.pipeline, model.denoiser)
        self._recorded: Recorder | None = None
        self._image = torch.zeros(())
        self._total: int | None = None

    # Finding.

    def read(self) -> None:
        """Run the pipeline with everything recorded, and find the blocks and where each name is on them."""
        model = self.model
        blocks = find_blocks(model.denoiser)
        attentions = [one for block in blocks for one in block.modules() if is_attention(one)]
        modules = [model.denoiser, model._whole.begin, model._whole.scheduler, *blocks, *attentions]
        recorder = Recorder(modules)
        try:
            self._image = self._run(lambda run: run.collect(recorder))
        except ValueError:  # some take no pictures as small as that
            if "height" not in self._given:
                raise
            self._given["height"] = self._given["width"] = -(-self._given["height"] // 32) * 32
            recorder = Recorder(modules)
            self._image = self._run(lambda run: run.collect(recorder))
        recorder.close()
        self._recorded = recorder
        if not recorder.all_of(model._whole.scheduler):
            raise UnknownArchitectureError(
                f"{type(model.pipeline).__name__} is not supported: it makes its latents without its scheduler's `step`."
            )
        in_blocks = set(blocks)
        first = [one for one in recorder.calls if one.module in in_blocks and (one.step, one.number) == (0, 0)]
        self.layers = layers_of(first)
        calls = len([one for one in recorder.all_of(model.denoiser) if one.step == 0])
        taps: dict[Module, Any] = {}
        with self._quiet():
            for layer in self.layers:
                classify(layer, taps)
        tables = [self._places(layer, taps) for layer in self.layers]
        for i, layer in enumerate(self.layers):
            times = len([one for one in recorder.all_of(layer.module) if one.step == 0])
            if times != calls:
                why = f"the denoiser calls the block {times} times, so that no call is the layer's"
                tables[i] = dict.fromkeys(OF_LAYERS, why)
        for name in OF_LAYERS:
            places = [table[name] for table in tables]
            self.accessors[name] = Accessor(ROWS[name], places, model._blocks, self.halves)

    def _places(self, layer: Layer, taps: dict[Module, Any]) -> dict[str, At | str]:
        found: dict[str, At | str] = {}
        two = layer.has_two or (layer.text_argument is not None and len(layer.call.outputs) > 1)
        for end in ("input", "output"):
            image, text = stream_at(layer, "image", end), stream_at(layer, "text", end)
            both = f"the block has two streams: image_layers_{end}[i] and text_layers_{end}[i]"
            found[f"layers_{end}"] = both if two else image
            found[f"image_layers_{end}"] = (
                image
                if two or self._is_of_picture(layer)
                else (f"picture and text are in one stream, or nothing shows whose it is: layers_{end}[i]")
            )
            found[f"text_layers_{end}"] = text if two else "the block has one stream"
        for row in TABLE:
            if row.place == "attention":
                module = layer.attention if row.part == "attentions" else layer.cross
                found[row.name] = module if isinstance(module, str) else inside(module, row.kind, taps)
        found["modulation"], found["text_modulation"] = modulations(layer, taps)
        return found

    def _is_of_picture(self, layer: Layer) -> bool:
        """Whether a block's one stream is the picture's alone: the text comes to it by a cross-attention, or there is none."""
        return not isinstance(layer.cross, str) or "prompt" not in self._given

    def _denoiser_given(self) -> dict[str, Any]:
        assert self._recorded is not None
        given = self._recorded.of(self.model.denoiser).arguments
        return {name: value for name, value in given.items() if value is not None}

    # Checking.

    def check(self) -> None:
        """Prove all names, or refuse them."""
        with self._quiet():
            if not is_same(self._plain(), self._plain()):
                raise UnknownArchitectureError(
                    f"{type(self.model.pipeline).__name__} gives another picture for the same generator, so that nothing about it "
                    "can be proven."
                )
            if not is_same(self._plain(), self._image):
                raise UnknownArchitectureError(
                    f"{type(self.model.pipeline).__name__} gives another picture when it is read."
                )
            self._check_halves()
            self._check_steps()
            self._check_blocks()
            self._check_all_at_once()

    def _check_halves(self) -> None:
        recorded = self._recorded
        assert recorded is not None
        calls = [tensor_of(one.output) for one in recorded.all_of(self.model.denoiser) if one.step == 0]
        noise = recorded.of(self.model._whole.scheduler).arguments["model_output"]
        images = 1
        how: Any = "none"
        if len(calls) == 1 and len(calls[0]) == 2 * images:
            how, (one, other) = "rows", calls[0].chunk(2)
        elif len(calls) == 2 and len(calls[0]) == images:
            how, (one, other) = "calls", calls
        if how == "none":
            why = "nothing shows a prediction with the prompt and one without, or it has no guidance"
            self.halves = Halves("none", why_not=why)
            return
        noise = noise[:images]
        if one.numel() == noise.numel():
            one, other = one.reshape(noise.shape), other.reshape(noise.shape)
        if one.ndim == noise.ndim and one.shape[1] > noise.shape[1]:  # learned variances behind the prediction
            one, other = one[:, : noise.shape[1]], other[:, : noise.shape[1]]
        tolerance = TOLERANCE.get(noise.dtype, 1e-4)
        # (Some denoisers give the prediction with the other sign, which their pipelines turn.)
        off = [
            min(distance(guided, sign * noise) for guided in _guided(u, c) for sign in (1, -1))
            for u, c in ((one, other), (other, one))
        ]
        if min(off) > tolerance or max(off) <= tolerance:
            self.halves = Halves(
                "none", why_not=f"the scheduler is not given u + s (c - u), off by {min(off):.1e} (relative)"
            )
            return
        first_is_without = off[0] <= tolerance
        order: Any = ("unconditional", "conditional") if first_is_without else ("conditional", "unconditional")
        self.halves = Halves(how, order)
        self.findings.expect(True, "noise_prediction", None, "", min(off))

    def _check_steps(self) -> None:
        model, recorded = self.model, self._recorded
        assert recorded is not None
        if self._total != len(recorded.all_of(model._whole.scheduler)):
            self.refused["steps", None] = f"{self._total} were foreseen, and the scheduler is called for others"
        begun = [one.output for one in recorded.all_of(model._whole.begin)]
        samples = [one.arguments["sample"] for one in recorded.all_of(model._whole.scheduler)]
        for latents, sample in zip(begun, samples, strict=False):
            if latents is not None and not is_same(latents, sample):
                self.refused["latents", None] = (
                    "the scheduler is given other latents than those that the step begins with"
                )
        if timestep_argument(model.denoiser) not in self._denoiser_given():
            self.refused["timestep", None] = "the denoiser is given none by that name"
        # The second step, if there is one: what a pipeline draws inside its call shows there too.
        step = min(len(samples), STEPS) - 1
        changes: dict[str, Callable[[Any], Any]] = {
            "latents": torch.zeros_like,
            "timestep": lambda t: t + (0.37 if t.is_floating_point() and t.max() <= 1 else 37),
            "noise_prediction": torch.zeros_like,
        }
        for name, change in changes.items():
            if (name, None) in self.refused:
                continue
            half = "conditional" if name == "timestep" and self.halves.how == "calls" else None
            try:
                same = self._edited(step, name, half, lambda value: value.clone())
                other = self._edited(step, name, half, change)
            except InputError as error:  # there are several calls of the denoiser, and nobody knows which is which
                self.refused[name, None] = str(error).rstrip(".")
                continue
            if not is_same(same, self._image):
                self.refused[name, None] = "put back as read, it changes the picture"
            elif is_same(other, self._image):
                self.refused[name, None] = "another value in its place changes nothing"

    def _edited(self, step: int, name: str, half: Any, change: Callable[[Any], Any]) -> Tensor:
        from nnatomy.diffusion.steps import HalfView

        model = self.model
        model.halves = self.halves
        view = model if half is None else HalfView(model, half)

        def block(tracer: Any) -> None:
            for _ in tracer.iter[step]:
                value = getattr(view, name)
                setattr(view, name, change(value if isinstance(value, Tensor) else torch.as_tensor(value)))

        return self._run(block=block)

    def _check_blocks(self) -> None:
        for i, layer in enumerate(self.layers):
            following = self.layers[i + 1] if i + 1 < len(self.layers) else None
            places = {name: accessor.places[i] for name, accessor in self.accessors.items()}
            check = BlockCheck(layer, following, {name: one for name, one in places.items() if isinstance(one, At)})
            check.run()
            for name, error in check.errors.items():
                self.findings.errors[name, i] = error
            for name, why in check.refused.items():
                self.accessors[name].refuse(i, why)

    def _check_all_at_once(self) -> None:
        def block(tracer: Any) -> None:
            for _ in tracer.iter[:]:
                for i in range(len(self.layers)):
                    for name in _BACK:
                        place = self.accessors[name].places[i]
                        if isinstance(place, At):
                            slot: Slot = tracer.block.reach(place.module, place.kind, name, 0, place.tap)
                            slot.value = place.put(slot.value, place.get(slot.value).clone())

        if not is_same(self._run(block=block), self._image):
            for name in _BACK:
                for i in self.accessors[name].layers:
                    self.accessors[name].refuse(i, "put back as read in all blocks at once, the picture is another one")

    # Running.

    def _call(self) -> dict[str, Any]:
        given = dict(self._given)
        if "generator" in given:
            given["generator"] = torch.Generator().manual_seed(0)
        return given

    def _plain(self) -> Tensor:
        """The picture without any of this library: of a copy, so that the scheduler of the user's pipeline stays as it is."""
        pipeline = copy.copy(self.model.pipeline)
        pipeline.__dict__["scheduler"] = copy.deepcopy(pipeline.scheduler)
        return _picture(pipeline(**self._call()))

    def _run(self, prepare: Any = None, block: Any = None) -> Tensor:
        """The picture of a traced run."""
        with self._quiet(), self.model._open(self._call(), 1, False) as tracer:
            if prepare is not None:
                prepare(tracer.block.run)
            if block is not None:
                block(tracer)
            result = tracer.result
            self._total = tracer._stage.total
        return _picture(result)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without gradients, dropout and a bar over the steps."""
        pipeline = self.model.pipeline
        before = pipeline.__dict__.get("_progress_bar_config")
        training = [module for module in self.model.module.modules() if module.training]
        for module in training:
            module.training = False
        pipeline.__dict__["_progress_bar_config"] = {**(before or {}), "disable": True}
        try:
            with torch.no_grad():
                yield
        finally:
            pipeline.__dict__.pop("_progress_bar_config")
            if before is not None:
                pipeline.__dict__["_progress_bar_config"] = before
            for module in training:
                module.training = True

    # Reporting.

    def report(self) -> Report:
        """What was found, of each name on each layer."""
        rows = [
            Row(name, None, "refused" if (name, None) in self.refused else "verified", self._error(name), why)
            for name in OF_STEPS
            for why in [self.refused.get((name, None), "")]
        ]
        rows += [self._half_row(half) for half in ("conditional", "unconditional")]
        for name, accessor in self.accessors.items():
            for i, place in enumerate(accessor.places):
                refused = isinstance(place, str)
                why = str(place) if refused else ""
                error = None if refused else self._error(name, i)
                rows.append(Row(name, i, "refused" if refused else "verified", error, why))
        return Report(type(self.model.pipeline).__name__, rows)

    def _half_row(self, half: Any) -> Row:
        known = self.halves.how != "none"
        detail = {"rows": "rows of one batch", "calls": "a call of its own in each step"}.get(self.halves.how, "")
        return Row(half, None, "verified" if known else "refused", None, detail or self.halves.why_not)

    def _error(self, name: str, layer: int | None = None) -> float | None:
        return self.findings.errors.get((name, layer))


def unverified(found: Validation) -> Report:
    """A report of names that nobody has checked."""
    rows = [Row(name, None, "unverified", None, "") for name in OF_STEPS]
    for name, accessor in found.accessors.items():
        for i, place in enumerate(accessor.places):
            refused = isinstance(place, str)
            rows.append(Row(name, i, "refused" if refused else "unverified", None, str(place) if refused else ""))
    return Report(type(found.model.pipeline).__name__, rows)


def _picture(result: Any) -> Tensor:
    """The picture, or the latents, in what a pipeline gives."""
    images = next(iter(result.values())) if isinstance(result, dict) else result[0]
    if not isinstance(images, Tensor):
        raise InputError(
            f"The pipeline gives {a_kind(images)} where latents were asked for, so nothing can be compared."
        )
    return images


def _guided(without: Tensor, prompted: Tensor) -> Iterator[Tensor]:
    """What guidance makes of the two predictions, in the ways that pipelines write it: u + s (c - u) or c + s (c - u), as that is or
    with the length of c at each position (Qwen-Image)."""
    for scale in (GUIDANCE, GUIDANCE + 1):
        guided = without + scale * (prompted - without)
        yield guided
        yield guided * (prompted.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
