"""A matrix of a model that a name means: the module, which of its rows or columns, and that it is all that the module computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nnatomy.errors import a
from nnatomy.standardized.offloaded import value_of
from nnatomy.validation.near import is_near

_OWN = {"weight", "bias"}


class RefusedError(Exception):
    """There is no such weight; the text says why."""


@dataclass(frozen=True)
class Seen:
    """What a module was given and gave, in rows: (rows, in) and (rows, out)."""

    given: Tensor
    gave: Tensor


@dataclass(frozen=True)
class Projection:
    """Some of the entries that a module gives, or reads, as what a name means.

    Attributes:
        module: it computes `x @ matrix + bias` and nothing else: proved by value.
        path: where it is in the layer, or in the model.
        index: which of the entries that it gives (or reads), in the order of the name's axes: (head, dim), or (neuron). None: all.
        side: whether these are entries of what it gives or of what it reads.
        transposed: whether its parameter is (out, in).
        plain: whether these entries are what the name's value is, up to one factor (no norm or gate stands between).
        norm: the module that gives what it reads.
    """

    module: Module
    path: str
    index: Tensor | None
    side: Literal["gives", "reads"]
    transposed: bool
    plain: bool = True
    norm: Module | None = None

    def matrix(self) -> Tensor:
        """Of (*head, in, dim) or (*head, dim, out)."""
        whole = weight_of(self.module, self.path)
        whole = whole.T if self.transposed else whole  # (in, out)
        if self.index is None:
            return whole
        if self.side == "gives":
            return taken(whole.T, self.index).mT
        return taken(whole, self.index)

    def bias(self) -> Tensor:
        """Of (*head, dim) or (out); zeros where the module has none."""
        own = getattr(self.module, "bias", None)
        own = value_of(self.module, "bias") if isinstance(own, Tensor) else None
        if own is None:
            weight = weight_of(self.module, self.path)
            own = weight.new_zeros(weight.shape[0 if self.transposed else 1])
        if self.side == "reads" or self.index is None:
            return own
        return taken(own, self.index)


def weight_of(module: Module, path: str) -> Tensor:
    """The parameter, where it is a plain matrix. Raises RefusedError otherwise."""
    name, weight = f"{path} ({type(module).__name__})", getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        try:
            weight = value_of(module, "weight")
        except LookupError as error:
            raise RefusedError(str(error)) from None
    dense = _dequantized(weight)
    if dense is None and isinstance(weight, Tensor) and weight.dtype.itemsize == 1:
        dense = _of_unit_vectors(module)
    if dense is not None:
        weight = dense
    elif isinstance(weight, Tensor) and weight.dtype.itemsize == 1:
        raise RefusedError(
            f"the weight of {name} is of {weight.dtype}, beside scales that the module alone knows. {_QUANTIZED}"
        )
    others = sorted({one for one, _ in module.named_parameters()} - _OWN)
    if others:
        raise RefusedError(
            f"{name} computes with {', '.join(others[:2])}{', ...' * (len(others) > 2)} beside a weight. If that is an adapter, "
            "merge it (PEFT: hf_model.merge_and_unload(), a model without it) and have the model looked at again: model.refresh()"
        )
    if not isinstance(weight, Tensor):
        raise RefusedError(f"{name} has no weight: it is quantized, say. {_QUANTIZED}")
    if _is_split(weight) or not weight.is_floating_point() or weight.ndim != 2:
        kind = f"{type(weight).__name__} of {weight.dtype}, {tuple(weight.shape)}"
        raise RefusedError(
            f"the weight of {name} is {a(kind)}, and no plain matrix: it is quantized, or split. {_QUANTIZED}"
        )
    return weight


def _dequantized(weight: Any) -> Tensor | None:
    """A copy as a plain matrix, of a tensor whose class says how (quanto's, say); None otherwise."""
    if not _is_split(weight) or type(weight).dequantize is Tensor.dequantize:
        return None
    dense = weight.detach().dequantize()
    return dense if type(dense) is Tensor else None


def _of_unit_vectors(module: Module) -> Tensor | None:
    """A copy as a plain matrix, of a module that unpacks its weight in its forward (bitsandbytes' of 4 bits): what it gives for
    unit vectors. None for one that rounds what it is given, too: then there is no matrix that it multiplies by.
    """
    size, bias = getattr(module, "in_features", None), getattr(module, "bias", None)
    if not isinstance(size, int) or not isinstance(module.weight, Tensor):
        return None
    kept = getattr(module, "compute_dtype", None)
    dtype = kept if isinstance(kept, torch.dtype) else torch.get_default_dtype()
    own: dict[str, Any] = {"device": module.weight.device, "dtype": dtype}
    unit, others = torch.eye(size, **own), torch.linspace(-1, 2, 4 * size, **own).sin().view(4, size)
    try:
        with torch.no_grad():
            given, expected = module.forward(unit), module.forward(others)
    except (RuntimeError, NotImplementedError):  # no kernel for it here
        return None
    dense = given if bias is None else given - bias.to(given)
    found = others @ dense if bias is None else others @ dense + bias.to(dense)
    return dense.T if is_near(found, expected, 64) else None


def _is_split(weight: Any) -> bool:
    return is_traceable_wrapper_subclass(weight)


_QUANTIZED = "Load the model without quantization (or hf_model.dequantize()), and look at it again: model.refresh()"


def is_transposed(module: Module, path: str, seen: Seen) -> bool:
    """Whether the parameter is (out, in); by value. Raises RefusedError where the module gives something else."""
    weight, bias = weight_of(module, path).detach(), getattr(module, "bias", None)
    bias = value_of(module, "bias") if isinstance(bias, Tensor) else None
    given, gave = seen.given.detach().float(), seen.gave.detach()
    shapes = given.shape[-1], gave.shape[-1]
    for transposed, matrix in ((True, weight.T), (False, weight)):
        if tuple(matrix.shape) == shapes:
            own = given @ matrix.to(given) + (bias.detach().to(given) if isinstance(bias, Tensor) else 0)
            if is_near(own.to(gave.dtype), gave):
                return transposed
    raise RefusedError(
        f"{path} ({type(module).__name__}) gives something else than its input times its weight and its bias. If an adapter does "
        "it, merge it and have the model looked at again: model.refresh()"
    )


def taken(tensor: Tensor, index: Tensor) -> Tensor:
    """`tensor[index]` for an index of one or two axes: a view where the index is regular, and a copy otherwise."""
    first = int(index.flatten()[0])
    if index.ndim == 1:
        step = int(index[1]) - first if len(index) > 1 else 1
        regular = step > 0 and torch.equal(index, first + step * torch.arange(len(index)))
        return tensor[first::step][: len(index)] if regular else tensor[index.to(tensor.device)]
    heads, size = index.shape
    step = int(index[1, 0]) - first if heads > 1 else size
    regular = step > 0 and torch.equal(index, first + step * torch.arange(heads)[:, None] + torch.arange(size))
    if not regular:
        return tensor[index.to(tensor.device)]
    blocks: Any = tensor[first:].unfold(0, size, step)[:heads]  # (head, ..., dim)
    return blocks.movedim(-1, 1)
