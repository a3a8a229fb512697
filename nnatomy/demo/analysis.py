"""Analyses of `nnatomy.methods` and a few lines of `model.trace`, none of which knows an architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.methods import SteeringVector, activation_patching, lens_statistics, logit_difference


@dataclass(frozen=True)
class Lens:
    """What each layer would predict after each token of a prompt.

    Attributes:
        tokens: the prompt's tokens.
        top: the most probable next token, by layer and position.
        probs: its probability: (layer, seq).
        last: after the last token, the most probable ones with their probabilities, by layer.
    """

    prompt: str
    tokens: list[str]
    top: list[list[str]]
    probs: Float[Tensor, "layer seq"]
    last: list[list[tuple[str, float]]]


def lens(model: StandardizedTransformer, prompt: str, k: int = 3) -> Lens:
    """The logit lens (nostalgebraist 2020) on every position of one prompt."""
    found = lens_statistics(model, prompt, top_k=k)
    top, probs = found.top_tokens[0], found.top_probabilities[0]  # (layer, seq, k)
    last = zip(top[:, -1].tolist(), probs[:, -1].tolist(), strict=True)
    return Lens(
        prompt,
        found.tokens[0],
        [[found.texts[i] for i in row] for row in top[..., 0].tolist()],
        probs[..., 0],
        [[(found.texts[i], p) for i, p in zip(*row, strict=True)] for row in last],
    )


@dataclass(frozen=True)
class Patching:
    """The effect of putting one activation of a clean run into a corrupted one.

    Attributes:
        effect: by layer and position, how far the logit difference of the two answers moves from the
            corrupted run's (0) to the clean run's (1): (layer, seq).
        before, after: the corrupted run's most probable token without and with the best patch, and its
            probability.
        best: the layer and position of the patch reported as `after`.
    """

    clean: str
    corrupted: str
    answer: str
    wrong: str
    tokens: list[tuple[str, str]]
    effect: Float[Tensor, "layer seq"]
    best: tuple[int, int]
    before: tuple[str, float]
    after: tuple[str, float]


@torch.no_grad()
def patching(
    model: StandardizedTransformer, clean: str, corrupted: str, answer: str, wrong: str, layer: int
) -> Patching:
    """Activation patching (Vig et al. 2020, Meng et al. 2022): a map over layers and positions.

    Args:
        layer: at this layer the most telling position is reported as the single patch.
    """
    metric = logit_difference(answer, wrong, model)
    found = activation_patching(model, clean=clean, corrupted=corrupted, metric=metric, progress=False)
    best = (layer, int(found.normalized[layer].argmax()))
    with model.trace(clean):
        clean_ids = model.input_ids[0]
        clean_state = model.layers_output[layer][:, best[1]]
    with model.trace(corrupted):
        corrupted_ids = model.input_ids[0]
        before = most_probable(model, model.next_token_probs)
    with model.trace(corrupted):
        model.layers_output[layer][:, best[1]] = clean_state
        after = most_probable(model, model.next_token_probs)
    pairs = zip(clean_ids, corrupted_ids, strict=True)
    tokens = [(model.tokenizer.decode(one), model.tokenizer.decode(two)) for one, two in pairs]
    return Patching(clean, corrupted, answer, wrong, tokens, found.normalized, best, before, after)


@dataclass(frozen=True)
class Steering:
    """What adding a direction does to the next token.

    Attributes:
        factors: how much of the direction was added.
        probs: the probabilities of `tokens` at each factor: (factor, token).
        top: the most probable token at each factor, and its probability.
    """

    prompt: str
    source: str
    layer: int
    tokens: tuple[str, str]
    factors: list[float]
    probs: Float[Tensor, "factor token"]
    top: list[tuple[str, float]]


@torch.no_grad()
def steering(
    model: StandardizedTransformer,
    prompt: str,
    toward: Sequence[str],
    away: Sequence[str],
    tokens: tuple[str, str],
    layer: int,
    factors: Sequence[float],
) -> Steering:
    """Steering by a difference of means (Turner et al. 2023; Rimsky et al. 2024).

    The vector is the mean of the stream after `layer` at the last token of the prompts `toward`, less
    that of the prompts `away`; it is added at the last token of `prompt`.
    """

    vector = SteeringVector.from_prompts(model, toward, away, layers=[layer], progress=False)
    ids = [model.tokenizer.encode(token)[0] for token in tokens]
    probs, top = [], []
    for factor in factors:
        with model.trace(prompt):
            vector.apply(model, factor, positions=-1)
            next_token = model.next_token_probs
        probs.append(next_token[0, ids])
        top.append(most_probable(model, next_token))
    source = f"{toward[0]!r} and {len(toward) - 1} more, less {away[0]!r} and {len(away) - 1} more"
    return Steering(prompt, source, layer, tokens, list(factors), torch.stack(probs), top)


def most_probable(model: StandardizedTransformer, probs: Float[Tensor, "batch vocab"]) -> tuple[str, float]:
    """The first prompt's most probable next token, and its probability."""
    best, token = probs[0].max(-1)
    return model.tokenizer.decode(token), float(best)


@torch.no_grad()
def attention(model: StandardizedTransformer, prompt: str, layer: int) -> Float[Tensor, "head query key"]:
    """The attention pattern of one layer."""
    with model.trace(prompt):
        return model.attention_probabilities[layer][0]


@dataclass(frozen=True)
class Results:
    """All of it on one model."""

    name: str
    summary: str
    lenses: list[Lens]
    patching: Patching
    steering: Steering
    attention_layer: int
    attention: Float[Tensor, "head query key"]


COUNTRIES = ("France", "Italy", "Spain", "Germany", "Poland", "Egypt", "Kenya", "Peru")
PROMPT = "The capital of France is"
TWO_HOPS = "The currency of the country whose capital is Tokyo is the"


def analyse(name: str, server: str | None = None) -> Results:
    """Load `demo:name`, here or at a server, and run everything on it."""
    model = StandardizedTransformer(f"demo:{name}", server=server)
    early, middle = model.num_layers // 3, model.num_layers // 2
    return Results(
        name=name,
        summary=f"{type(model.hf_model).__name__}: {model.num_layers} layers, {model.num_heads} heads, "
        f"hidden size {model.hidden_size}",
        lenses=[lens(model, PROMPT), lens(model, TWO_HOPS)],
        patching=patching(model, PROMPT, "The capital of Italy is", " Paris", " Rome", layer=early),
        steering=steering(
            model,
            "The language of Japan is",
            [f"The capital of {country} is" for country in COUNTRIES],
            [f"The language of {country} is" for country in COUNTRIES],
            (" Japanese", " Tokyo"),
            layer=early,
            factors=[0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5],
        ),
        attention_layer=middle,
        attention=attention(model, PROMPT, middle),
    )
