"""`HookedTransformer`: a model under TransformerLens's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from nnatomy.compat.transformer_lens.cache import ActivationCache
from nnatomy.compat.transformer_lens.hook_points import (
    COMPUTED,
    SWAPPED,
    WHOLE,
    Hooked,
    HookPoint,
)
from nnatomy.compat.transformer_lens.hooks import HasHooks, Hooks
from nnatomy.compat.transformer_lens.tokens import Tokens
from nnatomy.compat.transformer_lens.utils import Slice, lm_cross_entropy_loss
from nnatomy.compat.transformer_lens.weights import WEIGHTS, Weights
from nnatomy.errors import InputError, NotInThisModelError, OutOfOrderError, a_kind
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.loading import load_tokenizer
from nnatomy.tracing import ModuleView

_PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "refactor_factored_attn_matrices",
    "fold_value_biases",
)
#: Options of TransformerLens's own implementation of a model, which has no meaning for an untouched one.
_OF_ITS_NETWORK = ("past_kv_cache", "start_at_layer", "shortformer_pos_embed", "tokens")
#: What a call takes, and run_with_cache beside it.
_OPTIONS = (
    *("return_type", "loss_per_token", "prepend_bos", "attention_mask", "stop_at_layer"),
    *("names_filter", "remove_batch_dim", "return_cache_object", "device", "pos_slice", "fwd_hooks", "bwd_hooks"),
)

_PROCESSED = "nothing: weights are left as they are; W_Q.folded(layer) of `.model` is a new tensor"
#: What else a HookedTransformer has there, and what to write here.
_ANSWERS = {
    "input_to_embed": "`.model.trace(prompt)`, with model.token_embeddings and model.layers_input[0] in it",
    "set_use_split_qkv_input": "queries, keys and values, which are read and assigned apart: hook_q, hook_k, hook_v",
    "set_use_attn_in": "ln1.hook_normalized, what the attention is given",
    "set_use_hook_mlp_in": "ln2.hook_normalized, what the MLP is given",
    "set_tokenizer": "StandardizedTransformer(model, tokenizer)",
    "generate_stream": "`.model.generate(prompt)`, with tracer.iter in it: every step's values",
    "sample_datapoint": "a data set of your own",
    "check_hooks_to_add": "nothing: add_hook checks by itself",
    "W_pos": "nothing: no module of this model gives rows that are added to the token embeddings",
    **dict.fromkeys(
        (
            "process_weights_",
            "load_and_process_state_dict",
            "fold_layer_norm",
            "fold_value_biases",
            "refactor_factored_attn_matrices",
        ),
        _PROCESSED,
    ),
    **dict.fromkeys(("center_unembed", "center_writing_weights"), _PROCESSED),
}


@dataclass
class Config:
    """Sizes of the model, under TransformerLens's names; and what texts and results are by default."""

    model_name: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    n_ctx: int | None
    n_key_value_heads: int | None
    act_fn: str | None
    device: torch.device
    dtype: torch.dtype
    default_prepend_bos: bool = True
    use_attn_result: bool = False


