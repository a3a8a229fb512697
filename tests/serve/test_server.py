"""What a server is beside its sessions: several models, its status, who may do what, and who is not let in."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import torch
from remote_blocks import leaves
from remote_server import Process, served
from serve_client import Raw
from websockets.exceptions import InvalidStatus

from nnatomy import StandardizedTransformer
from nnatomy.cli import main
from nnatomy.errors import ConnectionLostError, InputError, LoadError
from nnatomy.remote import connection
from nnatomy.serve.app import Server, application
from nnatomy.serve.keys import Keys
from nnatomy.serve.limits import Limits
from nnatomy.serve.page import page
from nnatomy.serve.run import bind

MODELS = ("demo:llama", "demo:gpt2")
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A key file, and the key of each role."""
    from nnatomy.serve.keys import new_key

    path = tmp_path_factory.mktemp("keys") / "keys"
    return path, {role: new_key(path, role) for role in ("use", "admin")}


@pytest.fixture(scope="module")
def server(keys: tuple[Path, dict[str, str]]) -> Iterator[Process]:
    with served(MODELS[0], MODELS[1], "--key-file", str(keys[0])) as process:
        yield process


def get(address: str, key: str | None = None, method: str = "GET", **headers: str) -> tuple[int, str]:
    """Status and text of an answer."""
    given = {"Authorization": f"Bearer {key}"} if key else {}
    request = Request(address, headers={**given, **headers}, method=method)
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


# Several models.


def test_several_models(server: Process, keys: tuple[Path, dict[str, str]]) -> None:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        for name in MODELS:
            remote: Any = StandardizedTransformer(name, server=server.address, api_key=keys[1]["use"])
            stack.callback(remote.close)
            local = StandardizedTransformer(name)
            assert type(remote.hf_model) is type(local.hf_model)
            found = []
            for model in (local, remote):
                with torch.no_grad(), model.trace(PROMPT):
                    model.layers_output[1][:, -1] *= 1.5
                    found.append(model.logits)
            assert torch.equal(found[0], leaves(found[1])[0])
        told = remote.server_status()
        assert [one["sessions"] for one in told["models"]] == [1, 1]
        assert told["models"][0]["hash"] != told["models"][1]["hash"]


def test_a_model_that_there_is_not(server: Process, keys: tuple[Path, dict[str, str]]) -> None:
    with pytest.raises(LoadError, match=r"no model 'demo:other': it has 'demo:llama', 'demo:gpt2'"):
        StandardizedTransformer("demo:other", server=server.address, api_key=keys[1]["use"])
    with pytest.raises(InvalidStatus) as denied:
        Raw(server.address, Authorization=f"Bearer {keys[1]['use']}")
    assert "say which model: it has 'demo:llama', 'demo:gpt2'" in denied.value.response.body.decode()


def test_a_busy_model_does_not_hold_up_another() -> None:
    server = Server({name: StandardizedTransformer(name) for name in MODELS})

    async def both() -> bool:
        import threading

        gate = threading.Event()
        busy = asyncio.create_task(server.models[MODELS[0]].compute(gate.wait, 30))
        await asyncio.wait_for(server.models[MODELS[1]].compute(torch.ones, 1), 10)
        held = not busy.done()
        gate.set()
        await busy
        return held

    assert asyncio.run(both())


def test_servers_share_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = StandardizedTransformer("demo:gpt2")
    one, other = application({"a": model}), application({"b": model}, Keys({"0" * 64: "use"}))
    assert one is not other
    with pytest.raises(InputError, match="A server needs a model"):
        Server({})
    assert main(["serve", "demo:gpt2", "demo:gpt2"]) == 2
    assert "demo:gpt2 is given twice" in capsys.readouterr().err


# Versions.


