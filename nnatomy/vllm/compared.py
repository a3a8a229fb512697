"""Proof of the names against the same model in Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnatomy.names import ROWS
from nnatomy.validation.near import TOLERANCE, distance
from nnatomy.vllm.places import Place
from nnatomy.vllm.reading import Writer, unpadded
from nnatomy.vllm.reference import Reference, Values

if TYPE_CHECKING:
    from nnatomy.vllm.validation import Validation

#: How large the change of a value is, of its own size.
_CHANGE = 0.1
#: What is compared in a later step: what the engine's cache has part of, and the rows.
_IN_A_STEP = ("keys", "values", "attention_probabilities", "heads_output", "layers_output")
_OFF = "it is not what it is in Transformers, off by {:.1e} (relative)"


class Compared:
    """The proof.

    Args:
        of: what is proven.
        reference: the model in Transformers.
    """

    def __init__(self, of: Validation, reference: Reference) -> None:
        self.of, self.reference = of, reference
        self.tolerance = TOLERANCE.get(of.engine.dtype, 1e-4)

    def check(self) -> None:
        """Compare values, then values that follow from edits, then those of a later step."""
        of = self.of
        for (name, i), why in self.reference.reasons(len(of.anatomy.layers)).items():
            if isinstance(of.places[name][i], Place):
                of.refuse(name, i, why)
        logits, self.theirs = self.reference.values(of.there)
        self._compare_values()
        self._compare_model(logits)
        self._compare_edits()
        self._compare_step()

    def _compare_values(self) -> None:
        """Of the places that a name may be at, take the first where its values are."""
        of = self.of
        ours = of.read(of.options_of(of.there))
        self.layout, self.plain = ours.layout, ours.logits
        for name, i, _ in of.everywhere(of.there):
            found = ours.values.get((name, i), {})
            off = {one: self._off(name, found.get(one), self.theirs[name, i]) for one in of.options[name][i].places}
            chosen = next((place for place, error in off.items() if error <= self.tolerance), None)
            if chosen is None:
                of.refuse(name, i, _OFF.format(min(off.values())))
            else:
                of.choose(name, i, chosen)
                of.note(name, i, off[chosen])

    def _off(self, name: str, ours: Any, theirs: Tensor) -> float:
        """How far a value is off, in the rows of the prompts."""
        if not isinstance(ours, Tensor) or ours.shape != theirs.shape:
            return float("inf")
        row = ROWS[name]
        return distance(unpadded(row, ours, self.layout), unpadded(row, theirs, self.layout))

    def _compare_model(self, logits: Tensor) -> None:
        of, model = self.of, self.of.model
        with torch.no_grad(), self.reference.model.trace(self.reference.prompts):
            ids, embeddings = self.reference.model.input_ids, self.reference.model.token_embeddings
        last = of.places["layers_output"][-1]
        with model.open(of.prompts, of.engine.sampling(len(of.prompts), 1, None, {})):
            mine = model.input_ids.cpu()
            stream = model.layers_output[-1] if isinstance(last, Place) else None
        if not torch.equal(mine * self.layout.mask, ids.cpu() * self.layout.mask):
            of.refused["input_ids"] = "they are not the prompts'"
        self._compare_embeddings(embeddings)
        self._expect("logits", self.plain, logits)
        if stream is None:
            of.refused.setdefault("project_on_vocab", "nobody can tell what the last layer gives")
        elif "project_on_vocab" not in of.refused:
            self._expect("project_on_vocab", model.project_on_vocab(stream), logits)

    def _expect(self, name: str, ours: Any, logits: Tensor) -> None:
        if name in self.of.refused:
            return
        error = self._off("logits", ours, logits)
        self.of.note(name, None, error)
        if error > self.tolerance:
            self.of.refused[name] = _OFF.format(error)

    def _compare_embeddings(self, theirs: Tensor) -> None:
        """What the embedding gives, or what the first layer is given: Gemma's scale is in the embedding there, and behind it here."""
        of, name = self.of, "token_embeddings"
        if of.embeddings is None:
            return
        first = of.places["layers_input"][0]
        places = [of.embeddings, *([first] if isinstance(first, Place) else [])]
        found = of.read((name, 0, one) for one in places).values[name, 0]
        off = {place: self._off(name, found[place], theirs) for place in places}
        of.embeddings = next((place for place, error in off.items() if error <= self.tolerance), None)
        if of.embeddings is None:
            of.refused[name] = _OFF.format(min(off.values()))
        else:
            of.note(name, None, off[of.embeddings])

    def _compare_edits(self) -> None:
        """Change each name by the same amounts on both sides: on all layers at once, and where that differs on each."""
        for name in self.of.there:
            places = [(i, place) for _, i, place in self.of.everywhere([name]) if not place.only_read]
            if places and ROWS[name].assignable and self._edit_is_off(name, places) > self.tolerance:
                for i, place in places:
                    off = self._edit_is_off(name, [(i, place)])
                    if off > self.tolerance:
                        why = (
                            f"changed by as much as in Transformers, the logits are others, off by {off:.1e} (relative)"
                        )
                        self.of.choose(name, i, replace(place, only_read=why))

    def _edit_is_off(self, name: str, places: Sequence[tuple[int, Place]]) -> float:
        """How far the logits are off; infinitely where the change makes no difference."""
        generator = torch.Generator().manual_seed(1)
        row, logits = ROWS[name], ROWS["logits"]
        changes: Values = {}
        for i, _ in places:
            value = self.theirs[name, i]
            size = _CHANGE * float(unpadded(row, value, self.layout).square().mean().sqrt())
            noise = torch.randn(value.shape, generator=generator) * size
            changes[name, i] = unpadded(row, noise, self.layout).to(value.dtype)
        theirs = self.reference.edited(changes)
        ours = self.of.read((), replace=[Writer([(place, _Added(changes[name, i])) for i, place in places])]).logits
        moved = distance(unpadded(logits, ours, self.layout), unpadded(logits, self.plain, self.layout))
        return self._off("logits", ours, theirs) if moved else float("inf")

    def _compare_step(self) -> None:
        """The step after the prompts: what it reads of those before it in the engine's cache, and its rows."""
        of = self.of
        names = [name for name in _IN_A_STEP if name in of.there]
        ours = of.read(of.everywhere(names), step=1)
        self.layout = ours.layout
        written = [output.outputs[0].token_ids[0] for output in ours.outputs]
        longer = [[*prompt, token] for prompt, token in zip(of.prompts, written, strict=True)]
        _, theirs = self.reference.values(names, longer)
        for (name, i), found in ours.values.items():
            (mine,), wanted = found.values(), theirs[name, i]
            for axis in ROWS[name].here:
                wanted = wanted.narrow(axis, wanted.shape[axis] - 1, 1)
            off = self._off(name, mine, wanted)
            of.note(name, i, off)
            if isinstance(mine, str):
                of.refuse(name, i, mine)
            elif off > self.tolerance:
                of.refuse(name, i, f"in a later step {_OFF.format(off)}")


class _Added:
    """Adds a change to a value."""

    def __init__(self, change: Tensor) -> None:
        self.change = change

    def __call__(self, value: Tensor) -> Tensor:
        return value + self.change.to(value.device)
