"""What a model is: its modules, its sizes and its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from nnatomy.arch_configs import Anatomy, Dimensions, Shards, input_device
from nnatomy.errors import InputError, ModelChangedError, NotInThisModelError
from nnatomy.parallel import Ranks, Split
from nnatomy.standardized.facts import Facts
from nnatomy.standardized.head import Head
from nnatomy.standardized.inputs import Prompts
from nnatomy.standardized.keywords import Keywords
from nnatomy.standardized.layers import LayerView, Views
from nnatomy.tracing import ModuleView, Traceable
from nnatomy.validation.looks_ahead import looks_ahead


class Parts(Traceable):
    """A Hugging Face model whose standard modules have been found."""

    dimensions: Dimensions
    validation: Any
    _anatomy: Anatomy
    _head: Head
    _shards: Shards
    #: The processes that the model is split over, and what each has a part of; None for a model of one process.
    _ranks: Ranks | None
    _split: Split | None
    _prompts: Prompts
    _tokenizer: Any
    _keywords: Keywords
    _layer_views: tuple[LayerView, ...]
    _causal: bool | None
    #: By the names that belong to no layer, why they are not to be had.
    _refused: dict[str, str]
    #: What the names were found on; None while they are being found.
    _facts: Facts | None
    #: What it was loaded by; None for a model that was given loaded.
    _name: str | None = None
    #: The address and the API key of the server that `trace(..., remote=True)` sends a trace to; by default those of the
    #: environment, NNATOMY_SERVER and NNATOMY_API_KEY.
    server: Any = None
    api_key: str | None = None
    #: The connection to it, once there is one: see `nnatomy.remote.sending`.
    _sender: Any = None

    @property
    def hf_model(self) -> Any:
        """The Hugging Face model itself."""
        return self.module

    @property
    def tokenizer(self) -> Any:
        """What makes tokens of text, or None. Another one may be assigned: this view takes it from then on.

        Raises:
            InputError: if what is assigned is no tokenizer.
        """
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        if not (tokenizer is None or callable(tokenizer)):
            raise InputError(
                f"model.tokenizer = {tokenizer!r}: it is a tokenizer, as AutoTokenizer.from_pretrained(...) gives, or None."
            )
        self._tokenizer = tokenizer
        if "_prompts" in self.__dict__:  # else the model is being read for the first time
            config: Any = self.steps_of.config
            self._prompts = self._prompts.with_tokenizer(tokenizer, config, self.dimensions.vocab_size)

    @property
    def config(self) -> Any:
        """The Hugging Face model's config."""
        return self.hf_model.config

    @property
    def device(self) -> torch.device:
        """Where the token embedding is, and so where prompts go."""
        return input_device(self._anatomy.embed_tokens)

    def _check_current(self) -> None:
        """Raise ModelChangedError if the model is not what the names were found on."""
        if self._facts is not None and (what := self._facts.changed()):
            raise ModelChangedError(
                f"The model has changed since its names were found and checked: {what}. Have it looked at again: "
                "model.refresh(), or StandardizedTransformer(model.hf_model, model.tokenizer)."
            )

    def _check_outside(self) -> None:
        """The same, but in a trace, which has begun with it."""
        if not self._blocks.is_open_here:
            self._check_current()

    def _block_is_over(self, well: bool) -> None:
        """A block of one of its traces is; `well`: without an exception. (A remote model brings the values here.)"""

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        self._check_outside()
        return len(self._anatomy.layers)

    @property
    def num_heads(self) -> int:
        """How many query heads a layer has."""
        return self._size("num_heads")

    @property
    def num_kv_heads(self) -> int:
        """How many key and value heads a layer has."""
        return self._size("num_kv_heads")

    @property
    def head_dim(self) -> int:
        """The size of one query or key head."""
        return self._size("head_dim")

    def _size(self, name: str) -> int:
        self._check_outside()
        size = getattr(self.dimensions, name)
        if size is None:
            raise NotInThisModelError(
                f"{name}: {type(self.steps_of).__name__} has no one number for it: there are no attention heads, they vary "
                "from layer to layer, or neither its attentions show it nor its config says it."
            )
        return int(size)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        self._check_outside()
        return self.dimensions.hidden_size

    @property
    def vocab_size(self) -> int:
        """How many tokens the model can predict."""
        self._check_outside()
        if self.dimensions.vocab_size is None:
            raise NotInThisModelError(f"vocab_size: the config of {type(self.steps_of).__name__} has none.")
        return self.dimensions.vocab_size

    @property
    def ln_final(self) -> ModuleView:
        """The norm that reads what the last layer gives. Raises NotInThisModelError if there is none."""
        self._check_refused("ln_final")
        if self._anatomy.ln_final is None:
            raise NotInThisModelError(
                "ln_final: no norm reads what the last layer gives: the layers end with one, or the head is more than a "
                "norm and a matrix. project_on_vocab has all of it."
            )
        return self._view_of(self._anatomy.ln_final)

    @property
    def embed_tokens(self) -> ModuleView:
        """The token embedding. Raises NotInThisModelError if the model reads no tokens."""
        self._check_outside()
        if self._anatomy.embed_tokens is self.steps_of:
            self._check_refused("token_embeddings")
        return self._view_of(self._anatomy.embed_tokens)

    @property
    def lm_head(self) -> ModuleView:
        """The unembedding. Raises NotInThisModelError if there is none."""
        self._check_refused("lm_head")
        assert self._anatomy.lm_head is not None
        return self._view_of(self._anatomy.lm_head)

    @property
    def causal(self) -> bool:
        """Whether no position depends on a later one, of the layers as the model runs them: seen in two forward passes."""
        self._check_outside()
        if self._causal is None:
            self._causal = not looks_ahead(self)
        return self._causal

    def _check_refused(self, name: str) -> None:
        self._check_outside()
        if name in self._refused:
            raise NotInThisModelError(f"{name}: {self._refused[name]}.")

    @property
    def takes_padding(self) -> bool:
        """Whether prompts of unequal length may be in one batch: not where validation saw the padding in the values."""
        self._check_outside()
        return not self._prompts.no_padding

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The token mixers of each layer: "attention", "mamba", "attention + mamba", "none", ..."""
        self._check_outside()
        return self._anatomy.kinds

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have an attention."""
        self._check_outside()
        return tuple(i for i, module in enumerate(self._anatomy.attentions) if module is not None)

    @property
    def layers(self) -> tuple[LayerView, ...]:
        """The layers; `layers[i].self_attn` and `layers[i].mlp` are their attention and MLP."""
        self._check_outside()
        return self._layer_views

    @property
    def attentions(self) -> Views:
        """The attention modules: `attentions[i]` is `layers[i].self_attn`."""
        return Views(self.layers, "self_attn")

    @property
    def mlps(self) -> Views:
        """The MLP modules: `mlps[i]` is `layers[i].mlp`."""
        return Views(self.layers, "mlp")

    def __repr__(self) -> str:
        return (
            f"<StandardizedTransformer: {type(self.hf_model).__name__}, {self.num_layers} layers, "
            f"hidden {self.hidden_size}, {self.dimensions.num_heads or 'no one number of'} heads, on {self.device}"
            f"{'' if self.validation.counts['verified'] else ', not validated'}>"
        )

    def _view_of(self, module: Module) -> ModuleView:
        return ModuleView(self._blocks, module, next(p for p, m in self.module.named_modules() if m is module))