def test_a_client_of_another_protocol_is_refused_with_both_named(
    server: Process, keys: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PROTOCOL", 7)
    with pytest.raises(ConnectionLostError, match="this server speaks protocol 2, and the client 7"):
        StandardizedTransformer("demo:gpt2", server=server.address, api_key=keys[1]["use"])


@pytest.mark.parametrize(
    ("versions", "text"),
    [
        ({"protocol": 7}, "speaks protocol 7, and this nnatomy 2"),
        ({"transformers": "4.1.0"}, r"has Transformers 4\.1\.0, and here is 5\."),
    ],
)
def test_a_server_of_other_versions_is_refused_with_both_named(versions: dict[str, Any], text: str) -> None:
    """One that does not look at what a client says of its own."""
    script = (
        "import sys\nfrom nnatomy import StandardizedTransformer\nfrom nnatomy.serve import app, run\n"
        "server = app.Server({'demo:gpt2': StandardizedTransformer('demo:gpt2')})\n"
        f"server.models['demo:gpt2']._hello['versions'].update({versions!r})\n"
        "run.run(server, '127.0.0.1', int(sys.argv[1]))\n"
    )
    with served("demo:gpt2", script=script) as process:
        with pytest.raises(LoadError, match=text):
            StandardizedTransformer("demo:gpt2", server=process.address)


def test_whoever_reads_the_address_can_connect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before uvicorn has come up, too, which takes a while on a busy machine."""
    reached = []

    def not_yet_up(self: Any, sockets: list[socket.socket]) -> None:
        address = re.fullmatch(r"nnatomy: demo:gpt2 at http://127\.0\.0\.1:(\d+)\n", capsys.readouterr().err)
        assert address is not None
        socket.create_connection(("127.0.0.1", int(address[1])), timeout=5).close()
        reached.append(self)

    monkeypatch.setattr("uvicorn.Server.run", not_yet_up)
    assert main(["serve", "demo:gpt2", "--port", "0"]) == 0
    assert len(reached) == 1


# The status.


def test_the_status(server: Process, keys: tuple[Path, dict[str, str]]) -> None:
    with pytest.raises(InvalidStatus):
        Raw(server.address, query="?model=demo:none", Authorization=f"Bearer {keys[1]['use']}")
    with Raw(server.address, query="?model=demo:llama", Authorization=f"Bearer {keys[1]['use']}") as session:
        session.put(60, torch.zeros(1000))
        session.ask(["sync"], [["op", "aten.empty_like.default", [{"t": 2}], {}, [50]]])
        told = {role: json.loads(get(f"{server.address}/v1/status", key)[1]) for role, key in keys[1].items()}
    llama = told["use"]["models"][0]
    assert llama["name"] == "demo:llama"
    assert llama["revision"] is None
    assert (llama["dtype"], llama["device"], llama["sessions"]) == ("float32", "cpu", 1)
    assert llama["parameters"] == sum(
        one.numel() for one in StandardizedTransformer("demo:llama").hf_model.parameters()
    )
    assert llama["held_bytes"] == 4000 + 64 + 16 + 8
    assert told["use"]["refused"]["command"] == 1
    assert told["use"]["refused"]["model"] >= 1
    assert "open" not in told["use"]
    (opened,) = told["admin"]["open"]
    assert (opened["model"], opened["held_bytes"]) == ("demo:llama", llama["held_bytes"])
    assert opened["key"] in keys[0].read_text()


def test_the_page(server: Process, keys: tuple[Path, dict[str, str]]) -> None:
    assert get(server.address)[0] == 401
    password = base64.b64encode(f"anyone:{keys[1]['admin']}".encode()).decode()
    status, text = get(f"{server.address}/", Authorization=f"Basic {password}")
    assert status == 200
    for name in MODELS:
        assert f"<h2>{name}</h2>" in text
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", text)  # nothing is loaded
    assert "prefers-color-scheme" in text


def test_what_stands_on_the_page_is_escaped(server: Process, keys: tuple[Path, dict[str, str]]) -> None:
    told = json.loads(get(f"{server.address}/v1/status", keys[1]["admin"])[1])
    evil = "<script>alert(1)</script>\"'&"
    told["models"][0] |= {"name": evil, "class": evil, "revision": evil, "hash": evil, "device": evil}
    told["models"][0]["report"]["rows"][0] |= {"name": evil, "status": evil, "detail": evil}
    told |= {"refused": {evil: 1}, "versions": {evil: evil}, "open": [dict.fromkeys(OPEN, evil)]}
    text = page(told)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 12


OPEN = ("number", "model", "key", "age", "idle", "computed", "held_bytes", "tokens")


def test_the_metrics(server: Process, keys: tuple[Path, dict[str, str]]) -> None:
    """Each line is one of Prometheus's text format."""
    with Raw(server.address, query="?model=demo:gpt2", Authorization=f"Bearer {keys[1]['use']}"):
        found = {role: get(f"{server.address}/metrics", key)[1] for role, key in keys[1].items()}
    sample = re.compile(r'[a-z_]+(\{([a-z]+="([^"\\\n]|\\[\\n"])*",?)*\})? -?[0-9.e+-]+')
    for text in found.values():
        assert text.endswith("\n")
        for line in text.splitlines():
            assert re.fullmatch(r"# HELP [a-z_]+ .+|# TYPE [a-z_]+ (gauge|counter)", line) or sample.fullmatch(line), (
                line
            )
    assert 'nnatomy_sessions{model="demo:gpt2"} 1' in found["use"]
    assert re.search(r'nnatomy_held_bytes\{model="demo:gpt2"\} 88\n', found["use"])
    assert re.search(r'nnatomy_frames_total\{model="demo:gpt2"\} [1-9]', found["use"])
    assert "nnatomy_session_idle_seconds" not in found["use"]
    assert 'nnatomy_session_idle_seconds{model="demo:gpt2",number="' in found["admin"]


# Who may do what.


def test_what_only_an_admin_may(server: Process, keys: tuple[Path, dict[str, str]]) -> None:
    use, admin = keys[1]["use"], keys[1]["admin"]
    for path, method in (("/v1/status?hash=now", "GET"), ("/v1/sessions/1", "DELETE")):
        assert get(f"{server.address}{path}", None, method)[0] == 401
        assert get(f"{server.address}{path}", use, method) == (
            403,
            '{"error":"that is for keys with the role admin"}',
        )
        assert get(f"{server.address}{path}", admin, method, Origin="https://example.org")[0] == 403
    told = json.loads(get(f"{server.address}/v1/status?hash=now", admin)[1])
    assert all(one["hash"] == one["hash_now"] for one in told["models"])


def test_an_admin_closes_a_session(server: Process, keys: tuple[Path, dict[str, str]]) -> None:
    use, admin = keys[1]["use"], keys[1]["admin"]
    remote: Any = StandardizedTransformer("demo:gpt2", server=server.address, api_key=use)
    (number,) = [one["number"] for one in json.loads(get(f"{server.address}/v1/status", admin)[1])["open"]]
    assert get(f"{server.address}/v1/sessions/999999", admin, "DELETE")[0] == 404
    assert get(f"{server.address}/v1/sessions/{number}", admin, "DELETE") == (
        200,
        json.dumps({"closed": number}).replace(" ", ""),
    )
    with pytest.raises(ConnectionLostError, match="an admin has closed it"):
        for _ in range(50):
            remote(PROMPT)
    assert json.loads(get(f"{server.address}/v1/status", admin)[1])["sessions"] == 0


def test_key_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hashlib import sha256

    def client(text: str, authorization: str | None) -> Any:
        (tmp_path / "keys").write_text(text)
        return Keys.read(tmp_path / "keys").client(authorization)

    one, other = (sha256(key.encode()).hexdigest() for key in ("one", "other"))
    old = f"# mine\n{one}\n\n{other.upper()} # hers\n"
    assert client(old, "Bearer one") == ("use", one[:8], one)  # a file of before there were roles
    assert client(old, "bearer other") == ("use", other[:8], other)
    assert client(f"{one} admin # mine\n{other} use\n", "Bearer one").is_admin
    basic = base64.b64encode(b":one").decode()
    assert client(f"{one} admin", f"Basic {basic}").is_admin
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer two",
        f"Bearer {one}",
        "Basic one",
        "Basic !",
        f"Digest {basic}",
        "Bearer \udcff",
    ):
        assert client(old, wrong) is None
    assert Keys().client(None) == ("admin", "", "")
    for text in ("", "# none\n", "key\n", f"{one} root\n", f"{one} use admin\n", f"{one}\nkey\n"):
        with pytest.raises(InputError, match="has to hold the SHA-256 of each key"):
            client(text, None)
    path = tmp_path / "new"
    assert main(["serve", "demo:gpt2", "--new-key", str(path), "--role", "admin"]) == 0
    key = capsys.readouterr().out.strip()
    assert key not in path.read_text()
    assert Keys.read(path).client(f"Bearer {key}").is_admin  # type: ignore[union-attr]


