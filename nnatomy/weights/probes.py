"""Modules that may be projections, looked at while a model runs on one prompt in all rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.arch_configs import example_inputs
from nnatomy.errors import InputError
from nnatomy.validation.near import is_near
from nnatomy.weights.codes import ROWS, codes
from nnatomy.weights.projection import RefusedError, Seen

#: Positions of the prompt.
SEQ = 2
#: Behind the rows with a code each comes another prompt, with the first row's.
BATCH = ROWS + 1


class Probe:
    """A module with a matrix, and what came through it in the newest pass.

    Args:
        seed: of its codes.
        writes: what is written of the codes into its output; as they are, one for each row, if None.
        any_length: whether it may be given other positions than the prompt's: an encoder's.

    Attributes:
        signs: the codes that are written into what it gives.
        first: what it was given at the first position, (rows, in); not where only one prompt's is asked for.
        seen: what it was given and gave for the first prompt, before anything was written.
        calls: how often it was called.
    """

    def __init__(
        self,
        module: Module,
        path: str,
        seed: int,
        writes: Callable[[Tensor], Tensor] | None = None,
        any_length: bool = False,
    ) -> None:
        self.module, self.path = module, path
        self._any_length = any_length
        self._seed, self._writes = seed, writes
        self.calls = 0
        self.forget()

    def forget(self) -> None:
        """Let go what has been seen."""
        self.signs = self.first = torch.zeros(ROWS, 0)
        self.seen = Seen(torch.zeros(0, 0), torch.zeros(0, 0))

    def __call__(self, _module: Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
        if given is None or not (given.is_floating_point() and isinstance(output, Tensor)):
            return None
        rows, others = (one.numel() // one.shape[-1] for one in (given, output))
        if rows != others or (rows % BATCH if self._any_length else rows != BATCH * SEQ):
            return None
        self.calls += 1
        given, gave = (one.detach().reshape(BATCH, rows // BATCH, -1) for one in (given, output))
        self.seen = Seen(given[0].clone(), gave[0].clone())
        if self._writes is None:
            self.signs = codes(gave.shape[-1], self._seed, ROWS)
            table = self.signs.to(gave)
        else:
            self.first = given[:ROWS, 0].clone()
            self.signs = codes(gave.shape[-1], self._seed)
            table = self._writes(self.signs).to(gave)
        new = table[0].expand_as(gave).clone()
        new[:ROWS, 0] = table
        return new.view_as(output)


class Norm:
    """A module with a scale for each entry of the stream, and what it gave for the first prompt."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.forget()

    def forget(self) -> None:
        """Let go what has been seen."""
        self.gave = torch.zeros(0)

    def __call__(self, _module: Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.numel() == BATCH * SEQ * output.shape[-1]:
            self.gave = output.detach().reshape(BATCH, SEQ, -1)[0].clone()


class Beside:
    """An attention to an encoder, and the streams that it was given, of the first prompt."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.forget()

    def forget(self) -> None:
        """Let go what has been seen."""
        self.given: list[Tensor] = []

    def __call__(self, _module: Module, args: Any, kwargs: Any, _output: Any) -> None:
        tensors = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        self.given = [one.detach()[0].clone() for one in tensors if one.ndim == 3 and len(one) == BATCH]


def matrices(parts: Iterable[Module], without: Iterable[Module] = ()) -> list[Module]:
    """The modules in these, outer ones first, that have a matrix."""
    left_out = {inner for one in without for inner in one.modules()}
    found = dict.fromkeys(inner for part in parts for inner in part.modules())
    return [one for one in found if one not in left_out and getattr(getattr(one, "weight", None), "ndim", 0) == 2]


def paths_in(*parts: Module | None) -> dict[Module, str]:
    """What the modules in these are called in the first of them that has them."""
    named = [(module, path) for part in parts if part is not None for path, module in part.named_modules()]
    return dict(reversed(named))


def norms(layer: Module, width: int) -> list[Norm]:
    """The modules in a layer whose parameters are a scale, or a scale and a shift, of the stream's width."""
    every = ((module, [*module.named_parameters()]) for module in layer.modules())
    return [
        Norm(module)
        for module, own in every
        if own and {"weight", "bias"} >= {name for name, _ in own} and all(p.shape == (width,) for _, p in own)
    ]


@contextmanager
def looking(probes: Iterable[Any]) -> Iterator[None]:
    """While a model runs."""
    hooks = [one.module.register_forward_hook(one, with_kwargs=True) for one in probes]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def passing(model: Any, rows: int = ROWS) -> Iterator[dict[str, Any]]:
    """For a pass without dropout and gradients: its arguments, one prompt in so many rows, and another one in the last row."""
    if model._shards:
        raise InputError("The model's parameters are sharded (FSDP2): take its weights before fully_shard.")
    if model._ranks is not None:
        raise InputError(
            f"The model's parameters are split over {model._ranks.size} ranks, each of which computes with its slice: take its "
            "weights of the model in one process. (hf_model's own parameters give theirs by .full_tensor(), on all ranks at once.)"
        )
    if model.device.type == "meta":
        raise InputError("The model is on the meta device: there are no values by which its weights could be told.")
    inputs = example_inputs(model.steps_of, 2, SEQ, model.device)
    training = [module for module in model.hf_model.modules() if module.training]
    model.hf_model.eval()
    try:
        with torch.no_grad():
            yield {name: torch.cat([value[:1].repeat_interleave(rows, 0), value[1:]]) for name, value in inputs.items()}
    finally:
        for module in training:
            module.training = True


def owner(probes: list[Probe], index: Tensor, what: str) -> tuple[Probe, Tensor]:
    """Whose entries these are, of all that they give one behind the other; and which of its own. Raises RefusedError for several."""
    ends = torch.tensor([one.signs.shape[1] for one in probes]).cumsum(0)
    owners = sorted({*torch.bucketize(index, ends, right=True).tolist()})
    if len(owners) > 1:
        raise RefusedError(f"{what} several matrices: {', '.join(probes[one].path for one in owners)}")
    probe = probes[owners[0]]
    return probe, index - (int(ends[owners[0]]) - probe.signs.shape[1])


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two modules were given the same, or one what the other gave."""
    return one.shape == other.shape and is_near(one.to(other), other, 4)
