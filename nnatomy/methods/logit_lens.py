"""The logit lens: what the model would predict, were each layer its last."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.standardized import StandardizedTransformer


@torch.no_grad()
def logit_lens(model: StandardizedTransformer, prompts: Any) -> Float[Tensor, "prompt layer vocab"]:
    """The next-token probabilities at the last token of each prompt, read off after each layer.

    The logit lens of nostalgebraist ("interpreting GPT: the logit lens", 2020): the residual stream
    after a layer, at the last position, goes through the model's own head (final norm, unembedding, and
    whatever caps and scales the model has), so that the last layer's row is the model's prediction.

    Args:
        prompts: what `model.trace` takes.

    Returns:
        Probabilities, on the CPU.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import logit_lens
        >>> model = StandardizedTransformer("demo:llama")
        >>> probs = logit_lens(model, ["The capital of France is", "The capital of Japan is"])
        >>> probs.shape[:2], [model.tokenizer.decode(i) for i in probs[:, -1].argmax(-1)]
        (torch.Size([2, 8]), [' Paris', ' Tokyo'])
    """
    with model.trace(prompts):
        hidden = torch.stack([h[:, -1].to(model.device) for h in model.layers_output[:]], dim=1)
    return model.project_on_vocab(hidden).softmax(-1).cpu()
