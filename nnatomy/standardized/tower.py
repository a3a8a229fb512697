"""The encoder of images or sound in a model: which modules are its layers, and which projects what they give for the stream.

They are found by running the model on one picture, or a sound, of noise: the layers are the list of modules in the encoder
of which each is called once, and is given what the one before gives, bit for bit; the projector is the module whose output is what
stands at the image's (the sound's) positions in the stream.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList

from nnatomy.errors import InputError
from nnatomy.standardized.media_kinds import AUDIO, IMAGE, Kind, place_token
from nnatomy.tracing.attach import first_tensor


@dataclass(frozen=True)
class Tower:
    """The modules of the encoder's side; or why they are not known."""

    layers: tuple[Module, ...] = ()
    projector: Module | None = None
    no_layers: str = ""
    no_projector: str = ""


def media_encoder(model: Any, kind: Kind) -> Module | None:
    """The module that reads images (videos, sound) in a Hugging Face model, if it has one."""
    try:
        encoder = model.get_encoder(modality=kind.modality)
    except (AttributeError, TypeError, ValueError):
        # A model of somebody's; an encoder-decoder's own method, which takes no modality; a release that knows no such modality.
        return None
    return encoder if isinstance(encoder, Module) and encoder is not model else None


def names_without_media(model: Any) -> set[str]:
    """The names that a model has for no want of an encoder of images or sound."""
    absent: set[str] = set()
    for kind in (IMAGE, AUDIO):
        if media_encoder(model, kind) is None:
            absent |= {f"{kind.modality}_tokens", *kind.names}
    return absent | ({"video_tokens", "video_embeddings"} if "image_tokens" in absent else set())


def find_tower(model: Any, kind: Kind) -> Tower:
    """The modules of that side, by what they give in a pass over two prompts with noise."""
    encoder = media_encoder(model.steps_of, kind)
    what = "vision" if kind is not AUDIO else "audio"
    if encoder is None:
        why = f"the model has no {what} encoder."
        return Tower(no_layers=why, no_projector=why)
    one = "sound" if kind is AUDIO else "picture"
    try:
        inputs = _noise(model, kind)
    except InputError as error:
        why = f"the processor reads no {one} of noise, by which it would be found: {error}"
        return Tower(no_layers=why, no_projector=why)
    with torch.no_grad(), model.trace(**inputs) as tracer:
        cache = tracer.cache(include_inputs=True, clone=True)
        entered = getattr(model, kind.names[0])
    paths = {module: path for path, module in model.module.named_modules()}
    calls = {module: cache[path] for module, path in paths.items() if path in cache}
    chains = [[*one] for one in encoder.modules() if isinstance(one, ModuleList) and _is_stream([*one], calls)]
    layers = max(chains, key=len, default=[])
    projector = None
    for module, made in calls.items():
        holds_layers = any(one in set(module.modules()) for one in model._anatomy.layers)
        if (
            projector is None
            and not holds_layers
            and len(made) == 1
            and _is(made[0].output, entered, padded=kind is AUDIO)
        ):
            projector = module
    return Tower(
        tuple(layers),
        projector,
        f"no list of modules in its {what} encoder is a chain of layers, each called once on what the one before gives.",
        f"no module gives what stands in the stream at {'an image' if kind is not AUDIO else 'a sound'}'s positions.",
    )


def _noise(model: Any, kind: Kind) -> dict[str, Any]:
    """Two prompts of one and a word each: what is called for each of them is nobody's. Raises InputError."""
    draw = torch.Generator().manual_seed(0)
    processor = model.processor
    prompts = [place_token(processor, kind) + " a"] * 2
    if kind is AUDIO:
        # Some encoders join several frames, and take no rest: 128 frames of the usual 10 ms can be halved often.
        reader = getattr(processor, "audio_processor", getattr(processor, "feature_extractor", None))
        rate = getattr(reader, "sampling_rate", None) or 16_000
        sounds = torch.rand(2, rate * 128 // 100, generator=draw) - 0.5
        return dict(model.prepare(prompts, audio=[*sounds.numpy()]))
    pictures = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8, generator=draw)
    return dict(model.prepare(prompts, images=[*pictures.numpy()]))


def _is_stream(modules: list[Module], calls: dict[Module, Any]) -> bool:
    """Whether these are layers: each is called once, and is given what the one before gives."""
    if len(modules) < 2 or any(len(calls.get(one, ())) != 1 for one in modules):
        return False
    made = [calls[one][0] for one in modules]
    return all(
        _same(first_tensor(after.inputs), first_tensor(before.output)) for before, after in itertools.pairwise(made)
    )


def _is(value: Any, entered: Tensor, padded: bool) -> bool:
    """Whether that is what has entered the stream of the two prompts; with `padded`, maybe with what pads each behind it."""
    first = first_tensor(value) if not isinstance(value, Module) else None
    if not isinstance(first, Tensor) or not first.ndim or first.shape[-1] != entered.shape[-1]:
        return False
    entered = entered.reshape(2, -1, entered.shape[-1])
    if first.numel() % (2 * entered.shape[-1]) or first.numel() < entered.numel():
        return False
    rows = first.reshape(2, -1, entered.shape[-1])
    if rows.shape[1] != entered.shape[1] and not padded:
        return False
    return bool(torch.equal(rows[:, : entered.shape[1]].to(entered.dtype), entered))


def _same(one: Any, other: Any) -> bool:
    return (
        isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    )
