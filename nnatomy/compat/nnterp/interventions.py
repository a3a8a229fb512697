"""`nnterp.interventions`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnatomy import methods
from nnatomy.compat.nnterp.remote import refuse_remote
from nnatomy.methods import TargetPrompt as TargetPrompt
from nnatomy.methods import TargetPromptBatch as TargetPromptBatch
from nnatomy.methods import it_repeat_prompt as it_repeat_prompt
from nnatomy.methods import repeat_prompt as repeat_prompt


def logit_lens(nn_model: Any, prompts: Any, remote: Any = False, return_inv_logits: bool = False) -> Any:
    """`nnatomy.methods.logit_lens`: (prompt, layer, vocab), on the CPU.

    With `return_inv_logits`, the probabilities of the negated states as well.
    """
    refuse_remote("logit_lens", remote)
    return methods.logit_lens(nn_model, prompts, return_inv_logits=return_inv_logits)


def patchscope_lens(
    nn_model: Any,
    source_prompts: Any = None,
    target_patch_prompts: Any = None,
    layers: Any = None,
    latents: Any = None,
    remote: Any = False,
) -> Tensor:
    """`nnatomy.methods.patchscope_lens`: (source, layer, vocab), on the CPU."""
    refuse_remote("patchscope_lens", remote)
    if latents is not None and layers is not None:
        latents = latents[
            : 1 if isinstance(layers, int) else len(layers)
        ]  # the i-th of them goes into the i-th of `layers`
    return methods.patchscope_lens(nn_model, source_prompts, target_patch_prompts, layers=layers, latents=latents)


def patchscope_generate(
    nn_model: Any,
    prompts: Any,
    target_patch_prompt: TargetPrompt,
    max_length: int = 50,
    layers: Any = None,
    remote: Any = False,
    max_batch_size: int = 32,
) -> dict[int, Tensor]:
    """`nnatomy.methods.patchscope_generate`: token ids by layer, on the CPU."""
    refuse_remote("patchscope_generate", remote)
    return methods.patchscope_generate(
        nn_model, prompts, target_patch_prompt, max_length=max_length, layers=layers, max_batch_size=max_batch_size
    )


def patch_object_attn_lens(
    nn_model: Any, source_prompts: Any, target_prompts: Any, attn_idx_patch: int, num_patches: int = 5
) -> Tensor:
    """`nnatomy.methods.patch_object_attn_lens`: (target, layer, vocab), on the CPU."""
    return methods.patch_object_attn_lens(
        nn_model, source_prompts, target_prompts, attn_idx_patch=attn_idx_patch, num_patches=num_patches
    )


def steer(nn_model: Any, layers: Any, steering_vector: Tensor, **kwargs: Any) -> None:
    """`nn_model.steer(...)`."""
    nn_model.steer(layers, steering_vector, **kwargs)
