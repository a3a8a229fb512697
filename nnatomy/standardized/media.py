"""From prompts with images (videos, sound) to the arguments of a model's forward: what its processor makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoProcessor

from nnatomy.errors import InputError
from nnatomy.standardized.chats import is_chat

#: Arguments of a trace that the processor takes.
MEDIA = ("images", "videos", "audio")


def load_processor(name: str | None, kwargs: Mapping[str, Any]) -> Any:
    """The processor of that id or folder.

    Raises:
        InputError: if there is none.
    """
    how = "Give one: StandardizedTransformer(model, processor=AutoProcessor.from_pretrained(...))."
    if name is None:
        raise InputError(f"The prompt has images, videos or sound, and there is no processor to read them. {how}")
    try:
        return AutoProcessor.from_pretrained(name, **kwargs)
    except (OSError, ValueError, ImportError, KeyError) as error:
        why = str(error).strip().partition("\n")[0]
        raise InputError(f"The processor of {name!r}, to read images, could not be loaded: {why} {how}") from error


def misses_images(processor: Any, prompts: Any) -> bool:
    """Whether a text has a place for an image, none of which are given."""
    token = image_token(processor)
    texts = [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, (list, tuple)) else ()
    return bool(token) and any(isinstance(text, str) and token in text for text in texts)


def holds_media(prompts: Any) -> bool:
    """Whether these are chats with images, videos or sound among what is said."""
    return any(
        isinstance(part, Mapping) and part.get("type", "text") != "text"
        for chat in _chats(prompts)
        for message in chat
        for part in _parts(message)
    )


def read_media(
    processor: Any, prompts: Any, media: Mapping[str, Any], template: Mapping[str, Any], side: str
) -> dict[str, Any]:
    """What the processor makes of prompts and the images, videos and sound in them.

    Args:
        prompts: a text or chat, or a list of them. In a text, the processor's image token says where an image goes.
        media: `images` and the like: one, or a list in the order of the prompts' tokens, also with a list for each prompt.
        template: `add_generation_prompt` and `continue_final_message`, for chats.
        side: where a batch is padded.

    Raises:
        InputError: if the prompts are no texts or chats, the processor refuses them, or an image has colours that are not RGB.
    """
    texts, images = texts_and_images(processor, prompts, media.get("images"), template)
    given = {name: value for name, value in media.items() if value is not None and name != "images"}
    return _processed(processor, texts, given | ({"images": images} if any(images) else {}), side)


def texts_and_images(
    processor: Any, prompts: Any, images: Any, template: Mapping[str, Any]
) -> tuple[list[str], list[list[Any]]]:
    """The prompts as texts, and the images of each. Raises InputError."""
    texts, said = [], []
    for one in [prompts] if isinstance(prompts, str) or is_chat(prompts) else list(prompts):
        if isinstance(one, str):
            texts.append(one)
        elif is_chat(one):
            texts.append(_text_of_chat(processor, one, template))
            said += [part["image"] for message in one for part in _parts(message) if "image" in part]
        else:
            raise InputError(
                f"Images go with texts and chats, in which the processor finds their places; got {type(one).__name__}. With "
                "token ids, give what the model itself takes: pixel_values=..."
            )
    if said and images is not None:
        raise InputError("The chat has its images in it, and images=... gives others: take one of the two.")
    images = said or ([] if images is None else flat(images))
    rest = iter([_rgb(image, i) for i, image in enumerate(images)])
    return texts, [list(islice(rest, count)) for count in _places(processor, texts, len(images))]


def images_alone(processor: Any, prompts: Any, images: Any) -> list[list[dict[str, Any]]]:
    """Of each prompt, what the processor makes of each of its images by itself."""
    _, by_prompt = texts_and_images(processor, prompts, images, {})
    token = image_token(processor)
    return [[_processed(processor, [token], {"images": [[image]]}, "left") for image in mine] for mine in by_prompt]


def _processed(processor: Any, texts: list[str], media: Mapping[str, Any], side: str) -> dict[str, Any]:
    try:
        return dict(processor(text=texts, return_tensors="pt", padding=True, padding_side=side, **media))
    except (ValueError, TypeError, IndexError, StopIteration) as error:
        raise InputError(
            f"{type(processor).__name__} cannot read these prompts with {', '.join(media) or 'nothing'}: {error}"
        ) from error


def flat(images: Any) -> list[Any]:
    """One image, a list of them, or a list for each prompt, as one list."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [one for each in images for one in flat(each)]


def image_token(processor: Any) -> str:
    """What stands for an image in a text: the token that is replaced by its patches, or the one that begins them."""
    known = (getattr(processor, name, None) for name in ("boi_token", "image_token"))
    return next((str(token) for token in known if token), "")


def _places(processor: Any, texts: Sequence[str], images: int) -> list[int]:
    """How many images each text has a place for.

    Raises:
        InputError: if these are not as many as there are images.
    """
    token = image_token(processor)
    places = [text.count(token) if token else 0 for text in texts]
    if sum(places) == images:
        return places
    if not any(places) and images == len(texts) and _puts_images(processor):
        return [1] * images
    raise InputError(
        f"There are {images} images, and {sum(places)} places for one in the prompts: {token!r} says in a text where an image "
        f"goes, such as {token + texts[0]!r:.80}, and {{'type': 'image'}} in a chat."
    )


def _puts_images(processor: Any) -> bool:
    """Whether the processor puts an image before a text that has no place for one."""
    try:
        made = processor(text=["a"], images=[[np.zeros((32, 32, 3), dtype=np.uint8)]], return_tensors="pt")
    except (ValueError, TypeError, IndexError, StopIteration, AttributeError):
        return False  # it asks for a place
    return len(made["input_ids"][0]) > len(processor.tokenizer("a")["input_ids"]) + 1


def _rgb(image: Any, index: int) -> Any:
    """The image, read from its file if a path is given."""
    if isinstance(image, (str, Path)):
        from PIL import Image

        if not Path(image).is_file():
            raise InputError(f"Image {index}: there is no file {str(image)!r}.")
        return Image.open(image).convert("RGB")
    mode = getattr(image, "mode", "RGB")
    if isinstance(mode, str) and mode != "RGB":
        raise InputError(f"Image {index} is of mode {mode!r}, and models read RGB: give image.convert('RGB').")
    if isinstance(image, Tensor) and image.ndim != 3:
        raise InputError(
            f"Image {index} is a tensor of shape {tuple(image.shape)}: give one of (channel, height, width)."
        )
    return image


def _text_of_chat(processor: Any, chat: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> str:
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"The prompt is a chat, and {type(processor).__name__} has no chat template: give a text, with "
            f"{image_token(processor)!r} where an image goes, or set processor.chat_template."
        )
    goes_on = chat[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on} | dict(template)
    return str(processor.apply_chat_template(chat, tokenize=False, **options))


def _chats(prompts: Any) -> Sequence[Any]:
    if is_chat(prompts):
        return [prompts]
    return [one for one in prompts if is_chat(one)] if isinstance(prompts, (list, tuple)) else []


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, (list, tuple)) else ()
