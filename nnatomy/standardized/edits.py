"""Edits of the residual stream: leaving layers out, and steering."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError, LayerIndexError
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
        """
        first, last = (range(self.num_layers)[self._checked(layer)] for layer in (start_layer, end_layer))
        if first > last:
            raise LayerIndexError(f"skip_layers({start_layer}, {end_layer}): no layers lie between these.")
        if skip_with is None:
            skip_with = self.layers_input[first]
        for i in range(first, last + 1):
            if self._anatomy.absent["layer"][i]:
                self._checked(i)  # raises: it would not come
            layer = self._anatomy.layers[i]
            form = self._head.in_form(layer, skip_with)
            self._blocks.current("skip_layers").reach(layer, "input", f"skip_layers of layer {i}").skip(form)

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
            InputError: if the vector is not as wide as the stream.
            LayerIndexError: for a layer that there is not.
        """
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
            hidden[where] += factor * steering_vector.to(hidden)
            self.layers_output[layer] = hidden
