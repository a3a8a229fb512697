"""What a client is told of a model, to make its skeleton: all of it data."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import Module, Parameter

from nnatomy.errors import InputError, a_kind
from nnatomy.remote.wire import NAMES, PROTOCOL, to_bytes
from nnatomy.serve.forward import accessors
from nnatomy.serve.tensors import Weights

#: The files of a tokenizer that are data, and no code.
TOKENIZER_FILES = frozenset(
    "tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja added_tokens.json vocab.json "
    "merges.txt vocab.txt".split()
)


def check_servable(model: Any) -> None:
    """Raise InputError for a model that a client could not make a skeleton of."""
    hf_model = model.hf_model
    if model.steps_of is not hf_model:
        raise InputError(
            f"{a_kind(hf_model, 'A')} wraps the model: it cannot be served. Merge it (merge_and_unload), and serve what it wraps."
        )
    if getattr(transformers, type(hf_model).__name__, None) is not type(hf_model):
        raise InputError(
            f"{type(hf_model).__name__} is no class of Transformers, which clients have too: it cannot be served. Run it where it is "
            "loaded, or load its weights into a class of Transformers."
        )
    if hf_model.config.is_encoder_decoder:
        raise InputError(
            f"{a_kind(hf_model, 'A')} is an encoder-decoder: it cannot be served. Run it where it is loaded, without a server."
        )


def weights_hash(weights: Weights) -> str:
    """The SHA-256 of all parameters and buffers."""
    digest = sha256()
    for name, number in sorted((name, number) for number, name in enumerate(weights.named)):
        tensor = weights.whole(number)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(to_bytes(tensor))
    return digest.hexdigest()


def versions() -> dict[str, Any]:
    """What runs here."""
    return {"protocol": PROTOCOL, "torch": str(torch.__version__), "transformers": transformers.__version__}


def hello(model: Any, name: str, weights: Weights, digest: str) -> dict[str, Any]:
    """All that a client needs to know."""
    hf_model = model.hf_model
    paths = {module: path for path, module in hf_model.named_modules()}
    anatomy = model._anatomy

    def places(modules: Any) -> Any:
        if modules is None or isinstance(modules, Module):
            return None if modules is None else paths[modules]
        return [places(one) for one in modules]

    modules = "embed_tokens layers attentions mlps mixers cross_attentions ln_final lm_head".split()
    generation = getattr(hf_model, "generation_config", None)
    return {
        "name": name,
        "versions": versions(),
        "class": type(hf_model).__name__,
        "revision": getattr(hf_model.config, "_commit_hash", None),  # of the hub; a folder has none
        "config": json.dumps({**_settings(hf_model.config), "_name_or_path": name}, default=str),
        "attention": hf_model.config._attn_implementation,
        "generation": None if generation is None else json.dumps(generation.to_dict(), default=str),
        "tokenizer": None if model.tokenizer is None else tokenizer_files(model.tokenizer),
        "tensors": [_told(key, tensor) for key, tensor in weights.named.items()],
        "hash": digest,
        "anatomy": {
            **{key: places(getattr(anatomy, key)) for key in modules},
            **{key: getattr(anatomy, key) for key in ("kinds", "inferred", "gives_logits", "width", "heads")},
            "absent": {key: list(value) for key, value in anatomy.absent.items()},
        },
        "dimensions": vars(model.dimensions),
        "accessors": {key: _accessor(one, paths) for key, one in accessors(model).items()},
        "head": [model._head.short, model._head.refused],
        "refused": model._refused,
        "causal": model.causal,
        "no_padding": model._prompts.no_padding,
        "report": model.validation.to_dict(),
    }


def _settings(config: Any) -> dict[str, Any]:
    """What a client makes modules of: how they are split over processes here is nothing to it."""
    settings: dict[str, Any] = config.to_dict()
    settings.pop("distributed_config", None)
    return settings


def _told(name: str, tensor: Tensor) -> list[Any]:
    layout = [list(tensor.shape), list(tensor.stride()), NAMES[tensor.dtype]]
    return [name, *layout, tensor.requires_grad, isinstance(tensor, Parameter)]


def _accessor(accessor: Any, paths: dict[Module, str]) -> dict[str, Any]:
    later = accessor.changed_later
    return {
        "kind": accessor.kind,
        "later": None if later is None else [paths[module] for module in later],
        "absent": [
            None if module is not None else why for module, why in zip(accessor.modules, accessor._absent, strict=True)
        ],
    }


def tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """Those of its files that are data, by name."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [path for path in Path(folder).iterdir() if path.name in TOKENIZER_FILES]
        return {path.name: path.read_text(encoding="utf-8") for path in files}
