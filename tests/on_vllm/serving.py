"""`make vllm`: an engine at a server in another process. What a block gets there is what it gets of the engine in this process, bit
for bit, and what Transformers says."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import ProxyHandler, build_opener

import pytest
import torch
from remote_server import Process, served
from torch import Tensor
from vllm_models import assert_near, folder, hooked, in_transformers, on_engine, plainly, prompts, written

from nnatomy import StandardizedTransformer
from nnatomy.errors import (
    AssignmentError,
    ConnectionLostError,
    InputError,
    LayerIndexError,
    LoadError,
    NoSuchModuleError,
    NotInThisModelError,
    NotRemoteError,
    OutOfOrderError,
    OutsideTraceError,
    RemoteError,
    UsageError,
)
from nnatomy.methods import logit_lens
from nnatomy.names import OF_LAYERS
from nnatomy.remote.tensor import RemoteTensor

#: More prompts than fit into a step, of which some are longer than a step's tokens.
SMALL: dict[str, Any] = {"max_num_batched_tokens": 32, "max_num_seqs": 4}
SETTINGS = {"kv_cache_memory_bytes": 1 << 26, "max_model_len": 64, **SMALL}
ARGUMENTS = [f"--engine-arg={name}={one}" for name, one in SETTINGS.items()]
IDS = prompts(5, 9, 5)


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with served(folder("llama"), "--engine", "vllm", "--dtype", "float32", *ARGUMENTS) as process:
        yield process


@pytest.fixture(scope="module")
def there(server: Process) -> Iterator[Any]:
    model = StandardizedTransformer(folder("llama"), server=server.address)
    yield model
    model.close()


def here() -> Any:
    """The engine in this process."""
    return on_engine("llama", **SMALL)


def same(one: Any, other: Any) -> None:
    """That two values are the same, bit for bit; the first of a server."""
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(local(one), other)
    else:
        assert one == other


def local(value: Tensor) -> Tensor:
    """The elements of what may be at the server."""
    return value.local() if isinstance(value, RemoteTensor) else value


def both(there: Any, block: Callable[[Any], Any]) -> Any:
    """What a block finds, which is the same at the server as here."""
    found, wanted = block(there), block(here())
    same(found, wanted)
    return wanted


# Reading.


def test_every_name_is_the_same(there: Any) -> None:
    assert [vars(row) for row in there.validation] == [vars(row) for row in here().validation]
    assert (there.num_layers, there.num_heads, there.vocab_size, there.hidden_size) == (3, 2, 97, 64)
    names = [name for name in OF_LAYERS if here().__dict__[name].layers]
    assert len(names) > 15
    for name in OF_LAYERS:
        assert getattr(there, name).layers == getattr(here(), name).layers

    def block(model: Any) -> Any:
        found = []
        for name in names:
            with model.trace(IDS):
                found.append(getattr(model, name)[:])
        return found

    both(there, block)


def test_names_of_a_step(there: Any) -> None:
    def block(model: Any) -> Any:
        with model.trace(IDS) as tracer:
            ids, mask, size, requests = model.input_ids, model.attention_mask, model.input_size, model.requests
            embeddings = model.token_embeddings
            logits, probs = model.logits, model.next_token_probs
            sampled = model.sampled_tokens
            (*tokens,) = [one.outputs[0].token_ids for one in tracer.result]
        return [ids, mask, tuple(size), requests, embeddings, logits, probs, sampled, [[*one] for one in tokens]]

    found = both(there, block)
    assert found[3] == (0, 1, 2)


def test_streams_are_those_of_transformers(there: Any) -> None:
    hf = in_transformers("llama")
    with there.trace(IDS):
        mask, streams, logits = there.attention_mask.bool(), there.layers_input[:], there.logits
    for row, ids in enumerate(IDS):
        with torch.no_grad():
            theirs = hf(torch.tensor([ids]), output_hidden_states=True)
        for i, one in enumerate(streams):
            assert_near(local(one[row][mask[row]]), theirs.hidden_states[i][0])
        assert_near(local(logits[row][mask[row]]), theirs.logits[0])


def test_a_value_is_there_in_the_block_and_behind_it(there: Any) -> None:
    with there.trace(IDS):
        stream = there.layers_output[0]
        norm = float(stream[1, -1].norm())
        if norm > 0:
            doubled = 2 * stream
    with here().trace(IDS):
        wanted = here().layers_output[0]
    assert norm == float(wanted[1, -1].norm())
    same(doubled, 2 * wanted)


def test_one_round_trip_for_a_value(there: Any) -> None:
    connection = there.engine.connection
    before = connection.trips
    with there.trace(IDS):
        stream = there.layers_output[1]
    assert connection.trips - before == 3, "the trace is opened, goes to the point, and what is held comes at its end"
    assert isinstance(stream, RemoteTensor)


def test_modules_by_the_engines_own_names(there: Any) -> None:
    def block(model: Any) -> Any:
        with model.trace(IDS):
            args, kwargs = model.model.layers[1].inputs
            given = sorted(kwargs), [tuple(one.shape) for one in args if one is not None]
            hidden, residual = model.model.layers[1].output
            total = hidden + residual
            model.model.layers[1].output = (2 * total, 0 * residual)
            after = model.layers_input[2]
        return [given, total, after]

    both(there, block)
    assert repr(there.layers[1]) == repr(there.model.layers[1])


# Writing.


def test_edits(there: Any) -> None:
    new = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(0))

    def assigned(model: Any) -> Any:
        with model.trace(IDS) as tracer:
            model.layers_output[0] = 2 * model.layers_output[0]
            model.attentions_output[1] = model.attentions_output[1] / 2
            model.layers_output[1] = new
            read = model.layers_input[2]
            logits = model.logits
            tokens = [[*one.outputs[0].token_ids] for one in tracer.result]
        return [read, logits, tokens]

    def in_place(model: Any) -> Any:
        with model.trace(IDS):
            stream = model.layers_output[0]
            stream *= 2
            assert model.layers_output[0] is stream
            model.heads_output[1][:, :, 1] = 0
            model.neurons[2][:, -1] += 1
            logits = model.logits
            logits[:, -1] = 0
            logits[torch.arange(3), -1, torch.tensor([7, 8, 9])] = 10
            sampled = model.sampled_tokens
        return [stream, logits, sampled]

    def pattern(model: Any) -> Any:
        with model.trace(IDS):
            model.queries[0] = 2 * model.queries[0]
            model.keys[0] = -model.keys[0]
            found = model.attention_probabilities[1]
            model.attention_probabilities[1] = torch.eye(9).expand_as(found).contiguous()
            return [model.heads_output[1], model.logits]

    both(there, assigned)
    *_, sampled = both(there, in_place)
    assert sampled.tolist() == [7, 8, 9]
    both(there, pattern)
    with there.trace(IDS):
        plain = there.logits
    with here().trace(IDS):
        same(plain, here().logits)


def test_an_edit_is_what_hooks_do_in_transformers(there: Any) -> None:
    hf = in_transformers("llama")
    with (
        hooked(hf.model.layers[0], lambda args, kwargs, output: 2 * output),
        hooked(hf.model.layers[1].self_attn, lambda args, kwargs, output: (output[0] / 2, *output[1:])),
        torch.no_grad(),
    ):
        theirs = hf(torch.tensor([IDS[1]])).logits
    with there.trace([IDS[1]]):
        there.layers_output[0] *= 2
        there.attentions_output[1] = there.attentions_output[1] / 2
        assert_near(there.logits.local(), theirs)


def test_what_was_added_and_the_sum_are_one_point(there: Any) -> None:
    def block(model: Any) -> Any:
        with model.trace(IDS):
            model.layers_output[1] *= 2
            added = model.mlps_contribution[1]
            model.layers_output[1] *= 2
            return [added, model.mlps_contribution[1], model.layers_input[2]]

    both(there, block)


def test_project_on_vocab(there: Any) -> None:
    def block(model: Any) -> Any:
        with model.trace(IDS):
            stream = model.layers_output[-1]
            inside = model.project_on_vocab(stream)
        return [inside, model.project_on_vocab(stream)]

    both(there, block)
    with pytest.raises(InputError, match=r"project_on_vocab takes hidden states of \(..., 64\); got \(1, 63\)"):
        there.project_on_vocab(torch.zeros(1, 63))


# Generating.


def test_steps_are_the_same(there: Any) -> None:
    """More prompts than a step takes, longer than a step's tokens, ending at different times."""
    ids = prompts(3, 20, 5, 9, 1, 40, 7)
    params = [{"temperature": 0, "max_tokens": 2 + i, "ignore_eos": True} for i in range(len(ids))]

    def block(model: Any) -> Any:
        found = []
        with model.generate(ids, sampling_params=params) as tracer:
            for step in tracer.iter[:]:
                given = [step, model.requests, tuple(model.input_size), model.input_ids, model.attention_mask]
                found.append([*given, model.keys[1], model.layers_input[2], model.logits])
            tokens = [[*one.outputs[0].token_ids] for one in tracer.result]
        return [found, tokens]

    _, tokens = both(there, block)
    assert tokens == [written(prompt, 2 + i) for i, prompt in enumerate(ids)]


