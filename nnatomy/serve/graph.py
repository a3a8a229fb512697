"""The bytes that autograd keeps for gradients, as long as some tensor of a session has a graph behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nnatomy.serve.policy import Refused
from nnatomy.serve.tensors import Weights


class Graph:
    """Counts what is kept for gradients by what is computed within `kept()`.

    Attributes:
        bytes: of the memory that is kept, the model's own aside.
        check: called before each gradient is computed: what it raises ends the backward pass.
    """

    def __init__(self, weights: Weights, most: int) -> None:
        self.bytes = 0
        self.check: Callable[[], None] = lambda: None
        self._weights, self._most = weights, most
        self._users: dict[int, int] = {}

    def kept(self) -> saved_tensors_hooks:
        """Within, what functions keep is counted.

        Raises:
            Refused: in a function that would keep more than is allowed.
        """
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        tensor = tensor.detach()  # PyTorch knows whose it is; with its graph it would keep itself alive
        if self._weights.share(tensor):
            return tensor
        kept = _Kept(self, tensor)
        if self.bytes > self._most:
            raise Refused(
                f"more than {self._most:,} bytes would be kept for gradients: trace within torch.no_grad(), or detach",
                "graph_bytes",
            )
        return kept

    def _unpack(self, kept: Any) -> Tensor:
        self.check()
        found: Tensor = kept.tensor if isinstance(kept, _Kept) else kept
        return found

    def count(self, storage: torch.UntypedStorage, by: int) -> None:
        """So many more (or fewer) of what is kept lie in that memory."""
        key = storage._cdata
        users = self._users.get(key, 0) + by
        if users == max(by, 0):  # the first one, or the last
            self.bytes += by * storage.nbytes()
        if users:
            self._users[key] = users
        else:
            self._users.pop(key, None)


class _Kept:
    """A tensor that a function keeps for its gradient."""

    def __init__(self, graph: Graph, tensor: Tensor) -> None:
        self.tensor, self._graph, self._storage = tensor, graph, tensor.untyped_storage()
        graph.count(self._storage, 1)

    def __del__(self) -> None:
        self._graph.count(self._storage, -1)
