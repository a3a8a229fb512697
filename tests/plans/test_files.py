"""Files: what is written is read back, and what anybody may have written is refused, with a clear error."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import prompt_ids, shared
from safetensors.torch import save_file

from nnatomy import StandardizedTransformer
from nnatomy.errors import NnatomyError, PlanError
from nnatomy.plans import Plan, load_plan
from nnatomy.plans.identity import weights_hash

V = torch.randn(32, generator=torch.Generator().manual_seed(0))
IDS = prompt_ids(1, 7)[0]


@cache
def model_of(model_type: str) -> Any:
    return StandardizedTransformer(shared(model_type))


@cache
def recorded() -> Plan:
    model = model_of("llama")

    def block() -> None:
        h = model.layers_output[0]
        h[:, -1] += V
        model.layers_output[1] = (
            model.layers_output[1].masked_fill(model.layers_output[1] > 3, float("inf")).clamp(max=3)
        )
        model.steer(2, V.to(torch.bfloat16), token_positions=slice(1, -1))
        model.layers_output[2] = model.layers_output[2] + model.embed_tokens.module.weight[3]

    return model.record(block, IDS)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    plan = recorded()
    plan.save(tmp_path / "a")
    loaded = load_plan(tmp_path / "a")
    assert {one.name for one in (tmp_path / "a").iterdir()} == {"plan.json", "tensors.safetensors"}
    assert loaded.blocks == plan.blocks
    assert loaded.about == plan.about
    assert loaded.prompts == plan.prompts
    assert all(torch.equal(loaded.constants[name], one) for name, one in plan.constants.items())
    loaded.save(tmp_path / "b")
    assert (tmp_path / "b" / "plan.json").read_bytes() == (tmp_path / "a" / "plan.json").read_bytes()
    assert str(Path.cwd()) not in (tmp_path / "a" / "plan.json").read_text()
    found, wanted = (one.apply(model_of("llama"))(IDS).logits for one in (loaded, plan))
    assert torch.equal(found, wanted)


# Hostile files: each is the good one, with something changed.


def first(told: Any, kind: str) -> Any:
    return next(one for one in told["blocks"][0]["parts"][0]["nodes"] if one["kind"] == kind)


def op(told: Any, name: str) -> Any:
    return next(one for one in told["blocks"][0]["parts"][0]["nodes"] if name in one.get("name", ""))


def put(which: str, **fields: Any) -> Callable[[Any], None]:
    return lambda told: first(told, which).update(fields)


def named(name: str, **fields: Any) -> Callable[[Any], None]:
    return lambda told: first(told, "op").update(name=name, **fields)


def deep(told: Any) -> None:
    value: Any = 1
    for _ in range(40):
        value = [value]
    first(told, "op")["args"] = [value]


def many_nodes(told: Any) -> None:
    nodes = told["blocks"][0]["parts"][0]["nodes"]
    nodes += [copy.deepcopy(nodes[0]) for _ in range(20_001)]


def weight_written(told: Any) -> None:
    nodes = told["blocks"][0]["parts"][0]["nodes"]
    nodes[:] = [
        {"kind": "weight", "name": "lm_head.weight"},
        {"kind": "op", "name": "aten.transpose.int", "args": [{"value": 0}, 0, 1]},
        {"kind": "op", "name": "aten.mul_.Tensor", "args": [{"value": 1}, 0.0], "gives": 0},
    ]


HOSTILE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no format": (lambda told: told.pop("format"), "its format is not 'nnatomy.plan'"),
    "another format": (lambda told: told.update(format="pickle"), "its format is not"),
    "a later version": (lambda told: told.update(version=2), "it is of version 2; this nnatomy reads 1"),
    "a missing field": (lambda told: told.pop("prompts"), "it has no prompts"),
    "an unknown field": (lambda told: told.update(code="import os"), "has 'code', which is nothing"),
    "no object": (lambda told: [], "a plan is an object"),
    "no dtype": (lambda told: told["about"].update(dtype="load"), "about.dtype is a dtype"),
    "about with lists": (lambda told: told["about"].update(id=["x"]), "about.id is a short text"),
    "about too long": (lambda told: told["about"].update(id="x" * 10_000), "about.id is a short text"),
    "no blocks": (lambda told: told.update(blocks=[]), "it has no block"),
    "blocks of text": (lambda told: told.update(blocks="abc"), "blocks is a list"),
    "parts out of order": (lambda told: told["blocks"][0]["parts"][0].update(first=3), "parts begin in step 0"),
    "a kind that is none": (put("read", kind="exec"), "a node is of a kind, and not 'exec'"),
    "a dunder": (put("read", name="__class__"), "'__class__' is no standard name that a plan may have"),
    "an attribute of the model": (put("read", name="hf_model", layer=None), "is no standard name"),
    "a method": (put("read", name="save", layer=0), "is no standard name"),
    "a layer that is a text": (put("read", layer="0"), "is a whole number"),
    "a layer far out": (put("read", layer=10**9), "is a whole number from"),
    "a layer of the model's": (put("read", name="logits", layer=1), "logits has no layer"),
    "no layer": (put("put", layer=None), "is of a layer"),
    "a put of what is given": (put("put", name="input_ids", layer=None, sizes={}), "cannot be assigned"),
    "a put of nothing": (put("put", args=[1]), "= one value"),
    "a value of later": (put("put", args=[{"value": 9999}]), "the number of a value that is there already"),
    "a negative value": (put("put", args=[{"value": -1}]), "the number of a value that is there already"),
    "a boolean value": (put("put", args=[{"value": True}]), "the number of a value that is there already"),
    "another namespace": (named("prims.add.default"), "only functions of aten are run"),
    "a python path": (named("os.system"), "only functions of aten are run"),
    "a walk of attributes": (named("aten.add.__class__"), "there is no such"),
    "no such function": (named("aten.nothing.default"), "there is no such function"),
    "reading a file": (named("aten.from_file.default"), "aten.from_file.default"),
    "memory seen otherwise": (named("aten.as_strided.default"), "it is refused"),
    "uninitialised memory": (named("aten.empty_like.default"), "it is refused"),
    "random numbers": (named("aten.rand_like.default"), "it is refused"),
    "resizing": (named("aten.resize_.default"), "it is refused"),
    "a backward": (named("aten.sigmoid_backward.default"), "it is refused"),
    "an out": (named("aten.add.out"), "it draws random numbers, writes into `out`"),
    "a value for Python": (named("aten._local_scalar_dense.default"), "is decided by values"),
    "a size by values": (named("aten.nonzero.default"), "is decided by values"),
    "endless": (named("aten.special_zeta.default"), "it is refused"),
    "dropout in attention": (
        named("aten.scaled_dot_product_attention.default", args=[{"value": 0}] * 3 + [None, 0.5], gives=1),
        "dropout_p",
    ),
    "a text": (named("aten.add.Tensor", args=[{"value": 0}, "../../etc/passwd"], gives=1), "the text"),
    "too many arguments": (named("aten.relu.default", args=[{"value": 0}] * 9, gives=1), "is given other arguments"),
    "an argument of no name": (named("aten.relu.default", args=[{"value": 0}], kwargs={"exec": 1}), "is given other arguments"),
    "too few arguments": (named("aten.select.int", args=[{"value": 0}], gives=1), "is given too little"),
    "of no value": (named("aten.relu.default", args=[1], gives=1), "is of no value"),
    "gives what it does not": (named("aten.relu.default", args=[{"value": 0}], gives=0), "gives 0 values"),
    "in place, and gives": (named("aten.relu_.default", args=[{"value": 0}], gives=1), "gives 1 values"),
    "a huge integer": (lambda told: op(told, "clamp")["args"].append(10**30), "an argument is a whole number from"),
    "an argument of two names": (named("aten.relu.default", args=[{"value": 0, "size": 1}]), "an object of one name"),
    "an argument that is nothing": (named("aten.relu.default", args=[{"eval": "1"}]), "an argument that is nothing"),
    "a dtype that is none": (named("aten.relu.default", args=[{"dtype": "os"}]), "an argument that is nothing"),
    "a size of no axis": (named("aten.relu.default", args=[{"size": ["hidden", 1, 0]}]), "a size is an axis"),
    "a huge size": (named("aten.relu.default", args=[{"size": ["seq", 10**12, 0]}]), "times is a whole number"),
    "deep lists": (deep, "lists lie more than 24 deep"),
    "too many nodes": (many_nodes, "the nodes of all parts is a list of at most 20,000"),
    "a weight written": (weight_written, "aten.mul_.Tensor writes into a weight of the model"),
    "a constant that is not there": (put("constant", name="nothing"), "there is no constant 'nothing'"),
    "a constant of a path": (lambda told: told["constants"].update({"../x": ["float32", [1]]}), "is a dtype and a shape"),
    "a constant more": (lambda told: told["constants"].update(more=["float32", [1]]), "has other tensors than the plan"),
    "a constant of another shape": (lambda told: told["constants"].update(V=["float32", [2**39]]), "is of [32] in"),
    "a constant of another dtype": (lambda told: told["constants"].update(V=["int64", [32]]), "is torch.float32 in"),
    "a negative shape": (lambda told: told["constants"].update(V=["float32", [-1]]), "a size of V is a whole number"),
    "positions that are none": (put("chosen", args=["all"]), "chosen is of one or several positions"),
    "a number that is none": (lambda told: told["prompts"][0]["numbers"].update(x="1"), "x is a number"),
    "a token that is none": (lambda told: told["prompts"][0]["numbers"].update({"logits: of token -1": 1.0}), "names a token"),
    "token ids of text": (lambda told: told["prompts"][0].update(ids=["a"]), "a token id is a whole number"),
    "a prompt without tokens": (lambda told: told["prompts"][0].update(ids=[]), "a prompt has tokens"),
    "notes that are numbers": (lambda told: told.update(notes=[1]), "a note is a text"),
    "only of nothing": (lambda told: told.update(only={"ids": [1]}), "why is a text"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str, tmp_path: Path) -> None:
    change, text = HOSTILE[name]
    recorded().save(tmp_path)
    told = json.loads((tmp_path / "plan.json").read_text())
    changed = change(told)
    (tmp_path / "plan.json").write_text(json.dumps([] if changed == [] else told))
    with pytest.raises(PlanError) as error:
        load_plan(tmp_path)
    assert text in str(error.value)
    assert str(tmp_path / "plan.json") in str(error.value)


def test_there_are_enough() -> None:
    assert len(HOSTILE) >= 60


RAW: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is no JSON"),
    "a pickle": (b"\x80\x04\x95", "it is no JSON"),
    "deep": (b"[" * 200_000, "it is no JSON"),
    "cut": (b'{"format": "nnatomy.plan", ', "it is no JSON"),
    "a name twice": (b'{"format": "nnatomy.plan", "format": "x"}', "a name stands twice"),
    "NaN": (b'{"version": NaN}', "NaN is no number of JSON"),
    "Infinity": (b'{"version": -Infinity}', "-Infinity is no number of JSON"),
    "a number of a million digits": (b'{"version": ' + b"9" * 1_000_000 + b"}", "it is no JSON"),
    "too large": (b" " * ((16 << 20) + 1), "bytes; 16,777,216 are allowed"),
}


@pytest.mark.parametrize("name", RAW)
def test_raw(name: str, tmp_path: Path) -> None:
    data, text = RAW[name]
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(PlanError) as error:
        load_plan(tmp_path)
    assert text in str(error.value)


def test_no_folder_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no plan: No such file"):
        load_plan(tmp_path / "nothing")
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(PlanError, match="it is no ordinary file"):
        load_plan(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="it is no ordinary file"):
        load_plan(tmp_path)


def test_tensors_that_are_none(tmp_path: Path) -> None:
    recorded().save(tmp_path)
    (tmp_path / "tensors.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(PlanError, match="is not in the safetensors format"):
        load_plan(tmp_path)
    (tmp_path / "tensors.safetensors").unlink()
    with pytest.raises(PlanError, match="there is no plan: No such file"):
        load_plan(tmp_path)


def changed_plan(tmp_path: Path, change: Callable[[list[Any]], Any], **constants: torch.Tensor) -> Plan:
    recorded().save(tmp_path)
    told = json.loads((tmp_path / "plan.json").read_text())
    change(told["blocks"][0]["parts"][0]["nodes"])
    told["blocks"][0]["parts"] = told["blocks"][0]["parts"][:1]
    told["prompts"] = []
    if constants:
        told["constants"] = {name: ["float32", list(one.shape)] for name, one in constants.items()}
        save_file(constants, tmp_path / "tensors.safetensors")
    (tmp_path / "plan.json").write_text(json.dumps(told))
    return load_plan(tmp_path)


def nodes_of(*nodes: Any) -> Callable[[list[Any]], None]:
    def change(into: list[Any]) -> None:
        into[:] = nodes

    return change


READ = {"kind": "read", "name": "layers_output", "layer": 0}


def test_what_grows_without_end_is_not_run(tmp_path: Path) -> None:
    nodes: list[Any] = [READ]
    for i in range(40):
        nodes.append({"kind": "op", "name": "aten.cat.default", "args": [[{"value": i}] * 8, 1]})
    plan = changed_plan(tmp_path, nodes_of(*nodes))
    with pytest.raises(
        PlanError, match=r"aten.cat.default of a plan gives [\d,]+ elements, where the values in it have"
    ):
        plan.apply(model_of("llama"), check=False)(IDS)
    plan = changed_plan(
        tmp_path,
        nodes_of(READ, {"kind": "op", "name": "aten.repeat.default", "args": [{"value": 0}, [10**6, 10**6, 1]]}),
    )
    with pytest.raises(PlanError, match="it is not run"):
        plan.apply(model_of("llama"), check=False)(IDS)


def test_weights_stay_what_they_are(tmp_path: Path) -> None:
    """A weight that is put somewhere, and what may be a view of it, is not the model's own tensor."""
    model = model_of("llama")
    before = {name: one.clone() for name, one in model.hf_model.named_parameters()}
    nodes = [
        {"kind": "weight", "name": "model.norm.weight"},
        {"kind": "op", "name": "aten._unsafe_view.default", "args": [{"value": 0}, [1, 1, 32]]},
        {"kind": "op", "name": "aten.expand.default", "args": [{"value": 1}, [1, {"size": ["seq", 1, 0]}, 32]]},
        {"kind": "put", "name": "mlps_output", "layer": 1, "args": [{"value": 2}]},
    ]
    plan = changed_plan(tmp_path, nodes_of(*nodes))
    with torch.no_grad(), plan.apply(model, check=False).trace(IDS):
        model.mlps_output[1][:] = 7.0
        model.logits
    assert all(torch.equal(one, before[name]) for name, one in model.hf_model.named_parameters())
    written = {"kind": "op", "name": "aten.zero_.default", "args": [{"value": 1}], "gives": 0}
    recorded().save(tmp_path)
    with pytest.raises(PlanError, match="writes into a weight"):
        changed_plan(tmp_path, nodes_of(*nodes[:2], written))


