"""Edits of the residual stream: leaving layers out, and steering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.blocks.rows import RowSlot
from nnatomy.errors import InputError, LayerIndexError
from nnatomy.standardized.accessors import check_fits
from nnatomy.standardized.hidden import with_output
from nnatomy.standardized.left_out import leaves_something, run_aside
from nnatomy.standardized.names import Names
from nnatomy.standardized.positions import Where, is_fake, is_one, numbers, own_positions
from nnatomy.standardized.prompt_trace import RootInputs
from nnatomy.standardized.recorded import recorded_by, refuse_skip
from nnatomy.standardized.steering import checked_layers, checked_vector
from nnatomy.standardized.watched import watcher
from nnatomy.whole_number import whole_number


class Edits(Names):
    """A model whose layers can be left out and steered."""

    def skip_layer(self, layer: int, skip_with: Float[Tensor, "batch seq hidden"] | None = None) -> None:
        """Do not run `layer`: its output is `skip_with`, or its input if that is None."""
        self.skip_layers(layer, layer, skip_with)

    def skip_layers(
        self, start_layer: int, end_layer: int, skip_with: Float[Tensor, "batch seq hidden"] | None = None
    ) -> None:
        """Do not run the layers from `start_layer` to `end_layer`, both included.

        Args:
            skip_with: what they give; the input of `start_layer` if None.

        Raises:
            AssignmentError: if `skip_with` is not of the shape, dtype and device of that input.
        """
        first, last = (range(self.num_layers)[self._checked(layer)] for layer in (start_layer, end_layer))
        if first > last:
            raise LayerIndexError(f"skip_layers({start_layer}, {end_layer}): no layers lie between these.")
        if (one := watcher.get()) is not None:
            one.skip(self, (start_layer, end_layer), skip_with)
            return
        given = skip_with
        skip_with = self.layers_input[first] if given is None else given
        for i in range(first, last + 1):
            if self._anatomy.absent["layer"][i]:
                self._checked(i)  # raises: it would not come
            layer = self._anatomy.layers[i]
            slot = self._blocks.current("skip_layers").reach(layer, "input", f"skip_layers of layer {i}")
            if given is not None and i == first and self.layers_input.modules[i] is not None:
                check_fits(f"skip_with of layer {i}", self.layers_input.get(slot.value), given)
            self._check_recorded(i)
            form = self._head.in_form(layer, skip_with)
            if not (slot.skipped or isinstance(slot, RowSlot)):  # else it has been done, or the layer runs for others
                more = self._head.gives_more(layer)
                if more or leaves_something(slot.value):
                    left = run_aside(layer, slot.value, more and self._head.hands_on(layer))
                    form = with_output(left, skip_with)
            slot.skip(form)

    def _check_recorded(self, layer: int) -> None:
        """Raise InputError if the model is to return something of each layer: it has none of one that does not run."""
        collectors = self._blocks.current("skip_layers").run.collectors
        roots = [one.slot.value[1] for one in collectors if isinstance(one, RootInputs) and one.slot is not None]
        by = [recorded_by(root, self.config, self.steps_of.config) for root in roots]
        if by and by[0]:
            raise refuse_skip(f"skip_layers of layer {layer}", by[0])

    def _checked(self, layer: int) -> int:
        try:
            number = whole_number(layer)
        except TypeError:
            raise LayerIndexError(
                f"skip_layer({layer!r}): give the number of a layer, 0 to {self.num_layers - 1}."
            ) from None
        self.layers_input.module(number)
        return number

    def steer(
        self,
        layers: int | Sequence[int],
        steering_vector: Float[Tensor, "*broadcast hidden"],
        factor: float = 1.0,
        token_positions: Where = None,
        *,
        batch_index: int | Sequence[int] | Tensor | None = None,
    ) -> None:
        """Add `factor * steering_vector` to the output of layers (activation addition, Turner et al. 2023).

        Args:
            layers: one or several; they are steered in the order of the forward pass.
            steering_vector: of (hidden), or anything that broadcasts to the chosen (batch, seq, hidden).
            token_positions: which of each prompt's own tokens: 0 is its first, -1 its last, whatever it is batched with (see
                `nnatomy.standardized.positions`); one, several or a slice. All columns, padding too, if None.
            batch_index: which prompts (all by default). Where both are sequences they are taken in pairs,
                as in `tensor[batch_index, token_positions]`.

        Raises:
            InputError: if the vector is not as wide as the stream, `layers` are no numbers, or there are no such prompts or
                positions.
            LayerIndexError: for a layer that there is not.
        """
        vector = checked_vector(steering_vector, factor, self.hidden_size)
        each = checked_layers(layers)
        for i in each:
            self.layers_output.module(i)  # raises if there is none
        for layer in sorted(range(self.num_layers)[i] for i in each):
            hidden = self.layers_output[layer].clone()
            try:
                self._add(hidden, factor * vector.to(hidden), token_positions, batch_index)
            except (IndexError, TypeError, RuntimeError, InputError) as error:
                raise InputError(
                    f"batch_index={batch_index!r}, token_positions={token_positions!r} and a vector of "
                    f"{tuple(vector.shape)} do not fit a stream of {tuple(hidden.shape)}: {error}"
                ) from None
            self.layers_output[layer] = hidden

    def _add(self, hidden: Tensor, vector: Tensor, positions: Where, batch_index: Any) -> None:
        """Add a vector in place, at these positions of these prompts."""
        rows = slice(None) if batch_index is None else batch_index
        if positions is None or is_fake(hidden):  # of a scan only shapes are asked
            hidden[rows] += vector
            return
        own = own_positions(self, "steer", hidden.shape[:2])
        if isinstance(positions, slice) or (batch_index is None and vector.ndim == 1):
            chosen = own.chosen(positions)[rows][..., None].to(hidden.device)
            hidden[rows] = torch.where(chosen, hidden[rows] + vector, hidden[rows])
            return
        prompts = torch.arange(len(hidden)) if batch_index is None else torch.as_tensor(batch_index)
        if prompts.dtype == torch.bool:
            prompts = prompts.nonzero().flatten()
        prompts = torch.arange(len(hidden))[prompts]  # raises where there is none such
        wanted = torch.tensor(numbers("token_positions", positions)).reshape(() if is_one(positions) else (-1,))
        if batch_index is None or not (prompts.ndim and wanted.ndim):  # else they are taken in pairs
            prompts = prompts.reshape((*prompts.shape, *[1] * wanted.ndim))
        prompts, wanted = torch.broadcast_tensors(prompts, wanted)
        columns, there = (one.to(hidden.device) for one in own.columns(wanted, prompts))
        added = vector.expand(*columns.shape, -1)[there]
        hidden[prompts.to(hidden.device)[there], columns[there]] += added
