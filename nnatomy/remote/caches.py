"""KV caches of a generation: the cache is the server's, and the one here has its keys and values as remote tensors."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, finalize

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nnatomy.errors import NotRemoteError, a_kind
from nnatomy.remote.connection import Connection


class Caches:
    """The caches that are here and at the server."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._by_number: WeakValueDictionary[int, Any] = WeakValueDictionary()
        #: The number of each, and the keys and values that it is known to have.
        self._known: WeakKeyDictionary[Any, tuple[int, list[Any]]] = WeakKeyDictionary()

    def sent(self, value: Any) -> Any:
        """What stands for it in a frame.

        Raises:
            NotRemoteError: unless it is an empty cache, or one that a pass of this model has left so.
        """
        if not isinstance(value, DynamicCache):
            raise NotRemoteError(f"{a_kind(value, 'A')} cannot be sent to the server of a remote model.")
        number, held = self._known.get(value, (0, []))
        if number and [*map(id, _held(value))] == [*map(id, held)]:
            return {"object": number}
        if value.get_seq_length() or any(type(layer) is not DynamicLayer for layer in value.layers):
            raise NotRemoteError(
                "A KV cache that is no plain DynamicCache, or has been filled or changed here, cannot be sent to the server of a "
                "remote model: generate with use_cache=False, or give the whole prompt."
            )
        number = self._connection.number()
        self._by_number[number], self._known[value] = value, (number, [])
        finalize(value, self._connection.dead.append, number)
        return {"cache": number}

    def received(self, number: int, layers: list[Any] | None) -> Any:
        """The cache that the server has told of, as it is now.

        Args:
            layers: the keys and values of each, or None where it has none yet; None for a cache of another kind.
        """
        cache = self._by_number.get(number)
        if cache is None:
            cache = _Unknown() if layers is None else DynamicCache()
            self._by_number[number] = cache
            finalize(cache, self._connection.dead.append, number)
        if layers is None:
            return _Unknown() if isinstance(cache, DynamicCache) else cache
        while len(cache.layers) < len(layers):
            cache.layers.append(DynamicLayer())
        for layer, told in zip(cache.layers, layers, strict=True):
            if told is not None:
                (layer.keys, layer.values), layer.is_initialized = told, True
                layer.dtype, layer.device = layer.keys.dtype, torch.device("cpu")
        self._known[cache] = number, _held(cache)
        return cache


class _Unknown:
    """A cache of a kind that only a local model has."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotRemoteError(
            f"past_key_values.{name}: a KV cache of its kind is at the server alone. Give use_cache=False."
        )


def _held(cache: Any) -> list[Any]:
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return [one for layer in layers for one in (layer.keys, layer.values)]
