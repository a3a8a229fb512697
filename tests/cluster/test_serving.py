"""The application on Ray Serve, on a local cluster: two replicas, what they give, and what comes of one that is killed."""

from __future__ import annotations

import json
import linecache
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import torch
from cluster_processes import kill, left_of, named, started_by
from remote_blocks import BLOCKS, leaves
from remote_server import Process
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from nnatomy import StandardizedTransformer
from nnatomy.errors import ConnectionLostError, LoadError
from nnatomy.methods import logit_lens
from nnatomy.remote.connection import Connection
from nnatomy.remote.methods import Server

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(600)]

PROMPT = "The capital of France is"
#: Of each replica, at once.
SESSIONS = 6
OPTIONS = ("--ray", "--replicas", "2", "--max-sessions", str(SESSIONS), "--drain", "5", "--cpus", "0.5")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Process]:
    """The command, with its own cluster; no process of that is left when it has ended."""
    torch.set_num_threads(1)
    process = Process("demo:gpt2", *OPTIONS)
    began = started_by(process._process.pid)
    try:
        yield process
    finally:
        began |= started_by(process._process.pid)
        process.stop()
        assert not left_of(began, 30)


def get(address: str, method: str = "GET") -> Any:
    with build_opener(ProxyHandler({})).open(Request(address, method=method), timeout=60) as answer:
        return json.loads(answer.read())


def model_of(cluster: Process, stack: ExitStack) -> Any:
    model: Any = StandardizedTransformer("demo:gpt2", server=cluster.address)
    stack.callback(model.close)
    return model


def on_each(cluster: Process, stack: ExitStack) -> dict[str, Any]:
    """A model at each replica, by its name."""
    found: dict[str, Any] = {}
    for _ in range(SESSIONS):
        model = model_of(cluster, stack)
        found.setdefault(model._connection.replica, model)
        if len(found) == 2:
            return found
    raise AssertionError(f"all sessions are at {found}")


def replicas(cluster: Process) -> list[str]:
    told = get(f"{cluster.address}/v1/status")["models"]
    return list(told[0]["replicas"]) if told else []


@pytest.mark.parametrize("block", ["reads", "generation", "gradients", "skip"])
def test_values_are_those_of_a_local_model(cluster: Process, block: str) -> None:
    wanted = BLOCKS[block](StandardizedTransformer("demo:gpt2"))
    with ExitStack() as stack:
        for model in on_each(cluster, stack).values():
            for key, one in BLOCKS[block](model).items():
                assert torch.equal(leaves(one)[0], leaves(wanted[key])[0]), key


def test_a_run_is_found_at_its_replica(cluster: Process) -> None:
    """By a client that knows its name alone, and by a model that is at the other replica."""
    wanted = logit_lens(StandardizedTransformer("demo:gpt2"), [PROMPT])
    with ExitStack() as stack:
        (name, here), (_, there) = on_each(cluster, stack).items()
        alone = Server(cluster.address)
        stack.callback(alone.close)
        for client in (alone, there.server):
            run = here.server.submit("logit_lens", prompts=[PROMPT])
            assert run.name.startswith(name)
            assert len(run.name) == 32
            assert torch.equal(client.fetch(run.name).result(), wanted)


def test_what_the_front_tells(cluster: Process) -> None:
    with ExitStack() as stack:
        names = on_each(cluster, stack)
        told = get(f"{cluster.address}/v1/status?hash=now")
        (one,) = told["models"]
        assert one["replicas"] == sorted(names)
        assert one["hash_now"] == one["hash"]
        assert one["sessions"] == told["sessions"] == len(told["open"]) >= 2
        number, replica = (told["open"][0][key] for key in ("number", "replica"))
        get(f"{cluster.address}/v1/sessions/{number}?replica={replica}", "DELETE")
        with pytest.raises(ConnectionLostError, match="an admin has closed it"):
            for _ in range(50):
                BLOCKS["reads"](names[replica])
                time.sleep(0.1)
    with pytest.raises(LoadError, match=r"it has no model 'demo:other': it has 'demo:gpt2'"):
        StandardizedTransformer("demo:other", server=cluster.address)