# Who is not let in.


def test_a_full_queue_says_how_long_to_wait() -> None:
    from starlette.testclient import TestClient, WebSocketDenialResponse

    server = Server({"demo:gpt2": StandardizedTransformer("demo:gpt2")}, limits=Limits(waiting=3))
    model = server.models["demo:gpt2"]
    model.waiting, model.frames, model.seconds = 3, 10, 40.0
    with TestClient(server.application) as client:
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/v1/session"):
            pass
        assert denied.value.status_code == 503
        assert denied.value.headers["Retry-After"] == "13"
        assert denied.value.json() == {"error": "3 frames wait already; try again in about 13 s"}
        model.waiting = 2
        with client.websocket_connect("/v1/session"):
            pass
        assert client.get("/v1/status").json()["refused"] == {"waiting": 1}


def test_a_port_is_taken_before_models_are_loaded(server: Process, capsys: pytest.CaptureFixture[str]) -> None:
    """One that another has is told at once; 0 is any."""
    assert main(["serve", "./no-such-model", "--port", str(server.port)]) != 0
    told = capsys.readouterr().err
    assert f"127.0.0.1:{server.port} cannot be had (Address already in use). Give --port another; 0 is any" in told
    with bind("127.0.0.1", 0) as one, bind("127.0.0.1", 0) as other:
        assert len({one.getsockname()[1], other.getsockname()[1]}) == 2
    with pytest.raises(InputError, match="cannot be had"):
        bind("192.0.2.1", 0)


def test_the_proxy_of_a_full_cluster() -> None:
    """It has no other answer to a WebSocket than 500, without a word: what that may be is said."""

    class Full(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_error(500)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Full) as proxy:
        Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            with pytest.raises(
                ConnectionLostError, match="the proxy of a cluster answers so, too, where its queue is full"
            ):
                StandardizedTransformer("demo:gpt2", server=f"http://127.0.0.1:{proxy.server_port}")
        finally:
            proxy.shutdown()
