"""Mixed traces by the thousand, with faults at random points: nothing may be left behind by any of them.

    python tests/core/soak.py SEED FIRST COUNT

Every choice of a trial follows from the seed and the trial's number, so that one can be run again alone; only when an
interrupt by the timer lands does not. `test_soak.py` runs it in a process of its own: without runtime shape checks, which
never let go of the arguments of a function that was interrupted at its start, and with the process's signals to itself.
"""

from __future__ import annotations

import _thread
import faulthandler
import gc
import random
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from helpers import UNGATED, busy_threads, settles, state_of
from nets import Net
from torch import Tensor, nn

from nnatomy.core import gates, worker
from nnatomy.errors import NotReachedError, OutOfOrderError, OutsideTraceError
from nnatomy.tracing import Trace, Traceable


class Boom(Exception):
    pass


class Trouble:
    """The fault of one trial: it strikes at the tick that comes after so many others, wherever that is.

    Attributes:
        kind: "raise"; "stop" (the block cancels its trace); "interrupt" (as Ctrl-C does); "timer" (the same, at any moment);
            "none".
        where: in what it has struck.
    """

    def __init__(self, rng: random.Random, kinds: list[str]) -> None:
        self.kind = rng.choice(kinds)
        self.left = rng.randrange(rng.choice([4, 20, 80]))
        self.where = ""

    def tick(self, where: str, tracer: Trace | None = None) -> None:
        if self.where or self.kind in ("none", "timer"):
            return
        self.left -= 1
        if self.left >= 0 or (self.kind == "stop" and tracer is None):
            return
        self.where = where
        if self.kind == "raise":
            raise Boom(where)
        if self.kind == "interrupt":
            _thread.interrupt_main()
        elif tracer is not None:
            tracer.stop()


#: That of the trial at work: a trace takes it along into its threads.
trouble: ContextVar[Trouble | None] = ContextVar("trouble", default=None)


def tick(where: str, tracer: Trace | None = None) -> None:
    if (mine := trouble.get()) is not None:
        mine.tick(where, tracer)


class Model(Net):
    def forward(self, x: Tensor, fail_at: int | None = None) -> Tensor:
        for block in self.blocks:
            tick("the model's forward")
            x, _ = block(x, scale=0.5)
        tick("the model's forward")
        return self.head(x)


X = torch.linspace(-1, 1, 8).reshape(2, 4)
model = Model()
view = Traceable(model)
tensors: list[weakref.ref[Tensor]] = []


def hook(_module: nn.Module, _args: Any, output: Any) -> None:
    """A user's own, on every module: it fails at times, and sees all that the model makes."""
    tensors.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
    tick("a user's hook")


for module in model.modules():
    module.register_forward_hook(hook)


# The trials.


def look(tracer: Trace, rng: random.Random, where: str = "a body") -> None:
    """Questions and edits in the model's order, and now and then one that is not."""
    for block in view.blocks:
        tick(where, tracer)
        match rng.randrange(9):
            case 0:
                block.input
            case 1:
                block.inputs = block.inputs
            case 2:
                block.inner.output = 2 * block.inner.output
            case 3:
                block.act.output.mul_(0.5)
            case 4:
                block.skip((2 * block.input, 0.5))
            case 5:
                block.inner.skip(torch.ones_like(block.inner.input))
                block.inner.output
            case 6:
                block.shared.calls[rng.randrange(4)].output
        tick(where, tracer)
    if rng.random() < 0.05:
        view.blocks[0].input  # too late
    if rng.random() < 0.05:
        view.unused.output  # never
    if rng.random() < 0.5:
        view.head.output


def plain(rng: random.Random) -> None:
    with view.trace(X, early_stop=rng.random() < 0.7) as tracer:
        if rng.random() < 0.3:
            tracer.cache(include_inputs=rng.random() < 0.5, clone=rng.random() < 0.5)
        look(tracer, rng)
        if rng.random() < 0.5:
            tracer.result


def only_reads(rng: random.Random) -> None:
    before = model(X)
    with view.trace(X) as tracer:
        for i in sorted(rng.sample(range(3), 2)):
            view.blocks[i].output
        assert torch.equal(tracer.result, before)


