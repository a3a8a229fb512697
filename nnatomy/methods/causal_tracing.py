"""Causal tracing: where a fact about a subject is restored, once the subject has been drowned in noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.methods.activation_patching import Grid, Patching, measured
from nnatomy.methods.arguments import method
from nnatomy.methods.metrics import Metric, probability
from nnatomy.methods.pairs import Pairs, Positions
from nnatomy.methods.patched_runs import PatchedRuns
from nnatomy.methods.points import accessor_of, layers_of, layers_with
from nnatomy.methods.prompts import plain
from nnatomy.methods.result import name_of
from nnatomy.methods.tokens import refuse_encoder_decoder
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.annotations import PointName
from nnatomy.standardized.positions import numbers

#: Of how many tokens, evenly spaced in the vocabulary, the embeddings' standard deviation is taken.
_SAMPLE = 8192


@method
@torch.no_grad()
def causal_tracing(
    model: StandardizedTransformer,
    prompt: Any,
    *,
    subject: str | int | Sequence[int],
    metric: Metric | None = None,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    point: PointName = "layers_output",
    window: int = 1,
    layers: int | Sequence[int] | None = None,
    positions: Positions = "each",
    batch_size: int | None = None,
    progress: bool = True,
) -> Patching:
    """Noise on the subject's token embeddings, one clean state put back: what becomes of the prediction.

    Meng et al., "Locating and Editing Factual Associations in GPT" (2022), section 2.1: the indirect effect of a state,
    averaged over samples of Gaussian noise.

    Args:
        prompt: one prompt.
        subject: the part of the text that is drowned (its first occurrence), or one or several positions; -1 is the last.
        metric: of the logits at the last position; by default the probability of the token that the model predicts
            without noise.
        noise: how large, in standard deviations of the entries of the model's token embeddings.
        samples: how many draws of the noise the effect is averaged over.
        seed: of the draws.
        point: what is restored; the paper's three are "layers_output", "mlps_contribution", "attentions_contribution".
        window: how many layers are restored at once, with the one named in their middle (the paper: 10 for the MLPs' and
            attentions'). The more, the larger the effects, of all layers.
        layers, positions, batch_size, progress: as in `activation_patching`.

    Returns:
        As `activation_patching`, averaged over the samples; `corrupted` is the run with noise. In `tokens` the subject's
            are marked with "*".

    Raises:
        InputError: for several prompts, a subject that is not in it, or what `activation_patching` raises it for.
        NotInThisModelError: for an encoder-decoder.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import causal_tracing
        >>> model = StandardizedTransformer("demo:llama")
        >>> found = causal_tracing(model, "The capital of France is", subject="France")
        >>> bool(found.clean > 0.9), bool(found.corrupted < 0.5), found.effect.shape
        (True, True, torch.Size([8, 5]))
    """
    refuse_encoder_decoder(
        model,
        "causal_tracing adds noise to the token embeddings of a prompt, and those of {} that have a name are its decoder's, while "
        "its encoder reads the prompt. Patch from another prompt: activation_patching(model, clean=..., corrupted=..., "
        "point='encoder_layers_output', metric=...).",
    )
    pairs = Pairs.of(model, prompt, prompt, point)
    if len(pairs.clean) != 1:
        raise InputError(f"Causal tracing takes one prompt; {len(pairs.clean)} were given.")
    tokens, ids = pairs.clean[0], pairs.clean[0].ids
    at = subject_positions(model, prompt, subject, len(ids))
    added = torch.zeros(samples, len(ids), model.hidden_size)
    draws = torch.randn(samples, len(at), model.hidden_size, generator=torch.Generator().manual_seed(seed))
    added[:, at] = noise * embedding_std(model) * draws
    accessor = accessor_of(model, point)
    where = layers_of(accessor, layers)
    windows = [
        [one for one in layers_with(accessor) if -(window // 2) <= one - layer < window - window // 2]
        for layer in where
    ]
    restored = sorted({one for window_of in windows for one in window_of})
    runs = PatchedRuns(model, [tokens] * samples, [tokens] * samples, point, restored, added.to(model.device))
    clean_logits = runs.logits(runs.source_end)
    if metric is None:
        metric = probability(int(clean_logits[0].argmax()))
    grid = Grid(runs, None, positions, pairs.columns(positions))
    effect = grid.effects(metric, windows, batch_size, progress).mean(0)
    marked = tuple(text + "*" * (i in at) for i, text in enumerate(pairs.texts(model)[0]))
    return Patching(
        point,
        effect,
        measured(metric, clean_logits).mean(0),
        measured(metric, runs.logits(runs.base_end)).mean(0),
        tuple(where),
        None,
        grid.positions,
        (marked,),
        runs.shortcut,
        pairs.prompts,
        name_of(metric),
    )


def subject_positions(
    model: StandardizedTransformer, prompt: Any, subject: str | int | Sequence[int], length: int
) -> list[int]:
    """The positions of the tokens that have a part of the subject. Raises InputError if there are none."""
    if not isinstance(subject, str):
        subject = numbers("subject", subject)
        if not subject or not all(-length <= position < length for position in subject):
            raise InputError(f"subject={list(subject)}: give some positions of the prompt's {length} tokens.")
        return [position % length for position in subject]
    text = plain(prompt)
    text = text[0] if isinstance(text, list) else text
    if not isinstance(text, str) or not getattr(model.tokenizer, "is_fast", False):
        raise InputError(
            f"subject={subject!r} is found in a prompt that is text, by a fast tokenizer (which tells each token's place "
            "in it): give the subject's positions."
        )
    begin = text.find(subject)
    if begin < 0 or not subject:
        raise InputError(f"subject={subject!r} is no part of the prompt {text!r}.")
    places = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return [i for i, (a, b) in enumerate(places) if a < begin + len(subject) and b > begin]


def embedding_std(model: StandardizedTransformer) -> Float[Tensor, ""]:
    """The standard deviation of the entries of the token embeddings, as `token_embeddings` shows them."""
    count = int(getattr(model.embed_tokens.module, "num_embeddings", model.vocab_size))
    ids = torch.linspace(0, count - 1, min(count, _SAMPLE), device=model.device, dtype=torch.float64).long()
    return model.embed_tokens(ids[None]).float().std().cpu()
