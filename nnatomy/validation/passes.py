"""The forward passes of the validation: the prompts, and the ways to run the model on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import GenerationMixin

from nnatomy.arch_configs import (
    beside_tokens,
    example_inputs,
    has_decoder,
    logits_of,
    main_input,
    masks_windows,
)
from nnatomy.arch_configs.families import PREFIX_LMS
from nnatomy.core import Collector
from nnatomy.errors import NO_LOGITS, InputError
from nnatomy.names import MODULES
from nnatomy.tracing import Trace
from nnatomy.validation.report import Findings

PROMPT_LENGTH = 6


class Passes:
    """A model, what it is run on, and what has been found.

    Attributes:
        inputs: two prompts, as the model takes them.
        findings: where what does not hold is noted; `expect` notes it.
        names: the names for what modules are given and give that the model has.
        may_look_ahead: whether nobody says that it is causal, as what generates does.
        ahead: by layer, how much it attends to later positions, where that may be.
        masks_windows: whether the code around the layers makes masks with a window.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.findings = Findings()
        self.expect = self.findings.expect
        self.names = [name for name in MODULES if {*getattr(model, name).modules} != {None}]
        causal_lm = model.steps_of
        generates = isinstance(causal_lm, GenerationMixin) and type(causal_lm).__name__ not in PREFIX_LMS
        both_ways = any(getattr(model.config, name, True) is False for name in ("is_decoder", "causal"))
        self.may_look_ahead = not generates or both_ways
        self.ahead: dict[int, float] = {}
        self.masks_windows = masks_windows(causal_lm, model._anatomy.layers[0])
        #: Whether what is read, and no more, is one sequence of tokens.
        self.reads_tokens = main_input(causal_lm) == "input_ids" and not has_decoder(causal_lm)
        if self.reads_tokens:
            vocab = min(model.dimensions.vocab_size or model._prompts.vocab_size, model._prompts.vocab_size)
            ids = [(3 + 7 * i * max(1, vocab // 53)) % vocab for i in range(2 * PROMPT_LENGTH)]
            self.inputs = self.prepare([ids[:PROMPT_LENGTH], ids[PROMPT_LENGTH:]])
        else:
            self.inputs = model.prepare(**example_inputs(model.steps_of, 2, PROMPT_LENGTH, model.device))

    def prepare(self, prompts: list[list[int]], **kwargs: Any) -> dict[str, Any]:
        """The arguments for prompts of token ids, with what the model has to be given beside."""
        beside = beside_tokens(self.model.steps_of, len(prompts), max(map(len, prompts)))
        arguments: dict[str, Any] = self.model.prepare(prompts, **beside, **kwargs)
        return arguments

    def plain(self, inputs: dict[str, Any]) -> Any:
        """The last layer's output, or the logits where that is refused, with no trace."""
        if self.model.layers_output.modules[-1] is None:
            return self.given(self.model(**inputs))
        outputs: list[Any] = []

        def stop(_module: Module, _args: Any, output: Any) -> None:
            outputs.append(output)
            raise _Stop

        hook = self.model.layers[-1].module.register_forward_hook(stop)
        try:
            self.model(**inputs)
        except _Stop:
            pass
        finally:
            hook.remove()
        return outputs[0]

    @contextmanager
    def trace(self, collectors: Iterable[Collector]) -> Iterator[Trace]:
        """A trace that these go along with."""
        with self.model.trace(**self.inputs) as tracer:
            tracer.block.run.collect(*collectors)
            yield tracer

    def given(self, result: Any) -> Tensor:
        """The logits, or what a model without a head gives in their place."""
        if not self.model._anatomy.gives_logits:
            first: Tensor = result[0]
            return first
        logits = logits_of(result)
        if logits is None:
            raise InputError(NO_LOGITS.format(type(self.model.steps_of).__name__, type(result).__name__))
        if logits.ndim != 3:
            raise InputError(
                f"{type(self.model.steps_of).__name__} gives logits of {tuple(logits.shape)}, and not of (batch, seq, vocab) for a "
                "batch of 2: a model that says one thing of a whole prompt (a class, say) has no logits of tokens. Load the "
                "model within it that gives hidden states (its base model), or its class with a language head."
            )
        return logits


class _Stop(BaseException):
    """Ends a plain forward pass."""
