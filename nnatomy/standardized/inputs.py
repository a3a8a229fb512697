"""From prompts to the arguments of the model's forward.

Batches are padded on the left (or on the right, where the user asks for that), with an attention mask and with position
ids made from it, so that a prompt's values do not depend on what it is batched with. (Not every model derives positions from
the mask by itself: GPT-2's last-token logits are off by more than half without them.) What an encoder-decoder's encoder
reads is padded on the right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from nnatomy.arch_configs import cached_positions, with_cache_called
from nnatomy.core.frames import warn
from nnatomy.errors import InputError, counted
from nnatomy.standardized.chats import TEMPLATE_OPTIONS, chat_ids, is_chat, warn_of_two_beginnings
from nnatomy.standardized.context_length import ContextLength
from nnatomy.standardized.media import holds_media, kinds_given, misses_media, read_media
from nnatomy.standardized.media_kinds import MEDIA, Kind
from nnatomy.standardized.special_tokens import pad_token_id, padding_token_id
from nnatomy.standardized.text import text_ids

#: Arguments of `prepare` that do not go to the model.
OPTIONS = ("padding_side", "prepend_bos", *TEMPLATE_OPTIONS, *MEDIA)

#: What a processor makes of text alone.
OF_TEXT = frozenset(("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"))

#: Why a model of somebody's takes no padding.
NO_MASK = "its forward has no argument attention_mask, by which it would know padding"


class Prompts:
    """Turns what a user calls a prompt into keyword arguments of the model.

    Args:
        tokenizer: a Hugging Face tokenizer, or None where there is none.
        no_tokenizer: what to say where strings are given and there is none.
        pad_token_id: what to pad with; masked, so any token of the vocabulary will do.
        padding_token_id: the token that means padding and nothing else, if there is one.
        vocab_size: ids must be below this.
        takes_positions: whether the model's forward takes `position_ids`.
        main_input: what the model reads: "input_ids", or "pixel_values" and the like, which are given by that name.
        decoder_start: of an encoder-decoder, the token that its decoder begins with.
        needed: what the model has to be given beside tokens.
        places_images: whether the model makes positions of three axes where there are images.
        not_taken: which of `attention_mask` and `use_cache` the model's forward does not take.
        cache: what the model calls a KV cache that it is given; it may be given by another of its names.
        processor: gives what reads images, videos and sound; raises InputError where there is none. With `load=False` what there is.
        read: whether the model's forward takes an argument of that name.
        causal: whether no position depends on a later one, as padding on the right is.
        default_side: what the tokenizer said when it was loaded, if that has been some time ago.
    """

    def __init__(
        self,
        tokenizer: Any,
        no_tokenizer: str,
        pad_token_id: int,
        padding_token_id: int | None,
        vocab_size: int,
        takes_positions: bool,
        main_input: str = "input_ids",
        decoder_start: int | None = None,
        needed: tuple[str, ...] = (),
        places_images: bool = False,
        not_taken: Collection[str] = (),
        cache: str = "",
        processor: Callable[..., Any] = lambda **_: None,
        read: Callable[[str], bool] = lambda _: True,
        causal: Callable[[], bool] = lambda: False,
        default_side: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._no_tokenizer = no_tokenizer
        self.pad_token_id = pad_token_id
        self.padding_token_id = padding_token_id
        self.vocab_size = vocab_size
        self.takes_positions = takes_positions
        self.main_input = main_input
        self.decoder_start = decoder_start
        self.needed = needed
        self.places_images = places_images
        self.cache = cache
        self._processor, self.reads = processor, read
        #: How long prompts may be; None while nobody knows.
        self.context: ContextLength | None = None
        self.reads_tokens_alone = main_input == "input_ids" and decoder_start is None and not needed
        #: Why prompts of unequal length cannot be in one batch that is padded on the left.
        self.no_padding = NO_MASK if "attention_mask" in not_taken else ""
        self._not_taken = not_taken
        self._causal = causal
        #: What the tokenizer says when it is loaded is a default, and nobody's wish.
        self.default_side: str = default_side or str(getattr(tokenizer, "padding_side", "left"))

    def with_tokenizer(self, tokenizer: Any, config: Any, vocab_size: int | None) -> Prompts:
        """The same with another tokenizer."""
        new = copy.copy(self)
        new.tokenizer, new.pad_token_id = tokenizer, pad_token_id(tokenizer, config, vocab_size)
        new.padding_token_id = padding_token_id(tokenizer, config)
        new.default_side = str(getattr(tokenizer, "padding_side", "left"))
        return new

    def prepare(self, prompts: Any, kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """The arguments for `prompts`, with `kwargs` on top, on `device`.

        Args:
            prompts: a string or chat (a list of {"role", "content"}); token ids (a list or 1-D tensor);
                a list of these, or a 2-D tensor; a mapping with `input_ids`; None for kwargs alone.

        Raises:
            InputError: if there is nothing to run, an id is outside of the vocabulary, the prompt is of
                no kind above, or is text and there is no tokenizer.
        """
        side, texts, kwargs = self._options(kwargs)
        media = {name: kwargs.pop(name) for name in MEDIA if name in kwargs}
        if (
            any(one is not None for one in media.values())
            or holds_media(prompts)
            or misses_media(self._processor(load=False), prompts, kwargs)
        ):
            prompts, texts = self._read_media(prompts, media, texts, side), {}
        if prompts is None:
            given: dict[str, Any] = {}
        elif isinstance(prompts, Mapping):
            given = dict(prompts)
        elif kwargs.get("input_ids") is not None:
            raise InputError("There are two prompts, the first argument and input_ids=...: give one of them.")
        else:
            given = {"input_ids": prompts}
        given = with_cache_called(self.cache, {**given, **kwargs})
        if self.main_input != "input_ids" and "input_ids" in given:
            raise InputError(f"The model reads no tokens but {self.main_input}: give {self.main_input}=...")
        if not self.read(given):
            what = "a string, token ids, or a dict with input_ids"
            what = what if self.main_input == "input_ids" else f"{self.main_input}=..."
            raise InputError(f"There is no prompt: give {what}.")
        missing = [name for name in self.needed if given.get(name) is None]
        if missing and given.get("encoder_outputs") is None:
            raise InputError(
                f"The model reads {' and '.join(missing)} beside tokens: give {'=..., '.join(missing)}=..., a row for each prompt."
            )
        if given.get("input_ids") is None:
            embeds, mask = given.get("inputs_embeds"), given.get("attention_mask")
            if isinstance(embeds, Tensor):
                _check_position_ids(given, embeds)
            if isinstance(embeds, Tensor) and isinstance(mask, Tensor):
                self._check_mask(mask, embeds, cached_positions(given), given.get(self.cache) is not None)
                if mask.shape == embeds.shape[:2]:
                    given = {**self.positions(given), **given}
            return _to(self._with_decoder(given), device)
        if (
            isinstance(masks := given.get("attention_mask"), list)
            and len({len(one) for one in masks if isinstance(one, list)}) > 1
        ):
            if not all(map(all, masks)):
                raise InputError(
                    "attention_mask is of rows of several lengths, and masks tokens: give tensors, padding=True."
                )
            del given["attention_mask"]  # a tokenizer's without padding: nothing is masked
            kwargs = {name: value for name, value in kwargs.items() if name != "attention_mask"}
        are_tensor = isinstance(given["input_ids"], Tensor)
        ids, mask = self._ids_and_mask(given["input_ids"], side, texts)
        given["input_ids"] = ids
        self._check_labels(given.get("labels"), mask)
        given = self._with_decoder(given)
        _check_position_ids(given, ids)
        if kwargs.get("attention_mask", mask) is None and given.get("position_ids") is not None and mask.all():
            return _to(given, device)  # several prompts in a row, which the model knows by their positions
        past = cached_positions(given)
        if given.get("attention_mask") is None:
            given["attention_mask"] = F.pad(mask, (past, 0), value=1)
            if are_tensor:
                self._warn_of_no_mask(ids)
        try:
            mask = torch.as_tensor(given["attention_mask"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"attention_mask={given['attention_mask']!r}: it is no tensor, nor a list of numbers: {error}."
            ) from None
        if mask.ndim == 1 and len(ids) == 1:  # a tokenizer's of one text
            mask = mask[None]
        given["attention_mask"] = mask
        self._check_mask(mask, ids, past, given.get(self.cache) is not None)
        placed = given.get("position_ids") is not None
        if mask.shape == (len(ids), past + ids.shape[1]) and not placed:
            given |= {name: value[:, past:] for name, value in self.positions(given).items()}
        if self.context is not None and not placed and self.context.is_near(past + ids.shape[1]):
            # Where positions come of the mask, padding has none.
            by_mask = self.takes_positions and mask.ndim == 2
            self.context.check(int(mask.sum(-1).max()) if by_mask else past + ids.shape[1])
        if "attention_mask" in self._not_taken and not bool(mask.all()):
            raise InputError(f"attention_mask leaves tokens out, and {NO_MASK}.")
        self._warn_of_padding(mask)
        return _to(given, device)

    def _read_media(self, prompts: Any, media: dict[str, Any], texts: dict[str, Any], side: str) -> dict[str, Any]:
        template = {name: value for name, value in texts.items() if name != "prepend_bos" and value is not None}
        for kind in kinds_given(prompts, media):
            if not any(map(self.reads, kind.inputs)):
                raise InputError(
                    f"{kind.argument}=...: the model reads no {kind.name}s, its forward takes none of "
                    f"{', '.join(sorted(kind.inputs))}. Give the text alone, or load a model that reads {kind.name}s."
                )
        if texts.get("prepend_bos") is not None:
            raise InputError("prepend_bos: beside images the processor says how a text begins.")
        if self.main_input != "input_ids" and prompts is not None:
            raise InputError(
                f"The model reads no text but {self.main_input}: give images=... or audio=... alone, and what its decoder begins "
                "with as decoder_input_ids=..."
            )
        made = read_media(self._processor(), prompts, media, template, side)
        if "input_ids" in made:
            self.check_lengths(made["attention_mask"].sum(-1).tolist(), side)
        self._check_made(made, kinds_given(prompts, media))
        return {name: value for name, value in made.items() if self.reads(name) and name != "labels"}

    def _check_made(self, made: dict[str, Any], kinds: list[Kind]) -> None:
        """Raise InputError if the processor passes over what it was given, or the model what comes of it."""
        for kind in kinds:
            if not made.keys() - OF_TEXT:
                raise InputError(
                    f"{kind.argument}=...: {type(self._processor()).__name__} makes nothing of it beside text. Give what the model's "
                    "forward takes."
                )
            of_kind = kind.inputs.intersection(made)
            if of_kind and not any(map(self.reads, of_kind)):
                raise InputError(
                    f"{kind.argument}=...: the processor makes {' and '.join(sorted(of_kind))} of it, which the model's forward "
                    "does not read."
                )

    def taken(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Those of the arguments that the forward of a model of somebody's takes; the others say nothing that it does not do."""
        return {name: value for name, value in inputs.items() if name not in self._not_taken or value is True}

    def _check_mask(self, mask: Tensor, prompts: Tensor, past: int, has_cache: bool) -> None:
        """Raise InputError unless a mask of positions has one number for each (and of the cache's, which may have more room)."""
        rows, seq = prompts.shape[0], past + prompts.shape[1]
        fits = len(mask) == rows and (mask.shape[-1] == seq or (has_cache and mask.shape[-1] >= prompts.shape[1]))
        if mask.ndim < 3 and not fits:
            raise InputError(
                f"attention_mask has the shape {tuple(mask.shape)}, and what is given is {counted(rows, 'prompt')} of "
                f"{counted(seq, 'position')}: give one number for each, 1 for those of the prompt and 0 for padding."
            )
        wrong = (mask < 0) | (mask % 1 != 0) if mask.is_floating_point() else mask < 0
        if mask.ndim < 3 and bool(wrong.any()):  # Transformers takes all but 0 for a 1
            raise InputError(
                "attention_mask has entries that are negative, fractions or NaN: of two axes it is 1 for tokens and 0 for padding; "
                "one that is added to scores has four, (batch, 1, query, key)."
            )

    def _check_labels(self, labels: Any, mask: Tensor) -> None:
        """Raise InputError if labels are counted where the prompts have been padded here."""
        if self.decoder_start is not None or not isinstance(labels, Tensor) or labels.shape != mask.shape:
            return
        if counted := int(((labels.to(mask.device) != -100) & (mask == 0)).sum()):
            raise InputError(
                f"{counted} of the labels are where the prompts are padded, on the left, and would be counted in the loss: give "
                "-100 there."
            )

    def _options(self, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """The side on which a batch is padded, how texts and chats become tokens, and the other arguments."""
        kwargs = dict(kwargs)
        texts = {name: kwargs.pop(name) for name in ("prepend_bos", *TEMPLATE_OPTIONS) if name in kwargs}
        if (side := kwargs.pop("padding_side", None)) is None:
            return self.side, texts, kwargs
        if side not in ("left", "right"):
            raise InputError(f"padding_side={side!r}: it is 'left' or 'right'.")
        return side, texts, kwargs

    @property
    def side(self) -> str:
        """On which side a batch is padded: on the left, unless the user has set the tokenizer's `padding_side` since."""
        side: str = getattr(self.tokenizer, "padding_side", self.default_side)
        return "left" if side == self.default_side else side

    def _warn_of_padding(self, mask: Tensor) -> None:
        if self.no_padding and mask.ndim == 2 and not bool(mask[:, 0].all()):
            rows = (mask[:, 0] == 0).nonzero().flatten().tolist()
            warn(
                f"Prompts {', '.join(map(str, rows))} are padded on the left by the attention mask that was given. On this model "
                f"that changes their values: {self.no_padding}. Run each alone{self._or_right()}."
            )

    def _warn_of_no_mask(self, ids: Int[Tensor, "batch seq"]) -> None:
        padding = self.padding_token_id
        padded = ((ids[:, 0] == padding) | (ids[:, -1] == padding)).nonzero() if padding is not None else ()
        if len(padded) and "attention_mask" not in self._not_taken:
            warn(
                f"Prompts {', '.join(str(int(row)) for row in padded)} begin or end with token {padding}, which is that of "
                "padding, and no attention_mask says which tokens are: all are taken for the prompt's own. Give a mask "
                f"(attention_mask=ids != {padding}, or torch.ones_like(ids) where they are meant), or a list of the prompts without "
                "padding."
            )

    def _or_right(self) -> str:
        return ", or pad on the right (padding_side='right')" if self._causal() else ""

    def positions(self, given: dict[str, Any]) -> dict[str, Tensor]:
        """`position_ids` by the mask, where the batch is padded and the model is to be given any."""
        mask = given["attention_mask"]
        text = all(value.shape[:2] == mask.shape for value in given.values() if isinstance(value, Tensor))
        if not self.takes_positions or bool(mask.all()) or (self.places_images and not text):
            return {}
        return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}

    def _with_decoder(self, given: dict[str, Any]) -> dict[str, Any]:
        """With what the decoder reads: token ids of one length, or its start token where nothing is given."""
        if self.decoder_start is None or not given.keys().isdisjoint(("decoder_inputs_embeds", "labels")):
            return given
        if (ids := given.get("decoder_input_ids")) is None:
            given["decoder_input_ids"] = torch.full((len(given[self.read(given)]), 1), self.decoder_start)
            return given
        given["decoder_input_ids"], mask = self._ids_and_mask(ids, "left", {})
        if not bool(mask.all()):
            raise InputError("The decoder's prompts are of several lengths: give decoder_input_ids of one.")
        return given

    def read(self, given: dict[str, Any]) -> str:
        """Which of these arguments holds the prompts; "" if none does."""
        names = ("input_ids", "inputs_embeds", self.main_input, "encoder_outputs")
        return next((name for name in names if given.get(name) is not None), "")

    def _ids_and_mask(
        self, prompts: Any, side: str, texts: dict[str, Any]
    ) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        texts = {name: value for name, value in texts.items() if value is not None}
        if isinstance(prompts, Tensor):
            if texts:
                raise InputError(f"{' and '.join(texts)}: for texts and chats, and the prompts are token ids.")
            rows = prompts
            if rows.ndim not in (1, 2) or rows.is_floating_point() or rows.dtype == torch.bool:
                raise InputError(
                    f"Token ids are integers of shape (seq) or (batch, seq); got {rows.dtype} of {tuple(rows.shape)}."
                )
            if rows.numel() == 0:
                raise InputError(f"The prompt is empty: token ids of shape {tuple(rows.shape)}.")
            ids = rows.long() if rows.ndim == 2 else rows.long()[None]
            mask = torch.ones_like(ids)
            self._check_vocabulary(*(int(bound) for bound in ids.aminmax()))
        else:
            lists = self.token_lists(prompts, side, texts)
            ids, mask = self.padded(lists, max(map(len, lists)))
            if (
                side == "right" or self.decoder_start is not None
            ):  # an encoder counts positions from the left, mask or none
                order = mask.argsort(stable=True, dim=1, descending=True)
                ids, mask = ids.gather(1, order), mask.gather(1, order)
        return ids, mask

    def token_lists(self, prompts: Any, side: str = "left", texts: Mapping[str, Any] | None = None) -> list[list[int]]:
        """The tokens of each prompt: strings, chats, ids (see `prepare`). Raises InputError."""
        batch = _as_batch(prompts)
        template = dict(texts or {})
        prepend_bos = template.pop("prepend_bos", None)
        if template and not any(map(is_chat, batch)):
            raise InputError(f"{' and '.join(template)}: for chats, and there is none among the prompts.")
        if prepend_bos is not None and not any(isinstance(prompt, str) for prompt in batch):
            raise InputError("prepend_bos: for texts, and there is none among the prompts.")
        lists = [self._one(prompt, i, template, prepend_bos) for i, prompt in enumerate(batch)]
        self.check_lengths([len(one) for one in lists], side)
        self._check_vocabulary(min(map(min, lists)), max(map(max, lists)))
        return lists

    def padded(self, lists: list[list[int]], seq: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """Ids and mask, padded on the left to `seq` positions."""
        pads = [seq - len(one) for one in lists]
        ids = torch.tensor([[self.pad_token_id] * pad + one for pad, one in zip(pads, lists, strict=True)])
        if not any(pads):
            return ids, torch.ones_like(ids)
        return ids, (torch.arange(seq) >= torch.tensor(pads)[:, None]).long()

    def _check_vocabulary(self, low: int, high: int) -> None:
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise InputError(
                f"Token id {bad} is outside of the model's vocabulary of {self.vocab_size} (0 to "
                f"{self.vocab_size - 1}): were these ids made by this model's tokenizer?"
            )

    def check_lengths(self, lengths: Sequence[int], side: str = "left") -> None:
        """Raise InputError if prompts of these lengths have to be padded, and that is not to be had."""
        if not self.no_padding or len(set(lengths)) == 1 or (side == "right" and self._causal()):
            return
        raise InputError(
            f"The prompts are of {', '.join(map(str, lengths))} tokens. On this model padding is no way to one length: "
            f"{self.no_padding}. Give prompts of one length, or trace them one after the other{self._or_right()}. (A dict with "
            "input_ids and an attention_mask of your own goes to the model as it is.)"
        )

    def _one(self, prompt: Any, index: int, template: Mapping[str, bool], prepend_bos: bool | None) -> list[int]:
        if isinstance(prompt, str):
            tokenizer = self._need_tokenizer()
            ids = text_ids(tokenizer, prompt, prepend_bos)
            warn_of_two_beginnings(tokenizer, prompt, ids, index)
        elif is_chat(prompt):
            ids = chat_ids(self._need_tokenizer(), prompt, **template)
        elif isinstance(prompt, Tensor):
            ids = prompt.reshape(-1).tolist()
        else:
            ids = list(prompt)
        if not ids:
            raise InputError(f"Prompt {index} is empty: {prompt!r} has no tokens.")
        return [int(token) for token in ids]

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError(f"The prompt is text, but there is no tokenizer: {self._no_tokenizer}")
        return self.tokenizer


def is_batch(prompts: Any) -> bool:
    """Whether these are several prompts, and not one, however given."""
    if isinstance(prompts, Mapping):
        prompts = prompts.get("input_ids")
    if isinstance(prompts, Tensor):
        return prompts.ndim > 1
    return not (isinstance(prompts, str) or is_chat(prompts) or _is_ids(prompts))


def _as_batch(prompts: Any) -> Sequence[Any]:
    if isinstance(prompts, str) or is_chat(prompts) or _is_ids(prompts):
        return [prompts]
    if isinstance(prompts, (list, tuple)) and prompts:
        kinds = (str, Tensor)
        if all(isinstance(prompt, kinds) or is_chat(prompt) or _is_ids(prompt) for prompt in prompts):
            return prompts
    if isinstance(prompts, (list, tuple)):
        if not prompts:
            raise InputError(f"The prompt is empty: {prompts!r}.")
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, (list, tuple)) and not prompt:
                raise InputError(f"Prompt {i} is empty: {prompt!r}.")
    raise InputError(
        f"{type(prompts).__name__} is no prompt: give a string, a chat (a list of dicts with role and "
        f"content), token ids, a list of these, or a dict with input_ids; got {prompts!r:.200}."
    )


def _is_ids(prompt: Any) -> bool:
    return (
        isinstance(prompt, (list, tuple))
        and bool(prompt)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
    )


def _check_position_ids(given: dict[str, Any], prompts: Tensor) -> None:
    """Make `position_ids` a tensor of (batch, seq). Raises InputError unless they are a number for each token of the prompts."""
    if (ids := given.get("position_ids")) is None:
        return
    try:
        placed = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        placed = torch.tensor(False)
    if placed.ndim == 1:
        placed = placed[None]
    rows, seq = prompts.shape[:2]
    if placed.dtype == torch.bool or placed.ndim < 2 or placed.shape[-1] != seq or placed.shape[-2] not in (1, rows):
        what = f"of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"{ids!r:.60}"
        raise InputError(
            f"position_ids, {what}: give a number for each of {counted(seq, 'token')} of {counted(rows, 'prompt')}, ({rows}, {seq})."
        )
    given["position_ids"] = placed


def _to(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
