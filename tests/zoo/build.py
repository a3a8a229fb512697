"""A tiny random model of every causal-LM type that transformers knows, set so that being wrong shows.

A type's config is its defaults with small numbers by field name (`SIZES`), layer lists that have every kind of layer
(`_layers`), and what only that type needs (`TYPE_CONFIGS`). Weights are large enough that every part matters
(`randomize`); multipliers are not 1, caps are low, windows are shorter than the prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import torch
import transformers
from releases import need
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nnatomy import StandardizedTransformer
from zoo.configs import KINDS, LAYERS, PARTS, SIZES, TYPE_CONFIGS

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
FIRST_ID = 16  # special ids are below


def build(model_type: str, **changes: Any) -> nn.Module:
    """A new random model of that type, in eval mode and float32; `changes` go to its config."""
    need(model_type, TYPES)
    return build_class(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], model_type, **changes)


def build_class(class_name: str, model_type: str, **changes: Any) -> nn.Module:
    """As `build`, of another class of transformers."""
    need(class_name, dir(transformers))
    model_class = getattr(transformers, class_name)
    whole = config(model_type, **changes)
    parts = [whole, *(getattr(whole, name) for name in whole.sub_configs)]
    part = next((part for part in parts if isinstance(part, model_class.config_class)), whole)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed := zlib.crc32(model_type.encode()))
        model = model_class._from_config(part, dtype=torch.float32).eval()
    randomize(model, seed)
    return model


def config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """That type's config."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_merged(_fields(config_class), TYPE_CONFIGS.get(model_type, {}), changes))


def ids(model: nn.Module, batch: int = 2, seq: int = 9, seed: int = 0) -> Tensor:
    """Random token ids of (batch, seq), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_ID, vocab_size(model), (batch, seq), generator=generator)


def vocab_size(model: nn.Module) -> int:
    """How many logits a position has: some types leave out the padding of their vocabulary."""
    text = model.config.get_text_config(decoder=True)
    names = ("unpadded_vocab_size", "output_vocab_size", "vocab_size")
    return next(size for name in names if (size := getattr(text, name, None)))


def _merged(*tables: dict[str, Any]) -> dict[str, Any]:
    """Later entries win; dictionaries (sub-configs) are merged."""
    merged: dict[str, Any] = {}
    for table in tables:
        for name, value in table.items():
            both = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = _merged(merged[name], value) if both else value
    return merged


def _fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """What the general rules say about a config class, its sub-configs included."""
    names = [field.name for field in dataclasses.fields(config_class)]
    values = {name: SIZES[name] for name in names if name in SIZES}
    if "kv_lora_rank" in names:  # latent attention: a head's keys are its own, and `head_dim` is the rotary part
        values |= {"num_key_value_heads": SIZES["num_attention_heads"], "head_dim": SIZES["qk_rope_head_dim"]}
    tokens = [name for name in names if name.endswith(("_token_id", "_token_index")) and name not in SIZES]
    values.update({name: 3 + i for i, name in enumerate(tokens)})
    values.update(_layers(config_class, names))
    if "mrope_section" in getattr(config_class, "ignore_keys_at_rope_validation", ()) and (
        rope := _default(config_class).rope_parameters
    ):
        values["rope_parameters"] = rope | {"mrope_section": _three_axes(rope, values)}
    specs = getattr(config_class, "sub_configs_defaults", {})  # not in older releases
    parts = {} if specs else PARTS.get(config_class.model_type, {})
    for name, sub_class in config_class.sub_configs.items():
        spec = specs.get(name)
        if sub_class is AutoConfig:
            part = parts.get(name) or (spec or getattr(_default(config_class), name)).model_type
            kwargs = getattr(spec, "init_kwargs", {})
            values[name] = {"model_type": part, **kwargs, **_fields(CONFIG_MAPPING[part])}
        elif spec is None or not spec.optional:
            values[name] = _fields(sub_class)
    return values


def _three_axes(rope: dict[str, Any], values: dict[str, Any]) -> list[int]:
    """How many of a head's frequencies go by time, by height and by width."""
    head_dim = values.get("head_dim", SIZES["hidden_size"] // SIZES["num_attention_heads"])
    count = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    return [count - 2 * (count // 4), count // 4, count // 4]


@functools.cache
def _default(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    return config_class()


def _layers(config_class: type[PreTrainedConfig], names: list[str]) -> dict[str, list[str]]:
    """Every kind of layer that the defaults have; attention kinds alternate, and MLP kinds in another rhythm."""
    lists = {}
    for name in ("layer_types", "mlp_layer_types"):
        if name in names and (default := getattr(_default(config_class), name)):
            kinds = KINDS.get(frozenset(default), list(dict.fromkeys(default)))
            if "sliding_window" in names and kinds == ["full_attention"]:
                kinds = ["sliding_attention", "full_attention"]
            rhythm = range(LAYERS) if name == "layer_types" else [(i + 1) // 2 for i in range(LAYERS)]
            lists[name] = [kinds[i % len(kinds)] for i in rhythm]
    return lists


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Weights that matter: matrices by their fan-in; biases, norms and sinks away from what they start with."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    learned = ("bias", "biases", "layer_scalar")  # buffers that are weights; "bias" is a mask's name too
    buffers = [b for name, b in model.named_buffers() if name.endswith(learned) and _is_vector(b)]
    with torch.no_grad():
        for tensor in [*model.parameters(), *buffers]:
            noise = torch.randn(tensor.shape, generator=generator)
            if id(tensor) in embeddings:
                tensor.copy_(noise)
            elif _is_vector(tensor):
                tensor.add_(0.3 * noise)
            else:
                tensor.copy_(noise * 1.25 / tensor.shape[-1] ** 0.5)


def _is_vector(tensor: Tensor) -> bool:
    return tensor.numel() == max(tensor.shape, default=1)


@functools.cache
def shared(model_type: str) -> nn.Module:
    """The model of that type, built once a process: for tests that leave it as it was."""
    return build(model_type)


@functools.cache
def loaded(model_type: str) -> StandardizedTransformer:
    """The same under the standard names, validated once a process."""
    return StandardizedTransformer(shared(model_type))
