"""What the names of a view were found and checked on, and whether the model is still that.

Looked at once at the start of every trace, so that it has to cost little: some 20 µs on GPT-2. Weights may take any values;
what counts is which modules there are and of which class, what replaces their forward, the type, dtype and shape of the
matrices, and the numbers and names in configs and on the modules around the layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any
from weakref import ref

from torch.nn import Module

from nnatomy.arch_configs import Anatomy, Shards
from nnatomy.errors import a, a_kind

#: Fields of a config that change no value that a name stands for, or none but by what is compared beside them.
_IDLE = re.compile(
    r"use_cache|return_dict|output_\w+|\w+_token_ids?|dtype|torch_dtype|architectures|id2label|label2id|problem_type|"
    r"transformers_version|name_or_path|gradient_checkpointing|\w*initializer\w*|\w*dropout\w*|\w+_pdrop|tokenizer_class|"
    r"tie_word_embeddings|router_\w*coef|max_length|task_specific_params|auto_map|num_labels"
)
#: Private ones that do.
_WATCHED = frozenset(("_attn_implementation_internal", "_experts_implementation_internal"))
_PLAIN = (int, float, str, type(None))


class Facts:
    """What a model is, but for the values of its weights.

    Args:
        root: the whole model.
        causal: the language model in it.
    """

    def __init__(self, root: Module, causal: Module, anatomy: Anatomy) -> None:
        self._root, self._causal, self._anatomy = root, causal, anatomy
        modules = list(root.modules())
        #: The dicts of all modules' children, and who was in them. (Weak, so that what is replaced can be freed.)
        self._held = [module._modules for module in modules if module._modules]
        self._childless = [module._modules for module in modules if not module._modules]
        self._children = [_gone if child is None else ref(child) for child in self._in_order()]
        self._classes = [type(child) for child in self._in_order()]
        self._paths = {path: (ref(module), type(module)) for path, module in root.named_modules()}
        inside = {part for layer in anatomy.layers for part in layer.modules()}
        around = [m for m in modules if m not in inside and anatomy.layers[0] in set(m.modules())]
        ends = [m for m in (anatomy.embed_tokens, anatomy.ln_final, anatomy.lm_head) if m is not None]
        parts = [m for m in (*anatomy.attentions, *anatomy.mlps) if m is not None]
        #: Where a forward would stand that is not the class's, and those that do.
        self._called = [vars(module) for module in (*around, *ends, *anatomy.layers, *parts)]
        self._forwards = self._own_forwards()
        self._matrices = [place for module in (*ends, *anatomy.layers) if (place := _largest(module))]
        self._kind = Shards(root, split=True).kind
        self._weights = [*map(self._kind, self._held_matrices())]
        self._settings = [
            *(_Settings(config, _of_config) for config in _configs(root, causal)),
            *(_Settings(module, _of_module) for module in around),
        ]
        self._told = ""

    def changed(self) -> str:
        """What is other than it was, in words; "" if nothing is."""
        children = self._in_order()
        same = (
            not self._told
            and children == [child() for child in self._children]
            and [*map(type, children)] == self._classes
            and not any(self._childless)
            and self._own_forwards() == self._forwards
            and [*map(self._kind, self._held_matrices())] == self._weights
            and not any(settings.changed() for settings in self._settings)
        )
        return "" if same else self._told or self._tell()

    def __deepcopy__(self, memo: dict[int, Any]) -> Facts:
        """Of a copy of the model."""
        told = self.changed()
        root, causal = copy.deepcopy(self._root, memo), copy.deepcopy(self._causal, memo)
        new = Facts(root, causal, copy.deepcopy(self._anatomy, memo))
        new._told = told
        return new

    def _in_order(self) -> list[Module | None]:
        return [*chain.from_iterable(map(dict.values, self._held))]

    def _own_forwards(self) -> list[Any]:
        return [held["forward"] for held in self._called if "forward" in held]

    def _held_matrices(self) -> list[Any]:
        return [held.get(name) for held, name in self._matrices]

    def _tell(self) -> str:
        now = dict(self._root.named_modules())
        found = [text for settings in self._settings for text in settings.changed()]
        found += [
            f"{path} is {'another' if type(now[path]) is kind else f'{a_kind(now[path])}, no'} {kind.__name__}"
            for path, (module, kind) in self._paths.items()
            if path in now and (now[path] is not module() or type(now[path]) is not kind)
        ]
        found += [f"{path} is gone" for path in self._paths if path not in now]
        found += [f"{path} is new" for path in now if path not in self._paths]
        if self._own_forwards() != self._forwards:
            found.append("the forward of a module is another one")
        held = {id(module._parameters): path for path, module in now.items()}
        found += [
            f"{held.get(id(where), '')}.{name} is {_described(self._kind(where.get(name)))}, and was {_described(was)}"
            for (where, name), was in zip(self._matrices, self._weights, strict=True)
            if self._kind(where.get(name)) != was
        ]
        rest = f", and {len(found) - 3} more" if len(found) > 3 else ""
        return "; ".join(found[:3]) + rest


class _Settings:
    """The plain values among the attributes of a config or a module."""

    def __init__(self, of: Any, watches: Callable[[str, Any], bool]) -> None:
        self._of, self._watches = of, watches
        self._names = [name for name, value in vars(of).items() if watches(name, value)]
        self._values = copy.deepcopy([vars(of)[name] for name in self._names])
        self._count = len(vars(of))

    def changed(self) -> list[str]:
        """What is other than it was."""
        now = vars(self._of)
        try:
            if len(now) == self._count and [*map(now.get, self._names)] == self._values:
                return []
        except RuntimeError:
            pass  # one is a tensor
        before = dict(zip(self._names, self._values, strict=True))
        names = [name for name, value in now.items() if self._watches(name, value) and name not in before]
        found = [
            f"{type(self._of).__name__}.{name} is {now.get(name)!r}, and was {before.get(name)!r}"
            for name in (*before, *names)
            # What a forward keeps on its module, a tensor say, is no setting, also where nothing or a number was there before.
            if self._watches(name, now.get(name)) and now.get(name) != before.get(name)
        ]
        if not found:  # others have come
            self._count = len(now)
        return found


def _gone() -> None:
    return None


def _of_config(name: str, value: Any) -> bool:
    if name in _WATCHED:
        return True
    plain = isinstance(value, (*_PLAIN, list, tuple, dict))
    return plain and not name.startswith("_") and not _IDLE.fullmatch(name)


def _of_module(name: str, value: Any) -> bool:
    """Of a module around the layers: `logit_scale`, which it has taken from its config."""
    return isinstance(value, (int, float, type(None))) and not name.startswith("_") and name not in _OF_TORCH


_OF_TORCH = ("training", "gradient_checkpointing")


def _configs(*models: Any) -> Iterator[Any]:
    """The configs of models, and those within them."""
    found: dict[int, Any] = {}
    queue = [model.config for model in models]
    for one in queue:
        if id(one) not in found and hasattr(one, "__dict__"):
            found[id(one)] = one
            of_own = (value for name, value in vars(one).items() if name.endswith("config"))
            queue += [value for value in of_own if not isinstance(value, dict)]
    yield from found.values()


def _largest(module: Module) -> tuple[dict[str, Any], str] | None:
    """Where the largest of a module's parameters is held."""
    places = [
        (module._parameters, name, parameter)
        for module in module.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    largest = max(places, key=lambda place: place[2].numel(), default=None)
    return None if largest is None else largest[:2]


def _described(kind: Any) -> str:
    return "none" if kind is None else f"{a(kind[0].__name__)} of {kind[1]} and {tuple(kind[2])}"
