"""`FactoredMatrix` under TransformerLens's names: `A`, `B`, `AB`, `U`, `S`, `V`, ..."""

from __future__ import annotations

from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from nnatomy import weights


class FactoredMatrix:
    """`A @ B`, which is not formed: `nnatomy.weights.FactoredMatrix` under TransformerLens's names.

    Args:
        A: (..., ldim, mdim).
        B: (..., mdim, rdim).
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:  # noqa: N803
        assert A.shape[-1] == B.shape[-2], (
            f"The factors are {tuple(A.shape)} and {tuple(B.shape)}: the inner sizes differ."
        )
        heads = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        self.A, self.B = (one.broadcast_to((*heads, *one.shape[-2:])) for one in (A, B))

    @property
    def _product(self) -> weights.FactoredMatrix:
        return weights.FactoredMatrix(self.A, self.B)

    @property
    def shape(self) -> torch.Size:
        """(..., ldim, rdim)."""
        return self._product.shape

    @property
    def ldim(self) -> int:
        """Rows."""
        return self.shape[-2]

    @property
    def mdim(self) -> int:
        """The inner size."""
        return self.A.shape[-1]

    @property
    def rdim(self) -> int:
        """Columns."""
        return self.shape[-1]

    @property
    def ndim(self) -> int:
        """How many axes the product has."""
        return len(self.shape)

    @property
    def has_leading_dims(self) -> bool:
        """Whether there are several products."""
        return self.ndim > 2

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """`A` and `B`."""
        return self.A, self.B

    @property
    def AB(self) -> Tensor:  # noqa: N802
        """The product itself."""
        return self.A @ self.B

    @property
    def BA(self) -> Tensor:  # noqa: N802
        """The other product, of a square one."""
        assert self.ldim == self.rdim, f"BA: the product is of {tuple(self.shape)}, and not square."
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:  # noqa: N802
        """Transposed."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = self._product.svd()
        return u, s, vh.mT

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U`, `S` and `V`: the product is U @ diag(S) @ V.mT."""
        return self._svd

    @property
    def U(self) -> Tensor:  # noqa: N802
        """(..., ldim, singular value)."""
        return self._svd[0]

    @property
    def S(self) -> Tensor:  # noqa: N802
        """(..., singular value), the largest first."""
        return self._svd[1]

    @property
    def V(self) -> Tensor:  # noqa: N802
        """(..., rdim, singular value)."""
        return self._svd[2]

    @property
    def Vh(self) -> Tensor:  # noqa: N802
        """What TransformerLens means by it: `V`, not transposed."""
        return self.V

    @property
    def eigenvalues(self) -> Tensor:
        """Those that are not zero by its rank, complex; of a square product."""
        return self._product.eigenvalues

    def norm(self) -> Tensor:
        """Frobenius."""
        return self._product.norm()

    def make_even(self) -> FactoredMatrix:
        """The same product, its factors of the same singular values."""
        root = self.S.sqrt()
        return FactoredMatrix(self.U * root[..., None, :], root[..., :, None] * self.V.mT)

    def get_corner(self, k: int = 3) -> Tensor:
        """The first `k` of each axis of the product."""
        heads = (slice(k),) * (self.ndim - 2)
        return self.A[(*heads, slice(k))] @ self.B[(*heads, slice(None), slice(k))]

    def collapse_l(self) -> Tensor:
        """The product without `U`."""
        return self.S[..., :, None] * self.V.mT

    def collapse_r(self) -> Tensor:
        """The product without `V`."""
        return self.U * self.S[..., None, :]

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """With one more leading axis, of one."""
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))

    def __matmul__(self, other: Tensor | FactoredMatrix) -> Tensor | FactoredMatrix:
        first = other.A if isinstance(other, FactoredMatrix) else other
        size = first.shape[-2] if first.ndim > 1 else first.shape[0]
        assert self.rdim == size, f"{tuple(self.shape)} @ {tuple(other.shape)}: the inner sizes differ."
        if first.ndim == 1:
            return (self.A @ (self.B @ first)[..., None])[..., 0]
        return _factored(*self.pair, *(other.pair if isinstance(other, FactoredMatrix) else (other,)))

    def __rmatmul__(self, other: Tensor) -> Tensor | FactoredMatrix:
        assert other.shape[-1] == self.ldim, f"{tuple(other.shape)} @ {tuple(self.shape)}: the inner sizes differ."
        if other.ndim == 1:
            return ((other @ self.A)[..., None, :] @ self.B)[..., 0, :]
        return _factored(other, *self.pair)

    def __mul__(self, scalar: int | float | Tensor) -> FactoredMatrix:
        if isinstance(scalar, Tensor):
            assert scalar.numel() == 1, f"A number is taken, not a tensor of {tuple(scalar.shape)}."
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    def __getitem__(self, idx: Any) -> FactoredMatrix:
        """Entries of the product, those of its last two axes too: an index there leaves an axis of one."""
        chosen = idx if isinstance(idx, tuple) else (idx,)
        heads = self.ndim - 2
        if len([one for one in chosen if one is not None and one is not Ellipsis]) > self.ndim:
            raise IndexError(f"A product of {tuple(self.shape)} has {self.ndim} axes, not {len(chosen)}.")
        if len(chosen) <= heads or Ellipsis in [one for one in chosen if not isinstance(one, Tensor)]:
            return FactoredMatrix(self.A[idx], self.B[idx])
        rows, *columns = (_kept(one) for one in chosen[heads:])
        a, b = self.A[(*chosen[:heads], rows)], self.B[chosen[:heads]]
        return FactoredMatrix(a, b[(..., *columns)] if columns else b)

    def __repr__(self) -> str:
        return f"FactoredMatrix: Shape({tuple(self.shape)}), Hidden Dim({self.mdim})"


def _kept(which: Any) -> Any:
    """An index as one that leaves its axis."""
    return slice(which, which + 1 or None) if isinstance(which, int) else which


def _factored(*chain: Tensor) -> FactoredMatrix:
    """The product of several matrices, in two factors of the smallest inner size that there is."""
    least = min(range(1, len(chain)), key=lambda i: chain[i].shape[-2])
    return FactoredMatrix(*(reduce(torch.matmul, part) for part in (chain[:least], chain[least:])))
