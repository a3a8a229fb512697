"""A server's model that is split over processes: rank 0 talks to the clients, and the others do what it does.

What a session does is decided by the bytes of its frames alone. So rank 0 hands each frame on, before it carries it out, and the
others carry it out too, in the same order, on tensors of their own; what they would answer is dropped.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist

from nnatomy.errors import InputError
from nnatomy.parallel.ranks import Ranks
from nnatomy.remote.wire import FrameError
from nnatomy.serve.hello import weights_hash
from nnatomy.serve.jobs import Later
from nnatomy.serve.keys import Client, Keys
from nnatomy.serve.limits import Limits
from nnatomy.serve.policy import Refused
from nnatomy.serve.served import Open, Served, _numbers
from nnatomy.serve.session import More, Session

#: What rank 0 says: a frame of a session, a session's end, that the weights are to be hashed, the end.
HANDLE, CLOSE, HASH, STOP = range(4)


class Line:
    """How rank 0 tells the others what to do; a server may have nothing to do for long."""

    def __init__(self, ranks: Ranks) -> None:
        self._group = dist.new_group(list(ranks.members), backend="gloo", timeout=timedelta(days=365))

    def say(self, kind: int, number: int = 0, data: bytes = b"") -> None:
        """Rank 0: do that, for the session of that number."""
        dist.broadcast(torch.tensor([kind, number, len(data)]), group_src=0, group=self._group)
        if data:
            dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), group_src=0, group=self._group)

    def hear(self) -> tuple[int, int, bytes]:
        """All others: what it says next."""
        head = torch.zeros(3, dtype=torch.int64)
        dist.broadcast(head, group_src=0, group=self._group)
        kind, number, size = head.tolist()
        data = torch.zeros(size, dtype=torch.uint8)
        if size:
            dist.broadcast(data, group_src=0, group=self._group)
        return kind, number, data.numpy().tobytes()


class Led(Session):
    """A session whose frames all ranks carry out; `number`, `served` and `compute_seconds` are set when it is made."""

    number: int
    served: SplitServed
    compute_seconds: float

    def carry_out(self, frame: Any, _: Callable[[], bool] = lambda: False) -> bytes | Later | More | None:
        # All of it at once: how far it would come before it stands aside, the clocks of the ranks would not agree on.
        if not isinstance(frame, bytes):
            raise FrameError("a frame is bytes")
        self.served.line.say(HANDLE, self.number, frame)
        try:
            return self.carry_out_here(frame)
        finally:
            if self.served.ranks.broken:
                Thread(target=_end_server, args=(self.served.ranks.broken,), daemon=True).start()
            elif self.seconds > self.compute_seconds:
                raise Refused(f"this session has used up its {self.compute_seconds:,.0f} seconds", "compute_seconds")

    def close(self) -> None:
        if not self.served.ranks.broken:
            self.served.line.say(CLOSE, self.number)
        self.close_here()

    def carry_out_here(self, frame: Any) -> bytes | Later | More | None:
        """Carry it out on this rank alone, which rank 0 has told to."""
        return super().carry_out(frame)

    def close_here(self) -> None:
        """The same of its end."""
        super().close()


class SplitServed(Served):
    """A model on several ranks, for many clients of rank 0. It is made on all of them at the same time."""

    session: type[Session] = Led

    def __init__(self, name: str, model: Any, limits: Limits | None = None) -> None:
        super().__init__(name, model, limits)
        self._hello["whole_methods"] = False  # they take turns by the clock, which is another one on each rank
        self.ranks = self._ranks_of(model)
        self.line = Line(self.ranks)

    def _ranks_of(self, model: Any) -> Ranks:
        ranks: Ranks = model._ranks
        return ranks

    def _session(self, number: int, limits: Limits) -> Any:
        # How long it may compute is for rank 0 to say, between two frames: the clocks differ.
        unlimited = replace(limits, compute_seconds=math.inf, command_seconds=math.inf)
        session: Any = self.session(self._model, self._points, self._weights, unlimited, self._hello, self.refused)
        session.number, session.served, session.compute_seconds = number, self, limits.compute_seconds
        session.longest_wait = limits.command_seconds
        return session

    def open(self, limits: Limits, client: Client, owner: str = "") -> Open:
        del owner  # no methods run whole here, and so nothing is kept for it
        number = next(_numbers)
        opened = Open(number, self._session(number, limits), client)
        self.sessions[number] = opened
        return opened

    async def hash_now(self) -> str:
        def hashed() -> str:
            self.line.say(HASH)
            return weights_hash(self._weights)

        found: str = await self.compute(hashed)
        return found

    def follow(self, limits: Limits) -> None:
        """All ranks but the first: do what that does, until it says that this is the end."""
        sessions: dict[int, Any] = {}
        while not self.ranks.broken:
            kind, number, data = self.line.hear()
            if kind == STOP:
                return
            if kind == HASH:
                weights_hash(self._weights)
            elif kind == CLOSE:
                if number in sessions:
                    sessions.pop(number).close_here()
            else:
                session = sessions.setdefault(number, self._session(number, limits))
                with suppress(FrameError, Refused):
                    session.carry_out_here(data)


def _end_server(why: str) -> None:
    """Some seconds after its clients have been told."""
    sys.stderr.write(f"nnatomy: the server ends, as its ranks are out of step: {why}\n")
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGTERM)


def serve_split(options: argparse.Namespace, keys: Keys, limits: Limits, engine: dict[str, Any]) -> int:
    """`nnatomy serve MODEL --tp N`: what one of the ranks does, all of which this starts, if nobody has; the exit code.

    Args:
        engine: what an engine is loaded with that runs the model; empty where Transformers does.
    """
    from nnatomy.serve.run import bind

    if options.others:
        raise InputError("--tp splits one model over the processes of a server: give one model.")
    if options.device not in (None, "cpu") or options.device_map is not None:
        raise InputError("--device, --device-map: with --tp each process takes a device of its own.")
    sizes = int(os.environ.get("WORLD_SIZE", options.tp))
    if sizes != options.tp:
        raise InputError(f"--tp {options.tp}: it has been started as one of {sizes} processes.")
    first = os.environ.get("RANK", "0") == "0"
    with bind(options.host, options.port) if first else nullcontext() as bound, _other_ranks(options.tp) as ended:
        served = _loaded(options, limits, engine)
        if bound is None:
            served.follow(limits)
            return int(bool(served.ranks.broken))
        return _talk(served, bound, options, keys, limits, ended)


def _loaded(options: argparse.Namespace, limits: Limits, engine: dict[str, Any]) -> Any:
    from transformers.utils import logging

    from nnatomy.serve.served import served_of
    from nnatomy.standardized import StandardizedTransformer

    logging.disable_progress_bar()
    if engine:
        return served_of(options.model, StandardizedTransformer(options.model, **engine), limits)
    dtype = {} if options.dtype is None else {"dtype": getattr(torch, options.dtype)}
    model = StandardizedTransformer(options.model, tp_plan="auto", trust_remote_code=options.trust_remote_code, **dtype)
    return served_of(options.model, model, limits)


def _talk(
    served: SplitServed, bound: socket.socket, options: argparse.Namespace, keys: Keys, limits: Limits, ended: Event
) -> int:
    from nnatomy.serve.app import Server
    from nnatomy.serve.run import run

    signal.signal(signal.SIGTERM, _leave)  # which uvicorn raises once more when it has ended
    server = Server({served.name: served}, keys, limits)
    try:
        run(server, options.host, options.port, bound, told=f"{served.name} on {options.tp} ranks")
    except SystemExit:
        pass
    finally:
        if not (served.ranks.broken or ended.is_set()):
            served.line.say(STOP)
    return int(bool(served.ranks.broken or ended.is_set()))


def _leave(*_: Any) -> None:
    raise SystemExit(0)


@contextmanager
def _other_ranks(count: int) -> Iterator[Event]:
    """The processes of the other ranks, where they are to be started here; an event that is set when one has ended before."""
    ended, done = Event(), Event()
    if "RANK" in os.environ:
        if os.environ["RANK"] != "0":
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 says when it is over
        yield ended
        return
    store: Any = dist.TCPStore  # type: ignore[attr-defined]
    meeting = store("127.0.0.1", 0, count + 1, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.port), "WORLD_SIZE": str(count)}
    common["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # it is there already, at a port that nobody can take meanwhile
    command = [sys.executable, "-m", "nnatomy", *sys.argv[1:]]
    others = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(1, count)
    ]
    os.environ.update(common | {"RANK": "0", "LOCAL_RANK": "0"})

    def watch() -> None:
        while not done.wait(0.2):
            if any(one.poll() is not None for one in others):
                ended.set()
                sys.stderr.write("nnatomy: the server ends, as the process of a rank has\n")
                done.wait(2)  # clients that wait are told by then
                os.kill(os.getpid(), signal.SIGTERM)
                done.wait(5)
                if not done.is_set():
                    for one in others:
                        one.kill()
                    os._exit(1)
                return

    Thread(target=watch, daemon=True).start()
    try:
        yield ended
    finally:
        done.set()
        for one in others:
            with suppress(subprocess.TimeoutExpired):
                one.wait(0 if ended.is_set() else 10)
            if one.poll() is None:
                one.kill()
                one.wait()
