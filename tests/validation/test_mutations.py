"""The test of the validator: each fact about an architecture, broken on purpose, one at a time.

A mutation is caught if the model does not load, or if every name that has become wrong is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from architectures import shared
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.core.points import Report
from nnatomy.errors import ValidationError
from nnatomy.names import MID, MIXERS, MLPS, SUMS
from nnatomy.standardized import attention, contributions, head, shown, transformer
from nnatomy.standardized.accessors import LayerAccessor, output_of

Patch = pytest.MonkeyPatch


@functools.cache
def of_dtype(model_type: str, dtype: torch.dtype) -> Any:
    hf = zoo.build(model_type) if model_type == "falcon_h1" else shared(model_type)
    return hf if dtype == torch.float32 else copy.deepcopy(hf).to(dtype)


def load(model_type: str, dtype: torch.dtype = torch.float32) -> StandardizedTransformer:
    return StandardizedTransformer(of_dtype(model_type, dtype))


def caught(model_type: str, names: tuple[str, ...], dtype: torch.dtype = torch.float32) -> bool:
    try:
        report = load(model_type, dtype).validation
    except ValidationError:
        return True
    rows = [row for row in report if row.name in names]
    assert rows
    return all(row.status == "refused" for row in rows)


# Where the modules are.


def anatomy(change: Callable[[Any], dict[str, Any]]) -> Callable[[Patch], None]:
    def mutate(patch: Patch) -> None:
        resolve = transformer.resolve

        def wrong(*args: Any) -> Any:
            right = resolve(*args)
            return dataclasses.replace(right, inferred=False, **change(right))

        patch.setattr(transformer, "resolve", wrong)

    return mutate


def layers(order: Callable[[Any], list[int]]) -> Callable[[Patch], None]:
    per_layer = ("layers", "attentions", "mlps", "mixers", "kinds")

    def change(a: Any) -> dict[str, Any]:
        chosen = order(range(len(a.layers)))
        absent = {what: tuple(why[i] for i in chosen) for what, why in a.absent.items()}
        return {name: tuple(getattr(a, name)[i] for i in chosen) for name in per_layer} | {"absent": absent}

    return anatomy(change)


def each_layers(name: str, path: str) -> Callable[[Patch], None]:
    return anatomy(lambda a: {name: tuple(layer.get_submodule(path) for layer in a.layers)})


def rolled(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*values[1:], values[0])


# What a tap shows.


class Mutant(Report):
    """Shows another tensor than is there, and takes what is written to it for what is there."""

    def __new__(
        cls, report: Report, kind: str, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Any:
        mutant: Any = super().__new__(cls, *report)
        mutant._report, mutant._kind, mutant._there, mutant._back = report, kind, there, back
        return mutant

    def __call__(self, tensor: Tensor, kind: str, *rest: Any) -> Any:
        if kind != self._kind:
            return self._report(tensor, kind, *rest)
        wrong = self._there(tensor.clone())
        slot = self._report(wrong, kind, *rest)
        return SimpleNamespace(value=tensor if slot.value is wrong else self._back(slot.value))


def shows(
    kind: str, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Patch], None]:
    back = back or (lambda value: value)

    def mutate(patch: Patch) -> None:
        mode: Any = shown.ShowMode if kind in SUMS else attention.AttentionMode
        init = mode.__init__

        def wrong(self: Any, one: Any, other: Any, report: Any, *split: Any, **more: Any) -> None:
            init(self, one, other, Mutant(report, kind, there, back), *split, **more)

        patch.setattr(mode, "__init__", wrong)
        show = contributions._Layer._show

        def record(self: Any, found: Any, name: str, summand: Any) -> None:
            show(self, found, name, summand)
            if name == kind:
                found.values[name] = there(found.values[name].clone())

        patch.setattr(contributions._Layer, "_show", record)

    return mutate


def scaled(factor: float) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return lambda x: x * factor, lambda x: x / factor


def flipped(axis: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return lambda x: x.flip(axis), lambda x: x.flip(axis)


def moved(axis: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return lambda x: x.roll(1, axis), lambda x: x.roll(-1, axis)


def resplit(x: Tensor) -> Tensor:
    """Heads and positions taken apart in the wrong order."""
    return x.transpose(1, 2).reshape(x.shape)


def unresplit(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    return x.reshape(b, s, h, d).transpose(1, 2)


def interleaved(x: Tensor) -> Tensor:
    """Each head's halves taken for pairs."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def uninterleaved(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def swapped_sums(patch: Patch) -> None:
    """What the mixer adds is taken for the MLP's, and the other way round."""
    sums = contributions._Layer.sums
    other = {MIXERS: MLPS, MLPS: MIXERS}

    def wrong(self: Any) -> Any:
        found = sums(self)
        found.values = {other.get(name, name): value for name, value in found.values.items()}
        for place, names in found.shown.items():
            found.shown[place] = [(other.get(name, name), which) for name, which in names]
        return found

    patch.setattr(contributions._Layer, "sums", wrong)


