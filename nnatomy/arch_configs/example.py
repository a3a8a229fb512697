"""Inputs that a model runs on when nobody has given any: to look at it, and to check it."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Module

from nnatomy.arch_configs.families import ENCODER_DECODERS, NEEDED, SEVERAL_IMAGES

#: As many as prompts that are alike in nothing need.
LEAST_TOKENS = 16
_OF_TOKENS = ("input_ids", "attention_mask", "position_ids", "decoder_input_ids")


def main_input(model: Module) -> str:
    """What the model reads: "input_ids", "pixel_values", "input_features", "input_values", ..."""
    if takes(model, "input_ids") and not has_decoder(model):
        return "input_ids"
    return str(getattr(model, "main_input_name", "input_ids"))


def needed(model: Module) -> tuple[str, ...]:
    """What the model has to be given beside tokens, as its forward's signature or the table of families says."""
    arguments = inspect.signature(model.forward).parameters.values()
    required = (one.name for one in arguments if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD)
    names = (main_input(model), *required, *NEEDED.get(type(model).__name__, ()))
    return tuple(name for name in dict.fromkeys(names) if name not in _OF_TOKENS)


def takes(model: Module, name: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return name in inspect.signature(model.forward).parameters


def accepts(model: Module, name: str) -> bool:
    """Whether the model's forward can be given an argument of that name."""
    parameters = inspect.signature(model.forward).parameters.values()
    return takes(model, name) or any(one.kind is one.VAR_KEYWORD for one in parameters)


def has_decoder(model: Module) -> bool:
    """Whether the model is an encoder and a decoder that reads what the encoder gives."""
    is_one = getattr(model.config, "is_encoder_decoder", False) or type(model).__name__ in ENCODER_DECODERS
    return is_one and takes(model, "decoder_input_ids")


def text_config(model: Module) -> Any:
    """The part of its config that says how large the layers are: of an encoder-decoder, the decoder's."""
    config: Any = model.config
    if not hasattr(config, "get_text_config"):  # of no model of Transformers
        return config
    if not has_decoder(model) and config.is_encoder_decoder:  # the encoder of one, alone
        return config.get_text_config(encoder=True)
    text = config.get_text_config(decoder=True)
    return text if getattr(text, "hidden_size", None) else getattr(text, "decoder_config", text)


def num_tokens(model: Module) -> int:
    """How many token ids there are: by the embedding's rows and by the config, which may leave some rows unused."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = getattr(config, "vocab_size", None)
    try:
        own = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # it does not say
        own = None
    if isinstance(own, Embedding):
        return min(own.num_embeddings, int(said or own.num_embeddings))
    if said:
        return int(said)
    # Which of several it is does not show yet: ids that each takes, but for those of a few kinds of tokens.
    rows = (module.num_embeddings for module in model.modules() if isinstance(module, Embedding))
    return min((count for count in rows if count >= LEAST_TOKENS), default=LEAST_TOKENS)


def input_device(embedding: Module) -> torch.device:
    """Where token ids go. (Weights that accelerate has offloaded lie on the meta device between two passes.)"""
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return next(embedding.parameters()).device if device is None else torch.device(device)


def example_ids(vocab: int, batch: int, seq: int) -> Tensor:
    """Token ids of (batch, seq), that are alike in nothing."""
    ids = torch.tensor([(3 + 7 * i * max(1, vocab // 53)) % vocab for i in range(batch * seq)])
    return ids.view(batch, seq)


def example_inputs(model: Module, batch: int, seq: int, device: torch.device) -> dict[str, Any]:
    """Arguments of the model's forward, in which all prompts differ; `seq` is that of what the layers read.

    An encoder is given a token more than the decoder, so that what is the encoder's shows.
    """
    read = seq + has_decoder(model)
    inputs = beside_tokens(model, batch, read)
    if main_input(model) == "input_ids":
        inputs["input_ids"] = example_ids(num_tokens(model), batch, read)
    if has_decoder(model):
        ids = example_ids(int(text_config(model).vocab_size), batch, seq)
        inputs["decoder_input_ids"] = ids.flip(0, 1)
    return {name: value.to(device) for name, value in inputs.items()}


def beside_tokens(model: Module, batch: int, seq: int) -> dict[str, Tensor]:
    """What the model has to be given beside tokens, for `batch` prompts of `seq` positions: noise, as large as the config says.

    Where prompts of tokens differ, it is the same for each.
    """
    config: Any = model.config
    vision = getattr(config, "encoder", None) or getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    size = (size, size) if isinstance(size, int) else tuple(size)
    frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
    frames = (1,) if type(model).__name__ in SEVERAL_IMAGES else frames
    shapes = {
        "pixel_values": (*frames, getattr(vision, "num_channels", 3), *size),
        "input_features": _spectrum(config, seq),
    }
    shares = {  # numbers from 0 to 1
        "image_attention_mask": (seq, 1),
        "flattened_patches": (7, 2 + getattr(vision, "patch_embed_hidden_size", 0)),  # 2: row and column
        "bbox": (seq, 4),
    }
    made: dict[str, Tensor] = {}
    for name in needed(model):
        rows = batch if name == main_input(model) else 1
        if name == "image_embeds_position_mask":  # an image of no positions
            made[name] = torch.zeros(1, seq, dtype=torch.bool)
            made["image_embeds"] = torch.zeros(1, 0, text_config(model).hidden_size)
        elif name == "qformer_input_ids":
            made[name] = example_ids(int(config.qformer_config.vocab_size), 1, 5)
        elif name in shares:
            shape = (rows, *shares[name])
            made[name] = (torch.arange(math.prod(shape)) * 0.618).frac().view(shape)
        elif name in shapes or name == main_input(model):
            shape = (rows, *shapes.get(name, (4000,)))
            made[name] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dtype = getattr(model, "dtype", torch.float32)
    return {
        name: value.expand(batch, *value.shape[1:]).to(dtype if value.is_floating_point() else value.dtype)
        for name, value in made.items()
    }


def _spectrum(config: Any, seq: int) -> tuple[int, int]:
    """The shape of one prompt's sound."""
    if hasattr(config, "audio_length_per_tok"):  # as many tokens as there is sound for
        return config.audio_config.num_mel_bins, seq * config.audio_length_per_tok
    if hasattr(config, "num_mel_bins"):
        return config.num_mel_bins, 2 * config.max_source_positions
    return 32, getattr(config, "input_feat_per_channel", 80)
