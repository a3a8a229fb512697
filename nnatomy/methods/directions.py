"""From the activations of two sets of examples to a direction that leads from one to the other.

Each is of the length at which adding it carries the mean of the negative examples, along it, to that of the positive ones. So
vectors of different methods are steered with by the same factors.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from nnatomy.errors import InputError


def mean_difference(
    positive: Float[Tensor, "positive hidden"], negative: Float[Tensor, "negative hidden"]
) -> Float[Tensor, " hidden"]:
    """The mean of the positive examples less that of the negative ones.

    Rimsky et al. 2023, "Steering Llama 2 via Contrastive Activation Addition" (arXiv 2312.06681, section 3).
    """
    return positive.mean(0) - negative.mean(0)


def pca(
    positive: Float[Tensor, "positive hidden"], negative: Float[Tensor, "negative hidden"]
) -> Float[Tensor, " hidden"]:
    """The first principal component of the pairs' differences.

    Zou et al. 2023, "Representation Engineering" (arXiv 2310.01405, section 3.1). The order within the pairs is shuffled there,
    so that the differences' mean does not drop out; here each is taken in both orders. The sign is that of the mean.
    """
    if len(positive) != len(negative):
        raise InputError(f"pca takes pairs; there are {len(positive)} positive and {len(negative)} negative examples.")
    return _scaled(torch.linalg.svd(positive - negative, full_matrices=False).Vh[0], positive, negative)


def logistic_probe(
    positive: Float[Tensor, "positive hidden"], negative: Float[Tensor, "negative hidden"], l2: float = 1e-2
) -> Float[Tensor, " hidden"]:
    """The direction by which a logistic regression tells the two apart.

    The least of mean(log(1 + exp(-y (w x + b)))) + l2 / 2 |w|^2, where x is the activations less their mean, over the root of
    their mean squared length, and y is 1 or -1; found by L-BFGS in the span of the examples.
    """
    x = torch.cat([positive, negative]).double()
    x = x - x.mean(0)
    left, singular, right = torch.linalg.svd(x / x.square().sum(1).mean().sqrt(), full_matrices=False)
    inputs = left * singular
    y = inputs.new_ones(len(x))
    y[len(positive) :] = -1
    with torch.enable_grad():
        weight = inputs.new_zeros(inputs.shape[1], requires_grad=True)
        bias = inputs.new_zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=1000,
            tolerance_grad=1e-9,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = softplus(-y * (inputs @ weight + bias)).mean() + l2 / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
    return _scaled((weight.detach() @ right).to(positive.dtype), positive, negative)


def _scaled(direction: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """With the length, and the sign, of what lies along it between the means."""
    unit = direction / direction.norm()
    return unit * (unit @ mean_difference(positive, negative))


METHODS = {"mean_difference": mean_difference, "pca": pca, "logistic_probe": logistic_probe}
