"""The skeleton of a model at a server: its modules without weights, its tokenizer, and what has been found of it there."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch.nn import Module
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel

from nnatomy.arch_configs.resolve import Anatomy
from nnatomy.errors import LoadError, a
from nnatomy.remote.connection import Connection
from nnatomy.remote.tensor import RemoteTensor
from nnatomy.remote.wire import DTYPES, PROTOCOL
from nnatomy.validation.report import Report, Row

_FILES = (".json", ".txt", ".jinja")


def check_protocol(told: dict[str, Any], server: str) -> None:
    """Raise LoadError for a server that speaks another protocol."""
    there = told.get("versions", {})
    if there.get("protocol") != PROTOCOL:
        raise LoadError(
            f"The server {server} speaks protocol {there.get('protocol')}, and this nnatomy {PROTOCOL}: have the same release."
        )


def check_transformers(told: dict[str, Any], server: str) -> None:
    """Raise LoadError for one that has other model classes."""
    there = told["versions"]
    mine, its = (version.split(".")[:2] for version in (transformers.__version__, str(there["transformers"])))
    if mine != its:
        raise LoadError(
            f"The server {server} has Transformers {there['transformers']}, and here is {transformers.__version__}: the modules "
            "of a model may differ. Have the same minor release."
        )


def skeleton_of(told: dict[str, Any], connection: Connection) -> Module:
    """The model's modules, whose parameters and buffers are remote tensors."""
    kind = getattr(transformers, told["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise LoadError(f"The server's model is {a(told['class'])}, which is no model of Transformers here.")
    settings = json.loads(told["config"])
    config = AutoConfig.for_model(**settings)
    config._attn_implementation = told["attention"]
    with torch.device("meta"):
        model: Any = kind._from_config(config)
    model.eval()
    if told["generation"] is not None:
        model.generation_config = GenerationConfig.from_dict(json.loads(told["generation"]))
    modules = dict(model.named_modules(remove_duplicate=False))
    same: dict[int, tuple[Any, RemoteTensor]] = {}  # those that are one tensor here (tied weights) stay one
    for i, (name, shape, strides, dtype, needs, is_parameter) in enumerate(told["tensors"]):
        path, _, own = name.rpartition(".")
        held = modules[path]._parameters if is_parameter else modules[path]._buffers
        old = held[own]
        if old is None or list(old.shape) != shape:
            raise LoadError(f"{name} is {shape} at the server, and {None if old is None else list(old.shape)} here.")
        if id(old) not in same:
            meta = torch.empty_strided(shape, strides, dtype=DTYPES[dtype], device="meta")
            new = RemoteTensor(meta, connection, -i - 1, needs)
            if is_parameter:
                new._is_param = True  # torch takes it for a Parameter
            same[id(old)] = old, new
        held[own] = same[id(old)][1]
    if left := [name for name, one in model.named_parameters() if not isinstance(one, RemoteTensor)]:
        raise LoadError(f"The server's model has no {left[0]}.")
    return model


def tokenizer_of(files: dict[str, str] | None) -> Any:
    """The tokenizer of those files, which pads on the left; None if there are none."""
    if files is None:
        return None
    with TemporaryDirectory() as folder:
        for name, text in files.items():
            if Path(name).name != name or not name.endswith(_FILES):
                raise LoadError(f"The server's tokenizer has a file {name!r}.")
            (Path(folder) / name).write_text(text, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.padding_side = "left"
    return tokenizer


def anatomy_of(told: dict[str, Any], model: Module) -> Anatomy:
    """The standard modules."""
    modules = dict(model.named_modules())

    def found(paths: Any) -> Any:
        if isinstance(paths, list):
            return tuple(found(path) for path in paths)
        return None if paths is None else modules[paths]

    places = "embed_tokens layers attentions mlps mixers cross_attentions ln_final lm_head".split()
    settings = {key: one for key, one in told.items() if key not in (*places, "absent", "kinds")}
    return Anatomy(
        **{key: found(told[key]) for key in places},
        kinds=tuple(told["kinds"]),
        absent={key: tuple(one) for key, one in told["absent"].items()},
        **settings,
    )


def learn(told: dict[str, Any], model: Any, accessors: dict[str, Any]) -> None:
    """Give the names of `model` what validation has found at the server."""
    modules = dict(model.hf_model.named_modules())
    for name, fact in told["accessors"].items():
        accessor = accessors[name]
        accessor.kind = fact["kind"]
        accessor.changed_later = None if fact["later"] is None else {modules[path] for path in fact["later"]}
        for layer, why in enumerate(fact["absent"]):
            if why is not None:
                accessor.refuse(layer, why)
    model._head.short, model._head.refused = told["head"]
    model._refused, model._causal = dict(told["refused"]), told["causal"]
    model._prompts.no_padding = told["no_padding"]


def report_of(told: dict[str, Any]) -> Report:
    """The report of the validation at the server."""
    return Report(told["model"], [Row(**row) for row in told["rows"]])
