"""Pairs of prompts, a clean and a corrupted one each, position by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.methods.points import accessor_of, attends_to_encoder
from nnatomy.methods.prompts import Prompt, token_texts
from nnatomy.methods.result import texts_of
from nnatomy.methods.tokens import Tokens, tokens_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import numbers

#: Which positions are patched: "each" by itself, "all" together, or each of these.
Positions = str | int | Sequence[int]


@dataclass(frozen=True)
class Pairs:
    """The tokens of both prompts of each pair; padded on the left, all have `seq` positions.

    Attributes:
        single: whether they were given as one prompt each, and not as lists.
        prompts: as texts, a clean one and its corrupted one in turn; one for both where they are the same.
    """

    clean: list[Tokens]
    corrupted: list[Tokens]
    single: bool
    prompts: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: StandardizedTransformer, clean: Any, corrupted: Any, point: str = "layers_output") -> Pairs:
        """The positions are those of what the layers at `point` read: an encoder-decoder's decoder, or its encoder.

        Raises InputError unless there are as many of both, and the two of each pair have as many tokens.
        """
        of_encoder = accessor_of(model, point).of_encoder
        ids, others = _tokens(model, clean, of_encoder), _tokens(model, corrupted, of_encoder)
        if len(ids) != len(others):
            raise InputError(f"{len(ids)} clean and {len(others)} corrupted prompts: give pairs.")
        for i, (first, second) in enumerate(zip(ids, others, strict=True)):
            read = [(first.read, second.read)]
            if attends_to_encoder(point):
                read.append((first.ids, second.ids))
            for one, other in read:
                if len(one) != len(other):
                    raise InputError(
                        f"Patching needs prompts of equal length, position by position; pair {i} has {len(one)} and "
                        f"{len(other)} tokens:\n  clean:     {token_texts(model, one)}\n"
                        f"  corrupted: {token_texts(model, other)}"
                    )
        both = zip(texts_of(model, clean), texts_of(model, corrupted), strict=False)
        each = list(both)
        alike = all(one == other for one, other in each)
        texts = tuple(text for pair in each for text in (pair[:1] if alike else pair))
        found = cls(ids, others, is_single(clean) and is_single(corrupted), texts)
        if of_encoder and len(set(found.lengths)) > 1:
            raise InputError(
                f"The pairs have {found.lengths} tokens in the encoder, which reads them padded on the right, so that positions "
                "from the end are none of all: give pairs of one length, or each pair by itself."
            )
        return found

    def of_mode(self, mode: str) -> tuple[list[Tokens], list[Tokens]]:
        """What is patched, and where from: "denoising" patches the corrupted prompts, "noising" the clean ones."""
        if mode not in ("denoising", "noising"):
            raise InputError(f"mode={mode!r}: give 'denoising' or 'noising'.")
        return (self.corrupted, self.clean) if mode == "denoising" else (self.clean, self.corrupted)

    def refuse_same(self) -> Pairs:
        """Raise InputError if the two prompts of a pair are the same: then there is nothing to patch."""
        keys = ((one.key, other.key) for one, other in zip(self.clean, self.corrupted, strict=True))
        refuse_same(enumerate(keys))
        return self

    @property
    def lengths(self) -> list[int]:
        """How many tokens each pair has."""
        return [len(one.read) for one in self.clean]

    @property
    def seq(self) -> int:
        """How many positions they have together."""
        return max(self.lengths)

    def columns(self, positions: Positions) -> list[int]:
        """Positions as indices of the padded prompts. Raises InputError for one that a prompt does not have."""
        if isinstance(positions, str):
            if positions not in ("each", "all"):
                raise InputError(f"positions={positions!r}: give 'each', 'all', or a list of positions.")
            return list(range(self.seq))
        positions = numbers("positions", positions)
        if any(position >= 0 for position in positions) and len(set(self.lengths)) > 1:
            raise InputError(
                f"positions={list(positions)}: the pairs have {self.lengths} tokens, so that positions mean the same in "
                "all of them only from the end: give negative ones, -1 is the last."
            )
        for position in positions:
            if not -self.seq <= position < self.seq:
                raise InputError(f"positions={list(positions)}: the prompts have {self.seq} tokens.")
        return [position % self.seq for position in positions]

    def all_have(self, positions: Positions) -> None:
        """Raise InputError for a position that a shorter pair does not have."""
        for position in [] if isinstance(positions, str) else numbers("positions", positions):
            for pair, length in enumerate(self.lengths):
                if not -length <= position < length:
                    raise InputError(f"positions: pair {pair} has {length} tokens; there is no position {position}.")

    def texts(self, model: StandardizedTransformer) -> tuple[tuple[str, ...], ...]:
        """Each pair's tokens, padded on the left with ""; "clean|corrupted" where the two differ."""
        return tuple(
            ("",) * (self.seq - len(one.read))
            + tuple(
                a if a == b else f"{a}|{b}"
                for a, b in zip(token_texts(model, one.read), token_texts(model, other.read), strict=True)
            )
            for one, other in zip(self.clean, self.corrupted, strict=True)
        )


def refuse_same(pairs: Iterable[tuple[int, tuple[Any, Any]]]) -> None:
    """Raise InputError if the two of a numbered pair are equal."""
    for i, (clean, corrupted) in pairs:
        if clean == corrupted:
            raise InputError(
                f"The clean and the corrupted prompt of pair {i} are the same, so that there is nothing to tell apart: give a "
                "corrupted prompt with other tokens, as many of them."
            )


def check_pair(pair: int | None, clean: Float[Tensor, "*pair"]) -> None:
    """Raise InputError for a pair that there is not."""
    count = len(clean) if clean.ndim else 0
    if pair is not None and not -count <= pair < count:
        there = f"there are {count}, 0 to {count - 1}" if count else "one pair was given, and not a list"
        raise InputError(f"pair={pair}: {there}.")


def gap(clean: Float[Tensor, "*pair"], corrupted: Float[Tensor, "*pair"]) -> Float[Tensor, "*pair"]:
    """clean - corrupted, of which effects are a share.

    Raises:
        InputError: where the metric is the same of both but for rounding.
    """
    if not bool((clean - corrupted).isfinite().all()):
        raise InputError(
            "The metric of the clean or the corrupted run is not finite: nothing is a share of what lies between them."
        )
    same = (clean - corrupted).abs() <= 1e-6 * torch.maximum(clean.abs(), corrupted.abs())
    if bool(same.any()):
        which = f" of pairs {', '.join(map(str, same.nonzero().flatten().tolist()))}" if same.ndim else ""
        of_clean, of_corrupted = (float(metric[same].flatten()[0]) for metric in (clean, corrupted))
        raise InputError(
            f"The metric is the same in the clean and the corrupted run{which} ({of_clean:.6g} and {of_corrupted:.6g}), so that "
            "no effect is a share of what lies between them: take another metric or other prompts, or the effects themselves, "
            "which are in units of the metric."
        )
    return clean - corrupted


def _tokens(model: StandardizedTransformer, prompts: Any, of_encoder: bool) -> list[Tokens]:
    found = tokens_of(model, prompts, of_encoder)
    if found is None:
        raise InputError("Patching takes prompts as texts or token ids, not as embeddings.")
    return found


def is_single(prompts: Any) -> bool:
    """Whether it is one prompt, and not several."""
    if isinstance(prompts, (str, Prompt)):
        return True
    if isinstance(prompts, Tensor):
        return prompts.ndim == 1
    return not isinstance(prompts, Mapping) and isinstance(prompts[0], (int, Mapping))
