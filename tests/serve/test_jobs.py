"""Methods that run whole at a server have the caps that commands have, run nothing but themselves, and change no weight."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import warnings
from base64 import b64encode
from hashlib import sha256
from typing import Any

import pytest
import torch

from nnatomy import StandardizedTransformer
from nnatomy.methods import TargetPrompt, integrated_gradients, logit_difference
from nnatomy.remote.values import NotSendableError, Receiver, Sender
from nnatomy.remote.wire import FrameError, pack, to_bytes, unpack
from nnatomy.serve.hello import weights_hash
from nnatomy.serve.job import Job
from nnatomy.serve.jobs import Jobs, Later
from nnatomy.serve.keys import Keys
from nnatomy.serve.limits import Limits
from nnatomy.serve.meter import Meter, Stopped
from nnatomy.serve.policy import Refused
from nnatomy.serve.served import Served
from nnatomy.serve.session import Session

A, B = "The capital of France is", "The capital of Japan is"
PAIR: Any = {"clean": A, "corrupted": B, "metric": {"logit_difference": [" Paris", " Tokyo"]}}


@pytest.fixture(scope="module")
def server() -> Served:
    return Served("demo:gpt2", StandardizedTransformer("demo:gpt2"), Limits())


def job(server: Served, name: Any, seconds: float = 60.0, limits: dict[str, Any] | None = None, **given: Any) -> Job:
    sender = Sender()
    data = sender.send(given)
    return Job(server._model, server._weights, Limits(**limits or {}), name, data, sender.blobs, True, seconds)


def ended(one: Job) -> dict[str, Any]:
    """The header of what came of it."""
    for _ in range(10_000):
        if one.ended:
            return unpack(one.frame)[0]
        one.go_on(lambda: False)
    raise AssertionError("it does not end")


#: By what is looked at: the limits, the method, its arguments, and the error.
CAPS: dict[str, tuple[dict[str, Any], str, dict[str, Any], str]] = {
    "tokens of a forward pass": (
        {"tokens": 40},
        "logit_lens",
        {"prompts": [A] * 20},
        "tokens in a forward pass; 40 are",
    ),
    "tokens, of rows that the method makes": (
        {"tokens": 20},
        "activation_patching",
        {**PAIR, "point": "mlps_output"},
        "tokens in a forward pass; 20 are",
    ),
    "a result": ({"result_bytes": 2_000}, "get_token_activations", {"prompts": A}, "bytes; 2,000 are allowed"),
    "elements": ({"elements": 2_000}, "logit_lens", {"prompts": A}, "elements; 2,000 are allowed"),
    "operations": ({"operations": 500}, "get_token_activations", {"prompts": A}, "operations; 500 are allowed"),
    "held at once": ({"held_bytes": 30_000}, "logit_lens", {"prompts": [A, B]}, "would hold more than 30,000 bytes"),
    "held at once, in passes": (
        {"held_bytes": 200_000},
        "get_token_activations",
        {"prompts": [A] * 40},
        "would hold more than 200,000 bytes",
    ),
    "rows asked for": (
        {"result_bytes": 1 << 20},
        "causal_tracing",
        {"prompt": A, "subject": "France", "samples": 100_000},
        "bytes; 1,048,576 are allowed",
    ),
    "a number": ({}, "integrated_gradients", {**PAIR, "steps": 10**9}, "the number 1,000,000,000"),
    "a text": ({"tokens": 10}, "logit_lens", {"prompts": "a" * 161}, "a text of 161 characters; 160 are"),
    "a text within an object": (
        {"tokens": 10},
        "patchscope_lens",
        {"source_prompts": A, "target_patch_prompts": TargetPrompt("a" * 161, -1)},
        "a text of 161 characters; 160 are",
    ),
    "a text of a metric": (
        {"tokens": 10},
        "activation_patching",
        {**PAIR, "metric": {"logit_difference": ["a" * 161, 3]}},
        "a text of 161 characters; 160 are",
    ),
    "texts in all": ({"tokens": 10}, "logit_lens", {"prompts": ["a" * 100] * 7}, "of 700 characters in all; 640 are"),
    "pairs of senders and receivers": (
        {},
        "path_patching",
        {**PAIR, "sender": ["mlps_contribution[0]"] * 2000, "receivers": ["mlps_contribution[5]"] * 2000},
        "sender and receivers: 4,000,000 pairs; 1,000,000 are allowed",
    ),
}


def test_what_the_model_would_hold_is_known_before(server: Served) -> None:
    with Meter(Limits(held_bytes=10 << 20), server._weights, lambda: None) as meter:
        meter._main = 0  # as if this were the model's own thread
        one = torch.ones(2000, 1000)
        with pytest.raises(Stopped, match="would hold more than 10,485,760 bytes"):
            one @ one.t()
        assert meter.bytes == one.nbytes


@pytest.mark.parametrize("what", CAPS)
def test_caps_hold_within_a_method(server: Served, what: str) -> None:
    limits, name, given, text = CAPS[what]
    if not what.startswith(("rows", "a number", "a text", "texts", "pairs")):
        assert "error" not in ended(job(server, name, **given))
    kind, told = ended(job(server, name, limits=limits, **given))["error"]
    assert kind == "Refused"
    assert text in told


def test_the_time_of_the_session_holds(server: Served) -> None:
    began = time.monotonic()
    kind, told = ended(job(server, "integrated_gradients", 0.3, **PAIR, steps=100_000))["error"]
    assert (kind, told) == ("Refused", "this session has used up its 3,600 seconds")
    assert time.monotonic() - began < 5


def test_it_stands_aside_where_others_wait_and_ends_when_cancelled(server: Served) -> None:
    one, turns = job(server, "integrated_gradients", **PAIR, steps=100_000), 0
    threads = threading.active_count()
    for turns in range(1, 6):
        began = time.monotonic()
        one.go_on(lambda: True)
        assert not one.ended
        assert time.monotonic() - began < 5
        with torch.no_grad():
            server._model(A)
    one.cancel("enough")
    assert ended(one)["error"] == ["Refused", "enough"]
    assert threading.active_count() == threads
    wanted = ended(job(server, "integrated_gradients", **PAIR, steps=3))
    by_turns = job(server, "integrated_gradients", **PAIR, steps=3)
    while not by_turns.ended:
        by_turns.go_on(lambda: True)
    assert turns == 5
    assert ended(by_turns).keys() == wanted.keys()


def test_two_by_turns_do_not_see_one_another(server: Served) -> None:
    wanted = integrated_gradients(
        server._model, A, B, metric=logit_difference(" Paris", " Tokyo", server._model), steps=5
    )
    two = [job(server, "integrated_gradients", **PAIR, steps=5) for _ in range(2)]
    other = job(server, "logit_lens", prompts=[A, B])
    while not all(one.ended for one in (*two, other)):
        for one in (*two, other):
            one.go_on(lambda: True)
    for one in two:
        header, blobs = unpack(one.frame)
        assert torch.equal(Receiver(blobs).receive(header["ok"]).effect, wanted.effect)


def test_what_is_measured_is_let_go(server: Served) -> None:
    meter = Meter(Limits(), server._weights, lambda: None)
    with meter:
        kept = torch.ones(10_000)
        view = kept[5:]
        assert meter.bytes == 40_000
        del kept
        assert meter.bytes == 40_000
        del view
        server._model.hf_model.lm_head.weight.t()
    gc.collect()
    assert meter.bytes == 0


def test_sizes_are_known_before_anything_is_computed(server: Served) -> None:
    with Meter(Limits(), server._weights, lambda: None):
        one = torch.ones(1000, 1000)
        for call in (
            lambda: torch.zeros(10**6, 10**6),
            lambda: one.expand(10**6, 1000, 1000).flatten(0, 1),
            lambda: one.repeat(10**4, 10**3),
            lambda: torch.cat([one] * 1000),
            lambda: torch.einsum("ab,cd->abcd", one, one),
            lambda: torch.arange(10**12),
        ):
            with pytest.raises(Stopped, match="are allowed|would hold more"):
                call()


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no method": ("no_such", {}, "there is no method"),
    "a module": ("metrics", {}, "there is no method"),
    "a class": ("SteeringVector", {}, "there is no method"),
    "a dunder": ("__class__", {}, "there is no method"),
    "a path": ("logit_lens.__globals__", {}, "there is no method"),
    "no text": (7, {}, "there is no method"),
    "what writes files": ("collect_activations", {"path": "/tmp/x"}, "it writes files"),
    "what trains": ("TunedLens.train", {}, "there is no method"),
    "what runs a function": ("run_prompts", {}, "it takes a function"),
    "what changes a pass": ("ablate_direction", {}, "it is called in a block"),
}
FAILS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another model": ("logit_lens", {"prompts": A, "model": "demo:llama"}, "InputError"),
    "no such argument": ("logit_lens", {"prompts": A, "__class__": 3}, "InputError"),
    "a function by its name": ("logit_lens", {"prompts": A, "lens": "os.system"}, "InputError"),
    "a metric by another name": ("activation_patching", {**PAIR, "metric": {"eval": ["1"]}}, "InputError"),
    "a metric of two names": ("activation_patching", {**PAIR, "metric": {}}, "InputError"),
    "a point that is an attribute": ("activation_patching", {**PAIR, "point": "__dict__"}, "InputError"),
    "a point that is a method": ("activation_patching", {**PAIR, "point": "generate"}, "InputError"),
    "an argument of the forward": (
        "logit_lens",
        {"prompts": {"input_ids": [[3]], "output_attentions": True}},
        "Refused",
    ),
    "a cache": ("logit_lens", {"prompts": {"input_ids": [[3]], "past_key_values": [1]}}, "Refused"),
    "code of a generation": (
        "patchscope_generate",
        {"prompts": A, "target_patch_prompt": A, "custom_generate": "x/y"},
        "InputError",
    ),
    "a repository's code": ("patchscope_generate", {"prompts": A, "trust_remote_code": True}, "InputError"),
    "a generation's setting of another type": ("patchscope_generate", {"prompts": A, "use_cache": "static"}, "Refused"),
    "tokens that there are not": ("logit_lens", {"prompts": [[10**6]]}, "InputError"),
    "a text that is too deep": ("logit_lens", {"prompts": [[[[[[A]]]]]]}, "InputError"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_names_are_refused(server: Served, what: str) -> None:
    name, given, text = REFUSED[what]
    with pytest.raises(Refused, match=text):
        job(server, name, **given)


@pytest.mark.parametrize("what", FAILS)
def test_hostile_arguments_fail(server: Served, what: str) -> None:
    name, given, kind = FAILS[what]
    sender = Sender()
    data = {"dict": [[key, sender.send(one)] for key, one in given.items()]}
    one = Job(server._model, server._weights, Limits(), name, data, sender.blobs, True, 60.0)
    assert ended(one)["error"][0] == kind
    assert weights_hash(server._weights) == server._hello["hash"]


@pytest.mark.parametrize(
    "value",
    [
        {"class": ["Popen", []]},
        {"class": ["Patching", [["point", 1]]]},
        {"class": ["Prompt", "x"]},
        {"class": [["Prompt"], []]},
        {"range": [0, 10**15, 1]},
        {"range": [0, 5, 0]},
        {"range": [0.5, 5, 1]},
        {"metric": ["logit_difference", []]},
        {"metric": ["__init__", []]},
        {"t": [0, "float32", [4], [0]]},
        {"t": [-1, "float32", [4], [0]]},
        {"t": [0, "object", [4], [0]]},
        {"object": 3},
        {"pickle": "gASV"},
        {"dict": [["a"]]},
        {"dict": [[["a"], 1]]},
    ],
    ids=str,
)
def test_values_that_are_none(value: Any) -> None:
    with pytest.raises((FrameError, TypeError)):
        Receiver([b"123"]).receive(value)


def test_what_is_data_comes_back_as_it_was() -> None:
    values = [1, 2.5, True, None, "ä", [1, [2]], (1, 2), {"a": [1], 3: "b"}, range(2, 9, 3), torch.Size([1])]
    tensors = [
        torch.rand(3, 4).t(),
        torch.tensor(3),
        torch.zeros(0, 2),
        torch.tensor([True]),
        torch.rand(2, 1, 5)[:, :, 1:],
    ]
    sender = Sender()
    header, blobs = unpack(pack({"v": sender.send([values, tensors])}, sender.blobs))
    back, others = Receiver(blobs).receive(header["v"])
    assert back == [*values[:-1], (1,)]
    assert all(torch.equal(*two) and two[0].dtype == two[1].dtype for two in zip(tensors, others, strict=True))
    assert others[0].stride() == tensors[0].stride()
    for wrong in (
        print,
        object(),
        torch.nn.Linear(1, 1),
        torch.ones(1, requires_grad=True),
        torch.rand(2).to_sparse(),
        {1},
    ):
        with pytest.raises((NotSendableError, KeyError)):
            Sender().send([wrong])


async def nothing(*_: Any) -> None:
    raise AssertionError


def session(server: Served, jobs: Jobs, owner: str) -> Session:
    return Session(server._model, server._points, server._weights, jobs._limits, server._hello, None, jobs, owner)


def asked(one: Session, *question: Any, blobs: Any = ()) -> dict[str, Any]:
    answer = one.handle(pack({"n": 1, "c": [], "q": list(question)}, blobs))
    if isinstance(answer, bytes):
        return unpack(answer)[0]
    assert isinstance(answer, Later)
    while not answer.job.ended:
        answer.job.go_on(lambda: False)
    return {"ok": answer.answer[0]}


def test_results_are_their_owners(server: Served) -> None:
    jobs = Jobs(Limits(runs=3), nothing, lambda: False)
    mine, mine_too, other = session(server, jobs, "a"), session(server, jobs, "a"), session(server, jobs, "b")
    name, given = "0" * 31 + "f", {"dict": [["prompts", A]]}
    assert asked(mine, "run", name, "logit_lens", given, 100)["ok"]["size"] > 1000
    assert asked(mine_too, "wait", name, 100, 100)["ok"]["at"] == 100
    for question in (["wait", name, 0, 100], ["look", name], ["wait", "0" * 32, 0, 9], ["wait", [1], 0, 9]):
        assert "there is no run of that name" in asked(other, *question)["error"]["text"]
    other.handle(pack({"c": [["cancel", name], ["forget", name]], "q": None, "n": 1}))
    assert asked(mine, "look", name)["ok"]["ended"]
    assert "there is a run of that name" in asked(mine, "run", name, "logit_lens", given, 9)["error"]["text"]
    assert "random hexadecimal digits" in asked(mine, "run", "abc", "logit_lens", given, 9)["error"]["text"]
    for most in (0, -1, 1 << 40, "1", None):
        assert "bytes at most" in asked(mine, "wait", name, 0, most)["error"]["text"]
    for i in range(4):
        assert "ok" in asked(mine, "run", f"{i:032x}", "logit_lens", given, 9)
    for i in range(4, 7):
        mine.handle(pack({"n": 1, "c": [], "q": ["begin", f"{i:032x}", "logit_lens", given]}))
    assert "3 runs of yours are at work" in asked(mine, "run", "a" * 32, "logit_lens", given, 9)["error"]["text"]
    for i in range(4, 7):
        jobs.forget("a", f"{i:032x}")
    assert "ok" in asked(other, "run", name, "logit_lens", given, 9)  # a name of its own
    for one in jobs._held.values():
        one.ended_at -= 600
    assert "there is no run of that name" in asked(mine, "look", name)["error"]["text"]
    assert jobs.told() == {"running": 0, "kept": 0, "bytes": 0}


def test_the_bytes_that_are_kept_are_bounded(server: Served) -> None:
    one = job(server, "logit_lens", prompts=A)
    ended(one)
    size = len(one.frame)
    jobs = Jobs(Limits(kept_bytes=3 * (size + 10_000)), nothing, lambda: False)
    mine, other = session(server, jobs, "a"), session(server, jobs, "b")
    asked(other, "run", "f" * 32, "logit_lens", {"dict": [["prompts", A]]}, 9)
    for i in range(8):
        asked(mine, "run", f"{i:032x}", "logit_lens", {"dict": [["prompts", A]]}, 9)
        jobs._keep_within(jobs.get("a", f"{i:032x}"))
        assert jobs.told()["bytes"] <= 4 * size
    assert jobs.told()["kept"] == 3 + 1
    assert "ok" in asked(other, "look", "f" * 32)  # another's stay


def test_the_arguments_that_wait_are_bounded(server: Served) -> None:
    jobs = Jobs(Limits(kept_bytes=5000), nothing, lambda: False)
    mine, other = session(server, jobs, "a"), session(server, jobs, "b")
    given, blobs = {"dict": [["prompts", {"t": [0, "int64", [300], [0]]}]]}, [bytes(2400)]

    def begin(one: Session, i: int) -> Any:
        return one.handle(pack({"n": 1, "c": [], "q": ["begin", f"{i:032x}", "logit_lens", given]}, blobs))

    assert not isinstance(begin(mine, 0), bytes)
    assert not isinstance(begin(mine, 1), bytes)
    assert b"the arguments of your runs have more than 5,000 bytes" in begin(mine, 2)
    assert not isinstance(begin(other, 2), bytes)
    jobs.forget("a", f"{0:032x}")
    assert not isinstance(begin(mine, 2), bytes)
    with pytest.raises(Refused, match="has used up its"):
        session(server, Jobs(Limits(compute_seconds=-1.0), nothing, lambda: False), "a").handle(
            pack({"n": 1, "c": [], "q": ["begin", "0" * 32, "logit_lens", given]}, blobs)
        )
    assert not jobs.told()["kept"]


def test_who_has_the_same_key_is_the_same_whatever_he_calls_himself() -> None:
    """Else the caps of one key would be those of each name that a client thinks of."""
    keys = Keys({sha256(b"one").hexdigest(): "use", sha256(b"two").hexdigest(): "use"})

    def owner(kind: str, key: str) -> str:
        client = keys.client(f"{kind} {key}")
        assert client is not None
        return client.owner

    names = [owner("Basic", b64encode(f"{name}:one".encode()).decode()) for name in ("a", "b", "")]
    assert {*names, owner("Bearer", "one"), owner("bearer", " one ")} == {sha256(b"one").hexdigest()}
    assert owner("Bearer", "two") not in names
    nobody = Keys().client("Bearer three")
    assert nobody is not None
    assert nobody.owner == ""


def test_what_is_dropped_is_let_go_at_once(server: Served) -> None:
    """Results that nobody can fetch any more take no memory, though the time for which they are kept is not over."""

    async def run() -> None:
        async def compute(function: Any, *given: Any) -> Any:
            return function(*given)

        async def send(header: dict[str, Any], blobs: list[bytes]) -> None:
            sent.append(header)

        jobs = Jobs(Limits(), compute, lambda: False)
        mine, sent = session(server, jobs, "a"), list[Any]()
        later: Any = mine.handle(
            pack({"n": 1, "c": [], "q": ["run", "0" * 32, "logit_lens", {"dict": [["prompts", A]]}, 9]})
        )
        jobs.answer(later, mine, send)
        while not sent or "ok" not in sent[-1]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert jobs.told()["kept"] == 1
        assert not jobs._tasks  # each of which would have the job
        mine.handle(pack({"n": 2, "c": [["forget", "0" * 32]], "q": None}))
        assert not jobs._held

    asyncio.run(run())


def test_answers_that_are_not_read_are_bounded(server: Served) -> None:
    """One after the other has its bytes in memory, and there are so many that wait."""

    async def run() -> None:
        async def send(header: dict[str, Any], blobs: list[bytes]) -> None:
            sending.append(header)
            await asyncio.sleep(3600)

        jobs, sending = Jobs(Limits(), nothing, lambda: False), list[Any]()
        mine = session(server, jobs, "a")
        assert "ok" in asked(mine, "run", "0" * 32, "logit_lens", {"dict": [["prompts", A]]}, 9)
        told: list[Any] = []
        for _ in range(80):
            answer: Any = mine.handle(pack({"n": 1, "c": [], "q": ["wait", "0" * 32, 0, 1 << 20]}))
            if isinstance(answer, bytes):
                told.append(unpack(answer)[0]["error"]["text"])
            else:
                jobs.answer(answer, mine, send)
        await asyncio.sleep(0.05)
        assert len(sending) == 1
        assert told == ["64 answers of this session are still to be given"] * 16
        for task in jobs._tasks:
            task.cancel()

    asyncio.run(run())


def test_a_backward_pass_is_ended_too(server: Served) -> None:
    """Between two gradients, when it is cancelled or the session's time is over."""
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise Stopped(Refused("enough"))

    def made() -> tuple[torch.Tensor, torch.Tensor]:
        y = x = torch.rand(8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for _ in range(100):
            y = y.exp().log1p()
        return x, y.sum()

    ends: list[Any] = [
        lambda x, y: y.backward(),
        lambda x, y: torch.autograd.grad(y, x),
        lambda x, y: torch.autograd.grad([y], [x]),
    ]
    for end in ends:
        calls = 0
        with pytest.raises(Stopped, match="enough"), Meter(Limits(), server._weights, lambda: None, stop=check):
            end(*made())
        assert calls == 21
    x, y = made()
    with Meter(Limits(), server._weights, lambda: None, stop=lambda: None):
        (found,) = torch.autograd.grad(y, x)
    x, y = made()
    y.backward()
    assert torch.equal(found, x.grad)  # type: ignore[arg-type]


def test_tensors_of_arguments_and_warnings_of_a_job(server: Served) -> None:
    one = job(server, "logit_lens", prompts=torch.tensor([[3, 4, 5]]))
    assert "ok" in ended(one)
    warned = {**PAIR, "metric": {"logit_difference": ["Paris", " Tokyo"]}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they are the client's
        told = ended(job(server, "activation_patching", **warned))
    assert [kind for kind, _ in told["warnings"]] == ["UserWarning"]
    assert "has probability" in told["warnings"][0][1]
    assert to_bytes(torch.ones(1))


def test_what_a_method_logs_is_told(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    told = ended(job(server, "patchscope_lens", source_prompts=[A], target_patch_prompts=TargetPrompt(B, -1)))["log"]
    ((name, level, text),) = told
    assert (name, level) == ("nnatomy.methods.patched_rows", logging.INFO)
    assert text.startswith(("Positions from", "Whole prompts"))
    assert logging.getLogger("nnatomy").level == logging.NOTSET
    assert not capsys.readouterr().err
