"""Which parts of a picture attend to which words of its prompt (DAAM)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nnatomy.diffusion.recording import Recorder
from nnatomy.diffusion.runs import check, chosen, generator
from nnatomy.diffusion.transformer import DiffusionTransformer
from nnatomy.diffusion.words import encoders_of, positions_of, segments_of
from nnatomy.errors import InputError, NotInThisModelError, counted


@dataclass(frozen=True)
class WordMaps:
    """How much of its attention each part of a picture gives to each word, by step.

    Attributes:
        maps: the mean over layers and heads of what the part's queries give to the word's tokens, all together.
        words, steps, layers: what the maps are of.
        prompt: of the picture.
        picture: what was drawn (a PIL image), which the maps are drawn over.
    """

    maps: Float[Tensor, "step word height width"]
    words: tuple[str, ...]
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    prompt: str
    picture: Any

    def map(self, word: str, step: int | None = None) -> Float[Tensor, "height width"]:
        """Of one word, in one step; the mean over the steps if None.

        Raises:
            InputError: for a word or step of which there is none.
        """
        if word not in self.words:
            raise InputError(f"word={word!r}: there are maps of {', '.join(self.words)}.")
        of_word = self.maps[:, self.words.index(word)]
        if step is None:
            return of_word.mean(0)
        if step not in self.steps:
            raise InputError(f"step={step!r}: there are maps of the steps {', '.join(map(str, self.steps))}.")
        return of_word[self.steps.index(step)]

    def plot(self, words: str | Sequence[str] | None = None, step: int | None = None, title: str | None = None) -> Any:
        """The maps over the picture, one beside the other, as a plotly figure. The picture alone comes first.

        Args:
            words: all if None.
            step: the mean over the steps if None.
        """
        from nnatomy.plots import over_picture

        wanted = [words] if isinstance(words, str) else list(self.words if words is None else words)
        when = "all steps" if step is None else f"step {step}"
        return over_picture(
            self.picture,
            {word: self.map(word, step) for word in wanted},
            title=f"{self.prompt} ({when})" if title is None else title,
            value_name="attention",
            smooth=True,
        )

    def __repr__(self) -> str:
        height, width = self.maps.shape[2:]
        return f"<maps of {', '.join(self.words)}: {counted(len(self.steps), 'step')}, {height} x {width}>"


@torch.no_grad()
def word_maps(
    model: DiffusionTransformer,
    prompt: Any,
    words: Iterable[str] | None = None,
    *,
    layers: Iterable[int] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> WordMaps:
    """Draw a picture, and collect which of its parts attend to which words of the prompt, in each step.

    Tang et al., "What the DAAM: Interpreting Stable Diffusion Using Cross Attention" (2023), eq. 4: cross-attention of the half of
    guidance that has the prompt, each layer's brought to the size of the finest by interpolation. Where picture and text are
    attended to jointly, what the picture's queries give to the text's keys is taken in its place.

    Args:
        words: of the prompt; all of its words if None.
        layers: all that attend to the text, if None.
        seed: of the noise.
        **kwargs: go to the pipeline: num_inference_steps, guidance_scale, ...

    Raises:
        InputError: for several prompts, a word that is not in the prompt, or a layer that does not attend to the text.
        NotInThisModelError: for a pipeline without attention to a text.
    """
    check(model, "word_maps", prompt, kwargs)
    if not isinstance(prompt, str):
        raise InputError(f"prompt={prompt!r:.40}: word_maps takes a text.")
    if words is not None and not (isinstance(words, Iterable) and all(isinstance(one, str) for one in words)):
        raise InputError(f"words={words!r:.40}: give a list of words of the prompt.")
    wanted = list(
        dict.fromkeys(re.findall(r"\w+", prompt) if words is None else [words] if isinstance(words, str) else words)
    )
    if not wanted:
        raise InputError(f"words: give at least one of the prompt {prompt!r:.80}.")
    crossing = model.conditional.cross_attention_probabilities
    joint = [i for i in range(model.num_layers) if model.text_first(i) is not None]
    if not (crossing.layers or joint):
        raise NotInThisModelError("word_maps: no layer of this pipeline attends to a text.")
    used = chosen("layers", layers, crossing.layers or joint)
    recorder = Recorder([model.pipeline.components[name] for name in encoders_of(model)], steps=1)
    found: list[list[Tensor]] = []
    text: Tensor | None = None
    with model.generate(prompt, generator=generator(seed), output_type="pil", **kwargs) as tracer:
        tracer.block.run.collect(recorder)
        for _ in tracer.iter[:]:
            if text is None:
                text = model.conditional.text_given
            found.append([_to_text(model, i, bool(crossing.layers)) for i in used])
        picture = tracer.result.images[0]
    assert text is not None
    segments = segments_of(model, recorder, text)
    if not segments:
        raise NotInThisModelError("word_maps: what the denoiser is given of the text is not what a text encoder gives.")
    places = [positions_of(word, prompt, segments) for word in wanted]
    ratio = picture.height / picture.width
    grids = [_grid(one.shape[0], ratio) for one in found[0]]
    finest = max(grids)
    steps = [
        torch.stack(
            [
                F.interpolate(
                    torch.stack([one[:, place].sum(-1) for place in places]).unflatten(1, grid)[None],
                    size=finest,
                    mode="bilinear",
                )[0]
                for one, grid in zip(of_layers, grids, strict=True)
            ]
        ).mean(0)
        for of_layers in found
    ]
    return WordMaps(torch.stack(steps), tuple(wanted), tuple(range(len(steps))), tuple(used), prompt, picture)


def _to_text(model: DiffusionTransformer, layer: int, crosses: bool) -> Float[Tensor, "query key"]:
    """What a layer's queries of the picture give to the text's keys, the mean over heads."""
    half = model.conditional
    if crosses:
        return half.cross_attention_probabilities[layer][0].float().mean(0).cpu()
    pattern = half.attention_probabilities[layer][0].float().mean(0).cpu()
    text = half.text_tokens(layer)
    of_picture = torch.ones(pattern.shape[0], dtype=torch.bool)
    of_picture[text] = False
    return pattern[of_picture][:, text]


def _grid(count: int, ratio: float) -> tuple[int, int]:
    """Rows and columns of so many parts of a picture, whose height is `ratio` times its width."""
    rows = round((count * ratio) ** 0.5)
    if not rows or count % rows:
        raise NotInThisModelError(f"word_maps: {count} parts of a picture are no grid of its shape.")
    return rows, count // rows
