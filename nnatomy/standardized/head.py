"""From hidden states to logits, exactly as the model does it.

`lm_head(ln_final(h))` is not what a quarter of the architectures compute: some cap or scale their
logits, project first, or transform. The long way is right by construction: the model's own forward
runs with every layer skipped and `h` put in as what the last one gave. Validation compares the two;
the short way is used where it has been shown to be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map_only

from nnatomy.arch_configs import (
    Anatomy,
    Shards,
    accepts,
    beside_tokens,
    example_inputs,
    has_decoder,
    input_device,
    logits_of,
    takes,
)
from nnatomy.core import Collector, Slot
from nnatomy.errors import NotInThisModelError
from nnatomy.standardized.hidden import output_of, with_output
from nnatomy.standardized.left_out import HandedOn
from nnatomy.standardized.watched import watcher
from nnatomy.tracing import Trace, Traceable

NO_HEAD = "the model has no head, and gives no logits: load its class with one, if there is one"
Hidden = Float[Tensor, "*rows hidden"]
Logits = Float[Tensor, "*rows vocab"]


class Head:
    """The model's own way from the last layer's output to the logits.

    Attributes:
        short: whether `lm_head(ln_final(h))` has been shown to be the same.
        refused: why neither way has.
    """

    def __init__(self, root: Traceable, anatomy: Anatomy, shards: Shards) -> None:
        self.short = False
        #: Whether final norm and unembedding have their parameters by themselves.
        self.runs_alone = not shards.around(anatomy.ln_final, anatomy.lm_head)
        self.refused = "" if anatomy.gives_logits else NO_HEAD
        self._shards = shards
        self._root = root
        self._anatomy = anatomy
        self._forms: dict[Module, Any] = {}
        self._giving_more: set[Module] = set()
        self._handing_on: set[Module] | None = None

    def __call__(self, hidden: Hidden) -> Logits:
        if self.refused:
            raise NotInThisModelError(f"project_on_vocab: {self.refused}.")
        return self._where_layers_run(self.short_way, hidden) if self.short else self.long_way(hidden)

    def _where_layers_run(self, way: Callable[[Hidden], Logits], hidden: Hidden) -> Logits:
        """In the thread that has run them, and so has OpenMP's helpers and the mathematics library's buffers."""
        if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            return way(hidden)  # what `torch.func` transforms, it transforms in its own thread
        return Trace(self._root, partial(way, hidden)).run()

    def short_way(self, hidden: Hidden) -> Logits:
        """The final norm, then the unembedding."""
        assert self._anatomy.ln_final is not None
        assert self._anatomy.lm_head is not None
        normed = self._anatomy.ln_final(hidden)
        rows = normed.reshape(-1, normed.shape[-1])
        if not 8 <= len(rows) < 16 or rows.device.type != "cpu" or watcher.get() is not None:  # a plan is of any number
            return self._anatomy.lm_head(normed)
        # MKL multiplies 16 rows by a large matrix in half the time of 12.
        logits = self._anatomy.lm_head(torch.nn.functional.pad(rows, (0, 0, 0, 16 - len(rows))))
        return logits[: len(rows)].reshape(*hidden.shape[:-1], -1)

    def long_way(self, hidden: Hidden) -> Logits:
        """The model's forward with its layers skipped, each row a prompt of one token."""
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        with self._trace(rows.shape[0]) as tracer:
            tracer.block.run.collect(_SkipLayers(self._anatomy.layers, rows, self.in_form))
            logits = logits_of(tracer.result)
        assert logits is not None
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def caps(self, hidden: Float[Tensor, "one one hidden"], given: Float[Tensor, "one one vocab"]) -> bool:
        """Whether logits are other than what the unembedding gives (here of `hidden`) where that is large, as beyond a soft cap."""
        enlarge = _Enlarge(self._anatomy.lm_head, given)
        with self._trace(1) as tracer:
            tracer.block.run.collect(_SkipLayers(self._anatomy.layers, hidden, self.in_form), enlarge)
            logits = logits_of(tracer.result)
        return logits is None or not torch.equal(logits, enlarge.given)

    @contextmanager
    def _trace(self, rows: int) -> Iterator[Trace]:
        """Of a whole pass over prompts of one token."""
        with self._shards.gathered(self._root.module), self._root.trace(**self._inputs(rows)) as tracer:
            yield tracer

    def _inputs(self, rows: int) -> dict[str, Any]:
        """Prompts of one token, whichever, and no cache; an encoder is not run for it."""
        no_cache = {"use_cache": False} if accepts(self._root.module, "use_cache") else {}
        return {**self._prompts(rows), **no_cache}

    def _prompts(self, rows: int) -> dict[str, Any]:
        device = input_device(self._anatomy.embed_tokens)
        padding = getattr(self._root.module.config, "pad_token_id", None)
        ids = torch.full((rows, 1), int(padding == 0), device=device)  # XLM makes a padding's stream zeros
        if not has_decoder(self._root.module):
            others = beside_tokens(self._root.module, rows, 1)
            return {"input_ids": ids, **{name: value.to(device) for name, value in others.items()}}
        if not takes(self._root.module, "encoder_outputs"):
            return example_inputs(self._root.module, rows, 1, device)
        encoder: Any = self._root.module.get_encoder()  # type: ignore[operator]
        with torch.no_grad(), self._shards.gathered(encoder):
            given = encoder(**example_inputs(encoder, 1, 3, device))
        states = tree_map_only(Tensor, lambda value: value.new_zeros((rows, *value.shape[1:])), given)
        return {"decoder_input_ids": ids, "encoder_outputs": states}

    def learn_forms(self, forms: dict[Module, Any]) -> None:
        """Remember what each layer returns: one of its outputs, whose tensors are dropped."""
        self._forms = {module: _emptied(value) for module, value in forms.items()}
        self._giving_more = {module for module, value in forms.items() if _has_more(value)}

    def in_form(self, layer: Module, hidden: Tensor) -> Any:
        """`hidden` as what that layer returns: a tensor, or a tuple that begins with it."""
        self._know(layer)
        return with_output(self._forms[layer], hidden)

    def gives_more(self, layer: Module) -> bool:
        """Whether that layer returns more than hidden states."""
        self._know(layer)
        return layer in self._giving_more

    def hands_on(self, layer: Module) -> bool:
        """Whether a later layer is given some of that (its choice of keys, say)."""
        if self._handing_on is None:
            handed = HandedOn(self._anatomy.ran)
            with torch.no_grad(), self._trace(1) as tracer:
                tracer.block.run.collect(handed)
                tracer.result  # noqa: B018
            self._handing_on = handed.by
        return layer in self._handing_on

    def _know(self, layer: Module) -> None:
        if layer not in self._forms:
            self._probe()

    def _probe(self) -> None:
        with torch.no_grad(), self._trace(1) as tracer:
            cache = tracer.cache(self._anatomy.layers)
        paths = self._root.paths(self._anatomy.layers)
        ran = [layer for layer in self._anatomy.layers if paths[layer] in cache]
        self.learn_forms({layer: cache[paths[layer]][0].output for layer in ran})


