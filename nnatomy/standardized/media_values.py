"""What a model makes of images, videos and sound, by names of a trace: the encoder's layers, what projects their output, what enters
the stream. `tower.py` finds the modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn import Module

from nnatomy.core import Slot
from nnatomy.errors import LayerIndexError, NotInThisModelError
from nnatomy.standardized.accessors import check_fits, one_for_each
from nnatomy.standardized.media_kinds import AUDIO, IMAGE, VIDEO, Kind, place_token, token_ids
from nnatomy.standardized.prompt_trace import RootInputs
from nnatomy.standardized.tower import Tower, find_tower
from nnatomy.standardized.values import Values
from nnatomy.standardized.watched import watcher
from nnatomy.tracing.attach import first_tensor, with_first_tensor
from nnatomy.whole_number import whole_number


class EncoderLayers:
    """`model.vision_layers_output[i]`, `model.audio_layers_output[i]`: what a layer of the encoder gives, in the encoder's own axes.

    Can be assigned.
    """

    def __init__(self, model: Any, kind: Kind) -> None:
        self._model, self._kind, self._name = model, kind, kind.names[1]
        self._layers, self._why = model._tower(kind).layers, model._tower(kind).no_layers

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, layer: int | slice) -> Any:
        if isinstance(layer, slice):
            return [self[i] for i in range(len(self))[layer]]
        return first_tensor(self._slot(layer).value)

    def __setitem__(self, layer: int | slice, value: Any) -> None:
        if isinstance(layer, slice):
            for i, one in one_for_each(self._name, layer, len(self), value):
                self[i] = one
            return
        slot = self._slot(layer)
        slot.value = _with_first(f"{self._name}[{layer}]", slot.value, value)

    def _slot(self, layer: int) -> Slot:
        if not self._layers:
            raise NotInThisModelError(f"{self._name}: {self._why}")
        try:
            layer = whole_number(layer)
        except TypeError:
            raise LayerIndexError(f"{self._name}[{layer!r}]: layers are counted, 0 to {len(self) - 1}.") from None
        if not -len(self) <= layer < len(self):
            raise LayerIndexError(
                f"The {self._name.partition('_')[0]} encoder has layers 0 to {len(self) - 1}, so no {layer}."
            )
        name = f"{self._name}[{layer}]"
        self._model._refuse_both(self._kind, name)
        return _reach(self._model, self._layers[layer], name)


def _layers(kind: Kind, doc: str) -> Any:
    def read(self: MediaValues) -> EncoderLayers:
        return EncoderLayers(self, kind)

    return property(read, doc=doc)


def _projected(kind: Kind, doc: str) -> Any:
    def read(self: MediaValues) -> Any:
        return first_tensor(self._slot_of_projector(kind).value)

    def put(self: MediaValues, value: Tensor) -> None:
        slot = self._slot_of_projector(kind)
        slot.value = _with_first(kind.names[2], slot.value, value)

    return property(read, put, doc=doc)


def _entering(kind: Kind, doc: str) -> Any:
    def read(self: MediaValues) -> Tensor:
        return self._embeddings(kind)

    def put(self: MediaValues, value: Tensor) -> None:
        self._put_embeddings(kind, value)

    return property(read, put, doc=doc)


class MediaValues(Values):
    """A model with the names of what it makes of images, videos and sound."""

    _processor: Any = None

    image_embeddings: Tensor = _entering(
        IMAGE,
        "(token, hidden): what enters the residual stream at the images' positions, in the order of prompts and positions; can be "
        "assigned.",
    )
    video_embeddings: Tensor = _entering(VIDEO, "(token, hidden): the same at the videos' positions; can be assigned.")
    audio_embeddings: Tensor = _entering(AUDIO, "(token, hidden): the same at the sounds' positions; can be assigned.")
    vision_layers_output: EncoderLayers = _layers(IMAGE, "What each layer of the encoder of images and videos gives.")
    audio_layers_output: EncoderLayers = _layers(AUDIO, "What each layer of the encoder of sound gives.")
    projector_output: Tensor = _projected(
        IMAGE,
        "The images' patches as the language model is given them, in the shape that the module gives; can be assigned.",
    )
    audio_projector_output: Tensor = _projected(
        AUDIO, "The sounds as the language model is given them, in the shape that the module gives; can be assigned."
    )

    def _slot_of_projector(self, kind: Kind) -> Slot:
        name = kind.names[2]
        if (module := self._tower(kind).projector) is None:
            raise NotInThisModelError(f"{name}: {self._tower(kind).no_projector}")
        self._refuse_both(kind, name)
        return _reach(self, module, name)

    def _embeddings(self, kind: Kind) -> Tensor:
        _refuse_to_be_watched(kind.names[0])
        slot, places = self._slot_of_stream(kind)
        return slot.value[1]["inputs_embeds"][
            places.nonzero(as_tuple=True)
        ]  # (of a mask a scan would not know how many)

    def _put_embeddings(self, kind: Kind, value: Tensor) -> None:
        name = kind.names[0]
        slot, places = self._slot_of_stream(kind)
        args, kwargs = slot.value
        embeds = kwargs["inputs_embeds"]
        check_fits(name, embeds[places], value)
        slot.value = args, {**kwargs, "inputs_embeds": embeds.masked_scatter(places[..., None], value)}

    def _slot_of_stream(self, kind: Kind) -> tuple[Slot, Tensor]:
        """Where the module that runs the layers is called, and which positions are of that kind."""
        name, candidates = kind.names[0], token_ids(self, kind)
        arguments, _ = self._root_inputs(name)
        ids = self.input_ids
        both = kind is not AUDIO and self._both(name)
        slot = _reach(self, self._keywords._above_the_layers()[-1], name, "input")
        if not isinstance(slot.value[1].get("inputs_embeds"), Tensor):
            raise NotInThisModelError(f"{name}: the module that runs the layers is given no inputs_embeds.")
        encoded = arguments.get("mm_encoder_outputs") or {}  # what `generate` itself has had encoded
        of_kind, called = kind.inputs, {kind.name, kind.modality}
        if kind is VIDEO and self._prompts.reads("pixel_values_videos"):  # images have their own
            of_kind, called = frozenset({"pixel_values_videos"}), {kind.name}
        elif kind is VIDEO and self._processor is not None and not place_token(self._processor, VIDEO):
            raise NotInThisModelError(f"{name}: the model reads no videos.")
        # A later step of a generation has none, whatever token it begins with.
        given = any(arguments.get(argument) is not None for argument in of_kind) or bool(
            called & {modality for modality, one in encoded.items() if one is not None}
        )
        of_videos = token_ids(self, VIDEO)[0] if kind is not AUDIO else -1
        if both and not (ids == of_videos).any():
            raise NotInThisModelError(
                f"{name}: the prompt has images and videos, and one token stands for patches of both. Read "
                "layers_input[0] at the positions."
            )
        places = next((one for one in (ids == token for token in candidates) if one.any()), ids == candidates[0])
        return slot, places & given

    def _refuse_both(self, kind: Kind, name: str) -> None:
        """An encoder that reads images in one call and videos in another has no one value."""
        if kind is AUDIO:
            return
        if self._both(name):
            raise NotInThisModelError(
                f"{name}: the prompt has images and videos, and the vision encoder reads them in a call each. Read the calls "
                "under the module's own name: model.path.to.module.calls[k].output."
            )

    def _both(self, name: str) -> bool:
        """Whether the prompts have images and videos, where `name` is asked for."""
        recorded = next((c for c in self._blocks.current(name).run.collectors if isinstance(c, RootInputs)), None)
        if recorded is None:  # a scan
            arguments, _ = self._root_inputs(name)
            media = {name for name, value in arguments.items() if value is not None}
        else:
            media = {*recorded.given.media}
        return media >= {"pixel_values", "pixel_values_videos"}

    def _tower(self, kind: Kind) -> Tower:
        towers: dict[Kind, Tower] = self.__dict__.setdefault("_towers", {})
        if kind not in towers:
            towers[kind] = find_tower(self, kind)
        return towers[kind]


def _with_first(name: str, value: Any, new: Tensor) -> Any:
    check_fits(name, first_tensor(value), new)
    return with_first_tensor(value, new)


def _reach(model: Any, module: Module, name: str, kind: str = "output") -> Slot:
    _refuse_to_be_watched(name)
    block = model._blocks.current(name)
    return block.reach(module, kind, name)


def _refuse_to_be_watched(name: str) -> None:
    if (one := watcher.get()) is not None:
        one.refuse(f"{name} is of an image, and a plan has none")
