"""The names of a step that belong to no layer: prompts, embeddings, logits, the tokens that are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from nnatomy.core.block import Block
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Slot
from nnatomy.errors import AssignmentError, InputError, NotInThisModelError, NotReachedError
from nnatomy.vllm.accessors import held_value, layout_of, put_value, run_of
from nnatomy.vllm.anatomy import Anatomy
from nnatomy.vllm.engine import AnyEngine
from nnatomy.vllm.layout import Layout
from nnatomy.vllm.places import Place
from nnatomy.vllm.run import Once


class _LastLogits(Place):
    """(batch, 1, vocab): of each request's last position, which alone the engine computes."""

    def read(self, slot: Slot, layout: Layout) -> Tensor:
        return layout.by_request(slot.value)[:, None].clone()

    def write(self, slot: Slot, layout: Layout, new: Tensor) -> None:
        slot.value = layout.put_by_request(slot.value, new[:, 0])


@dataclass(frozen=True)
class _AllLogits(Place):
    """(batch, seq, vocab), of all positions. What is written is sampled from where the engine makes those of the last ones.

    Attributes:
        head: what makes these.
        logits_of: the logits of what the model gives, by the same head.
    """

    head: Any = None
    logits_of: Any = None

    def read(self, slot: Slot, layout: Layout) -> Tensor:
        with torch.no_grad():
            return layout.rows(self.logits_of(slot.value))

    def write(self, slot: Slot, layout: Layout, new: Tensor) -> Once:
        return _Logits(self.head, slot, layout, new[:, -1])


@dataclass(frozen=True)
class _Sampled(Place):
    """(batch): the token that is sampled behind each row."""

    vocab_size: int = 0

    def read(self, slot: Slot, layout: Layout) -> Tensor:
        return layout.by_request(slot.value.sampled_token_ids)[:, 0].long().clone()

    def write(self, slot: Slot, layout: Layout, new: Tensor) -> None:
        old, most = slot.value.sampled_token_ids, self.vocab_size
        if outside := [one for one in new.tolist() if not 0 <= one < most]:
            raise AssignmentError(
                f"sampled_tokens: {outside[0]} is outside of the model's vocabulary of {most} (0 to {most - 1})."
            )
        if slot.value.logprobs_tensors is not None and not torch.equal(new, self.read(slot, layout)):
            raise AssignmentError(
                "sampled_tokens: the engine has already made logprobs, of the tokens that it has sampled. Leave out logprobs=..., "
                "and take them of model.logits: model.logits[:, -1].log_softmax(-1)."
            )
        slot.value.sampled_token_ids = layout.put_by_request(old, new[:, None].to(old.dtype))


