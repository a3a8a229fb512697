"""`StandardizedTransformer`: any Hugging Face causal language model under the standard names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from nnatomy.arch_configs import (
    ArchConfig,
    causal_lm,
    dimensions,
    example_inputs,
    has_decoder,
    input_device,
    main_input,
    needed,
    resolve,
    takes,
    text_config,
)
from nnatomy.core import ModuleView, Trace, Traceable
from nnatomy.core.attach import Point
from nnatomy.core.block import OpenBlocks
from nnatomy.core.gates import is_compiled
from nnatomy.errors import InputError, LayerIndexError, NotInThisModelError, NotReachedError
from nnatomy.standardized.accessors import LayerAccessor, check_fits
from nnatomy.standardized.attention import AttentionMode
from nnatomy.standardized.contributions import ATTENTIONS, MID, MIXERS, MLPS
from nnatomy.standardized.encoder import add_encoder
from nnatomy.standardized.head import NO_HEAD, Head
from nnatomy.standardized.inputs import Prompts, decoder_start, pad_token_id
from nnatomy.standardized.joined_prompts import JoinPrompts
from nnatomy.standardized.layers import LayerView, Views
from nnatomy.standardized.loading import load_model, load_tokenizer
from nnatomy.standardized.neurons import NEURONS
from nnatomy.standardized.prompt_trace import PromptTrace, RootInputs, positions_in, tokens_of
from nnatomy.standardized.routers import EXPERTS, LOGITS, WEIGHTS
from nnatomy.standardized.shown import Sums
from nnatomy.validation import looks_ahead, unverified, validate_shapes
from nnatomy.validation import validate as validate_model

Indices = int | Sequence[int] | Tensor | None


class StandardizedTransformer(Traceable):
    """A Hugging Face transformer, open to read and edit under the same names on any architecture.

    The accessors take a layer index (negative too, or a slice) inside a trace, and can be assigned:

    | accessor | value |
    |---|---|
    | `layers_input`, `layers_output` | the residual stream before and after a layer: (batch, seq, hidden) |
    | `attentions_input`, `attentions_output` | the attention module's own input and output |
    | `mlps_input`, `mlps_output` | the MLP module's own input and output |
    | `mixers_output` | the output of the token mixer of any kind: attention, mamba, convolution, ... |
    | `layers_mid` | the residual stream between token mixer and MLP: (batch, seq, hidden) |
    | `attentions_contribution`, `mixers_contribution`, `mlps_contribution` | what the layer adds to the stream for it, \
