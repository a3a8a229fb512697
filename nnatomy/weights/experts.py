"""Where a mixture of experts has its matrices: the parameters of one module, with an axis for experts.

The module is called again, on states, choices and parameters of our own (`functional_call`: the model's stay as they are), and
gradients say what each parameter is: that of a matrix is the outer product of what it reads and of what comes back to it. One
that reads what the module is given shows that, and one whose product the module gives shows what comes back to the module. A
neuron's entries are those to which comes back what comes back to the neuron. Of two, the one in which the neuron is linear is
`W_in`'s, and the other is activated. In the end what every expert gives has to be what these matrices and what the module makes
of their products give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nnatomy.validation.near import TOLERANCE
from nnatomy.weights.probes import Norm, is_same
from nnatomy.weights.projection import Projection, RefusedError, taken

Role = Literal["in", "gate", "out"]
_ACROSS = 24  # cotangents that tell neurons apart
_CHUNK = 1024  # entries compared with all neurons at once


@dataclass(frozen=True)
class ExpertsMatrix:
    """One matrix of each expert, as `Projection` is one matrix.

    Attributes:
        parameter: what the module calls it, of (expert, in, out) or, transposed, (expert, out, in).
        bias_name: likewise, of (expert, out); "" where there is none.
        index: which of the entries that it gives are the neurons'; all, if None.
    """

    module: Module
    parameter: str
    bias_name: str
    transposed: bool
    index: Tensor | None
    side: Literal["gives", "reads"]
    norm: Module | None = None

    def matrix(self) -> Tensor:
        """Of (expert, in, out)."""
        whole: Tensor = getattr(self.module, self.parameter)
        whole = whole.mT if self.transposed else whole
        return whole if self.index is None else taken(whole.movedim(-1, 0), self.index).movedim(0, -1)

    def bias(self) -> Tensor:
        """Of (expert, out); zeros where there is none."""
        if not self.bias_name:
            matrix = self.matrix()
            return matrix.new_zeros(matrix.shape[0], matrix.shape[2])
        own: Tensor = getattr(self.module, self.bias_name)
        return own if self.index is None else taken(own.movedim(-1, 0), self.index).movedim(0, -1)


#: By role, the matrix, or why there is none.
Roles = dict[str, Projection | ExpertsMatrix | str]


class Experts:
    """A module of a layer that may be its experts, looked at while the model runs."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def __call__(self, _module: Module, args: Any, kwargs: Any, output: Any) -> None:
        self.calls.append((args, kwargs, output))

    def find(self, given: Tensor | None, norms: list[Norm]) -> dict[str, ExpertsMatrix | str]:
        """Its matrices. Raises RefusedError where they do not show.

        Args:
            given: what the MLP is given, if it is a module.
        """
        called = _Called(self.module, self.calls)
        if given is not None and not is_same(called.states.flatten(0, -2), given.flatten(0, -2)):
            raise RefusedError("its experts do not read what the MLP is given, but what is made of it")
        before = next((one.module for one in norms if is_same(one.gave.flatten(0, -2), _first(called.states))), None)
        return _Search(called).find(before)


def of_layer(layers: list[Module], without: list[Module]) -> Experts | None:
    """The one module in these whose own parameters are matrices of as many experts each, if one is."""
    left_out = {inner for one in without for inner in one.modules()}
    found = dict.fromkeys(one for part in layers for one in part.modules() if one not in left_out)
    several = [one for one in found if len(_matrices(one)) > 1]
    return Experts(several[0]) if len(several) == 1 else None


def _matrices(module: Module) -> dict[str, Tensor]:
    every: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if not all(one.is_floating_point() and not is_traceable_wrapper_subclass(one) for one in every.values()):
        return {}  # quantized, or split
    own = {name: one for name, one in every.items() if one.ndim == 3}
    return own if len({one.shape[0] for one in own.values()}) == 1 else {}


