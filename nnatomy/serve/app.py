"""The application: models, and a session for each client.

It is an ASGI application, and knows nothing of what runs it: `application` makes one, which shares nothing with another. `run`
is one way to run it, in one process.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from nnatomy.errors import InputError, MissingPackageError
from nnatomy.remote.wire import PROTOCOL, FrameError, pack
from nnatomy.serve.hello import versions
from nnatomy.serve.jobs import Later
from nnatomy.serve.keys import Client, Keys
from nnatomy.serve.limits import Limits
from nnatomy.serve.metrics import metrics
from nnatomy.serve.page import page
from nnatomy.serve.policy import Refused
from nnatomy.serve.served import Open, Served, served_of
from nnatomy.serve.session import More, Waits

try:
    from starlette.applications import Starlette
    from starlette.requests import HTTPConnection, Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect
except ImportError as error:
    raise MissingPackageError("A server needs starlette and uvicorn: pip install 'nnatomy[serve]'.") from error

#: How often it is looked whether what a frame waits for is free, in seconds.
_AGAIN = 0.01
#: Why a server closes a connection: the codes of its WebSocket.
BAD_FRAME, ENDED, IDLE, USED_UP = 4400, 4403, 4408, 4410


class Denied(Exception):  # noqa: N818
    """A request that is not let in.

    Args:
        kind: what it is counted as.
        status: of HTTP.
    """

    def __init__(self, kind: str, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.kind, self.status = kind, status
        self.headers = {name.replace("_", "-"): one for name, one in headers.items()}

    def response(self) -> Response:
        return JSONResponse({"error": str(self)}, self.status, self.headers)


class Server:
    """Models for many clients.

    Args:
        models: StandardizedTransformers, by the names that clients call them. They are not to be used in this process otherwise.
        keys: that a client has to have one of.
        replica: what clients call this process, if it is one of several: the first digits of its runs.

    Attributes:
        application: what is run, by an ASGI server.
        refused: how often a client has not been let in, or been sent away, by the kind of reason.

    Raises:
        InputError: for a model that cannot be served, and for none.
    """

    def __init__(
        self, models: Mapping[str, Any], keys: Keys | None = None, limits: Limits | None = None, *, replica: str = ""
    ) -> None:
        if not models:
            raise InputError("A server needs a model.")
        self.limits = limits or Limits()
        self.models = {
            name: model if isinstance(model, Served) else served_of(name, model, self.limits)
            for name, model in models.items()
        }
        self.replica = replica
        self._lets_in(keys)

    def _lets_in(self, keys: Keys | None) -> None:
        self.keys = keys or Keys()
        self.refused: Counter[str] = Counter()
        self.application = Starlette(
            routes=[
                Route("/", self._page),
                Route("/metrics", self._metrics),
                Route("/v1/status", self._status),
                Route("/v1/sessions/{number:int}", self._end_session, methods=["DELETE"]),
                WebSocketRoute("/v1/session", self._session),
            ],
            lifespan=self._lifespan,
            exception_handlers={Denied: self._denied},
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        for served in self.models.values():
            await served.close()

    # Who may come.

    def _client(self, asked: HTTPConnection) -> Client:
        client = self.keys.client(asked.headers.get("authorization"))
        if client is None:
            text = "a key is needed: Authorization: Bearer KEY; to the client, api_key=..., or NNATOMY_API_KEY"
            raise Denied("key", 401, text, WWW_Authenticate='Basic realm="nnatomy"')
        return client

    def _admin(self, asked: HTTPConnection) -> Client:
        client = self._client(asked)
        if not client.is_admin:
            raise Denied("role", 403, "that is for keys with the role admin")
        if "origin" in asked.headers:
            raise Denied("origin", 403, "a page of the web may not ask for that")
        return client

    async def _denied(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, Denied)
        self.refused[error.kind] += 1
        return error.response()

    def _client_of(self, socket: WebSocket) -> Client:
        # A page of the web that a browser shows here may not come: browsers say where it is from.
        if "origin" in socket.headers:
            raise Denied("origin", 403, "a page of the web may not have a session")
        return self._client(socket)

    @staticmethod
    def _named(models: Mapping[str, Any], name: str | None) -> Any:
        names = ", ".join(map(repr, models))
        if name is None:
            if len(models) > 1:
                raise Denied("model", 404, f"say which model: it has {names}")
            name = next(iter(models))
        if name not in models:
            raise Denied("model", 404, f"it has no model {name!r:.200}: it has {names}")
        return models[name]

    def _let_in(self, socket: WebSocket) -> tuple[Client, Served]:
        """Who wants a session, and of which model. Raises Denied."""
        client, asked = self._client_of(socket), socket.query_params
        if (protocol := asked.get("protocol", str(PROTOCOL))) != str(PROTOCOL):
            text = f"this server speaks protocol {PROTOCOL}, and the client {protocol:.20}: have the same release of nnatomy"
            raise Denied("protocol", 400, text)
        served = self._named(self.models, asked.get("model"))
        if sum(len(one.sessions) for one in self.models.values()) >= self.limits.sessions:
            text = f"{self.limits.sessions} sessions are open already; try again when one has ended"
            raise Denied("sessions", 503, text, Retry_After="30")
        if served.waiting >= self.limits.waiting:
            seconds = served.seconds_to_wait
            text = f"{served.waiting} frames wait already; try again in about {seconds} s"
            raise Denied("waiting", 503, text, Retry_After=str(seconds))
        return client, served

    # What it tells.

    async def _told(self, asked: Request) -> dict[str, Any]:
        client, hashes = self._client(asked), asked.query_params.get("hash") == "now"
        if hashes:
            self._admin(asked)
        return await self.told(client.is_admin, hashes)

    async def told(self, admin: bool, hashes: bool = False) -> dict[str, Any]:
        """What the status tells.

        Args:
            admin: whether it is an admin who asks.
            hashes: tell the hashes of the weights as they are now, too: whether they are still what was loaded.
        """
        models = [one.told() for one in self.models.values()]
        if hashes:
            for told, served in zip(models, self.models.values(), strict=True):
                told["hash_now"] = await served.hash_now()
        told = {
            "versions": versions(),
            "models": models,
            "sessions": sum(one["sessions"] for one in models),
            "waiting": sum(one["waiting"] for one in models),
            "runs": {key: sum(one["runs"][key] for one in models) for key in ("running", "kept", "bytes")},
            "refused": dict(self._all_refused()),
        }
        if self.replica:
            told["replica"] = self.replica
        if admin:
            opened = [(name, one) for name, served in self.models.items() for one in served.sessions.values()]
            told["open"] = [{"model": name, **one.told()} for name, one in opened]
        return told

    def _all_refused(self) -> Counter[str]:
        return sum((Counter(dict(one.refused)) for one in self.models.values()), Counter(self.refused))

    async def _status(self, request: Request) -> Response:
        return JSONResponse(await self._told(request))

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(page(await self._told(request)), headers={"Content-Security-Policy": _POLICY})

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(metrics(await self._told(request)), media_type="text/plain; version=0.0.4")

    async def _end_session(self, request: Request) -> Response:
        self._admin(request)
        number = request.path_params["number"]
        if not await self._end(request, number):
            raise Denied("session", 404, f"no session {number} is open")
        return JSONResponse({"closed": number})

    async def _end(self, _: Request, number: int) -> bool:
        return self.end(number)

    def end(self, number: int) -> bool:
        """Have a session end; whether there is one of that number."""
        found = [served.sessions[number] for served in self.models.values() if number in served.sessions]
        for one in found:
            one.end("an admin has closed it")
        return bool(found)

    # Sessions.

    async def _session(self, socket: WebSocket) -> None:
        try:
            client, served = self._let_in(socket)
        except Denied as error:
            self.refused[error.kind] += 1
            await self._answer(socket, error.response())
            return
        opened = served.open(self.limits, client)
        try:
            await socket.accept(headers=[(b"nnatomy-replica", self.replica.encode())] if self.replica else None)
            with suppress(WebSocketDisconnect, RuntimeError, OSError):
                await self._serve(socket, opened, served)
        finally:
            del served.sessions[opened.number]
            with suppress(RuntimeError):  # the server is going down
                await asyncio.shield(served.compute(opened.session.close))

    async def _answer(self, socket: WebSocket, response: Response) -> None:
        """Answer who is to have no session here."""
        try:
            await socket.send_denial_response(response)
        except RuntimeError:  # what runs this has no such answers
            await socket.close(ENDED)

    async def _send(self, socket: WebSocket, header: dict[str, Any], blobs: list[bytes]) -> None:
        await self._send_bytes(socket, pack(header, blobs))

    async def _send_bytes(self, socket: WebSocket, frame: bytes) -> None:
        async with asyncio.timeout(self.limits.send_seconds):
            await socket.send_bytes(frame)

    async def _serve(self, socket: WebSocket, opened: Open, served: Served) -> None:
        """Answer frames until one of the two ends it."""
        while True:
            try:
                message = await opened.within(socket.receive(), self.limits)
                if message["type"] == "websocket.disconnect":
                    return
                frame = message.get("bytes")
                answer = await served.compute(opened.session.handle, frame, served.busy)
                while isinstance(answer, Waits) and not opened.why:
                    if not answer.free():
                        await asyncio.sleep(_AGAIN)
                        continue
                    answer = await served.compute(opened.session.handle, frame, served.busy)
                while isinstance(answer, More) and not opened.why:
                    answer = await served.compute(opened.session.go_on, served.busy)
                if isinstance(answer, Later):
                    served.jobs.answer(answer, opened.session, partial(self._send, socket))
                elif isinstance(answer, bytes):
                    await self._send_bytes(socket, answer)
            except TimeoutError as error:
                if opened.may_wait(self.limits):
                    continue
                kind, code = ("idle", IDLE) if not opened.why else ("ended", ENDED)
                why = opened.why or str(error) or "what was sent has not been read"
            except FrameError as error:
                kind, code, why = "frame", BAD_FRAME, str(error)
            except Refused as error:
                kind, code, why = error.kind, USED_UP, str(error)
            else:
                continue
            self.refused[kind] += 1
            async with asyncio.timeout(self.limits.send_seconds):
                await socket.close(code, why[:100])
            return


def application(models: Mapping[str, Any], keys: Keys | None = None, limits: Limits | None = None) -> Starlette:
    """The ASGI application of a server: see `Server`."""
    return Server(models, keys, limits).application


#: What a browser may load for the page: nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
