"""A model that is served, with the one thread that computes with it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any

from nnatomy.serve.forward import Points
from nnatomy.serve.hello import check_servable, hello, weights_hash
from nnatomy.serve.jobs import Jobs
from nnatomy.serve.keys import Client
from nnatomy.serve.limits import Limits
from nnatomy.serve.session import Session
from nnatomy.serve.tensors import Weights

#: The numbers of sessions, which no two in a process have in common.
_numbers = count(1)


class Served:
    """One model for many clients.

    Args:
        name: what clients call it.
        limits: those of its runs.
        model: a StandardizedTransformer. It is not to be used in this process otherwise.

    Attributes:
        sessions: those that are open, by number.
        waiting: how many frames wait for their turn, or are carried out.
        frames, seconds: how many have been carried out, and how long that has taken.
        refused: how often a command has been refused, by the kind of it.

    Raises:
        InputError: for a model that cannot be served.
    """

    #: What each client has.
    session: type[Session] = Session

    def __init__(self, name: str, model: Any, limits: Limits | None = None) -> None:
        self.name = name
        self.sessions: dict[int, Open] = {}
        self.waiting = self.frames = 0
        self.seconds = 0.0
        self.refused: Counter[str] = Counter()
        self._model = model
        self._points, self._weights, self._hello = self._known(model)
        self._thread = ThreadPoolExecutor(1, f"nnatomy-serve {name}")
        self.jobs = Jobs(limits or Limits(), self.compute, self.busy)

    def _known(self, model: Any) -> tuple[Any, Weights, dict[str, Any]]:
        """The points of the model, its weights, and what a client is told of it. Raises InputError."""
        check_servable(model)
        model._sums.find()  # validation has, but for a model that has not been validated
        model._mixers.find()
        weights = Weights(model.hf_model)
        return Points(model), weights, hello(model, self.name, weights, weights_hash(weights))

    def busy(self) -> bool:
        """Whether others wait for the thread that computes."""
        return self.waiting > 1

    async def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function gives, in the model's thread, when all that has been asked for before is done."""
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._timed, function, *args)
        finally:
            self.waiting -= 1

    def _timed(self, function: Callable[..., Any], *args: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*args)
        finally:
            self.frames += 1
            self.seconds += time.monotonic() - began

    @property
    def seconds_to_wait(self) -> int:
        """About how long it takes until what waits now is done: at least one."""
        return 1 + int(self.waiting * self.seconds / max(1, self.frames))

    def open(self, limits: Limits, client: Client) -> Open:
        """A new session. The results of its runs are for whoever has the same key; for everybody where none is asked for."""
        jobs = self.jobs if self._hello.get("whole_methods", True) else None
        told = self._hello, self.refused, jobs, client.owner
        session = self.session(self._model, self._points, self._weights, limits, *told)
        opened = Open(next(_numbers), session, client)
        self.sessions[opened.number] = opened
        return opened

    async def hash_now(self) -> str:
        """The hash of the weights as they are now, whether or not that is what was loaded."""
        found: str = await self.compute(weights_hash, self._weights)
        return found

    def told(self) -> dict[str, Any]:
        """What the status tells of it."""
        keys = ("name", "class", "engine", "revision", "hash", "report")
        told = {key: self._hello[key] for key in keys if key in self._hello}
        parameters = list(self._points.root.parameters())
        return {
            **told,
            "device": str(self._model.device),
            "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
            "parameters": sum(one.numel() for one in parameters),
            "sessions": len(self.sessions),
            "waiting": self.waiting,
            "frames": self.frames,
            "seconds": round(self.seconds, 3),
            "held_bytes": sum(one.session.held_bytes for one in self.sessions.values()),
            "runs": self.jobs.told(),
        }

    async def close(self) -> None:
        """End the runs, and the thread, after what it is at."""
        await self.jobs.close()
        self._thread.shutdown(cancel_futures=True)


def served_of(name: str, model: Any, limits: Limits) -> Served:
    """A model that is served, on Transformers or an engine, in one process or several."""
    from nnatomy.vllm import VllmTransformer

    if isinstance(model, VllmTransformer):
        from nnatomy.vllm.split_served import engine_served

        return engine_served(name, model, limits)
    if model._ranks is None:
        return Served(name, model, limits)
    from nnatomy.parallel.served import SplitServed

    return SplitServed(name, model, limits)


class Open:
    """A session that is open.

    Attributes:
        why: why somebody wants it to end, if so.
    """

    def __init__(self, number: int, session: Session, client: Client) -> None:
        self.number, self.session, self.client = number, session, client
        self.why = ""
        self._began = self._last = time.monotonic()
        self._clock: asyncio.Timeout | None = None

    def may_wait(self, limits: Limits) -> bool:
        """Whether it still waits for an answer, in the time that it has."""
        return bool(self.session.pending) and not self.why and time.monotonic() < self._began + limits.total_seconds

    async def within(self, coming: Awaitable[Any], limits: Limits) -> Any:
        """What comes, within the time that a session has.

        Raises:
            TimeoutError: if it does not; it says which time that was.
        """
        left = self._began + limits.total_seconds - time.monotonic()
        try:
            async with asyncio.timeout(0 if self.why else min(limits.idle_seconds, left)) as self._clock:
                return await coming
        except TimeoutError:
            text = f"nothing came for {limits.idle_seconds:g} seconds"
            if left <= limits.idle_seconds:
                text = f"a session lasts {limits.total_seconds:,.0f} seconds at most"
            raise TimeoutError(text) from None
        finally:
            self._last = time.monotonic()

    def end(self, why: str) -> None:
        """Have it end, when the frame that it is at is done."""
        self.why = why
        if self._clock is not None:
            with suppress(RuntimeError):  # it is at a frame
                self._clock.reschedule(0)

    def told(self) -> dict[str, Any]:
        """What an admin is told of it; times in seconds."""
        now, session = time.monotonic(), self.session
        return {
            "number": self.number,
            "key": self.client.key,
            "age": round(now - self._began, 1),
            "idle": round(now - self._last, 1),
            "computed": round(session.seconds, 3),
            "held_bytes": session.held_bytes,
            "tokens": session.used.tokens,
            "operations": session.used.operations,
        }
