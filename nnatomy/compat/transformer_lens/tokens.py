"""Texts and ids under TransformerLens's names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnatomy.compat.transformer_lens.utils import filling
from nnatomy.errors import InputError, a_kind
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.text import known_ids, written_ids


class Tokens:
    """What a HookedTransformer does with texts.

    Texts begin with the tokenizer's token for that, where it has one, unless `prepend_bos` or `cfg.default_prepend_bos` is False.
    """

    model: StandardizedTransformer
    cfg: Any
    tokenizer: Any

    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """The ids of texts, the shorter ones filled up at their end; ids stay what they are.

        Args:
            truncate: whether texts longer than the context are cut.

        Raises:
            InputError: if they are to be filled up at their beginning: ids alone would not say what is padding. A call with the
                texts does it by itself.
        """
        if isinstance(input, Tensor):
            return input if input.ndim == 2 else input[None]
        lists = self._lists(input, prepend_bos)
        if padding_side == "left" and len({len(one) for one in lists}) > 1:
            raise InputError(
                "padding_side='left': ids alone would not say what is padding. Give the texts themselves to model(...), "
                "run_with_cache or generate, which mask it."
            )
        if truncate and self.cfg.n_ctx is not None:
            lists = [one[: self.cfg.n_ctx] for one in lists]
        return self._filled(lists, left=False)["input_ids"].to(self.model.device if move_to_device else "cpu")

    def _lists(self, input: Any, prepend_bos: bool | None) -> list[list[int]]:
        if self.tokenizer is None:
            raise InputError("The model has no tokenizer: give ids, (batch, pos).")
        begins = self._begins(prepend_bos)
        texts = [input] if isinstance(input, str) or not isinstance(input, Iterable) else list(input)
        if wrong := [one for one in texts if not isinstance(one, str)] or [input] * (not texts):
            raise InputError(
                f"Found {a_kind(wrong[0])}{' that is empty' * (not texts)} where a text is wanted: give a text, a list of "
                "texts, or ids as a tensor, (batch, pos)."
            )
        return [self._ids(one, begins) for one in texts]

    def _begins(self, prepend_bos: bool | None) -> bool:
        asked = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        return bool(asked) and getattr(self.tokenizer, "bos_token_id", None) is not None

    def _ids(self, text: str, begins: bool) -> list[int]:
        return [self.tokenizer.bos_token_id] * begins + written_ids(self.tokenizer, text)

    def _filled(self, lists: list[list[int]], *, left: bool) -> dict[str, Tensor]:
        """Rows of one length, and which of their entries are own."""
        length = max(map(len, lists))
        fill = filling(self.tokenizer)
        rows, own = [], []
        for one in lists:
            pads = length - len(one)
            rows.append([fill] * pads * left + one + [fill] * pads * (not left))
            own.append([0] * pads * left + [1] * len(one) + [0] * pads * (not left))
        return {
            "input_ids": torch.tensor(rows, dtype=torch.long),
            "attention_mask": torch.tensor(own, dtype=torch.long),
        }

    def _given(
        self, input: Any, prepend_bos: bool | None, mask: Tensor | None = None, left: bool = False
    ) -> dict[str, Any]:
        """What the model's forward is given: of ids none is padding, whatever token a prompt begins with."""
        if isinstance(input, (Tensor, numpy.ndarray)):
            ids = torch.as_tensor(input)
            ids = ids if ids.ndim == 2 else ids[None]
            found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            found = self._filled(self._lists(input, prepend_bos), left=left)
        if mask is not None:
            if mask.shape != found["input_ids"].shape:
                raise InputError(
                    f"attention_mask is of {tuple(mask.shape)} and the ids of {tuple(found['input_ids'].shape)}: give it of "
                    "the ids' shape, 1 where a token is."
                )
            found["attention_mask"] = mask
        return {name: value.to(self.model.device) for name, value in found.items()}

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of ids: one of a row, a list of several rows."""
        ids = torch.as_tensor(tokens)
        if ids.ndim == 2:
            return list(self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False))
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """The text of each token of one prompt; of a list of texts, of each."""
        if isinstance(input, Sequence) and not isinstance(input, str) and input and isinstance(input[0], (str, list)):
            return [self._str_tokens(one, prepend_bos) for one in input]
        return self._str_tokens(input, prepend_bos)

    def _str_tokens(self, input: Any, prepend_bos: bool | None) -> list[str]:
        ids = self._lists(input, prepend_bos)[0] if isinstance(input, str) else torch.as_tensor(input).long()
        ids = ids if isinstance(ids, list) else (ids[0] if ids.ndim == 2 else ids).reshape(-1).tolist()
        return [self.tokenizer.decode([one], clean_up_tokenization_spaces=False) for one in ids]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token. Raises InputError for another, or one that the tokenizer does not know."""
        ids = known_ids(self.tokenizer, string, "The token")
        if len(ids) != 1:
            raise InputError(f"{string!r} is {len(ids)} tokens.")
        return int(ids[0])

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one id."""
        return str(self.to_str_tokens([int_token])[0])

    def get_token_position(
        self, single_token: str | int, input: Any, mode: str = "first", prepend_bos: bool | None = None
    ) -> int:
        """Where a token stands in one prompt.

        Args:
            mode: its "first" place, or its "last".
        """
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        row = torch.as_tensor(self._lists(input, prepend_bos)[0] if isinstance(input, str) else input)
        assert row.ndim == 1 or len(row) == 1, (
            f"If tokens are rank two, they must have shape [1, seq_len], not {tuple(row.shape)}"
        )
        places = (row.reshape(-1) == token).nonzero().flatten().tolist()
        assert places, "The token does not occur in the prompt"
        if mode not in ("first", "last"):
            raise InputError(f"mode must be 'first' or 'last', not {mode!r}.")
        return int(places[0 if mode == "first" else -1])

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "... d_model"]:
        """The columns of the unembedding: of one token (d_model), of several (..., d_model)."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.model.device)
        return self.model.W_U.T[ids].squeeze() if ids.numel() == 1 else self.model.W_U.T[ids]
