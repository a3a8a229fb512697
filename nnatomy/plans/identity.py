"""Which model it is: its id, and hashes of its weights and its tokenizer."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def identity(model: Any) -> dict[str, Any]:
    """What a plan says of the model that it comes from: plain data."""
    hf_model, told = model.hf_model, getattr(model, "_told", None)
    name = str(told["name"] if told else model._name or model.config._name_or_path or type(hf_model).__name__)
    return {
        "id": Path(name).name if Path(name).is_absolute() else name,
        "revision": getattr(model.config, "_commit_hash", None),
        "class": type(hf_model).__name__,
        "type": str(model.steps_of.config.model_type),
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "dtype": str(hf_model.dtype).removeprefix("torch."),
        "weights": told["hash"] if told else weights_hash(hf_model),
        "tokenizer": tokenizer_hash(model.tokenizer),
    }


def weights(hf_model: Any) -> dict[str, Tensor]:
    """All parameters and buffers, by their paths."""
    both = (hf_model.named_parameters, hf_model.named_buffers)
    return {path: one for named in both for path, one in named(remove_duplicate=False)}


def weights_hash(hf_model: Any) -> str:
    """The SHA-256 of all parameters and buffers: what a server tells of its model, too."""
    digest = sha256()
    for name, tensor in sorted(weights(hf_model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            flat = tensor.detach().to("cpu").contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str | None:
    """The SHA-256 of what a tokenizer does; None if there is none."""
    if tokenizer is None:
        return None
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        told: Any = sorted(tokenizer.get_vocab().items())
    else:
        told = {key: one for key, one in json.loads(fast.to_str()).items() if key not in ("padding", "truncation")}
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
