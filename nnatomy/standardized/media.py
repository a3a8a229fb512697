"""From prompts with images, videos and sound to the arguments of a model's forward: what its processor makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from transformers import AutoProcessor

from nnatomy.errors import InputError, a, counted
from nnatomy.standardized.chats import is_chat
from nnatomy.standardized.media_files import READ, counts_by_prompt, media_list
from nnatomy.standardized.media_kinds import AUDIO, IMAGE, KINDS, Kind, place_token
from nnatomy.standardized.media_tokens import Alone

#: What processors raise at what they cannot read, or lack a package for.
_REFUSALS = (ValueError, TypeError, IndexError, StopIteration, ImportError, OSError)


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


def misses_media(processor: Any, prompts: Any, given: Mapping[str, Any]) -> bool:
    """Whether a text has a place for an image, a video or a sound, and none of them are given, nor what is made of them."""
    texts = [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, (list, tuple)) else ()
    tokens = [token for kind in KINDS if kind.inputs.isdisjoint(given) and (token := place_token(processor, kind))]
    return any(isinstance(text, str) and token in text for text in texts for token in tokens)


def holds_media(prompts: Any) -> bool:
    """Whether these are chats with images, videos or sound among what is said."""
    return any(
        isinstance(part, Mapping) and part.get("type", "text") != "text"
        for chat in _chats(prompts)
        for message in chat
        for part in _parts(message)
    )


def kinds_given(prompts: Any, media: Mapping[str, Any]) -> list[Kind]:
    """What there is beside text, by its argument or in chats."""
    types = {
        part.get("type")
        for chat in _chats(prompts)
        for message in chat
        for part in _parts(message)
        if isinstance(part, Mapping)
    }
    return [kind for kind in KINDS if media.get(kind.argument) is not None or kind.part in types]


def read_media(
    processor: Any, prompts: Any, media: Mapping[str, Any], template: Mapping[str, Any], side: str
) -> dict[str, Any]:
    """What the processor makes of prompts and the images, videos and sound in them.

    Args:
        prompts: a text or chat, or a list of them. In a text, the processor's token for an image, a video or a sound says where one
            goes. None for sound alone, where a model reads no text beside it.
        media: `images` and the like: one, or a list in the order of the prompts' tokens, also with a list for each prompt.
        template: `add_generation_prompt` and `continue_final_message`, for chats.
        side: where a batch is padded.

    Raises:
        InputError: if the prompts are no texts or chats, the processor refuses them, or an image has colours that are not RGB.
    """
    if prompts is None:
        return _features(processor, media)
    texts, by_kind = texts_and_media(processor, prompts, media, template)
    given = {kind.argument: _for_processor(kind, mine) for kind, mine in by_kind.items() if any(mine)}
    return _processed(processor, texts, given, side)


def texts_and_media(
    processor: Any, prompts: Any, media: Mapping[str, Any], template: Mapping[str, Any]
) -> tuple[list[str], dict[Kind, list[list[Any]]]]:
    """The prompts as texts, and the images, videos and sounds of each. Raises InputError."""
    texts: list[str] = []
    said: dict[Kind, list[Any]] = {kind: [] for kind in KINDS}
    for one in [prompts] if isinstance(prompts, str) or is_chat(prompts) else list(prompts):
        if isinstance(one, str):
            texts.append(one)
        elif is_chat(one):
            texts.append(_text_of_chat(processor, one, template))
            for kind in KINDS:
                said[kind] += [part[kind.part] for message in one for part in _parts(message) if kind.part in part]
        else:
            raise InputError(
                f"Images, videos and sound go with texts and chats, in which the processor finds their places; got "
                f"{type(one).__name__}. With token ids, give what the model itself takes: pixel_values=..., input_features=..."
            )
    by_kind = {}
    for kind in KINDS:
        given = media.get(kind.argument)
        if said[kind] and given is not None:
            raise InputError(
                f"The chat has its {kind.name}s in it, and {kind.argument}=... gives others: take one of the two."
            )
        every = [READ[kind](one, i, processor) for i, one in enumerate(said[kind] or media_list(kind, given))]
        rest, places = iter(every), _places(processor, kind, texts, len(every))
        if (lists := counts_by_prompt(kind, given)) and lists != places:
            raise InputError(
                f"{kind.argument}=... is a list for each prompt, of {lists}, and the prompts have {places} places: give each its own."
            )
        by_kind[kind] = [list(islice(rest, count)) for count in places]
    return texts, by_kind


def media_alone(processor: Any, kind: Kind, prompts: Any, media: Mapping[str, Any]) -> list[list[Alone]]:
    """Of each prompt, each of its images (videos, sounds) by itself."""
    _, by_kind = texts_and_media(processor, prompts, media, {})
    token = place_token(processor, kind)
    return [
        [
            Alone(one, _processed(processor, [token], {kind.argument: _for_processor(kind, [[one]])}, "left"))
            for one in mine
        ]
        for mine in by_kind[kind]
    ]


def _for_processor(kind: Kind, by_prompt: list[list[Any]]) -> list[Any]:
    """As processors take them: images with a list for each prompt, videos and sounds in one list."""
    return by_prompt if kind is IMAGE else [one for mine in by_prompt for one in mine]


def _processed(processor: Any, texts: list[str], media: Mapping[str, Any], side: str) -> dict[str, Any]:
    options = _rate(processor) if AUDIO.argument in media else {}
    try:
        # (Not for all: a sound may have to be padded to the length that the encoder reads.)
        of_text = {"padding": True, "padding_side": side}
        return dict(processor(text=texts, return_tensors="pt", text_kwargs=of_text, **options, **media))
    except _REFUSALS as error:
        raise _refusal(processor, media, error) from error


def _features(processor: Any, media: Mapping[str, Any]) -> dict[str, Any]:
    """Of images or sounds that are prompts by themselves."""
    given = {kind: media_list(kind, one) for kind in KINDS if (one := media.get(kind.argument)) is not None}
    if [*given] != [AUDIO]:
        raise InputError(
            f"{', '.join(kind.argument for kind in given)} without a prompt: give the text, with a place for each."
        )
    token = place_token(processor, AUDIO)
    if token:
        raise InputError(
            f"audio without a prompt: {token!r} says in a text where a sound goes, such as {token + ' What is this?'!r}."
        )
    sounds = [READ[AUDIO](one, i, processor) for i, one in enumerate(given[AUDIO])]
    try:
        return dict(processor(audio=sounds, return_tensors="pt", **_rate(processor)))
    except _REFUSALS as error:
        raise _refusal(processor, media, error) from error


def _rate(processor: Any) -> dict[str, Any]:
    reader = getattr(processor, "audio_processor", getattr(processor, "feature_extractor", None))
    rate = getattr(reader, "sampling_rate", None)
    return {} if rate is None else {"sampling_rate": rate}


def _refusal(processor: Any, media: Mapping[str, Any], error: BaseException) -> InputError:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    why = lines[0] if lines else type(error).__name__
    return InputError(
        f"{type(processor).__name__} cannot read these prompts with {', '.join(media) or 'nothing'}: {why}"
    )


def image_token(processor: Any) -> str:
    """What stands for an image in a text: the token that is replaced by its patches, or the one that begins them."""
    return place_token(processor, IMAGE)


def _places(processor: Any, kind: Kind, texts: Sequence[str], given: int) -> list[int]:
    """How many of that kind each text has a place for.

    Raises:
        InputError: if these are not as many as are given.
    """
    token = place_token(processor, kind)
    places = [text.count(token) if token else 0 for text in texts]
    if sum(places) == given:
        return places
    if kind is IMAGE and not any(places) and given == len(texts) and _puts_images(processor):
        return [1] * given
    if not token:
        raise InputError(
            f"{type(processor).__name__} has no token for the place of {a(kind.name)} in a text, and {kind.argument}=... gives "
            f"{given}: it reads none."
        )
    raise InputError(
        f"The prompts have {counted(sum(places), 'place')} for {counted(given, kind.name)}: {token!r} says in a text where "
        f"{a(kind.name)} goes, such as {token + texts[0]!r:.80}, and {{'type': {kind.part!r}}} in a chat."
    )


def _puts_images(processor: Any) -> bool:
    """Whether the processor puts an image before a text that has no place for one."""
    try:
        made = processor(text=["a"], images=[[np.zeros((32, 32, 3), dtype=np.uint8)]], return_tensors="pt")
    except (ValueError, TypeError, IndexError, StopIteration, AttributeError):
        return False  # it asks for a place
    return len(made["input_ids"][0]) > len(processor.tokenizer("a")["input_ids"]) + 1


def _text_of_chat(processor: Any, chat: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> str:
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"The prompt is a chat, and {type(processor).__name__} has no chat template: give a text, with "
            f"{_tokens(processor)} where one goes, or set processor.chat_template."
        )
    goes_on = chat[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on} | dict(template)
    return str(processor.apply_chat_template(chat, tokenize=False, **options))


def _tokens(processor: Any) -> str:
    return " or ".join(repr(token) for kind in KINDS if (token := place_token(processor, kind)))


def _chats(prompts: Any) -> Iterator[Any]:
    if is_chat(prompts):
        yield prompts
    elif isinstance(prompts, (list, tuple)):
        yield from (one for one in prompts if is_chat(one))


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, (list, tuple)) else ()
