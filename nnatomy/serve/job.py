"""A method that runs here whole, for a client: by turns with everybody's frames, measured, and with its result as bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import is_dataclass
from math import prod
from threading import Semaphore, Thread
from typing import Any

import torch

from nnatomy.core.worker import release_helpers
from nnatomy.errors import InputError
from nnatomy.methods.metrics import METRICS, NamedMetric
from nnatomy.methods.progress import told
from nnatomy.remote.catalog import CROSSED, GENERATION, NOT_WHOLE, PROMPT_KEYS, WHOLE, method_of, model_name, parameters
from nnatomy.remote.values import NotSendableError, Receiver, Sender
from nnatomy.remote.wire import FrameError, pack
from nnatomy.serve.heard import Heard, heard, listening
from nnatomy.serve.limits import Limits, Used
from nnatomy.serve.meter import Meter, NotWholeError, Stopped
from nnatomy.serve.policy import Refused
from nnatomy.serve.tensors import Weights

#: How long a method computes before others have their turn, in seconds.
TURN = 0.05
#: Numbers in arguments, but for seeds, are of this size at most: they say how often or how many.
_MOST = 1_000_000
#: The characters of all texts in arguments, and of one, for each token that a pass may have.
_TEXTS, _TEXT = 64, 16


class Job:
    """One method for one client. It has a thread, which computes while `go_on` waits, and then alone.

    Args:
        name: of the method.
        given: its arguments, as a header has them.
        grad: whether the client records gradients.
        seconds: how long it may compute.
        used: what its session has used so far.

    Attributes:
        progress: what it does, how many are done, and of how many.
        ended: whether it is over; then `frame` has what came of it, for its client.
        given_bytes: of the tensors in its arguments.
        ended_at, asked_at: when that was, and when a client has last asked for it, by `time.monotonic`.
    """

    def __init__(
        self,
        model: Any,
        weights: Weights,
        limits: Limits,
        name: Any,
        given: Any,
        blobs: list[Any],
        grad: bool,
        seconds: float,
        used: Used | None = None,
    ) -> None:
        self.name = check_name(name)
        self.progress: tuple[str, int, int] | None = None
        self.seconds = 0.0
        self.ended = False
        self.ended_at = math.inf
        self.asked_at = time.monotonic()
        self.frame = b""
        self._model, self._weights, self._limits = model, weights, limits
        self.given_bytes = sum(map(len, blobs))
        self._given, self._blobs, self._grad, self._allowed = given, blobs, grad, seconds
        self._used = used
        self._go, self._stands = Semaphore(0), Semaphore(0)
        self._thread: Thread | None = None
        self._cancelled = ""
        self._stopping = self._done = False
        self._began = self._until = 0.0
        self._busy: Callable[[], bool] = lambda: False
        self._found: tuple[dict[str, Any], list[bytes]] = ({}, [])
        self._heard = Heard()

    def cancel(self, why: str) -> None:
        """Have it end at the next function that it calls."""
        self._cancelled = self._cancelled or why
        if self._thread is None and not self.ended:
            self._end({"error": ["Refused", why]})

    def go_on(self, busy: Callable[[], bool]) -> None:
        """Let it compute until it ends, or until its turn is over and others wait."""
        if self.ended:
            return
        self._began = time.monotonic()
        self._until, self._busy = self._began + TURN, busy
        with listening():
            if self._thread is None:
                self._thread = Thread(target=self._run, name="nnatomy-method", daemon=True)
                self._thread.start()
            else:
                self._go.release()
            release_helpers()
            self._stands.acquire()
        self.seconds += time.monotonic() - self._began
        if self._done:
            self._thread.join()
            self._end(*self._found)

    def _end(self, header: dict[str, Any], blobs: list[bytes] | None = None) -> None:
        self.frame = pack({**header, "warnings": self._heard.warnings, "log": self._heard.log}, blobs or [])
        self.ended, self.ended_at = True, time.monotonic()
        self._model = self._given = None
        self._blobs, self._found = [], ({}, [])

    # In its own thread.

    def _run(self) -> None:
        told.set(self._tell)
        heard.set(self._heard)
        try:
            with torch.set_grad_enabled(self._grad), self._meter():
                value, metrics = self._value()
            sender = Sender()
            try:
                header = {"ok": sender.send(value), "said": [one.spellings() for one in metrics]}
            except NotSendableError as error:
                raise NotWholeError(f"its result has {error}") from None
            if (size := sum(map(len, sender.blobs))) > self._limits.held_bytes:
                raise Refused(f"a result of {size:,} bytes; {self._limits.held_bytes:,} are allowed")
            self._found = header, sender.blobs
        except Stopped as stopped:
            self._found = {"error": _told(stopped.error)}, []
        except BaseException as error:  # noqa: BLE001 - told to the client
            self._found = {"error": _told(error)}, []
        self._weights.put_back()
        self._done = True
        release_helpers()
        self._stands.release()

    def _meter(self) -> Meter:
        table = self._model.hf_model.get_input_embeddings()
        table = getattr(table, "weight", None)
        return Meter(self._limits, self._weights, self._check, self._used, table, self._check_end)

    def _value(self) -> tuple[Any, list[Any]]:
        receiver = Receiver(self._blobs, self._model, self._model.device)
        arguments = _arguments(self.name, receiver.receive(self._given), self._model, self._limits)
        self._blobs = []
        return method_of(self.name)(**arguments), receiver.metrics

    def _check(self) -> None:
        """Before each function that it calls."""
        if self._stopping:
            return  # what it does on its way out
        if time.monotonic() > self._until and self._busy() and not self._cancelled:
            release_helpers()
            self._stands.release()
            self._go.acquire()
        self._check_end()

    def _check_end(self) -> None:
        if self._stopping:
            return
        if self._cancelled:
            self._stop(self._cancelled)
        if self.seconds + time.monotonic() - self._began > self._allowed:
            self._stop(f"this session has used up its {self._limits.compute_seconds:,.0f} seconds")

    def _stop(self, why: str) -> None:
        self._stopping = True
        raise Stopped(Refused(why))

    def _tell(self, what: str, done: int, total: int) -> None:
        self.progress = what, done, total


def check_name(name: Any) -> str:
    """Raise Refused unless it is a method that is run here."""
    if isinstance(name, str) and name in WHOLE:
        return name
    if isinstance(name, str) and name in NOT_WHOLE:
        raise Refused(f"{name} is not run at a server: {NOT_WHOLE[name]}")
    raise Refused(f"there is no method {name!r:.60} to be run here: {', '.join(sorted(WHOLE))}")


def _arguments(name: str, given: Any, model: Any, limits: Limits) -> dict[str, Any]:
    """What to call it with. Raises Refused for what is not to be given, and InputError for no such argument."""
    if not isinstance(given, dict):
        raise FrameError("arguments are a dict")
    generation = GENERATION if name == "patchscope_generate" else {}
    allowed = {**parameters(name), **generation}
    for key, value in given.items():
        if key not in allowed:
            raise InputError(f"{name} has no argument {key!r:.60} that a server takes: it has {', '.join(allowed)}.")
        if key in generation and type(value) is not generation[key]:
            raise Refused(f"{key}={value!r:.60} of a generation")
        _check(key, value, limits)
    if (size := sum(map(_letters, given.values()))) > (most := _TEXTS * limits.tokens):
        raise Refused(f"texts of {size:,} characters in all; {most:,} are allowed")
    pairs = prod(len(one) for key in CROSSED.get(name, ()) if isinstance(one := given.get(key), (list, tuple)))
    if pairs > _MOST:
        raise Refused(f"{' and '.join(CROSSED[name])}: {pairs:,} pairs; {_MOST:,} are allowed")
    arguments = {**given, model_name(name): model}
    metric = given.get("metric")
    if isinstance(metric, dict):  # {"logit_difference": [" Paris", " Tokyo"]}
        ((kind, parts),) = metric.items() if len(metric) == 1 else (("", []),)
        if kind not in METRICS or not isinstance(parts, list):
            raise InputError(
                f"metric={metric!r:.80}: a dict of one of {', '.join(METRICS)}, with a list of its arguments."
            )
        named = {} if kind == "kl_divergence" else {"model": model}
        arguments["metric"] = METRICS[kind][0](*parts, **named)
    return arguments


def _check(key: str, value: Any, limits: Limits) -> None:
    """Raise Refused for a value that would have much done for little."""
    if type(value) is int and key != "seed" and abs(value) > _MOST:
        raise Refused(f"{key}: the number {value:,}; {_MOST:,} is allowed")
    if isinstance(value, str) and len(value) > _TEXT * limits.tokens:
        raise Refused(f"{key}: a text of {len(value):,} characters; {_TEXT * limits.tokens:,} are allowed")
    if isinstance(value, NamedMetric):
        return  # it has read its texts
    if is_dataclass(value):
        value = list(vars(value).values())
    if isinstance(value, dict) and key == "metric":
        value = list(value.values())
    if isinstance(value, dict):
        if not value.keys() <= PROMPT_KEYS:
            raise Refused(f"{key}: a dict has {', '.join(sorted(PROMPT_KEYS))}")
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            _check(key, one, limits)


def _letters(value: Any) -> int:
    """How many characters the texts in a value have."""
    if isinstance(value, str):
        return len(value)
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_letters, value)) if isinstance(value, (list, tuple)) else 0


def _told(error: BaseException) -> list[Any]:
    texts = [one for one in error.args if isinstance(one, str)]
    return [type(error).__name__, (texts[0] if texts and len(error.args) == 1 else str(error))[:20_000]]
