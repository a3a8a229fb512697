"""What methods take and give, as data: numbers, texts, lists, dicts, tensors, and the classes of this library that hold nothing else.

A value becomes what a header may have (see `wire`), and the bytes of its tensors. Nothing in it is code, and a class is one of a
list.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from nnatomy import methods
from nnatomy.errors import a_kind
from nnatomy.methods.circuit_faithfulness import Faithfulness
from nnatomy.methods.direct_logit_attribution import LogitAttribution
from nnatomy.methods.edge_attribution import EdgeAttribution
from nnatomy.methods.gradients import AttributionMap
from nnatomy.methods.metrics import METRICS, NamedMetric
from nnatomy.methods.result import Result
from nnatomy.remote.tensor import RemoteTensor
from nnatomy.remote.wire import NAMES, FrameError, decode, encode, from_bytes, to_bytes

#: Classes that arguments may be of; and those of results, which arguments may be of, too.
_GIVEN = (methods.Prompt, methods.TargetPrompt, methods.TargetPromptBatch, EdgeAttribution)
_FOUND = (
    methods.Patching,
    methods.PathPatching,
    methods.HeadAblation,
    methods.HeadMap,
    methods.LensStatistics,
    methods.LogitLens,
    AttributionMap,
    Faithfulness,
    LogitAttribution,
)
CLASSES: dict[str, Any] = {kind.__name__: kind for kind in (*_GIVEN, *_FOUND)}
#: How many numbers a range has at most.
_RANGE = 1_000_000


class NotSendableError(Exception):
    """A value that is no data."""


class Sender:
    """Makes values into data.

    Args:
        detached: whether tensors that need gradients go without: the method that is to have them runs without gradients.

    Attributes:
        blobs: the bytes of the tensors.
        metrics: those of ours among the values, in their order.
    """

    def __init__(self, detached: bool = False) -> None:
        self._detached = detached
        self.blobs: list[bytes] = []
        self.metrics: list[NamedMetric] = []

    def send(self, value: Any) -> Any:
        """What stands for it in a header. Raises NotSendableError."""
        return encode(value, self._tensor, self._other)

    def _tensor(self, tensor: Tensor) -> Any:
        if isinstance(tensor, Result):
            return self._other(tensor)
        tensor = _here(tensor, self._detached)
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        if not tensor.permute(order).is_contiguous():
            order = list(range(tensor.ndim))
        self.blobs.append(to_bytes(tensor.permute(order)))
        return {"t": [len(self.blobs) - 1, NAMES[tensor.dtype], [tensor.shape[axis] for axis in order], order]}

    def _other(self, value: Any) -> Any:
        if type(value) is range:
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, NamedMetric):
            self.metrics.append(value)
            return {"metric": [value.name, self.send(value.data())]}
        if CLASSES.get(type(value).__name__) is not type(value):
            raise NotSendableError(a_kind(value))
        state = (
            value._state()
            if isinstance(value, Result)
            else {one.name: getattr(value, one.name) for one in fields(value)}
        )
        return {"class": [type(value).__name__, [[name, self.send(one)] for name, one in state.items()]]}


class Receiver:
    """Makes data into values.

    Args:
        blobs: the bytes of the tensors.
        model: whose tokenizer reads the texts of metrics.
        device: where tensors go.
    """

    def __init__(self, blobs: Any, model: Any = None, device: torch.device | None = None) -> None:
        self._blobs, self._model = blobs, model
        self._device = torch.device("cpu") if device is None else device
        self.metrics: list[NamedMetric] = []

    def receive(self, value: Any) -> Any:
        """The value. Raises FrameError for what is nothing."""
        return decode(value, self._other, self._device)

    def _other(self, kind: str, of: Any) -> Any:
        try:
            return self._made(kind, of if isinstance(of, list) else [])
        except (TypeError, ValueError) as error:
            raise FrameError(f"no {kind:.40}: {of!r:.80}") from error

    def _made(self, kind: str, of: list[Any]) -> Any:
        if kind == "t" and len(of) == 4:
            return self._tensor(*of)
        if kind == "range" and len(of) == 3 and all(type(one) is int for one in of) and of[2]:
            found = range(*of)
            if (found.stop - found.start) // found.step <= _RANGE:
                return found
        if kind == "metric" and len(of) == 2 and of[0] in METRICS and self._model is not None:
            self.metrics.append(NamedMetric.of(of[0], self.receive(of[1]), self._model))
            return self.metrics[-1]
        if kind == "class" and len(of) == 2 and of[0] in CLASSES:
            cls, given = CLASSES[of[0]], {key: self.receive(one) for key, one in of[1]}
            if issubclass(cls, Result):
                return cls._of_state(given)
            if given.keys() == {one.name for one in fields(cls)}:
                return cls(**given)
        raise FrameError(f"a value of no kind: {kind:.40} {of!r:.80}")

    def _tensor(self, number: Any, dtype: Any, shape: Any, order: Any) -> Tensor:
        if type(number) is not int or not 0 <= number < len(self._blobs):
            raise FrameError("the bytes of a tensor are missing")
        tensor = from_bytes(self._blobs[number], dtype, shape)
        if not isinstance(order, list) or sorted(order) != list(range(tensor.ndim)):
            raise FrameError("an order of axes names each once")
        return tensor.permute([order.index(axis) for axis in range(tensor.ndim)]).to(self._device)


def _here(tensor: Tensor, detached: bool) -> Tensor:
    """The tensor itself, if it can be sent."""
    if isinstance(tensor, RemoteTensor) and (detached or not tensor._needs) and tensor.number >= 0:
        tensor = tensor.local()
    if detached and type(tensor) is Tensor:
        tensor = tensor.detach()
    if type(tensor) is not Tensor or tensor.requires_grad or tensor.dtype not in NAMES:
        raise NotSendableError("a tensor with a gradient" if tensor.requires_grad else a_kind(tensor))
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise NotSendableError("a tensor that is not dense")
    return tensor.cpu()
