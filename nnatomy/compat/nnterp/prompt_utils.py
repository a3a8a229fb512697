"""`nnterp.prompt_utils`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnatomy import methods
from nnatomy.compat.nnterp.remote import refuse_remote
from nnatomy.errors import InputError
from nnatomy.methods import Prompt as Prompt
from nnatomy.methods import get_first_tokens as get_first_tokens

#: nnterp's: a word without a token of its own.
TokenizationError = InputError


def next_token_probs_unsqueeze(nn_model: Any, prompt: Any, remote: Any = False, **_: Any) -> Tensor:
    """The model's next-token probabilities as one layer: (prompt, 1, vocab)."""
    refuse_remote("next_token_probs_unsqueeze", remote)
    return methods.next_token_probs_unsqueeze(nn_model, prompt)


def run_prompts(
    nn_model: Any,
    prompts: Any,
    batch_size: int = 32,
    get_probs_func: Any = None,
    func_kwargs: dict[str, Any] | None = None,
    remote: Any = False,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """`nnatomy.methods.run_prompts`: the targets' probabilities of many prompts. `tqdm=None` shows no progress."""
    refuse_remote("run_prompts", remote)
    return methods.run_prompts(
        nn_model, prompts, batch_size=batch_size, get_probs_func=get_probs_func, func_kwargs=func_kwargs, **kwargs
    )
