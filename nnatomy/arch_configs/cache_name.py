"""What the KV cache is called among the arguments of a forward: releases of Transformers differ in it, and so do models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.nn import Module

#: The names it has: from Transformers 5.24 on; before; before, where it is a state and no keys and values.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(model: Module) -> str:
    """What the model's forward calls the KV cache that it is given; "" if it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), "")


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a forward, by whichever name; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cached_positions(arguments: Mapping[str, Any]) -> int:
    """How many positions the KV cache among the arguments has."""
    length = getattr(given_cache(arguments), "get_seq_length", None)
    try:
        return int(length()) if length else 0
    except ValueError:  # it has a state of all positions together
        return 0


def with_cache_called(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with a cache that is there by another of its names under `name`.

    Where `name` is "" (the model takes none), or two caches are there, they are left for the model to refuse.
    """
    given = [one for one in CACHE_NAMES if one in arguments]
    if not name or len(given) != 1:
        return arguments
    return {name if one == given[0] else one: value for one, value in arguments.items()}
