"""The windows of attention, as a config gives them."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import Module

#: Where the kinds of layers are, and how wide a window is.
_KINDS = ("layer_types", "attention_layers")
_SLIDING = {"sliding_attention": "sliding_window", "local": "window_size", "hybrid_sliding": "sliding_window"}
_CHUNKED = {"chunked_attention": "attention_chunk_size"}
_FULL = {"full_attention", "global", "hybrid"}


def visible_keys(
    config: Any, layer: int, num_layers: int, seq: int, everywhere: bool = False
) -> Bool[Tensor, "query key"] | None:
    """Which keys each query of a causal layer may attend to; None where the config does not say it.

    Args:
        everywhere: whether a window that the config gives to no kind of layer is that of every layer. (Some models
            have a number for it that they make no use of: see `masks_windows`.)

    Example:
        >>> from transformers import Gemma2Config
        >>> config = Gemma2Config(num_hidden_layers=2, sliding_window=2)  # every other layer's is full
        >>> visible_keys(config, 0, 2, 3).int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    kinds = next((found for name in _KINDS if (found := getattr(config, name, None))), None)
    if kinds is None and everywhere:
        kinds = ["sliding_attention"] * num_layers
    if kinds is None or len(kinds) != num_layers or not {*_SLIDING, *_CHUNKED} & {*kinds}:
        return None  # (a window that no layer is said to have, all may have, or none)
    kind = kinds[layer]
    width = getattr(config, _SLIDING.get(kind) or _CHUNKED.get(kind) or "", None)
    query, key = torch.arange(seq)[:, None], torch.arange(seq)
    causal = key <= query
    if kind in _FULL:
        return causal
    if not width:
        return None
    return causal & (query - key < width if kind in _SLIDING else query // width == key // width)


def masks_windows(model: Module, layer: Module) -> bool:
    """Whether the forward of a module around that layer makes masks with a window."""
    path = next(path for path, module in model.named_modules() if module is layer)
    around = ("", *itertools.accumulate(path.split(".")[:-1], "{}.{}".format))
    forwards = (inspect.unwrap(type(model.get_submodule(one)).forward) for one in around)
    codes = (getattr(forward, "__code__", None) for forward in forwards)
    return any(code is not None and "create_sliding_window_causal_mask" in code.co_names for code in codes)
