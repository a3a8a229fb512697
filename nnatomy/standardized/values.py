"""Values that belong to no layer: prompts, embeddings, logits; and the head, from the stream to the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnatomy.arch_configs import logits_of, with_logits
from nnatomy.core import Slot
from nnatomy.errors import NO_LOGITS, InputError, NotReachedError
from nnatomy.standardized.accessors import check_fits, whole
from nnatomy.standardized.parts import Parts
from nnatomy.standardized.pieces import piece_error
from nnatomy.standardized.positions import is_fake, own_positions
from nnatomy.standardized.prompt_trace import RootInputs, positions_in, tokens_of
from nnatomy.standardized.watched import watcher
from nnatomy.whole_number import count_of


class Values(Parts):
    """The names of a trace that take no layer."""

    @property
    def input_ids(self) -> Int[Tensor, "batch seq"]:
        """The token ids of the prompts, padded on the left (of the newest tokens, in a later step)."""
        return self._watched("input_ids", self._root_input("input_ids"))

    @property
    def attention_mask(self) -> Int[Tensor, "batch seq"]:
        """1 for the prompts' tokens, 0 for padding; in a later step of a generation those of the earlier ones too."""
        arguments, length = self._root_inputs("attention_mask")
        tokens = tokens_of(arguments)
        if arguments.get("attention_mask") is not None or tokens is None:
            return self._watched("attention_mask", self._root_input("attention_mask"))
        ones = torch.ones(len(tokens), length, dtype=torch.long, device=tokens.device)  # generate leaves it out then
        return self._watched("attention_mask", ones)

    @property
    def input_size(self) -> torch.Size:
        """(batch, seq)."""
        return self.input_ids.shape

    def _watched(self, name: str, value: Any, put: bool = False) -> Any:
        """The value, of which whoever watches is told."""
        if (one := watcher.get()) is not None:
            (one.put if put else one.read)(self._blocks, name, None, value)
        return value

    def _root_input(self, name: str) -> Any:
        arguments, _ = self._root_inputs(name)
        value = arguments.get(name)
        if value is None:
            given = ", ".join(key for key, one in arguments.items() if one is not None)
            raise NotReachedError(f"The model was called without {name}; it was given {given}.")
        return value

    def _root_inputs(self, name: str) -> tuple[dict[str, Any], int]:
        """The arguments of the model's forward in this step, and how many positions there are with the earlier steps'."""
        block = self._blocks.current(name)
        recorded = next((c for c in block.run.collectors if isinstance(c, RootInputs)), None)
        if recorded is None or recorded.slot is None or block.step != recorded.slot.step:
            slot = block.reach(self.steps_of, "input", name)
        else:
            slot = block.peek(recorded.slot)
        arguments = slot.value[1]
        first = 0 if recorded is None else recorded.length  # 0 where the first step is just being asked
        return arguments, (first or positions_in(arguments)) + slot.step

    @property
    def token_embeddings(self) -> Float[Tensor, "batch seq hidden"]:
        """What the token embedding gives, before positions; can be assigned."""
        return self._watched("token_embeddings", self._slot_of_embeddings().value)

    @token_embeddings.setter
    def token_embeddings(self, value: Tensor) -> None:
        slot = self._slot_of_embeddings()
        check_fits("token_embeddings", slot.value, value)
        self._watched("token_embeddings", value, put=True)
        slot.value = value

    def _slot_of_embeddings(self) -> Slot:
        self._check_refused("token_embeddings")
        block = self._blocks.current("token_embeddings")
        slot = block.reach(self._anatomy.embed_tokens, "output", "token_embeddings")
        recorded = next((c for c in block.run.collectors if isinstance(c, RootInputs)), None)
        given = 0 if recorded is None else recorded.new_positions(slot.step, of_encoder=False)
        if (found := whole(slot).value.shape[1]) < given:
            raise piece_error("token_embeddings", f"{found} positions", f"{given}")
        return slot

    @property
    def logits(self) -> Float[Tensor, "batch seq vocab"]:
        """The model's logits, after all caps and scales; can be assigned."""
        self._check_refused("logits")
        return self._watched("logits", self._slot_of_logits()[1])

    @logits.setter
    def logits(self, value: Tensor) -> None:
        self._check_refused("logits")
        slot, logits = self._slot_of_logits()
        check_fits("logits", logits, value)
        self._watched("logits", value, put=True)
        slot.value = with_logits(slot.value, value)

    def _slot_of_logits(self) -> tuple[Slot, Tensor]:
        slot = self._blocks.current("logits").reach(self.steps_of, "output", "logits")
        logits = logits_of(slot.value)
        if logits is None:
            raise InputError(NO_LOGITS.format(type(self.steps_of).__name__, type(slot.value).__name__))
        return slot, logits

    @property
    def next_token_probs(self) -> Float[Tensor, "batch vocab"]:
        """The probabilities of the token after each prompt's last, on whichever side it is padded.

        Raises:
            InputError: if nothing says which tokens are padding.
        """
        logits = self.logits
        if is_fake(logits):
            return logits[:, -1].softmax(-1)
        own = own_positions(self, "next_token_probs", (len(logits), None))
        if bool((own.own[:, -1] >= 0).all()):
            return logits[:, -1].softmax(-1)
        column = own.last - own.own.shape[1] + logits.shape[1]  # generate, and logits_to_keep, have the last ones alone
        if bool((column < 0).any()):
            raise InputError(
                f"next_token_probs: the model gave the logits of the last {logits.shape[1]} positions alone, behind which "
                "prompts are padded: leave out logits_to_keep, or pad on the left."
            )
        column = column.to(logits.device)
        return logits[torch.arange(len(logits), device=logits.device), column].softmax(-1)

    def project_on_vocab(self, hidden_state: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """The logits that the model would give, were `hidden_state` the last layer's output.

        Exact: with the final norm, and every cap, scale and projection of the model's own.
        """
        if not isinstance(hidden_state, Tensor) or not hidden_state.is_floating_point():
            got = hidden_state.dtype if isinstance(hidden_state, Tensor) else type(hidden_state).__name__
            raise InputError(
                f"Hidden states are a tensor of floating point numbers, (..., {self.hidden_size}); got {got}."
            )
        if hidden_state.shape[-1:] != (self.hidden_size,):
            raise InputError(
                f"project_on_vocab takes hidden states of width {self.hidden_size}; got {tuple(hidden_state.shape)}."
            )
        try:
            return self._head(hidden_state)
        except RuntimeError as error:
            if hidden_state.dtype in (own := {one.dtype for one in self.hf_model.parameters()}):
                raise
            raise InputError(
                f"project_on_vocab: hidden states of {hidden_state.dtype} do not go through a head whose model has parameters of "
                f"{' and '.join(map(str, own))}: convert them, hidden_state.to({next(iter(own))}). ({error})"
            ) from None

    def get_topk_closest_tokens(
        self, hidden_state: Float[Tensor, "*rows hidden"], k: int = 5
    ) -> dict[str, float] | list[dict[str, float]]:
        """The `k` most probable tokens of `project_on_vocab(hidden_state)`, with their probabilities.

        Tokens are named as the tokenizer does. One that it has no name for, or another token's, has its id behind it: "[17]".

        Args:
            hidden_state: of (hidden), or of (rows, hidden) for a list of results.
        """
        if not 1 <= count_of(k) <= self.vocab_size:
            raise InputError(f"k={k!r}: the model has {self.vocab_size} tokens; give how many of them.")
        if isinstance(hidden_state, Tensor) and hidden_state.ndim not in (1, 2):
            raise InputError(f"hidden_state is (hidden) or (rows, hidden); got {tuple(hidden_state.shape)}.")
        if self.tokenizer is None:
            raise InputError("Tokens have names only with a tokenizer: StandardizedTransformer(model, tokenizer).")
        top = self.project_on_vocab(hidden_state).softmax(-1).topk(k, dim=-1)
        indices, values = top.indices.reshape(-1, k).tolist(), top.values.reshape(-1, k).tolist()
        rows = [dict(zip(self._named(ids), probs, strict=True)) for ids, probs in zip(indices, values, strict=True)]
        return rows[0] if hidden_state.ndim == 1 else rows

    def _named(self, ids: list[int]) -> list[str]:
        """A name for each token, and no two of one name."""
        names: list[str] = []
        for token, name in zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True):
            names.append(f"{name or ''}[{token}]" if not name or name in names else name)
        return names
