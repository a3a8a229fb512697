"""TransformerLens's names on any model: `HookedTransformer`, hook names, `run_with_cache`, `run_with_hooks`.

Models are untouched Hugging Face models, as of `from_pretrained_no_processing`: nothing is folded or centered. What a hook is
given is a copy; what it returns, or has changed in place, goes on. `docs/from_transformer_lens.md` has the table of names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from nnatomy.errors import InputError, NotInThisModelError
from nnatomy.standardized import StandardizedTransformer

#: By hook name, without its layer, the standard name.
HOOKS = {
    "hook_embed": "token_embeddings",
    "hook_resid_pre": "layers_input",
    "hook_resid_mid": "layers_mid",
    "hook_resid_post": "layers_output",
    "hook_attn_out": "attentions_contribution",
    "hook_mlp_out": "mlps_contribution",
    "attn.hook_q": "queries",
    "attn.hook_k": "keys",
    "attn.hook_v": "values",
    "attn.hook_rot_q": "queries",
    "attn.hook_rot_k": "keys",
    "attn.hook_attn_scores": "attention_scores",
    "attn.hook_pattern": "attention_probabilities",
    "attn.hook_z": "heads_output",
    "mlp.hook_post": "neurons",
}
#: Those of a rotary embedding, and what they are where there is none.
_TURNED = {"attn.hook_rot_q": "attn.hook_q", "attn.hook_rot_k": "attn.hook_k"}
#: (batch, head, position, head_dim) here, (batch, position, head, head_dim) there.
_SWAPPED = ("queries", "keys", "values")
_SHORT = {"attn": "pattern", "attn_logits": "attn_scores", "query": "q", "key": "k", "value": "v", "mlp_post": "post"}
_WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
_BIASES = ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_gate", "b_out")
_PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "refactor_factored_attn_matrices",
    "fold_value_biases",
)

Hook = Callable[..., Any]
#: A hook name, or whether a name is meant; and the function.
Hooks = Iterable[tuple[str | Callable[[str], bool], Hook]]


@dataclass
class HookPoint:
    """What a hook function is told of where it is: its second argument, `hook`.

    Attributes:
        name: the hook name, with the layer.
        ctx: for what one call leaves for the next.
    """

    name: str
    ctx: dict[str, Any] = field(default_factory=dict)

    def layer(self) -> int:
        """Of a name that has one."""
        return int(self.name.split(".")[1])


def get_act_name(name: str, layer: int | str | None = None) -> str:
    """The hook name of a short one: ("resid_post", 5), ("q", 5), ("pattern", 5), "embed".

    Example:
        >>> get_act_name("resid_post", 5), get_act_name("pattern", 5), get_act_name("post", 0)
        ('blocks.5.hook_resid_post', 'blocks.5.attn.hook_pattern', 'blocks.0.mlp.hook_post')
    """
    if "hook_" in name:
        return name
    short = f"hook_{_SHORT.get(name, name)}"
    part = next((known for known in HOOKS if known.split(".")[-1] == short), short)
    return part if layer is None else f"blocks.{layer}.{part}"


class ActivationCache(Mapping[str, Tensor]):
    """Values by hook name: `cache["blocks.5.hook_resid_post"]`, `cache["resid_post", 5]`."""

    def __init__(self, values: Mapping[str, Tensor], model: HookedTransformer) -> None:
        self.cache_dict = dict(values)
        self.model = model

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        name, layer = (key, None) if isinstance(key, str) else key[:2]
        if isinstance(layer, int) and layer < 0:
            layer += self.model.cfg.n_layers
        full = get_act_name(name, layer)
        if full not in self.cache_dict:
            self.model._place(full)  # raises if there is no such name
            raise KeyError(f"{full} was not kept: names_filter left it out.")
        return self.cache_dict[full]

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def stack_activation(self, name: str) -> Float[Tensor, "layer ..."]:
        """The values of one short name, of all layers."""
        return torch.stack([self[name, layer] for layer in range(self.model.cfg.n_layers)])


@dataclass(frozen=True)
class Config:
    """Sizes of the model, under TransformerLens's names."""

    model_name: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    n_ctx: int | None
    n_key_value_heads: int | None
    device: torch.device
    dtype: torch.dtype


