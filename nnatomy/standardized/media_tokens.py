"""Which positions of a prompt are a video's or a sound's; and of each image, video and sound, whose its positions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nnatomy.errors import InputError, NotInThisModelError, counted
from nnatomy.standardized.media_kinds import Kind
from nnatomy.whole_number import whole_number


@dataclass(frozen=True)
class VideoTokens:
    """Where one video is in its prompt.

    Attributes:
        prompt: the index of the prompt.
        video: which of that prompt's videos.
        positions: (token): its positions, in the batch as it is padded.
        grid: (frames, rows, columns) of its tokens; a frame may be several of the video's, which are read together. None where they
            are no grid.
        why: why they are none.
    """

    prompt: int
    video: int
    positions: Int[Tensor, " token"]
    grid: tuple[int, int, int] | None
    why: str = ""

    @property
    def patch_grid(self) -> tuple[int, int, int]:
        """(frames, rows, columns): `layers_output[i][prompt, positions].unflatten(0, patch_grid)` is the video of a layer.

        Raises:
            NotInThisModelError: if the tokens are no grid of patches.
        """
        if self.grid is None:
            raise NotInThisModelError(f"patch_grid of video {self.video} of prompt {self.prompt}: {self.why}")
        return self.grid

    def position_of(self, frame: int, row: int, column: int) -> int:
        """The position of the token of that patch. Raises IndexError if there is none, InputError for no numbers."""
        grid = self.patch_grid
        given = (frame, row, column)
        try:
            at = tuple(map(whole_number, given))
        except TypeError:
            raise InputError(
                f"position_of{given!r}: give whole numbers, of a frame, a row and a column of patches."
            ) from None
        if any(not -size <= index < size for index, size in zip(at, grid, strict=True)):
            raise IndexError(
                "The video is of {} frames of {} rows and {} columns of patches: there is no {}.".format(*grid, at)
            )
        places = self.positions.unflatten(0, grid)
        return int(places[at])


@dataclass(frozen=True)
class AudioTokens:
    """Where one sound is in its prompt.

    Attributes:
        prompt: the index of the prompt.
        sound: which of that prompt's sounds.
        positions: (token): its positions, in the batch as it is padded, in the order of time.
    """

    prompt: int
    sound: int
    positions: Int[Tensor, " token"]


@dataclass(frozen=True)
class Alone:
    """One image, video or sound by itself.

    Attributes:
        given: as it was given.
        inputs: what the processor makes of it.
    """

    given: Any
    inputs: dict[str, Any]


def shared(
    is_one: Bool[Tensor, "batch seq"], alone: Sequence[Sequence[Alone]], token_id: int, kind: Kind
) -> list[tuple[int, int, Tensor, Alone, Tensor]]:
    """Whose the positions are.

    Args:
        is_one: which positions are any one's of this kind.
        alone: of each prompt, each by itself.
        token_id: the id of the token that stands for a piece of one.

    Returns:
        Of each: its prompt, its number there, its positions, itself alone, and which tokens of that are its own.

    Raises:
        InputError: if these are not as many tokens as the prompt has.
    """
    found = []
    for prompt, items in enumerate(alone):
        positions = is_one[prompt].nonzero().flatten().cpu()
        masks = [one.inputs["input_ids"][0] == token_id for one in items]
        counts = [int(mask.sum()) for mask in masks]
        if sum(counts) != len(positions):
            raise InputError(
                f"Prompt {prompt} has {counted(len(positions), 'token')} of {kind.name}s, and its {kind.name}s by themselves are "
                f"{counts}: nobody can tell whose they are."
            )
        parts = positions.split(counts)
        found += [
            (prompt, i, part, one, mask) for i, (part, one, mask) in enumerate(zip(parts, items, masks, strict=True))
        ]
    return found


def video_grid(inputs: dict[str, Any], merge: int, count: int) -> tuple[tuple[int, int, int] | None, str]:
    """(frames, rows, columns) of the tokens of one video that is processed by itself; or why they are no grid.

    Args:
        merge: how many patches of the processor's, in each direction, are one token.
        count: how many tokens there are.
    """
    if (thw := inputs.get("video_grid_thw")) is None:
        return None, f"its processor does not say of how many frames, rows and columns its {count} tokens are."
    frames, rows, columns = torch.as_tensor(thw).reshape(-1, 3).unbind(-1)
    if len({*zip(rows.tolist(), columns.tolist(), strict=True)}) > 1:
        return None, "its frames are of several sizes."
    grid = int(frames.sum()), int(rows[0]) // merge, int(columns[0]) // merge
    if grid[0] * grid[1] * grid[2] != count:
        return None, f"it is of {grid[0]} frames of {grid[1]} by {grid[2]} patches, and of {count} tokens."
    return grid, ""