def test_some_steps(there: Any) -> None:
    def block(model: Any) -> Any:
        with model.generate(IDS, max_new_tokens=6, ignore_eos=True) as tracer:
            found = [(step, model.layers_output[1], model.sampled_tokens) for step in tracer.iter[2:4]]
            for _ in tracer.iter[5]:
                last = model.layers_output[0]
            return [found, last, [[*one.outputs[0].token_ids] for one in tracer.result]]

    both(there, block)


def test_a_token_can_be_put_in_the_place_of_the_sampled_one(there: Any) -> None:
    def block(model: Any) -> Any:
        with model.generate(prompts(5, 6), max_new_tokens=3, ignore_eos=True) as tracer:
            for step in tracer.iter[:]:
                if step == 1:
                    model.sampled_tokens = torch.tensor([50, 60])
            return [[*one.outputs[0].token_ids] for one in tracer.result]

    assert [row[1] for row in both(there, block)] == [50, 60]


def test_steering(there: Any) -> None:
    ids, direction = prompts(4, 9, 4, 30, 5), 3 * torch.randn(64, generator=torch.Generator().manual_seed(2))

    def steered(model: Any) -> Any:
        def steer() -> None:
            model.layers_output[1] += direction

        done = model.edit(steer).generate(ids, max_new_tokens=5, ignore_eos=True).run()
        return [[*one.outputs[0].token_ids] for one in done]

    def by_method(model: Any) -> Any:
        edited = model.edit(lambda: model.steer([0, 2], direction, 2.0, requests=[0, 2]))
        return [[*one.outputs[0].token_ids] for one in edited.generate(ids, max_new_tokens=4, ignore_eos=True).run()]

    mine = both(there, steered)
    with hooked(in_transformers("llama").model.layers[1], lambda args, kwargs, output: output + direction):
        assert mine == [written(one, 5) for one in ids] != plainly(here(), ids, 5, ignore_eos=True)
    both(there, by_method)
    assert [[*one.outputs[0].token_ids] for one in there.generate(ids, max_new_tokens=5, ignore_eos=True).run()] == [
        written(one, 5) for one in ids
    ]


