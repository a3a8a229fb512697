"""Singular vectors of weights, read in the vocabulary."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.compat.transformer_lens.factored_matrix import FactoredMatrix
from nnatomy.errors import InputError


class SVDInterpreter:
    """Singular vectors of a model's weights as what they add to each token's logit (Millidge and Black 2022).

    Args:
        model: a HookedTransformer.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.cfg = model, model.cfg

    def get_singular_vectors(
        self,
        vector_type: Literal["OV", "w_in", "w_out"],
        layer_index: int,
        num_vectors: int = 10,
        head_index: int | None = None,
    ) -> Float[Tensor, "d_vocab 1 num_vectors"]:
        """The first right singular vectors of one weight, times the unembedding.

        Args:
            vector_type: "OV" of one head; "w_in" and "w_out" of the MLP, on the side of the stream.
        """
        if vector_type not in ("OV", "w_in", "w_out"):
            raise InputError(f"vector_type={vector_type!r}: it is 'OV', 'w_in' or 'w_out'.")
        assert vector_type != "OV" or head_index is not None, (
            f"Head index optional only for w_in and w_out, got {vector_type}"
        )
        for name, index, count in (
            ("Layer", layer_index, self.cfg.n_layers),
            ("Head", head_index or 0, self.cfg.n_heads),
        ):
            assert 0 <= index < count, f"{name} index must be between 0 and {count - 1} but got {index}"
        inside = self.model.model
        with torch.no_grad():
            if vector_type == "OV":
                read = FactoredMatrix(
                    self.model.W_V[layer_index, head_index], self.model.W_O[layer_index, head_index]
                ).V
            else:
                weight = inside.W_in[layer_index].T if vector_type == "w_in" else inside.W_out[layer_index]
                read = torch.linalg.svd(weight.float(), full_matrices=False).Vh.mT
            return (self.model.W_U.T.float() @ read[:, :num_vectors])[:, None]
