"""Whether a value is the whole of what its name means, or one piece of it.

With longer prompts than those of the validation a layer may work in pieces: its MLP goes through the positions by chunks
(`chunk_size_feed_forward`), its attention by blocks of queries or keys, the model itself by segments. A name would give, and
edit, the first piece. So a value is held against what its layer was given in the same call, and against the tokens of the
model's: it has as many prompts and positions.

What a layer was given is read where it stands anyway, in the frame of the gate that its call came through: its `args` and
`kwargs`. So nobody has to be told of the calls of all layers, and it is right of whatever call is at work: of a step with a
cache, with soft prompts, of an encoder or a decoder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from nnatomy.core.gates import is_gate
from nnatomy.core.run import Run
from nnatomy.errors import NotInThisModelError
from nnatomy.names import Name
from nnatomy.standardized.hidden import input_of
from nnatomy.standardized.prompt_trace import RootInputs

#: By axis of a name, which axis of (batch, seq, ...) it is at least as long as; and what is counted along it.
_OF_STREAM = {
    "batch": (0, "prompts"),
    "seq": (1, "positions"),
    "query": (1, "positions"),
    "key": (1, "keys' positions"),
}


class Extent(NamedTuple):
    """What the values of a name are at least as long as.

    Args:
        axes: how many axes they have.
        least: of some of them: which, of which axis of the stream, and what is counted along it.
        sums_keys: whether they are sums over the keys, which are then as many as the positions.
        of_encoder: whether the tokens are an encoder's.
    """

    axes: int
    least: tuple[tuple[int, int, str], ...]
    sums_keys: bool
    of_encoder: bool = False

    @classmethod
    def of(cls, row: Name) -> Extent:
        """That of a name. (A cross-attention's keys are as many as another model has positions.)"""
        known = {axis for axis in _OF_STREAM if axis != "key" or row.part != "cross_attentions"}
        least = ((i, *_OF_STREAM[axis]) for i, axis in enumerate(row.axes) if axis in known)
        return cls(len(row.axes), tuple(least), bool(row.product_of) and "key" not in row.axes)

    def missing(
        self, value: Any, module: nn.Module, run: Run, prompts: RootInputs | None, layers: Iterable[nn.Module]
    ) -> tuple[str, str] | None:
        """Of a value that is a piece of what it is called: what it has, and what it should have.

        Args:
            module: of whose call it is.
            run: where it stands at that value.
            prompts: what the model was given.
            layers: the layers that it may be in.
        """
        if not isinstance(value, Tensor):
            return None
        shape = value.shape
        if len(shape) < self.axes:  # all positions in one axis, and not as many as there are
            return f"{len(shape)} axes", f"{self.axes}"
        there: Elsewhere | None = getattr(run, "elsewhere", None)
        given = (stream_given(run, layers) if there is None else there.given) or (0, 0)
        tokens = 0 if prompts is None else prompts.new_positions(run.progress.step, self.of_encoder)
        least = given[0], max(given[1], tokens)
        for axis, of, what in self.least if len(shape) == self.axes else ():
            if shape[axis] < least[of]:
                return f"{shape[axis]} {what}", f"{least[of]}"
        if self.sums_keys:
            keys = keys_seen(run, module) if there is None else there.keys
            if 0 < keys < least[1]:
                return f"what {keys} keys' positions add", f"{least[1]}"
        return None


class Elsewhere(NamedTuple):
    """What a run whose model is elsewhere is told of where the pass stands; its `elsewhere`.

    Attributes:
        given: see `stream_given`.
        keys: see `keys_seen`.
    """

    given: tuple[int, ...] | None
    keys: int


def keys_seen(run: Run, module: nn.Module) -> int:
    """How many keys the attention at work there has; 0 if nobody has looked."""
    modes: list[Any] = [mode for *_, mode in run.taps.modes]
    return next((int(one.keys) for one in modes if getattr(one, "module", None) is module), 0)


def stream_given(run: Run, layers: Iterable[nn.Module]) -> tuple[int, ...] | None:
    """The shape of the stream that the innermost of these layers that is at work was given; None if none is."""
    frame = sys._current_frames().get(run.interruptible.thread)
    while frame is not None:
        if is_gate(frame):
            here = frame.f_locals
            if here["self"] in layers:
                stream = input_of((here["args"], here["kwargs"]))
                return stream.shape if isinstance(stream, Tensor) and stream.ndim == 3 else None
        frame = frame.f_back
    return None


def piece_error(name: str, found: str, least: str) -> NotInThisModelError:
    """That what is called so is a piece."""
    return NotInThisModelError(
        f"{name}: in this pass the model computes it in pieces: what comes first has {found}, where the layer was given {least}; "
        "the rest comes later. Have it work in one piece (chunk_size_feed_forward=0, or whatever sets the size of its chunks, "
        "blocks or segments), give a prompt no longer than one, or read each call by the module's own name: "
        "model.path.to.module.calls[k].output."
    )
