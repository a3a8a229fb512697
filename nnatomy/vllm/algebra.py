"""Proof of the names by what follows from what, where the model does not fit into memory a second time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nnatomy.names import ATTENTIONS, MID, MIXERS, MLPS, NEURONS, ROUTERS, ROWS
from nnatomy.validation.near import TOLERANCE, distance
from nnatomy.vllm.places import Place
from nnatomy.vllm.reading import unpadded

if TYPE_CHECKING:
    from nnatomy.vllm.validation import Validation


class Algebra:
    """The proof.

    Args:
        of: what is proven.
    """

    def __init__(self, of: Validation) -> None:
        self.of = of
        self.tolerance = TOLERANCE.get(of.engine.dtype, 1e-4)
        ours = of.read(of.options_of(of.there))
        self.layout, self.values, self.logits = ours.layout, ours.values, ours.logits

    def check(self) -> None:
        """Stream, sums and patterns; what no equation shows is refused."""
        of = self.of
        for i in range(len(of.anatomy.layers)):
            self._check_next(i)
            self._check_sums(i)
            self._check_heads(i)
            for name in (*ROUTERS, NEURONS):
                if self._there(name, i):
                    of.refuse(
                        name,
                        i,
                        "no equation shows it: give the engine's machine memory for the model in Transformers too",
                    )
        if "project_on_vocab" not in of.refused:
            last = self._all("layers_output", len(of.anatomy.layers) - 1)[0]
            row = ROWS["logits"]
            error = distance(
                unpadded(row, of.model.project_on_vocab(last), self.layout), unpadded(row, self.logits, self.layout)
            )
            of.note("project_on_vocab", None, error)
            if error > self.tolerance:
                of.refused["project_on_vocab"] = f"it does not give the logits, off by {error:.1e} (relative)"

    def _all(self, name: str, i: int) -> list[Tensor]:
        """What is at each place that it may be at, in their order."""
        found = self.values.get((name, i), {})
        return [found[place] for place in self.of.options[name][i].places if isinstance(found.get(place), Tensor)]

    def _value(self, name: str, i: int, which: int = 0) -> Tensor:
        return unpadded(ROWS[name], self._all(name, i)[which], self.layout)

    def _there(self, name: str, i: int) -> bool:
        return isinstance(self.of.places[name][i], Place)

    def _check_next(self, i: int) -> None:
        """What the layer gives is what the next one is given."""
        if i + 1 < len(self.of.anatomy.layers):
            given = self._value("layers_input", i + 1)
            off = [
                distance(self._value("layers_output", i, which), given)
                for which in range(len(self._all("layers_output", i)))
            ]
            self._decide("layers_output", i, off.index(min(off)), min(off), "it is not what the next layer is given")

    def _check_sums(self, i: int) -> None:
        """The input and what is added are the output; the input and the attention's is the stream between."""
        added, rest = (self._all(name, i) for name in (ATTENTIONS, MLPS))
        start, end = self._value("layers_input", i), self._value("layers_output", i)
        off, one, other = min(
            (
                (distance(start + self._value(ATTENTIONS, i, a) + self._value(MLPS, i, b), end), a, b)
                for a in range(len(added))
                for b in range(len(rest))
            ),
            default=(float("inf"), 0, 0),
        )
        for name, which in ((ATTENTIONS, one), (MIXERS, one), (MLPS, other)):
            self._decide(name, i, which, off, "input and contributions are not the output")
        if self._there(MID, i) and added:
            wanted = start + self._value(ATTENTIONS, i, one)
            found = [distance(self._value(MID, i, which), wanted) for which in range(len(self._all(MID, i)))]
            self._decide(
                MID, i, found.index(min(found)), max(min(found), off), "it is not the input and what the attention adds"
            )

    def _check_heads(self, i: int) -> None:
        """The pattern's sums of the values are what the heads give."""
        names = (
            *("queries", "keys", "attention_scores", "attention_probabilities"),
            "values",
            "values_weighted",
            "heads_output",
        )
        if not all(self._there(name, i) for name in names):
            return
        pattern, values = self._value("attention_probabilities", i), self._value("values", i)
        values = values.repeat_interleave(pattern.shape[1] // values.shape[1], 1)
        off = distance((pattern @ values).transpose(1, 2), self._value("heads_output", i))
        for name in names:
            self._decide(name, i, 0, off, "the pattern's sums of the values are not what the heads give")

    def _decide(self, name: str, i: int, which: int, error: float, why: str) -> None:
        if not self._there(name, i):
            return
        if error > self.tolerance:
            self.of.refuse(name, i, f"{why}, off by {error:.1e} (relative)")
        else:
            self.of.choose(name, i, self.of.options[name][i].places[which])
            self.of.note(name, i, error)
