"""What the standard names promise, checked on a loaded model.

Four forward passes of a few tokens:

1. plain: the logits that every other pass is held against (once more, if the next pass differs).
2. reading: every name on every layer fires once and has its shape and finite values, attention rows
   are distributions and causal, and the logits are the plain ones, bit for bit.
3. and 4. writing: in each layer the pattern, the attention's output (3) or the MLP's output (4) is
   changed, which has to show; then the layer's output is put back as it was read, after which the
   next layer's input, and at last the logits, are the plain ones, bit for bit.

Then the head: `project_on_vocab(layers_output[-1])` is the logits, in value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves, tree_map_only

from nnatomy.core import Collector, Slot
from nnatomy.errors import ValidationError

PROMPT_LENGTH = 6
#: How far values that are computed in two ways may be apart, relative to the largest, by dtype.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def validate(model: Any) -> None:
    """Check the promises on `model` (a StandardizedTransformer), all of them, and learn its head.

    Raises:
        ValidationError: naming every promise that failed, where, and with which numbers.
    """
    with torch.no_grad(), _eval_mode(model.hf_model):
        failures = _Validation(model).run()
    if failures:
        listing = "\n".join(f"  - {failure}" for failure in failures)
        raise ValidationError(
            f"{len(failures)} promise(s) of the standard names failed on {type(model.hf_model).__name__}:\n"
            f"{listing}\nGive another ArchConfig (arch_config=...), or load with validate=False and trust no "
            "name above."
        )


class _Validation:
    def __init__(self, model: Any) -> None:
        self.model = model
        vocab = model.vocab_size
        ids = [(3 + 7 * i * max(1, vocab // 53)) % vocab for i in range(PROMPT_LENGTH)]
        self.inputs = model.prepare([ids])
        self.failures: list[str] = []
        self.names = [
            name
            for name in (
                "layers_input",
                "layers_output",
                "attentions_input",
                "attentions_output",
                "mlps_input",
                "mlps_output",
            )
            if any(module is not None for module in getattr(model, name).modules)
        ]

    def run(self) -> list[str]:
        self.plain = self._plain()
        seen = self._read()
        if not self.failures:  # what does not read right cannot be written back
            self._write("attention", seen)
            if "mlps_output" in self.names:
                self._write("mlp", seen)
            self._head(seen)
        return self.failures

    def _plain(self) -> Tensor:
        logits: Tensor = self.model.hf_model(**self.inputs).logits
        return logits

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.failures.append(what)

    def _run(self, collectors: Iterable[Collector]) -> Tensor:
        with self.model.trace(**self.inputs) as tracer:
            tracer.block.run.collectors.extend(collectors)
            tracer.block.run.watch()
            logits: Tensor = tracer.result.logits
        return logits

    # Reading.

    def _read(self) -> _Seen:
        model = self.model
        patterns = model.attention_probabilities
        modules = {
            module for name in self.names for module in getattr(model, name).modules if module is not None
        }
        seen = _Seen(modules | {model.ln_final.module, model.lm_head.module}, {"input": None, "output": None})
        taps = _Seen({m for m in patterns.modules if m is not None}, {patterns.kind: patterns.tap})
        logits = self._run([seen, taps])
        if not torch.equal(logits, self.plain):
            # Not always ours: the first tanh of a process can come out less exact in one thread's share
            # (torch 2.13 on a CPU, one process in ten), so that the first plain pass is the odd one.
            self.plain = self._plain()
        self.expect(
            torch.equal(logits, self.plain),
            f"logits: reading changes them, by {_distance(logits, self.plain):.1e} (relative)",
        )
        shape = (*self.inputs["input_ids"].shape, model.hidden_size)
        for name in self.names:
            accessor = getattr(model, name)
            for i, module in enumerate(accessor.modules):
                if module is not None:
                    self._values(f"{name}[{i}]", accessor, seen.of(module, accessor.kind), shape)
            accessor.changed_later = seen.changed_later(accessor.kind) & set(accessor.modules)
        for i, module in enumerate(patterns.modules):
            if module is not None:
                self._pattern(f"{patterns.name}[{i}]", module, taps.of(module, patterns.kind))
        patterns.changed_later = taps.changed_later(patterns.kind)
        seen.calls.update(taps.calls)
        return seen

    def _values(self, name: str, accessor: Any, calls: list[Any], shape: tuple[int, ...]) -> Tensor | None:
        if len(calls) != 1:
            self.failures.append(f"{name}: fires {len(calls)} times in a forward pass, not once")
            return None
        try:
            value = accessor.get(calls[0])
        except (TypeError, IndexError, KeyError, StopIteration, AttributeError, RuntimeError) as error:
            self.failures.append(f"{name}: holds no tensor where hidden states should be ({error})")
            return None
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            self.failures.append(f"{name}: is {found}, not {shape}")
            return None
        self.expect(bool(value.isfinite().all()), f"{name}: has values that are not finite")
        return value

    def _pattern(self, name: str, module: Module, calls: list[Any]) -> None:
        batch, seq = self.inputs["input_ids"].shape
        shape = (batch, self.model.num_heads, seq, seq)
        pattern = self._values(name, self.model.attention_probabilities, calls, shape)
        if pattern is None:
            return
        rows = pattern.float().sum(-1)
        slack = 10 * TOLERANCE[torch.bfloat16 if pattern.dtype == torch.bfloat16 else torch.float32]
        self.expect(
            bool((pattern >= 0).all()), f"{name}: has entries below 0, down to {float(pattern.min()):.3g}"
        )
        self.expect(
            bool((rows <= 1 + slack).all()),
            f"{name}: has rows that sum to more than 1, up to {float(rows.max()):.5g}",
        )
        if not any("sink" in parameter for parameter, _ in module.named_parameters()):
            self.expect(
                bool((rows >= 1 - slack).all()),
                f"{name}: has rows that sum to less than 1, down to {float(rows.min()):.5g}, and no "
                "attention sink",
            )
        above = float(pattern.triu(1).abs().max())
        self.expect(above == 0, f"{name}: attends to later positions, with up to {above:.3g}")

    # Writing.

    def _write(self, what: str, seen: _Seen) -> None:
        model = self.model
        changed = model.attentions_output if what == "attention" else model.mlps_output
        patterns = model.attention_probabilities
        index = {module: i for i, module in enumerate(changed.modules) if module is not None}

        def change(slot: Slot) -> None:
            i = index[slot.module]
            if slot.kind == patterns.kind:
                slot.value = patterns.put(slot.value, patterns.get(slot.value) * 0.5)
                return
            clean, now = changed.get(seen.only(slot.module, "output")), changed.get(slot.value)
            if what == "attention":
                self.expect(
                    not torch.equal(clean, now), f"{patterns.name}[{i}]: writing it changes no attention"
                )
            ramp = torch.linspace(-1, 1, clean.shape[-1], device=clean.device, dtype=clean.dtype)
            slot.value = changed.put(slot.value, clean + ramp * (1 + clean.abs().max()))

        def put_back(slot: Slot) -> None:
            i = layers[slot.module]
            accessor = model.layers_input if slot.kind == "input" else model.layers_output
            clean, now = accessor.get(seen.only(slot.module, slot.kind)), accessor.get(slot.value)
            if slot.kind == "input":
                self.expect(
                    torch.equal(clean, now),
                    f"layers_output[{i - 1}]: writing it back does not give layers_input[{i}] its value "
                    f"back, off by {_distance(now, clean):.1e} (relative)",
                )
            elif changed.modules[i] is not None:
                self.expect(
                    not torch.equal(clean, now), f"{changed.name}[{i}]: writing it changes no layer output"
                )
            slot.value = accessor.put(slot.value, clean)

        layers = {module: i for i, module in enumerate(model.layers_output.modules)}
        kinds = {"output": None, **({patterns.kind: patterns.tap} if what == "attention" else {})}
        logits = self._run(
            [_Each(set(index), kinds, change), _Each(set(layers), {"input": None, "output": None}, put_back)]
        )
        self.expect(
            torch.equal(logits, self.plain),
            f"layers_output[{len(layers) - 1}]: writing it back does not give the logits back, "
            f"off by {_distance(logits, self.plain):.1e} (relative)",
        )

    # The head.

    def _head(self, seen: _Seen) -> None:
        model = self.model
        head = model._head
        head.learn_forms({module: seen.only(module, "output") for module in model.layers_output.modules})
        last = model.layers_output.get(seen.only(model.layers_output.modules[-1], "output"))
        norm, unembedding = model.ln_final.module, model.lm_head.module
        chain = [last, *(seen.first_tensors(norm)), *(seen.first_tensors(unembedding)), self.plain]
        # The short way is the model's own if nothing happens between the modules: bit for bit, because a
        # soft cap is next to nothing on small logits.
        head.short = len(chain) == 6 and all(_same(chain[i], chain[i + 1]) for i in (0, 2, 4))
        mine = model.project_on_vocab(last)
        tolerance = TOLERANCE.get(self.plain.dtype, 1e-4)
        distance = _distance(mine, self.plain)
        self.expect(
            distance <= tolerance,
            f"project_on_vocab(layers_output[-1]): is not the logits, off by {distance:.1e} (relative)",
        )


class _Seen(Collector):
    """All the values of all calls of some modules."""

    def __init__(self, modules: set[Module], kinds: dict[str, Any]) -> None:
        self.modules = modules
        self.kinds = kinds
        self.calls: dict[tuple[Module, str], list[Any]] = {}
        self._versions: list[tuple[Module, str, Tensor, int]] = []

    def take(self, slot: Slot) -> None:
        kept = tree_map_only(Tensor, Tensor.clone, slot.value)  # what it is now, whatever becomes of it
        self.calls.setdefault((slot.module, slot.kind), []).append(kept)
        for tensor in tree_leaves(slot.value):
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


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _distance(one: Tensor, other: Tensor) -> float:
    """How far `one` is from `other`, relative to the largest entry of `other`."""
    if one.shape != other.shape:
        return float("inf")
    scale = max(float(other.abs().max()), 1e-30)
    return float((one.float() - other.float().to(one.device)).abs().max()) / scale
