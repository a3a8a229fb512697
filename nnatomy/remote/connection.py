"""The connection to a server: commands, which gather until something has to be known, and questions, which wait for the answer."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from ipaddress import ip_address
from itertools import count
from threading import RLock, get_ident
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import ProxyHandler, Request, build_opener
from weakref import ref

import torch

from nnatomy.core.frames import is_ours
from nnatomy.errors import (
    AssignmentError,
    ConnectionLostError,
    InputError,
    LoadError,
    MissingPackageError,
    NotInThisModelError,
    OutOfOrderError,
    RemoteError,
    UsageError,
)
from nnatomy.remote.wire import PROTOCOL, FrameError, pack, unpack

try:
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
    from websockets.sync.client import connect
except ImportError as error:
    raise MissingPackageError("Remote models need websockets: pip install 'nnatomy[remote]'.") from error

#: Commands are sent, and not waited for, when so many or so many bytes of tensors have gathered.
COMMANDS, BYTES = 128, 4 << 20
_LINES = 20_000
#: How long it may take until a session is open, in seconds: where all are taken, some clients wait.
_OPENING = 60
#: Commands that do not fail.
_SURE = ("end", "drop", "clear")
#: Packages in whose code no line is the user's.
_OTHERS = ("torch.", "transformers.", "einops.", "websockets.", "contextlib", "threading")
#: What is raised here for an error of that name there; all are RemoteErrors too.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: type("RemoteError", (RemoteError, kind), {"__doc__": RemoteError.__doc__})
    for kind in (
        *(IndexError, ValueError, TypeError, RuntimeError, NotImplementedError),
        *(AssignmentError, InputError, NotInThisModelError, OutOfOrderError, UsageError),
    )
}


class Connection:
    """One session at a server.

    Args:
        server: its address, `http://HOST:PORT`.
        key: the API key, if it asks for one.
        model: the model's name there; None for the one that it has.
        replica: which of several servers at that address is wanted, by its name.

    Attributes:
        replica: the name of the one that it is; "" if there is one alone.
        trips: how often an answer has been waited for.
        gradients: how often gradients may have changed (see `RemoteTensor`).
        pinned: what has been sent for the next command, and lives until then.
        quiet: a thread in which no line of the user's is at work: a forward pass that runs by commands.
        unanswered: whether something has been asked for since the last answer that may have failed.
        dead: the numbers of tensors that nobody holds any more.
        live: the others, by number.
        weights: by the id of a parameter or buffer here, the same one there (see `sending`).

    Raises:
        ConnectionLostError: if there is no server, or it does not let this client in.
    """

    def __init__(self, server: str, key: str | None = None, model: str | None = None, replica: str = "") -> None:
        if not isinstance(server, str):
            raise LoadError(f"server={server!r}: give its address, http://HOST:PORT.")
        self.server, self.key, self.model = server.rstrip("/"), key, model
        self.trips = 0
        self.gradients = [0]
        self.pinned: list[Any] = []
        self.dead: deque[int] = deque()
        self.live: dict[int, ref[Any]] = {}
        self.weights: dict[int, Any] = {}
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._lock = RLock()
        self._commands: list[Any] = []
        self._blobs: list[bytes] = []
        self._bytes = 0
        self._numbers = count(2, 2)
        self._serials = count(1)
        self._sent = 0
        self._lines: deque[tuple[int, Any, int]] = deque(maxlen=_LINES)
        self._grad = True
        self._process = os.getpid()
        self.lost = ""
        self.quiet = 0
        self.unanswered = False
        url = urlsplit(self.server)
        if url.scheme not in ("http", "https") or not url.hostname or _has_no_port(url):
            raise LoadError(f"server={server!r}: give its address, http://HOST:PORT.")
        asked = urlencode({"protocol": PROTOCOL} | ({} if model is None else {"model": model}))
        wanted = {"serve_multiplexed_model_id": replica} if replica else {}
        address = f"{'ws' if url.scheme == 'http' else 'wss'}{self.server.removeprefix(url.scheme)}/v1/session?{asked}"
        try:
            opening = connect(
                address,
                additional_headers=self._headers | wanted,
                open_timeout=_OPENING,
                compression=None,
                max_size=None,
                proxy=None if _is_here(url.hostname) else True,
                close_timeout=1,
            )
            self._open = ExitStack()  # left by `close`
            self._socket = self._open.enter_context(opening)
            self.replica = self._socket.response.headers.get("nnatomy-replica", "") if self._socket.response else ""
        except (OSError, InvalidHandshake, InvalidURI, TimeoutError) as error:
            told = _denied(getattr(error, "response", None))
            if told.startswith(("it has no model", "say which model")):
                raise LoadError(f"The server {self.server} does not take the model {model!r}: {told}.") from None
            raise ConnectionLostError(f"No connection to the server {self.server}: {told or error}.") from None

    def number(self) -> int:
        """A number for something that is to be there."""
        return next(self._numbers)

    def command(self, *command: Any, blob: bytes | None = None) -> None:
        """Have something done, after all that has been asked for before."""
        with self._lock:
            self._add([*command], blob)
            self.unanswered = self.unanswered or command[0] not in _SURE
            if blob is None:
                self.pinned.clear()
            if len(self._commands) >= COMMANDS or self._bytes >= BYTES:
                self._send(None)

    def send(self) -> None:
        """Send what has gathered."""
        with self._lock:
            self._send(None)

    def ask(
        self, *question: Any, blobs: Sequence[bytes] = (), told: Callable[..., Any] | None = None
    ) -> tuple[Any, list[memoryview]]:
        """The answer to a question, with the bytes of the tensors in it.

        Args:
            blobs: the bytes of the tensors in the question.
            told: is called with how far it has come, while it is waited for.

        Raises:
            RemoteError: what has failed there, now or in a command before; it says which line of the user's that was.
            ConnectionLostError: if the server is gone.
        """
        with self._lock:
            self._blobs += blobs
            serial = self._send([*question])
            self.pinned.clear()
            self.unanswered = False
            self.trips += 1
            header, answer = self._receive()
            # Others are to a question that somebody has not waited for: Ctrl-C.
            while header.get("n") != serial or "progress" in header:
                if header.get("n") == serial and told is not None:
                    told(*header["progress"])
                header, answer = self._receive()
        if (failed := header.get("error")) is None:
            return header.get("ok"), answer
        raise self._error(failed)

    def close(self) -> None:
        """End the session."""
        self.lost = self.lost or "it has been closed"
        self._open.close()

    def status(self) -> dict[str, Any]:
        """What the server tells of itself: versions, models with hashes and reports, sessions."""
        opener = build_opener(ProxyHandler({})) if _is_here(urlsplit(self.server).hostname or "") else build_opener()
        try:
            with opener.open(Request(f"{self.server}/v1/status", headers=self._headers), timeout=30) as answer:
                return json.load(answer)
        except (HTTPError, URLError, OSError, ValueError) as error:
            raise ConnectionLostError(f"The server {self.server} does not tell its status: {error}.") from None

    def _add(self, command: list[Any], blob: bytes | None = None) -> None:
        if (grad := torch.is_grad_enabled()) != self._grad:
            self._grad = grad
            self._note(["grad", grad])
        self._note(command)
        if blob is not None:
            self._blobs.append(blob)
            self._bytes += len(blob)

    def _note(self, command: list[Any]) -> None:
        self._sent += 1
        self._lines.append((self._sent, *((None, 0) if get_ident() == self.quiet else _user_line())))
        self._commands.append(command)

    def _send(self, question: list[Any] | None) -> int:
        if self.lost or os.getpid() != self._process:
            raise self._gone(self.lost or "the process was forked, and it is the parent's")
        if question is not None and torch.is_grad_enabled() != self._grad:
            self._grad = not self._grad
            self._note(["grad", self._grad])
        if self.dead:
            numbers = [self.dead.popleft() for _ in range(len(self.dead))]
            for number in numbers:
                self.live.pop(number, None)
            self._note(["drop", numbers])
        serial, header = next(self._serials), {"c": self._commands, "q": question}
        blobs, self._commands, self._blobs, self._bytes = self._blobs, [], [], 0
        if question is not None:
            self._sent += 1
            self._lines.append((self._sent, *_user_line()))
        try:
            self._socket.send(pack({**header, "n": serial}, blobs))
        except (ConnectionClosed, OSError) as error:
            raise self._gone(error) from None
        return serial

    def _receive(self) -> tuple[dict[str, Any], list[memoryview]]:
        try:
            return unpack(self._socket.recv())
        except (ConnectionClosed, OSError, FrameError) as error:
            raise self._gone(error) from None

    def _gone(self, error: Any) -> ConnectionLostError:
        closed = getattr(error, "rcvd", None)
        self.lost = self.lost or (closed.reason if closed is not None and closed.reason else str(error))
        return ConnectionLostError(
            f"The connection to {self.server} is gone: {self.lost}. What had been fetched is still here; what was at the server "
            "is lost. Make the model again to go on: StandardizedTransformer(..., server=...)."
        )

    def _error(self, failed: dict[str, Any]) -> RemoteError:
        where = next((line for line in self._lines if line[0] == failed["command"]), None)
        asked = (
            "" if where is None or where[1] is None else f", asked for at {where[1].co_filename}:{_line(*where[1:])}"
        )
        kind: Any = _KINDS.get(failed["type"], RemoteError)
        return kind(f"{failed['type']} at the server{asked}: {failed['text']}")


def _denied(response: Any) -> str:
    """Why a server does not let this client in, as it says; "" if it says nothing."""
    if getattr(response, "status_code", 0) in (401, 403):
        return "it asks for another key: api_key=..., or NNATOMY_API_KEY"
    try:
        return str(json.loads(response.body)["error"])[:2000]
    except (AttributeError, ValueError, TypeError, KeyError):
        pass
    if getattr(response, "status_code", 0) == 503:
        seconds = response.headers.get("Retry-After", "some")
        return f"it is full, or has no replica yet; try again in about {seconds} s"
    if getattr(response, "status_code", 0) == 500:
        return "the proxy of a cluster answers so, too, where its queue is full: try again in some seconds"
    return ""


def _user_line() -> tuple[Any, int]:
    """The code and instruction of the user's that is at work."""
    frame = sys._getframe(3)
    while frame is not None and (is_ours(frame) or frame.f_globals.get("__name__", "").startswith(_OTHERS)):
        frame = frame.f_back  # type: ignore[assignment]
    return (None, 0) if frame is None else (frame.f_code, frame.f_lasti)


def _line(code: Any, instruction: int) -> int | None:
    return next((line for start, end, line in code.co_lines() if start <= instruction < end), None)


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _has_no_port(url: Any) -> bool:
    """Whether what stands for the port is none."""
    try:
        return url.port == 0
    except ValueError:
        return True