def test_constants_stay_what_they_are(tmp_path: Path) -> None:
    model = model_of("llama")
    one = torch.ones(1, 7, 32)
    nodes = [
        {"kind": "constant", "name": "c"},
        {"kind": "op", "name": "aten.mul_.Tensor", "args": [{"value": 0}, 2.0], "gives": 0},
        {"kind": "put", "name": "mlps_output", "layer": 1, "args": [{"value": 0}]},
    ]
    edited = changed_plan(tmp_path, nodes_of(*nodes), c=one).apply(model, check=False)
    for _ in range(2):
        with torch.no_grad(), edited.trace(IDS):
            found = model.mlps_output[1].clone()
        assert torch.equal(found, 2 * one)


ANYTHING: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    10**12,
    1.5,
    "",
    "x",
    [],
    [1],
    {},
    {"value": 3},
    {"size": ["seq", 1, 0]},
]
NAMES = [
    f"aten.{name}" for name in ("mul.Tensor", "select.int", "slice.Tensor", "sub.Tensor", "where.self", "view.default")
]


def changed_somewhere(told: Any, draw: random.Random) -> None:
    """One leaf of the nodes is another: of the same kind, or anything."""
    nodes = told["blocks"][0]["parts"][0]["nodes"]
    at, key = nodes, draw.randrange(len(nodes))
    while isinstance(at[key], (dict, list)) and at[key]:
        at = at[key]
        key = draw.choice(list(at) if isinstance(at, dict) else list(range(len(at))))
    old = at[key]
    if draw.random() < 0.2:
        at[key] = draw.choice(ANYTHING)
    elif type(old) is int:
        at[key] = draw.choice((0, 1, 2, -1, old + 1, old - 1))
    elif isinstance(old, str) and old.startswith("aten."):
        at[key] = draw.choice(NAMES)
    elif isinstance(old, str):
        at[key] = draw.choice(("layers_output", "layers_input", "mlps_output", "logits", "V", "read"))
    else:
        at[key] = draw.choice((0.5, 2, None, False))


