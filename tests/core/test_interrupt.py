"""Ctrl-C while the model is at work: the block gets it at once, and the forward pass is gone."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import Calls, busy_threads, net, no_leaks, settles, x
from torch import nn

from nnatomy.core import gates, worker
from nnatomy.core.coroutine import AGAIN_SECONDS, Cancelled, Interruptible
from nnatomy.tracing import Trace, Traceable


def busy(self, _):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        pass


def children(self, v):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        self.child(v)


def swallows(self, v):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            self.child(v)
        except:  # noqa: E722
            pass


def swallows_once(self, v):
    """Swallows the interrupt in a loop without submodules, and goes on."""
    for _ in range(2):
        try:
            busy(self, v)
        except:  # noqa: E722
            pass


SENDERS = {
    "to the process": lambda: os.kill(os.getpid(), signal.SIGINT),
    "raised in a thread": lambda: signal.raise_signal(signal.SIGINT),
    "interrupt_main": _thread.interrupt_main,
}


@pytest.mark.parametrize("send", list(SENDERS))
@pytest.mark.parametrize("forward", [busy, children])
def test_an_interrupt_ends_block_and_model(send, forward) -> None:
    model = Calls(forward, child=nn.Identity())
    view = Traceable(model)
    timer = threading.Timer(0.2, SENDERS[send])
    start = time.monotonic()
    with no_leaks(model), pytest.raises(KeyboardInterrupt), view.trace(0):
        timer.start()
        view.output
    timer.join()
    assert time.monotonic() - start < 5
    with view.trace(0):  # and the next trace is as good as the first
        assert view.input == 0


@pytest.mark.parametrize("forward", [swallows, swallows_once])
def test_a_model_that_swallows_every_exception(forward) -> None:
    model = Calls(forward, child=nn.Identity())
    view = Traceable(model)
    timer = threading.Timer(0.2, SENDERS["to the process"])
    start = time.monotonic()
    if forward is swallows:  # no loop goes on for ever: the gates refuse every call from now on
        model.function = lambda self, v: [swallows_some(self, v) for _ in range(3)]
    with no_leaks(model), pytest.raises(KeyboardInterrupt), view.trace(0):
        timer.start()
        view.output
    timer.join()
    assert time.monotonic() - start < 10


def swallows_some(self, v):
    try:
        busy(self, v)
    except:  # noqa: E722
        pass
    try:
        self.child(v)
    except:  # noqa: E722
        pass


def test_an_interrupt_while_the_body_is_at_work() -> None:
    model = net()
    view = Traceable(model)
    with no_leaks(model), pytest.raises(KeyboardInterrupt), view.trace(x()):
        view.layers[0].output
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_caught_in_the_block() -> None:
    model = Calls(busy)
    view = Traceable(model)
    timer = threading.Timer(0.1, SENDERS["to the process"])
    with no_leaks(model), view.trace(0) as tracer:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            tracer.result
        with pytest.raises(Exception, match="stopped"):
            view.output
    timer.join()


def for_ever(self, v):
    while True:
        self.child(v)


@pytest.mark.parametrize("at_work", ["a block", "the model, for a block", "the model, for the caller"])
def test_an_interrupt_of_several_blocks_caught_in_the_callers(at_work) -> None:
    """All blocks end, whoever was at work, before the caller goes on."""
    model = Calls(for_ever if at_work != "a block" else lambda self, v: self.child(v), child=nn.Identity())
    view = Traceable(model)
    ended = []

    def block() -> None:
        try:
            view.input
            if at_work == "the model, for a block":
                view.output
            while at_work == "a block":
                pass
            view.output
        finally:
            ended.append("block")

    timer = threading.Timer(0.2, SENDERS["to the process"])
    with no_leaks(model), view.trace() as tracer:
        tracer.invoke(x(), block)
        tracer.invoke(x(), lambda: view.output)
        if at_work == "the model, for the caller":
            view.input
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            view.output
        assert ended == ["block"]
        with pytest.raises(Exception, match="stopped"):
            view.output
    timer.join()


@pytest.mark.parametrize("kind", ["plain", "invokes", "edited"])
def test_an_interrupt_before_the_first_line_of_exit(kind, monkeypatch) -> None:
    """All that waits for the block ends, though the user's names keep the trace."""

    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    model = net()
    view = Traceable(model)
    if kind == "edited":
        view = view.edit(lambda: view.layers[1].output)
    with no_leaks(model):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trace, "_exit", interrupted)
            with view.trace(*[x()] * (kind != "invokes")) as tracer:
                for _ in range(2 * (kind == "invokes")):
                    tracer.invoke(x(), lambda: view.layers[2].output)
                view.layers[0].output
        assert settles(lambda: not gates.runs and busy_threads() == 0)
        assert tracer is not None


