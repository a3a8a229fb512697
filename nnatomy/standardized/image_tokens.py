"""Which positions of a prompt are an image's, and which patch of it each is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nnatomy.errors import NotInThisModelError


@dataclass(frozen=True)
class ImageTokens:
    """Where one image is in its prompt.

    Attributes:
        prompt: the index of the prompt.
        image: which of that prompt's images.
        positions: (token): its positions, in the batch as it is padded.
        grid: (rows, columns) of its tokens, each of which is a patch; None where they are no grid.
        why: why they are none.
    """

    prompt: int
    image: int
    positions: Int[Tensor, " token"]
    grid: tuple[int, int] | None
    why: str = ""

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns): `layers_output[i][prompt, positions].unflatten(0, patch_grid)` is the image's picture of a layer.

        Raises:
            NotInThisModelError: if the tokens are no grid of patches.
        """
        if self.grid is None:
            raise NotInThisModelError(f"patch_grid of image {self.image} of prompt {self.prompt}: {self.why}")
        return self.grid

    def position_of(self, row: int, column: int) -> int:
        """The position of the token of that patch. Raises IndexError if there is none."""
        rows, columns = self.patch_grid
        if not (-rows <= row < rows and -columns <= column < columns):
            raise IndexError(
                f"The image is of {rows} rows and {columns} columns of patches: there is no ({row}, {column})."
            )
        return int(self.positions[row % rows * columns + column % columns])


def grid_of(inputs: dict[str, Any], merge: int, is_image: Bool[Tensor, " seq"]) -> tuple[tuple[int, int] | None, str]:
    """(rows, columns) of the tokens of one image that is processed by itself; or why they are no grid."""
    count = int(is_image.sum())
    if (thw := inputs.get("image_grid_thw", inputs.get("grid_thw"))) is not None:
        frames, rows, columns = (int(one) for one in torch.as_tensor(thw).reshape(-1, 3)[0])
        rows, columns = rows // merge, columns // merge
        if frames == 1 and rows * columns == count:
            return (rows, columns), ""
        return None, f"it is of {frames} frames of {rows} by {columns} patches, and of {count} tokens."
    pixels = inputs.get("pixel_values")
    shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else ()
    if len(shape) != 4 or shape[0] != 1:
        return (
            None,
            f"its {count} tokens are made of pixel values of shape {shape}: of several tiles, or nobody can tell of what.",
        )
    runs = _runs(is_image)
    if len(runs) > 1:
        gaps = {start - (before + length) for (before, length), (start, _) in itertools.pairwise(runs)}
        if len({length for _, length in runs}) == 1 and gaps == {1}:
            return (len(runs), runs[0][1]), ""  # a token ends each row
        return None, "its tokens are of no rows of one length."
    side = round(count**0.5)
    if shape[-1] == shape[-2] and side * side == count:
        return (side, side), ""
    return (
        None,
        f"it is {count} tokens made of {shape[-2]} by {shape[-1]} pixels: nobody can tell which are of one row.",
    )


def _runs(is_image: Bool[Tensor, " seq"]) -> list[tuple[int, int]]:
    """The start and length of each run of positions."""
    positions = is_image.nonzero().flatten().tolist()
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and position == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((position, 1))
    return runs
