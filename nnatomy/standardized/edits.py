"""Edits of the residual stream: leaving layers out, and steering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nnatomy.core.blocks.rows import RowSlot
from nnatomy.core.calls import Inputs
from nnatomy.errors import InputError, LayerIndexError
from nnatomy.standardized.accessors import check_fits
from nnatomy.standardized.names import Names
from nnatomy.standardized.positions import Where, is_fake, is_finite, is_one, numbers, own_positions


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
        given = skip_with
        skip_with = self.layers_input[first] if given is None else given
        for i in range(first, last + 1):
            if self._anatomy.absent["layer"][i]:
                self._checked(i)  # raises: it would not come
            layer = self._anatomy.layers[i]
            form = self._head.in_form(layer, skip_with)
            slot = self._blocks.current("skip_layers").reach(layer, "input", f"skip_layers of layer {i}")
            if given is not None and i == first and self.layers_input.modules[i] is not None:
                check_fits(f"skip_with of layer {i}", self.layers_input.get(slot.value), given)
            if not (
                slot.skipped or isinstance(slot, RowSlot)
            ):  # else it has been done, or the layer runs for other blocks
                self._leave_room(slot.value, i, skip_with)
            slot.skip(form)

    def _leave_room(self, inputs: Inputs, layer: int, given: Tensor) -> None:
        """Put keys and values that are no numbers into the KV cache, where the skipped layer would have put its own.

        The model takes how many positions there are from its first layers' part of the cache. (Should the layer run in a
        later step, what it gives will show that they are none.)
        """
        args, kwargs = inputs
        caches = [one for one in (*args, *kwargs.values()) if isinstance(one, Cache)]
        index = getattr(self._anatomy.attentions[layer], "layer_idx", None)
        heads, width = self.dimensions.num_kv_heads, self.dimensions.head_dim
        if not caches or index is None or heads is None or width is None:
            return
        cache = getattr(caches[0], "self_attention_cache", caches[0])
        kinds = {type(one) for one in getattr(cache, "layers", ())[index : index + 1]}
        if isinstance(cache, DynamicCache) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            none = given.new_full((len(given), heads, given.shape[1], width), torch.nan)
            cache.update(none, none, index)

    def _checked(self, layer: int) -> int:
        self.layers_input.module(layer)
        return layer

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
            InputError: if the vector is not as wide as the stream, or there are no such prompts or positions.
            LayerIndexError: for a layer that there is not.
        """
        try:
            vector = torch.as_tensor(steering_vector)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"The steering vector is {type(steering_vector).__name__}, and no tensor: {error}"
            ) from None
        if not isinstance(factor, (int, float, Tensor)):
            raise InputError(f"factor={factor!r}: it is a number.")
        if not is_finite(vector):
            raise InputError("The steering vector has entries that are NaN or infinite.")
        if vector.shape[-1:] != (self.hidden_size,):
            raise InputError(
                f"The steering vector is of shape {tuple(vector.shape)}, the model's residual stream of width "
                f"{self.hidden_size}."
            )
        each = [layers] if isinstance(layers, int) else list(layers)
        if not each:
            raise InputError("layers: give at least one to steer.")
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
        if isinstance(positions, slice):
            hidden[rows] += vector * own.chosen(positions).to(hidden)[rows][..., None]
            return
        prompts = torch.arange(len(hidden)) if batch_index is None else torch.as_tensor(batch_index)
        if prompts.dtype == torch.bool:
            prompts = prompts.nonzero().flatten()
        prompts = torch.arange(len(hidden))[prompts]  # raises where there is none such
        wanted = torch.tensor(numbers("token_positions", positions)).reshape(
            () if is_one(positions) else (-1,)
        )
        if batch_index is None or not (prompts.ndim and wanted.ndim):  # else they are taken in pairs
            prompts = prompts.reshape((*prompts.shape, *[1] * wanted.ndim))
        prompts, wanted = torch.broadcast_tensors(prompts, wanted)
        columns, there = (one.to(hidden.device) for one in own.columns(wanted, prompts))
        added = vector.expand(*columns.shape, -1)[there]
        hidden[prompts.to(hidden.device)[there], columns[there]] += added
