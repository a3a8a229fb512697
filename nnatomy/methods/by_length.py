"""A batch of prompts in parts of similar length, so that little padding is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

#: How many tokens, padding counted, a forward pass has at most where no number of prompts is given (but one prompt).
TOKENS = 1024
#: How many positions of padding it then has at most: as many as one more pass costs, on the CPU of benchmarks/README.md.
PADDING = 40


def batches(lengths: Sequence[int], size: int | None) -> Iterator[list[int]]:
    """The indices of prompts of similar length, the longest first: `size` at a time, or by `TOKENS` and `PADDING`."""
    batch: list[int] = []
    padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0] if batch else i]
        padding += longest - lengths[i]
        full = len(batch) >= size if size else (len(batch) + 1) * longest > TOKENS or padding > PADDING
        if batch and full:
            yield batch
            batch, padding = [], 0
        batch.append(i)
    if batch:
        yield batch


def by_length(
    inputs: Mapping[str, Any], size: int | None
) -> Iterator[tuple[Int[Tensor, " part"], dict[str, Any]]]:
    """A batch in such parts, without what is padding to the left of all of them.

    Positions counted from the end stay what they are.

    Args:
        inputs: what `model.prepare` gives. It stays whole unless every tensor is of (batch, seq, ...).
        size: as in `batches`.

    Yields:
        Which prompts these are, and their inputs.
    """
    mask = inputs.get("attention_mask")
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    if mask is None or mask.ndim != 2 or any(one.shape[:2] != mask.shape for one in tensors):
        count = len(inputs["inputs_embeds"] if mask is None else mask)
        yield torch.arange(count), dict(inputs)
        return
    for part in batches(mask.sum(1).tolist(), size):
        rows = torch.tensor(part)
        first = int(mask[rows].any(0).nonzero()[0])
        yield (
            rows,
            {
                name: value[rows, first:] if isinstance(value, Tensor) else value
                for name, value in inputs.items()
            },
        )
