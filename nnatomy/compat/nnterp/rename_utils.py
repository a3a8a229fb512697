"""`nnterp.rename_utils`: names for modules, and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.nn import Module

from nnatomy.arch_configs import causal_lm, dimensions, resolve, text_config
from nnatomy.errors import InputError, ModelError, NotInThisModelError
from nnatomy.standardized import StandardizedTransformer

Names = str | list[str] | None
#: nnterp's: a model whose names do not mean what they should.
RenamingError = ModelError


@dataclass
class RenameConfig:
    """What modules of a model are called, where nnterp does not know it.

    Here the modules are found by what they do, whatever they are called; these names are aliases then. (For a model of which they
    are not found, there is `nnatomy.ArchConfig`.)
    """

    attn_name: Names = None
    mlp_name: Names = None
    ln_final_name: Names = None
    lm_head_name: Names = None
    model_name: Names = None
    layers_name: Names = None
    attn_prob_source: Any = None
    ignore_mlp: bool | None = None
    ignore_attn: bool | None = None
    attn_head_config_key: Any = None
    hidden_size_config_key: Any = None
    vocab_size_config_key: Any = None


def get_rename_dict(rename_config: RenameConfig | None = None) -> dict[str, str]:
    """The aliases that a config asks for. The standard names need none: they are there on every model."""
    if rename_config is None:
        return {}
    if rename_config.attn_prob_source is not None:
        raise InputError(
            "RenameConfig(attn_prob_source=...): attention probabilities are found without it on every model; leave it out."
        )
    given = {
        "self_attn": rename_config.attn_name,
        "mlp": rename_config.mlp_name,
        "ln_final": rename_config.ln_final_name,
        "lm_head": rename_config.lm_head_name,
        "model": rename_config.model_name,
        "layers": rename_config.layers_name,
    }
    return {
        path: name
        for name, paths in given.items()
        for path in ([paths] if isinstance(paths, str) else paths or [])
        if path != name
    }


def get_ignores(model: Any, rename_config: RenameConfig | None = None) -> list[str]:
    """Which of "mlp" and "attention" no layer of a model has as one module."""
    anatomy = model._anatomy if isinstance(model, StandardizedTransformer) else resolve(causal_lm(model))
    left_out = {
        "mlp": bool(rename_config and rename_config.ignore_mlp) or not any(anatomy.mlps),
        "attention": bool(rename_config and rename_config.ignore_attn) or not any(anatomy.attentions),
    }
    return [name for name, out in left_out.items() if out]


def get_num_attention_heads(model: Any, raise_error: bool = True, rename_config: Any = None) -> int | None:
    """How many query heads a layer has."""
    return _size(model, "num_heads", "attn_head_config_key", raise_error, rename_config)


def get_hidden_size(model: Any, raise_error: bool = True, rename_config: Any = None) -> int | None:
    """The width of the residual stream."""
    return _size(model, "hidden_size", "hidden_size_config_key", raise_error, rename_config)


def get_vocab_size(model: Any, raise_error: bool = True, rename_config: Any = None) -> int | None:
    """How many tokens the model can predict."""
    return _size(model, "vocab_size", "vocab_size_config_key", raise_error, rename_config)


def _size(model: Any, name: str, key: str, raise_error: bool, rename_config: RenameConfig | None) -> int | None:
    given = getattr(rename_config, key, None)
    if isinstance(given, int):
        return given
    if isinstance(model, StandardizedTransformer):
        found = model.dimensions
    else:
        causal: Module = causal_lm(model)
        found = dimensions(text_config(causal), resolve(causal))
    size: int | None = getattr(found, name)
    if size is None and raise_error:
        raise NotInThisModelError(f"{name}: {type(model).__name__} has no one number for it.")
    return size
