"""The methods that run here whole, whose results are kept for a time: each is its owner's alone, by a number nobody guesses."""

from __future__ import annotations

import asyncio
import string
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from nnatomy.serve.job import Job
from nnatomy.serve.limits import Limits, Used
from nnatomy.serve.policy import Refused
from nnatomy.serve.tensors import Weights

#: The digits of a run's name, which its client draws.
_DIGITS = 32
#: How often a client that waits is told how far its run has come, in seconds.
_TOLD_EVERY = 0.2
#: What is kept of a run beside its result, in bytes.
_LEAST = 10_000
#: How many answers one session may wait for at once.
_PENDING = 64


class Later:
    """An answer that is given when a job is over.

    Args:
        at: from which byte of the result on.
        most: how many bytes.

    Attributes:
        serial: of the question.
        waits: whether the answer is the result, and not that it has begun.
    """

    def __init__(self, job: Job, at: int, most: int) -> None:
        self.job, self.at, self.most = job, at, most
        self.serial: Any = None
        self.waits = True

    @property
    def answer(self) -> tuple[dict[str, int], list[bytes]]:
        """What it is, now that the job is over."""
        frame = self.job.frame
        return {"size": len(frame), "at": self.at}, [frame[self.at : self.at + self.most]]


class Jobs:
    """The jobs of all clients.

    Args:
        compute: has a function called by the thread that computes.
        busy: whether others wait for that thread.
    """

    def __init__(self, limits: Limits, compute: Callable[..., Awaitable[Any]], busy: Callable[[], bool]) -> None:
        self._limits, self._compute, self._busy = limits, compute, busy
        self._held: dict[tuple[str, str], Job] = {}
        self._over: dict[Job, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def told(self) -> dict[str, int]:
        """How many run or wait, how many are kept, and the bytes of these."""
        self._forget_old()
        jobs = list(self._held.values())
        ended = [one for one in jobs if one.ended]
        return {"running": len(jobs) - len(ended), "kept": len(ended), "bytes": sum(len(one.frame) for one in ended)}

    # Of one session, called by the thread that computes.

    def add(self, owner: str, key: Any, make: Callable[[], Job]) -> Job:
        """A job under that name, which is not begun. Raises Refused."""
        if not isinstance(key, str) or len(key) != _DIGITS or not set(key) <= set(string.hexdigits):
            raise Refused(f"the name of a run is {_DIGITS} random hexadecimal digits")
        self._forget_old()
        if (owner, key) in self._held:
            raise Refused("there is a run of that name")
        if (
            sum(1 for (one, _), held in list(self._held.items()) if one == owner and not held.ended)
            >= self._limits.runs
        ):
            raise Refused(f"{self._limits.runs} runs of yours are at work: cancel some, or wait")
        job = make()
        waits = sum(held.given_bytes for (one, _), held in list(self._held.items()) if one == owner and not held.ended)
        if waits and waits + job.given_bytes > self._limits.kept_bytes:
            raise Refused(f"the arguments of your runs have more than {self._limits.kept_bytes:,} bytes: wait")
        self._held[owner, key] = job
        return job

    def get(self, owner: str, key: Any) -> Job:
        """Raises Refused if that owner has no such job: the same, whether somebody else has one or nobody."""
        self._forget_old()
        job = self._held.get((owner, key)) if isinstance(key, str) else None
        if job is None:
            raise Refused(
                f"there is no run of that name: results are kept for {self._limits.kept_seconds:,.0f} seconds, for whoever has "
                "the same key"
            )
        job.asked_at = time.monotonic()
        return job

    def cancel(self, owner: str, key: Any) -> None:
        """Have it end, if there is one."""
        with suppress(Refused):
            self.get(owner, key).cancel("it was cancelled")

    def forget(self, owner: str, key: Any) -> None:
        """Cancel it, and drop what came of it."""
        job = self._held.pop((owner, key), None) if isinstance(key, str) else None
        if job is not None:
            job.cancel("it was to be forgotten")

    def _forget_old(self) -> None:
        old = time.monotonic() - self._limits.kept_seconds
        for key, job in list(self._held.items()):
            if job.ended_at < old:
                self._held.pop(key, None)

    def _keep_within(self, job: Job) -> None:
        """Drop the owner's oldest results where there would be more than are kept."""
        owner = next((one for (one, _), held in self._held.items() if held is job), None)
        mine = [(key, held) for key, held in self._held.items() if key[0] == owner and held.ended]
        mine.sort(key=lambda one: one[1].ended_at)
        size = sum(len(held.frame) + _LEAST for _, held in mine)
        for key, held in mine[:-1]:
            if size > self._limits.kept_bytes:
                size -= len(held.frame) + _LEAST
                self._held.pop(key, None)

    # In the loop of the server.

    def answer(
        self, later: Later, session: Any, send: Callable[[dict[str, Any], list[bytes]], Awaitable[None]]
    ) -> None:
        """Give the answer when it is there, and have the job run if nobody has."""
        job = later.job
        if job not in self._over and not job.ended:
            self._over[job] = asyncio.Event()
            self._spawn(self._drive(job, session))
        session.pending += 1
        self._spawn(self._answer(later, session, send))

    def _spawn(self, task: Any) -> None:
        one = asyncio.get_running_loop().create_task(task)
        self._tasks.add(one)
        one.add_done_callback(self._tasks.discard)

    async def _drive(self, job: Job, session: Any) -> None:
        """The runs of a session come one after the other."""
        try:
            async with session.turn:
                while not job.ended:
                    if session.gone and time.monotonic() - job.asked_at > self._limits.kept_seconds:
                        job.cancel("its client is gone, and nobody has asked for it")
                    before = job.seconds
                    await self._compute(job.go_on, self._busy)
                    session.seconds += job.seconds - before
            self._keep_within(job)
        finally:
            self._over.pop(job).set()
        # It is not waited for here, as this would keep what has been dropped before.
        asyncio.get_running_loop().call_later(self._limits.kept_seconds + 1, self._forget_old)

    async def _answer(self, later: Later, session: Any, send: Any) -> None:
        job, before = later.job, None
        try:
            with suppress(RuntimeError, OSError):  # the client is gone
                if not later.waits:
                    await send({"n": later.serial, "ok": None}, [])
                    return
                while (over := self._over.get(job)) is not None and not job.ended:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(over.wait(), _TOLD_EVERY)
                    if job.progress != before and not job.ended:
                        before = job.progress
                        await send({"n": later.serial, "progress": list(before or ())}, [])
                async with session.sending:  # one after the other has its bytes in memory
                    answer, blobs = later.answer
                    await send({"n": later.serial, "ok": answer}, blobs)
        finally:
            session.pending -= 1

    async def close(self) -> None:
        """End all, when the server ends."""
        for job in list(self._held.values()):
            job.cancel("the server ends")
        for task in self._tasks:
            task.cancel()
        for job in list(self._held.values()):
            for _ in range(100):
                if not job.ended:
                    await self._compute(job.go_on, self._busy)


class Runs:
    """What a session asks and says of its runs.

    Attributes:
        owner: whose results are this client's: see `Client`.
        pending: how many answers are still to be given.
        turn: held by the run that is at work.
        sending: held by the answer that is sent.
        gone: whether the client is.
    """

    _blobs: list[Any]
    _limits: Limits
    _grad: bool
    seconds: float
    used: Used

    def _has_runs(self, model: Any, weights: Weights, jobs: Jobs | None, owner: str) -> None:
        self._model, self._weights, self._all_jobs, self.owner = model, weights, jobs, owner
        self.pending, self.turn, self.sending, self.gone = 0, asyncio.Lock(), asyncio.Lock(), False

    @property
    def _jobs(self) -> Jobs:
        if self._all_jobs is None:
            raise Refused("no methods are run here")
        return self._all_jobs

    def _ask_run(self, key: Any, name: Any, given: Any, most: Any) -> Later:
        """Have a method run whole, and the first bytes of its result when it is over."""
        self._check_bytes(0, most)
        blobs, self._blobs = [bytes(one) for one in reversed(self._blobs)], []
        left = self._limits.compute_seconds - self.seconds
        make = partial(Job, self._model, self._weights, self._limits, name, given, blobs, self._grad, left, self.used)
        return Later(self._jobs.add(self.owner, key, make), 0, most)

    def _ask_begin(self, key: Any, name: Any, given: Any) -> Later:
        """Have a method run whole, and not wait for it."""
        later = self._ask_run(key, name, given, 1)
        later.waits = False
        return later

    def _ask_wait(self, key: Any, at: Any, most: Any) -> Later:
        """Bytes of the result of a run, of this session or another of the same key, when it is over."""
        self._check_bytes(at, most)
        return Later(self._jobs.get(self.owner, key), at, most)

    def _ask_look(self, key: Any) -> tuple[Any, list[bytes]]:
        """How it stands."""
        job = self._jobs.get(self.owner, key)
        left = max(0.0, job.ended_at + self._limits.kept_seconds - time.monotonic()) if job.ended else None
        return {
            "method": job.name,
            "ended": job.ended,
            "seconds": job.seconds,
            "progress": list(job.progress or ()),
            "size": len(job.frame),
            "kept": left,
        }, []

    def _do_cancel(self, key: Any) -> None:
        self._jobs.cancel(self.owner, key)

    def _do_forget(self, key: Any) -> None:
        self._jobs.forget(self.owner, key)

    def _check_bytes(self, at: Any, most: Any) -> None:
        allowed = self._limits.frame_bytes - (1 << 20)
        if type(at) is not int or type(most) is not int or at < 0 or not 0 < most <= allowed:
            raise Refused(f"from a byte on, and {allowed:,} bytes at most")
        if self.pending >= _PENDING:
            raise Refused(f"{_PENDING} answers of this session are still to be given", "pending")