def mid_before(patch: Patch) -> None:
    """The stream before the mixer's addition taken for that after it."""
    show_mid, add = contributions._Layer._show_mid, contributions._Layer._add

    def wrong(self: Any, found: Any, name: str, addition: Any, place: int | None) -> None:
        add(self, found, name, addition, addition.places[0] if name == MID else place)
        return

    def mid(self: Any, found: Any, mixing: Any, rest: Any) -> None:
        show_mid(self, found, mixing, rest)
        if MID in found.values:
            found.values[MID] = mixing[0][0].operands[0]

    patch.setattr(contributions._Layer, "_add", wrong)
    patch.setattr(contributions._Layer, "_show_mid", mid)


# The head.


def heads(way: str, wrong: Callable[[Any, Any], Callable[[Any, Tensor], Tensor]]) -> Callable[[Patch], None]:
    def mutate(patch: Patch) -> None:
        right = getattr(head.Head, way)
        patch.setattr(head.Head, way, wrong(right, None))

    return mutate


def always_short(patch: Patch) -> None:
    patch.setattr(head.Head, "short", property(lambda self: True, lambda self, value: None), raising=False)


# The accessors.


def accessor(name: str, **changes: Any) -> Callable[[Patch], None]:
    def mutate(patch: Patch) -> None:
        init = LayerAccessor.__init__

        def wrong(self: Any, row: Any, modules: Any, blocks: Any, **rest: Any) -> None:
            init(self, row, modules, blocks, **rest)
            if row.name == name:
                vars(self).update(changes)

        patch.setattr(LayerAccessor, "__init__", wrong)

    return mutate


