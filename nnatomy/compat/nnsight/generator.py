"""`model.generator`: what a generation gives, and its tokens as they come."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module


class StreamedTokens(Module):
    """A streamer of Transformers whose calls are points of the trace."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens

    def put(self, tokens: Tensor) -> None:
        """The prompt, and then each token."""
        self(tokens)

    def end(self) -> None:
        """No more come."""


class Generator:
    """What is generated, for the block that asks."""

    def __init__(self, root: Any) -> None:
        self._root = root

    @property
    def output(self) -> Any:
        """What `generate` returns: runs it to its end. The rows of a block with a prompt of its own."""
        block = self._root._blocks.current("generator.output")
        block.reach_end()
        return block.own(block.run.result)

    @property
    def streamer(self) -> Streamer:
        """The tokens as they come."""
        return Streamer(self._root)


class Streamer:
    """The tokens as they come."""

    def __init__(self, root: Any) -> None:
        self._root = root

    @property
    def output(self) -> Tensor:
        """The next that come: the prompt, before the first step's values; behind a step's values, the token of that step."""
        block = self._root._blocks.current("generator.streamer.output")
        run = block.run
        module = next(one for one in run.roots if isinstance(one, StreamedTokens))
        before, progress = block.step, run.progress
        block.step = max(progress.step + bool(progress.calls.get(run.root)), block.step)
        try:
            tokens: Tensor = block.reach(module, "output", "generator.streamer.output").value
        finally:
            block.step = before
        return tokens
