"""Edits of the residual stream: leaving layers out, and steering."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nnatomy.core.blocks.rows import RowSlot
from nnatomy.core.calls import Inputs
from nnatomy.errors import InputError, LayerIndexError
from nnatomy.standardized.accessors import check_fits
from nnatomy.standardized.names import Names

Indices = int | Sequence[int] | Tensor | None


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
        token_positions: Indices = None,
        batch_index: Indices = None,
    ) -> None:
        """Add `factor * steering_vector` to the output of layers (activation addition, Turner et al. 2023).

        Args:
            layers: one or several; they are steered in the order of the forward pass.
            steering_vector: of (hidden), or anything that broadcasts to the chosen (batch, seq, hidden).
            token_positions: which positions (all by default). Batches are padded on the left: count from
                the end, -1 is each prompt's last token.
            batch_index: which prompts (all by default). Where both are sequences they are taken in pairs,
                as in `tensor[batch_index, token_positions]`.

        Raises:
            InputError: if the vector is not as wide as the stream, or there are no such prompts or positions.
            LayerIndexError: for a layer that there is not.
        """
        steering_vector = torch.as_tensor(steering_vector)
        if steering_vector.shape[-1:] != (self.hidden_size,):
            raise InputError(
                f"The steering vector is of shape {tuple(steering_vector.shape)}, the model's residual stream of width "
                f"{self.hidden_size}."
            )
        each = [layers] if isinstance(layers, int) else list(layers)
        for i in each:
            self.layers_output.module(i)  # raises if there is none
        for layer in sorted(range(self.num_layers)[i] for i in each):
            hidden = self.layers_output[layer].clone()
            where = (
                slice(None) if batch_index is None else batch_index,
                slice(None) if token_positions is None else token_positions,
            )
            try:
                hidden[where] += factor * steering_vector.to(hidden)
            except (IndexError, TypeError, RuntimeError) as error:
                raise InputError(
                    f"batch_index={batch_index!r}, token_positions={token_positions!r} and a vector of "
                    f"{tuple(steering_vector.shape)} do not fit a stream of {tuple(hidden.shape)}: {error}"
                ) from None
            self.layers_output[layer] = hidden
