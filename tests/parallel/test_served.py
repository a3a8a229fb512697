"""A server whose model is split over two ranks gives what the model in one process gives; and ends when a rank does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, prompt_ids
from remote_server import Process, served

from nnatomy import StandardizedTransformer
from nnatomy.errors import RemoteError
from nnatomy.methods import direct_logit_attribution

IDS = prompt_ids()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    build("llama", intermediate_size=47).double().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Process]:
    with served(str(folder), "--tp", "2", "--dtype", "float64") as process:
        yield process
        left = children(process)
    assert len(left) == 1
    assert not any(map(runs, left))


@pytest.fixture(scope="module")
def models(folder: Path, server: Process) -> tuple[Any, Any]:
    one = StandardizedTransformer(folder, dtype=torch.float64)
    return one, StandardizedTransformer(str(folder), server=server.address)


def children(process: Process) -> list[int]:
    pid = process._process.pid
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def near(results: list[list[Any]]) -> None:
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second.detach(), first.detach(), rtol=1e-10, atol=1e-10)


def test_reads_and_writes(models: tuple[Any, Any]) -> None:
    results = []
    for model in models:
        with torch.no_grad(), model.trace(IDS, use_cache=False):
            keys, pattern = model.keys[1], model.attention_probabilities[1]
            model.heads_output[1] = heads = model.heads_output[1].flip(2)
            model.neurons[1] = neurons = model.neurons[1] * 0.5
            results.append([keys, pattern, heads, neurons, model.layers_output[1], model.logits])
    near(results)
    hidden = results[0][4]
    near([[model.project_on_vocab(hidden)] for model in models])


def test_gradients(models: tuple[Any, Any]) -> None:
    results = []
    for model in models:
        scale = torch.linspace(0.5, 1.5, 8, dtype=torch.float64, requires_grad=True)
        with model.trace(IDS, use_cache=False):
            values = model.values[1]
            values.retain_grad()
            model.heads_output[1] = model.heads_output[1] * scale
            loss = model.logits.sin().sum()
            loss.backward()
        results.append([values.grad, scale.grad])
    near(results)


def test_generations(models: tuple[Any, Any]) -> None:
    results: list[list[Any]] = []
    for model in models:
        torch.manual_seed(3)
        seen = []
        with torch.no_grad(), model.generate(IDS, max_new_tokens=4, do_sample=True, pad_token_id=0) as tracer:
            for _ in tracer.iter[:]:
                seen.append(model.keys[1].clone())
                model.neurons[1] = model.neurons[1] * 1.5
            tokens = tracer.result
        results.append([tokens, *seen])
    near(results)


def test_methods(models: tuple[Any, Any]) -> None:
    near([[direct_logit_attribution(model, IDS.tolist(), answer=3, by="head").effect] for model in models])


def test_a_sessions_error_is_told_and_the_next_is_right(models: tuple[Any, Any]) -> None:
    one, far = models
    with pytest.raises(Exception, match="index 99 is out of bounds"), torch.no_grad(), far.trace(IDS):
        far.layers_output[0][0, 0, torch.tensor([99])].sum().item()
    test_reads_and_writes((one, far))


def test_the_server_ends_with_a_rank(folder: Path) -> None:
    with served(str(folder), "--tp", "2", "--dtype", "float64") as process:
        far = StandardizedTransformer(str(folder), server=process.address)
        (other,) = children(process)
        os.kill(other, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RemoteError), torch.no_grad():
            for _ in range(100):
                with far.trace(IDS):
                    far.logits.sum().item()
        assert time.monotonic() - began < 30
        assert process._process.wait(30) != 0


def test_no_rank_is_left_without_the_first(folder: Path) -> None:
    with served(str(folder), "--tp", "2", "--dtype", "float64") as process:
        (other,) = children(process)
        process.stop(signal.SIGKILL)
        for _ in range(100):
            if not runs(other):
                break
            time.sleep(0.2)
        assert not runs(other)
