"""Positions: what they mean, wherever a method or an accessor is given some.

A position is counted in a prompt's own tokens: 0 is its first, -1 its last. Padding has none, on whichever side it is and
whoever has put it there; nor has what a wrapper puts before a prompt (a soft prompt). So a position means the same in a batch
as it does in the prompt run alone. In a trace of a generation, or one that goes on from a KV cache, positions from 0 on count
all tokens so far, and those that the step does not compute are left as they are; negative ones count from the end of what the
step computes: -1 is the prompt's last token in step 0, and then each new one.

What a position is follows from the attention mask that the model is given. Where that says nothing of padding, and
there might be some, an InputError says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Int, Num
from torch import Tensor
from torch._subclasses import FakeTensor

from nnatomy.errors import InputError, counted
from nnatomy.standardized.prompt_trace import RootInputs, positions_in, tokens_of
from nnatomy.standardized.watched import watcher
from nnatomy.whole_number import is_truth, whole_number

#: "last", "all", or one or several.
Positions = str | int | Sequence[int] | Int[Tensor, "*position"]
#: One or several, or a slice without a stride; everywhere if None.
Where = int | slice | Sequence[int] | Int[Tensor, "*position"] | None


# In the arguments of a forward.


def ids_of(inputs: Mapping[str, Any], of_encoder: bool = False) -> Int[Tensor, "prompt seq"] | None:
    """The token ids that the layers read (an encoder-decoder's decoder, or its encoder), if they read any."""
    name = "decoder_input_ids" if _of_decoder(inputs, of_encoder) else "input_ids"
    ids: Tensor | None = inputs.get(name)
    return ids


def _of_decoder(inputs: Mapping[str, Any], of_encoder: bool) -> bool:
    return inputs.get("decoder_input_ids") is not None and not of_encoder


def mask_of(inputs: Mapping[str, Any], of_encoder: bool = False) -> Num[Tensor, "prompt seq"]:
    """1 for the positions of the prompts that the layers have (an encoder-decoder's decoder, or its encoder), 0 for padding.

    Raises:
        InputError: if the arguments do not say which tokens are padding.
    """
    if reason := untold(inputs, of_encoder):
        raise InputError(reason)
    decoder = _of_decoder(inputs, of_encoder)
    mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is None:
        read = tokens_of(inputs, decoder)
        if read is None:
            raise InputError("Positions are those of each prompt's own tokens, and the model is given none.")
        mask = torch.ones(read.shape[:2], dtype=torch.long, device=read.device)
    return mask


def untold(inputs: Mapping[str, Any], of_encoder: bool = False) -> str:
    """Why these arguments of a forward do not say where each prompt begins and ends; "" if they do."""
    decoder = _of_decoder(inputs, of_encoder)
    mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
    if isinstance(mask, Tensor) and mask.ndim != 2:
        return (
            f"Positions are those of each prompt's own tokens, and an attention mask of {tuple(mask.shape)} does not say which "
            "tokens are padding: give one of (batch, seq)."
        )
    if mask is not None or decoder:
        return ""
    if inputs.get("position_ids") is not None and inputs.get("input_ids") is not None:
        return (
            "Positions are those of each prompt's own tokens, and attention_mask=None beside position_ids says that several "
            "prompts share a row: give them as a list, or with an attention mask."
        )
    embeddings = inputs.get("inputs_embeds")
    if inputs.get("input_ids") is None and isinstance(embeddings, Tensor) and len(embeddings) > 1:
        return (
            "Positions are those of each prompt's own tokens, and inputs_embeds without an attention_mask do not say which are "
            "padding: give attention_mask=..., 1 for tokens and 0 for padding (torch.ones(inputs_embeds.shape[:2]) if none is)."
        )
    return ""


def positions_from_end(inputs: Mapping[str, Any], positions: Positions) -> list[Int[Tensor, " position"]]:
    """Where each prompt's positions stand in the batch.

    Args:
        inputs: what `model.prepare` gives.
        positions: "last", "all", or one or several.

    Returns:
        For each prompt, indices into the batch's positions, counted from the end (-1 is the last).

    Raises:
        InputError: if a prompt has no such position, or it cannot be told.
    """
    if isinstance(positions, str) and positions not in ("last", "all"):
        raise InputError(f'positions={positions!r}: it is "last", "all", or one or several numbers.')
    if isinstance(positions, str) and positions == "all":
        return [row.nonzero().flatten() - len(row) for row in mask_of(inputs).cpu()]
    wanted = [-1] if isinstance(positions, str) else numbers("positions", positions)
    return [from_end(row, wanted, i) for i, row in enumerate(mask_of(inputs).cpu())]


def from_end(mask: Num[Tensor, " seq"], positions: Sequence[int], prompt: int) -> Int[Tensor, " position"]:
    """`positions_from_end` of one prompt, which is number `prompt` where there is none such."""
    tokens = mask.nonzero().flatten() - len(mask)
    for position in positions:
        if not -len(tokens) <= position < len(tokens):
            raise InputError(f"positions: {_no_such(prompt, len(tokens), position)}")
    return tokens[list(positions)]


def numbers(name: str, given: Any) -> list[int]:
    """One or several whole numbers as a list. Raises InputError for anything else, or none."""
    try:
        if isinstance(given, str):
            raise TypeError
        each = [given] if is_one(given) else [*given]
        if each and all(map(is_truth, each)) and not is_one(given):
            raise InputError(
                f"{name}={given!r}: that is a mask, and {name} are whole numbers: give where it is true, mask.nonzero().flatten()."
            )
        found = [whole_number(one) for one in each]
    except TypeError:
        raise InputError(f"{name}={given!r}: give a whole number, or several.") from None
    if not found:
        raise InputError(f"{name}: give at least one.")
    return found


def is_one(given: Any) -> bool:
    """Whether it is one number, and not several."""
    return given.ndim == 0 if isinstance(given, Tensor) else not hasattr(given, "__iter__")


def _no_such(prompt: int, count: int, position: int) -> str:
    if not count:
        return f"prompt {prompt} has no tokens of its own, all are padding by the attention mask; there is no position {position}."
    return f"prompt {prompt} has {counted(count, 'token')}, at 0 to {count - 1} (or -{count} to -1); there is no position {position}."


# In a trace.


class OwnPositions:
    """Which of its prompt's own tokens each column of a step is.

    Attributes:
        own: from 0 on; -1 for padding and what is no prompt's.
        step: which step of a generation.
    """

    def __init__(self, own: Int[Tensor, "batch seq"], step: int, whole: bool) -> None:
        self.own = own
        self.step = step
        self._whole = whole
        real = (own >= 0).long()
        self._to_end = torch.where(own >= 0, -real.flip(1).cumsum(1).flip(1), 0)

    def columns(
        self, positions: Int[Tensor, "*wanted"], prompts: Int[Tensor, "*wanted"]
    ) -> tuple[Int[Tensor, "*wanted"], Bool[Tensor, "*wanted"]]:
        """Where these positions of these prompts stand in this step, and whether they are in it.

        Raises:
            InputError: for a position that a prompt does not have, in the step that computes the prompts.
        """
        positions, prompts = positions.to(self.own.device), prompts.to(self.own.device)
        counted = torch.where((positions >= 0)[..., None], self.own[prompts], self._to_end[prompts])
        here = (counted == positions[..., None]) & (self.own[prompts] >= 0)
        there = here.any(-1)
        if self._whole and not bool(there.all()):
            prompt, position = (int(one[~there][0]) for one in (prompts, positions))
            real = self.own[prompt][self.own[prompt] >= 0].tolist()
            if real and 0 <= position < real[0]:
                raise InputError(
                    f"Position {position} is in the KV cache that was given: of prompt {prompt} this pass computes "
                    f"positions {real[0]} to {real[-1]}."
                )
            raise InputError(f"positions: {_no_such(prompt, len(real), position)}")
        return here.long().argmax(-1), there

    def chosen(self, where: Where) -> Bool[Tensor, "batch seq"]:
        """The columns that are meant. Of a slice those that there are; else errors as `columns`."""
        if (one := watcher.get()) is not None:
            return one.chosen(self, where)
        real = self.own >= 0
        if where is None:
            return real
        if not isinstance(where, slice):
            wanted = torch.tensor(numbers("positions", where))
            columns, there = self.columns(*torch.broadcast_tensors(wanted, torch.arange(len(real))[:, None]))
            return torch.zeros_like(self.own).scatter_add(1, columns, there.long()) > 0
        if where.step not in (None, 1):
            raise InputError(f"positions={where}: a slice has no stride.")
        if where.start is not None:
            real = real & (self._counted(where.start) >= where.start)
        return real if where.stop is None else real & (self._counted(where.stop) < where.stop)

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """The column of each prompt's last token."""
        prompts = torch.arange(len(self.own))
        return self.columns(torch.full_like(prompts, -1), prompts)[0]

    def rectangle(self, where: int | slice | Sequence[int] | Tensor) -> Int[Tensor, "batch position"]:
        """The columns that are meant, as many of each prompt.

        Raises:
            InputError: as `columns`; for a slice of which prompts have different numbers; and for a position that this step does
                not compute.
        """
        if isinstance(where, slice):
            chosen = self.chosen(where)
            counts = chosen.sum(1).tolist()
            if len({*counts}) > 1 or not counts[0]:
                raise InputError(
                    f"positions={where}: the prompts have {', '.join(map(str, counts))} such positions. Of all prompts there have to "
                    "be as many, one or more: count from the end, or leave out positions for all columns of the batch."
                )
            return chosen.nonzero()[:, 1].reshape(len(chosen), -1)
        wanted = torch.tensor(numbers("positions", where))
        columns, there = self.columns(*torch.broadcast_tensors(wanted, torch.arange(len(self.own))[:, None]))
        if not bool(there.all()):
            raise InputError(f"positions={where!r}: step {self.step} does not compute all of them.")
        return columns

    def _counted(self, at: int) -> Tensor:
        """The columns' positions as counted where `at` is: from the start, or from the end."""
        return self.own if at >= 0 else self._to_end


def own_positions(model: Any, name: str, shape: Sequence[int | None], of_encoder: bool = False) -> OwnPositions:
    """In a trace: of a value of (batch, seq, ...), or of what the step computes where seq is None.

    Args:
        model: a StandardizedTransformer.
        name: of what is asked for.
        of_encoder: whether it is a value of an encoder-decoder's encoder.

    Raises:
        InputError: if it cannot be told.
    """
    block = model._blocks.current(name)
    recorded = next((one for one in block.run.collectors if isinstance(one, RootInputs)), None)
    if of_encoder:  # which runs before the model's forward, in a generation
        return of_encoder_alone(name, shape, None if recorded is None else recorded.given.mask)
    arguments, total = model._root_inputs(name)
    step = block.step or 0
    decoder = model._prompts.decoder_start is not None
    if decoder:
        first = 0 if recorded is None else recorded.decoder_length
        total = (first or positions_in(arguments, decoder=True)) + step
    given = recorded.given if recorded is not None else None
    tokens = tokens_of(arguments, decoder)
    batch, seq = shape[0], shape[1]
    if tokens is not None and seq is not None and tokens.shape[1] != seq:
        raise InputError(
            f"{name}: the values have {seq} positions and the model was given {tokens.shape[1]} tokens, so that nothing says "
            "which position is which token."
        )
    seq = seq or (tokens.shape[1] if tokens is not None else total)
    before = 0  # what a wrapper has put before the prompts
    prompt = None if given is None or decoder else given.seq
    if prompt is not None and recorded is not None:  # whose length is 0 where the first step is just being asked
        before = max(0, (recorded.length or positions_in(arguments)) - prompt)
    mask = arguments.get("decoder_attention_mask" if decoder else "attention_mask")
    reason = "" if given is None or decoder else given.untold
    if reason and (batch is None or batch > 1 or "inputs_embeds" not in reason):
        raise InputError(reason)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = mask != 0
    elif mask is None:
        rows = batch or (1 if tokens is None else len(tokens))
        mask = torch.ones(rows, max(total, seq), dtype=torch.bool, device=model.device)
    else:
        mask = _extended(None if given is None else given.mask, batch, total - before)
        if mask is None:
            raise InputError(
                f"{name}: the mask that the model is given does not say which tokens are padding. Give each prompt a trace of "
                "its own, or leave out the positions."
            )
        mask = torch.nn.functional.pad(mask, (before, 0), value=True)
    own = torch.where(mask, mask.long().cumsum(-1) - 1 - before, -1).clamp(min=-1)
    if own.shape[1] < seq:
        raise InputError(
            f"{name}: the values have {seq} positions and the attention mask {own.shape[1]}, so that nothing says which "
            "position is which token."
        )
    in_chunks = prompt is not None and mask.shape[1] < prompt + before
    return OwnPositions(own[:, own.shape[1] - seq :], step, step == 0 and not in_chunks)


def of_encoder_alone(name: str, shape: Sequence[int | None], mask: Any) -> OwnPositions:
    """`own_positions` of what an encoder reads, by the attention mask that the model was given."""
    if mask is None:
        mask = torch.ones([size or 1 for size in shape])
    if not isinstance(mask, Tensor) or mask.shape != tuple(shape):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"{name}: the encoder's values are of {tuple(shape)} prompts and positions and the attention mask of {got}, so that "
            "nothing says which position is which token."
        )
    return OwnPositions(torch.where(mask != 0, (mask != 0).long().cumsum(-1) - 1, -1), 0, True)


def _extended(mask: Tensor | None, batch: int | None, total: int) -> Tensor | None:
    """The prompts' mask with a row for each sequence that is generated, and a column for each token so far."""
    if mask is None or mask.ndim != 2 or batch is None or batch % len(mask) or total < mask.shape[1]:
        return None
    rows = (mask != 0).repeat_interleave(batch // len(mask), 0)
    return torch.nn.functional.pad(rows, (0, total - mask.shape[1]), value=True)


def is_fake(value: Any) -> bool:
    """Whether it is of a scan: there positions make no difference to shapes, and no mask has values."""
    return isinstance(value, FakeTensor)


def is_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or infinite; True where numbers are not known (a scan, inside a transform of `torch.func`)."""
    if is_fake(value) or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    one = watcher.get()
    with nullcontext() if one is None else one.paused():  # what is checked decides nothing
        return bool(value.isfinite().all())
