"""The vision side of a model that reads images, by names of a trace: its layers, what projects their output, what enters the stream.

Which modules these are is found by running the model on one picture of noise: the layers are the list of modules in the vision
encoder of which each is called once, and is given what the one before gives, bit for bit; the projector is the module
whose output is what stands at the image's positions in the stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module, ModuleList

from nnatomy.core import Slot
from nnatomy.errors import AssignmentError, InputError, LayerIndexError, NotInThisModelError
from nnatomy.standardized.image_tokens import ImageTokens, image_token_id, places_of_images, vision_encoder
from nnatomy.standardized.keywords import PIXELS
from nnatomy.standardized.media import image_token, images_alone, load_processor
from nnatomy.standardized.values import Values
from nnatomy.standardized.watched import watcher
from nnatomy.tracing.attach import first_tensor, with_first_tensor


@dataclass(frozen=True)
class Tower:
    """The modules of the vision side; or why they are not known."""

    layers: tuple[Module, ...] = ()
    projector: Module | None = None
    no_layers: str = ""
    no_projector: str = ""


class VisionLayers:
    """`model.vision_layers_output[i]`: what a layer of the vision encoder gives, in the encoder's own axes. Can be assigned."""

    def __init__(self, model: Any, layers: tuple[Module, ...], why: str) -> None:
        self._model, self._layers, self._why = model, layers, why

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, layer: int | slice) -> Any:
        if isinstance(layer, slice):
            return [self[i] for i in range(len(self))[layer]]
        return first_tensor(self._slot(layer).value)

    def __setitem__(self, layer: int, value: Tensor) -> None:
        slot = self._slot(layer)
        slot.value = _with_first(f"vision_layers_output[{layer}]", slot.value, value)

    def _slot(self, layer: int) -> Slot:
        if not self._layers:
            raise NotInThisModelError(f"vision_layers_output: {self._why}")
        if not -len(self) <= layer < len(self):
            raise LayerIndexError(f"The vision encoder has layers 0 to {len(self) - 1}, so no {layer}.")
        return _reach(self._model, self._layers[layer], f"vision_layers_output[{layer}]")


class Vision(Values):
    """A model with the names of its vision side, where it has one and a processor reads images for it."""

    _processor: Any = None
    _processor_options: Mapping[str, Any] = MappingProxyType({})

    @property
    def processor(self) -> Any:
        """What reads images, videos and sound for the model, as AutoProcessor gives; of a model given by its id, loaded when needed.

        Raises:
            InputError: if there is none.
        """
        if self._processor is None:
            self._processor = load_processor(self._name, self._processor_options)
        return self._processor

    @processor.setter
    def processor(self, processor: Any) -> None:
        self._processor = processor
        self.__dict__.pop("_found_tower", None)

    def image_tokens(self, prompts: Any, images: Any = None) -> list[ImageTokens]:
        """Where the images are in their prompts: which positions are whose image, and which patch each is.

        Args:
            prompts, images: as in `trace`.

        Returns:
            One for each image, in the order of prompts and of the images in them.

        Raises:
            InputError: as `trace`.
            NotInThisModelError: if no positions of a prompt are an image's on this model.

        Example (of a model `vlm` that reads images):
            photo, = vlm.image_tokens("<image> What is this?", images=picture)
            with vlm.trace("<image> What is this?", images=picture):
                patches = vlm.layers_output[5][0, photo.positions].unflatten(0, photo.patch_grid)    # (row, column, hidden)
                corner = vlm.layers_output[5][0, photo.position_of(0, -1)]
        """
        token_id = image_token_id(self)
        inputs = self._prompts.prepare(prompts, {"images": images}, torch.device("cpu"))
        merge = getattr(getattr(self.processor, "image_processor", None), "merge_size", 1)
        alone = images_alone(self.processor, prompts, images)
        return places_of_images(inputs["input_ids"] == token_id, alone, token_id, merge)

    @property
    def image_embeddings(self) -> Float[Tensor, "token hidden"]:
        """What enters the residual stream at the images' positions, in the order of prompts and positions; can be assigned."""
        _refuse_to_be_watched("image_embeddings")
        slot, places = self._slot_of_stream()
        return slot.value[1]["inputs_embeds"][places]

    @image_embeddings.setter
    def image_embeddings(self, value: Tensor) -> None:
        slot, places = self._slot_of_stream()
        args, kwargs = slot.value
        embeds = kwargs["inputs_embeds"]
        _check("image_embeddings", embeds[places], value)
        slot.value = args, {**kwargs, "inputs_embeds": embeds.masked_scatter(places[..., None], value.to(embeds.dtype))}

    @property
    def vision_layers_output(self) -> VisionLayers:
        """What each layer of the vision encoder gives."""
        return VisionLayers(self, self._tower.layers, self._tower.no_layers)

    @property
    def projector_output(self) -> Tensor:
        """The images' patches as the language model is given them, in the shape that the module gives; can be assigned."""
        return first_tensor(self._slot_of_projector().value)

    @projector_output.setter
    def projector_output(self, value: Tensor) -> None:
        slot = self._slot_of_projector()
        slot.value = _with_first("projector_output", slot.value, value)

    def _slot_of_projector(self) -> Slot:
        if (module := self._tower.projector) is None:
            raise NotInThisModelError(f"projector_output: {self._tower.no_projector}")
        return _reach(self, module, "projector_output")

    def _slot_of_stream(self) -> tuple[Slot, Tensor]:
        """Where the module that runs the layers is called, and which positions are images'."""
        token_id = image_token_id(self)
        ids = self.input_ids
        slot = _reach(self, self._keywords._above_the_layers()[-1], "image_embeddings", "input")
        if not isinstance(slot.value[1].get("inputs_embeds"), Tensor):
            raise NotInThisModelError("image_embeddings: the module that runs the layers is given no inputs_embeds.")
        arguments, _ = self._root_inputs("image_embeddings")
        # A later step of a generation has none, whatever token it begins with.
        has_images = any(arguments.get(name) is not None for name in (*PIXELS, "mm_encoder_outputs"))
        return slot, (ids == token_id) & has_images

    @property
    def _tower(self) -> Tower:
        if "_found_tower" not in self.__dict__:
            self._found_tower = find_tower(self)
        return self._found_tower


