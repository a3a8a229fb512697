"""Which list of modules is the layers: that in which each one's output is the next one's input."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module

from nnatomy.arch_configs.example import has_decoder
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

#: By module, in the order of their first call: the prints of what it was given and gave, each time.
Calls = dict[Module, list[tuple[Any, Any]]]


def find_layers(model: Module, layers: list[Module] | None = None) -> tuple[list[Module], Module | None, int]:
    """The layers, if they are not given, the final norm if there is one, and the width of what the last layer gives.

    Raises:
        CannotInfer: if no list of modules hands hidden states on.
    """
    seen = _seen(model)
    best = layers or []
    found: list[list[Module]] = []
    others: list[str] = []
    lists = [] if best else [one for module in model.modules() for one in _lists(module, list(seen))]
    for every in lists:
        layers = [child for child in every if child in seen]
        every = every[: every.index(layers[-1]) + 1] if layers else []  # one between may be left out (Mllama)
        hands_on = all(seen[a][-1][1] == seen[b][0][0] for a, b in itertools.pairwise(layers))
        if len(layers) > 1 and hands_on and (given := seen[layers[0]][0][0]):
            if has_decoder(model) and not _is_of_prompts(given):
                others.append(str(given[0]))
            else:
                found.append(every)

    def reads(layers: list[Module]) -> Any:
        return seen[next(layer for layer in layers if layer in seen)][0][0]

    for i, first in enumerate(found):  # of several lists, of which each goes on where another ends
        while more := [one for one in found if one[0] not in first and _goes_on(one, seen[first[-1]][-1][1], seen)]:
            found[i] = first = [*first, *more[0]]
    best = best or max(
        found, key=lambda one: (_is_of_prompts(reads(one)), sum(map(_size, one)), -len(one)), default=best
    )
    around = [one for one in lists if any(best and best[0] in layer.modules() for layer in one if layer not in best)]
    if not best or any(len(seen.keys() & {*one}) > 1 for one in around):
        paths = {module: path for path, module in model.named_modules()}
        rest = f": there are lists that hand on {', '.join(others)}, where (batch, seq, hidden) is ({BATCH}, {SEQ}, hidden)"
        rest = (
            rest
            if others
            else _broken(max(around or lists, key=lambda one: sum(map(_size, one)), default=[]), seen, paths)
        )
        raise CannotInfer(f"no list of modules hands hidden states from one to the next{rest}")
    last = seen[[layer for layer in best if layer in seen][-1]][-1][1]
    inside = {module for layer in best for module in layer.modules()}
    norms = [
        module
        for module, calls in seen.items()
        if module not in inside and len(calls) == 1 and calls[0][0] == last and not has_matrix(module)
    ]
    norm = next((norm for norm in norms if any(True for _ in norm.parameters())), None)
    return best, norm, last[0][-1] if last else 0


def _seen(model: Module) -> Calls:
    """The calls of each module in a forward pass."""
    seen: Calls = {}
    given: dict[Module, list[Any]] = {}

    def before(module: Module, args: Any, kwargs: Any) -> None:  # it may write into what it is given
        given.setdefault(module, []).append(print_of(hidden_in((args, kwargs))))

    def after(module: Module, _args: Any, _kwargs: Any, output: Any) -> None:
        seen.setdefault(module, []).append((given[module].pop(), print_of(hidden_in(output))))

    with hooks(model.modules(), before, after):
        run(model)
    return seen


def _broken(layers: list[Module], seen: Calls, paths: dict[Module, str]) -> str:
    """Where a list of modules does not hand on."""
    called = [layer for layer in dict.fromkeys(layers) if layer in seen]
    for layer in called:
        if len(seen[layer]) > 1:
            return f": {paths[layer]} is called {len(seen[layer])} times in a forward pass"
    for one, other in itertools.pairwise(called):
        if seen[one][-1][1] != seen[other][0][0]:
            return (
                f": what {paths[one]} gives is not what {paths[other]} is given (something is added, scaled or skipped between "
                "them, or the stream is not the first tensor of several that they take)"
            )
    return ""


def _lists(module: Module, called: list[Module]) -> Iterator[list[Module]]:
    """The lists of modules among the children of one: named by numbers, by a name and numbers, or in a dict.

    In the order in which they are called, where all are.
    """
    lists: dict[str, list[Module]] = {}
    for name, child in module._modules.items():
        stem = "" if isinstance(module, torch.nn.ModuleDict) else name.rstrip("0123456789")
        if child is not None and (stem != name):
            lists.setdefault(stem, []).append(child)
    for children in lists.values():
        if len(children) > 1:
            yield sorted(children, key=called.index) if {*children} <= {*called} else children


def _goes_on(layers: list[Module], given: Any, seen: Calls) -> bool:
    """Whether these layers read what others have given, and are such layers (not the modules of a head)."""
    if not given or not all(layer._modules and layer in seen for layer in layers):
        return False
    gives = seen[layers[-1]][-1][1]
    return bool(seen[layers[0]][0][0] == given and gives and gives[0] == given[0])


def _is_of_prompts(given: Any) -> bool:
    """Whether a layer was given what is of the tokens' positions (not an encoder's, an image's), by its print."""
    return given is not None and given[0][:2] in ((BATCH, SEQ), (SEQ, BATCH))


def _size(module: Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
