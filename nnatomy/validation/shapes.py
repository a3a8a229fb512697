"""What can be said of a model without computing: the shapes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module

from nnatomy.arch_configs import beside_tokens, has_decoder, main_input
from nnatomy.core import Collector, Slot
from nnatomy.errors import ValidationError
from nnatomy.names import INTERNALS, MODULES
from nnatomy.validation.refusing import report_of
from nnatomy.validation.report import Findings, Report

BATCH, SEQ = 2, 3


def unverified(model: Any) -> Report:
    """The report of a model that nobody has checked."""
    return report_of(model, None, "unverified")


def validate_shapes(model: Any) -> Report:
    """Check over fake tensors that each module's name fires once, with its shape; the rest stays unverified.

    Raises:
        ValidationError: naming all that do not.
    """
    names = [*MODULES, *INTERNALS]
    shapes = _Shapes(model, names)
    prompts = [[0] * SEQ] * BATCH
    inputs: dict[str, Any] = dict(beside_tokens(model.steps_of, BATCH, SEQ))
    if main_input(model.steps_of) == "input_ids":
        inputs["input_ids"] = prompts
    if has_decoder(model.steps_of):
        inputs["decoder_input_ids"] = prompts
    with model.scan(**inputs) as tracer:
        tracer.block.run.collect(shapes)
        tracer.result  # noqa: B018
    findings = Findings()
    hidden = BATCH, SEQ, model.hidden_size
    for name in names:
        accessor = getattr(model, name)
        for i, module in enumerate(accessor.modules):
            if module is not None:
                seen = shapes.seen.get((module, accessor.kind), [])
                findings.expect(len(seen) == 1, name, i, f"fires {len(seen)} times in a forward pass, not once")
                if name in MODULES and len(seen) == 1:
                    findings.expect(seen == [hidden], name, i, f"is {seen[0]}, not {hidden}")
    report = report_of(model, findings, "unverified")
    if failures := findings.texts():
        listing = "\n".join(f"  - {failure}" for failure in failures)
        raise ValidationError(
            f"{len(failures)} name(s) of {report.model} do not have their shape:\n{listing}\n"
            "Give another ArchConfig (arch_config=...).",
            report,
        )
    return report


class _Shapes(Collector):
    """The shapes of what each point holds."""

    def __init__(self, model: Any, names: list[str]) -> None:
        accessors = [getattr(model, name) for name in names]
        self.modules = {module for one in accessors for module in one.modules if module is not None}
        self.kinds = {one.kind: one.tap for one in accessors}
        self.seen: dict[tuple[Module, str], list[tuple[int, ...] | None]] = {}
        self._get = {one.kind: one.get for one in accessors}

    def take(self, slot: Slot) -> None:
        value = self._get[slot.kind](slot.value)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        self.seen.setdefault((slot.module, slot.kind), []).append(shape)
