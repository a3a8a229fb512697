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


def tokens_of(arguments: Mapping[str, Any], decoder: bool = False) -> Tensor | None:
    """What the arguments of a forward have for each token (that the decoder reads): its id or embedding."""
    names = ("decoder_input_ids", "decoder_inputs_embeds") if decoder else ("input_ids", "inputs_embeds")
    return next((one for name in names if (one := arguments.get(name)) is not None), None)


def positions_in(arguments: Mapping[str, Any], decoder: bool = False) -> int:
    """How many positions the arguments of a forward are of, with those that a cache already has."""
    tokens = tokens_of(arguments, decoder)
    return cached_positions(arguments) + (0 if tokens is None else tokens.shape[1])


class Given:
    """What is known of the prompts before anything runs.

    Attributes:
        mask: the attention mask, if there is one.
        seq: how many positions it has (those of a KV cache that was given, too).
        untold: why nothing says which tokens are padding; "" if something does.
    """

    mask: Any = None
    seq: int | None = None
    untold: str = ""


class RootInputs(Collector):
    """The arguments of the model's forward in the newest step, after all edits.

    Attributes:
        given: what the prompts were before a wrapper or `generate` had them.
        length, decoder_length: how many positions the first step had; those of the decoder.
    """

    def __init__(self, root: Module, given: Given) -> None:
        self.modules = {root}
        self.kinds = {"input": None}
        self.given = given
        self.slot: Slot | None = None
        self.length = 0
        self.decoder_length = 0

    def take(self, slot: Slot) -> None:
        self.slot = slot
        self.length = self.length or positions_in(slot.value[1])
        self.decoder_length = self.decoder_length or positions_in(slot.value[1], decoder=True)


class PromptTrace(Trace):
    """A trace that knows its prompts at any time."""

    def __init__(self, *args: Any, given: Given, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given = given

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
        self.block.run.collectors.append(RootInputs(self.block.run.root, self._given))
        self.block.run.watch()
        return self