after all norms and multipliers; `layers_input` + the mixer's + the MLP's = `layers_output` |
    | `neurons` | what the MLP's down projection reads: (batch, seq, neuron) |
    | `routers_logits` | of a mixture of experts, before softmax or sigmoid: (batch, seq, expert) |
    | `routers_experts`, `routers_weights` | the experts chosen, and what multiplies what each gives: (batch, seq, choice) |
    | `queries`, `keys`, `values` | as the attention function gets them: (batch, head, seq, head_dim) |
    | `attention_scores` | what goes into the softmax: (batch, head, query, key) |
    | `attention_probabilities` | what multiplies the values: (batch, head, query, key) |
    | `heads_output` | what each head gives, before gates and projection: (batch, seq, head, value_dim) |
    | `cross_attentions_input`, `cross_attentions_output` | of a decoder's attention to its encoder: (batch, seq, hidden) |
    | `cross_attention_probabilities` | what it attends to: (batch, head, query, key), with a key for each position of the encoder |

    `layers[i]`, `layers[i].self_attn`, `layers[i].mlp`, `embed_tokens`, `ln_final` and `lm_head` are views
    of the modules; the model's own names work too: `model.transformer.h[3].attn.output`.

    Args:
        model: a hub id, a folder, `demo:gpt2` or `demo:llama`, or a loaded Hugging Face model, also
            one in a wrapper (a PEFT model): steps, prompts and logits are those of the model in it.
        tokenizer: a tokenizer, for a loaded model or in place of the id's own.
        arch_config: where the modules are, for an architecture that nnatomy does not know.
        validate: check at load that each standard name means what it promises. `"shapes"` checks the shapes alone, which
            a model on the meta device has too; False checks nothing. `validation` says what was found.
        allow_failures: load though a promise failed; the names that failed then refuse to be read.
        **kwargs: go to `from_pretrained`: dtype, device_map, revision, quantization_config,
            attn_implementation, trust_remote_code, ...

    Raises:
        LoadError: if the model cannot be loaded.
        InputError: if the model is compiled (torch.compile).
        UnknownArchitectureError: if no naming config fits it.
        ValidationError: if a standard name does not mean on it what it should; it says which, where and by how much.

    Attributes:
        validation: a table of each name on each layer: verified, refused or failed, with errors and reasons.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> with model.trace("The capital of France is"):
        ...     resid = model.layers_output[3]
        ...     pattern = model.attention_probabilities[4]
        ...     logits = model.logits
        >>> resid.shape, pattern.shape[-2:]
        (torch.Size([1, 5, 96]), torch.Size([5, 5]))
        >>> model.tokenizer.decode(logits[0, -1].argmax())
        ' Paris'
    """

    def __init__(
        self,
        model: str | Path | Module,
        tokenizer: Any = None,
        *,
        arch_config: ArchConfig | None = None,
        validate: bool | Literal["shapes"] = True,
        allow_failures: bool = False,
        **kwargs: Any,
    ) -> None:
        no_tokenizer = "pass one: StandardizedTransformer(model, tokenizer), or give token ids."
        if isinstance(model, Module):
            if kwargs:
                raise InputError(
                    f"{', '.join(kwargs)}: arguments of from_pretrained, but the model is already loaded."
                )
            hf_model = model
        else:
            hf_model = load_model(model, kwargs)
            if tokenizer is None:
                tokenizer, no_tokenizer = load_tokenizer(model, kwargs)
        if is_compiled(hf_model):
            raise InputError(
                "The model is compiled (torch.compile), so that nothing inside of it can be seen. Give the model as it was "
                "before: compiled = torch.compile(model) may be used beside StandardizedTransformer(model)."
            )
        super().__init__(hf_model)
        self.steps_of = causal = causal_lm(hf_model)
        anatomy = resolve(causal, arch_config)
        self._anatomy = anatomy
        self._head = Head(Traceable(causal), anatomy)
        self.tokenizer = tokenizer
        self.dimensions = dimensions(text_config(causal))
        self._prompts = Prompts(
            tokenizer,
            no_tokenizer,
            pad_token_id(tokenizer, causal.config),
            int(getattr(anatomy.embed_tokens, "num_embeddings", self.dimensions.vocab_size or 0)),
            takes(causal, "position_ids"),
            main_input(causal),
            decoder_start(causal) if has_decoder(causal) else None,
            needed(causal),
        )
        paths = {module: path for path, module in hf_model.named_modules()}
        self._layer_views = tuple(
            LayerView(self._blocks, layer, paths[layer], anatomy, i) for i, layer in enumerate(anatomy.layers)
        )
        self._blocks.example = partial(_example, causal, self.device)
        self._make_accessors()
        #: By the names that belong to no layer, why they are not to be had.
        self._refused: dict[str, str] = {}
        if anatomy.lm_head is None:
            self._refused |= dict.fromkeys(("logits", "lm_head"), NO_HEAD)
        if main_input(causal) != "input_ids" and not has_decoder(causal):
            why = f"the model reads no tokens but {main_input(causal)}"
            self._refused |= {"token_embeddings": why, "padding": why}
        self._causal: bool | None = None
        add_encoder(self, validate, allow_failures)
        if validate == "shapes":
            self.validation = validate_shapes(self)
        else:
            self.validation = validate_model(self, allow_failures) if validate else unverified(self)

    def _view_of(self, module: Module) -> ModuleView:
        return ModuleView(
            self._blocks, module, next(p for p, m in self.module.named_modules() if m is module)
        )

    #: Of an encoder-decoder's encoder; the plain names are the decoder's.
    encoder_layers_input: LayerAccessor
    encoder_layers_output: LayerAccessor
    encoder_attentions_input: LayerAccessor
    encoder_attentions_output: LayerAccessor
    encoder_mlps_input: LayerAccessor
    encoder_mlps_output: LayerAccessor
    encoder_queries: LayerAccessor
    encoder_keys: LayerAccessor
    encoder_values: LayerAccessor
    encoder_attention_scores: LayerAccessor
    encoder_attention_probabilities: LayerAccessor
    encoder_heads_output: LayerAccessor

    def _make_accessors(self) -> None:
        anatomy, blocks = self._anatomy, self._blocks
        parts: dict[str, tuple[Module | None, ...]]
        idle = anatomy.absent["layer"]
        ran = tuple(None if why else layer for layer, why in zip(anatomy.layers, idle, strict=True))
        parts = {"layers": ran, "attentions": anatomy.attentions, "mlps": anatomy.mlps}
        absent = {"layers": idle, "attentions": anatomy.absent["attention"], "mlps": anatomy.absent["mlp"]}

        def accessor(part: str, side: str) -> LayerAccessor:
            return LayerAccessor(f"{part}_{side}", parts[part], blocks, side, absent=absent.get(part, ()))

        parts["mixers"] = tuple(one[0] if len(one) == 1 else None for one in anatomy.mixers)
        absent["mixers"] = tuple(
            f"it has several token mixers ({kinds})" if several else why or "it mixes no tokens"
            for several, kinds, why in zip(anatomy.mixers, anatomy.kinds, idle, strict=True)
        )
        self.layers_input = accessor("layers", "input")
        self.layers_output = accessor("layers", "output")
        self.attentions_input = accessor("attentions", "input")
        self.attentions_output = accessor("attentions", "output")
        self.mlps_input = accessor("mlps", "input")
        self.mlps_output = accessor("mlps", "output")
        self.mixers_output = accessor("mixers", "output")
        self._sums = Sums(anatomy, blocks, self.hidden_size)
        self.layers_mid = self._sums.accessors[MID]
        self.attentions_contribution = self._sums.accessors[ATTENTIONS]
        self.mixers_contribution = self._sums.accessors[MIXERS]
        self.mlps_contribution = self._sums.accessors[MLPS]
        self.neurons = self._sums.accessors[NEURONS]
        self.routers_logits = self._sums.accessors[LOGITS]
        self.routers_weights = self._sums.accessors[WEIGHTS]
        self.routers_experts = self._sums.accessors[EXPERTS]
        tap = partial(AttentionMode, self.dimensions.num_heads)

        def inside(name: str, kind: str = "", **places: Any) -> LayerAccessor:
            return LayerAccessor(
                name,
                blocks=blocks,
                kind=kind or name,
                get=lambda value: value,
                put=lambda _, new: new,
                tap=tap,
                **(places or {"modules": anatomy.attentions, "absent": absent["attentions"]}),
                unreached="A fused attention kernel never holds it: load the model with "
                "attn_implementation='sdpa' or 'eager'.",
            )

        self.queries = inside("queries")
        self.keys = inside("keys")
        self.values = inside("values")
        self.attention_scores = inside("attention_scores")
        self.attention_probabilities = inside("attention_probabilities")
        self.heads_output = inside("heads_output")
        crossing = anatomy.cross_attentions if any(anatomy.cross_attentions) else ()
        places: dict[str, Any] = {
            "modules": crossing,
            "absent": ("it has no one cross-attention",) * len(crossing),
            "none": "no layer attends to an encoder",
        }
        self.cross_attentions_input, self.cross_attentions_output = (
            LayerAccessor(f"cross_attentions_{side}", blocks=blocks, kind=side, **places)
            for side in ("input", "output")
        )
        self.cross_attention_probabilities = inside(
            "cross_attention_probabilities", "attention_probabilities", **places
        )

    # What it is.

    @property
    def hf_model(self) -> Any:
        """The Hugging Face model itself."""
        return self.module

    @property
    def config(self) -> Any:
        """The Hugging Face model's config."""
        return self.hf_model.config

    @property
    def device(self) -> torch.device:
        """Where the token embedding is, and so where prompts go."""
        return input_device(self._anatomy.embed_tokens)

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
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
        size = getattr(self.dimensions, name)
        if size is None:
            raise NotInThisModelError(
                f"{name}: the config of {type(self.steps_of).__name__} has no one number for it: there are no attention "
                "heads, or they vary from layer to layer."
            )
        return int(size)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return self.dimensions.hidden_size

    @property
    def vocab_size(self) -> int:
        """How many tokens the model can predict."""
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
        if self._causal is None:
            self._causal = not looks_ahead(self)
        return self._causal

    def _check_refused(self, name: str) -> None:
        if name in self._refused:
            raise NotInThisModelError(f"{name}: {self._refused[name]}.")

    @property
    def takes_padding(self) -> bool:
        """Whether prompts of unequal length may be in one batch: not where validation saw the padding in the values."""
        return not self._prompts.no_padding

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The token mixers of each layer: "attention", "mamba", "attention + mamba", "none", ..."""
        return self._anatomy.kinds

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have an attention."""
        return tuple(i for i, module in enumerate(self._anatomy.attentions) if module is not None)

    @property
    def layers(self) -> tuple[LayerView, ...]:
        """The layers; `layers[i].self_attn` and `layers[i].mlp` are their attention and MLP."""
        return self._layer_views

    @property
    def attentions(self) -> Views:
        """The attention modules: `attentions[i]` is `layers[i].self_attn`."""
        return Views(self._layer_views, "self_attn")

    @property
    def mlps(self) -> Views:
        """The MLP modules: `mlps[i]` is `layers[i].mlp`."""
        return Views(self._layer_views, "mlp")

    def __repr__(self) -> str:
        return (
            f"<StandardizedTransformer: {type(self.hf_model).__name__}, {self.num_layers} layers, "
            f"hidden {self.hidden_size}, {self.dimensions.num_heads or 'no one number of'} heads, on {self.device}"
            f"{'' if self.validation.counts['verified'] else ', not validated'}>"
        )

    # Running it.

    def __call__(self, prompts: Any = None, **kwargs: Any) -> Any:
        """Run the model on prompts, with its lasting edits if it has any; returns what the Hugging Face model returns."""
        inputs = self.prepare(prompts, **kwargs)
        return self.trace(**inputs).run() if self.edits else self.hf_model(**inputs)

    def prepare(self, prompts: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The arguments that `prompts` (see `trace`) give to the model's forward.

        Returns:
            `input_ids` and `attention_mask` of (batch, seq); `position_ids` too where a batch is padded.
        """
        return self._prompts.prepare(prompts, kwargs, self.device)

    def trace(  # type: ignore[override]
        self, prompts: Any = None, *, early_stop: bool = True, **kwargs: Any
    ) -> Trace:
        """Trace one forward pass: `with model.trace(prompts) as tracer: ...`.

        Without prompts, for several blocks with prompts of their own on one pass: see `Trace.invoke`.

        Args:
            prompts: a string; a chat (a list of dicts with role and content); token ids (a list or 1-D
                tensor); a list of these; a 2-D tensor of ids; or a dict with `input_ids`. Batches are
                padded on the left, so that `[:, -1]` is each prompt's last token.
            early_stop: cancel the forward pass when the block ends. With PEFT's `adapter_names`, give False: it
                takes back what they put on the model only if the call returns.
            **kwargs: go to the model's forward.

        Raises:
            InputError: if there is nothing to run, or the prompts cannot be run on this model.
        """
        return self._trace(lambda inputs: partial(self.hf_model, **inputs), prompts, early_stop, kwargs)

    def generate(self, prompts: Any = None, *, early_stop: bool = True, **kwargs: Any) -> Trace:
        """Trace a generation: `with model.generate(prompts, max_new_tokens=5) as tracer: ...`.

        In `for step in tracer.iter[:]:` names mean that step's forward pass. With the KV cache, step 0
        sees the prompt, and each later one the newest token alone. `tracer.result` is what the model's
        `generate` returns; `model.generate(...).run()` generates with no block.

        Args:
            prompts, early_stop: as in `trace`.
            **kwargs: go to the model's `generate`.
        """

        started = "decoder_input_ids" in {**(prompts if isinstance(prompts, Mapping) else {}), **kwargs}

        def call(inputs: dict[str, Any]) -> Callable[[], Any]:
            inputs.pop("position_ids", None)  # generate makes its own, for every step
            if not started:
                inputs.pop("decoder_input_ids", None)
            if getattr(self.hf_model.generation_config, "pad_token_id", None) is None:
                inputs.setdefault("pad_token_id", self._prompts.pad_token_id)
            return partial(self.hf_model.generate, **inputs)

        return self._trace(call, prompts, early_stop, kwargs)

    def _trace(
        self,
        call: Callable[[dict[str, Any]], Callable[[], Any]],
        prompts: Any,
        early_stop: bool,
        kwargs: dict[str, Any],
    ) -> Trace:
        if prompts is not None or self._prompts.read(kwargs):
            return PromptTrace(self, call(self.prepare(prompts, **kwargs)), early_stop=early_stop)
        joining = JoinPrompts(
            self.hf_model,
            self.prepare,
            lambda inputs: call({**inputs, **kwargs}),
            self._prompts,
        )
        return PromptTrace(self, lambda: self.prepare(**kwargs), early_stop=early_stop, joining=joining)

    def scan(  # type: ignore[override]
        self, prompts: Any = None, *, early_stop: bool = True, **kwargs: Any
    ) -> Trace:
        """A trace over fake tensors: shapes without computing, also of a model on the meta device."""
        return super().scan(early_stop=early_stop, **self.prepare(prompts, **kwargs))

    # Values of a trace that belong to no layer.

    @property
    def input_ids(self) -> Int[Tensor, "batch seq"]:
        """The token ids of the prompts, padded on the left (of the newest tokens, in a later step)."""
        return self._root_input("input_ids")

    @property
    def attention_mask(self) -> Int[Tensor, "batch seq"]:
        """1 for the prompts' tokens, 0 for padding; in a later step of a generation those of the earlier ones too."""
        arguments, length = self._root_inputs("attention_mask")
        tokens = tokens_of(arguments)
        if arguments.get("attention_mask") is not None or tokens is None:
            return self._root_input("attention_mask")
        return torch.ones(
            len(tokens), length, dtype=torch.long, device=tokens.device
        )  # generate leaves it out then

    @property
    def input_size(self) -> torch.Size:
        """(batch, seq)."""
        return self.input_ids.shape

    def _root_input(self, name: str) -> Any:
        arguments, _ = self._root_inputs(name)
        value = arguments.get(name)
        if value is None:
            given = ", ".join(key for key, one in arguments.items() if one is not None)
            raise NotReachedError(f"The model was called without {name}; it was given {given}.")
        return value

    def _root_inputs(self, name: str) -> tuple[dict[str, Any], int]:
        """The arguments of the model's forward in this step, and how many positions there are with the earlier steps'."""
        block = self._blocks.current(name)
        recorded = next((c for c in block.run.collectors if isinstance(c, RootInputs)), None)
        if recorded is None or recorded.slot is None or block.step != recorded.slot.step:
            slot = block.reach(self.steps_of, "input", name)
        else:
            slot = block.peek(recorded.slot)
        arguments = slot.value[1]
        first = 0 if recorded is None else recorded.length  # 0 where the first step is just being asked
        return arguments, (first or positions_in(arguments)) + slot.step

    @property
    def token_embeddings(self) -> Float[Tensor, "batch seq hidden"]:
        """What the token embedding gives, before positions; can be assigned."""
        self._check_refused("token_embeddings")
        return self.embed_tokens.output

    @token_embeddings.setter
    def token_embeddings(self, value: Tensor) -> None:
        self._check_refused("token_embeddings")
        slot = self._blocks.current("token_embeddings").reach(
            self._anatomy.embed_tokens, "output", "token_embeddings"
        )
        check_fits("token_embeddings", slot.value, value)
        slot.value = value

    @property
    def logits(self) -> Float[Tensor, "batch seq vocab"]:
        """The model's logits, after all caps and scales; can be assigned."""
        self._check_refused("logits")
        return self._blocks.current("logits").reach(self.steps_of, "output", "logits").value.logits

    @logits.setter
    def logits(self, value: Tensor) -> None:
        self._check_refused("logits")
        slot = self._blocks.current("logits").reach(self.steps_of, "output", "logits")
        check_fits("logits", slot.value.logits, value)
        slot.value.logits = value

    @property
    def next_token_probs(self) -> Float[Tensor, "batch vocab"]:
        """The probabilities of the token after each prompt."""
        return self.logits[:, -1].softmax(-1)

    # Edits.

    def skip_layer(self, layer: int, skip_with: Float[Tensor, "batch seq hidden"] | None = None) -> None:
        """Do not run `layer`: its output is `skip_with`, or its input if that is None."""
        self.skip_layers(layer, layer, skip_with)

    def skip_layers(
        self, start_layer: int, end_layer: int, skip_with: Float[Tensor, "batch seq hidden"] | None = None
    ) -> None:
        """Do not run the layers from `start_layer` to `end_layer`, both included.

        Args:
            skip_with: what they give; the input of `start_layer` if None.
        """
        first, last = (range(self.num_layers)[self._checked(layer)] for layer in (start_layer, end_layer))
        if first > last:
            raise LayerIndexError(f"skip_layers({start_layer}, {end_layer}): no layers lie between these.")
        if skip_with is None:
            skip_with = self.layers_input[first]
        for i in range(first, last + 1):
            if self._anatomy.absent["layer"][i]:
                self._checked(i)  # raises: it would not come
            layer = self._anatomy.layers[i]
            form = self._head.in_form(layer, skip_with)
            self._blocks.current("skip_layers").reach(layer, "input", f"skip_layers of layer {i}").skip(form)

    def _checked(self, layer: int) -> int:
        self.layers_input.module(layer)
        return layer

    def steer(
        self,
        layers: int | Sequence[int],
        steering_vector: Float[Tensor, "*broadcast hidden"],
        factor: float = 1.0,
        token_positions: Indices = None,
        batch_index: Indices = None,
    ) -> None:
        """Add `factor * steering_vector` to the output of layers (activation addition, Turner et al. 2023).

        Args:
            layers: one or several; they are steered in the order of the forward pass.
            steering_vector: of (hidden), or anything that broadcasts to the chosen (batch, seq, hidden).
            token_positions: which positions (all by default). Batches are padded on the left: count from
                the end, -1 is each prompt's last token.
            batch_index: which prompts (all by default). Where both are sequences they are taken in pairs,
                as in `tensor[batch_index, token_positions]`.

        Raises:
            InputError: if the vector is not as wide as the stream.
            LayerIndexError: for a layer that there is not.
        """
        if steering_vector.shape[-1:] != (self.hidden_size,):
            raise InputError(
                f"The steering vector is of shape {tuple(steering_vector.shape)}, the model's residual stream of width "
                f"{self.hidden_size}."
            )
        each = [layers] if isinstance(layers, int) else list(layers)
        for layer in sorted(range(self.num_layers)[self._checked(i)] for i in each):
            hidden = self.layers_output[layer].clone()
            where = (
                slice(None) if batch_index is None else batch_index,
                slice(None) if token_positions is None else token_positions,
            )
            hidden[where] += factor * steering_vector.to(hidden)
            self.layers_output[layer] = hidden

    def _point(self, point: str | ModuleView) -> Point:
        match = re.fullmatch(r"(\w+)\[(-?\d+)\]", point) if isinstance(point, str) else None
        accessor = getattr(self, match[1], None) if match else None
        if match is None or not isinstance(accessor, LayerAccessor):
            return super()._point(point)
        return accessor.point(int(match[2]))

    # The head.

    def project_on_vocab(self, hidden_state: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """The logits that the model would give, were `hidden_state` the last layer's output.

        Exact: with the final norm, and every cap, scale and projection of the model's own.
        """
        if hidden_state.shape[-1] != self.hidden_size:
            raise InputError(
                f"project_on_vocab takes hidden states of width {self.hidden_size}; "
                f"got {tuple(hidden_state.shape)}."
            )
        return self._head(hidden_state)

    def get_topk_closest_tokens(
        self, hidden_state: Float[Tensor, "*rows hidden"], k: int = 5
    ) -> dict[str, float] | list[dict[str, float]]:
        """The `k` most probable tokens of `project_on_vocab(hidden_state)`, with their probabilities.

        Args:
            hidden_state: of (hidden), or of (rows, hidden) for a list of results.
        """
        if hidden_state.ndim not in (1, 2):
            raise InputError(f"hidden_state is (hidden) or (rows, hidden); got {tuple(hidden_state.shape)}.")
        if self.tokenizer is None:
            raise InputError(
                "Tokens have names only with a tokenizer: StandardizedTransformer(model, tokenizer)."
            )
        top = self.project_on_vocab(hidden_state).softmax(-1).topk(k, dim=-1)
        rows = [
            dict(zip(self.tokenizer.convert_ids_to_tokens(ids), probs, strict=True))
            for ids, probs in zip(
                top.indices.reshape(-1, k).tolist(), top.values.reshape(-1, k).tolist(), strict=True
            )
        ]
        return rows[0] if hidden_state.ndim == 1 else rows


def _example(hf_model: Any, device: torch.device, blocks: OpenBlocks) -> Trace:
    """A trace of a short prompt, without gradients."""
    inputs = example_inputs(hf_model, 1, 3, device)
    return Trace(ModuleView(blocks, hf_model, ""), torch.no_grad()(lambda: hf_model(**inputs)))
