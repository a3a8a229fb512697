"""The two halves of guidance: what the denoiser says with the prompt, and without.

A pipeline computes them as rows of one batch, or in two calls of the denoiser in each step. Which is which is found at load, by the
formula of guidance, from the values (`validation`); whether a run has both is read off its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from nnatomy.core.points import Collector, Slot
from nnatomy.errors import InputError, NotInThisModelError, NotReachedError

if TYPE_CHECKING:
    from nnatomy.diffusion.accessors import At

Half = Literal["conditional", "unconditional"]


class Halves(NamedTuple):
    """How a pipeline guides.

    Attributes:
        how: in the rows of one batch, in calls of their own, or not at all.
        order: which comes first.
        why_not: where nothing is known of it.
    """

    how: Literal["rows", "calls", "none"]
    order: tuple[Half, Half] = ("unconditional", "conditional")
    why_not: str = ""

    def call(self, half: Half | None) -> int:
        """Which call of a module in a step is that half's."""
        return self.order.index(half) if self.how == "calls" and half is not None else 0

    def rows(self, half: Half | None, name: str, count: int, images: int) -> slice:
        """The rows of that half, of a value of `count` rows."""
        if half is None:
            return slice(None)
        if self.how == "calls":
            return slice(None)
        if count == images:  # no guidance in this run
            if half == "conditional":
                return slice(None)
            raise NotReachedError(
                f"unconditional.{name}: this run has no guidance, so the denoiser is given the prompt alone: generate with a "
                "guidance_scale above 1."
                if self.how == "rows"
                else f"unconditional.{name}: {self.why_not or 'the pipeline has no guidance that is a sum of two predictions'}."
            )
        if self.how != "rows" or count != 2 * images:
            raise NotInThisModelError(
                f"{half}.{name}: there are {count} rows for {images} pictures, and nobody can tell which are that half's: "
                f"read {name} of all."
            )
        first = self.order.index(half) * images
        return slice(first, first + images)


class Given(Collector):
    """What a run was given.

    Attributes:
        images: how many pictures.
        stage: the call of its pipeline (`stage.Stage`).
        lengths: by step and call, how many tokens the streams of the picture and of the text have.
        whole: a name that was asked for of the step as a whole, and not of a half.
        whole_text: the same of where the text stands.
    """

    def __init__(self, images: int, stage: Any, streams: tuple[At, At] | None) -> None:
        self.modules = set() if streams is None else {streams[0].module}
        self.kinds = {} if streams is None else {"input": None}
        self._streams = streams
        self.lengths: dict[tuple[int, int], tuple[int, int]] = {}
        self.images = images
        self.stage = stage
        self.whole = ""
        self.whole_text = ""

    def take(self, slot: Slot) -> None:
        if self._streams is not None:
            image, text = (one.get(slot.value).shape[1] for one in self._streams)
            self.lengths[slot.step, slot.call] = image, text
            self.check_text(slot.step)

    def check_text(self, step: int) -> None:
        """Raise InputError if it was asked of the step as a whole where the text stands, and its calls have texts of two lengths."""
        if self.whole_text and len({one for (when, _), one in self.lengths.items() if when == step}) > 1:
            raise InputError(
                f"{self.whole_text} was asked for, and the halves of guidance have texts of different lengths: write which is meant, "
                "model.conditional or model.unconditional."
            )


def given_to(run: Any) -> Given:
    """What that run was given."""
    return next(one for one in run.collectors if isinstance(one, Given))


def put_rows(whole: Tensor, rows: slice, new: Tensor) -> Tensor:
    """The whole with other rows."""
    if rows == slice(None):
        return new
    return torch.cat([whole[: rows.start], new, whole[rows.stop :]])