class _SkipLayers(Collector):
    """Skip every layer; the last one gives `hidden`."""

    def __init__(self, layers: tuple[Module, ...], hidden: Tensor, in_form: Callable[[Module, Tensor], Any]) -> None:
        self.modules = set(layers)
        self.kinds = {"input": None}
        self._hidden = hidden
        self._in_form = in_form

    def take(self, slot: Slot) -> None:
        slot.skip(self._in_form(slot.module, self._hidden))


class _Enlarge(Collector):
    """Skip the unembedding, which gives numbers up to 10,000 (a cap of 30 is tanh(x / 30) * 30)."""

    def __init__(self, lm_head: Any, given: Tensor) -> None:
        self.modules = {lm_head}
        self.kinds = {"input": None}
        self.given = given * (1e4 / given.abs().max().clamp(min=1e-4))

    def take(self, slot: Slot) -> None:
        slot.skip(self.given)


def _has_more(value: Any) -> bool:
    fields = list(value.values()) if isinstance(value, dict) else value
    return isinstance(fields, (tuple, list)) and any(one is not None for one in fields[1:])


def _emptied(value: Any) -> Any:
    state = output_of(value)
    value = with_output(value, state.new_empty((0,) * state.ndim))
    if isinstance(value, tuple):
        rest = (value[0], *(None for _ in value[1:]))
        return type(value)(*rest) if hasattr(value, "_fields") else rest
    return value
