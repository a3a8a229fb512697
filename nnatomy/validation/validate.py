"""What the standard names promise, checked on a loaded model.

Five forward passes of two short prompts:

1. plain: to the last layer's output, by a hook of PyTorch's, for the next pass to be held against (once more, if
   it differs).
2. reading: every name on every layer fires once and has its shape and finite values, a layer's input is the output of
   the one before, attention rows are distributions and causal, the inside of the attention is as `internals` says, and
   the last layer's output is the plain one, bit for bit.
3. writing: in each layer the inside of the attention is changed, its output for the first prompt, the MLP's
   output for the second, which has to show; then the layer's output is put back as it was read, after which
   the next layer's input, and at last the final norm's, are as before, bit for bit. (Without a
   final norm to see, the logits.)
4. taking out: in each layer what the token mixer adds to the stream is made zero for the first prompt, what the MLP
   adds for the second; just that has to be missing then. This is a pass of its own, as in the third nothing of a
   layer is as it was for either prompt. What the additions are has been found in the second. Neurons and the routing
   of experts are changed in this pass, too (see `neurons`, `routers`).
5. padded: the prompts' first tokens again, padded on the left, to the last layer's output, which is as it was. This is
   a pass of its own because the others go the way of most prompts, on which no mask is laid.

Where a decoder attends to an encoder, there is one more pass (see `cross`).

Then the head: `project_on_vocab(layers_output[-1])` is the logits. None of the passes but the second goes on to the
logits, where that can be helped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import GenerationMixin

from nnatomy.arch_configs import beside_tokens, example_inputs, has_decoder, main_input, text_config
from nnatomy.core import Collector, Slot, Trace
from nnatomy.errors import InputError, ValidationError
from nnatomy.validation.algebra import Algebra
from nnatomy.validation.cross import CrossAttentions
from nnatomy.validation.internals import Internals
from nnatomy.validation.names import MODULES
from nnatomy.validation.neurons import Neurons
from nnatomy.validation.refusing import refuse, report_of
from nnatomy.validation.report import Findings, Report
from nnatomy.validation.routers import Routers

PROMPT_LENGTH = 8
#: How far values that are computed in two ways may be apart, relative to the largest, by dtype.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def validate(model: Any, allow_failures: bool = False) -> Report:
    """Check the promises on `model` (a StandardizedTransformer), all of them, and learn its head.

    Args:
        allow_failures: have the names that fail refuse to be read, rather than raise.

    Returns:
        What was found, of each name on each layer.

    Raises:
        ValidationError: naming every promise that failed, where, and with which numbers; its `report` has them too.
    """
    if model.device.type == "meta":
        raise InputError(
            "The model is on the meta device, where nothing can be computed: load it with validate='shapes', which checks "
            "the shapes alone, or validate=False."
        )
    with torch.no_grad(), _eval_mode(model.hf_model):
        findings = _Validation(model).run()
    report = report_of(model, findings)
    if failures := findings.texts():
        name = type(model.hf_model).__name__
        if not allow_failures:
            listing = "\n".join(f"  - {failure}" for failure in failures)
            raise ValidationError(
                f"{len(failures)} promise(s) of the standard names failed on {name}:\n{listing}\nGive another ArchConfig "
                "(arch_config=...), load with allow_failures=True and use the other names, or load with validate=False "
                "and trust no name above.",
                report,
            )
        for place, reasons in findings.failures.items():
            refuse(model, place, f"it failed validation: {'; '.join(reasons)}")
    return report


class _Stop(BaseException):
    """Ends a plain forward pass."""


class _Validation:
    def __init__(self, model: Any) -> None:
        self.model = model
        #: Whether what is read, and no more, is one sequence of tokens.
        self.reads_tokens = main_input(model.steps_of) == "input_ids" and not has_decoder(model.steps_of)
        #: Whether nobody says that it is causal, as what generates does.
        generates = isinstance(model.steps_of, GenerationMixin)
        self.may_look_ahead = not generates or getattr(model.config, "is_decoder", True) is False
        if self.reads_tokens:
            vocab = min(model.dimensions.vocab_size or model._prompts.vocab_size, model._prompts.vocab_size)
            ids = [(3 + 7 * i * max(1, vocab // 53)) % vocab for i in range(2 * PROMPT_LENGTH)]
            self.inputs = self._prepare([ids[:PROMPT_LENGTH], ids[PROMPT_LENGTH:]])
        else:
            self.inputs = model.prepare(**example_inputs(model.steps_of, 2, PROMPT_LENGTH, model.device))
        self.norm = model._anatomy.ln_final
        self.findings = Findings()
        self.expect = self.findings.expect
        dtype = next(
            (
                p.dtype
                for p in (model._anatomy.lm_head or model.hf_model).parameters()
                if p.is_floating_point()
            ),
            torch.float32,
        )
        # A softmax is taken in float32 at most.
        self.internals = Internals(
            model, self.findings, max(TOLERANCE.get(dtype or torch.float32, 1e-4), 1e-4)
        )
        self.cross = CrossAttentions(model, self.findings, 10 * self.internals._tolerance)
        self.names = self.cross.names + [
            name for name in MODULES if any(module is not None for module in getattr(model, name).modules)
        ]

    def _prepare(self, prompts: list[list[int]], **kwargs: Any) -> dict[str, Any]:
        """The arguments for prompts of token ids, with what the model has to be given beside."""
        seq = max(map(len, prompts))
        return self.model.prepare(prompts, **beside_tokens(self.model.steps_of, len(prompts), seq), **kwargs)

    def run(self) -> Findings:
        plain = self._plain(self.inputs)
        seen = self._read(plain)
        self._parts()
        self._ends(seen)
        self._refuse()
        if not self.findings.failures:  # what does not read right cannot be written back
            self._write(seen)
            self._write_cross(seen)
            self._refuse()
            self._algebra(seen)
            if not self.findings.failures:
                self._padded(seen)
            self._head(seen)
            self._refuse()
        return self.findings

    def _refuse(self) -> None:
        """What nobody has claimed, but has been inferred, and does not hold, the model does not have."""
        for place, (why, *_) in list(self.findings.failures.items()):
            if place[0] == "padding":  # nobody claims that a model takes it
                refused = refuse(self.model, place, why)
            else:
                refused = self.model._anatomy.inferred and refuse(
                    self.model, place, f"none that passes validation: {why}"
                )
            if refused:
                del self.findings.failures[place]

    def _plain(self, inputs: dict[str, Any]) -> Any:
        """The last layer's output, with no trace."""
        outputs: list[Any] = []

        def stop(_module: Module, _args: Any, output: Any) -> None:
            outputs.append(output)
            raise _Stop

        hook = self.model.layers[-1].module.register_forward_hook(stop)
        try:
            self.model.hf_model(**inputs)
        except _Stop:
            pass
        finally:
            hook.remove()
        return outputs[0]

    def _given(self, result: Any) -> Tensor:
        """The logits, or what a model without a head gives in their place."""
        return result[0] if self.model._anatomy.lm_head is None else result.logits

    @contextmanager
    def _trace(self, collectors: Iterable[Collector]) -> Iterator[Trace]:
        with self.model.trace(**self.inputs) as tracer:
            tracer.block.run.collectors.extend(collectors)
            tracer.block.run.watch()
            yield tracer

    # Reading.

    def _read(self, plain: Any) -> _Seen:
        model = self.model
        patterns = model.attention_probabilities
        modules = {
            module for name in self.names for module in getattr(model, name).modules if module is not None
        }
        ends = {self.norm, model._anatomy.lm_head, model.steps_of, model._anatomy.embed_tokens} - {None}
        seen = _Seen(modules | ends, {"input": None, "output": None})
        internals = self.internals
        taps = _Seen(internals.modules | self.cross.parts, internals.kinds)
        finder = model._sums.finder()
        with self._trace([seen, taps, finder]) as tracer:
            model._sums.watch_all(tracer.block)
            self.logits = self._given(tracer.result)
        model._sums.learn(finder)
        self.found = {layer: sums.values for layer, sums in finder.found.items()}
        calls = len(seen.of(model.steps_of, "output"))
        self.expect(
            calls == 1, "logits", None, f"{type(model.steps_of).__name__} is called {calls} times, not once"
        )
        # A soft prompt, which a wrapper puts before the tokens, has positions too, and so have patches.
        self.seq = max(PROMPT_LENGTH, self.logits.shape[1])
        if not self.reads_tokens and "decoder_input_ids" not in self.inputs:
            self.seq = model.layers_input.get(seen.of(model._anatomy.layers[0], "input")[0]).shape[1]
        shape = (2, self.seq, model.hidden_size)
        for name in self.names:
            accessor = getattr(model, name)
            for i, module in enumerate(accessor.modules):
                if module is not None:
                    self._values(name, i, accessor, seen.of(module, accessor.kind), shape)
            accessor.changed_later = seen.changed_later(accessor.kind) & set(accessor.modules)
        for i, module in enumerate(patterns.modules):
            if module is not None:
                self._pattern(i, module, taps.of(module, patterns.kind))
                internals.read(module, partial(taps.of, module), self.seq)
        self.cross.read(taps.of, self.seq)
        for accessor in (*internals.accessors.values(), model.cross_attention_probabilities):
            accessor.changed_later = taps.changed_later(accessor.kind)
        seen.calls.update(taps.calls)
        last, get = model._anatomy.layers[-1], model.layers_output.get
        if not self._failed("layers_output", model.num_layers - 1):
            traced = get(seen.only(last, "output"))
            if not torch.equal(traced, get(plain)):
                # Not always ours: the first tanh of a process can come out less exact in one thread's share
                # (torch 2.13 on a CPU, one process in ten), so that the first plain pass is the odd one.
                plain = self._plain(self.inputs)
            off = _distance(traced, get(plain))
            self.expect(
                torch.equal(traced, get(plain)),
                "layers_output",
                model.num_layers - 1,
                f"reading changes it, by {off:.1e} (relative)",
                off,
            )
        self._hands_on(seen)
        return seen

    def _failed(self, name: str, layer: int) -> bool:
        there = getattr(self.model, name).modules[layer] is not None
        return not there or (name, layer) in self.findings.failures

    def _hands_on(self, seen: _Seen) -> None:
        """Each layer is given what the one before gives."""
        outputs, inputs = self.model.layers_output, self.model.layers_input
        layers = self.model._anatomy.layers
        for before, after in pairwise(self.model._anatomy.ran):
            i, j = layers.index(before), layers.index(after)
            if not self._failed(outputs.name, i) and not self._failed(inputs.name, j):
                gives = outputs.get(seen.only(before, outputs.kind))
                given = inputs.get(seen.only(after, inputs.kind))
                what = f"is not layers_input[{j}], off by {_distance(gives, given):.1e} (relative)"
                self.expect(torch.equal(gives, given), outputs.name, i, what, 0.0)

    def _values(
        self, name: str, layer: int, accessor: Any, calls: list[Any], shape: tuple[int, ...]
    ) -> Tensor | None:
        if len(calls) != 1:
            compiled = any(m._compiled_call_impl is not None for m in self.model.hf_model.modules())
            why = (
                " (what is compiled (torch.compile) calls its modules unseen)"
                if compiled and not calls
                else ""
            )
            self.expect(False, name, layer, f"fires {len(calls)} times in a forward pass, not once{why}")
            return None
        try:
            value = accessor.get(calls[0])
        except (TypeError, IndexError, KeyError, StopIteration, AttributeError, RuntimeError) as error:
            self.expect(False, name, layer, f"holds no tensor where hidden states should be ({error})")
            return None
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            self.expect(False, name, layer, f"is {found}, not {shape}")
            return None
        self.expect(bool(value.isfinite().all()), name, layer, "has values that are not finite")
        return value

    def _pattern(self, layer: int, module: Module, calls: list[Any]) -> None:
        heads = self.model.dimensions.num_heads
        if (
            heads is None and len(calls) == 1 and isinstance(calls[0], Tensor)
        ):  # they vary from layer to layer
            heads = calls[0].shape[1]
        shape = (2, heads, self.seq, self.seq)
        accessor = self.model.attention_probabilities
        pattern = self._values(accessor.name, layer, accessor, calls, shape)
        if pattern is None:
            return
        expect = partial(self._expect_of, accessor.name, layer)
        rows = pattern.float().sum(-1)
        slack = 10 * TOLERANCE[torch.bfloat16 if pattern.dtype == torch.bfloat16 else torch.float32]
        expect(bool((pattern >= 0).all()), f"has entries below 0, down to {float(pattern.min()):.3g}")
        expect(
            bool((rows <= 1 + slack).all()),
            f"has rows that sum to more than 1, up to {float(rows.max()):.5g}",
        )
        if not any("sink" in parameter for parameter, _ in module.named_parameters()):
            least = (
                f"has rows that sum to less than 1, down to {float(rows.min()):.5g}, and no attention sink"
            )
            expect(bool((rows >= 1 - slack).all()), least)
        above = float(pattern.triu(1).abs().max())
        later = f"attends to later positions, with up to {above:.3g}"
        expect(above == 0 or (self.may_look_ahead and not self.model.causal), later)

    def _expect_of(self, name: str, layer: int, holds: bool, why: str) -> None:
        self.expect(holds, name, layer, why)

    # Writing.

    def _write(self, seen: _Seen) -> None:
        model, internals = self.model, self.internals
        layers = {module: i for i, module in enumerate(model._anatomy.layers)}
        streams = {*model.layers_input.modules, *model.layers_output.modules}
        parts = {  # by module: the accessor of its output, its layer, the prompt it is changed for
            module: (accessor, i, row)
            for row, accessor in (
                (0, model.mixers_output),
                (0, model.attentions_output),
                (1, model.mlps_output),
            )
            for i, module in enumerate(accessor.modules)
            if module is not None
        }

        def change(slot: Slot) -> None:
            accessor, i, row = parts[slot.module]
            clean, now = accessor.get(seen.only(slot.module, "output")), accessor.get(slot.value)
            if slot.module in internals.modules:
                internals.output(slot.module, i, now, clean)
            new = (clean if slot.module in internals.modules else now).clone()
            new[row] = clean[row] + _ramp(clean)
            slot.value = accessor.put(slot.value, new)

        def put_back(slot: Slot) -> None:
            layer = layers[slot.module]
            accessor = model.layers_input if slot.kind == "input" else model.layers_output
            clean, now = accessor.get(seen.only(slot.module, slot.kind)), accessor.get(slot.value)
            handed_on = layer > 0 and model.layers_output.modules[layer - 1] is not None
            if slot.kind == "input" and slot.module in accessor.modules and handed_on:
                self._is_back(layer - 1, f"layers_input[{layer}] its value", now, clean)
            elif slot.kind == "output":
                for module, (changed, i, row) in parts.items():
                    if i == layer:
                        # The larger part of the entries moves with the change; a change for the other prompt moves
                        # them by rounding alone (in a mixture of experts, that sorts the tokens of all).
                        least = 1e-5 * _ramp(changed.get(seen.only(module, "output"))).abs().max()
                        moved = (now[row] - clean[row]).abs() > least
                        moved_most = float(moved.float().mean()) > 0.5
                        self.expect(moved_most, changed.name, i, "writing it changes no layer output")
            if slot.module in accessor.modules:
                slot.value = accessor.put(slot.value, clean)

        collectors = [
            _Each(internals.modules, internals.kinds, partial(internals.change, seen=seen.only)),
            _Each(set(parts), {"output": None}, change),
            _Each(set(layers), {"input": None, "output": None}, put_back),
        ]
        last = len(layers) - 1
        with self._trace(collectors) as tracer:
            if None in streams:  # what has not been put back is not back
                tracer.result  # noqa: B018
            elif self.norm is not None and len(seen.of(self.norm, "input")) == 1:
                args, kwargs = model.ln_final.inputs
                for now, clean in zip(
                    tree_leaves((args, kwargs)), tree_leaves(seen.only(self.norm, "input")), strict=True
                ):
                    if isinstance(now, Tensor):
                        self._is_back(last, "the final norm its input", now, clean)
            else:
                self._is_back(last, "the logits", self._given(tracer.result), self.logits)

    def _write_cross(self, seen: _Seen) -> None:
        if self.cross.parts:
            change = partial(self.cross.change, seen=seen.only)
            with self._trace([_Each(self.cross.modules, self.cross.kinds, change)]) as tracer:
                tracer.result  # noqa: B018

    def _is_back(self, layer: int, what: str, now: Tensor, clean: Tensor) -> None:
        off = _distance(now, clean)
        why = f"writing it back does not give {what} back, off by {off:.1e} (relative)"
        self.expect(torch.equal(now, clean), "layers_output", layer, why, off)

    # The stream's algebra.

    def _algebra(self, seen: _Seen) -> None:
        def read(accessor: Any) -> dict[Module, Tensor]:
            modules = [module for module in accessor.modules if module is not None]
            return {module: accessor.get(seen.only(module, accessor.kind)) for module in modules}

        inputs, outputs = read(self.model.layers_input), read(self.model.layers_output)
        others = Neurons(self.model, outputs), Routers(self.model, outputs | read(self.model.mlps_output))
        Algebra(self.model, inputs, outputs, self.found, self.findings).check(self._trace, others)
        for values in self.found.values():
            values.clear()

    # Parts and ends.

    def _parts(self) -> None:
        """Attention, mixers and MLP are parts of their layer, and what has matrices in it is one of these."""
        anatomy = self.model._anatomy
        parts = {"attentions_output": anatomy.attentions, "mlps_output": anatomy.mlps}
        for i, layer in enumerate(anatomy.layers):
            for name, modules in parts.items():
                module = modules[i]
                if module is not None:
                    what = f"{type(module).__name__} is no part of the layer"
                    self.expect(module in set(layer.modules()), name, i, what)
                    self.expect(_has_matrix(module), name, i, f"{type(module).__name__} has no matrix")
            if anatomy.mlps[i] is not None and not anatomy.inferred:
                named = {*anatomy.mixers[i], anatomy.attentions[i], anatomy.mlps[i]} - {None}
                inside = {one for part in named for one in part.modules()}
                beside = [
                    path
                    for path, module in layer.named_modules()
                    if module not in inside and any(p.ndim > 1 for p in module.parameters(recurse=False))
                ]
                self.expect(
                    not beside,
                    "mlps_output",
                    i,
                    f"{', '.join(beside)} of the layer is in no mixer and no MLP",
                )

    def _ends(self, seen: _Seen) -> None:
        """The names that belong to no layer: what they take and give."""
        model = self.model
        config = text_config(model.steps_of)
        counts = {
            n for n in (getattr(config, name, None) for name in ("num_hidden_layers", "num_layers")) if n
        }
        self.expect(
            not counts or model.num_layers in counts,
            "layers",
            None,
            f"{model.num_layers} of the config's {max(counts, default=0)} are gone through",
        )
        embed, head, norm = model._anatomy.embed_tokens, model._anatomy.lm_head, self.norm
        given = [arg for value in seen.of(embed, "input") for arg in tree_leaves(value)]
        ids = self.inputs.get("decoder_input_ids", self.inputs.get("input_ids"))
        if ids is not None:
            self.expect(
                any(isinstance(arg, Tensor) and _same(arg.to(ids), ids) for arg in given),
                "token_embeddings",
                None,
                f"{type(embed).__name__} is not given the tokens' ids",
            )
        if has_decoder(model.steps_of):
            calls = len(seen.of(embed, "input"))
            self.expect(
                calls == 1, "token_embeddings", None, f"{type(embed).__name__} is called {calls} times"
            )
        if head is not None:
            widths = [value.shape[-1] for value in seen.of(head, "output") if isinstance(value, Tensor)]
            self.expect(
                any(width >= model.vocab_size for width in widths),
                "lm_head",
                None,
                f"{type(head).__name__} does not give a number for each of {model.vocab_size} tokens",
            )
        last = model.layers_output.modules[-1]
        if norm is not None and last is not None and len(seen.of(last, "output")) == 1:
            gives = model.layers_output.get(seen.only(last, "output"))
            read = [arg for value in seen.of(norm, "input") for arg in tree_leaves(value)]
            self.expect(
                any(isinstance(arg, Tensor) and _same(arg, gives) for arg in read),
                "ln_final",
                None,
                f"{type(norm).__name__} does not read layers_output[-1]",
            )

    # Padding.

    def _padded(self, seen: _Seen) -> None:
        """The first tokens of both prompts, padded: the padding does not show, with positions of ours or the model's own."""
        model, get = self.model, self.model.layers_output.get
        if model.layers_output.modules[-1] is None or self.seq != PROMPT_LENGTH:  # a soft prompt
            return
        if "input_ids" not in self.inputs:
            return
        clean = get(seen.only(model._anatomy.layers[-1], "output"))
        short = PROMPT_LENGTH - 3
        ids = self.inputs["input_ids"].tolist()
        decoder = self.inputs.get("decoder_input_ids")

        def last(prompts: list[list[int]]) -> Tensor:
            more = {} if decoder is None else {"decoder_input_ids": decoder[-len(prompts) :]}
            return get(self._plain(self._prepare(prompts, **more)))[-1]

        alone = clean[1, :short] if decoder is None else last([ids[1][:short]])

        def distance() -> float:
            return _distance(last([ids[0], ids[1][:short]])[-len(alone) :], alone)

        tolerance = 10 * TOLERANCE.get(clean.dtype, 1e-4)
        off = distance()
        if off > tolerance and not model.causal:  # the tokens after these have changed them
            alone = last([ids[1][:short]])
            off = distance()
        if off > tolerance and model._prompts.takes_positions:
            model._prompts.takes_positions = False  # RoBERTa's begin at another number
            off = min(off, distance())
            model._prompts.takes_positions = off > tolerance
        self.expect(
            off <= tolerance, "padding", None, f"it shows in layers_output[-1], by {off:.1e} (relative)", off
        )

    # The head.

    def _head(self, seen: _Seen) -> None:
        model = self.model
        head = model._head
        if model._anatomy.lm_head is None:
            return
        if model.layers_output.modules[-1] is None:
            head.refused = "it takes what the last layer gives, and there is no layers_output[-1]"
            return
        head.learn_forms({module: seen.only(module, "output") for module in model._anatomy.ran})
        last = model.layers_output.get(seen.only(model.layers_output.modules[-1], "output"))
        norm = [] if self.norm is None else seen.first_tensors(self.norm)
        chain = [last, *norm, *seen.first_tensors(model._anatomy.lm_head), self.logits]
        # The short way is the model's own if nothing happens between the modules: bit for bit, because a
        # soft cap is next to nothing on small logits.
        head.short = len(chain) == 6 and all(_same(chain[i], chain[i + 1]) for i in (0, 2, 4))
        mine = model.project_on_vocab(last[:, -1:])
        off = _distance(mine, self.logits[:, -1:])
        self.expect(
            off <= TOLERANCE.get(self.logits.dtype, 1e-4),
            "project_on_vocab",
            None,
            f"of layers_output[-1] is not the logits, off by {off:.1e} (relative)",
            off,
        )


