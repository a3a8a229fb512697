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
from transformers import LlamaConfig, LlamaForCausalLM
from websockets.exceptions import InvalidStatus

from nnatomy import StandardizedTransformer
from nnatomy.arch_configs import cache_name
from nnatomy.remote.wire import FrameError, pack, to_bytes, unpack
from nnatomy.serve import policy
from nnatomy.serve.app import Server
from nnatomy.serve.keys import Client
from nnatomy.serve.limits import Limits
from nnatomy.serve.policy import Refused
from nnatomy.serve.session import More, Session
from nnatomy.serve.tensors import _inside


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


def test_of_a_session_in_all(opened: Open) -> None:
    ids = ["op", "aten.new_zeros.default", [{"t": 2}, [1, 8]], {"dtype": {"dtype": "int64"}}, [60]]
    passes = [["open", k, {"input_ids": {"t": 60}}] for k in range(3)]
    answer = ask(opened(total_tokens=20), [ONES, ids, *passes], blobs=BYTES)
    assert "this session has used up its 20 tokens" in answer["error"]["text"]
    products = [["op", "aten.mm.default", [{"t": 2}, {"t": 2}], {}, [50]]] * 4
    answer = ask(opened(total_operations=200), [ONES, *products], blobs=BYTES)
    assert "this session has used up its 200 operations" in answer["error"]["text"]
    answer = ask(opened(total_operations=10**6), [ONES, ids, *passes], blobs=BYTES)
    assert "has used up its 1,000,000 operations" in answer["error"]["text"]  # those of the passes count


def test_of_what_gradients_keep(opened: Open) -> None:
    """It is counted while somebody needs it, and let go with the last who does."""
    session = opened(graph_bytes=1 << 20)
    ask(session, [ONES, zeros(1 << 16), ["needs", 50, True]], blobs=BYTES)
    steps = [["op", "aten.exp.default", [{"t": 50 + 2 * k}], {}, [52 + 2 * k]] for k in range(3)]
    held = session.held_bytes
    assert "ok" in ask(session, steps)
    assert session.held_bytes - held == 2 * 3 * (1 << 18)  # three results, which are kept too
    answer = ask(session, [["op", "aten.exp.default", [{"t": 56}], {}, [56]]] * 3)
    assert "more than 1,048,576 bytes would be kept for gradients" in answer["error"]["text"]
    assert "ok" in ask(session, [["drop", [52, 54, 56]]])
    assert session.held_bytes == held
    ids = ["op", "aten.new_zeros.default", [{"t": 2}, [6, 60]], {"dtype": {"dtype": "int64"}}, [60]]
    answer = ask(session, [ids, ["open", 8, {"input_ids": {"t": 60}}]], ["go", 8, []])
    assert "would be kept for gradients: trace within torch.no_grad()" in answer["error"]["text"]
    assert "ok" in ask(session, [["grad", False], ["open", 10, {"input_ids": {"t": 60}}]], ["go", 10, []])


def test_gradients_are_the_same_though_they_are_counted(opened: Open) -> None:
    session = opened()
    ask(session, [ONES, ["needs", 2, True], ["op", "aten.exp.default", [{"t": 2}], {}, [50]]], blobs=BYTES)
    ask(
        session,
        [["op", "aten.mul.Tensor", [{"t": 50}, {"t": 2}], {}, [52]], ["op", "aten.sum.default", [{"t": 52}], {}, [54]]],
    )
    found = session.handle(pack({"n": 1, "c": [["grads", [54], [2], None, False, False, [56]]], "q": ["fetch", [56]]}))
    x = torch.ones(4, 4, requires_grad=True)
    (x.exp() * x).sum().backward()
    assert bytes(unpack(found)[1][0]) == to_bytes(x.grad)  # type: ignore[arg-type]


def test_of_a_cache(opened: Open) -> None:
    """The tokens of a cache count as those that are given, and its bytes as those that are held."""
    ids = ["op", "aten.new_zeros.default", [{"t": 2}, [1, 20]], {"dtype": {"dtype": "int64"}}, [60]]
    session = opened(tokens=30)
    name = cache_name(session._points.root)
    first = ["open", 8, {"input_ids": {"t": 60}, name: {"cache": 70}, "use_cache": True}]
    again = ["open", 10, {"input_ids": {"t": 60}, name: {"object": 70}, "use_cache": True}]
    assert "ok" in ask(session, [ONES, ids, first], ["go", 8, []], blobs=BYTES)
    assert "40 tokens in a forward pass; 30 are allowed" in ask(session, [again])["error"]["text"]
    session = opened(held_bytes=80_000)
    last = session._points.numbers[session._points.layers[-1]]
    assert "ok" in ask(session, [["grad", False], ONES, ids, first], ["go", 8, [[last, "output"]]], blobs=BYTES)
    assert session.held_bytes < 20_000
    assert "would hold more than 80,000 bytes" in ask(session, [["end", 8], again])["error"]["text"]