@pytest.mark.parametrize("seed", range(4))
def test_changed_files(seed: int, tmp_path: Path) -> None:
    """A file with anything changed is refused, or printed and run, or refused when it is run: always as an error of ours."""
    draw, model = random.Random(seed), model_of("llama")
    before = weights_hash(model.hf_model)
    recorded().save(tmp_path)
    text, loaded = (tmp_path / "plan.json").read_text(), 0
    for _ in range(60):
        told = json.loads(text)
        for _ in range(draw.choice((1, 1, 2, 3))):
            changed_somewhere(told, draw)
        (tmp_path / "plan.json").write_text(json.dumps(told))
        try:
            plan = load_plan(tmp_path)
            loaded += 1
            assert str(plan)
            plan.apply(model, check=False)(IDS)
        except NnatomyError:
            pass
    assert 3 <= loaded <= 57  # both ways are tried
    assert weights_hash(model.hf_model) == before


def test_what_does_not_fit_where_it_is_run(tmp_path: Path) -> None:
    wrong = {"kind": "op", "name": "aten.mm.default", "args": [{"value": 0}, {"value": 0}]}
    plan = changed_plan(tmp_path, nodes_of(READ, wrong))
    with pytest.raises(
        PlanError, match=r"aten.mm.default of a plan cannot be done to tensors of \(1, 7, 32\), \(1, 7, 32\)"
    ):
        plan.apply(model_of("llama"), check=False)(IDS)
