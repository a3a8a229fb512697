"""Activations of many prompts, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

#: A standard name and a layer.
Key = tuple[str, int]


@dataclass(frozen=True)
class Activations:
    """The values at some positions of some prompts, in the order in which the prompts were given.

    A row is one position of one prompt: `acts["layers_output", 6]` is (row, hidden).

    Attributes:
        tensors: by name and layer, the values of all rows.
        offsets: prompt `i` has the rows from `offsets[i]` up to `offsets[i + 1]`.
        token_ids: each row's token.
    """

    tensors: dict[Key, Tensor]
    offsets: Int[Tensor, " ends"]
    token_ids: Int[Tensor, " row"]

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.offsets) - 1

    def __getitem__(self, key: Key) -> Shaped[Tensor, "row ..."]:
        if key not in self.tensors:
            layers: dict[str, list[int]] = {}
            for name, layer in self.tensors:
                layers.setdefault(name, []).append(layer)
            raise KeyError(f"{key!r}: ask for (name, layer), layers counted from 0; there are {layers}.")
        return self.tensors[key]

    def of_prompt(self, index: int) -> dict[Key, Tensor]:
        """The rows of one prompt, by name and layer."""
        index = range(len(self))[index]
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return {key: tensor[rows] for key, tensor in self.tensors.items()}

    def plot(self) -> Any:
        """Curves (a plotly Figure) of the rows' norms by layer: of each name the median and the largest.

        Rows far longer than the rest, often those of the first token, outweigh all others in a mean.

        Example:
            >>> from nnatomy import StandardizedTransformer
            >>> from nnatomy.methods import collect_activations
            >>> model = StandardizedTransformer("demo:gpt2")
            >>> acts = collect_activations(model, ["Japan is in"], points={"layers_output": [2, 4]}, progress=False)
            >>> figure = acts.plot()
            >>> [curve.name for curve in figure.data], figure.data[0].x
            (['layers_output: median', 'layers_output: largest'], (2.0, 4.0))
        """
        return plot_norms(self.norms())

    def norms(self) -> dict[Key, Float[Tensor, " row"]]:
        """Of each name and layer, the norm of every row."""
        return {key: tensor.flatten(1).float().norm(dim=-1) for key, tensor in self.tensors.items()}

    @staticmethod
    def joined(parts: Sequence[Activations]) -> Activations:
        """The prompts of several, one behind the other."""
        lengths = torch.cat([part.offsets.diff() for part in parts])
        return Activations(
            {key: torch.cat([part[key] for part in parts]) for key in parts[0].tensors},
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            torch.cat([part.token_ids for part in parts]),
        )


def plot_norms(norms: dict[Key, Float[Tensor, " row"]]) -> Any:
    """See `Activations.plot`."""
    from nnatomy.plots import curves

    layers = sorted({layer for _, layer in norms})
    ys: dict[str, list[float]] = {}
    for name in dict.fromkeys(name for name, _ in norms):
        values = [norms.get((name, layer)) for layer in layers]
        for what, of in (("median", torch.median), ("largest", torch.max)):
            ys[f"{name}: {what}"] = [torch.nan if one is None else float(of(one)) for one in values]
    return curves(layers, ys, title="Norms of the rows", x_title="layer", y_title="norm")
