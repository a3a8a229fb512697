"""Where an MLP has its projections: which entries that its matrices give make which neuron, and how.

Into every entry goes a code of 1 and -1. An activation function gives two sizes for them, so that by its size a neuron shows the
code of what is activated; its sign then shows the code of what that is multiplied by, if it is. Where there is one size alone, as
without an activation function, the sign shows the one entry that it comes of.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.names import EXPERTS
from nnatomy.validation.near import is_near
from nnatomy.weights.codes import ROWS, match
from nnatomy.weights.experts import Experts, Roles, of_layer
from nnatomy.weights.probes import Norm, Probe, is_same, looking, matrices, norms, owner, passing, paths_in
from nnatomy.weights.projection import Projection, RefusedError, is_transposed

_ROLES = ("in", "gate", "out")
NO_GATE = "its MLP is not gated: the activation function is applied to all that W_in gives"


def find_mlps(model: Any) -> list[Roles]:
    """By layer, the projections of its MLP, or why there is none."""
    model._sums.find()
    layers = [_MLP(model, i) for i in range(len(model._anatomy.layers))]
    looked_at = (one for layer in layers for one in layer.looked_at)
    with passing(model) as inputs:
        with looking(looked_at), model.trace(**inputs) as tracer:
            for layer in layers:
                layer.read()
            if model.layers_output.modules[-1] is None:
                tracer.result  # noqa: B018
            else:  # so that the last neurons have been read
                model.layers_output[-1]
        for layer in layers:
            layer.find_experts()
    for layer in layers:
        layer.find_down()
    return [layer.found for layer in layers]


class _MLP:
    def __init__(self, model: Any, i: int) -> None:
        self.model, self.i = model, i
        anatomy = model._anatomy
        mixers = [one for one in (*anatomy.mixers[i], anatomy.cross_attentions[i]) if one is not None]
        mlp, layer = anatomy.mlps[i], anatomy.layers[i]
        self.refused = next((why for why, where in model.neurons.refusals().items() if i in where), "")
        within = [] if self.refused else matrices([layer] if mlp is None else [mlp], mixers)
        within = [one for one in within if one is not layer]
        paths = paths_in(layer, mlp)
        self.probes = [Probe(one, paths[one], 1 + k + 1000 * i) for k, one in enumerate(within)]
        chooses = getattr(model, EXPERTS).modules[i] is not None
        self.experts = of_layer([layer if mlp is None else mlp], mixers) if chooses and self.refused else None
        self.norms = norms(layer, model.hidden_size) if within or self.experts else []
        self.looked_at: list[Probe | Norm | Experts] = [*self.norms, *self.probes, *filter(None, [self.experts])]
        self.found: Roles = dict.fromkeys(_ROLES, self.refused)
        self._neurons = torch.zeros(0)
        self._given: Tensor | None = None

    def read(self) -> None:
        """In the trace, when the pass comes to its neurons."""
        inputs = self.model.mlps_input
        if self.experts is not None and inputs.modules[self.i] is not None:
            self._given = inputs[self.i].clone()
        if self.refused:
            return
        given = inputs[self.i][0].clone() if inputs.modules[self.i] is not None else None
        neurons = self.model.neurons[self.i].detach()
        self._neurons = neurons[0].clone()
        probes = [one for one in self.probes if one.calls == 1]
        try:
            if not probes:
                raise RefusedError("no matrix of its MLP gives something for each position")
            if not is_near(neurons[-1, 0], neurons[0, 0], 64):  # another prompt, with the same code
                raise RefusedError("neurons come of something else beside what matrices of its MLP give")
            by_sign, by_size = _decoded(neurons[:ROWS, 0].float().cpu(), torch.cat([one.signs for one in probes], 1))
            self.found["gate"] = NO_GATE
            for role, index in (("in", by_sign), ("gate", by_size)):
                if index is not None:
                    self.found[role] = self._given_by(probes, index, given)
        except RefusedError as error:
            self.found |= {"in": str(error), "gate": str(error)}
        for one in probes:
            one.forget()

    def find_experts(self) -> None:
        """Behind the pass: those that its router chooses of."""
        if self.experts is None:
            return
        try:
            self.found = {**self.experts.find(self._given, self.norms)}
        except RefusedError as error:
            self.found = dict.fromkeys(_ROLES, f"{self.refused}; and {error}")
        self._given = None

    def find_down(self) -> None:
        """Behind the pass: the matrix that reads the neurons."""
        if self.refused:
            return
        reading = [one for one in self.probes if one.calls == 1 and is_same(one.seen.given, self._neurons)]
        try:
            if not reading:
                raise RefusedError("no matrix of its MLP reads the neurons alone")
            down = reading[0]
            transposed = is_transposed(down.module, down.path, down.seen)
            self.found["out"] = Projection(down.module, down.path, None, "reads", transposed)
        except RefusedError as error:
            self.found["out"] = str(error)

    def _given_by(self, probes: list[Probe], index: Tensor, given: Tensor | None) -> Projection:
        probe, index = owner(probes, index, "they come of")
        if given is not None and not is_same(probe.seen.given, given):
            raise RefusedError(f"{probe.path}, of which neurons come, does not read what the MLP is given")
        transposed = is_transposed(probe.module, probe.path, probe.seen)
        before = next((one.module for one in self.norms if is_same(one.gave, probe.seen.given)), None)
        return Projection(probe.module, probe.path, index, "gives", transposed, norm=before)


def _decoded(neurons: Float[Tensor, "rows neuron"], signs: Tensor) -> tuple[Tensor, Tensor | None]:
    """The entry that each neuron is in proportion to, or a function of; and the one that is activated beside it, if any."""
    sizes, sign = neurons.abs(), neurons.sign()
    least, most = sizes.amin(0), sizes.amax(0)
    two_sizes = most - least > 0.02 * most
    if not bool(two_sizes.any()):
        return _known(match(sign, signs)), None
    activated = (sizes - (least + most) / 2).sign()
    gate = _known(match(activated, signs))
    either = sign, sign * activated  # an activation function may or may not give negative numbers
    if any(bool((one.amax(0) - one.amin(0) < 1.5).all()) for one in either):
        return gate, None
    found = [match(one, signs) for one in either]
    return _known(max(found, key=lambda one: int((one >= 0).sum()))), gate


def _known(index: Tensor) -> Tensor:
    if bool((index < 0).any()):
        raise RefusedError("neurons are no product of an entry that matrices of the MLP give and a function of another")
    return index