def test_sampling_parameters_are_the_engines(there: Any) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 20, "seed": 7, "ignore_eos": True}
    mine = there.generate(IDS, max_new_tokens=6, **options).run()
    assert [one.outputs[0].token_ids for one in mine] == plainly(here(), IDS, 6, **options)
    (output,) = there.generate(IDS[0], max_new_tokens=3, logprobs=2, ignore_eos=True).run()
    (wanted,) = here().generate(IDS[0], max_new_tokens=3, logprobs=2, ignore_eos=True).run()
    assert output.prompt_token_ids == IDS[0]
    assert output.finished
    for ours, theirs in zip(output.outputs[0].logprobs, wanted.outputs[0].logprobs, strict=True):
        assert {token: (one.logprob, one.rank) for token, one in ours.items()} == {
            token: (one.logprob, one.rank) for token, one in theirs.items()
        }
    assert output.outputs[0].finish_reason == "length"


# What goes wrong.


def test_what_is_wrong_is_said_at_the_line(there: Any) -> None:
    with pytest.raises(OutsideTraceError, match="layers_output: values exist only while the model runs"):
        there.layers_output[0]
    with there.trace(IDS):
        with pytest.raises(LayerIndexError, match=r"layers_output\[3\]: the model has 3 layers, 0 to 2"):
            there.layers_output[3]
        with pytest.raises(NotInThisModelError, match=r"routers_logits\[0\]: it has no experts to choose from"):
            there.routers_logits[0]
        with pytest.raises(AssignmentError, match=r"layers_output\[1\] is .*of shape \(3, 9, 64\)"):
            there.layers_output[1] = torch.zeros(3, 9, 63)
        with pytest.raises(OutOfOrderError, match=r"layers_output\[0\] was asked for at .*serving.py:\d+"):
            there.layers_output[0]
        with pytest.raises(UsageError, match="The engine is at work on other requests: it runs one trace at a time"):
            there.trace(IDS)
    with pytest.raises(AssignmentError, match="layers_output is one for each layer"):
        there.layers_output = torch.zeros(1)
    with pytest.raises(
        InputError, match="Prompt 1 has 64 tokens, and the engine takes fewer than its max_model_len, 64"
    ):
        there.trace(prompts(5, 64))
    with pytest.raises(InputError, match=r"one step of the engine takes 32: .*max_num_batched_tokens=40"):
        there.trace(prompts(20, 20))
    with pytest.raises(UsageError, match="scan: the engine's kernels compute"):
        there.scan(IDS)
    with pytest.raises(UsageError, match="no block for each: give them as a list"), there.trace(IDS) as tracer:
        tracer.invoke("x")
    with there.generate(IDS, max_new_tokens=2, ignore_eos=True) as tracer:
        for _ in tracer.iter[1]:
            with pytest.raises(AssignmentError, match="those of the earlier positions are in the engine's cache"):
                there.keys[1] = there.keys[1]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: it is a whole number, 1 or more"),
        ({"do_sample": True}, "do_sample=True: with the engine give temperature=1.0 samples"),
        ({"temprature": 1}, "none of vllm.SamplingParams. Did you mean temperature"),
        ({"temperature": -1.0}, "vLLM refuses these sampling parameters: temperature must be non-negative"),
        ({"n": 2}, "n=2: a row is one sequence of a prompt"),
        ({"sampling_params": 3}, "sampling_params=3: give a vllm.SamplingParams"),
        ({"sampling_params": [{}]}, "or a list of one for each of the 3 prompts"),
        ({"extra_args": {"a": 1}}, "extra_args of vllm.SamplingParams: a server takes allowed_token_ids, bad_words"),
    ],
)
def test_sampling_parameters_that_are_none(there: Any, given: dict[str, Any], text: str) -> None:
    with pytest.raises(RemoteError, match=rf"at the server, asked for at .*serving.py:\d+: .*{text}"):
        there.generate(IDS, **given)


