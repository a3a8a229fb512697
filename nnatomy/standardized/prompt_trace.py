"""A trace that knows its prompts at any time, not only before the first layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import Cache
from transformers.utils.generic import ModelOutput

from nnatomy.arch_configs import cached_positions
from nnatomy.core import Collector, Slot, Trace
from nnatomy.core.blocks.rows import UnknownRows


def tokens_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """What the arguments of a forward have for each token: its id or embedding."""
    given = (arguments.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((one for one in given if one is not None), None)


def positions_in(arguments: Mapping[str, Any]) -> int:
    """How many positions the arguments of a forward are of, with those that a cache already has."""
    tokens = tokens_of(arguments)
    return cached_positions(arguments) + (0 if tokens is None else tokens.shape[1])


class RootInputs(Collector):
    """The arguments of the model's forward in the newest step, after all edits.

    Attributes:
        length: how many positions the first step had.
    """

    def __init__(self, root: Module) -> None:
        self.modules = {root}
        self.kinds = {"input": None}
        self.slot: Slot | None = None
        self.length = 0

    def take(self, slot: Slot) -> None:
        self.slot = slot
        self.length = self.length or positions_in(slot.value[1])


class PromptTrace(Trace):
    """A trace that knows its prompts at any time."""

    @property
    def result(self) -> Any:
        result = super().result
        rows = None if self._block is None else getattr(self.block, "rows", None)
        if rows is None or rows.stop - rows.start == rows.batch or not isinstance(result, ModelOutput):
            return result
        for name, value in list(result.items()):
            if isinstance(value, Cache) or (isinstance(value, Tensor) and not value.ndim):
                result[name] = UnknownRows(
                    f"{name} is one for the prompts of all blocks, with what pads them: trace each prompt alone, or read it in a "
                    "block without a prompt (`with tracer.invoke():`)."
                )
        return result

    result.__doc__ = Trace.result.__doc__

    def __enter__(self) -> Trace:
        super().__enter__()
        self.block.run.collectors.append(RootInputs(self.block.run.root))
        self.block.run.watch()
        return self