class HookedTransformer(Tokens, Weights, HasHooks):
    """A model under TransformerLens's names.

    Args:
        model: the view that it is made of.
        default_prepend_bos: whether texts get the tokenizer's token for the beginning of a text, if it has one.

    Attributes:
        model: that view: everything else of it is there.
        cfg: its sizes.
        hook_dict: by hook name, the hook points that this model has.
    """

    def __init__(self, model: Any, *, default_prepend_bos: bool = True) -> None:
        if not isinstance(model, StandardizedTransformer):
            raise InputError(
                f"HookedTransformer(...) was given {a_kind(model)}: give a StandardizedTransformer, of any Hugging Face "
                "model, or HookedTransformer.from_pretrained(id). Networks from a config are made by Transformers: "
                "StandardizedTransformer(AutoModelForCausalLM.from_config(config))."
            )
        self.model = model
        self.tokenizer = model.tokenizer
        config = model.hf_model.config
        self.cfg = Config(
            getattr(config, "_name_or_path", "") or type(model.hf_model).__name__,
            model.num_layers,
            model.hidden_size,
            model.num_heads,
            getattr(config, "head_dim", None) or model.hidden_size // model.num_heads,
            self._neurons(),
            model.vocab_size,
            getattr(config, "max_position_embeddings", None),
            getattr(config, "num_key_value_heads", None),
            getattr(config, "hidden_act", None) or getattr(config, "activation_function", None),
            model.device,
            model.hf_model.dtype,
            default_prepend_bos,
        )
        self._positions = self._learned_positions()
        self._is_turned, self._why = self._turned()
        self._level = 0
        self.hook_dict = {name: HookPoint(name) for name in self._names()}

    @classmethod
    def from_pretrained(cls, model_name: str, **kwargs: Any) -> HookedTransformer:
        """Load a model by its Hugging Face id, a folder, or `demo:gpt2`.

        Args:
            kwargs: `default_prepend_bos`; `hf_model`, a loaded model that is taken instead, as it is; all others are
                `StandardizedTransformer`'s (`tokenizer`, `dtype`, `device_map`, ...).

        Raises:
            InputError: if weights are to be processed (`fold_ln=True`, ...).
        """
        if asked := [name for name in _PROCESSING if kwargs.pop(name, False)]:
            raise InputError(
                f"{asked[0]}=True: models are left as they are, as by from_pretrained_no_processing. Leave it out; weights with "
                "the norm before them folded in are model.W_Q.folded(layer) of the model inside (.model)."
            )
        begins = kwargs.pop("default_prepend_bos", True)
        if device := kwargs.pop("device", None):
            kwargs["device_map"] = device
        loaded = kwargs.pop("hf_model", None)
        if loaded is not None and kwargs.get("tokenizer") is None:
            kwargs["tokenizer"] = load_tokenizer(model_name, {})[0]
        model = StandardizedTransformer(model_name if loaded is None else loaded, **kwargs)
        return cls(model, default_prepend_bos=begins)

    from_pretrained_no_processing = from_pretrained

    # Names.

    def _turned(self) -> tuple[bool, str]:
        """Whether queries are another thing where the attention function gets them than what the projection gives; and why."""
        model = self.model
        layers = [i for i, one in enumerate(model.attentions_input.modules) if one is not None]
        try:
            layer = layers[0]
            with torch.no_grad(), model.trace(**self._given(torch.arange(1, 4)[None], False)):
                x, queries = model.attentions_input[layer], model.queries[layer]
            made = torch.einsum("bsd,hde->bhse", x.float(), model.W_Q[layer].float())
            made = made + model.b_Q[layer].float()[:, None]
        except (IndexError, NotInThisModelError) as error:
            return True, f"does not show what its queries are before a rotary embedding or norm ({error})"
        if torch.allclose(made, queries.float(), atol=1e-2 * float(queries.abs().max())):
            return False, "has no rotary embedding"
        return True, "turns queries and keys by their positions, or norms them"

    def _neurons(self) -> int | None:
        """Of the first layer that has some."""
        for layer in range(self.model.num_layers):
            if not _lacks(self.model.W_out, layer):
                return int(self.model.W_out[layer].shape[-2])
        return None

    def _learned_positions(self) -> ModuleView | None:
        """The embedding of which a row is added to each token's: by value."""
        model, found = self.model, None
        embed, given = model.hf_model.get_input_embeddings(), self._given(torch.arange(1, 4)[None], False)
        for path, module in model.hf_model.named_modules():
            if (
                not isinstance(module, torch.nn.Embedding)
                or module is embed
                or module.embedding_dim != self.cfg.d_model
            ):
                continue
            with suppress(NotInThisModelError, OutOfOrderError), torch.no_grad(), model.trace(**given):
                embedded, row, stream = model.token_embeddings, model[path].output, model.layers_input[0]
                found = model[path] if torch.allclose(embedded + row, stream, atol=1e-5) else found
        return found

    # Running.

    def __call__(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        *,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        **options: Any,
    ) -> Any:
        """The logits (batch, pos, d_vocab), the mean loss of the next tokens in nats, or both, with all hooks that are on.

        Args:
            stop_at_layer: run the layers before it alone, and give the stream that it would be given.
        """
        return self._run(
            input, [], None, return_type, prepend_bos, attention_mask, stop_at_layer, loss_per_token, options
        )[0]

    forward = __call__

    def _run(
        self,
        input: Any,
        names: list[str],
        device: Any,
        return_type: str | None,
        prepend_bos: bool | None,
        mask: Tensor | None,
        stop: int | None,
        per_token: bool,
        options: dict[str, Any],
    ) -> tuple[Any, dict[str, Tensor]]:
        if options:
            name = next(iter(options))
            if name in _OF_ITS_NETWORK:
                why = (
                    "that is of a network of TransformerLens's own; a trace of the model inside, `.model`, skips layers, takes "
                    "embeddings and has a KV cache."
                )
            elif name == "incl_bwd":
                why = 'gradients are told to hooks: add_hook(name, hook, dir="bwd"), then backward().'
            elif name in _OPTIONS:
                why = "that is an argument of run_with_cache or run_with_hooks, and not of this call."
            else:
                near = get_close_matches(name, _OPTIONS, 1) or [", ".join(_OPTIONS)]
                why = f"there is no such option. There is {near[0]}."
            raise InputError(f"{name}=...: {why}")
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(f"return_type={return_type!r}: give 'logits', 'loss', 'both' or None.")
        given, view, count = self._given(input, prepend_bos, mask), self._view(), self.cfg.n_layers
        stop = None if stop is None else max(stop + count, 0) if stop < 0 else min(stop, count)
        if stop is not None:  # what comes after it is not there
            names = [
                name
                for name in names
                if name in ("hook_embed", "hook_pos_embed") or ("." in name and 0 <= self._layer_of(name) < stop)
            ]
        places = [self._place(name) for name in names]
        layered = sorted({standard for standard, layer in places if layer is not None})
        layers = sorted({layer for _, layer in places if layer is not None})
        with view.trace(**given):
            whole: dict[str, Any] = {"hook_embed": view.token_embeddings} if "hook_embed" in names else {}
            if "hook_pos_embed" in names:
                whole["hook_pos_embed"] = self._module_of("hook_pos_embed", view).output
            found: Any = view.read(*layered, layers=_of_each(view, layered, layers), device=device) if layered else None
            if "ln_final.hook_normalized" in names:
                whole["ln_final.hook_normalized"] = view.ln_final.output
            if stop is None:
                output = view.logits
            elif stop < count:
                output = view.layers_input[stop]
            else:
                output = view.layers_output[count - 1]
        values, rows = {}, len(given["input_ids"])
        for name, (standard, layer) in zip(names, places, strict=True):
            value = whole[name] if layer is None else found[standard, layer]
            value = (
                value.expand(rows, *value.shape[1:]) if name == "hook_pos_embed" else value
            )  # one row for all prompts
            value = self._computed(name, value) if name.split(".", 2)[-1] in COMPUTED else value
            value = value.transpose(1, 2) if standard in SWAPPED else value
            values[name] = value if device is None else value.to(device)
        if stop is not None or return_type in ("logits", None):
            return (output if stop is not None or return_type else None), values
        own = None if bool(given["attention_mask"].all()) else given["attention_mask"]
        loss = lm_cross_entropy_loss(output, given["input_ids"], own, per_token)
        return ((output, loss) if return_type == "both" else loss), values

    def run_with_cache(
        self,
        input: Any,
        names_filter: str | Sequence[str] | Callable[[str], bool] | None = None,
        *,
        return_type: str | None = "logits",
        prepend_bos: bool | None = None,
        remove_batch_dim: bool = False,
        return_cache_object: bool = True,
        device: torch.device | str | None = None,
        pos_slice: Any = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        loss_per_token: bool = False,
        **options: Any,
    ) -> tuple[Any, Any]:
        """One forward pass: what calling it returns, and the values of hook names (all by default).

        Args:
            names_filter: a hook name, several, or a function of names.
            pos_slice: of which positions (of patterns, the queries'): what `Slice` takes, but that an index keeps its axis.
            return_cache_object: an ActivationCache, or a dict.
        """
        names = [*self.hook_dict, *(self._all_computed() if names_filter is not None else [])]
        names += [] if names_filter is not None else self._by_default()
        if names_filter is not None and not callable(names_filter):
            asked = self._asked(names_filter)
            for name in asked:
                self._place(name)
            names = [name for name in names if name in asked]
        elif names_filter is not None:
            names = [name for name in names if names_filter(name)]
        output, values = self._run(
            input, names, device, return_type, prepend_bos, attention_mask, stop_at_layer, loss_per_token, options
        )
        where = Slice([pos_slice] if isinstance(pos_slice, int) else pos_slice)
        for name, value in values.items():
            axis = 2 if name.endswith(("hook_pattern", "hook_attn_scores")) else 1
            values[name] = value if where.mode == "identity" else where.apply(value, axis)
        cache = ActivationCache(values, self)
        cache = cache.remove_batch_dim() if remove_batch_dim else cache
        return output, cache if return_cache_object else cache.cache_dict

    def _asked(self, names: Any) -> list[str]:
        asked = [names] if isinstance(names, str) or not isinstance(names, Iterable) else [*names]
        if wrong := [one for one in asked if not isinstance(one, str)]:
            raise InputError(
                f"names_filter: found {a_kind(wrong[0])}: give a hook name, a list of them, or a function of names."
            )
        return asked

    def _all_computed(self) -> list[str]:
        return [
            name for i in range(self.cfg.n_layers) for short in COMPUTED if self._has(name := f"blocks.{i}.{short}")
        ]

    def _by_default(self) -> list[str]:
        kept = ("mlp.hook_pre", *(("attn.hook_result",) if self.cfg.use_attn_result else ()))
        return [name for name in self._all_computed() if name.endswith(kept)]

    def _computed(self, name: str, value: Tensor) -> Tensor:
        """`hook_pre` of what the MLP is given, `hook_result` of what the heads give."""
        _, layer, short = name.split(".", 2)
        i, inside = int(layer), self.model
        with torch.set_grad_enabled(value.requires_grad):
            if short == "attn.hook_result":
                return torch.einsum("...hd,hdm->...hm", value, inside.W_O[i].to(value))
            weight, bias = (inside.W_in, inside.b_in) if _lacks(inside.W_gate, i) else (inside.W_gate, inside.b_gate)
            return value @ weight[i].to(value) + bias[i].to(value)

    def run_with_hooks(
        self,
        input: Any,
        return_type: str | None = "logits",
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """What calling it returns, with those hooks on for this call: (name, or a function of names; function(value, hook=...)).

        Args:
            reset_hooks_end: whether they are off again afterwards.
        """
        if not reset_hooks_end:
            self._put_on(fwd_hooks, bwd_hooks)
            return self(input, return_type, **kwargs)
        with self.hooks(fwd_hooks, bwd_hooks, clear_contexts=clear_contexts):
            return self(input, return_type, **kwargs)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether a cache has `hook_result` by default."""
        self.cfg.use_attn_result = use_attn_result

    def _view(self) -> Any:
        view: Any = self.model
        for number, (name, point) in enumerate(self.hook_dict.items()):
            if point.fwd_hooks or point.bwd_hooks:
                standard, layer = self._place(name)
                place = self._module_of(name).path + ".output" if layer is None else f"{standard}[{layer}]"
                view = view.attach(place, Hooked(point, standard in SWAPPED), name=f"hooked_{number}")
        return view

    def _layer_of(self, name: str) -> int:
        layer = self._place(name)[1]
        return -1 if layer is None else layer

    def _module_of(self, name: str, view: Any = None) -> Any:
        """The module of a name that has no layer."""
        view = view or self.model
        return (
            view[self._positions.path] if name == "hook_pos_embed" and self._positions else getattr(view, WHOLE[name])
        )

    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | None = None,
        do_sample: bool = True,
        *,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        return_type: str | None = "input",
        verbose: bool = True,  # noqa: ARG002
        **kwargs: Any,
    ) -> Any:
        """What goes on from texts or ids, with all hooks that are on: in the form of the input, or as `return_type` says.

        Args:
            do_sample: as in TransformerLens, tokens are drawn unless it is False.
            return_type: "input", "str", or "tokens".
            verbose: taken and not used: nothing is printed.
            kwargs: `top_k`, `top_p`, `temperature` and all others of Transformers' `generate`.
        """
        if return_type not in ("input", "str", "tokens", None):
            raise InputError(f"return_type={return_type!r}: give 'input', 'str' or 'tokens'.")
        if not stop_at_eos:
            kwargs["min_new_tokens"] = max_new_tokens
        elif eos_token_id is not None:
            kwargs["eos_token_id"] = eos_token_id
        given = self._given(input, prepend_bos, left=True)
        kwargs |= {"do_sample": do_sample, "use_cache": use_past_kv_cache, "max_new_tokens": max_new_tokens}
        with torch.no_grad(), self._view().generate(**given, **kwargs) as tracer:
            result = tracer.result
        if return_type == "tokens" or (return_type == "input" and isinstance(input, Tensor)):
            return result
        texts = self.tokenizer.batch_decode(result, skip_special_tokens=True)
        return texts if isinstance(input, (list, tuple)) or len(texts) > 1 else texts[0]

    def loss_fn(
        self, logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
    ) -> Tensor:
        """The loss of the next tokens in nats."""
        return lm_cross_entropy_loss(logits, tokens, attention_mask, per_token)

    def to(self, device_or_dtype: Any) -> HookedTransformer:
        """The model moved, or cast; in place."""
        self.model.hf_model.to(device_or_dtype)
        self.cfg.device, self.cfg.dtype = self.model.device, self.model.hf_model.dtype
        return self

    def __getattr__(self, name: str) -> Any:
        if name in ("parameters", "named_parameters", "state_dict", "eval", "train", "zero_grad", "requires_grad_"):
            return getattr(self.model.hf_model, name)
        if name in WHOLE:
            self._place(name)  # raises if this model has none
            return self.hook_dict[name]
        if name == "W_pos" and self._positions is not None:
            return self._positions.module.weight
        if name in WEIGHTS:
            return self._weights(name)
        if name in _ANSWERS:
            raise AttributeError(
                f"A HookedTransformer of nnatomy has no {name!r}. What stands for it: {_ANSWERS[name]}."
            )
        raise AttributeError(
            f"A HookedTransformer of nnatomy has no {name!r}. Everything else is at the model inside, `.model`, a "
            "StandardizedTransformer: docs/from_transformer_lens.md has a table of names."
        )

    def __repr__(self) -> str:
        return f"<HookedTransformer over {self.model!r}>"


def _lacks(accessor: Any, layer: int) -> bool:
    try:
        accessor[layer]
    except NotInThisModelError:
        return True
    return False


def _of_each(view: Any, names: list[str], layers: list[int]) -> Any:
    """Those layers, or where a name lacks one of them, all that each has."""
    have = [{i for i, one in enumerate(getattr(view, name).modules) if one is not None} for name in names]
    return layers if all({*layers} <= one for one in have) else None
