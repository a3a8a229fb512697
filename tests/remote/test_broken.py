"""Connections that break, keys, and what a remote model refuses: clear errors at the user's line, and nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import build
from encoder_decoders import build as encoder_decoder
from remote_server import Process, served
from transformers import LlamaForCausalLM

from nnatomy import StandardizedTransformer
from nnatomy.cli import main
from nnatomy.errors import ConnectionLostError, InputError, LoadError, NotRemoteError, RemoteError
from nnatomy.serve.app import Server

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with served("demo:llama") as process:
        yield process


@pytest.fixture
def remote(server: Process) -> Iterator[Any]:
    model: Any = StandardizedTransformer("demo:llama", server=server.address)
    yield model
    model.close()


def sessions(model: Any) -> int:
    return int(model.server_status()["sessions"])


def test_a_client_that_is_killed_in_a_block(server: Process, remote: Any) -> None:
    script = (
        "import os, signal, sys\nfrom nnatomy import StandardizedTransformer\n"
        "model = StandardizedTransformer('demo:llama', server=sys.argv[1])\n"
        f"with model.trace({PROMPT!r}):\n    model.layers_output[2]\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    before = sessions(remote)
    ended = subprocess.run([sys.executable, "-c", script, server.address], capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    for _ in range(100):
        if sessions(remote) == before:
            break
        time.sleep(0.1)
    assert sessions(remote) == before
    with remote.trace(PROMPT):
        logits = remote.logits
    assert logits.shape[0] == 1


def test_a_server_that_is_killed_in_a_block() -> None:
    with served("demo:llama") as process:
        model = StandardizedTransformer("demo:llama", server=process.address)
        began = time.monotonic()
        with torch.no_grad(), model.trace(PROMPT):
            kept = model.layers_output[1]
        with pytest.raises(ConnectionLostError, match="is gone") as caught:
            with model.trace(PROMPT):
                model.layers_output[2]
                process.stop(signal.SIGKILL)
                model.layers_output[3]  # this line
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__) if frame.filename == __file__]
    assert any("# this line" in str(line) for line in lines)
    assert time.monotonic() - began < 30
    assert (kept[0] + 1).shape == (5, 96)  # what has been fetched stays
    assert isinstance(kept.local(), torch.Tensor)
    with pytest.raises(ConnectionLostError, match="Make the model again"):
        model("Japan is in")


def test_no_server() -> None:
    with pytest.raises(ConnectionLostError, match="No connection to the server http://127.0.0.1:9"):
        StandardizedTransformer("demo:llama", server="http://127.0.0.1:9")
    with pytest.raises(LoadError, match="give its address"):
        StandardizedTransformer("demo:llama", server="127.0.0.1")


def test_another_model_and_arguments_of_loading(server: Process) -> None:
    with pytest.raises(LoadError, match="demo:gpt2': it has no model 'demo:gpt2': it has 'demo:llama'"):
        StandardizedTransformer("demo:gpt2", server=server.address)
    with pytest.raises(InputError, match="loaded and checked by its server"):
        StandardizedTransformer("demo:llama", server=server.address, dtype="float16")
    with pytest.raises(InputError, match="for a model given by its name"):
        StandardizedTransformer(torch.nn.Linear(1, 1), server=server.address)


def test_the_server_of_the_environment(server: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNATOMY_SERVER", server.address)
    model: Any = StandardizedTransformer("demo:llama")
    assert model.server_status()["models"][0]["name"] == "demo:llama"
    model.close()


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys"
    assert main(["serve", "demo:llama", "--new-key", str(keys)]) == 0
    key = capsys.readouterr().out.strip()
    assert key not in keys.read_text()
    assert os.stat(keys).st_mode & 0o77 == 0
    with served("demo:llama", "--key-file", str(keys)) as process:
        for wrong in (None, "", key[:-1], f"{key}x"):
            with pytest.raises(ConnectionLostError, match="asks for another key"):
                StandardizedTransformer("demo:llama", server=process.address, api_key=wrong)
        model: Any = StandardizedTransformer("demo:llama", server=process.address, api_key=key)
        assert json.dumps(model.server_status())
        model.close()


def test_an_address_that_others_can_reach_needs_keys(capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "192.168.1.2", "example.org", "::"):
        assert main(["serve", "demo:llama", "--host", host]) == 2
        assert "clients have to have a key" in capsys.readouterr().err


def test_an_error_at_the_server_says_whose_line_it_was(remote: Any) -> None:
    with pytest.raises(IndexError, match=r"at the server, asked for at .*test_broken.py:\d+: index 99") as caught:
        with remote.trace(PROMPT):
            hidden = remote.layers_output[2]
            wrong = hidden[:, torch.tensor([99])]
            wrong.sum().item()
    assert isinstance(caught.value, RemoteError)
    with remote.trace(PROMPT):  # and is told once
        assert remote.logits.shape[1] == 5


def test_what_is_not_to_be_had(remote: Any) -> None:
    with pytest.raises(NotRemoteError, match="read what you need by its name"):
        remote(PROMPT, output_hidden_states=True)
    remote.config.output_hidden_states = True
    with pytest.raises(NotRemoteError, match=r"output_hidden_states=True .* such as model.layers_output\[:\]"):
        remote(PROMPT)
    remote.config.output_hidden_states = False
    with pytest.raises(NotRemoteError, match="they are everybody's"):
        remote.hf_model.lm_head.weight.requires_grad_(False)
    with pytest.raises(NotRemoteError, match="register_hook"):
        with remote.trace(PROMPT):
            remote.layers_output[1].register_hook(print)
    with pytest.raises(RemoteError, match="everybody's, and are not changed"):
        remote.hf_model.lm_head.weight.mul_(0)
        remote.hf_model.lm_head.weight.sum().item()
    with pytest.raises(NotRemoteError, match="x.local"):
        with remote.trace(PROMPT):
            remote.layers_output[1].unsqueeze_(0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_models_that_are_not_served() -> None:
    """Who would serve one is told what to do instead; nothing of it is served under another name."""

    class OfItsOwn(LlamaForCausalLM):
        pass

    adapters = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    for model, text in (
        (
            encoder_decoder("T5ForConditionalGeneration"),
            r"is an encoder-decoder: it cannot be served\. Run it where it is loaded",
        ),
        (
            peft.get_peft_model(build("llama"), adapters),
            r"wraps the model: it cannot be served\. Merge it \(merge_and_unload\)",
        ),
        (OfItsOwn(build("llama").config), r"OfItsOwn is no class of Transformers, .* Run it where it is loaded"),
    ):
        with pytest.raises(InputError, match=text):
            Server({"x": StandardizedTransformer(model.eval(), validate=False)})


def test_two_clients_at_once_see_their_own(server: Process, remote: Any) -> None:
    other: Any = StandardizedTransformer("demo:llama", server=server.address)
    with torch.no_grad(), remote.trace(PROMPT):
        mine = remote.layers_output[2]
        with other.trace("Japan is in"):
            other.layers_output[1][:] = 0
            its = other.logits
        logits = remote.logits
    local = StandardizedTransformer("demo:llama")
    with torch.no_grad(), local.trace(PROMPT):
        wanted, end = local.layers_output[2], local.logits
    assert torch.equal(mine.local(), wanted)
    assert torch.equal(logits.local(), end)
    assert its.shape[1] == 3
    other.close()


def test_what_is_dead_is_dropped(remote: Any) -> None:
    for _ in range(3):
        with torch.no_grad(), remote.trace(PROMPT):
            remote.layers_output[2].norm()
    for _ in range(3):  # what a pass returns, and its cache
        with torch.no_grad(), remote.trace(PROMPT) as tracer:
            result = tracer.result
        assert remote._connection.ask("sync")[0]["objects"] == 2
        del result, tracer
    remote.generate_text(PROMPT, max_new_tokens=3, do_sample=False)
    held = remote._connection.ask("sync")[0]
    assert held["tensors"] < 10
    assert held["objects"] == 0
