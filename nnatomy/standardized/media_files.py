"""Images, videos and sounds as users give them: checked, and as processors take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.standardized.media_kinds import AUDIO, IMAGE, VIDEO, Kind


def media_list(kind: Kind, given: Any) -> list[Any]:
    """One, a list of them, or a list for each prompt, as one list."""
    if given is None:
        return []
    if not isinstance(given, (list, tuple)) or _is_one(kind, given):
        return [given]
    return [one for each in given for one in media_list(kind, each)]


def _is_one(kind: Kind, given: Any) -> bool:
    """Whether a list is one video of frames, one sound of numbers, or a sound and its sampling rate."""
    if not given or kind is IMAGE:
        return False
    if kind is VIDEO:
        return all(_is_frame(one) for one in given)
    return isinstance(given[0], float) or (
        len(given) == 2 and isinstance(given[1], int) and not isinstance(given[0], (int, float))
    )


def _is_frame(one: Any) -> bool:
    return hasattr(one, "mode") or getattr(one, "ndim", 0) == 3


def _rgb(image: Any, index: int, _: Any = None, what: str = "Image") -> Any:
    """The image, read from its file if a path is given."""
    if isinstance(image, (str, Path)):
        from PIL import Image, UnidentifiedImageError

        try:
            return Image.open(_file(image, f"{what} {index}")).convert("RGB")
        except UnidentifiedImageError:
            raise InputError(f"{what} {index}: the file {str(image)!r} is no image.") from None
    mode = getattr(image, "mode", "RGB")
    if isinstance(mode, str) and mode != "RGB":
        raise InputError(f"{what} {index} is of mode {mode!r}, and models read RGB: give image.convert('RGB').")
    if isinstance(image, Tensor) and image.ndim != 3:
        raise InputError(
            f"{what} {index} is a tensor of shape {tuple(image.shape)}: give one of (channel, height, width)."
        )
    if isinstance(image, np.ndarray) and (image.ndim != 3 or 3 not in (image.shape[0], image.shape[-1])):
        raise InputError(
            f"{what} {index} is an array of shape {image.shape}: give one of (height, width, 3), red, green and blue."
        )
    if not isinstance(image, (Tensor, np.ndarray)) and not hasattr(image, "convert"):
        raise InputError(f"{what} {index} is a {type(image).__name__}: give a PIL image, an array, or a file's path.")
    return image


def _video(video: Any, index: int, _: Any) -> Any:
    """The frames; a path as it is, which the processor's decoder reads."""
    if isinstance(video, (str, Path)):
        return str(_file(video, f"Video {index}"))
    if isinstance(video, (list, tuple)):
        frames = [np.asarray(_rgb(frame, i, what=f"Video {index}, frame")) for i, frame in enumerate(video)]
        if len(shapes := sorted({frame.shape for frame in frames})) > 1:
            raise InputError(
                f"Video {index} has frames of several shapes, {', '.join(map(str, shapes))}: give one size."
            )
        return np.stack(frames)
    shape = tuple(getattr(video, "shape", ()))
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        found = f"of shape {shape}" if shape else f"a {type(video).__name__}"
        raise InputError(
            f"Video {index} is {found}: give an array of (frame, height, width, 3), a list of frames, or a file's path."
        )
    return video


def _sound(sound: Any, index: int, processor: Any) -> Any:
    """(sample): at the processor's sampling rate; a path is read by a decoder that Transformers finds."""
    reader = getattr(processor, "audio_processor", getattr(processor, "feature_extractor", None))
    if reader is None:
        raise InputError(f"{type(processor).__name__} reads no sound.")
    wanted = getattr(reader, "sampling_rate", None)
    if isinstance(sound, (str, Path)):
        path = str(_file(sound, f"Sound {index}"))
        try:
            return reader.fetch_audio(path)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            why = str(error).strip().partition("\n")[0]
            raise InputError(
                f"Sound {index}: {path!r} could not be read: {why} Give its samples, an array at {wanted} samples a second."
            ) from error
    rate = None
    if isinstance(sound, Mapping) and "array" in sound:  # as data sets give it
        sound, rate = sound["array"], sound.get("sampling_rate")
    elif isinstance(sound, tuple):
        sound, rate = sound
    if rate is not None and rate != wanted:
        raise InputError(
            f"Sound {index} has {rate} samples a second, and the model reads {wanted}: resample it (librosa.resample, "
            "torchaudio.functional.resample)."
        )
    made = (
        np.asarray(sound, dtype=np.float32) if not isinstance(sound, Tensor) else sound.detach().cpu().float().numpy()
    )
    if made.ndim != 1 or not len(made):
        raise InputError(f"Sound {index} is of shape {made.shape}: give (sample), of one channel.")
    return made


def _file(path: str | Path, what: str) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{what}: there is no file {str(path)!r}.")
    return Path(path)


#: By kind, how one is read: what was given, which it is, and the processor.
READ: dict[Kind, Callable[[Any, int, Any], Any]] = {IMAGE: _rgb, VIDEO: _video, AUDIO: _sound}
