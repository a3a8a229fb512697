"""What a prompt can have beside its text: images, videos, sound; and what each goes by in models, processors and chats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnatomy.errors import NotInThisModelError, a
from nnatomy.standardized.keywords import PIXELS, SOUND


@dataclass(frozen=True)
class Kind:
    """One of the three.

    Attributes:
        name: what one is called in errors.
        argument: of a trace and of processors.
        part: of a message in a chat.
        of_config: the fields that may have the id of the token which stands for a piece of one.
        of_processor: the attributes that may have what stands for one in a text; the first that is there does.
        inputs: what a model's forward may call what is made of it.
        modality: what Transformers calls it in `get_encoder`.
        names: of a trace: what enters the stream, what the encoder's layers give, what projects it.
    """

    name: str
    argument: str
    part: str
    of_config: tuple[str, ...]
    of_processor: tuple[str, ...]
    inputs: frozenset[str]
    modality: str
    names: tuple[str, str, str]


IMAGE = Kind(
    "image",
    "images",
    "image",
    ("image_token_id", "image_token_index"),
    ("boi_token", "image_token"),  # (Gemma's: the token that begins an image stands for all of it)
    PIXELS - {"pixel_values_videos"},
    "image",
    ("image_embeddings", "vision_layers_output", "projector_output"),
)
VIDEO = Kind(
    "video",
    "videos",
    "video",
    ("video_token_id", "video_token_index", *IMAGE.of_config),
    ("video_token",),
    frozenset(("pixel_values_videos", "pixel_values")),
    "image",
    ("video_embeddings", "vision_layers_output", "projector_output"),
)
AUDIO = Kind(
    "sound",
    "audio",
    "audio",
    ("audio_token_id", "audio_token_index"),
    ("audio_token",),
    SOUND,
    "audio",
    ("audio_embeddings", "audio_layers_output", "audio_projector_output"),
)
KINDS = (IMAGE, VIDEO, AUDIO)
#: Arguments of a trace that the processor takes.
MEDIA = tuple(kind.argument for kind in KINDS)


def token_ids(model: Any, kind: Kind) -> list[int]:
    """The ids of the tokens that may stand for a piece of one: a patch of an image, some time of sound.

    Of a video there may be two: some models read it as so many images, and have its token in the text alone.

    Raises:
        NotInThisModelError: if the model has none.
    """
    known = (getattr(model.config, name, None) for name in kind.of_config)
    found = [*dict.fromkeys(one for one in known if isinstance(one, int))]
    if not found:
        piece = "some time of a sound" if kind is AUDIO else f"a patch of {a(kind.name)}"
        raise NotInThisModelError(
            f"{type(model.hf_model).__name__} has no token that stands for {piece}: {a(kind.name)} is no positions of a prompt."
        )
    return found


def place_token(processor: Any, kind: Kind) -> str:
    """What stands for one in a text: the token that is replaced by its pieces, or the one that begins them; "" if nothing."""
    known = (getattr(processor, name, None) for name in kind.of_processor)
    return next((str(token) for token in known if token), "")
