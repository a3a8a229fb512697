"""Many runs that each have some values of another run put in, as the rows of a few forward passes.

A patch in a layer changes nothing before it. So a pass starts at the layer that is patched, from the residual stream of the
unpatched run: the layers before are skipped. That this gives what the whole model gives is seen in each first pass of a
layer, in which one row for each prompt has nothing put in. Where it does not (a layer that reads what an earlier one
has left beside the stream) the layers are run from the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnatomy.errors import NotInThisModelError, NotReachedError
from nnatomy.methods.ends import end_logits, ends
from nnatomy.methods.points import accessor_of, axes_of, layers_with
from nnatomy.methods.tokens import Tokens, arguments_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import ids_of

#: What is put in: by row, head (one, where all are meant) and position.
Cells = Bool[Tensor, "cell head seq"]

#: How far two runs of one prompt may be apart that rounding sets apart, where that is more than by the dtype.
_CLOSE = 1e-4

#: What models' code raises where something that it relies on is not there.
NOT_THERE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, NotReachedError)


class PatchedRuns:
    """Runs of the `base` prompts with values of the `source` prompts put in at one point of a layer, or of several.

    Args:
        base, source: their tokens, as many of both, of one length pair by pair.
        point: the accessor's name.
        layers: those whose values may be put in.
        noise: what is added to the base prompts' token embeddings: (batch, seq, hidden).

    Attributes:
        base_end, source_end: of the unpatched runs, what `logits` takes.
        values: of the source runs, by layer.
        shortcut: whether passes have started at the patched layer so far.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        base: Sequence[Tokens],
        source: Sequence[Tokens],
        point: str,
        layers: Sequence[int],
        noise: Float[Tensor, "batch seq hidden"] | None = None,
    ) -> None:
        self.model = model
        self.accessor = accessor_of(model, point)
        self.axes = axes_of(point)
        self.batch = len(base)
        self.shortcut = not self.accessor.of_encoder and set(layers) <= set(layers_with(model.layers_input))
        self._noise = noise
        both = model.prepare(arguments_of([*source, *base]), padding_side="left")
        self._inputs = model.prepare(arguments_of(base), padding_side="left")
        self.values: dict[int, Tensor] = {}
        self._streams: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._record(both, layers)

    def _record(self, both: dict[str, Tensor], layers: Sequence[int]) -> None:
        model, n = self.model, self.batch
        read = ids_of(both, self.accessor.of_encoder)
        assert read is not None
        with model.trace(both, use_cache=False):
            if self._noise is not None:
                self._add_noise(torch.cat([torch.zeros_like(self._noise), self._noise]))
            for layer in sorted(layers):
                if self.shortcut:
                    self._streams[layer] = model.layers_input[layer][n:]
                value = self.accessor[layer]
                self._check_axes(layer, value, read.shape)
                self.values[layer] = value[:n]
                if self._after:
                    self._outputs[layer] = value[n:]
            self.source_end, self.base_end = ends(model).split(n)

    def logits(self, end: Float[Tensor, "*rows end"]) -> Float[Tensor, "*rows vocab"]:
        """The logits at the last position, of what calling this gives."""
        return end_logits(self.model, end)

    @property
    def _after(self) -> bool:
        """Whether what is put in is what a layer gives, so that it need not be run."""
        return self.accessor is self.model.layers_output

    def _add_noise(self, noise: Tensor) -> None:
        embeddings = self.model.token_embeddings
        self.model.token_embeddings = embeddings + noise.to(embeddings)

    def _check_axes(self, layer: int, value: Tensor, size: torch.Size) -> None:
        if (value.shape[0], value.shape[self.axes.seq]) != tuple(size):
            raise NotInThisModelError(
                f"{self.accessor.name}[{layer}] cannot be patched by prompt and position: its shape is "
                f"{tuple(value.shape)}, for {size[0]} prompts of {size[1]} positions."
            )

    def __call__(self, layers: Sequence[int], cells: Cells) -> Float[Tensor, "cell batch end"]:
        """The end of every base prompt's run (see `logits`), for every cell put in at these layers."""
        layers = sorted(layers)
        if self.shortcut:
            found = self._checked(layers, cells)
            if found is not None:
                return found
            self.shortcut = False
        return self._run(layers, cells, skip=False)

    def _checked(self, layers: list[int], cells: Cells) -> Tensor | None:
        """By the shorter way, with one cell more that has nothing put in; None if that shows this to be no way."""
        if not (layers[0] or self._after):
            return self._run(layers, cells, skip=False)
        nothing = torch.zeros_like(cells[:1])
        try:
            found = self._run(layers, torch.cat([nothing, cells]), skip=True)
        except NOT_THERE:  # what a skipped layer has not left; anything else is raised again without skipping
            return None
        return found[1:] if is_close(found[0], self.base_end) else None

    def _run(self, layers: list[int], cells: Cells, *, skip: bool) -> Tensor:
        model, count = self.model, len(cells)
        inputs = {name: repeated(value, count).contiguous() for name, value in self._inputs.items()}
        with model.trace(inputs, use_cache=False):
            if self._noise is not None:
                self._add_noise(repeated(self._noise, count))
            if skip and self._after:
                given = self._patched(layers[0], repeated(self._outputs[layers[0]], count), cells)
                model.skip_layers(0, layers[0], given)
                layers = layers[1:]
            elif skip:
                stream = repeated(self._streams[layers[0]], count)
                model.skip_layers(0, layers[0] - 1, stream)
                model.layers_input[layers[0]] = stream
            for layer in layers:
                self.accessor[layer] = self._patched(layer, self.accessor[layer], cells)
            end = ends(model)
        return end.unflatten(0, (count, self.batch))

    def _patched(self, layer: int, value: Tensor, cells: Cells) -> Tensor:
        """`value` with the source's put in at the cells."""
        own = value.unflatten(0, (len(cells), self.batch))
        shape = [len(cells)] + [1] * value.ndim
        shape[self.axes.seq + 1] = cells.shape[2]
        if self.axes.head is not None:
            shape[self.axes.head + 1] = cells.shape[1]
            cells = cells.mT if self.axes.head > self.axes.seq else cells
        return torch.where(cells.reshape(shape).to(value.device), self.values[layer], own).flatten(0, 1)


def repeated(tensor: Tensor, count: int) -> Tensor:
    """All of its rows so many times, one after the other."""
    return tensor.expand(count, *tensor.shape).flatten(0, 1)


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether rounding alone can have set them apart."""
    if one.shape != other.shape:
        return False
    close = max(_CLOSE, 8 * torch.finfo(other.dtype).eps)
    size = float(other[other.isfinite()].float().square().mean().sqrt().nan_to_num())
    return torch.allclose(one, other, rtol=close, atol=close * size, equal_nan=True)