class HookedTransformer:
    """A model under TransformerLens's names.

    Args:
        model: the view that it is made of.
        default_prepend_bos: whether texts get the tokenizer's token for the beginning of a text, if it has one.

    Attributes:
        model: that view: everything else of it is there.
        hook_dict: the hook names that this model has, with their standard names.
    """

    def __init__(self, model: StandardizedTransformer, *, default_prepend_bos: bool = True) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        config = model.hf_model.config
        self.cfg = Config(
            getattr(config, "_name_or_path", "") or type(model.hf_model).__name__,
            model.num_layers,
            model.hidden_size,
            model.num_heads,
            getattr(config, "head_dim", None) or model.hidden_size // model.num_heads,
            getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None),
            model.vocab_size,
            getattr(config, "max_position_embeddings", None),
            getattr(config, "num_key_value_heads", None),
            model.device,
            model.hf_model.dtype,
        )
        self._begins = default_prepend_bos and getattr(model.tokenizer, "bos_token_id", None) is not None
        self._hooks: list[tuple[str, Hook, bool]] = []
        self._is_turned, self._why = self._turned()
        self.hook_dict = {name: "".join(self._place(name)[:1]) for name in self._names()}

    @classmethod
    def from_pretrained(cls, model_name: str, **kwargs: Any) -> HookedTransformer:
        """Load a model by its Hugging Face id, a folder, or `demo:gpt2`.

        Args:
            kwargs: `default_prepend_bos`; all others are `StandardizedTransformer`'s (`dtype`, `device_map`, ...).

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
        return cls(StandardizedTransformer(model_name, **kwargs), default_prepend_bos=begins)

    from_pretrained_no_processing = from_pretrained

    # Names.

    def _turned(self) -> tuple[bool, str]:
        """Whether queries are another thing where the attention function gets them than what the projection gives; and why."""
        model = self.model
        layers = [i for i, one in enumerate(model.attentions_input.modules) if one is not None]
        try:
            layer = layers[0]
            with torch.no_grad(), model.trace(**_all_own(torch.arange(1, 4)[None])):
                x, queries = model.attentions_input[layer], model.queries[layer]
            made = torch.einsum("bsd,hde->bhse", x.float(), model.W_Q[layer].float())
            made = made + model.b_Q[layer].float()[:, None]
        except (IndexError, NotInThisModelError) as error:
            return True, f"does not show what its queries are before a rotary embedding or norm ({error})"
        if torch.allclose(made, queries.float(), atol=1e-2 * float(queries.abs().max())):
            return False, "has no rotary embedding"
        return True, "turns queries and keys by their positions, or norms them"

    def _place(self, name: str) -> tuple[str, int | None]:
        """The standard name and the layer of a hook name.

        Raises:
            InputError: for a name that there is not.
            NotInThisModelError: for one that this model does not have.
        """
        found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", name)
        assert found is not None
        layer, short = None if found[1] is None else int(found[1]), found[2]
        if short not in HOOKS or (layer is None) != (short == "hook_embed") or (layer or 0) >= self.cfg.n_layers:
            raise InputError(
                f"{name!r} is no hook name here. A model of {self.cfg.n_layers} layers has hook_embed, and "
                f"blocks.LAYER. with {', '.join(list(HOOKS)[1:])}."
            )
        if (short in _TURNED) != self._is_turned and short in (*_TURNED, *_TURNED.values()):
            other = {**_TURNED, **{plain: turned for turned, plain in _TURNED.items()}}[short]
            raise NotInThisModelError(
                f"{name}: this model {self._why}; what its attention function gets is {name.replace(short, other)}."
            )
        return HOOKS[short], layer

    def _names(self) -> list[str]:
        names = [
            short if short == "hook_embed" else f"blocks.{i}.{short}"
            for i in range(self.cfg.n_layers)
            for short in HOOKS
        ]
        return [name for name in dict.fromkeys(names) if self._has(name)]

    def _has(self, name: str) -> bool:
        try:
            standard, layer = self._place(name)
            accessor = getattr(self.model, standard) if layer is not None else None
        except NotInThisModelError:
            return False
        return accessor is None or accessor.modules[layer] is not None

    # Running.

    def to_tokens(self, input: Any, prepend_bos: bool | None = None) -> Int[Tensor, "batch pos"]:
        """The ids of texts; ids stay what they are."""
        if isinstance(input, Tensor):
            return input if input.ndim == 2 else input[None]
        begins = self._begins if prepend_bos is None else prepend_bos
        return self.model.to_tokens(input, prepend_bos=begins or None)

    def to_string(self, tokens: Any) -> Any:
        """The text of ids."""
        return self.model.to_string(tokens)

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> Any:
        """The text of each token of one prompt."""
        return self.model.to_str_tokens(self.to_tokens(input, prepend_bos)[0])

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token. Raises InputError for another."""
        ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(f"{string!r} is {len(ids)} tokens.")
        return int(ids[0])

    def __call__(
        self,
        input: Any,
        return_type: str | None = "logits",
        *,
        prepend_bos: bool | None = None,
        loss_per_token: bool = False,
    ) -> Any:
        """The logits (batch, pos, d_vocab), the mean loss of the next tokens in nats, or both, with all hooks that are on."""
        tokens = self.to_tokens(input, prepend_bos)
        return self._returned(self._view()(**_all_own(tokens)).logits, tokens, return_type, loss_per_token)

    forward = __call__

    def _returned(self, logits: Tensor, tokens: Tensor, return_type: str | None, per_token: bool = False) -> Any:
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(f"return_type={return_type!r}: give 'logits', 'loss', 'both' or None.")
        if return_type in ("logits", None):
            return logits if return_type else None
        targets = tokens[:, 1:].to(logits.device)
        losses = cross_entropy(logits[:, :-1].mT, targets, reduction="none")
        loss = losses if per_token else losses.mean()
        return (logits, loss) if return_type == "both" else loss

    def run_with_cache(
        self,
        input: Any,
        names_filter: str | Sequence[str] | Callable[[str], bool] | None = None,
        *,
        return_type: str | None = "logits",
        prepend_bos: bool | None = None,
        remove_batch_dim: bool = False,
        device: torch.device | str | None = None,
    ) -> tuple[Any, ActivationCache]:
        """One forward pass: what calling it returns, and the values of hook names (all by default)."""
        names = [*self.hook_dict]
        if names_filter is not None and not callable(names_filter):
            asked = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            for name in asked:
                self._place(name)
            names = [name for name in names if name in asked]
        elif names_filter is not None:
            names = [name for name in names if names_filter(name)]
        tokens, view = self.to_tokens(input, prepend_bos), self._view()
        layered = sorted({standard for standard, layer in map(self._place, names) if layer is not None})
        layers = sorted({layer for _, layer in map(self._place, names) if layer is not None})
        with view.trace(**_all_own(tokens)):
            embeddings: Any = view.token_embeddings if "hook_embed" in names else None
            found: Any = view.read(*layered, layers=_of_each(view, layered, layers), device=device) if layered else None
            logits = view.logits
        values = {}
        for name in names:
            standard, layer = self._place(name)
            value = embeddings if layer is None else found[standard, layer]
            value = value.transpose(1, 2) if standard in _SWAPPED else value
            values[name] = value[0] if remove_batch_dim else value
        return self._returned(logits, tokens, return_type), ActivationCache(values, self)

    def run_with_hooks(
        self,
        input: Any,
        return_type: str | None = "logits",
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        **kwargs: Any,
    ) -> Any:
        """What calling it returns, with those hooks on for this call: (name, or a function of names; function(value, hook=...))."""
        with self.hooks(fwd_hooks, bwd_hooks):
            return self(input, return_type, **kwargs)

    @contextmanager
    def hooks(self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()) -> Iterator[HookedTransformer]:
        """Within, those hooks are on."""
        before = [*self._hooks]
        for given, direction in ((fwd_hooks, "fwd"), (bwd_hooks, "bwd")):
            for name, hook in given:
                self.add_hook(name, hook, direction)
        try:
            yield self
        finally:
            self._hooks = before

    def add_hook(self, name: str | Callable[[str], bool], hook: Hook, dir: str = "fwd") -> None:
        """Put a hook on, until `reset_hooks`. A backward one is told the gradient of the value."""
        names = [name] if isinstance(name, str) else [one for one in self.hook_dict if name(one)]
        for one in names:
            self._place(one)
        self._hooks += [(one, hook, dir == "bwd") for one in names]

    def reset_hooks(self) -> None:
        """Take all hooks off."""
        self._hooks = []

    def _view(self) -> Any:
        view: Any = self.model
        by_name: dict[str, list[tuple[Hook, bool]]] = {}
        for name, hook, backward in self._hooks:
            by_name.setdefault(name, []).append((hook, backward))
        for number, (name, hooks) in enumerate(by_name.items()):
            standard, layer = self._place(name)
            point = standard if layer is None else f"{standard}[{layer}]"
            module = _Hooked(HookPoint(name), hooks, standard in _SWAPPED)
            view = view.attach(point, module, name=f"hooked_{number}")
        return view

    def generate(
        self, input: Any, max_new_tokens: int = 10, *, prepend_bos: bool | None = None, **kwargs: Any
    ) -> str | list[str]:
        """The text with what follows, with all hooks that are on; options are those of Transformers' `generate`."""
        tokens = self.to_tokens(input, prepend_bos)
        with (
            torch.no_grad(),
            self._view().generate(**_all_own(tokens), max_new_tokens=max_new_tokens, **kwargs) as tracer,
        ):
            result = tracer.result
        texts = self.tokenizer.batch_decode(result, skip_special_tokens=True)
        return texts[0] if len(texts) == 1 else texts

    # Weights.

    def __getattr__(self, name: str) -> Any:
        if name in ("W_E", "W_U", "b_U"):
            return getattr(self.model, name)
        if name in _WEIGHTS + _BIASES:
            accessor = getattr(self.model, name)
            stacked = torch.stack([accessor[i] for i in range(self.cfg.n_layers)])
            if name in ("W_K", "W_V", "b_K", "b_V") and stacked.shape[1] != self.cfg.n_heads:
                stacked = stacked.repeat_interleave(self.cfg.n_heads // stacked.shape[1], 1)
            return stacked
        raise AttributeError(
            f"A HookedTransformer of nnatomy has no {name!r}. Everything else is at the model inside, `.model`, a "
            "StandardizedTransformer: docs/from_transformer_lens.md has a table of names."
        )

    def __repr__(self) -> str:
        return f"<HookedTransformer over {self.model!r}>"


def _all_own(tokens: Tensor) -> dict[str, Any]:
    """Ids of which none is padding, whatever token a prompt begins with."""
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _of_each(view: Any, names: list[str], layers: list[int]) -> Any:
    """Those layers, or where a name lacks one of them, all that each has."""
    have = [{i for i, one in enumerate(getattr(view, name).modules) if one is not None} for name in names]
    return layers if all({*layers} <= one for one in have) else None


class _Hooked(Module):
    """The hooks of one name, as a module that is attached there."""

    def __init__(self, point: HookPoint, hooks: list[tuple[Hook, bool]], swapped: bool) -> None:
        super().__init__()
        self.point, self.hooks, self.swapped = point, hooks, swapped

    def forward(self, value: Tensor) -> Tensor:
        own = value.transpose(1, 2).clone() if self.swapped else value.clone()
        for hook, backward in self.hooks:
            if backward:
                if own.requires_grad:
                    own.register_hook(lambda gradient, hook=hook: hook(gradient, hook=self.point))
                continue
            found = hook(own, hook=self.point)
            own = own if found is None else found
        return own.transpose(1, 2) if self.swapped else own
