"""Scaled-dot-product attention by its definition, computed aside: scores and pattern, which its kernels never hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@contextmanager
def aside_of(tensor: Tensor) -> Iterator[None]:
    """Within, what is computed is no call of the model's, and not converted by autocast."""
    device = tensor.device.type
    has_autocast = torch.amp.is_autocast_available(device)
    with (
        torch._C.DisableTorchFunction(),
        torch.autocast(device, enabled=False) if has_autocast else nullcontext(),
    ):
        yield


def as_taken(tensor: Tensor) -> Tensor:
    """As SDPA takes it: under autocast in autocast's dtype."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or tensor.dtype == torch.float64:
        return tensor
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def wide(tensor: Tensor) -> Tensor:
    """In the dtype that SDPA computes in, whatever the model's: at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether nothing has changed, numbers that are none included."""
    if one.is_meta or isinstance(one, FakeTensor):
        return True  # shapes alone: nothing is computed with
    if torch.equal(one, other):
        return True
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.detach().view(as_bits), other.view(as_bits))


def awaits_gradient(shown: Tensor) -> bool:
    """Whether somebody has asked for the gradient of what is shown aside, which no result of the model's is computed from."""
    return shown.requires_grad and (shown.is_leaf or shown.retains_grad or bool(shown._backward_hooks))


def sdpa_scores(
    query: Float[Tensor, "*#batch query dim"],
    key: Float[Tensor, "*#batch key dim"],
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Float[Tensor, "*#batch query key"]:
    """query keyᵀ scale + mask, as `torch.nn.functional.scaled_dot_product_attention` defines it.

    In float32 at least, as its kernels have them: products of large queries and keys are off by more than 1 in half precision,
    and larger than float16 goes.
    """
    scores = wide(query) @ wide(key).transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores


def sdpa_pattern(scores: Float[Tensor, "*#batch query key"], is_masked: bool) -> Float[Tensor, "*#batch query key"]:
    """softmax(scores). A row whose every key is masked is zero in SDPA, and here."""
    pattern = scores.softmax(-1)
    if is_masked:
        pattern = pattern.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    return pattern
