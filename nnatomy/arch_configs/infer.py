"""Finding the standard modules of a model that nobody wrote a config for, from what two short forward passes show.

1. The layers are the list of modules in which each one's output is the next one's input. The final norm is the module
   without matrices that reads what the last layer gives.
   (Of an encoder-decoder it is the list that reads the decoder's prompts.)
2. In each layer the second prompt is made equal to the first but for its first position. A module that is given
   that and differs at later positions mixes tokens; with a softmax inside it is attention. The MLP is the module with
   matrices, from hidden states to hidden states, that is no such mixer. What is given states that come from
   outside of the stream (the encoder's) and has a softmax is cross-attention.

What cannot be found is left out with the reason. Whether what was found is right is for validation to say.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nnatomy.arch_configs.example import (
    example_ids,
    has_decoder,
    main_input,
    num_tokens,
)
from nnatomy.arch_configs.outputs import logits_of
from nnatomy.arch_configs.short_pass import (
    BATCH,
    SEQ,
    CannotInfer,
    has_matrix,
    hidden_in,
    hooks,
    print_of,
    run,
)

_SOFTMAX = frozenset((F.softmax, torch.softmax, Tensor.softmax, torch._softmax, F.scaled_dot_product_attention))
#: What a mixer without a softmax is called, by what stands in its class's name.
_KINDS = {
    "mamba": "mamba",
    "ssm": "mamba",
    "delta": "linear attention",
    "linear": "linear attention",
    "lightning": "linear attention",
    "conv": "convolution",
    "lstm": "lstm",
    "rwkv": "rwkv",
    "recurrent": "recurrence",
}

#: What a layer is called that only images come to.
NOT_RUN = "not run"
SEVERAL_TIMES = "it is gone through several times in a forward pass: layers[i].calls[n] is each time"


@dataclass
class LayerParts:
    """What one layer consists of.

    Attributes:
        mixers: its token mixers, in the order in which they run; `kinds` names them.
        absent: why there is no attention, or no MLP, or nothing at all of the layer.
        heads: how many the attention has; 0 where that does not show.
    """

    mixers: list[Module] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    attention: Module | None = None
    mlp: Module | None = None
    absent: dict[str, str] = field(default_factory=dict)
    heads: int = 0


def find_ends(model: Module) -> tuple[Module, Module | None, bool]:
    """The token embedding, the unembedding and whether there are logits, of a model that does not name them itself.

    What takes no tokens has no embedding of them, for which the model itself stands; what gives no logits has no
    unembedding, nor has what computes them by functions.

    Raises:
        CannotInfer: if there is no embedding, or the logits are of no tokens.
    """
    tokens = num_tokens(model)
    ids = example_ids(tokens, BATCH, SEQ)
    embeddings: list[Module] = []
    by_width: list[tuple[int, Module]] = []

    def note(module: Module, args: Any, _kwargs: Any, output: Any) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) else None
        is_embedding = isinstance(module, torch.nn.Embedding) and module.num_embeddings >= tokens
        if is_embedding and given is not None and (not has_decoder(model) or given.shape == ids.shape):
            # Others are given positions, or kinds of tokens.
            embeddings.insert(0 if torch.equal(given.to(ids), ids) else len(embeddings), module)
        result = hidden_in(output)
        if not module._modules and result is not None and has_matrix(module):
            by_width.append((result.shape[-1], module))

    with hooks(model.modules(), after=note):
        result = run(model)
    logits = logits_of(result)
    width = tokens if logits is None else logits.shape[-1]
    heads = [module for gives, module in by_width if gives >= width]
    if not embeddings and main_input(model) != "input_ids" and not has_decoder(model):
        embeddings = [model]
    if not embeddings:
        raise CannotInfer("no module takes the tokens' ids")
    named = getattr(result, "logits", None) is not None
    if named and logits is not None and (logits.ndim != 3 or width < tokens):
        raise CannotInfer(
            f"its logits are {tuple(logits.shape)}, no (batch, seq, vocab) of {tokens} tokens: they are of classes, of which "
            "only the model within it, without this head, can be looked into"
        )
    if logits is None or width < tokens:  # a stream
        return embeddings[0], None, False
    return embeddings[0], heads[-1] if heads else None, True


def find_parts(model: Module, layers: list[Module]) -> list[LayerParts]:
    """The token mixers and the MLP of each layer."""
    probe = _Probe(model, layers)
    return [probe.parts(layer) for layer in layers]


class _Probe:
    """A forward pass in which each layer's second row differs from the first at the first position alone."""

    def __init__(self, model: Module, layers: list[Module]) -> None:
        self._parents = {child: module for module in model.modules() for child in module.children()}
        self._mixes: dict[Module, bool] = {}
        self._hidden: dict[Module, bool] = {}  # from hidden states to hidden states
        self._prints: dict[Module, Any] = {}
        self._entered: dict[Module, int] = {}
        self._softmax: dict[Module, int] = {}  # when the last softmax was taken in it
        self._patterns: set[Module] = set()  # with heads, which a router has not
        self._heads: dict[Module, int] = {}  # how many the last softmax in it was of; 0 if that does not show
        self._stack: list[tuple[Module, bool]] = []
        self._time = 0
        self._width = 0
        self._runs: Counter[Module] = Counter()
        self._odd: set[Module] = set()  # layers whose hidden states are not (batch, seq, *)
        self._other: list[Tensor] = []  # what a layer is given beside the stream, of other positions
        self._cross: set[Module] = set()  # modules that are given it
        # What is not tokens comes to the layers in a number of positions that only they tell.
        self._seq = SEQ if has_decoder(model) or main_input(model) == "input_ids" else 0
        probe = self

        class Softmax(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                if func in _SOFTMAX and result.ndim > 2:
                    for module, _ in probe._stack:
                        probe._softmax[module] = probe._time
                        if result.ndim > 3:
                            probe._patterns.add(module)
                        probe._heads[module] = _heads_of(result)
                return result

        inside = dict.fromkeys(module for layer in layers for module in layer.modules())
        with hooks(layers, before=self._perturb), hooks(inside, self._enter, self._leave), Softmax():
            run(model)

    def _perturb(self, layer: Module, args: Any, kwargs: Any) -> Any:
        self._runs[layer] += 1
        hidden = hidden_in((args, kwargs))
        if hidden is not None and hidden.ndim == 3:
            self._seq = self._seq or hidden.shape[1]
        if hidden is None or hidden.shape[:2] != (BATCH, self._seq):
            self._odd.add(layer)
            return None
        self._other = []
        self._width = hidden.shape[-1]
        new = hidden[:1].expand_as(hidden).clone()
        new[1, 0] += torch.linspace(-1, 1, hidden.shape[-1]).to(new) * hidden[:, 1:].abs().mean()

        def alike(leaf: Any) -> Any:  # what else differs by prompt (Zamba's embeddings)
            if leaf is hidden or not isinstance(leaf, Tensor):
                return new if leaf is hidden else leaf
            other = leaf.ndim == 3 and leaf.shape[0] == BATCH and leaf.shape[1] != self._seq
            if leaf.shape[:2] != (BATCH, self._seq) and not other:
                return leaf
            leaf = leaf[:1].expand_as(leaf)
            if other and leaf.is_floating_point():
                self._other.append(leaf)
            return leaf

        return pytree.tree_map(alike, (args, kwargs))

    def _enter(self, module: Module, args: Any, kwargs: Any) -> None:
        self._time += 1
        self._entered[module] = self._time
        given = hidden_in((args, kwargs))
        self._stack.append((module, self._is_local(given)))
        if any(leaf is other for leaf in pytree.tree_leaves((args, kwargs)) for other in self._other):
            self._cross.add(module)
        self._hidden[module] = given is not None and given.shape[-1] == self._width

    def _leave(self, module: Module, _args: Any, _kwargs: Any, output: Any) -> None:
        _, local = self._stack.pop()
        result = hidden_in(output)
        self._hidden[module] &= result is not None and result.shape[-1] == self._width
        self._prints[module] = print_of(result)
        self._mixes[module] = local and result is not None and not self._is_local(result)

    def _is_local(self, tensor: Tensor | None) -> bool:
        """Whether the two rows differ, at the first position alone (or nowhere but for rounding)."""
        if tensor is None or tensor.ndim < 3 or tensor.shape[:2] != (BATCH, self._seq):
            if tensor is None or tensor.ndim != 2 or tensor.shape[0] != BATCH * self._seq:
                return False
            tensor = tensor.unflatten(0, (BATCH, self._seq))
        apart = (tensor[1].float() - tensor[0].float()).abs().flatten(1).amax(1)
        return bool(apart[1:].max() <= max(1e-4 * apart[0], 1e-6 * tensor.float().abs().max()))

    def parts(self, layer: Module) -> LayerParts:
        parts = LayerParts()
        if not self._runs[layer]:
            parts.kinds = [NOT_RUN]
            why = "it does not run on text alone"
            parts.absent = {"attention": why, "mlp": why, "layer": why}
            return parts
        if layer in self._odd:
            parts.kinds = ["unknown"]
            why = "what it consists of does not show, as its hidden states are not of (batch, seq, hidden)"
            parts.absent = {"attention": why, "mlp": why}
            return parts
        called = [module for module in layer.modules() if module in self._entered and module is not layer]
        mixing = [module for module in called if self._mixes[module]]
        within = {inner for module in mixing for inner in module.modules() if inner is not module}
        mixers = [self._attention_in(module, layer, mixing) for module in mixing if module not in within]
        # A second attention in the layer is given what the first has mixed.
        rest = self._outside(called, mixers)
        second = [m for m in rest if m in self._patterns | self._cross and self._hidden[m] and has_matrix(m)]
        mixers += [self._within_norm(module) for module in second]
        parts.mixers = sorted(mixers, key=self._entered.__getitem__)
        names = {module: name.rpartition(".")[2] for name, module in layer.named_modules()}
        parts.kinds = [self._kind(mixer, names[mixer]) for mixer in parts.mixers]
        attentions = [m for m, kind in zip(parts.mixers, parts.kinds, strict=True) if kind == "attention"]
        if len(attentions) == 1:
            parts.attention = attentions[0]
            parts.heads = self._heads.get(attentions[0], 0)
        elif attentions:
            parts.absent["attention"] = f"it has several: {_names(layer, attentions)}"
        else:
            mixer = f"its token mixer is {_names(layer, parts.mixers)} ({', '.join(parts.kinds)})"
            parts.absent["attention"] = mixer if parts.mixers else "it mixes no tokens"
        with_matrix = [m for m in self._outside(called, parts.mixers) if has_matrix(m) and not _is_norm(m)]
        mlps = [self._within_norm(module) for module in with_matrix if self._hidden[module]]
        if len(mlps) == 1:
            parts.mlp = mlps[0]
        elif with_matrix:
            many = "several modules share its work" if mlps else "it is no module of its own"
            parts.absent["mlp"] = f"{many}: {_names(layer, with_matrix)}"
        else:
            parts.absent["mlp"] = "it has no MLP"
        if self._runs[layer] > 1:
            parts.mixers, parts.attention, parts.mlp = [], None, None
            parts.absent = dict.fromkeys(("layer", "attention", "mlp"), SEVERAL_TIMES)
        return parts

    def _attention_in(self, mixer: Module, layer: Module, mixing: list[Module]) -> Module:
        """Where a mixer has an attention inside that is whole (with its output projection): that attention."""
        softmax = self._softmax.get(mixer)
        if softmax is None:
            return mixer
        for inner in mixer.modules():  # the innermost is the last
            if inner in mixing and self._softmax.get(inner) == softmax and self._projects_after(inner, softmax):
                mixer = inner
        while (around := self._parents[mixer]) is not layer and self._prints.get(around) == self._prints[mixer]:
            mixer = around
        return mixer

    def _within_norm(self, module: Module) -> Module:
        """Of a sublayer that has its norm inside, and so adds the residual itself: what it adds."""
        weighty = [child for child in module.children() if any(True for _ in child.parameters())]
        inner = [child for child in weighty if not _is_norm(child)]
        if len(inner) == 1 < len(weighty) and has_matrix(inner[0]) and self._hidden.get(inner[0]):
            return self._within_norm(inner[0])
        return module

    def _projects_after(self, module: Module, softmax: int) -> bool:
        leaves = (leaf for leaf in module.modules() if not leaf._modules and has_matrix(leaf))
        return any(self._entered.get(leaf, 0) > softmax for leaf in leaves)

    def _outside(self, called: list[Module], mixers: list[Module]) -> list[Module]:
        """The outermost modules of a layer that have nothing of a mixer in or around them."""
        within = {module for mixer in mixers for module in mixer.modules()}
        clear = [m for m in called if m not in within and not within.intersection(m.modules())]
        found: list[Module] = []
        for module in clear:  # outer ones come first
            if not any(module in set(outer.modules()) for outer in found):
                found.append(module)
        return found

    def _kind(self, mixer: Module, name: str) -> str:
        if mixer in self._softmax:
            # One that is given both the stream and other states mixes the stream's tokens, too.
            return "cross-attention" if mixer in self._cross and not self._mixes[mixer] else "attention"
        own = f"{name} {type(mixer).__name__}".lower()
        inside = " ".join(type(m).__name__ for m in mixer.modules() if not type(m).__module__.startswith("torch."))
        for text in (own, inside.lower()):
            for part, kind in _KINDS.items():
                if part in text:
                    return kind
        if any(isinstance(module, _ConvNd) for module in mixer.modules()):
            return "convolution"
        return type(mixer).__name__


def _heads_of(weights: Tensor) -> int:
    """How many heads a pattern is of, or what SDPA gives: (batch, head, *, *) or (batch * head, *, *)."""
    if weights.ndim == 4 and len(weights) == BATCH:
        return int(weights.shape[1])
    return len(weights) // BATCH if weights.ndim == 3 and len(weights) > BATCH else 0


def _is_norm(module: Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _names(layer: Module, modules: list[Module]) -> str:
    paths = {module: path for path, module in layer.named_modules()}
    return ", ".join(paths[module] for module in modules)