@pytest.mark.parametrize("way", ["stack", "by hand"])
def test_a_trace_entered_without_a_with_is_its_own_owner(way) -> None:
    view = Traceable(net())
    with ExitStack() as stack:
        trace = view.trace(x())
        assert trace.__exit__
        tracer = stack.enter_context(trace) if way == "stack" else trace.__enter__()
        view.embed.output
        time.sleep(1.5 * AGAIN_SECONDS)
        assert view.layers[1].output
        if way == "by hand":
            tracer.__exit__(None, None, None)


def test_nobody_is_interrupted_while_a_thread_is_being_born(monkeypatch) -> None:
    """So long CPython 3.11 has both under one identifier, and would interrupt the new one."""
    start, asked, born = worker._thread.start_new_thread, threading.Event(), threading.Event()

    def start_later(function, args) -> None:
        def begin() -> None:
            time.sleep(0.3)
            born.set()
            start(function, args)

        start(begin, ())
        asked.set()

    part, came = Interruptible(), []

    def start_and_compute() -> None:
        worker.start_thread(lambda: (False, lambda: None))
        while True:
            pass

    def work() -> None:
        try:
            part.run(start_and_compute)
        except Cancelled:
            came.append("here")

    monkeypatch.setattr(worker, "_thread", SimpleNamespace(start_new_thread=start_later))
    thread = threading.Thread(target=work)
    thread.start()
    asked.wait()
    part.interrupt()
    assert born.is_set()
    thread.join()
    assert came == ["here"]


AT_ANY_MOMENT = """
import gc, signal
from helpers import net, no_leaks, x
from nnatomy.tracing import Traceable
from nnatomy.errors import OutsideTraceError

model = net()
view = Traceable(model)
with view.trace(x()) as tracer:
    y = tracer.result
signal.signal(signal.SIGALRM, signal.default_int_handler)

def traces():
    try:
        while True:
            with view.trace(x()) as tracer:
                view.layers[1].output
                tracer.result
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

with no_leaks(model):
    for i in range(300):
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + i * 5e-6)
            traces()
        except KeyboardInterrupt:
            print("interrupted")
    gc.collect()  # a block that an interrupt kept from its end goes with its frame
    try:
        view.embed.output
        raise SystemExit("a block is still open")
    except OutsideTraceError:
        pass
assert model(x()).equal(y)
"""


def test_interrupts_at_any_moment() -> None:
    """The interrupt lands wherever it may, before and after the body too: nothing hangs, nothing is left.

    In a process of its own, without runtime shape checks: jaxtyping, interrupted at the start of a
    checked function, never lets go of that function's arguments.
    """
    process = subprocess.run(
        [sys.executable, "-c", AT_ANY_MOMENT],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("interrupted") == 300


def test_ctrl_c_in_a_script() -> None:
    """The real thing: SIGINT to a process, the traceback printed, the process gone."""
    code = (
        "import time, torch\n"
        "from nnatomy.tracing import Traceable\n"
        "class Slow(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        print('at work', flush=True)\n"
        "        while True: pass\n"
        "view = Traceable(Slow())\n"
        "with view.trace(0):\n"
        "    view.output\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert "Cancelled" not in err
