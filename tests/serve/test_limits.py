"""Each limit of a session has its error; the wire format is fuzzed; the list of functions has none of the refused kinds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from remote_server import served
from serve_client import Raw
from websockets.exceptions import InvalidStatus

from nnatomy import StandardizedTransformer
from nnatomy.remote.wire import FrameError, pack, to_bytes, unpack
from nnatomy.serve import policy
from nnatomy.serve.app import Server
from nnatomy.serve.keys import Client
from nnatomy.serve.limits import Limits
from nnatomy.serve.policy import Refused
from nnatomy.serve.session import Session


@pytest.fixture(scope="module")
def server() -> Server:
    return Server({"demo:gpt2": StandardizedTransformer("demo:gpt2")})


Open = Callable[..., Session]


@pytest.fixture
def opened(server: Server) -> Any:
    sessions = []

    def make(**limits: Any) -> Session:
        opened = server.models["demo:gpt2"].open(Limits(**limits), Client("use", ""))
        sessions.append(opened.session)
        return opened.session

    yield make
    for one in sessions:
        one.close()


def ask(session: Session, commands: list[Any], question: Any = ("sync",), blobs: Any = ()) -> dict[str, Any]:
    answer = session.handle(pack({"n": 1, "c": commands, "q": list(question)}, blobs))
    assert answer is not None
    return unpack(answer)[0]


ONES = ["put", 2, "float32", [4, 4], [0, 1]]
BYTES = [to_bytes(torch.ones(4, 4))]


def zeros(size: int, number: int = 50) -> list[Any]:
    return ["op", "aten.new_zeros.default", [{"t": 2}, [size]], {}, [number]]


CASES: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "held_bytes": ({"held_bytes": 4096}, [zeros(2000)], "would hold more than 4,096"),
    "held_bytes by puts": ({"held_bytes": 32}, [], "would hold more than 32 bytes"),
    "result_bytes": ({"result_bytes": 1000}, [zeros(2000)], "its result has 8,000 bytes; 1,000 are allowed"),
    "elements": ({"elements": 100}, [zeros(2000)], "2,000 elements; 100 are allowed"),
    "tensors": ({"tensors": 3}, [zeros(1, 50 + 2 * k) for k in range(4)], "holds 3 tensors at most"),
    "operations": (
        {"operations": 10},
        [["op", "aten.mm.default", [{"t": 2}, {"t": 2}], {}, [50]]],
        "64 operations; 10 are allowed",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_of_a_command(opened: Open, name: str) -> None:
    limits, commands, text = CASES[name]
    session = opened(**limits)
    answer = ask(session, [ONES, *commands], blobs=BYTES)
    assert answer["error"]["type"] == "Refused"
    assert text in answer["error"]["text"]
    assert "ok" in ask(session, [])


def test_of_forward_passes(opened: Open) -> None:
    ids = ["op", "aten.new_zeros.default", [{"t": 2}, [1, 20]], {"dtype": {"dtype": "int64"}}, [60]]
    start = [["open", k, {"input_ids": {"t": 60}}] for k in range(3)]
    assert "20 tokens in a forward pass; 10 are allowed" in str(
        ask(opened(tokens=10), [ONES, ids, start[0]], blobs=BYTES)
    )
    assert "2 forward passes open" in str(ask(opened(forwards=2), [ONES, ids, *start], blobs=BYTES))
    assert "ok" in ask(opened(), [ONES, ids, *start], blobs=BYTES)


def test_of_time_and_commands(opened: Open) -> None:
    with pytest.raises(Refused, match="has used up its 0 seconds"):
        ask(opened(compute_seconds=0.0), [["clear"]])
    with pytest.raises(FrameError, match="a list of 3 commands at most"):
        ask(opened(commands=3), [["clear"]] * 4)


def test_of_a_server() -> None:
    with served("demo:gpt2", "--max-idle-seconds", "1", "--max-sessions", "2") as process:
        with Raw(process.address) as one, Raw(process.address):
            with pytest.raises(InvalidStatus) as denied:
                Raw(process.address)
            assert denied.value.response.status_code == 503
            assert b"2 sessions are open already" in denied.value.response.body
            time.sleep(1.5)
            assert one.ask(["sync"])["closed"] == 4408
        with Raw(process.address) as new:
            assert "ok" in new.ask(["sync"])


def test_frames_are_fuzzed(opened: Open) -> None:
    """Whatever comes, it is a frame with an answer or it is none: nothing else is raised, and the session goes on."""
    draw = random.Random(0)
    session = opened()
    frames = [
        pack({"n": 1, "c": [ONES, zeros(8)], "q": ["fetch", [50]]}, BYTES),
        pack({"n": 2, "c": [["drop", [50]]], "q": ["item", 2]}),
        pack(
            {
                "n": 3,
                "c": [["op", "aten.add.Tensor", [{"t": 2}, {"tuple": [1, 2.5]}], {"alpha": 2}, [52]]],
                "q": ["sync"],
            }
        ),
    ]
    ended = 0
    for _ in range(3000):
        frame = bytearray(draw.choice(frames))
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(len(frame))
            how = draw.random()
            if how < 0.7:
                frame[at] = draw.randrange(256)
            elif how < 0.85:
                del frame[at:]
                frame = frame or bytearray(b"\0")
            else:
                frame[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(6)))
        try:
            answer = session.handle(bytes(frame))
        except FrameError:
            ended += 1
        else:
            assert answer is None or {"ok", "error"} & unpack(answer)[0].keys()
    assert 500 < ended < 3000
    ask(session, [])
    assert "ok" in ask(session, [ONES], ["fetch", [2]], blobs=BYTES)


def test_the_list_of_functions() -> None:
    allowed = set()
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("aten::"):
            found = policy._overload(f"aten.{schema.name[6:]}.{schema.overload_name or 'default'}")
            if not isinstance(found, str):
                allowed.add(found)
    assert 500 < len(allowed) < 800
    for op in allowed:
        base = op._schema.name[6:]
        assert "backward" not in base
        assert not any(one.is_out for one in op._schema.arguments), op
        assert torch.Tag.inplace_view not in op.tags, op
        if torch.Tag.nondeterministic_seeded in op.tags:
            assert "attention" in base, op
        assert not {"Storage", "Generator", "Stream"} & {str(one.type) for one in op._schema.arguments}
    known = {op._schema.name[6:] for op in allowed}
    assert not known & {
        "empty_like",
        "as_strided",
        "set_",
        "resize_",
        "bincount",
        "from_file",
        "_reshape_alias",
        "view_as",
    }
    assert {"add", "mm", "softmax", "index_put_", "embedding", "native_layer_norm"} <= known