def test_what_is_not_to_be_had_at_a_server(there: Any) -> None:
    with pytest.raises(
        NotRemoteError, match=r"A SamplingParams in sampling parameters of an engine at a server: give .*dict"
    ):
        there.generate(IDS, sampling_params=here().engine.vllm.SamplingParams())
    with pytest.raises(
        NotRemoteError, match=r"attach\('layers_output\[0\]', ...\): a module is called in the engine's own"
    ):
        there.attach("layers_output[0]", torch.nn.Identity())
    with pytest.raises(
        NoSuchModuleError, match=r"no submodule 'weight'.*Weights and settings of modules are at the server"
    ):
        there.model.norm.weight
    with pytest.raises(
        NoSuchModuleError, match=r"Weights by name are of a model on Transformers: load it without engine="
    ):
        there.W_U
    with pytest.raises(
        InputError, match=r"is a RemoteVllmTransformer: .*of a model on Transformers: load it without engine="
    ):
        logit_lens(there, "a")
    with pytest.raises(NotRemoteError, match="A RMSNorm of an engine at a server is not called from here"):
        there.model.norm(torch.zeros(1, 64))
    with pytest.raises(InputError, match="A remote model has been loaded and checked by its server"):
        StandardizedTransformer(folder("llama"), server=there.engine.connection.server, dtype="float32")
    with there.trace(IDS):
        with pytest.raises(
            NotRemoteError, match=r"model.layers.0.skip\(...\): the server of an engine runs all modules"
        ):
            there.model.layers[0].skip(None)
        stream = there.layers_output[0]
        with pytest.raises(RuntimeError, match="does not require grad"):
            stream.sum().backward()
    with (
        pytest.raises(NotRemoteError, match="'source add.*: of an engine at a server there are inputs"),
        there.trace(IDS),
    ):
        there.model.layers[1].source.add.output
    with pytest.raises(RemoteError, match="no methods are run here"):
        there.server.run("logit_lens", prompts="x")