def nested(rng: random.Random) -> None:
    with view.trace(X) as tracer:
        tick("a body", tracer)
        view.blocks[0].input
        rng.choice([plain, generation, invokes, edited])(rng)
        tick("a body", tracer)
        view.head.output
        tracer.result


def generate(x: Tensor, steps: int) -> list[Tensor]:
    return [model(x + step) for step in range(steps)]


def generation(rng: random.Random) -> None:
    with view.trace_call(generate, X, rng.randrange(1, 5)) as tracer:
        if rng.random() < 0.2:
            tracer.cache()
        for step in tracer.iter[rng.choice([slice(None), slice(1, 3), 2, [0, 3]])]:
            look(tracer, rng, "a step")
            if rng.random() < 0.1:
                break
        if rng.random() < 0.5:
            tracer.result


def invokes(rng: random.Random) -> None:
    seeds = [rng.random() for _ in range(rng.randrange(2, 5))]
    with view.trace(early_stop=rng.random() < 0.8) as tracer:
        for seed in seeds:
            with tracer.invoke(X[: 1 + (seed < 0.5)]):
                look(tracer, random.Random(seed), "a block")
        if rng.random() < 0.3:
            with tracer.invoke(X):
                passed = view.blocks[0].output[0]
                tick("a block")
            with tracer.invoke(X):
                view.blocks[2].input = passed
                tick("a block", tracer)
        if rng.random() < 0.3:
            tracer.invoke(X, lambda: look(tracer, random.Random(seeds[0]), "a block"))
        if rng.random() < 0.3:
            with tracer.invoke():
                tracer.result
        if rng.random() < 0.3:
            look(tracer, rng)


def edited(rng: random.Random) -> None:
    def edit() -> None:
        tick("an edit")
        view.blocks[1].inner.output = 2 * view.blocks[1].inner.output
        tick("an edit")

    mine = view.edit(edit)
    if rng.random() < 0.3:
        with mine.edit() as mine:
            tick("an edit")
            view.head.input = 0 * view.head.input
    match rng.randrange(4):
        case 0:
            mine(X)
        case 1:
            with mine.trace(X) as tracer:
                look(tracer, rng)
        case 2:
            with mine.trace_call(generate, X, 3) as tracer:
                for _ in tracer.iter[:]:
                    look(tracer, rng, "a step")
        case 3:
            with mine.trace() as tracer:
                with tracer.invoke(X):
                    look(tracer, rng, "a block")
                with tracer.invoke(X):
                    tracer.result


def suspended(rng: random.Random) -> None:
    """Traces in generators that are dropped or closed where they stand."""

    def walk() -> Iterator[Any]:
        with view.trace(X) as tracer:
            for block in view.blocks:
                tick("a body", tracer)
                yield block.input

    walks = [walk() for _ in range(2)]
    for _ in range(rng.randrange(1, 4)):
        for one in walks:
            next(one)
    if rng.random() < 0.5:
        walks[0].close()


def never(rng: random.Random) -> None:
    view.trace(X)
    with view.trace(X):
        tick("a body")


def fake(rng: random.Random) -> None:
    with view.scan(X) as tracer:
        look(tracer, rng)


