"""What a model is loaded from and by, looked at before it is loaded: what `from_pretrained` would say is about its own insides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from nnatomy.errors import InputError, LoadError

#: What else precisions are called.
_DTYPES = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
}
#: What people give to load a model; a wrong name is near one of them.
_KNOWN = (
    *("arch_config", "validate", "allow_failures", "server", "api_key", "tokenizer", "dtype", "device_map"),
    *("revision", "quantization_config", "attn_implementation", "trust_remote_code", "token", "cache_dir"),
)


def check_model(model: Any) -> None:
    """Raise InputError for what no model can be had from, LoadError for a folder that is not there."""
    if hasattr(model, "hf_model"):
        raise InputError(f"{type(model).__name__} is a model already: use it as it is, or give its model.hf_model.")
    if isinstance(model, Module):
        return
    if not isinstance(model, (str, Path)) or not str(model):
        what = f"the class {model.__name__}" if isinstance(model, type) else _short(model)
        raise InputError(
            f"The model is {what}: give a model's id on the Hugging Face hub, a folder, 'demo:gpt2', or a loaded Hugging Face "
            "model and its tokenizer, StandardizedTransformer(model, tokenizer)."
        )
    text, path = str(model), Path(model)
    is_path = isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    if path.is_file():
        raise LoadError(f"{text!r} is a file: give the folder, with its config.json, that save_pretrained wrote.")
    if is_path and not path.is_dir():
        home = " A ~ is not expanded: give Path(...).expanduser()." if text.startswith("~") else ""
        raise LoadError(f"There is no folder {text!r} (looked for in {Path.cwd()}).{home}")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise InputError for arguments of `from_pretrained` that are none, or of which it would not say what is wrong."""
    if "device" in given:
        raise InputError(
            f"device={_short(given['device'])}: models are loaded to a device by device_map={_short(given['device'])}; or move "
            "a loaded one, StandardizedTransformer(hf_model.to(device), tokenizer)."
        )
    check_cuda("device_map", given.get("device_map"))
    for name in ("dtype", "torch_dtype"):
        check_dtype(name, given.get(name))


def check_dtype(name: str, dtype: Any) -> None:
    """Raise InputError for what is no precision that a model can be loaded in."""
    known = dtype is None or isinstance(dtype, (torch.dtype, dict)) or dtype == "auto"
    if known or (
        isinstance(dtype, str) and isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype)
    ):
        return
    meant = _DTYPES.get(str(dtype).lower(), "float16")
    raise InputError(f"{name}={_short(dtype)}: give torch.{meant}, or {meant!r}, or another dtype of torch, or 'auto'.")


def check_cuda(name: str, device: Any) -> None:
    """Raise InputError for a GPU that this PyTorch does not see."""
    text = str(device) if isinstance(device, (str, torch.device)) else ""
    if not text.startswith("cuda"):
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = "" if torch.version.cuda else f", and this PyTorch ({torch.__version__}) was built without CUDA"
        raise InputError(
            f"{name}={text!r}: PyTorch sees no CUDA device here{built}. On the CPU it runs with {name}='cpu'."
        )
    _, _, number = text.partition(":")
    if number.isdecimal() and int(number) >= count:
        raise InputError(f"{name}={text!r}: there are {count} CUDA devices, cuda:0 to cuda:{count - 1}.")


def unknown_argument(error: TypeError, given: Mapping[str, Any]) -> InputError | None:
    """What is said where the model's class does not know an argument; None if that is not what the error is about."""
    _, found, name = str(error).partition("unexpected keyword argument ")
    name = name.strip("'\"")
    if not found or name not in given:
        return None
    near = difflib.get_close_matches(name, _KNOWN, n=1)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else "a field of its config is changed there, before: AutoConfig.from_pretrained."
    )
    return InputError(f"{name}={_short(given[name])}: neither from_pretrained nor the model's class takes that; {hint}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