def test_a_value_that_the_engine_cannot_go_on_with(there: Any) -> None:
    """A module's whole value of another shape is no value of the engine's, whose kernels look at nothing."""
    with (
        pytest.raises(
            AssignmentError, match=r"layers.0.output: it has tensors of the shapes \[\(19, 64\).*ones of \[\(2, 64"
        ),
        there.trace(IDS),
    ):
        there.model.layers[0].output = torch.zeros(2, 64), torch.zeros(2, 64)
        there.logits
    with there.trace(IDS):
        there.logits


def test_a_local_model_is_no_copy_of_it(server: Process) -> None:
    model = StandardizedTransformer(folder("llama"))
    model.server = server.address
    with pytest.raises(NotRemoteError, match=r"remote=True: http://.* runs .* on an engine, vLLM .*Take the one"):
        model.trace(IDS, remote=True)


# Several clients.


def test_a_block_that_fails_leaves_the_engine_free(there: Any) -> None:
    for _ in range(3):
        with there.generate(IDS, max_new_tokens=8, ignore_eos=True) as tracer:
            for _ in tracer.iter[1]:
                there.layers_output[1]
    with pytest.raises(ZeroDivisionError), there.generate(IDS, max_new_tokens=8, ignore_eos=True) as tracer:
        for _ in tracer.iter[:]:
            there.logits
            1 / 0
    assert not there.engine.is_busy
    assert [one.outputs[0].token_ids for one in there.generate(IDS, max_new_tokens=3, ignore_eos=True).run()] == [
        written(one, 3) for one in IDS
    ]


def test_traces_of_several_clients_come_one_after_the_other(server: Process, there: Any) -> None:
    """Others can do all but open a trace while one is open; theirs begin in their order when it is over."""
    others = [StandardizedTransformer(folder("llama"), server=server.address) for _ in range(2)]
    order: list[int] = []
    found: dict[int, Any] = {}

    def trace(i: int) -> None:
        with others[i].trace(IDS):
            found[i] = others[i].layers_output[1]
            order.append(i)

    threads = [Thread(target=trace, args=(i,)) for i in range(2)]
    with there.trace(IDS):
        mine = there.layers_output[1]
        for thread in threads:
            thread.start()
            time.sleep(0.3)
        assert order == []
        assert others[0].server_status()["sessions"] == 3
        assert there.layers_output[1] is mine
    for thread in threads:
        thread.join(30)
    assert order == [0, 1]
    with here().trace(IDS):
        wanted = here().layers_output[1]
    for one in (mine, found[0], found[1]):
        same(one, wanted)
    for other in others:
        other.close()


