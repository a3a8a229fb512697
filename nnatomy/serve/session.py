"""A session: the commands of one client on the tensors that it holds.

A frame has commands, which are carried out one after the other, and perhaps a question, which is answered. A command that fails
leaves its error in the place of what it was to give; the next question is answered by that error. No command writes
to the model's parameters and buffers, or gives them gradients.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from nnatomy.remote.wire import FrameError, pack, unpack
from nnatomy.serve.commands import Commands
from nnatomy.serve.forward import Points
from nnatomy.serve.job import TURN
from nnatomy.serve.jobs import Jobs, Later, Runs
from nnatomy.serve.limits import Limits
from nnatomy.serve.policy import Refused
from nnatomy.serve.tensors import Failed, FailedBefore, Weights

#: What commands are to give, as numbers: from their arguments.
_GIVES: dict[str, Callable[[list[Any]], Any]] = {
    "op": lambda given: given[3],
    "put": lambda given: [given[0]],
    "grads": lambda given: given[5],
}


class More:
    """Of a frame's commands some are still to be carried out."""


MORE = More()


class Waits:
    """A frame that cannot be begun yet, as another client is at what it needs: it is to be given again when that is free.

    Args:
        free: whether it is; may be asked by any thread.
    """

    def __init__(self, free: Callable[[], bool]) -> None:
        self.free = free


class Session(Commands, Runs):
    """What one client has at the server. Its methods are called by one thread.

    Args:
        hello: what a client is told of the model.
        jobs: the methods that run whole; None if none do.
        owner: whose results are this client's: see `Client`.
        refused: where commands that are refused are counted, by kind.

    Attributes:
        seconds: of computing, that it has used.
    """

    def __init__(
        self,
        model: Any,
        points: Points,
        weights: Weights,
        limits: Limits,
        hello: dict[str, Any],
        refused: Counter[str] | None = None,
        jobs: Jobs | None = None,
        owner: str = "",
    ) -> None:
        super().__init__(model, points, weights, limits, hello)
        self._has_runs(model, weights, jobs, owner)
        self._refused = Counter[str]() if refused is None else refused
        self._command = 0
        self._failed: Failed | None = None
        self._rest: tuple[list[Any], Any, Any] = ([], None, None)
        self.seconds = 0.0

    def handle(self, frame: Any, busy: Callable[[], bool] = lambda: False) -> bytes | Later | More | Waits | None:
        """Carry out a frame of the client's, or have it given again in a while (see `Waits`). The rest: see `carry_out`."""
        return self.carry_out(frame, busy)

    def carry_out(self, frame: Any, busy: Callable[[], bool] = lambda: False) -> bytes | Later | More | None:
        """Carry out the commands of a frame; the frame to answer its question with, if it has one, or what will be the answer.

        Args:
            busy: whether others wait. Then it stands aside after a time, between two commands, and gives MORE: it is
                `go_on` that goes on.

        Raises:
            FrameError: for what is no frame: the session is over.
            Refused: if the session has used up its time.
        """
        header, self._blobs = unpack(frame)
        commands = header.get("c", [])
        if not isinstance(commands, list) or len(commands) > self._limits.commands:
            raise FrameError(f"`c` is a list of {self._limits.commands:,} commands at most")
        self._blobs.reverse()
        commands.reverse()
        self._rest = commands, header.get("q"), header.get("n")
        return self.go_on(busy)

    def go_on(self, busy: Callable[[], bool] = lambda: False) -> bytes | Later | More | None:
        """Go on with the frame: see `carry_out`."""
        began, (commands, question, serial) = time.monotonic(), self._rest
        answer = None
        try:
            while commands and self.seconds + time.monotonic() - began <= self._limits.compute_seconds:
                if time.monotonic() - began > TURN and busy():
                    return MORE
                self._do(commands.pop())
            in_time = self.seconds + time.monotonic() - began <= self._limits.compute_seconds
            if question is not None and in_time:
                answer = self._answer(question, serial)
            return answer
        finally:
            self.seconds += time.monotonic() - began
            if not commands or self.seconds > self._limits.compute_seconds:
                self._blobs = []
            if self.seconds > self._limits.compute_seconds and not isinstance(sys.exc_info()[1], FrameError):
                if isinstance(answer, Later):
                    answer.job.cancel("the session has used up its time")  # else nobody would ever run or end it
                raise Refused(
                    f"this session has used up its {self._limits.compute_seconds:,.0f} seconds", "compute_seconds"
                )

    def close(self) -> None:
        """Drop everything but the runs, which go on."""
        self.gone = True
        for forward in self._forwards.values():
            forward.end()
        self._forwards.clear()
        self._tensors.clear()
        self._failed = None

    def _do(self, command: Any) -> None:
        self._command += 1
        self._began = time.monotonic()
        if not isinstance(command, list) or not command or not isinstance(command[0], str):
            raise FrameError("a command is a list with its name first")
        name, *given = command
        try:
            method = getattr(self, f"_do_{name}", None) if name.isalpha() else None
            if method is None:
                raise Refused(f"there is no command {name!r:.40}")
            with torch.set_grad_enabled(self._grad), self._graph.kept():
                method(*given)
        except Exception as error:  # noqa: BLE001 - told to the client
            failed = self._note(error)
            self._failed = self._failed or failed
            self._leave_failed(name, given, failed)

    def _note(self, error: Exception) -> Failed:
        if isinstance(error, FailedBefore):
            return error.failed
        if isinstance(error, Refused):
            self._refused[error.kind] += 1
        return Failed(error, self._command)

    def _leave_failed(self, name: str, given: list[Any], failed: Failed) -> None:
        gives = _GIVES.get(name)
        try:
            for number in [] if gives is None else gives(given):
                self._tensors.keep(number, failed)
        except (Refused, IndexError, TypeError):
            pass  # what was given are no numbers

    def _answer(self, question: Any, serial: Any) -> bytes | Later:
        self._command += 1
        self._began = time.monotonic()
        try:
            if self._failed is not None:
                failed, self._failed = self._failed, None
                raise FailedBefore(failed)
            if not isinstance(question, list) or not question or not isinstance(question[0], str):
                raise Refused("a question is a list with its name first")
            name, *given = question
            method = getattr(self, f"_ask_{name}", None) if name.isalpha() else None
            if method is None:
                raise Refused(f"there is no question {name!r:.40}")
            with torch.set_grad_enabled(self._grad), self._graph.kept():
                found = method(*given)
            if isinstance(found, Later):
                found.serial = serial
                return found
            answer, blobs = found
            return pack({"n": serial, "ok": answer}, blobs)
        except Exception as error:  # noqa: BLE001 - told to the client
            failed = self._note(error)
            told = {"type": failed.type, "text": failed.text, "command": failed.command}
            return pack({"n": serial, "error": told})