def test_what_passes_have_returned_takes_no_memory_that_is_not_counted(opened: Open) -> None:
    """Neither a client that drops the tensors and nothing else, nor one that drops nothing, has more than it may."""
    ids = ["op", "aten.new_zeros.default", [{"t": 2}, [1, 20]], {"dtype": {"dtype": "int64"}}, [60]]
    session = opened()
    ask(session, [["grad", False], ONES, ids], blobs=BYTES)
    for k in range(3):
        told = ask(session, [["open", k, {"input_ids": {"t": 60}, "use_cache": False}]], ["go", k, []])["ok"]["result"]
        (number,) = [one["t"][0] for _, one in told["output"][2]]
        assert session.held_bytes == 20 * 4 * session._model.vocab_size + 64 + 160
        ask(session, [["drop", [number]]])
    assert session._tensors.objects == 3
    assert session.held_bytes == 64 + 160
    assert not any(
        list(_inside(one, 8)) for one in session._tensors._held.values() if not isinstance(one, torch.Tensor)
    )


def test_what_is_passed_by_is_bounded(opened: Open) -> None:
    session = opened(held_bytes=20_000)
    ids = ["op", "aten.new_zeros.default", [{"t": 2}, [1, 20]], {"dtype": {"dtype": "int64"}}, [60]]
    everywhere = [[number, "output"] for number in range(3, len(session._points.modules))]
    answer = ask(
        session, [["grad", False], ONES, ids, ["open", 8, {"input_ids": {"t": 60}}]], ["go", 8, [], everywhere], BYTES
    )
    assert "more than 20,000 bytes at once" in answer["error"]["text"]


def test_one_clients_long_prompt_does_not_show_in_anothers_values() -> None:
    """Some models grow their table of positions with the longest prompt, and then use that for all."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    config = LlamaConfig(**sizes, max_position_embeddings=16, rope_parameters=rope, initializer_range=0.5)
    served = Server({"x": StandardizedTransformer(LlamaForCausalLM(config).eval())}).models["x"]

    def logits(tokens: int) -> bytes:
        opened = served.open(Limits(), Client("use", ""))
        put, ids = ["put", 60, "int64", [1, tokens], [0, 1]], torch.arange(tokens)[None] % 40
        told = ask(opened.session, [put, ["open", 8, {"input_ids": {"t": 60}}]], ["go", 8, []], [to_bytes(ids)])
        number = dict(told["ok"]["result"]["output"][2])["logits"]["t"][0]
        found = opened.session.handle(pack({"n": 1, "q": ["fetch", [number]]}))
        opened.session.close()
        return bytes(unpack(found)[1][0])

    before = logits(20)
    assert logits(60) != before
    assert logits(20) == before


def test_of_the_time_of_a_command(opened: Open) -> None:
    """A forward pass ends before the next layer, and a backward pass before the next gradient; the session goes on."""
    session = opened(command_seconds=0.0)
    ids = ["op", "aten.new_zeros.default", [{"t": 2}, [1, 20]], {"dtype": {"dtype": "int64"}}, [60]]
    assert "ok" in ask(session, [ONES, ids, ["needs", 2, True]], blobs=BYTES)
    text = "a command that computes for more than 0 seconds"
    answer = ask(session, [["open", 8, {"input_ids": {"t": 60}}]], ["go", 8, []])
    assert answer["error"]["text"] == text
    steps = [["op", "aten.exp.default", [{"t": 2 if k == 0 else 50}], {}, [50]] for k in range(5)]
    assert "ok" in ask(session, [*steps, ["op", "aten.sum.default", [{"t": 50}], {}, [52]]])
    for command in (["backward", 52, None, True, False, [2]], ["grads", [52], [2], None, True, False, [54]]):
        assert ask(session, [command])["error"]["text"] == text
    assert ask(session, [], ["gradient", 2])["ok"] is None
    assert "ok" in ask(session, [])


def test_a_long_frame_stands_aside_where_others_wait(opened: Open) -> None:
    """Between two commands; what it gives is the same, with the bytes of tensors that come in it."""
    one, other = opened(), opened()
    size, x = 800, torch.rand(800, 800, generator=torch.Generator().manual_seed(0))
    put: Any = [["put", 60, "float32", [size, size], [0, 1]], ["put", 62, "float32", [size, size], [0, 1]]]
    steps = [["op", "aten.mm.default", [{"t": 60 if k == 0 else 50}, {"t": 60}], {}, [50]] for k in range(30)]
    last = ["op", "aten.mm.default", [{"t": 50}, {"t": 62}], {}, [52]]
    frame = pack({"n": 1, "c": [put[0], *steps, put[1], last], "q": ["fetch", [52]]}, [to_bytes(x / 400)] * 2)
    answer, turns = one.handle(frame, lambda: True), 0
    while isinstance(answer, More):
        turns += 1
        assert "ok" in ask(other, [])
        answer = one.go_on(lambda: True)
    assert turns >= 2
    wanted = x / 400
    for _ in range(30):
        wanted = wanted @ (x / 400)
    assert bytes(unpack(answer)[1][0]) == to_bytes(wanted @ (x / 400))
    assert isinstance(other.handle(frame), bytes)  # nobody waits


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