CLIENT = """
import os, sys
from nnatomy import StandardizedTransformer
model = StandardizedTransformer(sys.argv[1], server=sys.argv[2])
with model.generate([[5, 6, 7]], max_new_tokens=30, ignore_eos=True) as tracer:
    for _ in tracer.iter[2]:
        model.layers_output[1]
        os._exit(7)
"""


def test_a_client_that_disappears_in_a_trace(server: Process, there: Any) -> None:
    command = [sys.executable, "-c", CLIENT, folder("llama"), server.address]
    assert subprocess.run(command, check=False, timeout=120).returncode == 7
    with there.trace(IDS):
        mine = there.layers_output[1]
    with here().trace(IDS):
        same(mine, here().layers_output[1])


def test_who_waits_for_longer_than_a_command_may_take_is_told(server: Process) -> None:
    del server
    limit = ["--max-command-seconds", "1"]
    with served(folder("llama"), "--engine", "vllm", "--dtype", "float32", *ARGUMENTS, *limit) as process:
        one, other = (StandardizedTransformer(folder("llama"), server=process.address) for _ in range(2))
        with one.trace(IDS):
            one.layers_output[0]
            with (
                pytest.raises(
                    RemoteError, match="Refused at the server.*the engine is at another client's trace, and runs one"
                ),
                other.trace(IDS),
            ):
                other.layers_output[0]
            one.layers_output[1]
        with other.trace(IDS):
            other.layers_output[0]
        process.stop()
        with pytest.raises(ConnectionLostError, match="The connection to http://.* is gone"), one.trace(IDS):
            one.layers_output[0]


# What it tells.


def test_status(server: Process, there: Any) -> None:
    opener = build_opener(ProxyHandler({}))

    def asked(path: str) -> str:
        with opener.open(f"{server.address}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    told = json.loads(asked("/v1/status?hash=now"))["models"][0]
    assert told["name"] == folder("llama")
    assert told["class"] == "LlamaForCausalLM"
    assert told["dtype"] == "float32"
    assert told["hash"] == told["hash_now"] == there.server_status()["models"][0]["hash"]
    assert len(told["hash"]) == 64
    assert told["engine"] == f"vLLM {here().engine.vllm.__version__}"
    assert "LlamaForCausalLM" in asked("/")
    assert 'nnatomy_frames_total{model="' in asked("/metrics")


def test_two_processes_behind_a_server() -> None:
    with served(folder("llama"), "--engine", "vllm", "--dtype", "float32", "--tp", "2", *ARGUMENTS) as process:
        model = StandardizedTransformer(folder("llama"), server=process.address)
        assert model.validation.counts == here().validation.counts
        names = [name for name in OF_LAYERS if getattr(here(), name).layers]
        for name in names:
            with model.trace(IDS):
                mine = getattr(model, name)[1]
            with here().trace(IDS):
                wanted = getattr(here(), name)[1]
            off = torch.where(wanted < -1e4, 0, wanted), torch.where(wanted < -1e4, 0, mine.local())
            assert_near(off[1], off[0])
        for one in (model, here()):
            with one.trace(IDS):
                one.heads_output[1][:, :, 1] = 0
                one.layers_output[1] = 2 * one.layers_output[1]
                logits = one.logits
            if one is model:
                mine = logits.local()
        assert_near(mine, logits)
        direction = 3 * torch.randn(64, generator=torch.Generator().manual_seed(2))

        def steer() -> None:
            model.layers_output[1] += direction

        ids = prompts(4, 9, 30, 4, 5, 6)
        done = model.edit(steer).generate(ids, max_new_tokens=5, ignore_eos=True).run()
        with hooked(in_transformers("llama").model.layers[1], lambda args, kwargs, output: output + direction):
            assert [one.outputs[0].token_ids for one in done] == [written(one, 5) for one in ids]
        with pytest.raises(RemoteError, match="temperature must be non-negative"):
            model.generate(IDS, temperature=-1.0)
        with pytest.raises(ZeroDivisionError), model.generate(IDS, max_new_tokens=8) as tracer:
            for _ in tracer.iter[1]:
                model.keys[1]
                1 / 0
        with model.trace(IDS):
            model.logits
        model.close()


# In a process of its own.


def test_an_engine_in_another_process() -> None:
    options = {"engine": "vllm", "distributed_executor_backend": "mp", "dtype": torch.float32, **SETTINGS}
    model = StandardizedTransformer(folder("llama"), **options)
    with model.trace(IDS):
        mine = model.layers_output[1]
    with here().trace(IDS):
        same(mine, here().layers_output[1])
    with pytest.raises(ConnectionLostError, match="it asks for another key"):
        StandardizedTransformer(folder("llama"), server=model.engine.connection.server)
    pid = model.process.pid
    assert pid != os.getpid()
    assert Path(f"/proc/{pid}").exists()
    edited = model.edit(lambda: None)
    del model
    gc.collect()
    with edited.trace(IDS):
        assert edited.layers_output[1].shape == (3, 9, 64)
    del edited
    gc.collect()
    assert not Path(f"/proc/{pid}").exists(), "it ends with the last view of the model"


STARTS = """
import os, sys
from nnatomy import StandardizedTransformer
model = StandardizedTransformer(sys.argv[1], engine="vllm", distributed_executor_backend="mp", **eval(sys.argv[2]))
print(model.process.pid, flush=True)
os._exit(7)
"""


def test_its_process_ends_with_a_script_that_is_killed() -> None:
    command = [
        sys.executable,
        "-c",
        STARTS,
        folder("llama"),
        repr({"dtype": "float32", "tensor_parallel_size": 2, **SETTINGS}),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=200, check=False)
    assert done.returncode == 7
    pid = int(done.stdout)
    for _ in range(300):
        if not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} goes on")


