"""Activation patching by patches of an image, or by regions of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nnatomy.errors import InputError, a_kind
from nnatomy.methods.activation_patching import Grid, measured
from nnatomy.methods.arguments import check_list, method
from nnatomy.methods.metrics import Metric
from nnatomy.methods.pairs import Pairs, gap
from nnatomy.methods.patched_runs import Cells, PatchedRuns
from nnatomy.methods.points import accessor_of, layers_of
from nnatomy.methods.result import Axis, Result, name_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.annotations import PointName
from nnatomy.standardized.image_tokens import ImageTokens
from nnatomy.whole_number import count_of
from nnatomy.words import Mode


@dataclass(frozen=True, repr=False)
class PicturePatching(Result):
    """What patching one region of an image at a time does to a metric.

    Attributes:
        point: the accessor whose values were put in.
        effect: the metric of each patched run, by the region's row and column.
        clean, corrupted: the metric of the unpatched runs.
        layers: those of the axis.
        region: how many rows and columns of patches a region has.
        picture: what the model sees of the image that was given with its tokens; None where nobody can tell.
        metric: its name.
        mode: which run was patched: the corrupted one by "denoising", the clean one by "noising".
    """

    point: str
    effect: Float[Tensor, "layer row column"]
    clean: Float[Tensor, ""]
    corrupted: Float[Tensor, ""]
    layers: tuple[int, ...]
    region: tuple[int, int]
    picture: UInt8[Tensor, "height width 3"] | None
    metric: str = "metric"
    mode: str = "denoising"

    quantity = "change of the metric"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """layer, row, column: of regions."""
        rows, columns = self.effect.shape[1:]
        return (Axis("layer", self.layers), Axis("row", range(rows)), Axis("column", range(columns)))

    @property
    def title(self) -> str:
        """What was patched, and what it was measured by."""
        return f"Patching {self.point} by regions of {self.region[0]} x {self.region[1]} patches ({self.mode}), {self.metric}"

    def _ranked(self) -> Tensor:
        return self.effect - (self.corrupted if self.mode == "denoising" else self.clean)

    @property
    def normalized(self) -> Float[Tensor, "layer row column"]:
        """(effect - corrupted) / (clean - corrupted): 1 where the patched run is as the clean one, 0 as the corrupted.

        Raises InputError where the metric is the same of both.
        """
        return (self.effect - self.corrupted) / gap(self.clean, self.corrupted)

    def plot(self, layers: Sequence[int] | None = None, *, normalized: bool = True) -> Any:
        """Maps over the picture, one for each layer, as a plotly figure.

        Args:
            layers: some of those that were patched; by default six of them, from the first to the last.
            normalized: show `normalized`, not `effect`.

        Raises:
            InputError: for a layer that was not patched, or an image that nobody can draw.
        """
        from nnatomy.plots import over_picture

        if self.picture is None:
            raise InputError(
                "The image was given as numbers that are no bytes: draw `effect` with nnatomy.plots.heat_map."
            )
        if layers is not None:
            check_list("layers", layers)
        else:
            layers = [self.layers[i] for i in sorted({round(i * (len(self.layers) - 1) / 5) for i in range(6)})]
        if missing := [layer for layer in layers if layer not in self.layers]:
            raise InputError(
                f"layers={list(layers)}: {missing} was not patched; {', '.join(map(str, self.layers))} were."
            )
        values = self.normalized if normalized else self.effect
        return over_picture(
            self.picture,
            {f"layer {layer}": values[self.layers.index(layer)] for layer in layers},
            title=self.title,
            value_name="normalized effect" if normalized else "metric",
            diverging=True,
        )


class _Regions(Grid):
    """The regions of an image, patched one at a time."""

    def __init__(self, runs: PatchedRuns, image: ImageTokens, region: tuple[int, int]) -> None:
        super().__init__(runs, None, "all", [])
        rows, columns = image.patch_grid
        self.shape = rows // region[0], columns // region[1]
        places = image.positions.reshape(self.shape[0], region[0], self.shape[1], region[1])
        self._places = places.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        self.positions = tuple(range(len(self._places)))

    def cells(self) -> Cells:
        found = torch.zeros(len(self._places), 1, self._seq, dtype=torch.bool)
        return found.scatter(2, self._places[:, None], True)


@method
@torch.no_grad()
def picture_patching(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    *,
    image: ImageTokens,
    metric: Metric,
    region: tuple[int, int] = (1, 1),
    point: PointName = "layers_output",
    layers: int | Sequence[int] | None = None,
    mode: Mode = "denoising",
    batch_size: int | None = None,
    progress: bool = True,
) -> PicturePatching:
    """Put one region of an image's activations of the clean run into the corrupted run, for each layer and region.

    `activation_patching` (Vig et al. 2020, section 3) with all patches of a region at once; its results lie as the picture does.
    Single patches often do nothing where a region does: what is seen of a thing is spread over its patches.

    Args:
        clean, corrupted: a prompt each with its image, as `model.prepare(prompt, images=...)` gives it, of as many tokens.
        image: whose positions are patched, of `model.image_tokens`: of a prompt by itself.
        metric: as in `activation_patching`.
        region: how many rows and columns of patches a region has; the image's are multiples of these.
        point, layers, mode, batch_size, progress: as in `activation_patching`.

    Raises:
        InputError: for lists of prompts, regions that do not divide the image, and as `activation_patching`.
        NotInThisModelError: if the image's tokens are no grid of patches; for a layer that has no such value.

    Example (of a model `vlm` that reads images):
        clean, other = (vlm.prepare(prompt, images=one) for one in (picture, another))
        photo, = vlm.image_tokens(prompt, images=picture)
        found = picture_patching(vlm, clean, other, image=photo, region=(4, 4), metric=logit_difference(" dog", " cat", vlm))
        found.plot()
    """
    if not isinstance(image, ImageTokens):
        raise InputError(
            f"image is {a_kind(image)}: give one of model.image_tokens(prompt, images=...), such as its [0]."
        )
    grid = image.patch_grid
    sizes = tuple(region) if isinstance(region, Sequence) else ()
    if len(sizes) != 2 or any(not count_of(n) or size % n for n, size in zip(sizes, grid, strict=False)):
        raise InputError(
            f"region={region!r}: it is rows and columns of patches that divide the image's {grid[0]} rows and {grid[1]} columns."
        )
    pairs = Pairs.of(model, clean, corrupted, point).refuse_same()
    if len(pairs.lengths) > 1:
        raise InputError("picture_patching takes one clean and one corrupted prompt, with the positions of one image.")
    if int(image.positions.max()) >= pairs.seq or image.prompt:
        raise InputError(
            f"image is prompt {image.prompt}'s, up to position {int(image.positions.max())}, and the prompts have {pairs.seq} "
            "positions: give that of model.image_tokens(prompt, images=...), of the clean prompt by itself."
        )
    where = layers_of(accessor_of(model, point), layers)
    base, source = pairs.of_mode(mode)
    runs = PatchedRuns(model, base, source, point, where)
    regions = _Regions(runs, image, (sizes[0], sizes[1]))
    effect = regions.effects(metric, [[layer] for layer in where], batch_size, progress)[0]
    ends = [measured(metric, runs.logits(end))[0] for end in (runs.source_end, runs.base_end)]
    of_clean, of_corrupted = ends if mode == "denoising" else ends[::-1]
    return PicturePatching(
        point,
        effect.unflatten(1, regions.shape),
        of_clean,
        of_corrupted,
        tuple(where),
        (sizes[0], sizes[1]),
        image.picture,
        name_of(metric),
        mode,
    )