def test_who_comes_when_all_is_full(cluster: Process) -> None:
    """Is refused, and told how long to wait; the status is told still; when a session ends there is room."""
    began = time.monotonic()
    while get(f"{cluster.address}/v1/status")["sessions"]:
        assert time.monotonic() - began < 30
        time.sleep(0.1)
    with ExitStack() as stack:
        held: list[Connection] = []
        while len(held) < 2 * SESSIONS:  # Ray asks two replicas how much they have, as of a moment ago
            assert time.monotonic() - began < 60
            with suppress(ConnectionLostError):
                held.append(Connection(cluster.address))
                stack.callback(held[-1].close)
        assert get(f"{cluster.address}/v1/status")["sessions"] == 2 * SESSIONS
        with pytest.raises(InvalidStatus) as refused:
            connect(f"{cluster.address.replace('http', 'ws')}/v1/session", proxy=None).__enter__()
        assert refused.value.response.status_code == 503
        assert refused.value.response.headers["Retry-After"] == "30"
        with pytest.raises(ConnectionLostError, match=f"{SESSIONS} sessions are open already; try again"):
            Connection(cluster.address)
        held[0].close()
        while True:
            assert time.monotonic() - began < 90
            with suppress(ConnectionLostError):
                Connection(cluster.address).close()
                break


def test_a_replica_that_is_killed_in_a_block(cluster: Process) -> None:
    """Its client is told at its line; the other goes on; another replica comes."""
    ended: dict[str, Any] = {}
    with ExitStack() as stack:
        clients = on_each(cluster, stack)
        within, killed = threading.Barrier(3, timeout=60), threading.Event()

        def block(name: str) -> None:
            model = clients[name]
            try:
                with torch.no_grad(), model.trace(PROMPT):
                    first = model.layers_output[1].sum().item()
                    within.wait()
                    killed.wait(60)
                    ended[name] = first, model.layers_output[3].sum().item()  # this line
            except ConnectionLostError as error:
                ended[name] = error

        threads = [threading.Thread(target=block, args=(name,)) for name in clients]
        for thread in threads:
            thread.start()
        within.wait()
        kill(named(cluster._process.pid, "ServeReplica:demo:gpt2")[0])
        killed.set()
        began = time.monotonic()
        for thread in threads:
            thread.join(60)
        assert time.monotonic() - began < 30
        (lost,) = (name for name, one in ended.items() if isinstance(one, Exception))
        assert "is gone" in str(ended[lost])
        assert "Make the model again to go on" in str(ended[lost])
        lines = []
        trace = ended[lost].__traceback__
        while trace is not None:
            lines.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            trace = trace.tb_next
        assert any(file == __file__ and "# this line" in linecache.getline(file, line) for file, line in lines)
        (other,) = set(ended) - {lost}
        local: Any = StandardizedTransformer("demo:gpt2")
        with torch.no_grad(), local.trace(PROMPT):
            assert ended[other] == (local.layers_output[1].sum().item(), local.layers_output[3].sum().item())
        alone = Server(cluster.address)
        stack.callback(alone.close)
        run = alone.fetch(f"{lost}{'0' * 24}")
        with pytest.raises(ConnectionLostError, match="is gone, and the run with it"):
            run.status()
        while lost in (now := replicas(cluster)) or len(now) < 2:
            assert time.monotonic() - began < 120
            time.sleep(0.5)
        assert other in now
        BLOCKS["reads"](model_of(cluster, stack))


def test_the_controller_that_is_killed(cluster: Process) -> None:
    """Sessions go on, new ones come, and Ray starts another controller."""
    wanted = BLOCKS["reads"](StandardizedTransformer("demo:gpt2"))
    with ExitStack() as stack:
        before = model_of(cluster, stack)
        (old,) = named(cluster._process.pid, "ServeController")
        kill(old)
        for model in (before, model_of(cluster, stack)):
            for key, one in BLOCKS["reads"](model).items():
                assert torch.equal(leaves(one)[0], leaves(wanted[key])[0])
    began = time.monotonic()
    while not (now := named(cluster._process.pid, "ServeController")) or now == [old]:
        assert time.monotonic() - began < 60
        time.sleep(0.5)