def test_another_process_that_cannot_be_had(tmp_path: Path) -> None:
    options: dict[str, Any] = {"engine": "vllm", "distributed_executor_backend": "mp"}
    with pytest.raises(InputError, match="The engine's process has ended: max_len=3: vLLM .* takes no such argument"):
        StandardizedTransformer(folder("llama"), **options, max_len=3)
    with pytest.raises(InputError, match="kv_transfer_config=<object .*: an engine in another process takes numbers"):
        StandardizedTransformer(folder("llama"), **options, kv_transfer_config=object())
    with pytest.raises(LoadError, match="There is no folder 'no/such/model'"):
        StandardizedTransformer("no/such/model", **options)
    with pytest.raises(LoadError, match="The engine's process has ended: vLLM could not load"):
        StandardizedTransformer(str(tmp_path), **options)
    with pytest.raises(InputError, match="the process loads the model itself; a Linear was given"):
        StandardizedTransformer(torch.nn.Linear(1, 1), **options)


# The command.


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--engine", "vllm", "--engine-arg", "x"], "--engine-arg x: give NAME=VALUE"),
        (["--engine", "vllm", "--engine-arg", "engine=a"], "engine is given twice, or is no argument of vllm.LLM"),
        (
            ["--engine", "vllm", "--engine-arg", "max_len=3"],
            "vLLM .* takes no such argument. Did you mean max_model_len",
        ),
        (["--engine", "vllm", "--engine-arg", "enforce_eager=false"], "enforce_eager=False: it has to be True"),
    ],
)
def test_a_command_that_is_wrong(arguments: list[str], text: str) -> None:
    command = [sys.executable, "-m", "nnatomy", "serve", folder("llama"), *arguments, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert re.search(text, done.stderr), done.stderr


def test_a_model_that_is_not_there(server: Process) -> None:
    command = [sys.executable, "-m", "nnatomy", "serve", "no/such/model", "--engine", "vllm", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode
    assert "no/such/model" in done.stderr
    with pytest.raises(LoadError, match="does not take the model 'other': it has no model 'other': it has"):
        StandardizedTransformer("other", server=server.address)
