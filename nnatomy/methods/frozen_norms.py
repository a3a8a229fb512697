"""Norms with their scale held fixed: what makes the way from a part of the stream to the logits linear."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: What norms divide by, by the function's name; a power counts where it is a root.
_SCALES = {"rsqrt", "sqrt", "std", "var", "norm", "vector_norm", "linalg_vector_norm"}
_POWERS = {"pow", "__pow__"}


class FrozenNorms(TorchFunctionMode):
    """While this is on, no gradient flows through what a norm divides by. No value changes by it.

    So the gradient of a layer norm or an RMS norm is the linear map that it is at this input: gain * (x - mean) / scale,
    with the scale a number. (The scale's own gradient takes out of every part its share along the stream: the parts of a
    logit would sum to nearly 0.) A norm that is one fused kernel of another library is not seen.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _SCALES or (name in _POWERS and abs(_exponent(*args, **kwargs)) == 0.5):
            return result.detach() if isinstance(result, Tensor) else result
        frozen = _FROZEN.get(func)
        if frozen is None:
            return result
        linear = frozen(*args, **kwargs)
        return result.detach() + (linear - linear.detach())  # the model's own value, bit for bit


def _exponent(_: Any, exponent: Any, **__: Any) -> float:
    return float(exponent) if isinstance(exponent, (int, float)) else 0.0


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    scale = (input.var(axes, keepdim=True, unbiased=False) + eps).rsqrt().detach()
    normed = (input - input.mean(axes, keepdim=True)) * scale
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    normed = input * (input.square().mean(axes, keepdim=True) + eps).rsqrt().detach()
    return normed if weight is None else normed * weight


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    assert out is None
    return input / input.norm(p, dim, keepdim=True).clamp_min(eps).detach()


_FROZEN: dict[Any, Any] = {F.layer_norm: _layer_norm, F.rms_norm: _rms_norm, F.normalize: _normalize}
