"""The weights of a `HookedTransformer`, and its parts by the names of their weights and hooks."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.compat.transformer_lens.factored_matrix import FactoredMatrix
from nnatomy.errors import InputError

_MATRICES = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
_BIASES = ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_gate", "b_out")
_OF_THE_MODEL = ("W_E", "W_U", "b_U")
#: The names of all weights that a model itself has.
WEIGHTS = (*_OF_THE_MODEL, *_MATRICES, *_BIASES)


class Weights:
    """What a HookedTransformer says of weights."""

    model: Any
    cfg: Any
    hook_dict: Any

    @property
    def QK(self) -> FactoredMatrix:  # noqa: N802
        """W_Q @ W_K.T of each layer and head: (layer, head, d_model, d_model), not formed."""
        return FactoredMatrix(self._weights("W_Q"), self._weights("W_K").mT)

    @property
    def OV(self) -> FactoredMatrix:  # noqa: N802
        """W_V @ W_O of each layer and head, likewise."""
        return FactoredMatrix(self._weights("W_V"), self._weights("W_O"))

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the output biases of the layers before one (`mlp_input`: and of its attention)."""
        inside = self.model
        parts = [inside.b_O[i] for i in range(layer + mlp_input)]
        parts += [inside.b_out[i] for i in range(layer)] if include_mlp_biases else []
        return sum(parts, torch.zeros(self.cfg.d_model, device=self.cfg.device, dtype=self.cfg.dtype))

    def all_head_labels(self) -> list[str]:
        """["L0H0", "L0H1", ...]."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    @property
    def blocks(self) -> list[_Block]:
        """By layer, its weights: `blocks[0].attn.W_Q`, `blocks[0].mlp.W_in`."""
        return [_Block(self, layer) for layer in range(self.cfg.n_layers)]

    @property
    def embed(self) -> _Module:
        """`embed.W_E`; called on ids, the embeddings."""
        return _Module(self, ("W_E",), self.model.hf_model.get_input_embeddings())

    @property
    def unembed(self) -> _Module:
        """`unembed.W_U`, `unembed.b_U`; called on what the final norm gives, the logits."""
        return _Module(self, ("W_U", "b_U"), lambda normed: normed @ self.model.W_U + self.model.b_U)

    @property
    def ln_final(self) -> Any:
        """The final norm's own module."""
        return self.model.ln_final.module

    def _weights(self, name: str) -> Tensor:
        """One that is the model's, or those of all layers, stacked."""
        if name in _OF_THE_MODEL:
            return getattr(self.model, name)
        return torch.stack([self._weight(name, i) for i in range(self.cfg.n_layers)])

    def _weight(self, name: str, layer: int) -> Tensor:
        """Of one layer; keys' and values' once for each query head."""
        one: Tensor = getattr(self.model, name)[layer]
        repeated = name in ("W_K", "W_V", "b_K", "b_V") and len(one) != self.cfg.n_heads
        return one.repeat_interleave(self.cfg.n_heads // len(one), 0) if repeated else one


class _Module:
    """A part of the model by the names of its weights and hooks.

    Args:
        names: of its weights.
        call: what it computes, where it can be called.
        layer: of the weights; None: they are the model's.
        path: what its hook names begin with.
    """

    def __init__(
        self,
        model: Any,
        names: tuple[str, ...],
        call: Any = None,
        layer: int | None = None,
        path: str = "",
    ) -> None:
        self._model, self._names, self._call, self._layer, self._path = model, names, call, layer, path

    def __call__(self, *given: Any) -> Any:
        if self._call is None:
            raise InputError(
                "A block's part has weights and hooks here, and is not called: a trace of `.model` runs parts."
            )
        return self._call(*given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("hook_"):
            self._model._place(self._path + name)  # raises if there is no such name
            return self._model.hook_dict[self._path + name]
        if name not in self._names:
            raise AttributeError(
                f"Here are {', '.join((*self._names, 'hooks'))}, and no {name!r}: the rest is at `.model`, a StandardizedTransformer."
            )
        return getattr(self._model.model, name) if self._layer is None else self._model._weight(name, self._layer)


class _Block(_Module):
    def __init__(self, model: Any, layer: int) -> None:
        super().__init__(model, (), path=f"blocks.{layer}.")
        attention = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
        neurons = ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")
        self.attn = _Module(model, attention, layer=layer, path=f"{self._path}attn.")
        self.mlp = _Module(model, neurons, layer=layer, path=f"{self._path}mlp.")
        self.ln1, self.ln2 = (_Module(model, (), path=f"{self._path}{name}.") for name in ("ln1", "ln2"))
