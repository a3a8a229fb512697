"""A trace leaves a thread on the cores it may run on, and its forward pass runs on the same ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from helpers import Calls, net, x

from nnatomy.core import Traceable

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not tell")


@pytest.fixture
def cores() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def where(model: Calls, value: object) -> object:
    model.cores = os.sched_getaffinity(0)
    return value


def test_the_same_cores_in_block_model_and_after(cores) -> None:
    model = Calls(where)
    view = Traceable(model)
    for allowed in (cores, {min(cores)}, cores):
        os.sched_setaffinity(0, allowed)
        with view.trace(1):
            view.input
            in_block = os.sched_getaffinity(0)
            view.output
        assert (in_block, model.cores, os.sched_getaffinity(0)) == (allowed, allowed, allowed)


def test_the_same_cores_in_each_of_several_blocks(cores) -> None:
    model = net()
    view = Traceable(model)
    for allowed in (cores, {min(cores)}, cores):
        os.sched_setaffinity(0, allowed)
        seen = []
        with view.trace() as tracer:
            for _ in range(3):
                with tracer.invoke(x()):
                    view.layers[0].output
                    seen.append(os.sched_getaffinity(0))
                    view.layers[1].output
                    seen.append(os.sched_getaffinity(0))
        assert seen == [allowed] * 6
        assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize("ending", ["stopped", "to the end", "error in the block", "error in the model"])
def test_after_every_ending(cores, ending) -> None:
    view = Traceable(net())
    value = x()[:, :1] if ending == "error in the model" else x()
    try:
        with view.trace(value) as tracer:
            view.embed.output
            if ending == "to the end":
                tracer.result
            if ending == "error in the block":
                raise KeyError
    except (KeyError, RuntimeError):
        pass
    assert os.sched_getaffinity(0) == cores


def test_after_an_interrupt(cores) -> None:
    def interrupted(model: Calls, value: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass

    with pytest.raises(KeyboardInterrupt), Traceable(Calls(interrupted)).trace(1) as tracer:
        tracer.result
    assert os.sched_getaffinity(0) == cores
