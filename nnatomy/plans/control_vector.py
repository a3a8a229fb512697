"""Control vectors as llama.cpp and repeng write them: a file in the GGUF format with a tensor `direction.N` for each of some layers.

llama.cpp adds `direction.N`, times a strength, to the residual stream behind its block N, counted from 0, at every position: that is
`layers_output[N]`. Its block 0 is never steered, and its loader refuses a `direction.0`; so is it refused here.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnatomy.errors import PlanError
from nnatomy.paths import path_of
from nnatomy.plans.plan import Plan

_BYTES, _MOST = 1 << 30, 100_000
_ALIGNMENT, _STRING, _ARRAY = "general.alignment", 8, 9
#: The numbers of GGUF, as `struct` has them, and the types of tensors that are read: their sizes and dtypes.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TENSORS = {0: (4, torch.float32), 1: (2, torch.float16), 30: (2, torch.bfloat16)}


def from_control_vector(path: str | Path, model: Any, strength: float = 1.0) -> Plan:
    """The plan that adds a control vector to a model.

    Args:
        path: a GGUF file of llama.cpp's or repeng's.
        model: the model that it is for, on which the plan is recorded.
        strength: what the directions are multiplied by.

    Returns:
        `layers_output[N] = layers_output[N] + strength * direction.N` at every position, in every step.

    Raises:
        PlanError: for a file that is no such, or does not fit the model.
    """
    directions = read_control_vector(path)
    if wide := [one for one in directions.values() if one.shape != (model.hidden_size,)]:
        raise PlanError(
            f"{path}: its directions are of width {len(wide[0])}, the model's residual stream of width {model.hidden_size}."
        )
    if max(directions) >= model.num_layers:
        raise PlanError(
            f"{path}: it has a direction.{max(directions)}; the model has layers 0 to {model.num_layers - 1}."
        )

    def block() -> None:
        for layer, direction in directions.items():
            hidden = model.layers_output[layer]
            model.layers_output[layer] = hidden + float(strength) * direction.to(hidden)

    plan: Plan = model.without_edits().record(block)
    plan.notes.append(f"a control vector of layers {', '.join(map(str, directions))}, strength {strength:g}")
    return plan


def read_control_vector(path: str | Path) -> dict[int, Tensor]:
    """The directions of a control vector, by layer, in float32.

    Raises:
        PlanError: for a file that is none.
    """
    path = path_of(path, "a GGUF file of a control vector", PlanError)
    try:
        size = path.stat().st_size
        if size > _BYTES:
            raise PlanError(f"{path}: it has {size:,} bytes; {_BYTES:,} are allowed.")
        data = path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path}: it cannot be read: {error.strerror}.") from None
    try:
        return _Gguf(data).directions()
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise PlanError(f"{path} is no control vector in the GGUF format: {error}.") from None


class _Gguf:
    """A file of versions 2 or 3, little-endian."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def directions(self) -> dict[int, Tensor]:
        magic, version, tensors, facts = self._numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin with GGUF and version 2 or 3")
        if max(tensors, facts) > _MOST:
            raise ValueError(f"it says that it has {tensors} tensors and {facts} facts")
        known = dict(self._fact() for _ in range(facts))
        infos = [self._info() for _ in range(tensors)]
        architecture = known.get("general.architecture", "controlvector")
        if architecture != "controlvector":
            raise ValueError(f"it is of a {architecture!r:.40}, and not of a controlvector")
        alignment = known.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 4096:
            raise ValueError(f"its alignment is {alignment!r:.40}")
        start = -(-self._at // alignment) * alignment
        found = {layer: self._tensor(start + offset, shape, kind) for layer, shape, kind, offset in infos}
        if not found or len(found) < len(infos):
            raise ValueError("it has no direction, or one layer's twice")
        return dict(sorted(found.items()))

    def _numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return found

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        if length > 65_536:
            raise ValueError(f"a text of {length} bytes")
        (text,) = self._numbers(f"{length}s")
        return str(text, "utf-8")

    def _fact(self) -> tuple[str, Any]:
        return self._text(), self._value(*self._numbers("I"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            of, count = self._numbers("IQ")
            if count > _MOST or of == _ARRAY:
                raise ValueError(f"an array of {count} of kind {of}")
            return [self._value(of) for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"a fact of kind {kind}")
        return self._numbers(_NUMBERS[kind])[0]

    def _info(self) -> tuple[int, tuple[int, ...], int, int]:
        name, (axes,) = self._text(), self._numbers("I")
        before, _, layer = name.partition(".")
        if before != "direction" or not (layer.isascii() and layer.isdecimal()) or not 0 < int(layer) < 10_000:
            raise ValueError(f"a tensor {name!r:.40}: they are direction.N, of layers N from 1 on")
        if axes != 1:
            raise ValueError(f"{name} has {axes} axes, and not one")
        shape = self._numbers("Q" * axes)
        kind, offset = self._numbers("IQ")
        if kind not in _TENSORS:
            raise ValueError(f"{name} is quantized, or of another type ({kind}) than F32, F16 and BF16")
        return int(layer), shape, kind, offset

    def _tensor(self, at: int, shape: tuple[int, ...], kind: int) -> Tensor:
        size, dtype = _TENSORS[kind]
        end = at + prod(shape) * size
        if not prod(shape) or end > len(self._data):
            raise ValueError(f"a tensor of {shape} lies beyond its end")
        return torch.frombuffer(bytearray(self._data[at:end]), dtype=dtype).float()
