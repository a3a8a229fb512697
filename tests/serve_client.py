"""A client that sends what it likes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from nnatomy.remote.wire import pack, to_bytes, unpack


class Raw:
    """A session, with a tensor 2 (4 x 4), 4 (indices 0, 1) and 6 (a number that is no index)."""

    def __init__(self, address: str, query: str = "", **headers: str) -> None:
        self._opening = connect(
            f"{address.replace('http', 'ws')}/v1/session{query}",
            additional_headers=headers,
            proxy=None,
            max_size=None,
        )
        self.socket = self._opening.__enter__()

    def __enter__(self) -> Raw:
        for number, tensor in (
            (2, torch.arange(16.0).view(4, 4)),
            (4, torch.tensor([0, 1])),
            (6, torch.tensor([10**9])),
        ):
            self.put(number, tensor)
        return self

    def __exit__(self, *_: Any) -> None:
        self._opening.__exit__(None, None, None)

    def put(self, number: int, tensor: Tensor) -> dict[str, Any]:
        command = ["put", number, str(tensor.dtype)[6:], list(tensor.shape), list(range(tensor.ndim))]
        return self.ask(["sync"], [command], [to_bytes(tensor)])

    def ask(self, question: Any, commands: Any = (), blobs: Any = ()) -> dict[str, Any]:
        """The header of the answer; {"closed": code} where the server has closed the session."""
        return self.raw(pack({"n": 1, "c": list(commands), "q": question}, blobs))

    def raw(self, frame: Any) -> dict[str, Any]:
        try:
            self.socket.send(frame)
            return unpack(self.socket.recv(timeout=60))[0]
        except ConnectionClosed as closed:
            return {"closed": closed.rcvd.code if closed.rcvd is not None else 1006}
