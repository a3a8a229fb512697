"""A trace that knows its prompts at any time, not only before the first layer."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import Cache
from transformers.utils.generic import ModelOutput

from nnatomy.arch_configs import CACHE_NAMES, cached_positions, given_cache, has_decoder
from nnatomy.blocks.rows import UnknownRows
from nnatomy.blocks.schedule import Invoke, Schedule
from nnatomy.core import Collector, Slot
from nnatomy.core.frames import user_frames
from nnatomy.core.run import Run
from nnatomy.core.thread_state import ThreadState
from nnatomy.errors import InputError, NotInThisModelError, a_kind
from nnatomy.parallel import LockstepRun
from nnatomy.standardized.inputs import OPTIONS
from nnatomy.standardized.kept_state import states_in
from nnatomy.standardized.parts import Parts
from nnatomy.standardized.recorded import Recorded
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
        end: of a generation that may need more positions than the model has: how many it has, and that in words.
        media: the names of the arguments that are made of images, videos and sound.
    """

    media: frozenset[str] = frozenset()
    end: tuple[int, str] | None = None
    mask: Any = None
    seq: int | None = None
    untold: str = ""


class RootInputs(Collector):
    """The arguments of the model's forward in the newest step, after all edits.

    Args:
        needed: the names of those that the first step has to have.
        look: is shown them.
        opened: the file and line that the trace was opened at.

    Attributes:
        given: what the prompts were before a wrapper or `generate` had them.
        length, decoder_length: how many positions the first step had; those of the decoder.
        once: the modules of which standard names have been asked for in this step, each with the name and layer.
    """

    def __init__(
        self,
        run: Run,
        given: Given,
        needed: Iterable[str],
        look: Callable[[Mapping[str, Any]], None],
        opened: tuple[str, int],
    ) -> None:
        self.modules = {run.root}
        self.kinds = {"input": None, "output": None}
        self.once: dict[Module, tuple[str, int]] = {}
        self.given = given
        self.slot: Slot | None = None
        self.length = 0
        self.decoder_length = 0
        self._tokens = 0
        self._root = root = run.root
        self._progress = run.progress
        self._decodes = has_decoder(root)
        self._needed = tuple(needed)
        self._look = look
        self._opened = opened

    def take(self, slot: Slot) -> None:
        if slot.kind == "output":
            self.check_calls()
            self.once.clear()
            return
        self._check_soft_prompt(slot.value[1])
        if slot.step == 0:
            self._warn_of_two_caches(slot.value[1])
        self.slot = slot
        self._check_end(slot)
        self._look(slot.value[1])
        self.length = self.length or positions_in(slot.value[1])
        self.decoder_length = self.decoder_length or positions_in(slot.value[1], decoder=True)
        lost = [name for name in self._needed if slot.value[1].get(name) is None]
        self._needed = ()
        if lost:
            raise InputError(
                f"{lost[0]}=...: {type(self._root).__name__}.generate does not hand it on to the model, which would run "
                "without it. Trace the forward passes with it one after the other, or leave it out."
            )

    def _check_end(self, slot: Slot) -> None:
        """Raise InputError if the step needs more positions than the model has."""
        if self.given.end is None:
            return
        (longest, says), arguments = self.given.end, slot.value[1]
        if slot.step and positions_in(arguments) <= longest:
            return
        placed = arguments.get("position_ids")
        length = int(placed.max()) + 1 if isinstance(placed, Tensor) else positions_in(arguments)
        self._tokens = self._tokens or length
        if length > longest:
            new = longest + 1 - self._tokens
            raise InputError(
                f"Step {slot.step} of the generation is at position {length}, and {says}: after a prompt of {self._tokens} tokens "
                f"there is room for {new} new ones, max_new_tokens={new}. For more give a shorter prompt."
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

    def _warn_of_two_caches(self, arguments: Mapping[str, Any]) -> None:
        """Warn of a prefix that the model passes over.

        PEFT gives it by the name that a cache has before Transformers 5.24, beside the cache that `generate` has made.
        """
        given = [name for name in CACHE_NAMES if arguments.get(name) is not None]
        if len(given) > 1:
            warnings.warn_explicit(
                f"{type(self._root).__name__} is given two KV caches, as {given[0]} and as {given[1]}, and makes no use of the "
                "second: a prefix (PEFT's prefix tuning) is in that and has no effect in what is generated, as without nnatomy. "
                "Generate by forward passes of the whole prompts, model(ids).logits, which have the prefix.",
                UserWarning,
                *self._opened,
            )

    def check_calls(self) -> None:
        """Raise NotInThisModelError if a module has been called again since a name has taken its first call for the one of the step.

        Of a pass that is stopped before, nobody knows.
        """
        for module, (name, layer) in self.once.items():
            if (calls := self._progress.calls.get(module, 0)) > 1:
                raise NotInThisModelError(
                    f"{name}[{layer}]: in this pass its module, {a_kind(module)}, is called {calls} times, and none of "
                    "these calls is the layer's: read each by the module's own name, model.path.to.module.calls[k].output."
                )

    def new_positions(self, step: int, of_encoder: bool) -> int:
        """How many positions it was given in that step, or its encoder was; 0 if that does not show.

        With a cache that holds some already, a few models are given all of them, and take the newest themselves.
        """
        if self.slot is None or self.slot.step != step:
            return 0
        arguments, of_decoder = self.slot.value[1], self._decodes and not of_encoder
        tokens = tokens_of(arguments, of_decoder)
        if tokens is None or tokens.ndim != 2 + tokens.is_floating_point():
            return 0
        if step or of_encoder:
            return 0 if step and given_cache(arguments) is not None else tokens.shape[1]
        first = self.decoder_length if of_decoder else self.length
        return tokens.shape[1] if tokens.shape[1] == first else 0


class _PromptSchedule(Schedule):
    def complete(self) -> None:
        if not isinstance(self.run, LockstepRun):
            self._complete()
            return
        try:
            self._complete()
        except BaseException as error:
            self.run.fail(error)
            raise
        self.run.end()

    def _complete(self) -> None:
        super().complete()
        for one in self.run.collectors:
            if isinstance(one, RootInputs):
                one.check_calls()


class PromptTrace(Trace):
    """A trace that knows its prompts at any time.

    Args:
        given: what is known of the prompts before.
        generated: in a generation, the names of the arguments that the user has given to it.
        sender: what has a server run the model's forward passes, if one does: see `nnatomy.remote.sending`.

    Attributes:
        names: these, with those of blocks of `invoke`.
    """

    def __init__(
        self,
        root: Parts,
        call: Any,
        *,
        given: Given,
        generated: set[str] | None = None,
        sender: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(root, call, **options)
        self._sender = sender
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
        run = self.block.run
        recorded = Recorded(run, self._root)
        recorded.look(dict.fromkeys(self.names, True))  # an encoder comes before the first step
        run.collect(RootInputs(run, self._given, needed, recorded.look, self._opened))
        if self._sender is not None:
            run.collect(self._sender.passes(run))
        return self

    def _exit(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        well, root, run = False, self._root, self.block.run
        try:
            if error is not None and isinstance(run, LockstepRun):
                run.fail(error)
            super()._exit(kind, error, traceback)
            well = error is None
        finally:
            assert isinstance(root, Parts)
            (root if self._sender is None else self._sender)._block_is_over(well)

    def _run_of(self, call: Callable[[], Any]) -> Run:
        root = self._root
        assert isinstance(root, Parts)
        if root._ranks is None or root._split is None or self._sender is not None:
            return super()._run_of(call)
        run = LockstepRun(root.steps_of, root.module, call, ThreadState())
        run.ranks, run.split, run.device = root._ranks, root._split, root.device
        return run

    def _block_of(self, run: Run) -> Schedule:
        return _PromptSchedule(run, self._root._blocks)

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
