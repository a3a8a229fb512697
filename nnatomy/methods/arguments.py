"""What the arguments of methods are, by their names, which mean the same in all of them; and what is said where one is not that."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from nnatomy.errors import InputError, LayerIndexError, NotInThisModelError, a_kind
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import numbers
from nnatomy.whole_number import whole_number

Given = ParamSpec("Given")
Returned = TypeVar("Returned")
Check = Callable[[str, Any], Any]


def whole(least: int | None = None) -> Check:
    """A whole number, `least` or more."""

    def check(name: str, value: Any) -> None:
        more = "" if least is None else f", {least} or more"
        try:
            found = whole_number(value)
        except TypeError:
            found = None
        if found is None or (least is not None and found < least):
            raise InputError(f"{name}={_short(value)}: it is a whole number{more}.")

    return check


def number(name: str, value: Any) -> None:
    """Finite."""
    try:
        found = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{name}={_short(value)}: it is a finite number.")


def function(what: str) -> Check:
    """Whatever can be called."""

    def check(name: str, value: Any) -> None:
        if not callable(value):
            raise InputError(f"{name}={_short(value)}: it is {what}.")

    return check


def layers(name: str, value: Any) -> None:
    """One or several, whether or not the model has them."""
    try:
        numbers(name, value)
    except InputError:
        none = hasattr(value, "__len__") and not len(value)
        raise InputError(
            f"{name}={_short(value)}: give at least one."
            if none
            else f"{name}={_short(value)}: it is one layer, or several; they are counted from 0."
        ) from None


def several(name: str, value: Any) -> None:
    """Anything that can be gone through."""
    if not isinstance(value, Iterable) or (isinstance(value, Tensor) and value.ndim == 0):
        raise InputError(f"{name}={_short(value)}: give several, in a list.")


def model(name: str, value: Any) -> None:
    """A StandardizedTransformer."""
    if not isinstance(value, StandardizedTransformer):
        how = (
            f"StandardizedTransformer({value!r})"
            if isinstance(value, str)
            else getattr(type(value), "instead_in_methods", "StandardizedTransformer(model, tokenizer)")
        )
        raise InputError(f"{name} is {a_kind(value)}: methods take a StandardizedTransformer, {how}.")


CHECKS: dict[str, Check] = {
    **dict.fromkeys(("model", "nn_model", "source_model"), model),
    **dict.fromkeys(
        ("batch_size", "max_batch_size", "steps", "samples", "window", "top_k", "chunk_size", "max_length"),
        whole(1),
    ),
    **dict.fromkeys(("num_patches", "prompts_per_shard"), whole(1)),
    "from_step": whole(0),
    **dict.fromkeys(("position", "source_position", "attn_idx_patch", "idx", "seed"), whole()),
    **dict.fromkeys(("noise", "factor"), number),
    **dict.fromkeys(("layers", "target_layers"), layers),
    "metric": function(
        "a function from logits of (batch, vocab) to one number a row, such as logit_difference(' Paris', ' Rome', model)"
    ),
    "lens": function("a function of hidden states, such as a TunedLens"),
    "mapping": function("a function of hidden states, such as a torch.nn.Linear"),
    "get_activations": function("a function from the model and a layer to a value of (batch, seq, hidden)"),
    **dict.fromkeys(
        ("get_probs", "get_probs_func"),
        function("a function from the model and texts to probabilities, such as logit_lens"),
    ),
}


#: What is a number or several: numpy's, and a tensor of one, are read as Python's.
NUMBERS = frozenset(("positions", "layers", "target_layers", "heads", "position", "answer", "wrong", "targets"))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else value
    return value.tolist() if type(value).__module__ == "numpy" else value


def method(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """A public method: its arguments are looked at first, and what is wrong with one is said at the user's line."""
    signature = inspect.signature(function)
    places = [one.name for one in signature.parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]

    @wraps(function)
    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        if len(args) > len(places):
            raise TypeError(_too_many(function.__name__, signature, places, len(args)))
        kwargs |= {name: _plain(value) for name, value in kwargs.items() if name in NUMBERS}  # type: ignore[assignment]
        try:
            given: dict[str, Any] = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # the call below raises, and names the function
        try:
            for name, value in given.items():
                optional = value is None and signature.parameters[name].default is None
                if name in CHECKS and not optional:
                    CHECKS[name](name, value)
            # A model that lives elsewhere may have it run there.
            run_whole: Any = getattr(given.get("model", given.get("nn_model")), "run_whole", None)
            if run_whole is not None and (found := run_whole(function.__name__, given)) is not None:
                result: Returned = found[0]
                return result
            return function(*args, **kwargs)
        except (InputError, LayerIndexError, NotInThisModelError) as error:
            raise error.with_traceback(None)  # noqa: B904

    return wrapped


def _too_many(name: str, signature: inspect.Signature, places: list[str], given: int) -> str:
    """What is said where more than model and prompts is given by its place."""
    named = [one.name for one in signature.parameters.values() if one.kind is one.KEYWORD_ONLY]
    meant = ", ".join(f"{one}=..." for one in named[: given - len(places)])
    return f"{name}({', '.join(places)}): the rest is given by keyword: {name}({', '.join(places)}, {meant})."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_list(name: str, given: Any) -> None:
    """Raise InputError for what is no list of numbers."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"{name}={given!r}: give a list of their numbers.")
