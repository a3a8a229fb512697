"""The pass that reads: every name on every layer fires once, with its shape and finite values."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nnatomy.arch_configs import cached_positions
from nnatomy.arch_configs.infer import NOT_RUN
from nnatomy.validation.collectors import Seen
from nnatomy.validation.cross import CrossAttentions
from nnatomy.validation.internals import Internals
from nnatomy.validation.near import distance
from nnatomy.validation.passes import PROMPT_LENGTH, Passes
from nnatomy.validation.patterns import check_pattern


class Reading:
    """The checks of what is read.

    Attributes:
        seen: the values of all modules.
        logits: the model's.
        seq: how many positions the layers have.
        past: how many keys come before theirs, of a cache that a wrapper gives the model (prefix tuning).
        found: by layer, what `standardized.shown` has found in it, by name.
    """

    def __init__(self, passes: Passes, internals: Internals, cross: CrossAttentions) -> None:
        self._passes, self._internals, self._cross = passes, internals, cross
        self.model, self.expect = passes.model, passes.expect
        anatomy = self.model._anatomy
        self._names = [*cross.names, *passes.names]
        modules = {module for name in self._names for module in getattr(self.model, name).modules}
        ends = {anatomy.ln_final, anatomy.lm_head, self.model.steps_of, anatomy.embed_tokens}
        self.seen = Seen((modules | ends) - {None}, {"input": None, "output": None})

    def run(self) -> None:
        """Read all there is."""
        model, seen = self.model, self.seen
        taps = Seen(self._internals.modules | self._cross.parts, self._internals.kinds)
        finder = model._sums.finder()
        with self._passes.trace([seen, taps, finder]) as tracer:
            self.logits = self._passes.given(tracer.result)
        model._sums.learn(finder)
        self.found = {layer: sums.values for layer, sums in finder.found.items()}
        calls = len(seen.of(model.steps_of, "output"))
        what = f"{type(model.steps_of).__name__} is called {calls} times, not once"
        self.expect(calls == 1, "logits", None, what)
        self.seq = self._seq()
        given = [arguments for _, arguments in seen.of(model.steps_of, "input")]
        self.past = max(0, *(cached_positions(one) - self.seq for one in given), 0)  # a cache has all by now
        for name in self._names:
            self._check(name)
        self._check_attentions(taps)
        seen.calls.update(taps.calls)
        self._check_handed_on()

    def _seq(self) -> int:
        inputs = self._passes.inputs
        says_one_thing = (
            self.logits.ndim != 3
        )  # of a whole prompt: what it gives first is projected, and has no positions
        if says_one_thing or (not self._passes.reads_tokens and "decoder_input_ids" not in inputs):
            first = self.seen.of(self.model._anatomy.layers[0], "input")[0]
            return int(self.model.layers_input.get(first).shape[1])
        # A soft prompt, which a wrapper puts before the tokens, has positions too, and so have patches.
        return max(PROMPT_LENGTH, self.logits.shape[1])

    def _check(self, name: str) -> None:
        accessor = getattr(self.model, name)
        for i, module in enumerate(accessor.modules):
            if module is not None:
                shape = (2, self.seq, self.model.hidden_size)
                self._value(name, i, accessor, self.seen.of(module, accessor.kind), shape)
        accessor.changed_later = self.seen.changed_later(accessor.kind) & set(accessor.modules)

    def _check_attentions(self, taps: Seen) -> None:
        patterns = self.model.attention_probabilities
        for i, module in enumerate(patterns.modules):
            if module is not None:
                calls = taps.of(module, patterns.kind)
                heads = self.model.dimensions.num_heads
                if heads is None and len(calls) == 1 and isinstance(calls[0], Tensor):
                    heads = calls[0].shape[1]  # they vary from layer to layer
                shape = 2, heads, self.seq, self.past + self.seq
                pattern = self._value(patterns.name, i, patterns, calls, shape)
                if pattern is not None:
                    scores = taps.of(module, "attention_scores")
                    known = scores[0] if len(scores) == 1 and scores[0].shape == pattern.shape else None
                    check_pattern(self._passes, i, module, pattern, known)
                self._internals.read(module, partial(taps.of, module), self.seq, self.past)
        self._cross.read(taps.of, self.seq)
        self._learn_sizes(taps)
        for accessor in (*self._internals.accessors.values(), self.model.cross_attention_probabilities):
            accessor.changed_later = taps.changed_later(accessor.kind)

    def _learn_sizes(self, taps: Seen) -> None:
        """The sizes that show are those that the model has, whatever its config says."""
        model = self.model
        shapes = {
            name: {
                tuple(value.shape)
                for i, module in enumerate(accessor.modules)
                if module is not None and not self._failed(name, i)
                for value in taps.of(module, accessor.kind)
            }
            for name, accessor in self._internals.accessors.items()
        }
        vocab_size = self.logits.shape[-1] if model._anatomy.gives_logits else None
        model.dimensions = model.dimensions.seen(shapes["queries"], shapes["keys"], vocab_size)

    def _value(
        self, name: str, layer: int, accessor: Any, calls: list[Any], shape: tuple[int | None, ...]
    ) -> Tensor | None:
        expect = partial(self.expect, False, name, layer)
        if len(calls) != 1:
            compiled = any(m._compiled_call_impl is not None for m in self.model.hf_model.modules())
            unseen = " (what is compiled (torch.compile) calls its modules unseen)"
            why = unseen if compiled and not calls else ""
            expect(f"fires {len(calls)} times in a forward pass, not once{why}")
            return None
        try:
            value = accessor.get(calls[0])
        except (TypeError, IndexError, KeyError, StopIteration, AttributeError, RuntimeError) as error:
            expect(f"holds no tensor where hidden states should be ({error})")
            return None
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            expect(f"is {found}, not {shape}")
            return None
        self.expect(bool(value.isfinite().all()), name, layer, "has values that are not finite")
        return value

    def _check_handed_on(self) -> None:
        """Each layer is given what the one before gives."""
        outputs, inputs = self.model.layers_output, self.model.layers_input
        anatomy = self.model._anatomy
        ran = [i for i, kind in enumerate(anatomy.kinds) if kind != NOT_RUN]
        for i, j in pairwise(ran):
            before, after = anatomy.layers[i], anatomy.layers[j]
            if not self._failed(outputs.name, i) and not self._failed(inputs.name, j):
                gives = outputs.get(self.seen.only(before, outputs.kind))
                given = inputs.get(self.seen.only(after, inputs.kind))
                what = f"is not layers_input[{j}], off by {distance(gives, given):.1e} (relative)"
                self.expect(torch.equal(gives, given), outputs.name, i, what, 0.0)

    def _failed(self, name: str, layer: int) -> bool:
        there = getattr(self.model, name).modules[layer] is not None
        return not there or (name, layer) in self._passes.findings.failures
