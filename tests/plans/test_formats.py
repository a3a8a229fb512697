"""What other projects publish: control vectors in the GGUF format, and pyvene's configs."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import prompt_ids, shared

from nnatomy import StandardizedTransformer
from nnatomy.errors import PlanError
from nnatomy.plans import from_control_vector, from_pyvene
from nnatomy.plans.control_vector import read_control_vector

V = torch.randn(32, generator=torch.Generator().manual_seed(0))
IDS = prompt_ids(1, 7)[0]
#: Written by the package `gguf`, 0.19: direction.1 in float32, direction.2 in float16, of arange(32) / 4 - N.
WRITTEN = zlib.decompress(
    base64.b64decode(
        "eNptzz9PAjEYBvBH8R8aEwcH3fgEFzUOxigWuJPVxRmbo8Il5WrKYeLW0dGRkdHRwYEYxRsdHR39KD4XOxCgyS+9vO/Tt71m8/qyBGAZ/2vN77t+76hU"
        "WakDaeNukqk4G1i1wfq278cmzazR9+wYu7eoGPRMW+lWN0mz4uCqz2gte3J/4QEtH5RtxWaQZiv+aWUf7JueCnTSz8p+VMk3lnywNBu+1bKzXgQ2p6v9"
        "WGrl//Viy3faieUDEpMGh8W4CubXfPRoOlp8u5kj7hMQBHITX6sW97JOjkaU0y9BADtUoQMSdEU3dEeOHumJhjSiZ3qhMeX0Rd/0I5Dz3gk+8I43jPHK"
        "+cc4wSnOcI4q3yA4r+ZqqLs6Gq6BUIQuzENEInJRHv0BkINjIQ=="
    )
)


@cache
def model_of(model_type: str) -> Any:
    return StandardizedTransformer(shared(model_type))


def hooked(edits: dict[int, torch.Tensor]) -> torch.Tensor:
    """The logits with these added to the outputs of layers, by torch's own hooks."""
    hf_model = shared("llama")
    handles = [
        hf_model.model.layers[layer].register_forward_hook(lambda _, __, output, one=one: output + one)
        for layer, one in edits.items()
    ]
    with torch.no_grad():
        logits = hf_model(IDS[None]).logits
    for handle in handles:
        handle.remove()
    return logits


def gguf(*tensors: tuple[bytes, list[int], int, bytes], facts: bytes = b"", count: int = 0, head: bytes = b"") -> bytes:
    """A file of version 3, by the description of the format."""
    data = (head or b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count)) + facts
    offset, body = 0, b""
    for name, shape, kind, values in tensors:
        data += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
        data += b"".join(struct.pack("<Q", one) for one in shape) + struct.pack("<IQ", kind, offset)
        body += values + b"\0" * (-len(values) % 32)
        offset = len(body)
    return data + b"\0" * (-len(data) % 32) + body


def test_a_file_of_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(WRITTEN)
    found = read_control_vector(path)
    assert [*found] == [1, 2]
    for layer, direction in found.items():
        assert torch.equal(direction, torch.arange(32) * 0.25 - layer)


def test_a_control_vector_is_added_behind_its_block(tmp_path: Path) -> None:
    """As llama.cpp does: direction.N behind block N, counted from 0, at every position."""
    path = tmp_path / "v.gguf"
    path.write_bytes(WRITTEN)
    model = model_of("llama")
    plan = from_control_vector(path, model, strength=0.3)
    wanted = hooked({layer: 0.3 * (torch.arange(32) * 0.25 - layer) for layer in (1, 2)})
    assert torch.allclose(plan.apply(model)(IDS).logits, wanted, atol=1e-5)
    assert plan.notes == ["a control vector of layers 1, 2, strength 0.3"]


F32 = struct.pack("<32f", *range(32))
BAD = {
    "no GGUF": (b"GGML" + b"\0" * 40, "it does not begin with GGUF"),
    "cut": (WRITTEN[:60], "is no control vector in the GGUF format"),
    "empty": (b"", "is no control vector in the GGUF format"),
    "cut in a tensor": (WRITTEN[:-40], "lies beyond its end"),
    "another version": (gguf(head=b"GGUF" + struct.pack("<IQQ", 1, 0, 0)), "version 2 or 3"),
    "many tensors": (gguf(head=b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0)), "it says that it has"),
    "no tensors": (gguf(), "it has no direction"),
    "layer 0": (gguf((b"direction.0", [32], 0, F32)), "direction.N, of layers N from 1 on"),
    "a model's tensor": (gguf((b"token_embd.weight", [32], 0, F32)), "they are direction.N"),
    "two axes": (gguf((b"direction.1", [8, 4], 0, F32)), "has 2 axes"),
    "quantized": (gguf((b"direction.1", [32], 8, F32)), "is quantized"),
    "twice": (gguf((b"direction.1", [32], 0, F32), (b"direction.1", [32], 0, F32)), "one layer's twice"),
    "huge": (gguf((b"direction.1", [2**62], 0, F32)), "lies beyond its end"),
    "a text without end": (gguf(count=1, facts=struct.pack("<Q", 2**40)), "a text of"),
    "another architecture": (
        gguf(count=1, facts=struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"),
        "it is of a 'llama'",
    ),
}
BAD["another architecture"] = (
    b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + BAD["another architecture"][0][24:],
    BAD["another architecture"][1],
)
BAD["a text without end"] = (
    b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + BAD["a text without end"][0][24:],
    BAD["a text without end"][1],
)


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_none(name: str, tmp_path: Path) -> None:
    data, text = BAD[name]
    (tmp_path / "v.gguf").write_bytes(data)
    with pytest.raises(PlanError) as error:
        read_control_vector(tmp_path / "v.gguf")
    assert text in str(error.value)