class _Seen(Collector):
    """All the values of all calls of some modules."""

    def __init__(self, modules: set[Module], kinds: dict[str, Any]) -> None:
        self.modules = modules
        self.kinds = kinds
        self.calls: dict[tuple[Module, str], list[Any]] = {}
        self._versions: list[tuple[Module, str, Tensor, int]] = []

    def take(self, slot: Slot) -> None:
        leaves, structure = tree_flatten(slot.value, is_leaf=_is_opaque)  # a KV cache is not looked into
        kept = [
            leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]  # whatever becomes of it
        self.calls.setdefault((slot.module, slot.kind), []).append(tree_unflatten(kept, structure))
        for tensor in leaves:
            if isinstance(tensor, Tensor):
                version = -1 if tensor.is_inference() else tensor._version
                self._versions.append((slot.module, slot.kind, tensor, version))

    def changed_later(self, kind: str) -> set[Module]:
        """The modules whose value at that point the model changed in place afterwards."""
        return {
            module
            for module, at, tensor, version in self._versions
            if at == kind and (tensor.is_inference() or tensor._version != version)
        }

    def of(self, module: Module, kind: str) -> list[Any]:
        return self.calls.get((module, kind), [])

    def only(self, module: Module, kind: str) -> Any:
        (value,) = self.calls[module, kind]
        return value

    def first_tensors(self, module: Module) -> Iterator[Tensor]:
        """The module's input and output, where it is called once, with and giving a tensor."""
        for value in self.of(module, "input"):
            yield from (arg for arg in value[0] if isinstance(arg, Tensor))
        yield from (value for value in self.of(module, "output") if isinstance(value, Tensor))


class _Each(Collector):
    """Does something at each point."""

    def __init__(self, modules: set[Module], kinds: dict[str, Any], take: Callable[[Slot], None]) -> None:
        self.modules = modules
        self.kinds = kinds
        self._take = take

    def take(self, slot: Slot) -> None:
        self._take(slot)


@contextmanager
def _eval_mode(model: Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _has_matrix(module: Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _is_opaque(value: Any) -> bool:
    return not isinstance(value, (tuple, list, dict))


def _ramp(value: Tensor) -> Tensor:
    """As large as the largest entry of `value`, different in each entry of the hidden states."""
    ramp = torch.linspace(-1, 1, value.shape[-1], device=value.device, dtype=value.dtype)
    return ramp * (1 + value.abs().max())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _distance(one: Tensor, other: Tensor) -> float:
    """How far `one` is from `other`, relative to the largest entry of `other`."""
    if one.shape != other.shape:
        return float("inf")
    scale = max(float(other.abs().max()), 1e-30)
    return float((one.float() - other.float().to(one.device)).abs().max()) / scale
