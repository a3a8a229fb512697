"""Which of the text's tokens, as the denoiser is given them, are a word of the prompt."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.diffusion.recording import Recorder
from nnatomy.errors import InputError, a_kind


class Segment(NamedTuple):
    """The tokens of one text encoder among those that the denoiser is given, from `start` on, and the ids that it was given."""

    encoder: str
    tokenizer: Any
    start: int
    length: int
    ids: list[int]


def encoders_of(model: Any) -> dict[str, Any]:
    """The text encoders with their tokenizers' names."""
    components = model.pipeline.components
    found = {}
    for name, one in components.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        if name.startswith("text_encoder") and one is not None and components.get(tokenizer) is not None:
            found[name] = components[tokenizer]
    return found


def segments_of(model: Any, recorder: Recorder, given: Tensor) -> list[Segment]:
    """Where the tokens of each text encoder are, found by value: what it gave is in what the denoiser is given.

    Args:
        recorder: of the text encoders.
        given: (1, token, hidden), the text that the denoiser is given with the prompt.
    """
    found: list[Segment] = []
    for name, tokenizer in encoders_of(model).items():
        for call in recorder.all_of(model.pipeline.components[name]):
            starts = {
                (start, one.shape[1])
                for one in pytree.tree_leaves(call.output)
                if isinstance(one, Tensor) and one.ndim == 3 and one.is_floating_point()
                for start in _starts(one[:1], given)
            }
            if len(starts) == 1:
                start, length = starts.pop()
                if all(one.start != start for one in found):
                    ids = call.arguments["input_ids"][0].tolist()
                    found.append(Segment(name, tokenizer, start, length, ids))
    return found


def _starts(part: Tensor, whole: Tensor) -> list[int]:
    """From which tokens on the whole has the part, in the first of its features."""
    (_, length, width), count = part.shape, whole.shape[1]
    if length > count or width > whole.shape[2]:
        return []
    part = part.to(whole.dtype)
    heads = (whole[0, : count - length + 1, :width] == part[0, 0]).all(-1).nonzero().flatten().tolist()
    return [start for start in heads if bool((whole[0, start : start + length, :width] == part[0]).all())]


def positions_of(word: str, prompt: str, segments: list[Segment]) -> list[int]:
    """The positions of a word's tokens (of all its occurrences).

    Raises:
        InputError: for a word that is not in the prompt, or behind what the text encoders read of it.
    """
    spans = [found.span() for found in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)]
    if not word or not spans:
        raise InputError(f"words: {word!r} is no word of the prompt {prompt!r:.80}.")
    positions: list[int] = []
    for one in segments:
        if not getattr(one.tokenizer, "is_fast", False):
            raise InputError(
                f"words: {a_kind(one.tokenizer)} does not say which of its tokens are which letters: give the pipeline a fast "
                "one."
            )
        begins, offsets = _offsets(prompt, one)
        positions += [
            one.start + begins + i
            for i, (first, last) in enumerate(offsets)
            if first < last and any(first < end and begin < last for begin, end in spans)
        ]
    if not positions:
        raise InputError(f"words: {word!r} stands behind the tokens that the text encoders read of the prompt.")
    return positions


def _offsets(prompt: str, segment: Segment) -> tuple[int, list[tuple[int, int]]]:
    """Where the prompt's tokens begin among those of the encoder, some of which pad on the left; and which letters each is of.

    Raises:
        InputError: if the encoder was given other tokens: of another text, or of a template around it.
    """
    for text in (prompt, prompt.lower()):  # (some pipelines make small letters of it)
        made = segment.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=segment.length)
        count = len(made.input_ids)
        begins = [i for i in range(len(segment.ids) - count + 1) if segment.ids[i : i + count] == made.input_ids]
        if len(begins) == 1 and len(text) == len(prompt):
            return begins[0], made.offset_mapping
    raise InputError(
        f"words: {segment.encoder} was given other tokens than the prompt's, so that nobody can tell which are a word's: leave out "
        "prompt_2=..., prompt_3=... and what else changes its text."
    )
