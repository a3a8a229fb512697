"""A matrix that is the product of two thin ones, which is not formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError


@dataclass(frozen=True, eq=False)
class FactoredMatrix:
    """`left @ right`, of any leading axes (heads), by its factors.

    `@` with a tensor or another one, `.T`, `svd`, `singular_values`, `eigenvalues`, `norm` and `trace` cost as little as the inner
    size is small; `full()` forms the product.

    Attributes:
        left: (..., rows, inner).
        right: (..., inner, columns).

    Example:
        >>> import torch
        >>> from nnatomy.weights import FactoredMatrix
        >>> product = FactoredMatrix(torch.randn(100, 4), torch.randn(4, 100))
        >>> product.shape, product.singular_values.shape
        (torch.Size([100, 100]), torch.Size([4]))
    """

    left: Float[Tensor, "*#heads rows inner"]
    right: Float[Tensor, "*#heads _ columns"]

    def __post_init__(self) -> None:
        if self.left.shape[-1] != self.right.shape[-2]:
            raise InputError(
                f"The factors are {tuple(self.left.shape)} and {tuple(self.right.shape)}: the inner sizes differ."
            )

    @property
    def shape(self) -> torch.Size:
        """(..., rows, columns)."""
        heads = torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return torch.Size((*heads, self.left.shape[-2], self.right.shape[-1]))

    @property
    def T(self) -> FactoredMatrix:  # noqa: N802
        """The transposed product of each head."""
        return FactoredMatrix(self.right.mT, self.left.mT)

    def full(self) -> Float[Tensor, "*heads rows columns"]:
        """The product itself."""
        return self.left @ self.right

    def __getitem__(self, heads: object) -> FactoredMatrix:
        """Of some heads: indices of leading axes."""
        count = len(self.shape) - 2
        each = (one.expand(*self.shape[:count], *one.shape[-2:]) for one in (self.left, self.right))
        chosen = heads if isinstance(heads, tuple) else (heads,)
        if len(chosen) > count:
            raise InputError(
                f"A product of {tuple(self.shape)} has {count} axes of heads; entries are those of full()."
            )
        if any(isinstance(one, (bool, str)) for one in chosen):
            raise InputError(f"[{', '.join(map(repr, chosen))}]: heads are counted from 0, or sliced.")
        return FactoredMatrix(*(one[chosen] for one in each))

    def __matmul__(self, other: Tensor | FactoredMatrix) -> Tensor | FactoredMatrix:
        if isinstance(other, FactoredMatrix):
            inner = self.right @ other.left
            if inner.shape[-1] < inner.shape[-2]:
                return FactoredMatrix(self.left @ inner, other.right)
            return FactoredMatrix(self.left, inner @ other.right)
        if other.ndim == 1:
            return (self.left @ (self.right @ other)[..., None])[..., 0]
        return FactoredMatrix(self.left, self.right @ other)

    def __rmatmul__(self, other: Tensor) -> Tensor | FactoredMatrix:
        if other.ndim == 1:
            return ((other @ self.left)[..., None, :] @ self.right)[..., 0, :]
        return FactoredMatrix(other @ self.left, self.right)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U`, `S` and `Vh`, with as many singular values as the inner size (or a side, if that is less); in float32 at least."""
        (left, small), (right, other) = (torch.linalg.qr(_wide(one)) for one in (self.left, self.right.mT))
        u, s, vh = torch.linalg.svd(small @ other.mT, full_matrices=False)
        return left @ u, s, vh @ right.mT

    @property
    def singular_values(self) -> Float[Tensor, "*heads inner"]:
        """The largest first."""
        small, other = (torch.linalg.qr(_wide(one), mode="r").R for one in (self.left, self.right.mT))
        return torch.linalg.svdvals(small @ other.mT)

    @property
    def eigenvalues(self) -> Tensor:
        """Those that are not zero by its rank, complex; of a square product."""
        self._check_square("eigenvalues")
        return torch.linalg.eigvals(_wide(self.right) @ _wide(self.left))

    @property
    def trace(self) -> Tensor:
        """The sum of the diagonal; of a square product."""
        self._check_square("trace")
        return (self.left * self.right.mT).sum((-2, -1))

    def norm(self) -> Float[Tensor, "*heads"]:
        """Frobenius, of each head."""
        grams = (one.mT @ one for one in (_wide(self.left), _wide(self.right.mT)))
        one, other = grams
        return (one * other).sum((-2, -1)).clamp(min=0).sqrt()

    def __repr__(self) -> str:
        return f"FactoredMatrix{tuple(self.shape)}, of inner size {self.left.shape[-1]}"

    def _check_square(self, what: str) -> None:
        if self.shape[-1] != self.shape[-2]:
            raise InputError(f"{what}: the product is of {tuple(self.shape)}, and not square.")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
