"""What the names inside an attention promise: they follow from one another as attention says.

Reading: the softmax of the scores is the pattern (a part of it, with attention sinks), and products are what the rows of
`nnatomy.names` say: the pattern times the values is what the heads give. Writing, for the second prompt: scores move as the
products of queries and keys do, when queries of the last position and keys of the first one are changed, in each head in a
direction of its own; scores show in the pattern; pattern and values in what the heads give, as multiplied. For the first
prompt what the heads give alone is changed (a gate may depend on the scores, too), and shows in the attention's output. What
adds up to another name (weighted values) would hide what the model's own product makes of the others: it is written in the
pass that takes out contributions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from nnatomy.core import Slot
from nnatomy.names import INTERNALS, ROWS, equation
from nnatomy.validation.report import Findings

#: How many of the scores have to move the way they should. (A cap may hold some; by chance it is half of them.)
AGREEMENT = 0.8
#: The position whose queries are written, and the one whose keys.
_PLACE = {"queries": -1, "keys": 0}


class Internals:
    """The checks on a model.

    Args:
        findings: where what does not hold is noted.
        tolerance: how far values computed in two ways may be apart, relative to the largest.
    """

    def __init__(self, model: Any, findings: Findings, tolerance: float) -> None:
        self._expect = findings.expect
        self._tolerance = tolerance
        self.accessors = {name: getattr(model, name) for name in INTERNALS}
        self.modules = {module for a in self.accessors.values() for module in a.modules if module is not None}
        self.kinds = {accessor.kind: accessor.tap for accessor in self.accessors.values()}
        self._layers = {
            module: i
            for accessor in self.accessors.values()
            for i, module in enumerate(accessor.modules)
            if module is not None
        }
        self._written: dict[Module, dict[str, Tensor]] = {}

    def has(self, module: Module, name: str) -> bool:
        """Whether the model still gives it there."""
        return module in self.accessors[name].modules

    # Reading.

    def read(self, module: Module, calls: Callable[[str], list[Any]], seq: int, past: int) -> None:
        """Check what has been seen of a layer: shapes, and that they follow from one another."""
        layer = self._layers[module]
        found: dict[str, Tensor] = {}
        for name in INTERNALS:
            values = calls(name)
            if len(values) == 1:
                found[name] = values[0]
            elif name != "attention_probabilities":  # it has a check of its own
                self._expect(False, name, layer, f"fires {len(values)} times in a forward pass, not once")
        for name, shape in self._shapes(found, seq, past).items():
            value = found[name]
            right = tuple(value.shape) == shape
            self._expect(right, name, layer, f"is {tuple(value.shape)}, not {shape}")
            self._expect(not bool(value.isnan().any()), name, layer, "has values that are no numbers")
            if not right:
                del found[name]
        self._follow(layer, found, list(found))
        for name in found:
            missing = [other for other in ROWS[name].shown_by if other not in found]
            why = f"nothing shows that it is that without {', '.join(missing[:1])}"
            self._expect(not missing, name, layer, why)

    @staticmethod
    def _shapes(found: dict[str, Tensor], seq: int, past: int) -> dict[str, tuple[int, ...]]:
        """The shapes that they have to have, given how many heads the pattern has."""
        if "attention_probabilities" not in found:
            return {}
        heads = found["attention_probabilities"].shape[1]
        shared = found["keys"].shape[1] if "keys" in found else heads
        width = {name: value.shape[-1] for name, value in found.items()}
        sizes = dict.fromkeys(("seq", "query"), seq) | {
            "key": past + seq,
            "batch": 2,
            "head": heads,
            "kv_head": heads if heads % shared else shared,
            "head_dim": width.get("queries", 0),
            "value_dim": width.get("values", 0),
        }
        names = found.keys() - {"attention_probabilities"}  # which has a check of its own
        return {name: tuple(sizes[axis] for axis in ROWS[name].axes) for name in found if name in names}

    def _follow(self, layer: int, values: dict[str, Tensor], names: list[str]) -> None:
        """Check that the pattern is that of the scores, and what the heads give that of the pattern and the values."""
        pattern = values.get("attention_probabilities")
        if pattern is None or pattern.ndim != 4:
            return
        if "attention_scores" in names:
            own = values["attention_scores"].float().softmax(-1) * pattern.float().sum(-1, keepdim=True)
            self._close("attention_scores", layer, "their softmax is not the pattern", own, pattern)
        for name in names:
            factors = ROWS[name].product_of
            if factors and values.keys() >= {*factors}:
                own = _product(values, factors, name)
                for one in (name, *(one for one in factors if name in ROWS[one].shown_by)):
                    self._close(one, layer, f"{' times '.join(factors)} is not {name}", own, values[name])
            total = ROWS[name].sums_to
            if total in values:
                self._close(name, layer, f"its sum is not {total}", _product(values, (name,), total), values[total])

    def _close(self, name: str, layer: int, what: str, one: Tensor, other: Tensor) -> None:
        off = self._off(one, other)
        self._expect(off <= self._tolerance, name, layer, f"{what}, off by {off:.1e} (relative)", off)

    @staticmethod
    def _off(one: Tensor, other: Tensor) -> float:
        scale = max(float(other.abs().max()), 1e-30)
        return float((one.float() - other.float()).abs().max()) / scale

    # Writing.

    @property
    def sums(self) -> dict[str, str]:
        """The names that are written in a pass of their own: those whose sums are another one, with that."""
        return {name: total for name in INTERNALS if (total := ROWS[name].sums_to)}

    def change_sums(self, slot: Slot, seen: Callable[[Module, str], Tensor]) -> None:
        """Change a name whose sum is another one; check that one, and put it back, so that nothing else changes."""
        module, name = slot.module, slot.kind
        written = self._written.setdefault(module, {})
        if name in self.sums and self.has(module, name):
            slot.value = written[name] = self._changed(name, slot.value)
        elif self.has(module, name):
            for one in self.sums.keys() & written.keys():
                own = _product(written, (one,), name)
                self._close(one, self._layers[module], f"written, its sum is not {name}", own, slot.value)
            slot.value = seen(module, name)

    def change(self, slot: Slot, seen: Callable[[Module, str], Tensor]) -> None:
        """Check what has become of the earlier changes of this call, and change this."""
        module, name = slot.module, slot.kind
        if name in self.sums or not self.has(module, name):
            return
        clean = seen(module, name)
        layer, now = self._layers[module], slot.value
        written = self._written.setdefault(module, {})
        if name == "attention_scores":
            self._scored(layer, written, partial(seen, module), now[1], clean[1])
        elif name == "attention_probabilities" and "attention_scores" in written:
            self._moved("attention_scores", layer, written, now[1, :, -1], clean[1, :, -1])
            self._follow(layer, {**written, name: now}, ["attention_scores"])
        elif name == "heads_output":
            self._moved("values", layer, written, now[1, 0], clean[1, 0])
            self._moved("attention_probabilities", layer, written, now[1, -1], clean[1, -1])
            if {"values", "attention_probabilities"} <= written.keys():
                self._follow(layer, {**written, name: now}, ["values", "heads_output"])
        if (
            name in ("queries", "keys")
            and self.has(module, "attention_scores")
            and _capped(seen(module, "attention_scores"))
        ):
            slot.value = written[name] = clean.clone()
            slot.value[1, :, _PLACE[name]] = 0  # which takes its scores away from the cap, to nothing
        else:
            slot.value = written[name] = self._changed(name, clean)

    def output(self, module: Module, layer: int, now: Tensor, clean: Tensor) -> None:
        """Check what has become of the changes in the attention's output."""
        written = self._written.get(module, {})
        for row, name in enumerate(("heads_output", "attention_probabilities")):
            if name in written:
                # By more than rounding, as the pattern has been changed. (It was at the last position.)
                off = self._off(now[row][-1], clean[row][-1])
                self._expect(off > self._tolerance, name, layer, "writing it changes no attention")
                return

    def _scored(
        self,
        layer: int,
        written: dict[str, Tensor],
        seen: Callable[[str], Tensor],
        now: Float[Tensor, "head query key"],
        clean: Float[Tensor, "head query key"],
    ) -> None:
        """Check that scores are the products of queries and keys: those of each changed head and position move with them.

        A cap bends what they are, and some models take off the largest of each query: so it is signs that are compared,
        of the changes and of their differences within a query.
        """
        if not {"queries", "keys"} <= written.keys():
            for name in ("queries", "keys"):
                self._moved(name, layer, written, now, clean)
            return
        queries, keys = seen("queries")[1], seen("keys")[1]
        times = queries.shape[0] // keys.shape[0]
        there = (torch.minimum(clean, now) > -1e4).cpu()  # what is masked does not move, nor shows what it would be
        change = torch.where(there, (now - clean).float().cpu(), 0.0)
        of_query = (written["queries"][1] - queries)[:, -1:] @ keys.repeat_interleave(times, 0).mT
        of_key = queries @ (written["keys"][1] - keys)[:, :1].repeat_interleave(times, 0).mT
        for name, expected, moved, counts in (
            # The first key is another one by now, and so is the last query.
            ("queries", of_query[:, 0, 1:], change[:, -1, 1:], there[:, -1, 1:]),
            ("keys", of_key[:, 1:-1, 0], change[:, 1:-1, 0] - change[:, 1:-1, 1], there[:, 1:-1, :2].all(-1)),
        ):
            expected = expected.float().cpu()
            alone = _agreement(moved, expected, counts)
            if name == "queries":
                pairs = counts[:, :, None] & counts[:, None]
                moves, expects = (value[:, :, None] - value[:, None] for value in (moved, expected))
                alone = max(alone, _agreement(moves, expects, pairs))
            why = f"only {alone:.0%} of the changes in the scores are those of {name} changed"
            self._expect(alone >= AGREEMENT, name, layer, why)

    def _moved(self, name: str, layer: int, written: dict[str, Tensor], now: Tensor, clean: Tensor) -> None:
        if name in written:
            self._expect(not torch.equal(now, clean), name, layer, "writing it changes nothing that comes of it")

    @staticmethod
    def _changed(name: str, clean: Tensor) -> Tensor:
        new = clean.clone()
        ramp = torch.linspace(-1, 1, clean.shape[-1], device=clean.device, dtype=clean.dtype)
        if name in ("queries", "keys"):  # in another direction for each head
            width, heads = (torch.arange(clean.shape[axis], device=clean.device) for axis in (-1, 1))
            each = ramp[(width - 3 * heads[:, None]) % len(ramp)]
            new[1, :, _PLACE[name]] += each * clean.abs().max()
        elif name == "values":
            new[1, :, 0] += ramp * (1 + clean.abs().max())
        elif name == "attention_scores":
            # The key that counts second most is made to count most, by more than rounding: were it the first that was raised,
            # nothing would come of it where the softmax is saturated.
            first, second = clean[1, :, -1].topk(2).indices.split(1, -1)
            most = clean[1, :, -1].gather(-1, first)
            most = most + (16 * torch.finfo(clean.dtype).eps * most.abs()).clamp(min=1)
            new[1, :, -1].scatter_(-1, second, most)
        elif name == "attention_probabilities":
            new[1, :, -1] *= 0.5
        else:
            new[0] += ramp * (1 + clean.abs().max())
        return new


def _product(values: dict[str, Tensor], factors: Sequence[str], name: str) -> Tensor:
    """What these give, by the names of their axes, for that name."""
    heads = max(values[one].shape[1] for one in factors)
    each = (
        values[one].repeat_interleave(heads // values[one].shape[1], 1) if "kv_head" in ROWS[one].axes else values[one]
        for one in factors
    )
    return torch.einsum(equation(factors, name), *(one.float() for one in each))


def _capped(scores: Float[Tensor, "batch head query key"]) -> bool:
    """Whether a cap holds so many scores at its end that what is added to queries and keys would not be seen in them."""
    sizes = scores[scores > -1e4].abs()
    return len(sizes) > 0 and bool((sizes > 0.99 * sizes.max()).float().mean() > 0.05)


def _agreement(one: Tensor, other: Tensor, counts: Tensor) -> float:
    """How many of those that count have the same sign in both; all, if none counts. One that has not moved has none."""
    other = torch.where(other.abs() > 1e-3 * other.abs().max(), other, 0.0)
    counts = counts & (other != 0)
    if not bool(counts.any()):
        return 1.0
    return float((one.sign() == other.sign())[counts].float().mean())
