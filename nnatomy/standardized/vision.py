"""A model that reads images, videos or sound beside text: by which processor, and where they are in its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from nnatomy.arch_configs.fields import is_resampled
from nnatomy.errors import InputError
from nnatomy.standardized.image_tokens import ImageTokens, grid_of, picture_seen
from nnatomy.standardized.media import kinds_given, load_processor, media_alone
from nnatomy.standardized.media_kinds import AUDIO, IMAGE, KINDS, VIDEO, Kind, token_ids
from nnatomy.standardized.media_tokens import AudioTokens, VideoTokens, shared, video_grid
from nnatomy.standardized.media_values import MediaValues


class Vision(MediaValues):
    """A model with the names of what reads images, videos and sound, where it has that and a processor reads them for it."""

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
            if is_resampled(self.config):
                grid, why = None, "its tokens are those of a resampler, of which each may read all of the picture."
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
        _refuse_prepared(prompts, media)
        inputs = self._prompts.prepare(prompts, media, torch.device("cpu"))
        text = inputs["attention_mask"].bool()
        found: list[dict[str, Tensor]] = [{} for _ in text]
        for kind in kinds_given(prompts, media):
            for prompt, i, positions, _, _ in self._places_of(kind, prompts, media):
                found[prompt][f"{kind.name} {i}"] = positions
                text[prompt, positions] = False
        return [{"text": mask.nonzero().flatten(), **one} for mask, one in zip(text, found, strict=True)]

    def _places_of(self, kind: Kind, prompts: Any, media: dict[str, Any]) -> list[Any]:
        _refuse_prepared(prompts, media)
        ids = token_ids(self, kind)
        inputs = self._prompts.prepare(prompts, media, torch.device("cpu"))
        alone = media_alone(self.processor, kind, prompts, media)
        stands = next(
            (one for one in ids for mine in alone for made in mine if (made.inputs["input_ids"] == one).any()), ids[0]
        )
        return shared(inputs["input_ids"] == stands, alone, stands, kind)


def _refuse_prepared(prompts: Any, media: Mapping[str, Any]) -> None:
    """Raise InputError for pixels or features, of which nobody can tell how many images or sounds they are."""
    for name in (*media, *(prompts if isinstance(prompts, Mapping) else ())):
        if kind := next((one for one in KINDS if name in one.inputs), None):
            raise InputError(
                f"{name}: whose positions are which {kind.name}'s is found from the text: give it, and {kind.argument}=..."
            )
