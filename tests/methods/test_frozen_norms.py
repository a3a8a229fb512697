"""Norms with their scale held fixed: no value changes, and the gradient is the linear map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnatomy.methods.frozen_norms import FrozenNorms

WEIGHT, BIAS = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)
NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, (8,), WEIGHT, BIAS, 1e-3),
    "layer_norm by name": lambda x: F.layer_norm(input=x, normalized_shape=(8,), weight=WEIGHT, bias=BIAS, eps=1e-3),
    "layer_norm bare": lambda x: F.layer_norm(x, [8]),
    "rms_norm": lambda x: F.rms_norm(x, (8,), WEIGHT, 1e-3),
    "rms_norm bare": lambda x: F.rms_norm(x, (8,)),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "rsqrt": lambda x: WEIGHT * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)),
    "sqrt": lambda x: x / (x**2).mean(-1, keepdim=True).sqrt(),
    "pow": lambda x: x * torch.pow(x.square().mean(-1, keepdim=True), -0.5),
    "power": lambda x: x * x.square().mean(-1, keepdim=True) ** -0.5,
    "std": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3),
    "norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "linalg": lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
}


def along(norm: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The norm's output, and what its derivative makes of x itself."""
    output, derivative = torch.autograd.functional.jvp(norm, x, x)
    return output, derivative


@pytest.mark.parametrize("name", NORMS)
def test_the_gradient_is_the_linear_map(name: str) -> None:
    """Of x itself it makes the output less the bias; a norm's own derivative makes next to nothing of it."""
    norm = NORMS[name]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 4 + 1
    expected, own = along(norm, x)
    with FrozenNorms():
        output, linear = along(norm, x)
    assert torch.equal(output, expected)
    bias = BIAS if name in ("layer_norm", "layer_norm by name") else torch.zeros(8)
    assert torch.allclose(linear, output - bias, atol=1e-4)
    assert float(own.abs().max()) < 0.01 * float(linear.abs().max())


def test_other_powers_keep_their_gradient() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    with FrozenNorms():
        (gradient,) = torch.autograd.grad((x**3 + torch.pow(2.0, x)).sum(), x)
    assert torch.allclose(gradient, 12 + 4 * torch.tensor([2.0]).log())
