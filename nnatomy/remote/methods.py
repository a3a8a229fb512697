"""Methods that run whole at a server: one round trip, however many passes they take."""

from __future__ import annotations

import builtins
import inspect
import logging
import secrets
import warnings
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from tqdm.auto import tqdm

from nnatomy import errors
from nnatomy.core.frames import is_ours, user_frames
from nnatomy.errors import ConnectionLostError, NotRemoteError, RemoteError
from nnatomy.methods.metrics import Answers, NamedMetric
from nnatomy.remote.catalog import GENERATION, MODELS, NOT_WHOLE, PROMPT_KEYS, WHOLE, WITHOUT_GRADIENTS, parameters
from nnatomy.remote.connection import Connection
from nnatomy.remote.values import NotSendableError, Receiver, Sender
from nnatomy.remote.wire import unpack

#: How many bytes of a result one answer brings; and of arguments that are sent.
_AT_ONCE, _GIVEN = 8 << 20, 64 << 20


class NotWholeError(NotRemoteError):
    """A method that cannot run whole at the server."""


class Server:
    """A server, and the methods that it runs whole.

    `model.server` is that of a remote model. Without a model here: `Server("http://HOST:PORT")`.

    Args:
        server: its address.
        api_key: if it asks for one.
        model: which of its models; None for the one that it has.
        connection: one that is open, to be used as long as it lives.

    Example:
        ```py
        found = model.server.run("activation_patching", clean=clean, corrupted=corrupted, metric=metric)
        run = model.server.submit("logit_lens", prompts=prompts)      # does not wait
        run.status()["progress"]
        probs = run.result()
        ```
    """

    def __init__(
        self, server: str, api_key: str | None = None, model: str | None = None, *, connection: Connection | None = None
    ) -> None:
        self.address = server
        self._key, self._model, self._connected = api_key, model, connection

    def connection(self) -> Connection:
        """One that is open: the one before, or a new one."""
        if self._connected is None or self._connected.lost:
            self._connected = Connection(self.address, self._key, self._model)
        return self._connected

    @property
    def lost(self) -> str | None:
        """Why the connection is gone; None if there is one, or none yet."""
        return None if self._connected is None else self._connected.lost or None

    def status(self) -> dict[str, Any]:
        """What the server tells of itself: versions, its model with hash and report, sessions, runs."""
        return (self._connected or self.connection()).status()

    def run(self, method: str, *, progress: bool = False, **arguments: Any) -> Any:
        """What the method of that name gives on the server's model.

        Args:
            method: one of `nnatomy.methods`, such as "logit_lens".
            arguments: its own, without the model: numbers, texts, lists, tensors, metrics of this library, or
                `{"logit_difference": [" Paris", " Tokyo"]}` for one.
            progress: show how far it has come.

        Raises:
            NotRemoteError: for a method that is not run there, or an argument that is no data.
            ConnectionLostError: if the server is gone; its text says how to fetch the result all the same.
            Exception: what the method raises.
        """
        return self._send(method, arguments).result(progress=progress)

    def submit(self, method: str, **arguments: Any) -> Run:
        """Have it run, and do not wait. Arguments and errors as `run`."""
        run = self._send(method, arguments)
        run.start()
        return run

    def fetch(self, name: str) -> Run:
        """A run that was begun before, perhaps by another process with the same key."""
        return Run(self, name)

    def _send(self, method: str, arguments: dict[str, Any]) -> Run:
        if method not in WHOLE:
            why = NOT_WHOLE.get(method, f"there are {', '.join(sorted(WHOLE))}")
            raise NotRemoteError(f"{method!r} is not run at a server: {why}.")
        try:
            return Run.of(self, method, arguments)
        except NotSendableError as error:
            raise NotRemoteError(f"{method} is to run at the server, which cannot be given {error}.") from None

    def __repr__(self) -> str:
        return f"<the server {self.address}>"


