"""The application in one process, run by uvicorn."""

from __future__ import annotations

import socket
import sys
from asyncio import TimerHandle
from typing import Any

from nnatomy.errors import InputError, MissingPackageError
from nnatomy.serve.app import Server
from nnatomy.serve.keys import check_address

try:
    import uvicorn
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
except ImportError as error:
    raise MissingPackageError("A server needs starlette and uvicorn: pip install 'nnatomy[serve]'.") from error

#: Of how many pieces a message may be. Each takes memory, however few bytes it has.
_PIECES = 1024


class _Connection(WebSocketsSansIOProtocol):
    """Cuts off who does not read what it is sent, or never ends what it sends: else both would be held for as long as it likes."""

    send_seconds = 0.0
    frames: list[bytes]
    _cut: TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut = self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _stop(self) -> None:
        if self._cut is not None:
            self._cut.cancel()

    def handle_cont(self, event: Any) -> None:
        super().handle_cont(event)
        if len(self.frames) > _PIECES:
            self.frames = []
            self.transport.abort()


def bind(host: str, port: int) -> socket.socket:
    """Take an address before models are loaded for it; who connects is refused until it is served. Port 0 is any that is free.

    Raises:
        InputError: if it cannot be had.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that is started again takes its port at once
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"{host}:{port} cannot be had ({error.strerror}). Give --port another; 0 is any that is free."
        ) from error
    return bound


def run(server: Server, host: str, port: int, bound: socket.socket | None = None, told: str = "") -> None:
    """Serve until interrupted.

    Args:
        bound: by `bind`, to that address.
        told: what is there; it is written with the address to the standard error, once whoever connects is heard.

    Raises:
        InputError: for an address that others can reach, where no key is asked for, and for one that cannot be had.
    """
    check_address(host, server.keys)
    seconds = server.limits.send_seconds
    config = uvicorn.Config(
        server.application,
        http="h11",  # which bounds what a header may be; where httptools is there, uvicorn would take that, which does not
        log_level="warning",
        ws=type("_Connection", (_Connection,), {"send_seconds": seconds}),
        ws_max_size=server.limits.frame_bytes,
        ws_per_message_deflate=False,  # a small frame is not to become a large one
        ws_ping_timeout=seconds,  # a large answer on a slow line takes its time
        timeout_graceful_shutdown=2,
    )
    with bound or bind(host, port) as at:
        at.listen(config.backlog)  # so that who reads the address at once is not refused while uvicorn starts
        if told:
            sys.stderr.write(f"nnatomy: {told} at http://{host}:{at.getsockname()[1]}\n")
        uvicorn.Server(config).run(sockets=[at])
