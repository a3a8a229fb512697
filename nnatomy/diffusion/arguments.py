"""What a pipeline is called with: checked before it runs, so that the error is at the user's line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.whole_number import count_of

#: What says what is to be drawn, by the name of an argument; the first that a pipeline has is its main one.
_SUBJECTS = ("prompt", "class_labels", "prompt_embeds")
#: How many pixels of a side are one of its latents, by the name of an attribute of the pipeline.
_SCALES = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
#: How many pictures (videos, sounds) of each prompt, by the name of an argument.
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
#: The modes of pictures that a pipeline takes, by the name of an argument.
_MODES = {"image": ("RGB",), "mask_image": ("L", "1", "RGB"), "control_image": ("RGB", "L")}


def checked(pipeline: Any, prompt: Any, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The arguments of a call, and how many pictures it makes.

    Raises:
        InputError: for what the pipeline does not take, a missing prompt, no number of steps, a picture of a wrong mode.
    """
    known = inspect.signature(type(pipeline).__call__).parameters
    name = type(pipeline).__name__
    given = dict(kwargs)
    main = next((one for one in _SUBJECTS if one in known), None)
    if prompt is not None:
        if main is None:
            raise InputError(f"{name} takes no prompt: it draws without one. Leave it out.")
        if main in given:
            raise InputError(f"{main} is given twice: as the first argument and by its name.")
        given[main] = prompt
    _check_names(name, known, given)
    for argument in ("num_inference_steps", *_PER_PROMPT):
        if given.get(argument) is not None and not count_of(given[argument]):
            raise InputError(f"{argument}={given[argument]!r}: it is a whole number, 1 or more.")
    images = _count(name, main, given)
    for argument, modes in _MODES.items():
        for picture in given[argument] if isinstance(given.get(argument), list) else [given.get(argument)]:
            mode = getattr(picture, "mode", None)
            if isinstance(mode, str) and mode not in modes:
                raise InputError(
                    f"{argument} is a picture of mode {mode!r}, and the pipeline takes {' or '.join(map(repr, modes))}: convert it, "
                    f"{argument}={argument}.convert({modes[0]!r})."
                )
    return given, images


def _check_names(name: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        known = {**known, "callback": None, "callback_steps": None}  # what diffusers takes there
    for argument in given:
        if argument not in known:
            near = difflib.get_close_matches(argument, list(known), n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"{argument}={given[argument]!r:.40}: {name} takes no such argument.{hint}")


def _count(name: str, main: str | None, given: Mapping[str, Any]) -> int:
    """How many pictures are made."""
    if main is None:
        return int(given.get("batch_size", 1))
    subject = next((given[one] for one in _SUBJECTS if given.get(one) is not None), None)
    if subject is None:
        example = '"a photo of a cat"' if main == "prompt" else "[207]"
        raise InputError(
            f"{name} was given no {main}, and draws nothing without: model.generate({example}, num_inference_steps=20)."
        )
    if main == "class_labels" and not isinstance(subject, list):
        raise InputError(
            f"class_labels={subject!r:.40}: a list of the numbers of classes, one for each picture: [207]."
        )
    if main == "prompt" and given.get("prompt") is not None:
        texts = subject if isinstance(subject, list) else [subject]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"prompt={subject!r:.40}: it is a text, or a list of texts, one for each picture.")
    count = len(subject) if isinstance(subject, (list, Tensor)) else 1
    return count * next((int(given[one]) for one in _PER_PROMPT if given.get(one) is not None), 1)


def example(pipeline: Any, denoiser: Any) -> dict[str, Any]:
    """A small call, with guidance if the pipeline has it, to check names on.

    Raises:
        InputError: if the pipeline needs what nobody here can make up.
    """
    import torch

    known = inspect.signature(type(pipeline).__call__).parameters
    config = getattr(denoiser, "config", {})
    sample = config.get("sample_size")
    side = next((int(getattr(pipeline, name)) for name in _SCALES if hasattr(pipeline, name)), 8) * min(
        16, sample if isinstance(sample, int) else 16
    )
    candidates: dict[str, Any] = {
        "prompt": "a photo of a cat",
        "class_labels": [min(1, int(config.get("num_embeds_ada_norm") or 2) - 1)],
        "height": side,
        "width": side,
        "num_frames": 9,  # of a video: one more than a multiple of what its decoder takes together, 4 or 8
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "output_type": "latent" if "class_labels" not in known else "pt",
        "use_resolution_binning": False,
        "max_sequence_length": config.get("max_text_seq_length") or 64,
        "clean_caption": False,
        "cfg_normalization": False,
        "generator": torch.Generator().manual_seed(0),
    }
    if "true_cfg_scale" in known:
        candidates |= {"true_cfg_scale": GUIDANCE, "negative_prompt": "a dog"}
        if not config.get("guidance_embeds"):  # the other scale is for a denoiser that is given it
            del candidates["guidance_scale"]
    if "strength" in known and "image" in known:  # it begins with a picture
        from PIL import Image

        candidates |= {"image": Image.new("RGB", (side, side), (200, 80, 40)), "strength": 1.0}
    given = {name: value for name, value in candidates.items() if name in known}
    missing = [
        name
        for name, one in known.items()
        if name not in ("self", *given) and one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    if missing or not {"prompt", "class_labels"} & {*given}:
        raise InputError(
            f"{type(pipeline).__name__} is not supported: it draws from {', '.join(missing) or 'no prompt'}, and its names are "
            "checked on a prompt or class labels. docs/diffusion.md lists the pipelines that are."
        )
    return given


#: Of the calls that names are checked on.
STEPS, GUIDANCE = 2, 3.0