class Run:
    """A method that runs at a server, whose result is kept there for some time.

    Attributes:
        name: what it is called: 32 random digits. Whoever has it, and the same key, can fetch the result.
    """

    def __init__(self, server: Server, name: str, detached: bool = False) -> None:
        self.name = name
        self._server = server
        self._question: list[Any] | None = None
        self._sender = Sender(detached)
        self._got = bytearray()
        self._size: int | None = None

    @classmethod
    def of(cls, server: Server, method: str, arguments: dict[str, Any]) -> Run:
        """One that is not begun. Raises NotSendableError."""
        run = cls(server, secrets.token_hex(16), method in WITHOUT_GRADIENTS)
        run._question = ["run", run.name, method, run._sender.send(arguments)]
        if sum(map(len, run._sender.blobs)) > _GIVEN:
            raise NotSendableError(f"tensors of more than {_GIVEN:,} bytes")
        return run

    def start(self) -> None:
        """Have it begin, and do not wait."""
        if self._question is not None:
            question, self._question = self._question, None
            self._server.connection().ask("begin", *question[1:], blobs=self._sender.blobs)

    def status(self) -> dict[str, Any]:
        """The method, whether it has ended, seconds of computing, progress (what, done, of how many), size, and how
        long the result is kept still."""
        told: dict[str, Any] = self._server.connection().ask("look", self.name)[0]
        return told

    def cancel(self) -> None:
        """Have it end at the next function that it calls, and drop its result."""
        self._server.connection().command("cancel", self.name)
        self._forget()

    def result(self, *, progress: bool = False, forget: bool = True) -> Any:
        """What the method gives, when it is over. After a broken connection, called again, it goes on with what it has got.

        Args:
            forget: have the server drop it then.
            progress: show how far it has come.

        Raises:
            ConnectionLostError: if the server is gone.
            Exception: what the method has raised.
        """
        try:
            with _Bars(progress) as bars:
                while self._size is None or len(self._got) < self._size:
                    self._fetch(bars)
        except KeyboardInterrupt:
            self.cancel()
            raise
        except ConnectionLostError as error:
            there = self._server.address
            why = str(error) if (lost := self._server.lost) is None else f"The connection to {there} is gone: {lost}."
            raise ConnectionLostError(
                f"{why} If the server is still there the run goes on, and its result is kept for some time: "
                f"Server({there!r}, api_key).fetch({self.name!r}).result() brings it, as does model.server.fetch."
            ) from None
        header, blobs = unpack(bytes(self._got))
        if forget:
            self._forget()
        return self._opened(header, blobs)

    def _forget(self) -> None:
        connection = self._server.connection()
        connection.command("forget", self.name)
        connection.send()  # and not wait: the client may be about to end

    def _fetch(self, bars: _Bars) -> None:
        question, blobs = ["wait", self.name, len(self._got)], []
        if self._question is not None:
            question, blobs, self._question = self._question, self._sender.blobs, None
        answer, parts = self._server.connection().ask(*question, _AT_ONCE, blobs=blobs, told=bars.show)
        self._size = answer["size"]
        self._got += parts[0]

    def _opened(self, header: dict[str, Any], blobs: Any) -> Any:
        for kind, text in header.get("warnings", ()):
            _warn(kind, text)
        for name, level, text in header.get("log", ()):
            if name.startswith("nnatomy."):
                logging.getLogger(name).log(level, "%s", text)
        if (failed := header.get("error")) is not None:
            raise _error(*failed)
        for metric, spellings in zip(self._sender.metrics, header.get("said", ()), strict=False):
            metric.take_over(spellings)
        return Receiver(blobs).receive(header["ok"])

    def __repr__(self) -> str:
        return f"<run {self.name} at {self._server.address}>"


class _Bars(AbstractContextManager["_Bars"]):
    """Bars in the terminal, as the server tells."""

    def __init__(self, on: bool) -> None:
        self._on, self._bars, self._open = on, dict[str, Any](), ExitStack()

    def show(self, what: str, done: int, total: int) -> None:
        if not self._on:
            return
        bar = self._bars.get(what)
        if bar is None or done < bar.n:
            bar = self._bars[what] = self._open.enter_context(tqdm(total=total, desc=what))
        bar.update(done - bar.n)

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            for bar in self._bars.values():
                bar.update(bar.total - bar.n)
        self._open.close()


def run_whole(server: Server, method: str, given: dict[str, Any], model: Any) -> tuple[Any] | None:
    """Have a method run whole, if all of its arguments can be sent: what it gives; None if it has not run.

    Args:
        given: the arguments, with the model.
    """
    if method not in WHOLE:
        return None
    arguments = dict(given)
    for name in MODELS:
        arguments.pop(name, None)
    more = arguments.pop("kwargs", {}) if "kwargs" not in parameters(method) else {}
    arguments.pop("_", None)
    defaults = {name: one.default for name, one in parameters(method).items()}
    if not all(type(one) is GENERATION.get(key) and (key != "do_sample" or not one) for key, one in more.items()):
        return None
    arguments = {key: one for key, one in arguments.items() if one is not defaults.get(key, inspect.Parameter.empty)}
    try:
        if any(not _is_plain(key, one) for key, one in arguments.items()):
            return None
        run = Run.of(server, method, {**arguments, **more})
    except (NotSendableError, OverflowError, UnicodeEncodeError):
        return None
    parts = [part for metric in run._sender.metrics for part in metric.parts if isinstance(part, Answers)]
    if not all(part.is_of(model.tokenizer) for part in parts):
        return None
    try:
        return (run.result(progress=bool(given.get("progress", defaults.get("progress", False)))),)
    except NotWholeError:
        return None


def _is_plain(key: str, value: Any) -> bool:
    """Whether a dict in it is a prompt of tokens, or a function one of ours."""
    if isinstance(value, dict):
        return value.keys() <= PROMPT_KEYS
    if isinstance(value, (list, tuple)):
        return all(_is_plain(key, one) for one in value)
    return not callable(value) or isinstance(value, NamedMetric)


def _error(kind: str, text: str) -> Exception:
    if kind == "NotWholeError":
        return NotWholeError(f"The method cannot run at the server: {text}.")
    found: Any = getattr(errors, kind, None) or getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, Exception):
        return found(text)
    return RemoteError(f"{kind} at the server: {text}")


def _warn(kind: str, text: str) -> None:
    """As the method would have, at the innermost line that is not ours nor torch's."""
    found: Any = getattr(builtins, kind, UserWarning)
    category = found if isinstance(found, type) and issubclass(found, Warning) else UserWarning
    frame = next(
        one for one in user_frames() if not (is_ours(one) or one.f_globals.get("__name__", "").startswith("torch."))
    )
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, registry=registry)


def reading_of(tokenizer: Any) -> Any:
    """What of a tokenizer its users change."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    names = "padding_side truncation_side model_max_length pad_token_id bos_token_id eos_token_id chat_template"
    parts = ("post_processor", "normalizer", "pre_tokenizer")
    own = (getattr(tokenizer, name, None) for name in (*names.split(), "add_bos_token", "add_eos_token"))
    return id(tokenizer), len(tokenizer), *own, *(repr(getattr(backend, name, None)) for name in parts)
