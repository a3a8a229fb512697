"""Steering: a direction for each of some layers, found from contrasting prompts and added to the residual stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.methods.activation_store import write_whole
from nnatomy.methods.activations import Activations
from nnatomy.methods.arguments import method as checked
from nnatomy.methods.arguments import number, several
from nnatomy.methods.collecting import Positions, collect_activations
from nnatomy.methods.directions import METHODS, mean_difference
from nnatomy.methods.points import accessor_of
from nnatomy.methods.prompts import token_texts
from nnatomy.methods.result import headed, texts_of
from nnatomy.names import row_of
from nnatomy.paths import file_of, path_of, what_is_at
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.annotations import PointName
from nnatomy.standardized.chats import is_chat
from nnatomy.standardized.positions import Where, is_fake, own_positions
from nnatomy.standardized.watched import watcher
from nnatomy.words import DirectionMethod


@dataclass(frozen=True)
class SteeringVector:
    """A direction for each of some layers, made to be added at a point of the residual stream.

    Vectors of one model and point can be added and subtracted (a layer that one of them has not counts as zero), and
    multiplied by a number.

    Attributes:
        directions: by layer, counted from 0, (hidden).
        point: a standard name: where it comes from and is added.
        model_type: of the model it comes from.
        method: how it was made.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import SteeringVector
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> pairs = [(f"The capital of {country} is", f"The language of {country} is") for country in ("France", "Peru", "Kenya")]
        >>> vector = SteeringVector.from_pairs(model, pairs, layers=[2], progress=False)
        >>> with model.trace("The language of Japan is"):
        ...     vector.apply(model, positions=-1)
        ...     probs = model.next_token_probs
        >>> model.tokenizer.decode(probs[0].argmax())
        ' Tokyo'
        >>> edited = model.edit(lambda: vector.apply(model, positions=-1))    # in every trace, call and generation
    """

    directions: dict[int, Float[Tensor, " hidden"]]
    point: str
    model_type: str
    method: str

    @staticmethod
    @checked
    def from_pairs(model: StandardizedTransformer, pairs: Iterable[Sequence[Any]], **kwargs: Any) -> SteeringVector:
        """From pairs of prompts (positive, negative) that differ in what the vector is to be of.

        Args:
            **kwargs: as in `from_prompts`.
        """
        several("pairs", pairs)
        both = [pairs] if isinstance(pairs, (str, Mapping)) else list(pairs)
        for i, pair in enumerate(both):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or isinstance(pair[0], int) or is_chat(pair):
                raise InputError(
                    f"pairs[{i}] is {pair!r:.60}: give pairs of prompts, [(positive, negative), ...]. Of prompts that are not in "
                    "pairs: SteeringVector.from_prompts(model, positive, negative)."
                )
        return SteeringVector.from_prompts(model, [pair[0] for pair in both], [pair[1] for pair in both], **kwargs)

    @staticmethod
    @checked
    def from_prompts(
        model: StandardizedTransformer,
        positive: Sequence[Any],
        negative: Sequence[Any],
        *,
        method: DirectionMethod = "mean_difference",
        layers: Sequence[int] | None = None,
        point: PointName = "layers_output",
        positions: Positions = "last",
        batch_size: int | None = None,
        progress: bool = True,
    ) -> SteeringVector:
        """From prompts that have something, and prompts that have not.

        Args:
            positive, negative: each what `collect_activations` takes.
            method: "mean_difference", "logistic_probe" or, if they are pairs, "pca": see `nnatomy.methods.directions`.
            layers: all if None.
            point: the standard name to read, of (batch, seq, hidden).
            positions: the tokens of each prompt that count, as in `collect_activations`.

        Returns:
            Directions in float32 on the CPU.

        Raises:
            InputError: for no such method, or examples that do not differ; and what `collect_activations` raises.
        """
        if method not in METHODS:
            raise InputError(f"There is no method {method!r}; there are {', '.join(METHODS)}.")
        with_it, without = (
            collect_activations(
                model,
                prompts,
                points={point: layers},
                positions=positions,
                batch_size=batch_size,
                dtype=torch.float32,
                progress=progress,
            ).tensors
            for prompts in (positive, negative)
        )
        directions = {}
        for key in with_it:
            width = model.hidden_size
            if accessor_of(model, point).of_encoder and row_of(point).axes[2:] == ("hidden",):
                width = with_it[key].shape[1]  # an encoder's is its own
            if with_it[key].shape[1:] != (width,):
                raise InputError(
                    f"{point} is of {tuple(with_it[key].shape[1:])} at each position, the residual stream of "
                    f"({width}): steer at another point."
                )
            direction = mean_difference(with_it[key], without[key])
            if not direction.norm() > 1e-6 * with_it[key].norm(dim=-1).mean():
                raise InputError(
                    f"{point}[{key[1]}]: the positive and the negative examples do not differ there, so there is no "
                    "direction between them: choose other layers or positions."
                )
            directions[key[1]] = METHODS[method](with_it[key], without[key])
        return SteeringVector(directions, point, _type_of(model), method)

    # Arithmetic.

    @property
    def width(self) -> int:
        """The width of the residual stream."""
        return len(next(iter(self.directions.values())))

    @property
    def norms(self) -> dict[int, float]:
        """By layer, the length of the direction."""
        return {layer: float(direction.norm()) for layer, direction in self.directions.items()}

    def normalized(self) -> SteeringVector:
        """With directions of length 1. Raises InputError for one that has none."""
        if zero := [layer for layer, norm in self.norms.items() if not norm > 0]:
            raise InputError(f"The direction of layer {zero[0]} is zero or not finite, and has no length to be made 1.")
        return self._with(lambda direction: direction / direction.norm())

    def __mul__(self, factor: float | int) -> SteeringVector:
        number("factor", factor)
        return self._with(lambda direction: direction * factor)

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self * -1

    def __add__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        ours, theirs = ((one.model_type, one.point, one.width) for one in (self, other))
        if ours != theirs:
            raise InputError(
                f"Vectors of different kinds cannot be added: {ours} and {theirs} (model type, point, width)."
            )
        zero = torch.zeros_like(next(iter(self.directions.values())))
        return replace(
            self,
            directions={
                layer: self.directions.get(layer, zero) + other.directions.get(layer, zero)
                for layer in sorted({*self.directions, *other.directions})
            },
            method=self.method if self.method == other.method else f"{self.method}, {other.method}",
        )

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return self + -other

    def _with(self, change: Callable[[Tensor], Tensor]) -> SteeringVector:
        return replace(self, directions={layer: change(one) for layer, one in self.directions.items()})

    # Use.

    @checked
    def apply(
        self,
        model: StandardizedTransformer,
        factor: float | int = 1.0,
        *,
        positions: Where = None,
        from_step: int = 0,
    ) -> None:
        """Add `factor` times the directions, in a block or in a function for `model.edit`.

        Args:
            positions: which of each prompt's own tokens; everywhere if None. One, several, or a slice (without a stride): 0 is
                the first token, -1 the last (see `nnatomy.standardized.positions`). While generating they count on in what
                follows: `slice(5, None)` is position 5 and all behind it, and -1 each new token in its turn.
            from_step: do nothing in earlier steps of a generation.

        Raises:
            InputError: if the model is of another width, or in step 0 a prompt has no such index.
        """
        if not self.directions:
            raise InputError("This vector has no direction for any layer.")
        accessor = accessor_of(model, self.point)
        if not accessor.of_encoder:
            self._check_width(model, model.hidden_size)
        if (one := watcher.get()) is not None:
            one.asked_step(from_step)
        if model._blocks.current("steering").step < from_step:
            return
        for layer in sorted(self.directions):
            value = accessor[layer]
            self._check_width(model, value.shape[-1])
            added = factor * self.directions[layer].to(value)
            if positions is not None and not is_fake(value):
                own = own_positions(model, "SteeringVector.apply", value.shape[:2], accessor.of_encoder)
                added = added * own.chosen(positions)[..., None].to(value)
            accessor[layer] = value + added

    def _check_width(self, model: StandardizedTransformer, width: int) -> None:
        if self.width != width:
            raise InputError(
                f"The vector is of width {self.width} (from a {self.model_type}), the model's residual stream of width "
                f"{width} ({_type_of(model)})."
            )

    @checked
    @torch.no_grad()
    def projections(self, model: StandardizedTransformer, prompt: Any) -> Float[Tensor, "layer seq"]:
        """How far each token of a prompt lies along each unit direction, in the stream's own units.

        Args:
            prompt: one prompt, as `collect_activations` takes it. Its tokens are those that the decoder of an
                encoder-decoder reads, or its encoder if the vector's point is one of the encoder's.
        """
        return self._along(self._collected(model, prompt))

    def _collected(self, model: StandardizedTransformer, prompt: Any) -> Activations:
        return collect_activations(
            model,
            [prompt],
            points={self.point: list(self.directions)},
            positions="all",
            dtype=torch.float32,
            progress=False,
        )

    def _along(self, acts: Activations) -> Float[Tensor, "layer seq"]:
        return torch.stack([acts[self.point, layer] @ (one / one.norm()) for layer, one in self.directions.items()])

    @checked
    def plot(self, model: StandardizedTransformer, prompt: Any) -> Any:
        """The projections of a prompt's tokens on each layer's direction, as a plotly figure."""
        from nnatomy.plots import heat_map

        acts = self._collected(model, prompt)
        return heat_map(
            self._along(acts),
            rows=[str(layer) for layer in self.directions],
            columns=token_texts(model, acts.token_ids),
            title=headed(
                f"Projection of {self.point} on the direction of each layer ({self.method})", texts_of(model, prompt)
            ),
            diverging=True,
            value_name="projection",
        )

    # Files.

    def save(self, path: str | Path) -> None:
        """Write it to a file in the safetensors format, whose metadata say what it is."""
        about = {
            "model_type": self.model_type,
            "width": self.width,
            "layers": list(self.directions),
            "point": self.point,
            "method": self.method,
        }
        tensors = {str(layer): one.contiguous() for layer, one in self.directions.items()}
        write_whole(path_of(path, "a file to write"), save(tensors, {"nnatomy.SteeringVector": json.dumps(about)}))

    @staticmethod
    def load(path: str | Path) -> SteeringVector:
        """Read what `save` wrote. Raises InputError for a file of something else."""
        path = file_of(path, "a file that SteeringVector.save wrote")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["nnatomy.SteeringVector"])
                directions = {layer: file.get_tensor(str(layer)) for layer in about["layers"]}
        except (SafetensorError, KeyError) as error:
            raise InputError(
                f"{path} is no file that SteeringVector.save wrote: {error!r}.{what_is_at(path)}"
            ) from None
        return SteeringVector(directions, about["point"], about["model_type"], about["method"])


def _type_of(model: StandardizedTransformer) -> str:
    causal: Any = model.steps_of
    return str(causal.config.model_type)
