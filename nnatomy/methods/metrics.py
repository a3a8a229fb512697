"""Metrics: what a run is measured by, from its logits at the last position.

A metric is any callable from logits of (batch, vocab) to one number a row, (batch). In methods that take several pairs
of prompts it is given one row for each pair, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnatomy.core.frames import warn
from nnatomy.errors import InputError, counted
from nnatomy.methods.arguments import model as check_model
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import is_fake, is_one
from nnatomy.standardized.text import is_unknown, known_ids, written_ids
from nnatomy.whole_number import whole_number

Metric = Callable[[Float[Tensor, "batch vocab"]], Float[Tensor, " batch"]]

#: A token by its id or text; or one for each row.
Answer = int | str | Sequence[int | str] | Int[Tensor, " answer"]
#: What a logit is more by where a probability is ten times as large.
_TEN = math.log(10)


def logit_difference(answer: Answer, wrong: Answer, model: StandardizedTransformer | None = None) -> Metric:
    """logit(answer) - logit(wrong), of which no constant added to all logits is a part.

    Args:
        answer, wrong: token ids; or texts of one token each, as they follow the prompt (" Paris"); one, or a
            list with one for each row. Where a run has the same word with or without its space ten times as probable, a
            warning names that token.
        model: whose tokenizer reads the texts.

    Raises:
        InputError: for a text of several tokens or none, one that the tokenizer does not know, or without a tokenizer.

    Example:
        >>> import torch
        >>> metric = logit_difference(0, 2)
        >>> metric(torch.tensor([[3.0, 0.0, 1.0], [5.0, 0.0, 1.0]]))
        tensor([2., 4.])
    """
    return NamedMetric("logit_difference", Answers(answer, model), Answers(wrong, model))


def probability(answer: Answer, model: StandardizedTransformer | None = None) -> Metric:
    """softmax(logits)[answer]. Arguments and errors as `logit_difference`."""
    return NamedMetric("probability", Answers(answer, model))


def log_probability(answer: Answer, model: StandardizedTransformer | None = None) -> Metric:
    """log softmax(logits)[answer], in nats. Arguments and errors as `logit_difference`."""
    return NamedMetric("log_probability", Answers(answer, model))


def kl_divergence(reference_logits: Float[Tensor, "*batch vocab"]) -> Metric:
    """KL(reference || run) = sum of p_ref (log p_ref - log p_run), in nats: 0 where the run predicts as the reference does.

    Args:
        reference_logits: of (vocab), or (batch, vocab) with one for each row.

    Raises:
        InputError: for logits of another form, or NaN.
    """
    if (
        not isinstance(reference_logits, Tensor)
        or reference_logits.ndim not in (1, 2)
        or bool(reference_logits.isnan().any())
    ):
        raise InputError("reference_logits are a tensor of (vocab) or (batch, vocab), with no NaN in it.")
    return NamedMetric("kl_divergence", reference_logits.log_softmax(-1))


def _logit_difference(logits: Float[Tensor, "batch vocab"], right: Answers, other: Answers) -> Float[Tensor, " batch"]:
    return right.of(logits, logits) - other.of(logits, logits)


def _probability(logits: Float[Tensor, "batch vocab"], right: Answers) -> Float[Tensor, " batch"]:
    return right.of(logits.softmax(-1), logits)


def _log_probability(logits: Float[Tensor, "batch vocab"], right: Answers) -> Float[Tensor, " batch"]:
    return right.of(logits.log_softmax(-1), logits)


def _kl_divergence(
    logits: Float[Tensor, "batch vocab"], reference: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, " batch"]:
    if reference.shape[-1] != logits.shape[-1] or (reference.ndim == 2 and len(reference) not in (1, len(logits))):
        raise InputError(
            f"The reference's logits are of {tuple(reference.shape)}, the run's of {tuple(logits.shape)}: give one for all rows, "
            "or one for each."
        )
    ours = reference.to(logits)
    return (ours.exp() * (ours - logits.log_softmax(-1)).nan_to_num()).sum(-1)  # -inf - -inf: no share in it


#: The metrics of this library by name: what makes one, and what it computes.
METRICS: dict[str, tuple[Callable[..., Metric], Callable[..., Tensor]]] = {
    "logit_difference": (logit_difference, _logit_difference),
    "probability": (probability, _probability),
    "log_probability": (log_probability, _log_probability),
    "kl_divergence": (kl_divergence, _kl_divergence),
}


class NamedMetric:
    """A metric of this library: its name, and the answers or log-probabilities that it compares with, which are data.

    Attributes:
        name: one of METRICS.
        parts: what it compares with.
    """

    def __init__(self, name: str, *parts: Any) -> None:
        self.name, self.parts = name, parts

    def __call__(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        return METRICS[self.name][1](logits, *self.parts)

    def __repr__(self) -> str:
        return f"<metric {self.name}>"

    def data(self) -> list[Any]:
        """What it is made from again by `of`."""
        return [one.data() if isinstance(one, Answers) else one for one in self.parts]

    def spellings(self) -> list[list[str | None]]:
        """By part and answer: its text, as long as it is not clear that it is that one which is meant."""
        return [one.texts() if isinstance(one, Answers) else [] for one in self.parts]

    def take_over(self, spellings: list[list[str | None]]) -> None:
        """Warn no more of what was told of by another one of the same data."""
        for part, texts in zip(self.parts, spellings, strict=True):
            if isinstance(part, Answers):
                part.keep(texts)

    @classmethod
    def of(cls, name: str, data: Any, model: StandardizedTransformer) -> NamedMetric:
        """Errors as the metric's own."""
        return cls(name, *(one if isinstance(one, Tensor) else Answers.of_data(one, model) for one in data))