def find_tower(model: Any) -> Tower:
    """The vision side's modules, by what they give in a pass over a picture of noise."""
    encoder = vision_encoder(model.steps_of)
    if encoder is None:
        why = "the model has no vision encoder."
        return Tower(no_layers=why, no_projector=why)
    processor = model.processor
    draw = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (3, 56, 56), dtype=torch.uint8, generator=draw).numpy().transpose(1, 2, 0)
    try:
        inputs = model.prepare(image_token(processor) + " a", images=[picture])
    except InputError as error:
        why = f"the processor reads no picture of noise, by which it would be found: {error}"
        return Tower(no_layers=why, no_projector=why)
    with torch.no_grad(), model.trace(**inputs) as tracer:
        cache = tracer.cache(include_inputs=True, clone=True)
        entered = model.image_embeddings
    paths = {module: path for path, module in model.module.named_modules()}
    calls = {module: cache[path] for module, path in paths.items() if path in cache}
    chains = [[*one] for one in encoder.modules() if isinstance(one, ModuleList) and _is_stream([*one], calls)]
    layers = max(chains, key=len, default=[])
    projector = None
    for module, made in calls.items():
        holds_layers = any(one in set(module.modules()) for one in model._anatomy.layers)
        if projector is None and not holds_layers and len(made) == 1 and _is(made[0].output, entered):
            projector = module
    return Tower(
        tuple(layers),
        projector,
        "no list of modules in its vision encoder is a chain of layers, each called once on what the one before gives.",
        "no module gives what stands in the stream at an image's positions.",
    )


def _is_stream(modules: list[Module], calls: dict[Module, Any]) -> bool:
    """Whether these are layers: each is called once, and is given what the one before gives."""
    if len(modules) < 2 or any(len(calls.get(one, ())) != 1 for one in modules):
        return False
    made = [calls[one][0] for one in modules]
    return all(
        _same(first_tensor(after.inputs), first_tensor(before.output)) for before, after in itertools.pairwise(made)
    )


def _is(value: Any, entered: Tensor) -> bool:
    first = first_tensor(value) if not isinstance(value, Module) else None
    if not isinstance(first, Tensor) or first.numel() != entered.numel() or first.shape[-1] != entered.shape[-1]:
        return False
    return bool(torch.equal(first.reshape(entered.shape).to(entered.dtype), entered))


def _same(one: Any, other: Any) -> bool:
    return (
        isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    )


def _with_first(name: str, value: Any, new: Tensor) -> Any:
    _check(name, first_tensor(value), new)
    return with_first_tensor(value, new)


def _check(name: str, old: Tensor, new: Any) -> None:
    if not isinstance(new, Tensor) or new.shape != old.shape:
        found = f"of shape {tuple(new.shape)}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
        raise AssignmentError(f"{name} is of shape {tuple(old.shape)}; what was assigned is {found}.")


def _reach(model: Any, module: Module, name: str, kind: str = "output") -> Slot:
    _refuse_to_be_watched(name)
    block = model._blocks.current(name)
    return block.reach(module, kind, name)


def _refuse_to_be_watched(name: str) -> None:
    if (one := watcher.get()) is not None:
        one.refuse(f"{name} is of an image, and a plan has none")
