"""The frames that client and server send each other: a header of plain data, then the raw bytes of tensors.

A frame is four bytes with the length of the header, the header (msgpack), and the bytes of each tensor one after the other,
whose lengths are `header["b"]`. Nothing in a frame is code, and nothing is unpickled. Whatever does not hold of a frame
raises `FrameError`, before anything is made of it.

A value in a header is None, a bool, a number, a text or a list of values; everything else is a dict of one key, which says
what it is: see `Encoder` and `Decoder`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from nnatomy.errors import MissingPackageError

try:
    import msgpack
except ImportError as error:
    raise MissingPackageError(
        "Remote models need msgpack and websockets: pip install 'nnatomy[remote]' (a server: 'nnatomy[serve]')."
    ) from error

#: Client and server have to have the same. It is another one whenever a frame means something else than before.
PROTOCOL = 2
#: The bytes of a header at most, and how deep the values in it may lie in one another.
HEADER_BYTES, DEPTH = 8 << 20, 24

_LENGTH = struct.Struct("<I")
_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FORMATS = {
    str(one).removeprefix("torch."): one
    for one in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
}
_FORMAT_NAMES = {one: name for name, one in _FORMATS.items()}


class FrameError(Exception):
    """A frame that is none."""


def pack(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """The frame."""
    packed = msgpack.packb({**header, "b": [len(blob) for blob in blobs]})
    return b"".join([_LENGTH.pack(len(packed)), packed, *blobs])


def unpack(frame: Any) -> tuple[dict[str, Any], list[memoryview]]:
    """The header and the bytes of the tensors.

    Raises:
        FrameError: unless it is a frame.
    """
    if not isinstance(frame, bytes) or len(frame) < _LENGTH.size:
        raise FrameError("a frame is bytes, with the length of its header first")
    length = _LENGTH.unpack_from(frame)[0]
    if length > HEADER_BYTES or length > len(frame) - _LENGTH.size:
        raise FrameError(f"a header of {length:,} bytes in a frame of {len(frame):,}")
    view = memoryview(frame)
    try:
        header = msgpack.unpackb(
            view[_LENGTH.size : _LENGTH.size + length], raw=False, strict_map_key=True, max_ext_len=0
        )
    except Exception as error:  # noqa: BLE001 - msgpack has errors of many kinds
        raise FrameError(f"the header is not msgpack: {error}") from None
    sizes = header.get("b") if isinstance(header, dict) else None
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise FrameError("a header is a map, with the lengths of the tensors' bytes in `b`")
    _check_depth(header)
    at = _LENGTH.size + length
    if at + sum(sizes) != len(frame):
        raise FrameError("the lengths of the tensors' bytes are not those of the frame")
    blobs = []
    for size in sizes:
        blobs.append(view[at : at + size])
        at += size
    return header, blobs


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > DEPTH:
        raise FrameError(f"values lie more than {DEPTH} deep in one another")
    if isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            if isinstance(one, (list, dict)):
                _check_depth(one, depth + 1)


def to_bytes(tensor: Tensor) -> bytes:
    """The elements, in the order of the indices."""
    if not tensor.numel():
        return b""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.view(tensor.shape).copy_(tensor.detach())
    return flat.view(torch.uint8).numpy().tobytes()


def from_bytes(data: Any, dtype: Any, shape: Any) -> Tensor:
    """The tensor of these elements, in memory of its own.

    Raises:
        FrameError: if there is no such dtype or shape, or the bytes are not as many.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FrameError(f"no dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise FrameError(f"no shape: {shape!r:.80}")
    kind = DTYPES[dtype]
    if prod(shape) * kind.itemsize != len(data):
        raise FrameError(f"{len(data):,} bytes are not those of a tensor of {shape} and {dtype}")
    return (
        torch.frombuffer(bytearray(data), dtype=kind).reshape(shape) if prod(shape) else torch.empty(shape, dtype=kind)
    )


def layout_of(tensor: Tensor) -> list[Any]:
    """What is known of a tensor without its elements."""
    return [list(tensor.shape), list(tensor.stride()), NAMES[tensor.dtype], tensor.requires_grad]


def encode(value: Any, tensor: Callable[[Tensor], Any], other: Callable[[Any], Any]) -> Any:
    """A value for a header.

    Args:
        tensor: what stands for a tensor.
        other: what stands for an object that has no form here; it may raise.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return tensor(value)
    if type(value) in (list, tuple, torch.Size):
        kept = [encode(one, tensor, other) for one in value]
        return kept if isinstance(value, list) else {"tuple": kept}
    if type(value) is dict:
        return {"dict": [[key, encode(one, tensor, other)] for key, one in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": NAMES[value]}
    if isinstance(value, torch.device):
        return {"device": None}
    if isinstance(value, torch.memory_format):
        return {"format": _FORMAT_NAMES[value]}
    if isinstance(value, torch.layout) and value is torch.strided:
        return {"layout": None}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return other(value)


def decode(value: Any, others: Callable[[str, Any], Any], device: torch.device) -> Any:
    """What a header's value is.

    Args:
        others: what a dict of another key than those here is; it raises for one that is nothing.
        device: what is meant by one: a client knows no other.

    Raises:
        FrameError: for what is nothing.
    """
    if isinstance(value, list):
        return [decode(one, others, device) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise FrameError("a value is a dict of one key")
    ((kind, of),) = value.items()
    try:
        if kind == "tuple":
            return tuple(decode(one, others, device) for one in of)
        if kind == "dict":
            return {key: decode(one, others, device) for key, one in of}
        if kind == "dtype":
            return DTYPES[of]
        if kind == "format":
            return _FORMATS[of]
        if kind == "complex":
            return complex(*of)
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(f"no {kind}: {of!r:.80}") from error
    if kind == "device":
        return device
    if kind == "layout":
        return torch.strided
    return others(kind, of)