MUTATIONS: dict[str, tuple[str, Callable[[Patch], None], tuple[str, ...]]] = {
    "the first layer left out": ("llama", layers(lambda n: [*n][1:]), ()),
    "the last layer left out": ("gpt2", layers(lambda n: [*n][:-1]), ()),
    "two layers exchanged": ("qwen3", layers(lambda n: [1, 0, *n[2:]]), ()),
    "the attention of the next layer": (
        "mistral",
        anatomy(lambda a: {"attentions": rolled(a.attentions)}),
        (),
    ),
    "the MLP of the next layer": ("gemma", anatomy(lambda a: {"mlps": rolled(a.mlps)}), ()),
    "the MLP for the attention": ("starcoder2", anatomy(lambda a: {"attentions": a.mlps}), ()),
    "the query projection for the attention": ("phi3", each_layers("attentions", "self_attn.qkv_proj"), ()),
    "the output projection for the attention": ("olmo2", each_layers("attentions", "self_attn.o_proj"), ()),
    "the norm after the MLP for the MLP": ("gemma2", each_layers("mlps", "post_feedforward_layernorm"), ()),
    "the norm before the MLP for the MLP": ("gpt_neox", each_layers("mlps", "post_attention_layernorm"), ()),
    "the shared expert for the MLP": ("qwen2_moe", each_layers("mlps", "mlp.shared_expert"), ()),
    "the down projection for the MLP": ("granite", each_layers("mlps", "mlp.down_proj"), ()),
    "one of two token mixers": (
        "falcon_h1",
        anatomy(lambda a: {"mixers": tuple((m,) for m in a.attentions)}),
        (),
    ),
    "a norm inside for the final norm": (
        "stablelm",
        anatomy(lambda a: {"ln_final": a.layers[-1].input_layernorm}),
        (),
    ),
    "a matrix inside for the unembedding": (
        "cohere",
        anatomy(lambda a: {"lm_head": a.layers[0].mlp.down_proj}),
        (),
    ),
    "positions for tokens": (
        "opt",
        anatomy(lambda a: {"embed_tokens": PLACE_OF_POSITIONS(a)}),
        (),
    ),
    "a multiplier of the attention forgotten": ("granite", shows("mixers_contribution", *scaled(5.0)), SUMS),
    "a multiplier of the MLP forgotten": ("granite", shows("mlps_contribution", *scaled(5.0)), SUMS),
    "a norm after the MLP forgotten": (
        "gemma2",
        shows("mlps_contribution", lambda x: x * x.square().mean(-1, keepdim=True).sqrt()),
        SUMS,
    ),
    "a norm after the attention forgotten": (
        "glm4",
        shows("mixers_contribution", lambda x: x * x.square().mean(-1, keepdim=True).sqrt()),
        SUMS,
    ),
    "what another prompt adds": ("mixtral", shows("mlps_contribution", *flipped(0)), SUMS),
    "what another position adds": ("bloom", shows("mixers_contribution", *moved(1)), SUMS),
    "mixer and MLP exchanged": ("llama", swapped_sums, SUMS),
    "the stream before the mixer for that after": ("olmo2", mid_before, ("layers_mid",)),
    "queries of other heads": ("llama", shows("queries", *flipped(1)), ()),
    "keys of other heads": ("qwen3", shows("keys", *flipped(1)), ()),
    "values of other heads": ("mistral", shows("values", *flipped(1)), ()),
    "queries split in the wrong order": ("phi3", shows("queries", resplit, unresplit), ()),
    "keys split in the wrong order": ("starcoder2", shows("keys", resplit, unresplit), ()),
    "values split in the wrong order": ("gpt2", shows("values", resplit, unresplit), ()),
    "halves of a key for pairs": ("gptj", shows("keys", interleaved, uninterleaved), ()),
    "halves of a value for pairs": ("gpt_neox", shows("values", interleaved, uninterleaved), ()),
    "queries of other positions": ("stablelm", shows("queries", *moved(2)), ()),
    "scores without their scale": ("mixtral", shows("attention_scores", *scaled(2.0)), ()),
    "scores without their cap": (
        "gemma2",
        shows("attention_scores", lambda x: 2 * x.clamp(-5, 5).sinh() / 2 + x.clamp(max=-5) + 5),
        (),
    ),
    "a pattern without the sink": (
        "gpt_oss",
        shows("attention_probabilities", lambda x: x / x.sum(-1, keepdim=True)),
        (),
    ),
    "a pattern of other heads": ("bloom", shows("attention_probabilities", *flipped(1)), ()),
    "a pattern before the mask": (
        "gpt_neo",
        shows("attention_probabilities", lambda x: (x + 0.01) / (x + 0.01).sum(-1, keepdim=True)),
        (),
    ),
    "a pattern with query and key exchanged": (
        "mpt",
        shows("attention_probabilities", lambda x: x.mT, lambda x: x.mT),
        (),
    ),
    "weighted values of other heads": ("qwen3", shows("values_weighted", *flipped(1)), ()),
    "weighted values of other keys": ("llama", shows("values_weighted", *flipped(3)), ()),
    "weighted values of which more comes than is written": (
        "gpt2",
        shows("values_weighted", lambda x: x, lambda x: 2 * x),
        (),
    ),
    "what other heads give": ("phi", shows("heads_output", *flipped(2)), ()),
    "what heads give, split in the wrong order": (
        "cohere",
        shows("heads_output", interleaved, uninterleaved),
        (),
    ),
    "a head without the final norm": (
        "llama",
        heads("short_way", lambda _, __: lambda self, h: self._anatomy.lm_head(h)),
        (),
    ),
    "a head without its cap": (
        "gemma2",
        heads("long_way", lambda right, _: lambda self, h: 2 * torch.atanh(right(self, h) / 2)),
        (),
    ),
    "a head without its scale": (
        "cohere",
        heads("long_way", lambda right, _: lambda self, h: right(self, h) / 0.25),
        (),
    ),
    "the short way where there is a scale": ("granite", always_short, ()),
    "a head without its bias": (
        "phi",
        heads(
            "short_way",
            lambda _, __: lambda self, h: self._anatomy.ln_final(h) @ self._anatomy.lm_head.weight.mT,
        ),
        (),
    ),
    "a layer's input read after it": ("gemma", accessor("layers_input", kind="output", get=output_of), ()),
    "writes that do not arrive": ("qwen2", accessor("mlps_output", put=lambda value, _: value), ()),
    "the first prompt for all": (
        "bloom",
        accessor("layers_output", get=lambda value: value[0][:1].expand_as(value[0])),
        (),
    ),
}


def PLACE_OF_POSITIONS(a: Any) -> Any:
    """OPT's embedding of positions."""
    dtype = a.embed_tokens.weight.dtype
    return of_dtype("opt", dtype).model.decoder.embed_positions


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_broken_is_caught(mutation: str, monkeypatch: Patch) -> None:
    model_type, mutate, names = MUTATIONS[mutation]
    assert load(model_type).validation.counts["failed"] == 0
    mutate(monkeypatch)
    assert caught(model_type, names or ("layers_output",))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_it_is_caught_in_half_precision(mutation: str, monkeypatch: Patch) -> None:
    """Where what is wrong can be as small as rounding is, the sums, in the coarser one."""
    model_type, mutate, names = MUTATIONS[mutation]
    dtype = torch.bfloat16 if names else torch.float16
    assert load(model_type, dtype).validation.counts["failed"] == 0
    mutate(monkeypatch)
    assert caught(model_type, names or ("layers_output",), dtype)


def test_they_are_many() -> None:
    assert len(MUTATIONS) >= 30
    assert len({model_type for model_type, _, _ in MUTATIONS.values()}) >= 10
