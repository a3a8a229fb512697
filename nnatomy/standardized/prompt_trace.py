"""A trace that knows its prompts at any time, not only before the first layer."""

from __future__ import annotations

from torch.nn import Module

from nnatomy.core import Collector, Slot, Trace


class RootInputs(Collector):
    """The arguments of the model's forward in the newest step, after all edits."""

    def __init__(self, root: Module) -> None:
        self.modules = {root}
        self.kinds = {"input": None}
        self.slot: Slot | None = None

    def take(self, slot: Slot) -> None:
        self.slot = slot


class PromptTrace(Trace):
    """A trace that knows its prompts at any time."""

    def __enter__(self) -> Trace:
        super().__enter__()
        self.block.run.collectors.append(RootInputs(self.block.run.root))
        self.block.run.watch()
        return self
