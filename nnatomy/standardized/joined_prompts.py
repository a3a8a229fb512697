"""Joining the prompts of several blocks to one batch, padded so that no block sees the padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.blocks.joining import Joining, join_leaves, rows_of
from nnatomy.blocks.rows import Rows
from nnatomy.errors import InputError
from nnatomy.standardized.inputs import Prompts


class JoinPrompts(Joining):
    """Blocks' prompts become one batch, padded on the left to one length.

    Args:
        model: the Hugging Face model.
        prepare: from prompts and keyword arguments to those of the model's forward.
        call: from the arguments of all blocks together to the call.
        prompts: what to pad with, and whether that may be.
        given: the arguments that all blocks share.
        options: how the prompts of each block are padded and rendered, where that is said.
    """

    def __init__(
        self,
        model: Module,
        prepare: Callable[..., dict[str, Any]],
        call: Callable[[dict[str, Any]], Callable[[], Any]],
        prompts: Prompts,
        given: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._prepare = partial(prepare, **(options or {}))
        super().__init__(partial(self._prepare, **given))  # which raises: there are no prompts
        self._model = model
        #: How many blocks there are so far, and whether the model is to give a loss.
        self._blocks, self._labelled = 0, has_labels(given)
        self._in_chunks = any(
            one is not None and getattr(one, "prefill_chunk_size", one) is not None
            for one in (given.get("prefill_chunk_size"), given.get("generation_config"))
        )
        self._plain = not options and prompts.side == "left"
        self._call_with = call
        self._prompts = prompts

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | list[list[int]]:
        self._blocks += 1
        mappings = (one for one in (*args, kwargs) if isinstance(one, Mapping))
        self._labelled = self._labelled or any(map(has_labels, mappings))
        if self._labelled and self._blocks > 1:
            raise InputError(
                "Blocks share one call, and a model that is given labels has one loss for it: over the rows of all blocks, and "
                "what pads them. Take a block's own from its logits, "
                "model.hf_model.loss_function(model.logits, labels, model.vocab_size), or trace each prompt alone."
            )
        if (
            self._prompts.reads_tokens_alone
            and self._plain
            and args
            and not kwargs
            and isinstance(args[0], (str, list, tuple))
        ):
            return self._prompts.token_lists(args[0])  # tensors are made once, of all blocks' together
        return self._prepare(*args, **kwargs)

    def join(self, prepared: Sequence[dict[str, Any] | list[list[int]]]) -> tuple[Callable[[], Any], list[Rows]]:
        blocks = [one for one in prepared if isinstance(one, list)]
        if len(blocks) == len(prepared):
            prompts = [prompt for block in blocks for prompt in block]
            lengths, counts = [max(map(len, block)) for block in blocks], [len(block) for block in blocks]
            self._prompts.check_lengths([len(prompt) for prompt in prompts])
            seq = self._length(lengths, len(prompts))
            ids, mask = self._prompts.padded(prompts, seq)
            joined = self._prepare({"input_ids": ids, "attention_mask": mask})
        else:
            given = [self._prepare(one) if isinstance(one, list) else one for one in prepared]
            if any("decoder_input_ids" in one or "attention_mask" not in one for one in given):
                raise InputError(
                    "Several blocks with prompts of their own are for models that read one sequence of tokens: here, trace one "
                    "batch and take rows of it."
                )
            masks = [one["attention_mask"] for one in given]
            if any(mask is None for mask in masks):
                raise InputError(
                    "A block's prompts share a row (attention_mask=None): beside other blocks they would be padded, which "
                    "needs a mask. Give each prompt a block, or trace that row alone."
                )
            # How many positions no prompt of a block uses: it does not see them.
            unused = [int((mask != 0).any(0).long().argmax()) for mask in masks]
            lengths = [mask.shape[1] - pad for mask, pad in zip(masks, unused, strict=True)]
            counts = [len(mask) for mask in masks]
            self._prompts.check_lengths(lengths)
            seq = self._length(lengths, sum(counts))
            padded = [self._padded(one, seq) for one in given]
            joined = {
                name: join_leaves([one[name] for one in padded if name in one])
                for name in dict.fromkeys(name for one in padded for name in one)
            }
            if any("position_ids" in one for one in given):
                joined["position_ids"] = torch.cat([_positions(one, seq) for one in given])
            else:
                joined |= self._prompts.positions(joined)
        return self._call_with(joined), rows_of(counts, seq, [seq - length for length in lengths])

    def _length(self, lengths: list[int], batch: int) -> int:
        """How many positions the joined batch has."""
        seq = max(lengths)
        if len(set(lengths)) > 1:
            if self._in_chunks:
                raise InputError(
                    f"Blocks with prompts of {', '.join(map(str, lengths))} tokens are padded to one length, and with "
                    "prefill_chunk_size a step has some of these positions alone: nobody can tell which are a block's. Leave "
                    "prefill_chunk_size out, or give prompts of one length."
                )
            sizes = self._sizes() | {batch}
            while seq in sizes:  # so that an axis of this size is one of positions
                seq += 1
        return seq

    def _padded(self, inputs: dict[str, Any], seq: int) -> dict[str, Any]:
        now = inputs["attention_mask"].shape[1]
        padding = {"input_ids": self._prompts.pad_token_id}

        def is_of_positions(name: str, value: Any) -> bool:  # an image may have as many channels as a prompt tokens
            is_mask = isinstance(value, Tensor) and not value.is_floating_point()
            return is_mask or name in ("inputs_embeds", "attention_mask")

        return {
            name: _to_length(value, now, seq, padding.get(name, 0)) if is_of_positions(name, value) else value
            for name, value in inputs.items()
            if name != "position_ids"
        }

    def _sizes(self) -> set[int]:
        """The sizes that the axes of a tensor of the model's may have."""
        sizes = {size for parameter in self._model.parameters() for size in parameter.shape}
        config = getattr(self._model, "config", None)
        return sizes | {value for value in vars(config).values() if isinstance(value, int)} if config else sizes


def has_labels(names: Iterable[str]) -> bool:
    """Whether arguments of these names have the model give a loss."""
    return any(name.endswith(("label", "labels")) for name in names)


def _positions(inputs: dict[str, Any], seq: int) -> Tensor:
    """The positions of one block's prompts, as given or by their mask, filled up on the left to `seq`."""
    mask = inputs["attention_mask"]
    positions: Tensor = inputs.get("position_ids", (mask.long().cumsum(-1) - 1).clamp(min=0))
    if positions.ndim != 2 or positions.shape[1] != mask.shape[1]:
        raise InputError(
            f"position_ids of shape {tuple(positions.shape)} beside other blocks: give (batch, seq), or trace that block alone."
        )
    return _to_length(positions.expand(len(mask), -1), mask.shape[1], seq, 0)


def _to_length(value: Tensor, now: int, seq: int, filling: int) -> Tensor:
    """A tensor of (batch, now, *) with its positions cut or filled up on the left to `seq`."""
    if value.ndim < 2 or value.shape[1] != now:
        return value
    if now >= seq:
        return value[:, now - seq :]
    return torch.cat([value.new_full((value.shape[0], seq - now, *value.shape[2:]), filling), value], 1)