def _first(states: Tensor) -> Tensor:
    """Those of the first prompt, of two positions."""
    return states.flatten(0, -2)[:2]


class _Called:
    """The module, to be called on states of (row, hidden), each with an expert of its own, with other parameters."""

    def __init__(self, module: Module, calls: list[Any]) -> None:
        if len(calls) != 1:
            raise RefusedError(f"its experts are called {len(calls)} times")
        self.module = module
        self._args, self._kwargs, output = calls[0]
        every = {**dict(enumerate(self._args)), **self._kwargs}
        values = {name: one for name, one in every.items() if isinstance(one, Tensor)}
        chosen = [name for name, one in values.items() if not (one.is_floating_point() or one.dtype == torch.bool)]
        if len(chosen) != 1 or len(values) != 3 or not isinstance(output, Tensor):
            raise RefusedError("its experts are not one function of states, choices and their weights")
        self._index = chosen[0]
        index = values.pop(self._index)
        weights = [name for name, one in values.items() if one.shape == index.shape]
        if len(weights) != 1:
            raise RefusedError("its experts are not given a weight for each choice")
        self._weights = weights[0]
        ((self._states, self.states),) = ((name, one) for name, one in values.items() if name != self._weights)
        self.choices = index.shape[-1]
        self.experts = next(iter(_matrices(module).values())).shape[0]
        self.device, self.dtype = self.states.device, self.states.dtype

    def __call__(self, states: Tensor, experts: Tensor, parameters: dict[str, Tensor]) -> Float[Tensor, "row hidden"]:
        rows = len(states)
        index = (experts[:, None] + torch.arange(self.choices)) % self.experts
        weights = torch.zeros(rows, self.choices)
        weights[:, 0] = 1
        lead = (1,) * (self.states.ndim - 2)
        put = {
            self._states: states.view(*lead, *states.shape),
            self._index: index.to(self.device),
            self._weights: weights.to(self.device, states.dtype),
        }
        args = [put.get(i, one) for i, one in enumerate(self._args)]
        kwargs = {name: put.get(name, one) for name, one in self._kwargs.items()}
        gave: Tensor = functional_call(self.module, parameters, tuple(args), kwargs)
        return gave.reshape(rows, -1)

    def everyones(self, one: Tensor) -> Tensor:
        """One expert's, for all."""
        return one.to(self.device).expand(self.experts, *one.shape)


