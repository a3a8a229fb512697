"""`StandardizedTransformer`: any Hugging Face causal language model under the standard names."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.arch_configs import (
    Anatomy,
    ArchConfig,
    Shards,
    accepts,
    cache_name,
    causal_lm,
    dimensions,
    example_inputs,
    has_decoder,
    main_input,
    needed,
    resolve,
    rows_of,
    takes,
    text_config,
)
from nnatomy.core.gates import is_compiled
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.errors import AssignmentError, InputError, LoadError, NoSuchModuleError, UsageError
from nnatomy.names import ROWS
from nnatomy.parallel import Split
from nnatomy.parallel.ranks import ranks_of
from nnatomy.standardized.accessors import LayerAccessor
from nnatomy.standardized.asked_for import check_arguments, check_model
from nnatomy.standardized.context_length import ContextLength
from nnatomy.standardized.edits import Edits
from nnatomy.standardized.elsewhere import Elsewhere, said_of
from nnatomy.standardized.encoder import add_encoder
from nnatomy.standardized.facts import Facts
from nnatomy.standardized.head import NO_HEAD, Head
from nnatomy.standardized.inputs import Prompts
from nnatomy.standardized.keywords import Keywords
from nnatomy.standardized.layers import LayerView, LayerViews
from nnatomy.standardized.loading import SHARED, load_model, load_tokenizer
from nnatomy.standardized.pickling import NotPickled
from nnatomy.standardized.prompt_texts import PromptTexts
from nnatomy.standardized.reading import Reading
from nnatomy.standardized.special_tokens import decoder_start, pad_token_id, padding_token_id
from nnatomy.standardized.values import Values
from nnatomy.standardized.vision import Vision
from nnatomy.standardized.weights import Weights
from nnatomy.tracing import ModuleView, Trace, Traceable
from nnatomy.tracing.attach import Attachment
from nnatomy.validation import unverified, validate_shapes
from nnatomy.validation import validate as validate_model
from nnatomy.weights import Found as FoundWeights

if TYPE_CHECKING:
    from nnatomy.plans import Plan

Own = TypeVar("Own", bound="StandardizedTransformer")


class StandardizedTransformer(NotPickled, Reading, PromptTexts, Vision, Values, Weights, Edits):
    """A Hugging Face transformer, open to read and edit under the same names on any architecture.

    The accessors take a layer index (negative too, or a slice) inside a trace, and can be assigned:

    | accessor | value |
    |---|---|
    | `layers_input` | (batch, seq, hidden): the residual stream before the layer |
    | `layers_output` | (batch, seq, hidden): the residual stream after the layer |
    | `attentions_input` | (batch, seq, hidden): what the attention module is given |
    | `attentions_output` | (batch, seq, hidden): what the attention module gives |
    | `mlps_input` | (batch, seq, hidden): what the MLP module is given |
    | `mlps_output` | (batch, seq, hidden): what the MLP module gives |
    | `mixers_output` | (batch, seq, hidden): what the token mixer of any kind gives: attention, mamba, convolution, ... |
    | `layers_mid` | (batch, seq, hidden): the residual stream between token mixer (or cross-attention) and MLP |
    | `attentions_contribution` | (batch, seq, hidden): what its attention adds to the stream, behind norms and multipliers |
    | `mixers_contribution` | (batch, seq, hidden): the same for all its token mixers; input + this + the MLP's = output |
    | `cross_attentions_contribution` | (batch, seq, hidden): the same for its attention to an encoder: one more summand |
    | `mlps_contribution` | (batch, seq, hidden): the same for its MLP, whether or not one module is the MLP |
    | `queries` | (batch, head, query, head_dim): queries as the attention function gets them |
    | `keys` | (batch, kv_head, key, head_dim): keys as the attention function gets them |
    | `values` | (batch, kv_head, key, value_dim): values as the attention function gets them |
    | `attention_scores` | (batch, head, query, key): what goes into the softmax |
    | `attention_probabilities` | (batch, head, query, key): what multiplies the values |
    | `values_weighted` | (batch, head, query, key, value_dim): the values times the pattern, before the sum over keys |
    | `heads_output` | (batch, seq, head, value_dim): what each head gives, before gates and output projection |
    | `time_steps` | (batch, seq, step): how far a recurrent mixer goes on at each position: what a softplus gives |
    | `mixer_gates` | (batch, seq, gate): what multiplies a recurrent mixer's values before its output projection |
    | `conv_states` | (batch, seq, input, width): the newest inputs of a mixer's convolution (or token shift) after each position |
    | `ssm_states` | (batch, seq, ssm_head, channel, state): the state of a recurrent mixer after each position, as its cache has it |
    | `ssm_normalizers` | (batch, seq, ssm_head, channel): what a state is divided by when it is read: the sum of its weights |
    | `ssm_stabilizers` | (batch, seq, ssm_head, scale): the logarithm of what a state and its normalizer are to be multiplied with |
    | `routers_logits` | (batch, seq, expert): of a mixture of experts, before softmax or sigmoid |
    | `routers_experts` | (batch, seq, choice): the indices of the experts chosen |
    | `routers_weights` | (batch, seq, choice): what multiplies the output of each expert chosen |
    | `neurons` | (batch, seq, neuron): what the MLP's down projection reads |
    | `cross_attentions_input` | (batch, seq, hidden): what the attention to an encoder is given |
    | `cross_attentions_output` | (batch, seq, hidden): what the attention to an encoder gives |
    | `cross_attention_probabilities` | (batch, head, query, key): what it attends to: keys are the encoder's positions |

    `layers[i]`, `layers[i].self_attn`, `layers[i].mlp`, `embed_tokens`, `ln_final` and `lm_head` are views
    of the modules; the model's own names work too: `model.transformer.h[3].attn.output`.

    Args:
        model: a hub id, a folder, `demo:gpt2`, `demo:llama` or `demo:smollm2`, or a loaded Hugging Face model, also
            one in a wrapper (a PEFT model): steps, prompts and logits are those of the model in it.
        tokenizer: a tokenizer, or its id or folder, for a loaded model or in place of the id's own. Batches are padded on the
            left, whatever it says of that when it is given; its `padding_side` counts once it is changed.
        processor: what reads images (videos, sound) for a model that takes them, as AutoProcessor gives; of a model given by its
            id, its own is loaded when it is needed. Its tokenizer is the model's, if no other is given.
        arch_config: where the modules are, for an architecture that nnatomy does not know.
        validate: check at load that each standard name means what it promises. `"shapes"` checks the shapes alone, which
            a model on the meta device has too; False checks nothing. `validation` says what was found.
        allow_failures: load though a promise failed; the names that failed then refuse to be read.
        server: the address of a server that has the model (`nnatomy serve`), by which everything is run: no weights are here.
            By default what NNATOMY_SERVER says, if it says one; see docs/remote.md.
        api_key: the server's key; by default what NNATOMY_API_KEY says.
        engine: "vllm" to have vLLM run the model: what is given is then an `nnatomy.vllm.VllmTransformer`, and all other arguments
            are those of `vllm.LLM`; see docs/vllm.md. None: Transformers runs it.
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

    if not TYPE_CHECKING:  # to type checkers a model that lives elsewhere, or on an engine, is one of these

        def __new__(
            cls,
            model: Any = None,
            tokenizer: Any = None,
            *,
            server: str | None = None,
            engine: str | None = None,
            **kwargs: Any,
        ) -> Any:
            if engine is not None:
                if server is not None:
                    raise InputError(
                        "server=..., engine=...: a server says itself what runs its models. Give one of the two."
                    )
                if kwargs.get("distributed_executor_backend") == "mp":
                    from nnatomy.vllm.process import in_another_process

                    return in_another_process(model, tokenizer, engine, kwargs)
                from nnatomy.vllm import VllmTransformer

                return VllmTransformer(model, tokenizer, engine=engine, **kwargs)
            if (
                cls is StandardizedTransformer
                and isinstance(model, (str, Path))
                and (server or os.environ.get("NNATOMY_SERVER"))
            ):
                from nnatomy.remote.model import new_at_server

                return new_at_server(model, tokenizer, server=server, **kwargs)
            return object.__new__(cls)

    if not TYPE_CHECKING:
        from_pretrained = Elsewhere()

    def __init__(
        self,
        model: str | Path | Module,
        tokenizer: Any = None,
        *,
        processor: Any = None,
        arch_config: ArchConfig | None = None,
        validate: bool | Literal["shapes"] = True,
        allow_failures: bool = False,
        server: str | None = None,
        api_key: str | None = None,
        engine: str | None = None,  # noqa: ARG002 (`__new__` has taken it)
        **kwargs: Any,
    ) -> None:
        if server is not None or api_key is not None:
            raise InputError(
                "server=..., api_key=...: they are for a model given by its name, which a server has loaded."
            )
        if validate not in (True, False, "shapes"):
            raise InputError(f"validate={validate!r}: it is True, False or 'shapes'.")
        if not (tokenizer is None or isinstance(tokenizer, (str, Path)) or callable(tokenizer)):
            raise InputError(
                f"tokenizer={tokenizer!r}: it is a tokenizer, or its id or folder. All other arguments are given by name."
            )
        if tokenizer is None and processor is not None:
            tokenizer = getattr(processor, "tokenizer", None)
        if not (arch_config is None or isinstance(arch_config, ArchConfig)):
            raise InputError(f"arch_config={arch_config!r}: it is an nnatomy.ArchConfig(layers=..., ...).")
        check_model(model)
        no_tokenizer = "pass one: StandardizedTransformer(model, tokenizer), or give token ids."
        if isinstance(model, Module):
            if kwargs:
                raise InputError(f"{', '.join(kwargs)}: arguments of from_pretrained, but the model is already loaded.")
            hf_model = model
            if not hasattr(hf_model, "config"):
                raise InputError(
                    f"{type(hf_model).__name__} is no Hugging Face model: it has no config. To look into any torch.nn.Module, "
                    "without the standard names, take nnatomy.Traceable(module)."
                )
        else:
            check_arguments(kwargs)
            hf_model = load_model(model, kwargs)
            if tokenizer is None:
                tokenizer, no_tokenizer = load_tokenizer(model, kwargs)
        if isinstance(tokenizer, (str, Path)):
            place, (tokenizer, why) = tokenizer, load_tokenizer(tokenizer, kwargs)
            if tokenizer is None:
                raise LoadError(f"The tokenizer {str(place)!r} could not be loaded: {why}")
        if is_compiled(hf_model):
            raise InputError(
                "The model is compiled (torch.compile), so that nothing inside of it can be seen. Give the model as it was "
                "before: compiled = torch.compile(model) may be used beside StandardizedTransformer(model)."
            )
        super().__init__(hf_model)
        self._processor = processor
        self._processor_options = {name: kwargs[name] for name in SHARED if name in kwargs}
        self._name = None if isinstance(model, Module) else str(model)
        self.tokenizer = tokenizer
        self._options = no_tokenizer, arch_config, validate, allow_failures
        self._read()

    def refresh(self: Own) -> Own:
        """Find and check all names again, as at load: after the model itself has been changed.

        That is after its embedding has been resized, or a module, an adapter, a dtype, a config's field or the
        implementation of attention is another one: until then whatever would use a name raises ModelChangedError. Weights
        may take other values at any time. Other views of the same model (`edit`, `attach`) are refreshed by themselves:
        their edits stay, and attached modules are put at the points of the same names.

        Returns:
            The view itself.

        Raises:
            UsageError: in a trace of the model.
            LayerIndexError, NotInThisModelError: where a module is attached at a point that is no more.
            ModelError: as at load; the view is then as it was.

        Example:
            >>> from torch.nn import Linear
            >>> from nnatomy import StandardizedTransformer
            >>> model = StandardizedTransformer("demo:gpt2")
            >>> model.hf_model.lm_head = Linear(model.hidden_size, 100)
            >>> model.refresh().vocab_size
            100
        """
        if self._blocks.is_open_here:
            raise UsageError("refresh() is called outside of traces: it runs the model.")
        new = self.without_edits()
        new._read()
        for edit in self.edits:
            if isinstance(edit, Attachment):
                point, takes = edit.point.name, edit.takes_point.name
                how: Any = edit.how
                new = new.attach(point, edit.module, how=how, takes=takes, name=edit.name)
            else:
                new = new.edit(edit)
        self.__dict__.update(new.__dict__)
        self.edits, self.steps_of = new.edits, new.steps_of
        return self

    @overload
    def record(
        self, block: Callable[[], Any] | StandardizedTransformer, prompt: Any = None, *, any_prompt: bool = True
    ) -> Plan: ...

    @overload
    def record(
        self, block: Any = None, prompt: Any = None, *, any_prompt: bool = True
    ) -> AbstractContextManager[Plan]: ...

    def record(self, block: Any = None, prompt: Any = None, *, any_prompt: bool = True) -> Any:
        """What a block does, as data: a `Plan`, which is saved, looked at, and applied to this model or another.

        The block is run on the prompt, on another one, and in the steps of a generation; so what it does besides is done
        several times. The plan means what it does to each prompt alone, in each step, as a lasting edit (`edit`) does.

        Args:
            block: a function without arguments that reads and assigns as a block does; or an edited view of this model, for its
                edits. None, or a prompt, for a block: `with model.record(prompt) as plan: ...`, whose body is taken from the source.
                On an edited view, its edits are recorded before it.
            prompt: one prompt; a sentence if None.
            any_prompt: refuse what is true for the prompt alone. With False the plan is for that prompt, in one forward pass.

        Returns:
            The plan; see `nnatomy.plans.Plan`.

        Raises:
            PlanError: if the block changes nothing, does what is true for the prompt alone (it is decided by values, or made of the
                prompt's length), draws random numbers, or calls what no plan may have; with the line of the block.
            InputError: for several prompts.
            UsageError: in a trace of the model.
            CaptureError: if the body cannot be had from the source.
        """
        from nnatomy.plans.record import record

        return record(self, block, prompt, any_prompt)

    def _read(self) -> None:
        """Find the names, and check them."""
        no_tokenizer, arch_config, validate, allow_failures = self._options
        hf_model, tokenizer = self.hf_model, self.tokenizer
        self._facts = None
        self._weights = FoundWeights()
        self.steps_of = causal = causal_lm(hf_model)
        self._ranks = ranks_of(hf_model)
        self._shards = Shards(hf_model, split=self._ranks is not None)
        if self._shards.around(causal) or (self._shards and has_decoder(causal)):
            # FSDP takes for its root what is run first, which is to be no part of the model.
            with torch.no_grad():
                hf_model(**example_inputs(causal, 1, 3, next(causal.parameters()).device))
        self._anatomy = anatomy = self._resolve(causal, arch_config)
        self._split = None if self._ranks is None else Split(self._ranks, hf_model, anatomy.attentions)
        self._head = Head(Traceable(causal), anatomy, self._shards)
        self.dimensions = dimensions(text_config(causal), anatomy)
        known = self.__dict__.get("_prompts")  # when it is read again
        self._prompts = Prompts(
            tokenizer,
            no_tokenizer,
            pad_token_id(tokenizer, causal.config, self.dimensions.vocab_size),
            padding_token_id(tokenizer, causal.config),
            rows_of(anatomy.embed_tokens) or self.dimensions.vocab_size or 0,
            takes(causal, "position_ids"),
            main_input(causal),
            decoder_start(causal) if has_decoder(causal) else None,
            needed(causal),
            any(hasattr(module, "get_rope_index") for module in causal.modules()),
            [name for name in ("attention_mask", "use_cache") if not accepts(causal, name)]
            if main_input(causal) == "input_ids"
            else (),
            cache_name(causal),
            partial(_processor_of, ref(self)),
            partial(takes, causal),
            partial(_is_causal, ref(self)),
            None if known is None else known.default_side,
        )
        if self._prompts.reads_tokens_alone and self.device.type != "meta":
            self._prompts.context = ContextLength(
                causal, partial(_run, self._shards, hf_model, causal, self.device), anatomy.layers[0]
            )
        self._keywords = Keywords(hf_model, causal, anatomy)
        paths = {module: path for path, module in hf_model.named_modules()}
        self._layer_views = LayerViews(
            LayerView(self._blocks, layer, paths, anatomy, i) for i, layer in enumerate(anatomy.layers)
        )
        self._blocks.example = partial(_example, causal, self.device, self._shards)
        self._make_accessors()
        #: By the names that belong to no layer, why they are not to be had.
        self._refused: dict[str, str] = {}
        if not anatomy.gives_logits:
            self._refused |= dict.fromkeys(("logits", "lm_head"), NO_HEAD)
        elif anatomy.lm_head is None:
            self._refused["lm_head"] = "no module is: the model computes its logits by functions"
        if main_input(causal) != "input_ids" and not has_decoder(causal):
            why = f"the model reads no tokens but {main_input(causal)}"
            self._refused |= {"token_embeddings": why, "padding": why}
        if why := anatomy.absent["token_embeddings"][0]:
            self._refused["token_embeddings"] = why
        self._causal: bool | None = None
        self._check_names(causal, validate, allow_failures)
        self._facts = Facts(hf_model, causal, anatomy)

    def _resolve(self, causal: Module, arch_config: ArchConfig | None) -> Anatomy:
        """Its standard modules."""
        with self._shards.gathered(causal):
            return resolve(causal, arch_config)

    def _check_names(self, causal: Any, validate: bool | Literal["shapes"], allow_failures: bool) -> None:
        """Find the names of its encoder, and check all."""
        encoder: Any = causal.get_encoder() if has_decoder(causal) else None
        with self._shards.gathered(encoder):
            add_encoder(self, validate, allow_failures)
        if encoder is not None:
            self._shards.leave()
        if validate == "shapes":
            self.validation = validate_shapes(self)
        else:
            self.validation = validate_model(self, allow_failures) if validate else unverified(self)

    def _no_such(self, name: str) -> NoSuchModuleError:
        error = super()._no_such(name)
        return NoSuchModuleError(f"{error}{said_of(name)}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AssignmentError for a name that is one for each layer, that is only read, or a module; NoSuchModuleError for
        none, in a trace."""
        known = self.__dict__.get(name)
        if isinstance(known, LayerAccessor) and not isinstance(value, LayerAccessor):
            raise AssignmentError(f"{name} is one for each layer: assign {name}[i] = ..., or {name}[:] = [one, ...].")
        of_class = getattr(type(self), name, None)
        if isinstance(of_class, property) and of_class.fset is None:
            row = ROWS.get(name)
            instead = " Give other prompts to the trace." if row is not None and row.integer else ""
            if name in ("vision_layers_output", "audio_layers_output"):
                raise AssignmentError(f"{name} is one for each layer: assign {name}[i] = ...")
            raise AssignmentError(f"{name} can be read, and not assigned.{instead}")
        if not (name.startswith("_") or known is not None or hasattr(type(self), name)):
            if name in self.module._modules:
                raise AssignmentError(f"{name} is a module: assign its value, {name}.output = ...")
            if self._blocks.is_open_here:
                raise self._no_such(name)
        super().__setattr__(name, value)


def _processor_of(model: ref[StandardizedTransformer], load: bool = True) -> Any:
    """That of a view, which is not kept for it."""
    view = model()
    return None if view is None else view.processor if load else view._processor


def _is_causal(model: ref[StandardizedTransformer]) -> bool:
    """Whether that is known of a view, which is not kept for it."""
    view = model()
    return view is not None and view.causal


def _run(shards: Shards, hf_model: Any, causal: Module, device: torch.device, ids: Tensor) -> Any:
    """The model on token ids, without a cache."""
    ids = ids.to(device)
    others = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    others = {name: one for name, one in others.items() if accepts(causal, name)}
    return shards.in_order(partial(hf_model, input_ids=ids, **others))()


def _example(
    causal: Module,
    device: torch.device,
    shards: Shards,
    blocks: OpenBlocks,
    batch: int = 1,
    seq: int = 3,
    **others: Any,
) -> Trace:
    """A trace of short prompts, without gradients; `others` are given to the model where it takes them."""
    inputs = example_inputs(causal, batch, seq, device) | {k: v for k, v in others.items() if accepts(causal, k)}

    def call() -> Any:
        with torch.no_grad(), shards.gathered(causal):
            return causal(**inputs)

    return Trace(ModuleView(blocks, causal, ""), shards.in_order(call))
