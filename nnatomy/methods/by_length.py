"""A batch of prompts in parts of similar length, so that little padding is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from nnatomy.standardized.positions import mask_of

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


class Part(NamedTuple):
    """Some of a batch's prompts, to be run at once.

    Attributes:
        prompts: which.
        inputs: the arguments of the model's forward.
        rows, ends: for each prompt, its row in them, and the position there that comes after its last.
    """

    prompts: list[int]
    inputs: dict[str, Any]
    rows: list[int]
    ends: list[int]


def by_length(inputs: Mapping[str, Any], size: int | None) -> Iterator[Part]:
    """A batch in such parts, without what is padding to the left of all of them.

    Args:
        inputs: what `model.prepare` gives. It stays whole unless every tensor is of (batch, seq, ...).
        size: as in `batches`.
    """
    mask = inputs.get("attention_mask")
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    of_decoder = inputs.get("decoder_input_ids") is not None  # whose positions are not those of the mask
    if of_decoder or mask is None or mask.ndim != 2 or any(one.shape[:2] != mask.shape for one in tensors):
        count, seq = mask_of(inputs).shape
        yield Part([*range(count)], dict(inputs), [*range(count)], [seq] * count)
        return
    for prompts in batches(mask.sum(1).tolist(), size):
        first = int(mask[prompts].any(0).nonzero()[0])
        cut = {name: value[prompts, first:] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        yield Part(prompts, cut, [*range(len(prompts))], [mask.shape[1] - first] * len(prompts))
