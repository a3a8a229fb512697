"""The application: one model, one thread that computes, and a session for each client.

It is an ASGI application, and knows nothing of what runs it. `run` is one way, for one process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

from nnatomy.errors import MissingPackageError
from nnatomy.remote.wire import FrameError, pack
from nnatomy.serve.forward import Points
from nnatomy.serve.hello import check_servable, hello, versions, weights_hash
from nnatomy.serve.jobs import Jobs, Later, owner_of
from nnatomy.serve.keys import Keys, check_address
from nnatomy.serve.limits import Limits
from nnatomy.serve.policy import Refused
from nnatomy.serve.session import Session
from nnatomy.serve.tensors import Weights

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect
except ImportError as error:
    raise MissingPackageError("A server needs starlette and uvicorn: pip install 'nnatomy[serve]'.") from error

#: Why a server closes a connection: the codes of its WebSocket.
BAD_FRAME, NO_KEY, BUSY, IDLE, USED_UP = 4400, 4401, 4429, 4408, 4403


class Server:
    """One model for many clients.

    Args:
        model: a StandardizedTransformer. It is not to be used in this process otherwise.
        name: what clients call it.
        keys: that a client has to have one of.
    """

    def __init__(self, model: Any, name: str, keys: Keys | None = None, limits: Limits | None = None) -> None:
        check_servable(model)
        self.limits = limits or Limits()
        self._keys = keys or Keys()
        self._model = model
        self._points, self._weights = Points(model), Weights(model.hf_model)
        self._hello = hello(model, name, self._weights, weights_hash(self._weights))
        self._compute = ThreadPoolExecutor(1, "nnatomy-serve")
        self._sessions = 0
        self._waiting = 0
        self._jobs = Jobs(self.limits, self._on_compute, lambda: self._waiting > 1)
        self.application = Starlette(
            routes=[Route("/v1/status", self._status), WebSocketRoute("/v1/session", self._session)],
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await self._jobs.close()
        self._compute.shutdown(cancel_futures=True)

    async def _on_compute(self, function: Any, *args: Any) -> Any:
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compute, function, *args)
        finally:
            self._waiting -= 1

    async def _status(self, request: Request) -> Response:
        if not self._keys.allow(request.headers.get("authorization")):
            return JSONResponse({"error": "a key is needed: Authorization: Bearer KEY"}, 401)
        told = self._hello
        model = {key: told[key] for key in ("name", "class", "hash", "report")}
        if request.query_params.get("hash") == "now":  # whether they are still what was loaded
            model["hash_now"] = await self._on_compute(weights_hash, self._weights)
        return JSONResponse(
            {
                "versions": versions(),
                "models": [model],
                "sessions": self._sessions,
                "waiting": self._waiting,
                "runs": self._jobs.told(),
            }
        )

    async def _session(self, socket: WebSocket) -> None:
        # A page of the web that a browser shows here may not come: browsers say where it is from.
        if "origin" in socket.headers or not self._keys.allow(socket.headers.get("authorization")):
            await socket.close(NO_KEY)
            return
        await socket.accept()
        if self._sessions >= self.limits.sessions:
            await socket.close(BUSY, f"{self.limits.sessions} sessions are open already")
            return
        self._sessions += 1
        owner = owner_of(bool(self._keys), socket.headers.get("authorization"))
        session = Session(self._model, self._points, self._weights, self.limits, self._hello, self._jobs, owner)
        try:
            await self._serve(socket, session)
        finally:
            self._sessions -= 1
            with suppress(RuntimeError):  # the server is going down
                await asyncio.shield(self._on_compute(session.close))

    async def _serve(self, socket: WebSocket, session: Session) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):
            while True:
                try:
                    message = await asyncio.wait_for(socket.receive(), self.limits.idle_seconds)
                    if message["type"] == "websocket.disconnect":
                        return
                    if self._waiting >= self.limits.waiting:
                        await socket.close(BUSY, f"{self.limits.waiting} frames wait already")
                        return
                    answer = await self._on_compute(session.handle, message.get("bytes"))
                except TimeoutError:
                    if session.pending:
                        continue
                    await socket.close(IDLE, f"nothing came for {self.limits.idle_seconds:g} seconds")
                    return
                except FrameError as error:
                    await socket.close(BAD_FRAME, str(error)[:100])
                    return
                except Refused as error:
                    await socket.close(USED_UP, str(error)[:100])
                    return
                if isinstance(answer, Later):
                    self._jobs.answer(answer, session, lambda header, blobs: socket.send_bytes(pack(header, blobs)))
                elif answer is not None:
                    await socket.send_bytes(answer)


def run(server: Server, host: str, port: int) -> None:
    """Serve until interrupted.

    Raises:
        InputError: for an address that others can reach, where no key is asked for.
    """
    check_address(host, server._keys)
    config = uvicorn.Config(
        server.application,
        host=host,
        port=port,
        log_level="warning",
        ws="websockets-sansio",
        ws_max_size=server.limits.frame_bytes,
        ws_per_message_deflate=False,  # a small frame is not to become a large one
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run()