class Answers:
    """Tokens given as ids or texts. Errors as `logit_difference`.

    Attributes:
        ids: one for all rows, or one for each.
    """

    ids: Int[Tensor, " answer"]

    def __init__(self, answer: Answer, model: StandardizedTransformer | None = None) -> None:
        if model is not None:
            check_model("model", model)
        given: Any = answer
        answers: list[Any] = [given] if isinstance(given, str) or is_one(given) else list(given)
        if not answers:
            raise InputError("There is no answer: give a token id or a text of one token.")
        vocab = None if model is None else model.dimensions.vocab_size
        self.ids = torch.tensor(
            [_token_id(one, model) if isinstance(one, str) else _known(one, vocab) for one in answers]
        )
        self._spellings = [
            Spelling.of(one, int(token), model) if isinstance(one, str) else None
            for one, token in zip(answers, self.ids, strict=True)
        ]

    def texts(self) -> list[str | None]:
        """By answer, as `NamedMetric.spellings`."""
        return [None if one is None else one.text for one in self._spellings]

    def data(self) -> list[list[Any]]:
        """By answer: its id and its text."""
        return [list(one) for one in zip(self.ids.tolist(), self.texts(), strict=True)]

    @classmethod
    def of_data(cls, data: Any, model: StandardizedTransformer) -> Answers:
        """Of the ids and texts that `data` gives. Raises InputError for others."""
        try:
            pairs = [(token, text) for token, text in data]
        except (TypeError, ValueError):
            raise InputError("The answers of a metric are ids and texts.") from None
        found = cls([token for token, _ in pairs], model)
        found._spellings = [
            Spelling.of(text, token, model) if isinstance(text, str) and model.tokenizer is not None else None
            for token, text in pairs
        ]
        return found

    def keep(self, texts: list[str | None]) -> None:
        """Look only at the spellings of those that are there."""
        self._spellings = [None if text is None else one for one, text in zip(self._spellings, texts, strict=True)]

    def is_of(self, tokenizer: Any) -> bool:
        """Whether that tokenizer has read all texts."""
        return all(one is None or one.tokenizer is tokenizer for one in self._spellings)

    def of(self, values: Float[Tensor, "batch vocab"], logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        """Each row's value of its answer."""
        if values.ndim != 2:
            raise InputError(f"A metric takes logits of (batch, vocab); got {tuple(values.shape)}.")
        if len(self.ids) not in (1, len(values)):
            raise InputError(
                f"{counted(len(self.ids), 'answer')} for {counted(len(values), 'row')} of logits: give one, or one for each."
            )
        if int(self.ids.max()) >= values.shape[-1]:
            raise InputError(f"There is no token {int(self.ids.max())} among logits of {values.shape[-1]}.")
        for i, spelling in enumerate(self._spellings):
            if spelling is not None and spelling.compare(logits if len(self.ids) == 1 else logits[i : i + 1]):
                self._spellings[i] = None  # has been said
        return values.gather(-1, self.ids.to(values.device).expand(len(values))[:, None])[:, 0]


def token_ids(answer: Answer, model: StandardizedTransformer | None = None) -> Int[Tensor, " answer"]:
    """The ids of tokens given as ids or texts. Errors as `logit_difference`."""
    return Answers(answer, model).ids


def _known(token: Any, vocab: int | None) -> int:
    try:
        token = whole_number(token)
    except TypeError:
        raise InputError(f"The answer {token!r} is neither a token id nor a text.") from None
    if token < 0 or (vocab is not None and token >= vocab):
        raise InputError(f"The answer {token} is no token id{'' if vocab is None else f' of a vocabulary of {vocab}'}.")
    return int(token)


class Spelling(NamedTuple):
    """A text that is a token, and the token of the same text with, or without, a space before it."""

    text: str
    token: int
    other_text: str
    other: int
    tokenizer: Any

    @classmethod
    def of(cls, text: str, token: int, model: Any) -> Spelling | None:
        """None if there is no other."""
        other_text = text[1:] if text.startswith(" ") else f" {text}"
        others = written_ids(model.tokenizer, other_text)
        if len(others) != 1 or others[0] == token or is_unknown(model.tokenizer, others[0], other_text):
            return None
        return cls(text, token, other_text, int(others[0]), model.tokenizer)

    def compare(self, logits: Float[Tensor, "batch vocab"]) -> bool:
        """Warn if the other is ten times as probable in a row; returns whether it is.

        Of two that are next to impossible either may be, and neither is meant. So it has to be more probable than a token is
        on average, or to begin as what is most probable there begins: with a space, or without.
        """
        if is_fake(logits) or torch._C._functorch.peek_interpreter_stack() is not None:
            return False  # numbers are not known here
        log_probs = logits.detach().float().log_softmax(-1)
        ours, theirs = log_probs[:, self.token], log_probs[:, self.other]
        for row in (theirs - ours > _TEN).nonzero().flatten().tolist():
            alike = self._is_spaced(int(log_probs[row].argmax())) == self.other_text.startswith(" ")
            if alike or float(theirs[row]) > -math.log(logits.shape[-1]):
                break
        else:
            return False
        warn(
            f"The answer {self.text!r} (token {self.token}) has probability {float(ours[row].exp()):.1e} and "
            f"{self.other_text!r} (token {self.other}) {float(theirs[row].exp()):.1e}: a word in a text begins with a space, one at "
            f"its beginning, or behind a space, does not. If it is that one that is meant, give {self.other_text!r}."
        )
        return True

    def _is_spaced(self, token: int) -> bool:
        """Whether a token begins with the mark that the tokenizer has for a space."""
        spaced = self.token if self.text.startswith(" ") else self.other
        mark, begun = (str(one)[:1] for one in self.tokenizer.convert_ids_to_tokens([spaced, token]))
        return mark == begun


def _token_id(text: str, model: StandardizedTransformer | None) -> int:
    if model is None or model.tokenizer is None:
        raise InputError(
            f"The answer {text!r} is text: give the model whose tokenizer reads it (metric(..., model=model)), or a "
            "token id."
        )
    ids = known_ids(model.tokenizer, text, "The answer")
    if len(ids) != 1:
        tokens = model.tokenizer.convert_ids_to_tokens(ids)
        raise InputError(
            f"The answer {text!r} is {len(ids)} tokens, {tokens}: a metric looks at the next token alone. Give one "
            "token (a word in a text begins with a space), or its id."
        )
    return int(ids[0])
