"""`ActivationCache`: values by hook name, and the stream as a sum of what the parts add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.compat.transformer_lens.hook_points import get_act_name
from nnatomy.compat.transformer_lens.utils import Slice
from nnatomy.errors import InputError
from nnatomy.methods.frozen_norms import FrozenNorms

if TYPE_CHECKING:
    from nnatomy.compat.transformer_lens.model import HookedTransformer


class ActivationCache(Mapping[str, Tensor]):
    """Values by hook name: `cache["blocks.5.hook_resid_post"]`, `cache["resid_post", 5]`.

    Sums of the stream have the components first: (component, batch, pos, d_model), without the batch where the cache has none.
    `pos_slice` and `batch_slice` are what `Slice` takes; an index takes its axis away.

    Args:
        values: by hook name.
        model: the HookedTransformer that was run.
        has_batch_dim: whether their first axis is the batch.
    """

    def __init__(self, values: Mapping[str, Tensor], model: HookedTransformer, has_batch_dim: bool = True) -> None:
        self.cache_dict = dict(values)
        self.model = model
        self.has_batch_dim = has_batch_dim

    def __getitem__(self, key: Any) -> Tensor:
        given: tuple[Any, ...] = key if isinstance(key, tuple) else (key,)
        if not given or not isinstance(given[0], str):
            raise InputError(f'cache[{key!r}]: give a hook name, or a short name and a layer: cache["resid_post", 5].')
        name, layer, kind = (*given, None, None)[:3]
        if isinstance(layer, int) and layer < 0:
            layer += self.model.cfg.n_layers
        full = get_act_name(name, layer, kind)
        if full not in self.cache_dict:
            self.model._place(full)  # raises if there is no such name
            raise KeyError(f"{full} was not kept: names_filter left it out.")
        return self.cache_dict[full]

    def __contains__(self, key: object) -> bool:
        return key in self.cache_dict

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        return f"ActivationCache with keys {[*self.cache_dict]}"

    def to(self, device: torch.device | str) -> ActivationCache:
        """All values moved there, in place."""
        self.cache_dict = {name: value.to(device) for name, value in self.cache_dict.items()}
        return self

    def remove_batch_dim(self) -> ActivationCache:
        """Without the batch, which is of one; in place."""
        if self.has_batch_dim:
            for name, value in self.cache_dict.items():
                assert len(value) == 1, (
                    f"Cannot remove batch dimension from cache with batch size > 1, for key {name} with shape {tuple(value.shape)}"
                )
            self.cache_dict = {name: value[0] for name, value in self.cache_dict.items()}
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """A cache of some of the prompts."""
        assert self.has_batch_dim or batch_slice is None, "batch_slice: the cache has no batch"
        which = Slice(batch_slice)
        values = {name: which.apply(value) for name, value in self.cache_dict.items()}
        return ActivationCache(values, self.model, self.has_batch_dim and which.mode != "int")

    def stack_activation(
        self, activation_name: str, layer: int = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """The values of one short name, of the first `layer` layers; of all by default."""
        return torch.stack([self[activation_name, i, sublayer_type] for i in range(self._before(layer))])

    # The stream as a sum.

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The stream before each layer up to one, and (where that is one past the last, None or -1) after the last.

        Args:
            incl_mid: between attention and MLP, too.
            mlp_input: up to the middle of that layer.
            return_labels: give (values, labels).
        """
        last, names = self._before(layer), list[tuple[str, str, int]]()
        for i in range(last):
            names += [(f"{i}_pre", "resid_pre", i)] + [(f"{i}_mid", "resid_mid", i)] * incl_mid
        if last == self.model.cfg.n_layers:
            names.append(("final_post", "resid_post", last - 1))
        else:
            names += [(f"{last}_pre", "resid_pre", last)] + [(f"{last}_mid", "resid_mid", last)] * mlp_input
        return self._stacked(
            {label: self[name, i] for label, name, i in names},
            layer,
            apply_ln,
            pos_slice,
            return_labels,
        )

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What embeddings, attentions and MLPs before a layer add: their sum is the stream there.

        Args:
            mlp_input: with that layer's attention.
            mode: "attn" or "mlp": of these alone.
        """
        if mode not in ("all", "attn", "mlp"):
            raise InputError(f"mode={mode!r}: it is 'all', 'attn' or 'mlp'; single heads are stack_head_results().")
        parts: dict[str, Tensor] = {}
        if incl_embeds:
            parts["embed"] = self["embed"]
            if not torch.equal(beside := self["resid_pre", 0] - self["embed"], torch.zeros_like(self["embed"])):
                parts["pos_embed"] = beside
        last = self._before(layer)
        for i in range(last + mlp_input):
            parts |= {f"{i}_attn_out": self["attn_out", i]} if mode in ("all", "attn") else {}
            parts |= {f"{i}_mlp_out": self["mlp_out", i]} if mode in ("all", "mlp") and i < last else {}
        return self._stacked(parts, layer, apply_ln, pos_slice, return_labels)

    def compute_head_results(self) -> None:
        """What each head adds, `hook_result`: (batch, pos, head, d_model); it is in the cache from then on."""
        for i in range(self.model.cfg.n_layers):
            if (name := f"blocks.{i}.attn.hook_result") not in self.cache_dict:
                self.cache_dict[name] = self.model._computed(name, self["z", i])

    def stack_head_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Any:
        """What each head of the layers before one adds; with `incl_remainder` what the rest of the stream is."""
        last, where = self._before(layer), Slice(pos_slice)
        parts: dict[str, Tensor] = {}
        for i in range(last):
            result = self.model._computed(f"blocks.{i}.attn.hook_result", where.apply(self["z", i], -3))
            parts |= {f"L{i}H{head}": one for head, one in enumerate(result.unbind(-2))}
        return self._with_rest(parts, last, incl_remainder, where, layer, apply_ln, return_labels)

    def get_neuron_results(
        self, layer: int, neuron_slice: Any = None, pos_slice: Any = None, project_output_onto: Tensor | None = None
    ) -> Tensor:
        """What each neuron of one layer adds: (batch, pos, neuron, d_model); or that, projected: (..., neuron, output)."""
        which = Slice([neuron_slice] if isinstance(neuron_slice, int) else neuron_slice)
        acts = which.apply(Slice(pos_slice).apply(self["post", layer], -2), -1)
        out = which.apply(self.model.model.W_out[layer])
        if project_output_onto is not None:
            out = out @ project_output_onto
        return acts * out if out.ndim == 1 else acts[..., None] * out

    def stack_neuron_results(
        self,
        layer: int,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:
        """What each neuron of the layers before one adds, likewise."""
        last, where, parts = self._before(layer), Slice(pos_slice), dict[str, Tensor]()
        early = (
            None if apply_ln or incl_remainder else project_output_onto
        )  # what is projected at once is not held whole
        for i in range(last):
            results = self.get_neuron_results(i, neuron_slice, where, early)
            axis = -1 if early is not None and early.ndim == 1 else -2
            numbers = Slice([neuron_slice] if isinstance(neuron_slice, int) else neuron_slice).indices(
                self.model.cfg.d_mlp
            )
            parts |= {f"L{i}N{number}": one for number, one in zip(numbers, results.unbind(axis), strict=True)}
        onto = project_output_onto if early is None else None
        return self._with_rest(parts, last, incl_remainder, where, layer, apply_ln, return_labels, onto)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:
        """The stream before a layer as what each head, each neuron (or MLP), the embeddings and the biases add."""
        last, where = self._before(layer), Slice(pos_slice)
        heads, labels = self.stack_head_results(last + mlp_input, True, pos_slice=where)
        parts = dict(zip(labels, heads, strict=True))
        if expand_neurons:
            neurons, labels = self.stack_neuron_results(last, where, None, True)
            parts |= dict(zip(labels, neurons, strict=True))
        else:
            parts |= {f"{i}_mlp_out": where.apply(self["mlp_out", i], -2) for i in range(last)}
        parts["embed"] = where.apply(self["embed"], -2)
        if not torch.equal(beside := self["resid_pre", 0] - self["embed"], torch.zeros_like(self["embed"])):
            parts["pos_embed"] = where.apply(beside, -2)
        stream = self._stream(last, mlp_input)
        parts["bias"] = where.apply(stream, -2) - torch.stack([*parts.values()]).sum(0)
        return self._finished(parts, last, where, apply_ln, return_labels, project_output_onto, mlp_input)

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,  # noqa: ARG002
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Parts of the stream behind the final norm, with its scale held at what it is for the whole; its gain too, not its bias.

        Raises:
            InputError: for the norm of a layer, or one that is to be computed for each part.
        """
        if recompute_ln or self._before(layer) != self.model.cfg.n_layers:
            raise InputError(
                "apply_ln is of the final norm alone, its scale that of the whole stream: layer=None or -1."
            )
        whole = self._stream(self.model.cfg.n_layers, False)
        if self.has_batch_dim:
            whole = Slice(batch_slice).apply(whole)
            residual_stack = Slice(batch_slice).apply(residual_stack, 1) if has_batch_dim else residual_stack
        whole = Slice(pos_slice).apply(whole, -2)
        if residual_stack.shape[1:] != whole.shape:
            raise InputError(
                f"The stack is of {tuple(residual_stack.shape)}, and behind its first axis the stream is of "
                f"{tuple(whole.shape)}: give the pos_slice and batch_slice that the stack was made with."
            )
        norm = self.model.model.steps_of.get_submodule(self.model.model.ln_final.path)
        with torch.enable_grad(), FrozenNorms():
            expanded = whole.expand(residual_stack.shape).clone()
            return torch.func.jvp(norm, (expanded.detach(),), (residual_stack.detach().to(expanded),))[1]

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component ..."]:
        """What each part of the last stream adds to a token's logit, or to the difference of two, by the direct path.

        Args:
            residual_stack: of all prompts, or with `has_batch_dim=False` of those that `batch_slice` takes.
            tokens, incorrect_tokens: one for all prompts, or one for each that `batch_slice` takes.

        Raises:
            NotInThisModelError: where the logits are not what the final norm gives times a matrix.
        """
        ids = self._ids(tokens)
        directions = self.model.tokens_to_residual_directions(ids)
        if incorrect_tokens is not None:
            wrong = self._ids(incorrect_tokens)
            if wrong.shape != ids.shape:
                raise InputError(
                    f"tokens are {tuple(ids.shape)} and incorrect_tokens {tuple(wrong.shape)}: give as many."
                )
            directions = directions - self.model.tokens_to_residual_directions(wrong)
        stack = self.apply_ln_to_stack(residual_stack, -1, False, pos_slice, batch_slice, has_batch_dim)
        while 1 < directions.ndim < stack.ndim - 1:  # one token for all positions of a prompt
            directions = directions.unsqueeze(-2)
        return (stack * directions.to(stack)).sum(-1)

    def _ids(self, tokens: Any) -> Tensor:
        if isinstance(tokens, str):
            return torch.tensor(self.model.to_single_token(tokens))
        if isinstance(tokens, (list, tuple)) and any(isinstance(one, str) for one in tokens):
            return torch.tensor([self.model.to_single_token(one) for one in tokens])
        return torch.as_tensor(tokens)

    def _before(self, layer: int | None) -> int:
        """How many layers stand before that one: None and -1 are all."""
        count = self.model.cfg.n_layers
        last = count if layer is None else layer + count + 1 if layer < 0 else layer
        if not 0 <= last <= count:
            raise InputError(f"layer={layer}: give 0 to {count}, before which layer; None and -1 are behind the last.")
        return last

    def _stream(self, last: int, mlp_input: bool) -> Tensor:
        if last == self.model.cfg.n_layers:
            return self["resid_post", last - 1]
        return self["resid_mid" if mlp_input else "resid_pre", last]

    def _with_rest(
        self,
        parts: dict[str, Tensor],
        last: int,
        remainder: bool,
        where: Slice,
        layer: Any,
        apply_ln: bool,
        labelled: bool,
        onto: Tensor | None = None,
    ) -> Any:
        if remainder or not parts:
            whole = where.apply(self["resid_post", last - 1] if last else self["resid_pre", 0], -2)
            rest = whole - torch.stack([*parts.values()]).sum(0) if parts else whole
            parts = {**parts, "remainder": rest} if remainder else {}
            if not parts:
                empty = rest.new_zeros((0, *rest.shape))
                return (empty, []) if labelled else empty
        return self._finished(parts, layer, where, apply_ln, labelled, onto)

    def _stacked(self, parts: dict[str, Tensor], layer: Any, apply_ln: bool, pos_slice: Any, labelled: bool) -> Any:
        where = Slice(pos_slice)
        return self._finished(
            {name: where.apply(one, -2) for name, one in parts.items()}, layer, where, apply_ln, labelled
        )

    def _finished(
        self,
        parts: dict[str, Tensor],
        layer: Any,
        where: Slice,
        apply_ln: bool,
        labelled: bool,
        onto: Tensor | None = None,
        mlp_input: bool = False,
    ) -> Any:
        stack = torch.stack([*parts.values()])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice=where)
        if onto is not None:
            stack = stack @ onto
        return (stack, [*parts]) if labelled else stack
