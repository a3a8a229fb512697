"""Positions of a prompt, counted so that what it is batched with does not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int, Num
from torch import Tensor

from nnatomy.errors import InputError


def mask_of(inputs: Mapping[str, Any]) -> Num[Tensor, "prompt seq"]:
    """1 for the positions of the prompts that the layers have (an encoder-decoder's decoder), 0 for padding."""
    decoder = "decoder_input_ids" in inputs
    mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is None:
        read = inputs["decoder_input_ids" if decoder else "inputs_embeds"]
        mask = torch.ones(read.shape[:2], dtype=torch.long, device=read.device)
    return mask


def positions_from_end(
    inputs: Mapping[str, Any], positions: str | int | Sequence[int]
) -> list[Int[Tensor, " position"]]:
    """Where each prompt's positions stand in the batch.

    Args:
        inputs: what `model.prepare` gives.
        positions: "last", "all", or one or several, counted in each prompt: 0 is its first token and -1 its last.

    Returns:
        For each prompt, indices into the batch's positions, counted from the end (-1 is the last).

    Raises:
        InputError: if a prompt has no such position.
    """
    mask = mask_of(inputs).cpu()
    if isinstance(positions, str) and positions not in ("last", "all"):
        raise InputError(f'positions={positions!r}: it is "last", "all", or one or several numbers.')
    found = []
    for i, row in enumerate(mask):
        if positions == "all":
            found.append(row.nonzero().flatten() - len(row))
        elif isinstance(positions, str):
            found.append(from_end(row, [-1], i))
        else:
            found.append(from_end(row, [positions] if isinstance(positions, int) else positions, i))
    return found


def from_end(mask: Num[Tensor, " seq"], positions: Sequence[int], prompt: int) -> Int[Tensor, " position"]:
    """`positions_from_end` of one prompt, which is number `prompt` where there is none such."""
    tokens = mask.nonzero().flatten() - len(mask)
    count = len(tokens)
    if missing := [p for p in positions if not -count <= p < count]:
        raise InputError(
            f"positions: prompt {prompt} has {count} tokens, at 0 to {count - 1} (or -{count} to -1); there is no "
            f"position {missing[0]}."
        )
    return tokens[list(positions)]
