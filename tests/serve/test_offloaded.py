"""A server whose weights lie on disk between two passes: its values are those of the model that is whole, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_blocks import BLOCKS, leaves, methods
from remote_server import Process, served

from nnatomy import StandardizedTransformer
from nnatomy.cli import main
from nnatomy.standardized.offloaded import value_of

MODEL = "demo:llama"
REST = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
ON_DISK = {f"model.layers.{i}": "cpu" if i == 1 else "disk" for i in range(8)} | dict.fromkeys(REST, "cpu")
METHODS = (
    "logit_lens last",
    "activation_patching",
    "attribution_patching",
    "collect_activations",
    "patchscope_generate",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("weights")
    with served(MODEL, "--device-map", json.dumps(ON_DISK), "--offload-folder", str(folder)) as process:
        yield process


@pytest.fixture(scope="module")
def pair(server: Process) -> Iterator[tuple[Any, Any]]:
    torch.set_num_threads(1)
    remote: Any = StandardizedTransformer(MODEL, server=server.address)
    yield StandardizedTransformer(MODEL), remote
    remote.close()


def same(wanted: Any, found: Any) -> bool:
    pairs = zip(leaves(wanted), leaves(found), strict=True)
    return all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in pairs)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_block(pair: tuple[Any, Any], name: str) -> None:
    local, remote = pair
    wanted, found = BLOCKS[name](local), BLOCKS[name](remote)
    assert wanted
    assert not [key for key, one in wanted.items() if not same(one, found[key])]


@pytest.mark.parametrize("name", METHODS)
def test_method(pair: tuple[Any, Any], name: str) -> None:
    local, remote = pair
    wanted = leaves(methods(local)[name]())
    assert wanted
    assert same(wanted, leaves(methods(remote)[name]()))


def test_the_weights_are_those_that_are_told(pair: tuple[Any, Any]) -> None:
    """The hash is that of the whole model; and what a client has of a weight is a copy, of which the model's own is not changed."""
    local, remote = pair
    status = remote.server_status()["models"][0]
    with served(MODEL) as whole:
        other: Any = StandardizedTransformer(MODEL, server=whole.address)
        assert status["hash"] == other.server_status()["models"][0]["hash"]
        other.close()
    for module in ("model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"):
        weight = remote.hf_model.get_submodule(module).weight
        assert torch.equal(torch.tensor(weight.tolist()), local.hf_model.get_submodule(module).weight)


def test_values_of_modules(tmp_path: Path) -> None:
    whole = StandardizedTransformer(MODEL).hf_model
    mapped = StandardizedTransformer(MODEL, device_map=ON_DISK, offload_folder=tmp_path).hf_model
    assert mapped.model.layers[2].mlp.up_proj.weight.is_meta
    assert torch.equal(value_of(mapped.model.layers[2].mlp.up_proj, "weight"), whole.model.layers[2].mlp.up_proj.weight)
    assert value_of(mapped.model.layers[1].mlp.up_proj, "weight") is mapped.model.layers[1].mlp.up_proj.weight
    with pytest.raises(LookupError, match="the weight of a Linear is on the meta device: it was never loaded"):
        value_of(torch.nn.Linear(2, 2, device="meta"), "weight")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["--device-map", "half"],
            "'half' is neither auto, balanced, balanced_low_0 nor sequential, and no JSON object",
        ),
        (["--device-map", "[1]"], "'[1]' is neither auto"),
        (["--device-map", "auto", "--device", "cpu"], "--device and --device-map: give one of them."),
    ],
)
def test_what_a_map_may_be(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["check", "demo:gpt2", *given])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code
    assert said in capsys.readouterr().err
