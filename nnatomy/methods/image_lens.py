"""The logit lens at an image's patches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.methods.arguments import check_list, method
from nnatomy.methods.metrics import token_ids
from nnatomy.methods.result import Axis, Result
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.accessors import read_together
from nnatomy.whole_number import whole_number

#: How many logits there are at once: 160 MB in float32.
_LOGITS = 40_000_000


@dataclass(frozen=True, repr=False)
class ImageLens(Result):
    """What each patch of an image would be said to be, were each layer the last.

    Attributes:
        effect: the probability of each word asked for.
        words: their texts.
        best, best_probs: the most probable token, and its probability.
        texts: of each of these tokens, by its id as text.
        picture: what the model sees of the image; None where nobody can tell.
        prompts: the prompt as a text.
    """

    effect: Float[Tensor, "word layer row column"]
    words: tuple[str, ...]
    best: Int[Tensor, "layer row column"]
    best_probs: Float[Tensor, "layer row column"]
    texts: dict[str, str]
    picture: UInt8[Tensor, "height width 3"] | None
    prompts: tuple[str, ...] = ()

    quantity = "probability"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """word, layer, row, column."""
        names = ("layer", "row", "column")
        sizes = zip(names, self.best.shape, strict=True)
        return (Axis("word", self.words), *(Axis(name, range(size)) for name, size in sizes))

    @property
    def title(self) -> str:
        """What it is."""
        return "Logit lens at an image's patches"

    @property
    def unit(self) -> str:
        """Of the numbers."""
        return ""

    def said(self, layer: int) -> list[list[str]]:
        """The most probable token of each patch after a layer, row by row. Raises InputError if there is no such layer."""
        self._check([layer])
        return [[self.texts[str(token)] for token in row] for row in self.best[layer].tolist()]

    def _check(self, layers: Sequence[int]) -> None:
        """Raise InputError for a layer that there is not."""
        count = len(self.best)
        check_list("layers", layers)
        if wrong := [one for one in layers if not -count <= _number(one, count) < count]:
            raise InputError(f"There is no layer {wrong[0]!r}: the lens has {count}, 0 to {count - 1}.")

    def plot(self, word: str | None = None, layers: Sequence[int] | None = None) -> Any:
        """Maps over the picture, one for each layer, as a plotly figure.

        Args:
            word: of which the probability is drawn; by default that of the most probable token, which the hover text names.
            layers: by default six, from the first to the last.

        Raises:
            InputError: for a word of which the lens has not been asked, a layer that there is not, or an image that nobody can draw.
        """
        from nnatomy.plots import over_picture

        if self.picture is None:
            raise InputError(
                "The image was given as numbers that are no bytes: draw `effect` with nnatomy.plots.heat_map."
            )
        if word is not None and word not in self.words:
            known = ", ".join(map(repr, self.words)) or "none"
            raise InputError(f"word={word!r}: the lens has been asked for {known}: image_lens(..., words=[{word!r}]).")
        count = len(self.best)
        if layers is None:
            layers = sorted({round(i * (count - 1) / 5) for i in range(6)})
        self._check(layers)
        values = self.best_probs if word is None else self.effect[self.words.index(word)]
        what = "the most probable token" if word is None else repr(word)
        return over_picture(
            self.picture,
            {f"layer {i}": values[i] for i in layers},
            title=f"{self.title}: {what}",
            value_name="probability",
            hover={f"layer {i}": self.said(i) for i in layers},
        )


@method
@torch.no_grad()
def image_lens(
    model: StandardizedTransformer,
    prompt: Any,
    images: Any,
    *,
    image: int = 0,
    words: Sequence[str | int] = (),
) -> ImageLens:
    """The next-token probabilities read off at an image's patches, after each layer, as they lie in the picture.

    Neo et al., "Towards Interpreting Visual Information Processing in Vision-Language Models" (2024), section 5: in later layers the
    streams at a patch's position are near the tokens of what is there. Each goes through the model's own head, as in
    `logit_lens`. Which token follows a patch in the prompt says nothing: it is one more patch.

    Args:
        prompt, images: as in `model.trace`; one prompt.
        image: which of its images.
        words: tokens whose probabilities are wanted: ids, or texts of one token each (" dog").

    Returns:
        For each word the probability of (layer, row, column), and the most probable token of each patch.

    Raises:
        InputError: for several prompts, no such image, words that are no list, or a word of several tokens.
        NotInThisModelError: if the image's tokens are no grid of patches, or the head cannot be applied.
    """
    if isinstance(words, str) or not isinstance(words, Iterable):
        raise InputError(f"words={words!r}: give a list of them, words=[{words!r}].")
    tokens = model.image_tokens(prompt, images)
    if any(one.prompt for one in tokens):
        raise InputError("image_lens takes one prompt.")
    if not -len(tokens) <= _number(image, len(tokens)) < len(tokens):
        raise InputError(f"image={image!r}: the prompt has {len(tokens)}, 0 to {len(tokens) - 1}.")
    photo = tokens[image]
    grid = photo.patch_grid
    words = list(words)
    wanted = token_ids(words, model).tolist() if words else []
    with model.trace(prompt, images=images, use_cache=False):
        (streams,) = read_together(
            [(model.layers_output, range(model.num_layers))], lambda hidden, _: hidden[0, photo.positions]
        )
    rows = torch.stack([*streams]).flatten(0, 1)
    best, most, of_words = [], [], []
    for part in rows.split(max(1, _LOGITS // model.vocab_size)):
        probs = model.project_on_vocab(part).float().softmax(-1)
        value, token = probs.max(-1)
        best.append(token.cpu())
        most.append(value.cpu())
        of_words.append(probs[:, wanted].T.cpu())
    shape = (model.num_layers, *grid)
    found = torch.cat(best).reshape(shape)
    return ImageLens(
        torch.cat(of_words, 1).reshape(len(wanted), *shape),
        tuple(
            one if isinstance(one, str) else model.tokenizer.decode([token])
            for one, token in zip(words, wanted, strict=True)
        ),
        found,
        torch.cat(most).reshape(shape),
        {str(one): str(model.tokenizer.decode([one])) for one in found.unique().tolist()},
        photo.picture,
        (prompt,) if isinstance(prompt, str) else (),
    )


def _number(given: Any, none: int) -> int:
    """A whole number, or `none`, which there is not, for anything else."""
    try:
        return whole_number(given)
    except TypeError:
        return none
