"""The application in one process, run by uvicorn."""

from __future__ import annotations

from asyncio import TimerHandle
from typing import Any

from nnatomy.errors import MissingPackageError
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


def run(server: Server, host: str, port: int) -> None:
    """Serve until interrupted.

    Raises:
        InputError: for an address that others can reach, where no key is asked for.
    """
    check_address(host, server.keys)
    seconds = server.limits.send_seconds
    config = uvicorn.Config(
        server.application,
        host=host,
        port=port,
        http="h11",  # which bounds what a header may be; where httptools is there, uvicorn would take that, which does not
        log_level="warning",
        ws=type("_Connection", (_Connection,), {"send_seconds": seconds}),
        ws_max_size=server.limits.frame_bytes,
        ws_per_message_deflate=False,  # a small frame is not to become a large one
        ws_ping_timeout=seconds,  # a large answer on a slow line takes its time
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run()
