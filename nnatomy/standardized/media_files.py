"""Images, videos and sounds as users give them: checked, and as processors take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnatomy.errors import InputError, a_kind
from nnatomy.standardized.media_kinds import AUDIO, IMAGE, VIDEO, Kind


def media_list(kind: Kind, given: Any) -> list[Any]:
    """One, a list of them, or a list for each prompt, as one list."""
    if given is None:
        return []
    if not isinstance(given, (list, tuple)) or _is_one(kind, given):
        return [given]
    return [one for each in given for one in media_list(kind, each)]


def counts_by_prompt(kind: Kind, given: Any) -> list[int]:
    """How many there are in each list, where one is given for each prompt; none where they are all in one."""
    if not isinstance(given, (list, tuple)) or _is_one(kind, given):
        return []
    if not any(isinstance(one, (list, tuple)) and not (one and _is_one(kind, one)) for one in given):
        return []
    return [len(media_list(kind, one)) for one in given]


def _is_one(kind: Kind, given: Any) -> bool:
    """Whether a list is one video of frames, one sound of numbers, or a sound and its sampling rate."""
    if not given or kind is IMAGE:
        return False
    if kind is VIDEO:
        return all(_is_frame(one) for one in given)
    return all(isinstance(one, Real) for one in given) or _has_rate(given)


def _has_rate(given: Any) -> bool:
    """Whether it is (samples, rate)."""
    return len(given) == 2 and isinstance(given[1], Real) and not isinstance(given[0], Real)


def _is_frame(one: Any) -> bool:
    return hasattr(one, "mode") or getattr(one, "ndim", 0) == 3


def _image(image: Any, index: int, processor: Any) -> Any:
    return _rgb(image, f"Image {index}", getattr(processor, "image_processor", None))


def _rgb(image: Any, what: str, reader: Any) -> Any:
    """The image, read from its file if a path is given.

    Args:
        reader: what makes the model's numbers of it.
    """
    if isinstance(image, (str, Path)):
        from PIL import Image, UnidentifiedImageError

        try:
            picture = Image.open(_file(image, what))
        except UnidentifiedImageError:
            raise InputError(f"{what}: the file {str(image)!r} is no image.") from None
        if picture.has_transparency_data and picture.convert("RGBA").getextrema()[3][0] < 255:
            raise InputError(
                f"{what}: the file {str(image)!r} has transparent pixels, and nobody says what is behind them: put it on a "
                "background (PIL.Image.alpha_composite), and give that as RGB."
            )
        return picture.convert("RGB")
    if isinstance(image, (Tensor, np.ndarray)):
        return _pixels(image, what, reader)
    if not hasattr(image, "convert"):
        raise InputError(f"{what} is {a_kind(image)}: give a PIL image, an array, or a file's path.")
    if isinstance(mode := getattr(image, "mode", "RGB"), str) and mode != "RGB":
        raise InputError(f"{what} is of mode {mode!r}, and models read RGB: give image.convert('RGB').")
    return image


def _pixels(image: Tensor | np.ndarray, what: str, reader: Any) -> Any:
    """The image as its processor reads it rightly, whichever axis the colors are on.

    A processor takes an array whose first axis is 1 or 3 long for one of (channel, height, width); so a picture of bytes is given as
    a PIL image, and one of other numbers with its channels first.
    """
    shape = tuple(image.shape)
    if len(shape) != 3 or 3 not in (shape[0], shape[-1]) or 0 in shape:
        kind, axes = (
            ("a tensor", "(3, height, width)") if isinstance(image, Tensor) else ("an array", "(height, width, 3)")
        )
        raise InputError(f"{what} is {kind} of shape {shape}: give one of {axes}, red, green and blue.")
    _check_values(image, what, reader)
    first = shape[0] == 3 and (isinstance(image, Tensor) or shape[-1] != 3)
    if str(image.dtype).rpartition(".")[2] != "uint8":
        return (
            image
            if first
            else image.transpose(0, 2).transpose(1, 2)
            if isinstance(image, Tensor)
            else image.transpose(2, 0, 1)
        )
    from PIL import Image

    plain = image.cpu().numpy() if isinstance(image, Tensor) else image
    return Image.fromarray(np.ascontiguousarray(plain.transpose(1, 2, 0) if first else plain))


def _check_values(pixels: Tensor | np.ndarray, what: str, reader: Any) -> None:
    """Raise InputError for numbers that are no brightness, or that the processor would divide by 255 once more."""
    if str(pixels.dtype).rpartition(".")[2] == "uint8":
        return
    mend = "give bytes (uint8), from 0 to 255"
    values = torch.as_tensor(pixels) if isinstance(pixels, Tensor) or pixels.dtype.kind in "biuf" else None
    if values is None or values.is_complex():
        raise InputError(f"{what} is of {pixels.dtype}, and a color has a real number: {mend}.")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # also of NaN
        raise InputError(f"{what} has values from {low:.4g} to {high:.4g}: {mend}.")
    if 0 < high <= 1 and getattr(reader, "do_rescale", False):
        raise InputError(
            f"{what} has values from {low:.4g} to {high:.4g}, and the model's processor divides by 255, so that it would be all but "
            f"black: {mend}, (255 * image).round() as uint8."
        )


def _video(video: Any, index: int, processor: Any) -> Any:
    """The frames; a path as it is, which the processor's decoder reads."""
    what, reader = f"Video {index}", getattr(processor, "video_processor", None)
    if isinstance(video, (str, Path)):
        return str(_file(video, what))
    if isinstance(video, (list, tuple)):
        frames = [np.asarray(_rgb(frame, f"{what}, frame {i}", reader)) for i, frame in enumerate(video)]
        if len(shapes := sorted({frame.shape for frame in frames})) > 1:
            raise InputError(f"{what} has frames of several shapes, {', '.join(map(str, shapes))}: give one size.")
        return np.stack(frames)
    shape = tuple(getattr(video, "shape", ()))
    if len(shape) != 4 or 3 not in (shape[1], shape[3]) or 0 in shape:
        found = f"of shape {shape}" if shape else a_kind(video)
        raise InputError(
            f"{what} is {found}: give an array of (frame, height, width, 3), a list of frames, or a file's path."
        )
    _check_values(video, what, reader)
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
    elif isinstance(sound, (list, tuple)) and _has_rate(sound):
        sound, rate = sound
    if rate is not None and rate != wanted:
        raise InputError(
            f"Sound {index} has {rate} samples a second, and the model reads {wanted}: resample it (librosa.resample, "
            "torchaudio.functional.resample)."
        )
    if isinstance(sound, Tensor):
        sound = sound.detach().cpu()
        sound = sound.float() if sound.is_floating_point() else sound
    samples = np.asarray(sound)
    if samples.ndim != 1 or not len(samples):
        raise InputError(f"Sound {index} is of shape {samples.shape}: give (sample), of one channel.")
    if samples.dtype.kind != "f":
        full = f": samples / {np.iinfo(samples.dtype).max + 1}" if samples.dtype.kind == "i" else ""
        raise InputError(
            f"Sound {index} has samples of {samples.dtype}: give floating-point numbers from -1 to 1{full}."
        )
    if not np.isfinite(samples).all():
        raise InputError(f"Sound {index} has samples that are NaN or infinite.")
    return samples.astype(np.float32)


def _file(path: str | Path, what: str) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{what}: there is no file {str(path)!r}.")
    return Path(path)


#: By kind, how one is read: what was given, which it is, and the processor.
READ: dict[Kind, Callable[[Any, int, Any], Any]] = {IMAGE: _image, VIDEO: _video, AUDIO: _sound}