def in_threads(rng: random.Random) -> None:
    problems: list[BaseException] = []

    def work(number: int) -> None:
        mine = random.Random(number)
        fault = Trouble(mine, ["none", "raise", "stop"])
        trouble.set(fault)
        try:
            for _ in range(3):
                one(mine, [plain, only_reads, nested, generation, invokes, edited], fault)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(rng.randrange(2**31),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


ALONE = [plain, only_reads, nested, generation, invokes, edited, suspended, never]
EXPECTED = (Boom, OutOfOrderError, NotReachedError)

outcomes: Counter[str] = Counter()
struck: Counter[str] = Counter()


def one(rng: random.Random, kinds: list[Callable[[random.Random], None]], fault: Trouble) -> None:
    """One trace, or several. What was raised in it has to arrive."""
    kind = rng.choice(kinds)
    struck_before = fault.where
    outcome = "ended"
    try:
        with rng.choice([torch.enable_grad, torch.no_grad, torch.inference_mode])():
            kind(rng)
    except EXPECTED as error:
        outcome = type(error).__name__
    outcomes[f"{kind.__name__}: {outcome}"] += 1
    if fault.kind == "raise" and fault.where != struck_before:
        assert outcome == "Boom", f"{fault.where} raised, and what came was: {outcome}"


armed: list[bool] = []
#: Interrupts that came while Python closed a dropped generator, and which it therefore has not raised.
swallowed: list[str] = []


def not_raised(what: sys.UnraisableHookArgs) -> None:
    if what.exc_type is KeyboardInterrupt:
        swallowed.append("interrupted")
    else:
        others.append(repr(what))


#: What else Python could not raise.
others: list[str] = []
sys.unraisablehook = not_raised


def alarm(*_: Any) -> None:
    """The signal may have gone to another thread, and come late: not after its trial."""
    if armed:
        armed.clear()
        raise KeyboardInterrupt


def trial(rng: random.Random) -> None:
    """One trial, with its fault; at its end no interrupt is on its way."""
    kind = rng.random()
    if kind < 0.04:
        one(rng, [in_threads], Trouble(rng, ["none"]))
        return
    if kind < 0.05:
        one(rng, [fake], Trouble(rng, ["none"]))
        return
    fault = Trouble(rng, ["none", "raise", "raise", "stop", "interrupt", "timer"])
    trouble.set(fault)
    interrupted = False
    try:
        try:
            if fault.kind == "timer":
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, rng.choice([5e-4, 1e-3, 4e-3])))
            one(rng, ALONE, fault)
        finally:
            armed.clear()
            signal.setitimer(signal.ITIMER_REAL, 0)
        while fault.kind == "interrupt" and fault.where and not swallowed:
            time.sleep(0.001)  # here at the latest
    except KeyboardInterrupt:
        interrupted = True
    trouble.set(None)
    interrupted = interrupted or bool(swallowed)
    swallowed.clear()
    struck[fault.kind + (f" in {fault.where}" if fault.where else "") + interrupted * ", interrupted"] += 1
    if interrupted:
        settles(lambda: busy_threads() == 0)  # nobody has waited for it
        gc.collect()  # a block that an interrupt kept from its end goes with its frame


first = model(X)
state = state_of(model)


def nothing_left() -> None:
    assert not others, others
    assert settles(lambda: busy_threads() == 0), "a thread at work"
    assert torch.nn.Module._call_impl is UNGATED, "a gate"
    assert not gates.runs, "a run"
    assert state_of(model) == state, "the model was changed"
    assert settles(lambda: not strangers()), strangers()
    assert len(worker._idle) <= 32, "idle workers pile up"
    assert sys.gettrace() is None, "a trace function"
    try:
        view.head.output
        raise AssertionError("an open block")
    except OutsideTraceError:
        pass
    assert settles(lambda: not alive()), f"{len(alive())} of {len(tensors)} tensors"
    tensors.clear()
    assert torch.equal(model(X), first), "another result"
    tensors.clear()


def strangers() -> list[threading.Thread]:
    """Threads that are not ours. (One of ours has no identifier before it has begun.)"""
    return [t for t in threading.enumerate() if t.name != "nnatomy-forward" and t is not threading.main_thread()]


def alive() -> list[Tensor]:
    return [tensor for ref in tensors if (tensor := ref()) is not None]


def main(seed: int, start: int, count: int) -> None:
    signal.signal(signal.SIGALRM, alarm)
    tensors.clear()
    gc.collect()
    gc.freeze()  # what is there stays
    gc.disable()  # reference counts free everything
    began = time.monotonic()
    for number in range(start, start + count):
        faulthandler.dump_traceback_later(60, exit=True)
        try:
            trial(random.Random(f"{seed} {number}"))
            nothing_left()
        except BaseException:
            print(
                f"{outcomes} {struck}\nTrial {number} of seed {seed}: python tests/core/soak.py {seed} {number} 1",
                file=sys.stderr,
            )
            raise
    faulthandler.cancel_dump_traceback_later()
    for title, counts in (("outcomes", outcomes), ("faults", struck)):
        print(title, *(f"  {counts[kind]:6} {kind}" for kind in sorted(counts)), sep="\n")
    print(f"{count} trials in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
