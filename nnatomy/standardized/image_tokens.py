"""Which positions of a prompt are an image's, and which patch of it each is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from torch import Tensor

from nnatomy.errors import InputError, NotInThisModelError, a_kind
from nnatomy.whole_number import whole_number


@dataclass(frozen=True)
class ImageTokens:
    """Where one image is in its prompt.

    Attributes:
        prompt: the index of the prompt.
        image: which of that prompt's images.
        positions: (token): its positions, in the batch as it is padded.
        grid: (rows, columns) of its tokens, each of which is a patch; None where they are no grid.
        why: why they are none.
        picture: what the model sees of the image, of bytes: some processors cut off its sides. The rows and columns of patches divide
            it evenly. None where they are no grid, or the image was given as numbers that are no bytes.
    """

    prompt: int
    image: int
    positions: Int[Tensor, " token"]
    grid: tuple[int, int] | None
    why: str = ""
    picture: UInt8[Tensor, "height width 3"] | None = None

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
        """The position of the token of that patch. Raises IndexError if there is none, InputError for no numbers."""
        rows, columns = self.patch_grid
        try:
            row, column = whole_number(row), whole_number(column)
        except TypeError:
            raise InputError(
                f"position_of({row!r}, {column!r}): give whole numbers, of a row and a column of patches."
            ) from None
        if not (-rows <= row < rows and -columns <= column < columns):
            raise IndexError(
                f"The image is of {rows} rows and {columns} columns of patches: there is no ({row}, {column})."
            )
        return int(self.positions[row % rows * columns + column % columns])

    def region(self, rows: slice = slice(None), columns: slice = slice(None)) -> Int[Tensor, " token"]:
        """The positions of the patches in these rows and columns, such as `photo.region(rows=slice(0, 2))`; of all by default.

        Raises:
            NotInThisModelError: if the tokens are no grid of patches.
            InputError: if no patch is there, or rows or columns are no slice of whole numbers.
        """
        for name, one in (("rows", rows), ("columns", columns)):
            if not _is_slice(one):
                raise InputError(
                    f"{name}={one!r}: give a slice of whole numbers, not backwards, such as slice(0, 2) for the first two."
                )
        found = self.positions.unflatten(0, self.patch_grid)[rows, columns].flatten()
        if not len(found):
            raise InputError(
                "The image is of {} rows and {} columns of patches: none is in rows {} and columns {}.".format(
                    *self.patch_grid, rows, columns
                )
            )
        return found

    def arranged(self, values: Shaped[Tensor, ...], axis: int = -1) -> Shaped[Tensor, ...]:
        """Values by position as they lie in the picture: the axis of positions becomes two, of rows and columns.

        Args:
            values: of one prompt: `pattern[head, -1]` of (key), a lens's (layer, position, vocab), ...
            axis: that of positions, of the prompt as it is padded in its batch.

        Raises:
            NotInThisModelError: if the tokens are no grid of patches.
            InputError: if the axis is shorter than the prompt, or the values are no tensor.

        Example (of a model `vlm` that reads images):
            photo, = vlm.image_tokens(prompt, images=picture)
            with vlm.trace(prompt, images=picture):
                pattern = vlm.attention_probabilities[5]
            seen = photo.arranged(pattern[photo.prompt, :, -1])    # (head, row, column): what the last position attends to
        """
        grid = self.patch_grid
        if not isinstance(values, Tensor):
            raise InputError(f"values is {a_kind(values)}: give a tensor, torch.as_tensor(values).")
        try:
            axis = whole_number(axis)
        except TypeError:
            raise InputError(f"axis={axis!r}: give the number of the axis of positions.") from None
        if values.ndim <= (axis if axis >= 0 else -axis - 1) or values.shape[axis] <= int(self.positions.max()):
            raise InputError(
                f"values of shape {tuple(values.shape)} have no axis {axis} with a place for each position up to "
                f"{int(self.positions.max())}."
            )
        return values.index_select(axis, self.positions.to(values.device)).unflatten(axis, grid)


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


def _is_slice(one: Any) -> bool:
    """Whether it is a slice that a list takes."""
    if not isinstance(one, slice):
        return False
    try:
        return one.indices(1)[2] > 0
    except (TypeError, ValueError):
        return False


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


def picture_seen(reader: Any, inputs: dict[str, Any], image: Any) -> UInt8[Tensor, "height width 3"] | None:
    """What the model sees of one image that is processed by itself, where its patches are a grid; None where nobody can tell.

    Args:
        reader: the image processor.
        inputs: what it makes of the image.
        image: as it was given.
    """
    pixels = inputs.get("pixel_values")
    if not getattr(reader, "do_rescale", False) and np.array(image).dtype != np.uint8:
        return None
    if isinstance(pixels, Tensor) and pixels.ndim == 4 and pixels.shape[:2] == (1, 3):
        shown = pixels[0].double().permute(1, 2, 0)
        if getattr(reader, "do_normalize", False):
            mean, std = (torch.as_tensor(one, dtype=torch.double) for one in (reader.image_mean, reader.image_std))
            shown = shown * std + mean
        if getattr(reader, "do_rescale", False):
            shown = shown / reader.rescale_factor
        return shown.round().clamp(0, 255).to(torch.uint8)
    whole = torch.as_tensor(np.array(image))
    if whole.dtype != torch.uint8 or getattr(reader, "do_center_crop", False):
        return None
    return whole if whole.shape[-1] == 3 else whole.permute(1, 2, 0)  # (patches of all of it, at another size)
