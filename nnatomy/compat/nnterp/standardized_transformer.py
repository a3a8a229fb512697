"""nnterp's `StandardizedTransformer`: a model under the standard names, and under nnsight's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import Module
from transformers import AutoTokenizer

from nnatomy.compat.nnsight.language import LanguageModel
from nnatomy.compat.nnterp.rename_utils import RenameConfig, get_rename_dict
from nnatomy.core.frames import warn
from nnatomy.errors import InputError, NnatomyError
from nnatomy.standardized.accessors import LayerAccessor
from nnatomy.standardized.loading import locate
from nnatomy.standardized.positions import Where

#: What nnterp's constructor takes and makes no difference here.
_IDLE = ("allow_dispatch", "check_attn_probs_with_trace", "allow_multimodal")


class StandardizedTransformer(LanguageModel):
    """A model under the standard names: `layers[i].self_attn`, `layers_output[i]`, ... Also on each part that holds its layers:
    `model.model.layers[i].mlp`, whatever the model calls these.

    Args:
        model: an id, a folder, `demo:gpt2`, or a loaded model.
        check_renaming: check at load that each name means what it promises.
        remote: False; NDIF is not here.
        enable_attention_probs: makes no difference: attention probabilities are there on every model, with any implementation.
        rename_config: names that are aliases; see there.
        **kwargs: those of `LanguageModel`.
    """

    def __init__(
        self,
        model: Any,
        trust_remote_code: bool = False,
        check_renaming: bool = True,
        remote: bool = False,
        enable_attention_probs: bool = False,
        rename_config: RenameConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if remote:
            raise InputError(
                "StandardizedTransformer(..., remote=True): there is no NDIF here. A model at a server of nnatomy's own is "
                "nnatomy.StandardizedTransformer(name, server='http://...'); see docs/remote.md."
            )
        if enable_attention_probs and kwargs.get("attn_implementation", "eager") != "eager":
            raise ValueError("enable_attention_probs=True: leave attn_implementation out, or give 'eager'.")
        for name in _IDLE:
            kwargs.pop(name, None)
        for name in [name for name in kwargs if name.endswith("_rename")]:
            warn(
                f"{name}={kwargs.pop(name)!r}: nnterp has no such argument any more; modules are found by what they do."
            )
        if not isinstance(model, Module):
            if trust_remote_code:
                kwargs["trust_remote_code"] = True
            if enable_attention_probs:
                kwargs["attn_implementation"] = "eager"
        rename = {**get_rename_dict(rename_config), **(kwargs.pop("rename", None) or {})}
        kwargs.setdefault("validate", check_renaming)
        kwargs.setdefault("allow_failures", False)
        self._place = None if isinstance(model, Module) else model
        super().__init__(model, rename=rename, **kwargs)

    def _read(self) -> None:
        super()._read()
        self._name_parts()
        self.attention_probabilities.__class__ = _Patterns

    def _name_parts(self) -> None:
        """Have the standard names on the model, on whatever holds the layers, and on each layer."""
        anatomy, own = self._anatomy, self._naming.own
        own.clear()
        paths = {module: path for path, module in self.module.named_modules()}

        def put(name: str, path: str, holders: list[Module]) -> None:
            for holder in holders:
                above = paths[holder]
                if not above or path.startswith(f"{above}."):
                    own.setdefault(holder, {})[name] = path[len(above) + 1 if above else 0 :]

        lists = {paths[layer].rpartition(".")[0] for layer in anatomy.layers}
        whole = self.module.get_submodule(next(iter(lists)))
        holders = [module for module in self.module.modules() if whole in set(module.modules()) and module is not whole]
        if len(lists) == 1:
            put("layers", paths[whole], holders)
        for name, module in (("ln_final", anatomy.ln_final), ("embed_tokens", anatomy.embed_tokens)):
            if module is not None and module in paths:
                put(name, paths[module], holders)
        put("model", paths[whole].partition(".")[0], [self.module])
        for layer, attention, mlp in zip(anatomy.layers, anatomy.attentions, anatomy.mlps, strict=True):
            for name, part in (("self_attn", attention), ("mlp", mlp)):
                if part is not None:
                    put(name, paths[part], [layer])

    @property
    def layers(self) -> Any:
        """The layers."""
        return tuple(self._view_of(layer) for layer in self._anatomy.layers)

    @property
    def attentions(self) -> Any:
        """The attention modules: `attentions[i]` is `layers[i].self_attn`."""
        return _Parts(self, "self_attn")

    @property
    def mlps(self) -> Any:
        """The MLP modules: `mlps[i]` is `layers[i].mlp`."""
        return _Parts(self, "mlp")

    @property
    def attn_probs_available(self) -> bool:
        """Whether some layer has attention probabilities."""
        return any(module is not None for module in self.attention_probabilities.modules)

    @property
    def add_prefix_false_tokenizer(self) -> Any:
        """The tokenizer, made so that it puts no space before a text."""
        if self._place is None:
            return self.tokenizer
        return AutoTokenizer.from_pretrained(locate(self._place), add_prefix_space=False)

    def detect_layer_output_type(self) -> None:
        """Nothing: a value goes back in the form that the layer gives."""

    def skip_layers(
        self,
        start_layer: int,
        end_layer: int,
        skip_with: Any = None,
        layer_returns_tuple: bool | None = None,  # noqa: ARG002
    ) -> None:
        """Do not run these layers, both included. What is given as a tuple counts by its first entry."""
        super().skip_layers(start_layer, end_layer, skip_with[0] if isinstance(skip_with, tuple) else skip_with)

    def steer(  # type: ignore[override]
        self,
        layers: Any,
        steering_vector: Float[Tensor, "*broadcast hidden"],
        factor: float | int = 1,
        positions: Where = None,
        token_positions: Where = None,
        batch_index: Any = None,
    ) -> None:
        """Add `factor * steering_vector` to the output of layers.

        Args:
            positions: deprecated: `token_positions`.
            token_positions: which of each prompt's own tokens. (nnterp counts the columns of the batch, padding too.)
            batch_index: which prompts.
        """
        if positions is not None:
            if token_positions is not None:
                raise ValueError("Cannot specify both: `positions` is nnterp's older name of `token_positions`.")
            warnings.warn("`positions` is deprecated: give `token_positions`.", DeprecationWarning, stacklevel=2)
            token_positions = positions
        factor = float(factor) if isinstance(factor, int) else factor
        super().steer(layers, steering_vector, factor, token_positions, batch_index=batch_index)

    def probs_to_dict(self, tokens: Tensor, probs: Tensor) -> dict[str, float]:
        """By each token, as the tokenizer writes it, its probability."""
        return dict(zip(self.tokenizer.convert_ids_to_tokens(tokens), probs.tolist(), strict=True))

    def get_topk_closest_tokens(self, hidden_state: Tensor, k: int = 5) -> Any:
        """The most probable tokens of a hidden state put through the head: a dict, or a list of them for (row, hidden)."""
        if hidden_state.ndim not in (1, 2) or hidden_state.shape[-1] != self.hidden_size:
            raise ValueError(
                f"A hidden state is of ({self.hidden_size}) or (row, {self.hidden_size}); got {tuple(hidden_state.shape)}."
            )
        rows = hidden_state[None] if hidden_state.ndim == 1 else hidden_state
        top = self.project_on_vocab(rows).softmax(-1).topk(k)
        found = [self.probs_to_dict(ids, probs) for probs, ids in zip(top.values, top.indices, strict=True)]
        return found[0] if hidden_state.ndim == 1 else found


class _Parts:
    """One module of every layer."""

    def __init__(self, model: StandardizedTransformer, name: str) -> None:
        self._model, self._name = model, name

    def __getitem__(self, layer: int) -> Any:
        return getattr(self._model.layers[layer], self._name)

    __call__ = __getitem__

    def __len__(self) -> int:
        return self._model.num_layers

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class _Patterns(LayerAccessor):
    """Attention probabilities, with what nnterp's accessor says of where they come from."""

    enabled = True

    def check_source(self, layer: int = 0, **_: Any) -> None:
        """Nothing: they were checked at load."""
        self.module(layer)

    def print_source(self, layer: int = 0, **_: Any) -> None:
        """Say where they are found."""
        try:
            where = type(self.module(layer)).__name__
        except NnatomyError as error:
            where = f"nowhere in layer {layer} ({error})"
        print(f"Attention probabilities of layer {layer}: what multiplies the values in {where}.")  # noqa: T201
