"""The numbers that a plan is expected to give: how much it changes at each point, and what the model then says, on some prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnatomy.errors import NnatomyError, PlanError
from nnatomy.plans.identity import identity
from nnatomy.plans.replay import Replay, Seen

if TYPE_CHECKING:
    from nnatomy.plans.plan import Plan

#: How far off the numbers may be on the same weights, by dtype, relative to the larger one.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
#: How many logits are kept.
_TOP = 5
_OF_TOKEN = "logits: of token "


@dataclass(frozen=True)
class Number:
    """One number on one prompt.

    Attributes:
        prompt: which of the plan's prompts.
        name: of a point and what of it, or of the logits.
        expected: where the plan was recorded.
        found: here.
        scale: what a difference is at least relative to: the largest logit; a hundredth of the value that is changed.
    """

    prompt: int
    name: str
    expected: float
    found: float
    scale: float = 0.0

    @property
    def off(self) -> float:
        """The relative difference; 0 if they are equal, infinite where one is no number."""
        if self.expected == self.found:
            return 0.0
        off = abs(self.expected - self.found) / max(abs(self.expected), abs(self.found), self.scale)
        return off if off == off else float("inf")


@dataclass(frozen=True)
class Check:
    """How far off a plan is on a model.

    Attributes:
        numbers: each expected number, and what it is here.
        differs: what of the model is another: "weights", "tokenizer", "dtype", ...; empty if it is the same model.
        tolerance: how far off a number may be on the same weights.
        not_run: why prompts were not run, if they were not.
    """

    numbers: tuple[Number, ...]
    differs: tuple[str, ...]
    tolerance: float
    not_run: str = ""

    @property
    def same_weights(self) -> bool:
        """Whether the model has the very weights that the plan was recorded on."""
        return "weights" not in self.differs

    @property
    def worst(self) -> Number | None:
        """The number that is most off."""
        return max(self.numbers, key=lambda one: one.off, default=None)

    @property
    def ok(self) -> bool:
        """Whether all numbers are there, and within the tolerance."""
        return bool(self.numbers) and all(one.off <= self.tolerance for one in self.numbers)

    def __str__(self) -> str:
        model = f"another model (other {', '.join(self.differs)})" if self.differs else "the same model"
        lines = [f"{model}; {self._told()}"]
        width = max((len(one.name) for one in self.numbers), default=0)
        lines += [
            f"  prompt {one.prompt}  {one.name:<{width}}  expected {one.expected:<12.6g} found {one.found:<12.6g} off {one.off:.1e}"
            for one in self.numbers
        ]
        return "\n".join(lines)

    def _told(self) -> str:
        if self.not_run or self.worst is None:
            return f"the numbers were not compared: {self.not_run}"
        if self.worst.off == 0:
            return "all numbers are equal, bit for bit"
        return f"numbers are off by {self.worst.off:.1e} at most ({self.worst.name})"

    @property
    def told(self) -> str:
        """The first line of it."""
        return str(self).partition("\n")[0]


def measured(
    model: Any, replays: Sequence[Replay], ids: list[int], tokens: Sequence[int] | None = None
) -> dict[str, float]:
    """The numbers that a plan gives on one prompt.

    Args:
        tokens: those whose logits are among them; the most probable ones if None.
    """
    edited = model
    for one in replays:
        one.seen = {}
        edited = edited.edit(one)
    try:
        with torch.no_grad():
            logits = _logits(edited, ids)
        numbers: dict[str, float] = {}
        for one in replays:
            assert one.seen is not None
            numbers |= _of_points(one, one.seen)
    finally:
        for one in replays:
            one.seen = None
    if logits is not None:
        last = finite(logits[0, -1])
        numbers["logits: norm"] = float(last.norm())
        tokens = last.topk(min(_TOP, len(last))).indices.tolist() if tokens is None else tokens
        numbers |= {f"{_OF_TOKEN}{token}": float(last[token]) for token in tokens if token < len(last)}
    return numbers


def _logits(edited: Any, ids: list[int]) -> Any:
    """The logits of a prompt; None if the model has no head."""
    if "logits" in edited._refused:
        edited.trace(ids).run()
        return None
    with edited.trace(ids):
        logits = edited.logits
    return logits


def _of_points(replay: Replay, seen: Seen) -> dict[str, float]:
    numbers = {}
    for point, (before, after) in seen.items():
        if after is not None:
            name = f"{point}" if replay.number == 0 else f"{point} of block {replay.number}"
            before, after = finite(before), finite(after)
            numbers[f"{name}: norm before"] = float(before.norm())
            numbers[f"{name}: norm of the change"] = float((after - before).norm())
    return numbers


def finite(value: Any) -> Any:
    """In float32, with 0 for what is masked by an infinite number."""
    return value.float().nan_to_num(0.0, 0.0, 0.0)


def compare(plan: Plan, model: Any) -> Check:
    """The plan's numbers on that model. Raises PlanError if it does not fit."""
    model = model.without_edits()
    here = identity(model)
    differs = tuple(key for key in here if here[key] != plan.about.get(key) and key not in ("id", "revision"))
    tolerance = max(TOLERANCE.get(str(one["dtype"]), 1e-4) for one in (here, plan.about))
    numbers: list[Number] = []
    not_run = "" if plan.prompts else "it has none"
    for i, prompt in enumerate(plan.prompts):
        ids = prompt["ids"]
        if "tokenizer" in differs and plan.about.get("tokenizer") is not None:
            if prompt.get("text") is None or model.tokenizer is None:
                not_run = not_run or f"prompt {i} is of another tokenizer's tokens"
                continue
            ids = model.prepare(prompt["text"])["input_ids"][0].tolist()
        try:
            tokens = [int(name.removeprefix(_OF_TOKEN)) for name in prompt["numbers"] if name.startswith(_OF_TOKEN)]
            found = measured(model, [Replay(plan, j, model) for j in range(len(plan.blocks))], ids, tokens)
        except NnatomyError as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"The plan does not fit this model: {error}") from None
        nan = float("nan")
        expected = prompt["numbers"]
        numbers += [
            Number(i, name, one, found.get(name, nan), _scale(name, expected)) for name, one in expected.items()
        ]
    return Check(tuple(numbers), differs, tolerance, "" if numbers else not_run or "nothing to compare")


def _scale(name: str, expected: dict[str, float]) -> float:
    if name.startswith(_OF_TOKEN):
        return max(abs(one) for other, one in expected.items() if other.startswith(_OF_TOKEN))
    before = name.replace("norm of the change", "norm before")
    return 0.0 if before == name else abs(expected.get(before, 0.0)) / 100