class _Search:
    def __init__(self, called: _Called) -> None:
        self.called = called
        self.hidden = called.states.shape[-1]
        self._random = torch.Generator().manual_seed(0)
        self.shared = {
            name: one.detach()[0].float().cpu() for name, one in called.module.named_parameters(recurse=False)
        }
        #: By parameter, whether it is (out, in).
        self.reading: dict[str, bool] = {}
        self.biases: dict[str, str] = {}

    def find(self, norm: Module | None) -> dict[str, ExpertsMatrix | str]:
        self._tell_apart()
        first, second = self._entries()
        module = self.called.module
        found: dict[str, ExpertsMatrix | str] = {
            "gate": "its MLP is not gated: the activation function is applied to all that W_in gives"
        }
        for role, entries in (("in", first), ("gate", second)):
            if entries is not None:
                name, index = self._owner(entries)
                bias = self.biases.get(name, "")
                found[role] = ExpertsMatrix(module, name, bias, self.reading[name], index, "gives", norm)
        bias = self.biases.get(self.down, "")
        found["out"] = ExpertsMatrix(module, self.down, bias, self.down_transposed, None, "reads")
        self._prove(found, first, second)
        return found

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random)

    def _run(self, states: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """On these states, with one expert's parameters for every one, in float32."""
        whole = {name: self.called.everyones(one) for name, one in parameters.items()}
        return self.called(states.to(self.called.device), torch.zeros(len(states), dtype=torch.long), whole).cpu()

    def _tell_apart(self) -> None:
        """Which parameter is what, by its gradient."""
        leaves = {name: one.clone().requires_grad_() for name, one in self.shared.items()}
        states, back = self._draw(1, self.hidden), self._draw(self.hidden)
        with torch.enable_grad():
            gave = self._run(states, leaves)
            if gave.shape[-1] != self.hidden:
                raise RefusedError("what its experts give is no stream")
            grads = torch.autograd.grad((gave * back).sum(), [*leaves.values()], allow_unused=True)
        by_name = {name: one for name, one in zip(leaves, grads, strict=True) if one is not None and bool(one.any())}
        down: list[tuple[str, bool]] = []
        came: dict[str, Tensor] = {}
        for name, grad in by_name.items():
            if grad.ndim != 2:
                continue
            for transposed, one in ((False, grad), (True, grad.T)):  # (in, out)
                if _is_outer(one, states[0]):
                    self.reading[name] = transposed
                    came[name] = states[0] @ one / (states[0] @ states[0])
                elif _is_outer(one.T, back):
                    down.append((name, transposed))
        if not self.reading or len(down) != 1:
            raise RefusedError(
                "its experts are no matrices between which each neuron is a function of what the first give"
            )
        ((self.down, self.down_transposed),) = down
        came[self.down] = back
        for name, grad in by_name.items():
            of = next((one for one, value in came.items() if value.shape == grad.shape and _near(grad, value)), None)
            if name not in came and (of is None or grad.ndim != 1):
                raise RefusedError(f"its experts compute with {name} beside their matrices")
            if name not in came and of is not None:
                self.biases[name] = of
        self.biases = {matrix: bias for bias, matrix in self.biases.items()}
        self.widths = {name: self.shared[name].shape[0 if t else 1] for name, t in self.reading.items()}
        self.neurons = self.shared[self.down].shape[1 if self.down_transposed else 0]

    def _with(self, products: Float[Tensor, "row entry"], down: Float[Tensor, "neuron hidden"]) -> dict[str, Tensor]:
        """Parameters with which row `r` of the identity gives these products, and neurons are read by `down`."""
        made = {name: torch.zeros_like(self.shared[name]) for name in self.biases.values()}
        parts = products.split([*self.widths.values()], 1)
        for (name, transposed), part in zip(self.reading.items(), parts, strict=True):
            whole = torch.zeros(self.hidden, part.shape[1])
            whole[: len(part)] = part
            made[name] = whole.T if transposed else whole
        return {**made, self.down: down.T if self.down_transposed else down}

    def _back(self, products: Tensor, down: Tensor) -> Float[Tensor, "row entry"]:
        """What comes back to each product of row `r`, of entry `r` of what the experts give there."""
        rows = len(products)
        made = self._with(products, down)
        leaves = {name: made[name].clone().requires_grad_() for name in self.reading}
        with torch.enable_grad():
            gave = self._run(torch.eye(self.hidden)[:rows], {**made, **leaves})
            grads = torch.autograd.grad(gave[:, :rows].diagonal().sum(), [*leaves.values()])
        turned = [one.T if t else one for one, t in zip(grads, self.reading.values(), strict=True)]
        return torch.cat(turned, 1)[:rows]

    def _entries(self) -> tuple[Int[Tensor, " neuron"], Int[Tensor, " neuron"] | None]:
        """Of each neuron the entry in which it is linear (or of which alone it is a function), and the one that is activated."""
        width, rows = sum(self.widths.values()), min(_ACROSS, self.hidden)
        down = self._draw(self.neurons, self.hidden)
        across = down[:, :rows]  # (neuron, row): what comes back to it
        products = (0.05 + 0.2 * torch.rand(width, generator=self._random)).expand(rows, -1)  # below caps
        back = self._back(products, down).T  # (entry, row)
        neuron = torch.cat([_alike(one, across) for one in back.split(_CHUNK)])
        counts = torch.bincount(neuron[neuron >= 0], minlength=self.neurons)
        times = int(counts.max())
        if bool((neuron < 0).any()) or bool((counts != times).any()) or times > 2:
            raise RefusedError("its neurons are no functions of one or two products each")
        # Of two entries the first of one neuron is as that of another: they are in halves, in turn, or in two parameters.
        by_neuron = neuron.argsort(stable=True).view(self.neurons, times)
        if times == 1:
            return by_neuron[:, 0].contiguous(), None
        sizes = (back * across[neuron]).sum(1) / (across[neuron] ** 2).sum(1)
        linear: list[bool] = []
        for one in by_neuron.T:
            moved = products.clone()
            moved[:, one] *= -0.5
            again = (self._back(moved, down).T * across[neuron]).sum(1) / (across[neuron] ** 2).sum(1)
            linear.append(_near(again[one], sizes[one]))
        if sum(linear) != 1:
            raise RefusedError("its neurons are not linear in one product and a function of another")
        which = linear.index(True)
        return by_neuron[:, which].contiguous(), by_neuron[:, 1 - which].contiguous()

    def _owner(self, entries: Tensor) -> tuple[str, Tensor | None]:
        ends = torch.tensor([*self.widths.values()]).cumsum(0)
        owners = torch.bucketize(entries, ends, right=True)
        if bool((owners != owners[0]).any()):
            raise RefusedError("the products of its neurons come of several parameters")
        name = [*self.widths][int(owners[0])]
        own = entries - (int(ends[owners[0]]) - self.widths[name])
        return name, None if torch.equal(own, torch.arange(self.widths[name])) else own

    def _prove(self, found: dict[str, Any], first: Tensor, second: Tensor | None) -> None:
        """Raise RefusedError unless every expert gives what these matrices say."""
        own: dict[str, Tensor] = dict(self.called.module.named_parameters(recurse=False))
        for experts in torch.arange(self.called.experts).split(self.hidden):
            states = self._draw(len(experts), self.hidden).to(self.called.dtype)
            gave = self.called(states.to(self.called.device), experts, own).float().cpu()
            products = torch.zeros(len(experts), sum(self.widths.values()))
            for role, entries in (("in", first), ("gate", second)):
                if entries is not None:
                    products[:, entries] = _products(states, found[role], experts)
            eye = torch.eye(self.hidden)[: len(experts)]
            neurons: list[Tensor] = []
            for some in torch.arange(self.neurons).split(self.hidden):
                down = torch.zeros(self.neurons, self.hidden)
                down[some, torch.arange(len(some))] = 1
                neurons.append(self._run(eye, self._with(products, down))[:, : len(some)])
            expected = _products(torch.cat(neurons, 1), found["out"], experts)
            allowed = max(TOLERANCE.get(self.called.dtype, 0.0), TOLERANCE[torch.float32])
            if float((expected - gave).abs().max()) > allowed * float(gave.abs().max()):
                raise RefusedError("what its experts give is not what their matrices say")


def _products(states: Tensor, of: ExpertsMatrix, experts: Tensor) -> Tensor:
    matrix, bias = (one.detach()[experts.to(one.device)].float().cpu() for one in (of.matrix(), of.bias()))
    return torch.einsum("ri,rio->ro", states.float(), matrix) + bias


def _is_outer(grad: Tensor, by: Tensor) -> bool:
    """Whether it is the outer product of that and something."""
    return grad.shape[0] == len(by) and _near(torch.outer(by, by @ grad / (by @ by)), grad)


def _near(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= 1e-3 * float(other.abs().max())


def _alike(back: Float[Tensor, "entry row"], across: Float[Tensor, "neuron row"]) -> Int[Tensor, " entry"]:
    """To which neuron comes back what comes back to the entry, up to a factor; -1 for none."""
    size = back.norm(dim=1, keepdim=True)
    cosines = (back / size.clamp(min=1e-30)) @ (across / across.norm(dim=1, keepdim=True)).T
    best = cosines.abs().max(1)
    return torch.where((best.values > 0.999) & (size[:, 0] > 0), best.indices, -1)
