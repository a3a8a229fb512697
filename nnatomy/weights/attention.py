"""Where an attention has its projections: which entries that its matrices give are its queries, keys and values, and which of what
its output projection reads is what each head gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy import names
from nnatomy.standardized.accessors import LayerAccessor
from nnatomy.validation.near import is_near
from nnatomy.weights.codes import PATTERNS, ROWS, codes, is_plain, match, response, written
from nnatomy.weights.experts import Roles
from nnatomy.weights.probes import Beside, Norm, Probe, is_same, looking, matrices, norms, owner, passing, paths_in
from nnatomy.weights.projection import Projection, RefusedError, is_transposed

_INPUTS = {"Q": "queries", "K": "keys", "V": "values"}


def find_attentions(model: Any) -> list[Roles]:
    """By layer, the projections of its attention, or why there is none."""
    every = ("attentions_input", *_INPUTS.values(), "heads_output", "attentions_output")
    return _find(model, {name: getattr(model, name) for name in every})


def find_cross_attentions(model: Any) -> list[Roles]:
    """By layer, those of its attention to an encoder: keys and values are of what it is given beside the stream."""
    places = model._places()["cross_attentions"]
    inside = {name: model._accessor(names.ROWS[name], *places) for name in (*_INPUTS.values(), "heads_output")}
    ends = {name: getattr(model, f"cross_{name}") for name in ("attentions_input", "attentions_output")}
    return _find(model, {**inside, **ends})


def _find(model: Any, accessors: dict[str, LayerAccessor]) -> list[Roles]:
    if not accessors["attentions_output"].modules:
        # (A layer that does not run on text may attend to what an image is made into, which nobody has seen then.)
        idle = model._anatomy.absent["layer"]
        return [dict.fromkeys(("Q", "K", "V", "O"), why or names.NO_CROSS) for why in idle]
    layers = [_Attention(model, accessors, i) for i in range(len(model._anatomy.layers))]
    looked_at = (one for layer in layers for one in layer.looked_at)
    with passing(model) as inputs, looking(looked_at), model.trace(**inputs):
        for layer in layers:
            layer.read()
    return [layer.found for layer in layers]


class _Attention:
    def __init__(self, model: Any, accessors: dict[str, LayerAccessor], i: int) -> None:
        self.model, self.accessors, self.i = model, accessors, i
        self.found: Roles = {}
        self.crosses = accessors["attentions_output"] is not model.attentions_output
        self.module: Module | None = accessors["attentions_output"].modules[i]
        paths = paths_in(model._anatomy.layers[i], self.module)
        within = [] if self.module is None else [one for one in matrices([self.module]) if one is not self.module]
        self.probes = [
            Probe(one, paths[one], 1 + k + 1000 * i, written, any_length=self.crosses) for k, one in enumerate(within)
        ]
        self.norms = norms(model._anatomy.layers[i], model.hidden_size) if within else []
        self.beside = [Beside(self.module)] if self.crosses and self.module is not None else []
        self.looked_at: list[Probe | Norm | Beside] = [*self.norms, *self.probes, *self.beside]

    def read(self) -> None:
        """In the trace, when the pass comes to it."""
        given = self._value("attentions_input")
        values = {role: self._value(name) for role, name in _INPUTS.items()}
        heads = self._value("heads_output")
        if heads is not None:
            size = heads[0, 0].numel()
            signs = codes(size, 0)
            new = heads.clone()
            new[:ROWS, 0] = written(signs).to(heads).view_as(new[:ROWS, 0])
            self.accessors["heads_output"][self.i] = new
        output = self._value("attentions_output")
        for role, value in values.items():
            self._try(role, _INPUTS[role], value, lambda v=value, role=role: self._given_by(v, given, role))
        self._try("O", "heads_output", heads, lambda: self._read_by(heads, signs, output))
        if output is not None:  # so that the stream goes on as the same in all rows
            self.accessors["attentions_output"][self.i] = output[:1].expand_as(output).clone()
        for one in self.looked_at:
            one.forget()

    def _value(self, name: str) -> Tensor | None:
        accessor = self.accessors[name]
        return accessor[self.i] if accessor.modules[self.i] is not None else None

    def _try(self, role: str, name: str, value: Tensor | None, find: Any) -> None:
        try:
            if value is None:
                refused = next(why for why, layers in self.accessors[name].refusals().items() if self.i in layers)
                raise RefusedError(refused)
            self.found[role] = find()
        except RefusedError as error:
            self.found[role] = str(error)

    def _given_by(self, value: Tensor, given: Tensor | None, role: str) -> Projection:
        """Whose output queries, keys or values are: (rows, head, position, dim)."""
        probes = [one for one in self.probes if one.calls == 1]
        signs = torch.cat([one.signs for one in probes], 1) if probes else torch.zeros(PATTERNS, 1)
        index = match(response(value[:, :, 0].flatten(1)), signs)
        if not probes or bool((index < 0).any()):
            raise RefusedError(
                f"they are not, entry by entry, what matrices of the attention give{self._without_weights()}"
            )
        probe, own = owner(probes, index, "they come of")
        seconds = value[:ROWS, :, 1]  # where the same code is written in all rows
        if not torch.equal(seconds[:1].expand_as(seconds), seconds):
            raise RefusedError("positions are mixed behind the projection (by a convolution, say)")
        if given is None:
            why = self.accessors["attentions_input"].refusals()
            raise RefusedError(
                f"{probe.path} gives them, but of what it reads there is no attentions_input: "
                + next((one for one, layers in why.items() if self.i in layers), "the attention takes several values")
            )
        read = (
            [given[0]] if role == "Q" or not self.crosses else [one for beside in self.beside for one in beside.given]
        )
        if not any(is_same(probe.seen.given, one) for one in read):
            normed = any(is_same(one.gave, probe.seen.given) for one in self.norms)
            what = "a norm" if normed else "another matrix (low-rank, latent) or the like"
            of = " of the encoder" if self.crosses and role != "Q" else ""
            raise RefusedError(
                f"{probe.path}, which gives them, does not read what the attention is given{of}, but what {what} in it gives"
            )
        if not is_near(value[-1, :, 0], value[0, :, 0], 64):  # another prompt, with the same code
            raise RefusedError(f"beside what {probe.path} gives, they come of something else: an adapter, say")
        plain = is_plain(value[:, :, 0].flatten(1), signs[:, index])
        return self._proved(probe, _once(own.view(value.shape[1], value.shape[3])), "gives", plain)

    def _read_by(self, heads: Tensor | None, signs: Tensor, output: Tensor | None) -> Projection:
        """Which matrix reads what the heads give: (rows, position, head, dim)."""
        assert heads is not None
        for probe in self.probes:
            if probe.calls != 1 or probe.first.shape[1] != signs.shape[1]:
                continue
            index = match(response(probe.first), signs)
            if torch.equal(index.sort().values, torch.arange(len(index))):
                break
        else:
            raise RefusedError(
                f"no matrix of the attention reads what the heads give, entry by entry{self._without_weights()}"
            )
        if output is None or not _agrees(response(output[:, 0]), probe.signs):
            raise RefusedError(f"what {probe.path} gives, which reads the heads, is not what the attention gives")
        plain = is_plain(probe.first, signs[:, index])
        return self._proved(probe, index.argsort().view(heads.shape[2], heads.shape[3]), "reads", plain)

    def _proved(self, probe: Probe, index: Tensor, side: Any, plain: bool) -> Projection:
        transposed = is_transposed(probe.module, probe.path, probe.seen)
        before = next((one.module for one in self.norms if is_same(one.gave, probe.seen.given)), None)
        return Projection(probe.module, probe.path, index, side, transposed, plain, before)

    def _without_weights(self) -> str:
        """In words, the modules that may be quantized."""
        assert self.module is not None
        every = [one for one in self.module.modules() if one is not self.module and not [*one.children()]]
        odd = [one for one in every if not hasattr(one, "weight") and ([*one.buffers()] or [*one.parameters()])]
        paths = paths_in(self.module)
        return (
            "; without a weight, as if quantized, are " + ", ".join(f"{paths[m]} ({type(m).__name__})" for m in odd)
        ) * bool(odd)


def _once(index: Tensor) -> Tensor:
    """Each head of keys or values once, where they are repeated for neighbouring query heads."""
    times = len(index) // len(torch.unique(index, dim=0))
    repeated = torch.equal(index[::times].repeat_interleave(times, 0), index)
    return index[::times] if repeated else index


def _agrees(came: Tensor, signs: Tensor) -> bool:
    """Whether codes have come through, but for a norm or the like that may turn some."""
    return came.shape == signs.shape and bool(((came * signs) > 0).float().mean() > 0.9)
