"""A trace that knows its prompts at any time, not only before the first layer."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import Cache
from transformers.utils.generic import ModelOutput

from nnatomy.arch_configs import cached_positions
from nnatomy.blocks.invoke import Invoke
from nnatomy.blocks.row_slot import UnknownRows
from nnatomy.core import Collector, Slot
from nnatomy.core.frames import user_frames
from nnatomy.errors import InputError
from nnatomy.standardized.inputs import OPTIONS
from nnatomy.standardized.kept_state import states_in
from nnatomy.standardized.parts import Parts
from nnatomy.tracing import Trace


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

    Args:
        needed: the names of those that the first step has to have.

    Attributes:
        given: what the prompts were before a wrapper or `generate` had them.
        length, decoder_length: how many positions the first step had; those of the decoder.
    """

    def __init__(self, root: Module, given: Given, needed: Iterable[str] = ()) -> None:
        self.modules = {root}
        self.kinds = {"input": None}
        self.given = given
        self.slot: Slot | None = None
        self.length = 0
        self.decoder_length = 0
        self._root = root
        self._needed = tuple(needed)

    def take(self, slot: Slot) -> None:
        self._check_soft_prompt(slot.value[1])
        self.slot = slot
        self.length = self.length or positions_in(slot.value[1])
        self.decoder_length = self.decoder_length or positions_in(slot.value[1], decoder=True)
        lost = [name for name in self._needed if slot.value[1].get(name) is None]
        self._needed = ()
        if lost:
            raise InputError(
                f"{lost[0]}=...: {type(self._root).__name__}.generate does not hand it on to the model, which would run "
                "without it. Trace the forward passes with it one after the other, or leave it out."
            )

    def _check_soft_prompt(self, arguments: Mapping[str, Any]) -> None:
        """Raise InputError if a later step has a soft prompt before its token that the KV cache has already.

        PEFT looks for the cache by the name that it has before Transformers 5.24.
        """
        soft = self.length - (self.given.seq or self.length)
        if soft > 0 and arguments.get("inputs_embeds") is not None and cached_positions(arguments):
            raise InputError(
                f"The wrapper of {type(self._root).__name__} puts its soft prompt, of {soft} positions, before every token that is "
                "generated, and not before the prompt alone: it does not find the KV cache. Generate without one: "
                "use_cache=False."
            )


class PromptTrace(Trace):
    """A trace that knows its prompts at any time.

    Args:
        given: what is known of the prompts before.
        generated: in a generation, the names of the arguments that the user has given to it.

    Attributes:
        names: these, with those of blocks of `invoke`.
    """

    def __init__(
        self, root: Parts, call: Any, *, given: Given, generated: set[str] | None = None, **options: Any
    ) -> None:
        super().__init__(root, call, **options)
        self.names = set[str]() if generated is None else generated
        self._given = given
        self._keywords = root._keywords
        self._generating = generated is not None
        opened = next(user_frames())
        self._opened = opened.f_code.co_filename, opened.f_lineno

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
        needed = self._keywords.handed_on(self.names) if self._generating else ()
        self.block.run.collect(RootInputs(self.block.run.root, self._given, needed))
        return self

    def invoke(self, *inputs: Any, **kwargs: Any) -> Invoke:
        self._keywords.check(set(kwargs).difference(OPTIONS), OPTIONS, self._generating)
        self.names |= {name for one in (*inputs, kwargs) if isinstance(one, Mapping) for name in one}
        if states_in((inputs, kwargs)):  # a cache of the caller's is not left half advanced
            self._early_stop = False
        return super().invoke(*inputs, **kwargs)

    invoke.__doc__ = Trace.invoke.__doc__

    def __del__(self) -> None:
        if getattr(self, "_call", None) is not None and hasattr(self, "_opened") and not sys.is_finalizing():
            what = "generate" if self._generating else "trace"
            warnings.warn_explicit(
                f"model.{what}(...) was not run: it opens a trace. Write `with model.{what}(...) as tracer:`, or "
                f"model.{what}(...).run()" + (", or model.generate_text(...)." if self._generating else "."),
                UserWarning,
                *self._opened,
            )
