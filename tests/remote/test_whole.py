"""Methods that run whole at a server: one round trip, the same errors and warnings, results that can be fetched again."""

from __future__ import annotations

import inspect
import os
import re
import secrets
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_server import Process, served

from nnatomy import StandardizedTransformer
from nnatomy.cli import main
from nnatomy.errors import ConnectionLostError, InputError, LayerIndexError, NotRemoteError, RemoteError
from nnatomy.methods import (
    TargetPrompt,
    activation_patching,
    attribution_patching,
    causal_tracing,
    collect_activations,
    compute_next_token_probs,
    direct_logit_attribution,
    edge_attribution,
    head_ablation,
    head_scores,
    integrated_gradients,
    kl_divergence,
    lens_statistics,
    log_probability,
    logit_difference,
    logit_lens,
    patchscope_generate,
    patchscope_lens,
    path_patching,
    probability,
)
from nnatomy.remote import methods as client
from nnatomy.remote.catalog import WHOLE, WITHOUT_GRADIENTS, method_of
from nnatomy.remote.connection import Connection
from nnatomy.remote.methods import Server

A, B = "The capital of France is", "The capital of Japan is"
LONG = {"clean": A, "corrupted": B, "steps": 100_000}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A file of two keys, and the keys."""
    file, found = tmp_path_factory.mktemp("keys") / "keys", []
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            written: list[str] = []
            patch.setattr("sys.stdout.write", written.append)
            main(["serve", "demo:gpt2", "--new-key", str(file)])
        found.append("".join(written).strip())
    return file, found


@pytest.fixture(scope="module")
def server(keys: tuple[Path, list[str]]) -> Iterator[Process]:
    with served("demo:gpt2", "--key-file", str(keys[0]), "--max-kept-seconds", "4") as process:
        yield process


@pytest.fixture(scope="module")
def local() -> Any:
    torch.set_num_threads(1)
    return StandardizedTransformer("demo:gpt2")


@pytest.fixture
def remote(server: Process, keys: tuple[Path, list[str]]) -> Iterator[Any]:
    model: Any = StandardizedTransformer("demo:gpt2", server=server.address, api_key=keys[1][0])
    yield model
    model.close()


def trips(model: Any, call: Callable[[], Any]) -> int:
    before = model._connection.trips
    call()
    return int(model._connection.trips - before)


def running(model: Any) -> int:
    return int(model.server.status()["runs"]["running"])


def wait_until(there: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_each_is_one_round_trip(remote: Any) -> None:
    pair = {"clean": A, "corrupted": B, "metric": logit_difference(" Paris", " Tokyo", remote)}
    metric = pair["metric"]
    calls: dict[str, Callable[[], Any]] = {
        "logit_lens": lambda: logit_lens(remote, [A, B]),
        "activation_patching": lambda: activation_patching(remote, **pair),
        "attribution_patching": lambda: attribution_patching(remote, **pair),
        "integrated_gradients": lambda: integrated_gradients(remote, A, B, metric=metric, steps=2),
        "edge_attribution": lambda: edge_attribution(remote, A, B, metric=metric),
        "head_scores": lambda: head_scores(remote),
        "head_ablation": lambda: head_ablation(remote, A, metric=metric),
        "path_patching": lambda: path_patching(remote, sender="mlps_contribution[1]", receivers="logits", **pair),
        "causal_tracing": lambda: causal_tracing(remote, A, subject="France", samples=2),
        "direct_logit_attribution": lambda: direct_logit_attribution(remote, A, answer=" Paris"),
    }
    assert {name: trips(remote, call) for name, call in calls.items()} == dict.fromkeys(calls, 1)


@pytest.mark.parametrize("name", ["logit_difference", "probability", "log_probability", "kl_divergence", "per row"])
def test_metrics_of_ours_are_sent(local: Any, remote: Any, name: str) -> None:
    def metric(model: Any) -> Any:
        if name == "kl_divergence":
            return kl_divergence(torch.linspace(-1, 1, local.vocab_size))
        if name == "per row":
            return logit_difference([5, 6], torch.tensor([7, 8]))
        return {
            "logit_difference": lambda: logit_difference(" Paris", " Tokyo", model),
            "probability": lambda: probability(" Paris", model),
            "log_probability": lambda: log_probability(31, model),
        }[name]()

    pairs: Any = {"clean": [A, "Japan is in"], "corrupted": [B, "China is in"]}
    wanted = activation_patching(local, **pairs, metric=metric(local))
    before = remote._connection.trips
    found = activation_patching(remote, **pairs, metric=metric(remote))
    assert remote._connection.trips == before + 1
    assert type(found) is type(wanted)
    assert torch.equal(found.effect.nan_to_num(7), wanted.effect.nan_to_num(7))
    assert (found.tokens, found.layers, found.shortcut) == (wanted.tokens, wanted.layers, wanted.shortcut)
    assert type(found.effect) is torch.Tensor
    assert found.effect.stride() == wanted.effect.stride()


def test_by_its_name_and_json(local: Any, remote: Any) -> None:
    wanted = activation_patching(local, clean=A, corrupted=B, metric=logit_difference(" Paris", " Tokyo", local))
    arguments: Any = {"clean": A, "corrupted": B, "metric": {"logit_difference": [" Paris", " Tokyo"]}}
    assert torch.equal(remote.server.run("activation_patching", **arguments).effect, wanted.effect)
    other = Server(remote.server.address, remote._connection.key)  # no model here
    assert torch.equal(other.run("activation_patching", **arguments).effect, wanted.effect)
    assert other.status()["models"][0]["name"] == remote.server_status()["models"][0]["name"] == "demo:gpt2"


def test_those_that_run_without_gradients_are_so_by_their_own_code() -> None:
    ends = {name: inspect.getsource(method_of(name)).partition("\ndef ")[0] for name in WHOLE}
    assert {name for name, decorators in ends.items() if "@torch.no_grad()" in decorators} == WITHOUT_GRADIENTS


def test_a_tensor_that_needs_a_gradient_goes_to_those(local: Any, remote: Any) -> None:
    """Its method gives none, here or there."""
    latents = torch.randn(6, 2, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = TargetPrompt(B, -1)
    wanted = patchscope_lens(local, None, target, latents=latents)
    with remote.trace(A):
        size = remote.layers_output[0].std() * 0 + 1
    before = remote._connection.trips
    for given in (latents, latents * size):
        found = patchscope_lens(remote, None, target, latents=given)
        assert type(found) is torch.Tensor
        assert torch.equal(found, wanted)
        assert not found.requires_grad
    assert remote._connection.trips <= before + 3  # one more, for the elements of what is there


def test_beams_run_whole(local: Any, remote: Any) -> None:
    """A cache that is reordered here could not be sent."""
    target, options = TargetPrompt(B, -1), {"num_beams": 3, "do_sample": False}
    before = remote._connection.trips
    found = patchscope_generate(remote, [A], target, max_length=3, **options)
    assert remote._connection.trips == before + 1
    wanted = patchscope_generate(local, [A], target, max_length=3, **options)
    assert {layer: each.tolist() for layer, each in found.items()} == {
        layer: each.tolist() for layer, each in wanted.items()
    }


def test_what_cannot_be_sent_runs_from_here(local: Any, remote: Any) -> None:
    """And gives the same."""
    wanted = logit_lens(local, A)

    def check(model: Any = remote, **options: Any) -> None:
        before = remote._connection.trips
        assert torch.equal(logit_lens(model, A, **options), wanted)
        assert remote._connection.trips > before + 1

    check(lens=lambda hidden: hidden)
    remote.whole_methods = False
    check()
    remote.whole_methods = True
    remote.tokenizer.padding_side = "right"
    check()
    remote.tokenizer.padding_side = "left"
    handle = remote.hf_model.transformer.h[1].register_forward_hook(lambda *_: None)
    check()
    handle.remove()
    assert trips(remote, lambda: logit_lens(remote, A)) == 1

    def edit() -> None:
        remote.layers_output[1] = remote.layers_output[1] * 2

    assert not torch.equal(logit_lens(remote.edit(edit), A), wanted)
    mine = lambda logits: logits[:, 3]  # noqa: E731
    options: Any = {"clean": A, "corrupted": B, "metric": mine, "layers": [1]}
    assert torch.equal(activation_patching(remote, **options).effect, activation_patching(local, **options).effect)
    with pytest.raises(NotRemoteError, match="cannot be given a function"):
        remote.server.run("activation_patching", **options)


def sees_the_same_error(local: Any, remote: Any, call: Callable[[Any], Any]) -> None:
    with pytest.raises((InputError, LayerIndexError)) as wanted:
        call(local)
    before = remote._connection.trips
    with pytest.raises((InputError, LayerIndexError)) as found:
        call(remote)
    assert remote._connection.trips == before + 1
    assert type(found.value) is type(wanted.value)
    assert str(found.value) == str(wanted.value)
    assert found.value.args == wanted.value.args
    lines = [frame.line for frame in traceback.extract_tb(found.value.__traceback__) if frame.filename == __file__]
    assert any("# this line" in str(line) for line in lines)


def test_errors_are_those_of_the_method(local: Any, remote: Any) -> None:
    metric = logit_difference(3, 4)
    for options in (
        {"clean": A, "corrupted": "Japan is", "metric": metric},
        {"clean": A, "corrupted": A, "metric": metric},
        {"clean": A, "corrupted": B, "metric": metric, "point": "layer_outputs"},
        {"clean": A, "corrupted": B, "metric": metric, "layers": [99]},
        {"clean": A, "corrupted": B, "metric": metric, "mode": "both"},
        {"clean": A, "corrupted": B, "metric": logit_difference([3, 4, 5], 6)},
    ):
        sees_the_same_error(local, remote, lambda model, o=options: activation_patching(model, **o))  # this line
    sees_the_same_error(local, remote, lambda model: logit_lens(model, A, positions=77))  # this line
    sees_the_same_error(local, remote, lambda model: logit_lens(model, torch.ones(2, 2, 2, 2)))  # this line
    with pytest.raises(InputError, match="has no argument 'steps' that a server takes"):
        remote.server.run("logit_lens", prompts=A, steps=3)


def test_warnings_are_those_of_the_method_and_come_once(local: Any, remote: Any) -> None:
    def told(model: Any) -> list[list[Any]]:
        metric, found = logit_difference("Paris", " Rome", model), []
        for _ in range(2):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                activation_patching(model, clean=A, corrupted=B, metric=metric, layers=[2])
            found.append([(one.category, str(one.message), one.filename) for one in seen])
        return found

    wanted = told(local)
    assert [len(one) for one in wanted] == [1, 0]
    assert told(remote) == wanted


def test_progress_is_shown_here(remote: Any, capsys: pytest.CaptureFixture[str]) -> None:
    integrated_gradients(remote, A, B, metric=logit_difference(3, 4), steps=40, progress=True)
    told = capsys.readouterr().err
    assert re.search("layers.*6/6", told)
    integrated_gradients(remote, A, B, metric=logit_difference(3, 4), steps=2)
    assert not capsys.readouterr().err


def test_ctrl_c_here_ends_it_there(remote: Any) -> None:
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        integrated_gradients(remote, A, B, metric=logit_difference(3, 4), steps=100_000)
    assert time.monotonic() - began < 10
    wait_until(lambda: running(remote) == 0)
    with remote.trace(A):  # this session goes on
        assert remote.logits.shape[:2] == (1, 5)


def test_others_go_on_while_it_runs(server: Process, remote: Any, keys: tuple[Path, list[str]]) -> None:
    run = remote.server.submit("integrated_gradients", metric={"probability": [3]}, **LONG)
    other: Any = StandardizedTransformer("demo:gpt2", server=server.address, api_key=keys[1][1])
    began = time.monotonic()
    with torch.no_grad(), other.trace(A):
        logits = other.logits
    assert logits.shape[0] == 1
    assert logit_lens(other, A).shape[0] == 1  # by turns
    assert time.monotonic() - began < 10
    assert [run.status()[key] for key in ("method", "ended")] == ["integrated_gradients", False]
    assert run.status()["progress"][0] == "layers"
    run.cancel()
    wait_until(lambda: running(other) == 0)
    with pytest.raises(RemoteError, match="there is no run of that name"):
        run.status()
    other.close()


def test_a_connection_that_breaks_while_it_runs(local: Any, remote: Any, server: Process, keys: Any) -> None:
    metric = logit_difference(3, 4)
    threading.Timer(0.3, remote._connection._socket.socket.shutdown, (2,)).start()
    with pytest.raises(ConnectionLostError, match=r"the run goes on.*fetch\('([0-9a-f]{32})'\)") as caught:
        integrated_gradients(remote, A, B, metric=metric, steps=60)
    name = str(caught.value).partition("fetch('")[2][:32]
    for wrong, key in ((name, keys[1][1]), (secrets.token_hex(16), keys[1][0])):
        with pytest.raises(RemoteError, match="there is no run of that name"):
            Server(server.address, key).fetch(wrong).result()
    found = Server(server.address, keys[1][0]).fetch(name).result()
    assert torch.equal(found.effect, integrated_gradients(local, A, B, metric=metric, steps=60).effect)


def test_a_connection_that_breaks_while_a_result_is_fetched(
    local: Any, remote: Any, server: Process, keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_AT_ONCE", 5_000)
    run, fetched = remote.server.submit("logit_lens", prompts=[A, B]), []
    ask = Connection.ask

    def breaking(self: Any, *question: Any, **options: Any) -> Any:
        if len(fetched) == 3:
            self._socket.socket.shutdown(2)
        answer = ask(self, *question, **options)
        if question[0] == "wait":
            fetched.append(question[2])
        return answer

    monkeypatch.setattr(Connection, "ask", breaking)
    with pytest.raises(ConnectionLostError, match="its result is kept"):
        run.result()
    assert fetched == [0, 5_000, 10_000]
    fetched.append(-1)
    with pytest.raises(RemoteError, match="there is no run of that name"):
        Server(server.address, keys[1][1]).fetch(run.name).result()
    assert torch.equal(run.result(), logit_lens(local, [A, B]))
    assert fetched[4] == 15_000  # where it was


def test_results_are_kept_for_a_time(remote: Any) -> None:
    run = remote.server.submit("logit_lens", prompts=A)
    kept = run.result(forget=False)
    assert torch.equal(remote.server.fetch(run.name).result(forget=False), kept)
    assert 0 < run.status()["kept"] <= 4
    wait_until(lambda: remote.server.status()["runs"]["kept"] == 0)
    with pytest.raises(RemoteError, match="results are kept for 4 seconds"):
        remote.server.fetch(run.name).result()


def test_what_is_not_run_there(remote: Any, tmp_path: Path) -> None:
    for name in ("collect_activations", "ablate_direction", "run_prompts", "__import__", "torch.load", ""):
        with pytest.raises(NotRemoteError, match="is not run at a server"):
            remote.server.run(name)
    with pytest.raises(NotRemoteError, match="is drawn|are drawn by its client"):
        remote.server.run("patchscope_generate", prompts=A, target_patch_prompt=_target(), max_length=2, do_sample=True)
    assert collect_activations(remote, [A], points=["layers_output"]) is not None  # from here


def _target() -> Any:
    from nnatomy.methods import TargetPrompt

    return TargetPrompt("The capital of Spain", -1)


def test_sampling_draws_here(local: Any, remote: Any) -> None:
    from nnatomy.methods import patchscope_generate

    def generated(model: Any) -> Any:
        torch.manual_seed(3)
        return patchscope_generate(model, A, _target(), max_length=4, layers=[2], do_sample=True)[2]

    assert torch.equal(generated(remote), generated(local))


def test_dicts_of_tokens(local: Any, remote: Any) -> None:
    given = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    assert trips(remote, lambda: compute_next_token_probs(remote, given)) == 1
    assert torch.equal(compute_next_token_probs(remote, given), compute_next_token_probs(local, given))
    found, wanted = (lens_statistics(model, A, targets=" Paris") for model in (remote, local))
    assert found.texts == wanted.texts
    assert torch.equal(found.kl, wanted.kl)
