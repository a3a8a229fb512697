"""The side of a model that reads images, videos or sound, by names of a trace: the encoder's layers, what projects their output, what
enters the stream. `tower.py` finds the modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from nnatomy.core import Slot
from nnatomy.errors import AssignmentError, LayerIndexError, NotInThisModelError, a_kind
from nnatomy.standardized.image_tokens import ImageTokens, grid_of, picture_seen
from nnatomy.standardized.media import load_processor, media_alone
from nnatomy.standardized.media_kinds import AUDIO, IMAGE, VIDEO, Kind, token_ids
from nnatomy.standardized.media_tokens import AudioTokens, VideoTokens, shared, video_grid
from nnatomy.standardized.prompt_trace import RootInputs
from nnatomy.standardized.tower import Tower, find_tower
from nnatomy.standardized.values import Values
from nnatomy.standardized.watched import watcher
from nnatomy.tracing.attach import first_tensor, with_first_tensor


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

    def __setitem__(self, layer: int, value: Tensor) -> None:
        slot = self._slot(layer)
        slot.value = _with_first(f"{self._name}[{layer}]", slot.value, value)

    def _slot(self, layer: int) -> Slot:
        if not self._layers:
            raise NotInThisModelError(f"{self._name}: {self._why}")
        if not isinstance(layer, SupportsIndex):
            raise LayerIndexError(f"{self._name}[{layer!r}]: layers are counted, 0 to {len(self) - 1}.")
        if not -len(self) <= layer < len(self):
            raise LayerIndexError(
                f"The {self._name.partition('_')[0]} encoder has layers 0 to {len(self) - 1}, so no {layer}."
            )
        name = f"{self._name}[{layer}]"
        self._model._refuse_both(self._kind, name)
        return _reach(self._model, self._layers[layer], name)


class Vision(Values):
    """A model with the names of what reads images, videos and sound, where it has that and a processor reads them for it."""

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
        self.__dict__.pop("_towers", None)

    def image_tokens(self, prompts: Any, images: Any = None, **others: Any) -> list[ImageTokens]:
        """Where the images are in their prompts: which positions are whose image, and which patch each is.

        Args:
            prompts, images: as in `trace`.
            others: `videos` and `audio`, where the prompts have them too.

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
        found = self._places_of(IMAGE, prompts, {**others, "images": images})
        reader = getattr(self.processor, "image_processor", None)
        made = []
        for prompt, i, positions, one, mask in found:
            grid, why = grid_of(one.inputs, getattr(reader, "merge_size", 1), mask)
            picture = None if grid is None else picture_seen(reader, one.inputs, one.given)
            made.append(ImageTokens(prompt, i, positions, grid, why, picture))
        return made

    def video_tokens(self, prompts: Any, videos: Any = None, **others: Any) -> list[VideoTokens]:
        """Where the videos are in their prompts: which positions are whose video, and which patch of which frame each is.

        Args:
            prompts, videos: as in `trace`.
            others: `images` and `audio`, where the prompts have them too.

        Returns:
            One for each video, in the order of prompts and of the videos in them.

        Raises:
            InputError: as `trace`.
            NotInThisModelError: if no positions of a prompt are a video's on this model.

        Example (of a model `vlm` that reads videos):
            clip, = vlm.video_tokens("<video> What happens?", videos=frames)
            with vlm.trace("<video> What happens?", videos=frames):
                patches = vlm.layers_output[5][0, clip.positions].unflatten(0, clip.patch_grid)    # (frame, row, column, hidden)
        """
        found = self._places_of(VIDEO, prompts, {**others, "videos": videos})
        merge = getattr(getattr(self.processor, "video_processor", None), "merge_size", 1)
        return [
            VideoTokens(prompt, i, positions, *video_grid(one.inputs, merge, len(positions)))
            for prompt, i, positions, one, _ in found
        ]

    def audio_tokens(self, prompts: Any, audio: Any = None, **others: Any) -> list[AudioTokens]:
        """Where the sounds are in their prompts: which positions are whose.

        Args:
            prompts, audio: as in `trace`.
            others: `images` and `videos`, where the prompts have them too.

        Returns:
            One for each sound, in the order of prompts and of the sounds in them.

        Raises:
            InputError: as `trace`.
            NotInThisModelError: if no positions of a prompt are a sound's on this model (an encoder-decoder's encoder reads it).

        Example (of a model `listener` that reads sound):
            speech, = listener.audio_tokens("<|AUDIO|> What is said?", audio=samples)
            with listener.trace("<|AUDIO|> What is said?", audio=samples):
                heard = listener.layers_output[5][0, speech.positions]    # (token, hidden)
        """
        return [
            AudioTokens(prompt, i, positions)
            for prompt, i, positions, _, _ in self._places_of(AUDIO, prompts, {**others, "audio": audio})
        ]

    def prompt_parts(self, prompts: Any, **media: Any) -> list[dict[str, Int[Tensor, " position"]]]:
        """The positions of each prompt by what they are: "text", "image 0", "video 0", "sound 0", ...; without padding.

        Args:
            prompts, **media: as in `trace`.

        Raises:
            InputError: as `trace`.

        Example (of a model `vlm` that reads images):
            parts, = vlm.prompt_parts(prompt, images=picture)
            with vlm.trace(prompt, images=picture):
                pattern = vlm.attention_probabilities[5][0]
            to_image = pattern[:, parts["text"]][:, :, parts["image 0"]].sum(-1)    # (head, query): of each text position
        """
        inputs = self._prompts.prepare(prompts, media, torch.device("cpu"))
        text = inputs["attention_mask"].bool()
        found: list[dict[str, Tensor]] = [{} for _ in text]
        for kind in (IMAGE, VIDEO, AUDIO):
            if media.get(kind.argument) is None:
                continue
            for prompt, i, positions, _, _ in self._places_of(kind, prompts, media):
                found[prompt][f"{kind.name} {i}"] = positions
                text[prompt, positions] = False
        return [{"text": mask.nonzero().flatten(), **one} for mask, one in zip(text, found, strict=True)]

    def _places_of(self, kind: Kind, prompts: Any, media: dict[str, Any]) -> list[Any]:
        ids = token_ids(self, kind)
        inputs = self._prompts.prepare(prompts, media, torch.device("cpu"))
        alone = media_alone(self.processor, kind, prompts, media)
        stands = next(
            (one for one in ids for mine in alone for made in mine if (made.inputs["input_ids"] == one).any()), ids[0]
        )
        return shared(inputs["input_ids"] == stands, alone, stands, kind)

    @property
    def image_embeddings(self) -> Float[Tensor, "token hidden"]:
        """What enters the residual stream at the images' positions, in the order of prompts and positions; can be assigned."""
        return self._embeddings(IMAGE)

    @image_embeddings.setter
    def image_embeddings(self, value: Tensor) -> None:
        self._put_embeddings(IMAGE, value)

    @property
    def video_embeddings(self) -> Float[Tensor, "token hidden"]:
        """What enters the residual stream at the videos' positions, in the order of prompts and positions; can be assigned."""
        return self._embeddings(VIDEO)

    @video_embeddings.setter
    def video_embeddings(self, value: Tensor) -> None:
        self._put_embeddings(VIDEO, value)

    @property
    def audio_embeddings(self) -> Float[Tensor, "token hidden"]:
        """What enters the residual stream at the sounds' positions, in the order of prompts and positions; can be assigned."""
        return self._embeddings(AUDIO)

    @audio_embeddings.setter
    def audio_embeddings(self, value: Tensor) -> None:
        self._put_embeddings(AUDIO, value)

    @property
    def vision_layers_output(self) -> EncoderLayers:
        """What each layer of the encoder of images and videos gives."""
        return EncoderLayers(self, IMAGE)

    @property
    def audio_layers_output(self) -> EncoderLayers:
        """What each layer of the encoder of sound gives."""
        return EncoderLayers(self, AUDIO)

    @property
    def projector_output(self) -> Tensor:
        """The images' patches as the language model is given them, in the shape that the module gives; can be assigned."""
        return first_tensor(self._slot_of_projector(IMAGE).value)

    @projector_output.setter
    def projector_output(self, value: Tensor) -> None:
        slot = self._slot_of_projector(IMAGE)
        slot.value = _with_first("projector_output", slot.value, value)

    @property
    def audio_projector_output(self) -> Tensor:
        """The sounds as the language model is given them, in the shape that the module gives; can be assigned."""
        return first_tensor(self._slot_of_projector(AUDIO).value)

    @audio_projector_output.setter
    def audio_projector_output(self, value: Tensor) -> None:
        slot = self._slot_of_projector(AUDIO)
        slot.value = _with_first("audio_projector_output", slot.value, value)

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
        _check(name, embeds[places], value)
        slot.value = args, {**kwargs, "inputs_embeds": embeds.masked_scatter(places[..., None], value.to(embeds.dtype))}

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
        # A later step of a generation has none, whatever token it begins with.
        given = any(arguments.get(argument) is not None for argument in kind.inputs) or bool(
            {kind.name, kind.modality} & {modality for modality, one in encoded.items() if one is not None}
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
    _check(name, first_tensor(value), new)
    return with_first_tensor(value, new)


def _check(name: str, old: Tensor, new: Any) -> None:
    if not isinstance(new, Tensor) or new.shape != old.shape:
        found = f"of shape {tuple(new.shape)}" if isinstance(new, Tensor) else a_kind(new)
        raise AssignmentError(f"{name} is of shape {tuple(old.shape)}; what was assigned is {found}.")


def _reach(model: Any, module: Module, name: str, kind: str = "output") -> Slot:
    _refuse_to_be_watched(name)
    block = model._blocks.current(name)
    return block.reach(module, kind, name)


def _refuse_to_be_watched(name: str) -> None:
    if (one := watcher.get()) is not None:
        one.refuse(f"{name} is of an image, and a plan has none")