def test_a_control_vector_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(gguf((b"direction.1", [16], 0, F32)))
    with pytest.raises(PlanError, match="its directions are of width 16, the model's residual stream of width 32"):
        from_control_vector(path, model_of("llama"))
    path.write_bytes(gguf((b"direction.9", [32], 0, F32)))
    with pytest.raises(PlanError, match=r"it has a direction.9; the model has layers 0 to 2"):
        from_control_vector(path, model_of("llama"))
    with pytest.raises(PlanError, match="it cannot be read: No such file"):
        read_control_vector(tmp_path / "nothing")


# pyvene.


def config(*rows: Any, kinds: Any = "<class 'pyvene.models.interventions.ZeroIntervention'>") -> dict[str, Any]:
    return {"representations": [*rows], "intervention_types": kinds, "mode": "parallel", "model_type": "llama"}


def row(layer: int, component: str = "block_output", unit: str = "pos", *more: Any) -> list[Any]:
    return [layer, component, unit, 1, *more]


def test_pyvene(tmp_path: Path) -> None:
    model = model_of("llama")
    kinds = [
        f"<class 'pyvene.models.interventions.{name}Intervention'>" for name in ("Subtraction", "Zero", "Addition")
    ]
    told = config(row(2), row(1, "mlp_output"), row(0), kinds=kinds)
    (tmp_path / "config.json").write_text(json.dumps(told))
    plan = from_pyvene(tmp_path, model, {0: V, 2: 2 * V}, positions=-1)

    def hook(change: Any) -> Any:
        def changed(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, -1] = change(output[:, -1])
            return output

        return changed

    layers = shared("llama").model.layers
    handles = [
        layers[0].register_forward_hook(hook(lambda x: x + 2 * V)),
        layers[1].mlp.register_forward_hook(hook(lambda x: 0 * x)),
        layers[2].register_forward_hook(hook(lambda x: x - V)),
    ]
    with torch.no_grad():
        wanted = shared("llama")(IDS[None]).logits
    for handle in handles:
        handle.remove()
    assert torch.allclose(plan.apply(model)(IDS).logits, wanted, atol=1e-5)


def test_pyvene_vanilla_and_names() -> None:
    model = model_of("llama")
    told = {"layer": 1, "component": "block_output", "unit": "pos"}
    plan = from_pyvene(config(told, kinds="VanillaIntervention"), model, {0: V})
    with torch.no_grad(), plan.apply(model).trace(IDS):
        found = model.layers_output[1]
    assert torch.equal(found, V.expand(1, 7, 32))


REFUSED = {
    "trained": (
        config(row(1), kinds="<class 'pyvene.models.interventions.LowRankRotatedSpaceIntervention'>"),
        "weights are pickled",
    ),
    "code": (config(row(1), kinds="<class '__main__.Mine'>"), "is a 'Mine'"),
    "a component": (config(row(1, "head_attention_value_output", "h.pos")), "is no standard name"),
    "units": (config(row(1, "block_output", "h.pos")), "is of units 'h.pos'"),
    "low rank": (config(row(1, "block_output", "pos", 4)), "has low_rank_dimension: that is not read"),
    "subspaces": (config(row(1, "block_output", "pos", None, None, None, [[0, 4]])), "has subspace_partition"),
    "no source": (
        config(row(1), kinds="VanillaIntervention"),
        r"needs its source: from_pyvene\(..., sources={0: tensor}\)",
    ),
    "no list": ({"representations": "x"}, "has a list of representations"),
    "no layer": (config(["x", "block_output"]), "is no representation of pyvene's"),
    "no type": (config(row(1), row(2), kinds=["ZeroIntervention"]), "2 representations, and 1 type"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pyvene_refused(name: str) -> None:
    told, text = REFUSED[name]
    with pytest.raises(PlanError, match=text):
        from_pyvene(told, model_of("llama"))


def test_pyvene_source_of_another_width(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"sources\[0\] is of \(16,\), the model's residual stream of width 32"):
        from_pyvene(config(row(1), kinds="AdditionIntervention"), model_of("llama"), {0: torch.ones(16)})
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(PlanError, match="it is no JSON"):
        from_pyvene(tmp_path, model_of("llama"))
