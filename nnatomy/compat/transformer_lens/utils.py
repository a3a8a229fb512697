"""Small functions under TransformerLens's names."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from nnatomy.compat.transformer_lens.hook_points import get_act_name as get_act_name
from nnatomy.errors import InputError


def get_device() -> torch.device:
    """Where models are loaded to by default: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_numpy(given: Any) -> Any:
    """An array, of a tensor, a list or a number."""
    return given.detach().cpu().numpy() if isinstance(given, Tensor) else numpy.array(given)


def transpose(tensor: Tensor) -> Tensor:
    """The last two axes swapped."""
    return tensor.transpose(-1, -2)


def is_library_available(name: str) -> bool:
    """Whether it can be imported."""
    return find_spec(name) is not None


def is_square(x: Tensor) -> bool:
    """Whether it is one matrix, of as many rows as columns."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Tensor) -> bool:
    """Whether it is a square matrix that is zero above its diagonal."""
    return is_square(x) and bool(x.equal(x.tril()))


def override_or_use_default_value(default_flag: Any, override: Any = None) -> Any:
    """The second, unless it is None."""
    return default_flag if override is None else override


def get_corner(tensor: Any, n: int = 3) -> Any:
    """The first `n` of each axis."""
    return tensor[(slice(n),) * tensor.ndim]


def remove_batch_dim(tensor: Tensor) -> Tensor:
    """Without the first axis, if that is of one."""
    return tensor[0] if tensor.shape[0] == 1 else tensor


def lm_cross_entropy_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Tensor | None = None,
    per_token: bool = False,
) -> Tensor:
    """The loss of each next token in nats: (batch, pos - 1), or its mean over those that are no padding."""
    losses = cross_entropy(logits[:, :-1].mT, tokens[:, 1:].to(logits.device), reduction="none")
    if attention_mask is not None:
        counts = (attention_mask[:, :-1] * attention_mask[:, 1:]).to(losses)
        return losses * counts if per_token else (losses * counts).sum() / counts.sum()
    return losses if per_token else losses.mean()


def lm_accuracy(logits: Tensor, tokens: Tensor, per_token: bool = False) -> Tensor:
    """How often the likeliest next token is the next token."""
    right = logits[..., :-1, :].argmax(-1) == tokens[..., 1:].to(logits.device)
    return right if per_token else right.sum() / right.numel()


def test_prompt(
    prompt: str,
    answer: Any,
    model: Any,
    prepend_space_to_answer: bool = True,  # noqa: PT028
    prepend_bos: bool | None = None,  # noqa: PT028
    top_k: int = 10,  # noqa: PT028
) -> Any:
    """Print how probable an answer is behind a prompt: `test_prompt` of the model inside. And return it, of several a list."""
    answers = [answer] if isinstance(answer, str) else list(answer)
    spaced = [f" {one}" if prepend_space_to_answer and not one.startswith(" ") else one for one in answers]
    begins = model._begins(prepend_bos)
    found = [model.model.test_prompt(prompt, one, top=top_k, prepend_bos=begins or None) for one in spaced]
    return found[0] if isinstance(answer, str) else found


test_prompt.__test__ = False  # type: ignore[attr-defined]  # no test of pytest's, which its name looks like


def get_attention_mask(tokenizer: Any, tokens: Int[Tensor, "batch pos"], prepend_bos: bool) -> Int[Tensor, "batch pos"]:
    """1 for tokens, 0 for the padding tokens: of rows filled up at their beginning, where the tokenizer does that, or their end.

    A tokenizer that pads on the left, as those of loaded models do, says nothing of `to_tokens`, which fills up at the end: a batch
    in which nothing was filled up at the beginning is read as one of its. A text that ends with the padding token is not told from
    one that was filled up.

    Args:
        prepend_bos: whether the rows begin with BOS, which is not taken for padding where the two are one token.
    """
    fill = filling(tokenizer)
    pads = (tokens == fill).int()
    if tokenizer.padding_side == "left":
        leading = pads.cumprod(1)
        if prepend_bos and tokenizer.bos_token_id == fill:
            leading[torch.arange(len(tokens)), (leading.sum(1) - 1).clamp(min=0)] = 0
        if leading.any():
            return 1 - leading
    trailing = pads.flip(1).cumprod(1).flip(1)
    if prepend_bos and tokenizer.bos_token_id == fill:
        trailing[:, 0] = 0
    return 1 - trailing


def filling(tokenizer: Any) -> int:
    """The token that rows are filled up with: the end of a text where a tokenizer has none for padding (GPT-2's), as there."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if pad is not None else getattr(tokenizer, "eos_token_id", None) or 0


class Slice:
    """Some of an axis: an index (its axis goes), a slice or its (start, stop, step), several indices, or all (None).

    Attributes:
        mode: "int", "slice", "array", or "identity".
    """

    def __init__(self, input_slice: Any = None) -> None:
        one = slice(*input_slice) if isinstance(input_slice, tuple) else input_slice
        if isinstance(one, Slice):
            one = one.slice
        kinds = ((int, "int"), (slice, "slice"), ((list, Tensor, numpy.ndarray), "array"), (type(None), "identity"))
        self.mode = next((mode for kind, mode in kinds if isinstance(one, kind)), "")
        if not self.mode:
            raise InputError(f"Slice({input_slice!r}): give an index, a slice, (start, stop, step), indices or None.")
        self.slice: Any = slice(None) if one is None else to_numpy(one) if self.mode == "array" else one

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Those entries of an axis."""
        which: Any = torch.as_tensor(self.slice, device=tensor.device) if self.mode == "array" else self.slice
        places: list[Any] = [slice(None)] * tensor.ndim
        places[dim] = which
        return tensor[tuple(places)]

    def indices(self, max_ctx: int | None = None) -> Any:
        """Which of `max_ctx` entries these are."""
        if self.mode == "int":
            return numpy.array([self.slice])
        if self.mode == "array":
            return self.slice
        if max_ctx is None:
            raise InputError("Slice.indices(max_ctx): give how many there are, unless it is of one index.")
        return numpy.arange(max_ctx)[self.slice]

    def __repr__(self) -> str:
        return f"Slice: {self.slice} Mode: {self.mode}"
