"""Short prompts one behind the other in rows of one length, so that hardly any padding is run.

Where position ids begin anew in a row and no attention mask is given, the models of Transformers keep what comes before out
of what comes after (transformers/masking_utils.py, `find_packed_sequence_indices`). That this one does is seen each time: a
prompt is in the first pass twice, at the beginning of a row and behind another, and has to come out the same. A
model that mixes positions in another way than by attention (a recurrence, a convolution) gets none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nnatomy.methods.by_length import PADDING, TOKENS, Part, batches, by_length
from nnatomy.methods.patched_rows import other_caches
from nnatomy.standardized import StandardizedTransformer

#: About how many positions a row has, and how many a prompt in it may have: attention computes all pairs of a row.
ROW, SHORT = 128, 32
#: Which part of the positions, those that a pass costs counted, has to be saved.
_SAVED = 0.1


class NotPackedError(Exception):
    """Why there are no such rows."""


def packed(model: StandardizedTransformer, inputs: Mapping[str, Any]) -> Iterator[Part]:
    """The prompts of a batch, the short ones in such rows. The first part has one of its prompts twice.

    Args:
        inputs: what `model.prepare` gives.

    Raises:
        NotPackedError: if the model cannot run such rows, or little would be saved.
    """
    _look_before(model, inputs)
    lengths = inputs["attention_mask"].sum(1).tolist()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    long, short = [i for i in order if lengths[i] > SHORT], [i for i in order if lengths[i] <= SHORT]
    if not short:
        raise NotPackedError(f"no prompt has {SHORT} tokens or fewer")
    rows = _rows(short, lengths)
    width = max(sum(lengths[i] for i in row) for row in rows)
    passes = -(-len(rows) * width // TOKENS)
    apart = batches([lengths[i] for i in short], None)
    now = sum(len(batch) * lengths[short[batch[0]]] + PADDING for batch in apart)
    then = len(rows) * width + passes * PADDING
    if then > (1 - _SAVED) * now:
        raise NotPackedError(f"{then} positions would be run for {now}")
    size = -(-len(rows) // passes)
    for start in range(0, len(rows), size):
        yield _part(inputs, lengths, rows[start : start + size], width)
    if long:
        rest = {name: value[long] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        for part in by_length(rest, None):
            yield part._replace(prompts=[long[i] for i in part.prompts])


def _look_before(model: StandardizedTransformer, inputs: Mapping[str, Any]) -> None:
    """Raise if what the model is given says that its rows cannot be such."""
    if not inputs.keys() <= {"input_ids", "attention_mask", "position_ids", "use_cache"}:
        raise NotPackedError("the prompts are more than token ids")
    mask, positions = inputs["attention_mask"], inputs.get("position_ids")
    if positions is None:
        raise NotPackedError("the prompts are of one length, or the model takes no position ids")
    pads = mask.shape[1] - mask.sum(1, keepdim=True)
    places = torch.arange(mask.shape[1], device=mask.device) - pads
    if not (torch.equal(mask, (places >= 0).to(mask)) and torch.equal(positions, places.clamp(min=0))):
        raise NotPackedError("the attention mask or the position ids are the caller's own")
    if model.edits:
        raise NotPackedError("edits may count positions")
    if other := other_caches(model):
        raise NotPackedError(f"the model's cache has {other}")


def _rows(prompts: list[int], lengths: list[int]) -> list[list[int]]:
    """The prompts of each row: the next always in the emptiest. The last is once more before all others of the first row.

    Args:
        prompts: the longest first.
        lengths: of all prompts.
    """
    *_, last = prompts
    rows: list[list[int]] = [[] for _ in range(-(-sum(lengths[i] for i in prompts) // ROW))]
    filled = [0] * len(rows)
    for place, i in enumerate([last, *prompts]):
        row = place and min(range(len(rows)), key=filled.__getitem__)
        rows[row].append(i)
        filled[row] += lengths[i]
    return rows


def _part(inputs: Mapping[str, Any], lengths: list[int], rows: list[list[int]], width: int) -> Part:
    given = inputs["input_ids"]
    ids = given.new_zeros(len(rows), width)
    positions = torch.arange(width, device=given.device).repeat(len(rows), 1)
    places = []
    for number, row in enumerate(rows):
        end = 0
        for i in row:
            start, end = end, end + lengths[i]
            ids[number, start:end] = given[i, -lengths[i] :]
            positions[number, start:] -= positions[number, start].clone()
            places.append((i, number, end))
        positions[number, end:] -= positions[number, end:][:1].clone()
    prompts, numbers, ends = map(list, zip(*places, strict=True))
    # An attention mask, even one of ones, would say that a row is one prompt; so would a cache.
    arguments = {"input_ids": ids, "attention_mask": None, "position_ids": positions, "use_cache": False}
    return Part(prompts, arguments, numbers, ends)