class Values:
    """What has the names of a step."""

    engine: AnyEngine
    _blocks: OpenBlocks
    _anatomy: Anatomy
    _refused: dict[str, str]
    _embeddings: Place | None

    def _begun(self, name: str) -> Block:
        """The block that asks, whose step has begun."""
        block = self._blocks.current(name)
        run = run_of(block)
        if run.layout is None or run.progress.step != block.step or not run.progress.calls.get(run.root):
            block.reach(self.engine.model, "input", name)
        return block

    @property
    def requests(self) -> tuple[int, ...]:
        """Which prompt each row of this step is: those that have ended, and those that wait, are not among them."""
        return layout_of(self._begun("requests")).requests

    @property
    def input_ids(self) -> Int[Tensor, "batch seq"]:
        """The token ids that this step computes, padded on the left: the prompts, and in a later step the newest tokens."""
        block = self._begun("input_ids")
        args, kwargs = run_of(block).inputs
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise NotReachedError("input_ids: the engine calls this model with embeddings, and without them.")
        return layout_of(block).rows(ids).long()

    @property
    def attention_mask(self) -> Int[Tensor, "batch seq"]:
        """1 for tokens, 0 for padding; in a later step also of the tokens before it."""
        return layout_of(self._begun("attention_mask")).mask_so_far.long().to(self.engine.device)

    @property
    def input_size(self) -> torch.Size:
        """(batch, seq)."""
        layout = layout_of(self._begun("input_size"))
        return torch.Size((layout.batch, layout.seq))

    @property
    def token_embeddings(self) -> Float[Tensor, "batch seq hidden"]:
        """What the token embedding gives; can be assigned."""
        return self._get("token_embeddings")

    @token_embeddings.setter
    def token_embeddings(self, value: Tensor) -> None:
        self._set("token_embeddings", value)

    @property
    def logits(self) -> Tensor:
        """The model's logits, after all caps and scales.

        In a trace (batch, seq, vocab): the engine computes those of the last position alone, and its own head those of the others
        here. In a generation (batch, 1, vocab), of each row's last position. Assigned, the next tokens are sampled from the last
        position's.
        """
        return self._get("logits")

    @logits.setter
    def logits(self, value: Tensor) -> None:
        self._set("logits", value)

    @property
    def next_token_probs(self) -> Float[Tensor, "batch vocab"]:
        """The probabilities of the token after each row, before temperature and all that sampling parameters say."""
        return self.logits[:, -1].float().softmax(-1)

    @property
    def sampled_tokens(self) -> Int[Tensor, batch]:  # noqa: F821
        """The token that is sampled behind each row: it can be read while the engine goes on with the others, and assigned.

        Raises:
            InputError: in a step that computes only a part of a prompt, behind which nothing is sampled.
        """
        self._check_sampled()
        return self._get("sampled_tokens")

    @sampled_tokens.setter
    def sampled_tokens(self, value: Tensor) -> None:
        self._check_sampled()
        self._set("sampled_tokens", value)

    def _check_sampled(self) -> None:
        layout = layout_of(self._begun("sampled_tokens"))
        parts = [
            request
            for request, length, before in zip(layout.requests, layout.lengths, layout.before, strict=True)
            if length + before < self.engine.length_of(request)
        ]
        if parts:
            raise InputError(
                f"sampled_tokens: this step computes a part of prompt{'s' * (len(parts) > 1)} {', '.join(map(str, parts))} alone, "
                "behind which nothing is sampled: ask in a later step, or load the engine with a larger max_num_batched_tokens."
            )

    def compute_logits(self, normed: Tensor) -> Tensor:
        """The logits of what the model gives, (tokens, hidden), by the engine's own head."""
        model: Any = self.engine.model
        return model.compute_logits(normed)

    def project_on_vocab(self, hidden_state: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """The logits that the model would give, were `hidden_state` the last layer's output."""
        self._check("project_on_vocab")
        width = self.hidden_size
        if not isinstance(hidden_state, Tensor) or hidden_state.shape[-1:] != (width,):
            got = tuple(hidden_state.shape) if isinstance(hidden_state, Tensor) else type(hidden_state).__name__
            raise InputError(f"project_on_vocab takes hidden states of (..., {width}); got {got}.")
        with torch.no_grad():
            return self._logits_of(hidden_state.detach())

    def _logits_of(self, hidden_state: Tensor) -> Tensor:
        norm = self._anatomy.ln_final
        assert norm is not None
        normed = norm(hidden_state.reshape(-1, self.hidden_size).clone())
        normed = normed[0] if isinstance(normed, tuple) else normed  # Cohere's hands on a residual that is not there
        return self.compute_logits(normed).reshape(*hidden_state.shape[:-1], -1)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return int(self.engine.text_config.hidden_size)

    def place(self, name: str, generates: bool) -> Place:
        """Where one of these names is, in a generation or in a trace of one step. Raises NotInThisModelError."""
        self._check(name)
        model, head = self.engine.model, self._anatomy.head
        if name == "sampled_tokens":
            return _Sampled(self.engine.sampler, "output", vocab_size=int(self.engine.text_config.vocab_size))
        if name == "token_embeddings":
            assert self._embeddings is not None
            return self._embeddings
        assert head is not None
        if generates:
            return _LastLogits(head, "output")
        return _AllLogits(model, "output", head=head, logits_of=self.compute_logits)

    def _reach(self, name: str) -> tuple[Place, Slot, Block]:
        self._check(name)
        block = self._begun(name)
        place = self.place(name, run_of(block).generates)
        return place, block.reach(place.module, place.kind, name), block

    def _get(self, name: str) -> Tensor:
        return held_value(*self._reach(name), name)

    def _set(self, name: str, value: Tensor) -> None:
        put_value(*self._reach(name), name, value)

    def _check(self, name: str) -> None:
        if name in self._refused:
            raise NotInThisModelError(f"{name}: {self._refused[name]}.")


class _Logits(Once):
    """Puts the last positions' logits in the place of those that the engine samples from."""

    def __init__(self, head: Module, slot: Slot, layout: Layout, last: Tensor) -> None:
        super().__init__(head, "output", (0, slot.step))
        self._layout, self._last = layout, last

    def act(self, slot: Slot) -> None:
        slot.value = self._layout.put_by_request(slot.value, self._last)
