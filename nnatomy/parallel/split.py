"""How the values inside of a model's attentions and MLPs are split over its ranks: gathered when they are shown, and cut again."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.nn import Module

from nnatomy.core.points import Axes, Report
from nnatomy.errors import InputError
from nnatomy.names import NEURONS, TABLE
from nnatomy.parallel.gathered import gathered, narrowed, own_slice
from nnatomy.parallel.plan import head_counts
from nnatomy.parallel.ranks import Ranks

#: By kind of a point inside of an attention, which axis is of heads.
_HEADS = {row.kind: row.head for row in TABLE if row.place == "attention" and row.head is not None}
#: The styles of a plan that leave on each rank its slice of what a module gives.
_SLICES = ("colwise", "packed_colwise")


class Split:
    """What of a model each rank has a slice of.

    Args:
        ranks: over which it is split.
        model: the Hugging Face model.
        attentions: its attention modules.

    Raises:
        InputError: if a slice ends within a head.
    """

    def __init__(self, ranks: Ranks, model: Any, attentions: Any) -> None:
        self.ranks = ranks
        styles = {path: _style(path, model.tp_plan or {}) for path, _ in model.named_modules()}
        paths = {module: path for path, module in model.named_modules()}
        self._attentions = {
            module
            for module in attentions
            if module is not None
            and any(styles[path] in _SLICES for path in styles if path.startswith(f"{paths[module]}."))
        }
        #: By module, how what it is given, or gives, is cut along its last axis.
        self.cuts: dict[tuple[Module, str], tuple[int, ...]] = {}
        #: Modules of which each rank has a slice, and nothing says along which axis.
        self.hidden: set[Module] = set()
        modules = dict(model.named_modules())
        for path, style in styles.items():
            if style in _SLICES or style == "moe_tp_experts":
                around = modules[path if style == "moe_tp_experts" else path.rpartition(".")[0]]
                self.hidden.update(one for one in around.modules() if one is not around)
        for path, style in styles.items():
            module = modules[path]
            if style:
                self.hidden.discard(module)
            if style == "colwise":
                self.cuts[module, "output"] = self._cut(module.out_features)
            elif style == "rowwise" and hasattr(module, "in_features"):
                self.cuts[module, "input"] = self._cut(module.in_features)
            elif style in ("replicated_with_grad_allreduce", "packed_colwise"):
                self.hidden.add(module)
        counts = sorted({*head_counts(model.config.get_text_config())})
        if self._attentions and any(count % ranks.size for count in counts):
            raise InputError(
                f"The model has {' and '.join(map(str, counts))} heads (of queries, and of keys and values), which do not go evenly "
                f"into {ranks.size} ranks: Transformers' plan cuts through heads, and the forward fails. Load it with every rank's "
                "attention whole: StandardizedTransformer(name, tp_plan='auto'), or from_pretrained(..., distributed_config="
                f"DistributedConfig(tp_size={ranks.size}, tp_plan=nnatomy.parallel.tp_plan(config, {ranks.size})))."
            )

    def heads(self, module: Module, heads: int | None) -> int | None:
        """How many of an attention's heads a rank has."""
        return heads // self.ranks.size if heads is not None and module in self._attentions else heads

    def show_heads(self, report: Report, own: Tensor, kind: str, axes: Axes, aside: bool) -> Tensor:
        """Show what a rank has of an attention's heads, with that of all others; what it is to go on with.

        Args:
            aside: whether it has been computed for this, and is not the model's own.
        """
        if report.module not in self._attentions:
            return self._shown(report, own, kind, axes)
        return self._show(report, own, kind, axes, _HEADS[kind], (own.shape[_HEADS[kind]],) * self.ranks.size, aside)

    def show_neurons(self, report: Report, own: Tensor, kind: str, axes: Axes, down: Module | None) -> Tensor:
        """Show what a rank has of an MLP's neurons, which `down` reads, with that of all others."""
        width = getattr(down, "in_features", None)
        if kind != NEURONS or width is None or own.shape[-1] == width:
            return self._shown(report, own, kind, axes)
        return self._show(report, own, kind, axes, -1, self._cut(width), False)

    def _cut(self, width: int) -> tuple[int, ...]:
        """How many of so many entries each rank has."""
        ranks = range(self.ranks.size)
        return tuple(Shard.local_shard_size_and_offset(width, self.ranks.size, rank)[0] for rank in ranks)

    def whole(self, module: Module, kind: str, value: Any) -> Any:
        """What a module is given or gives, where each rank has a slice of it."""
        sizes = self.cuts[module, kind]
        if kind == "output":
            return gathered(value, -1, sizes, self.ranks.group)
        (first, *others), kwargs = value
        return (gathered(first, -1, sizes, self.ranks.group), *others), kwargs

    def own(self, module: Module, kind: str, value: Any) -> Any:
        """The other way."""
        sizes = self.cuts[module, kind]
        if kind == "output":
            return own_slice(value, -1, sizes, self.ranks.group)
        (first, *others), kwargs = value
        return (own_slice(first, -1, sizes, self.ranks.group), *others), kwargs

    @staticmethod
    def _shown(report: Report, own: Tensor, kind: str, axes: Axes) -> Tensor:
        value: Tensor = report(own, kind, axes).value
        return value

    def _show(
        self, report: Report, own: Tensor, kind: str, axes: Axes, axis: int, sizes: tuple[int, ...], aside: bool
    ) -> Tensor:
        group, rank = self.ranks.group, self.ranks.rank
        with torch._C.DisableTorchFunction():
            whole = gathered(own, axis, sizes, group)
        chosen: Any = report(whole, kind, axes).value
        with torch._C.DisableTorchFunction():
            if chosen is whole:
                changed = not _same_bits(narrowed(whole, axis, sizes, rank), own)
                if (
                    changed and not aside and not whole.requires_grad
                ):  # in place: so it is in what the model holds (its cache)
                    own.copy_(narrowed(whole, axis, sizes, rank))
                    return own
                followed = _awaits_gradient(whole) if aside else whole.requires_grad
                if not changed and not followed:
                    return own
            return own_slice(chosen, axis, sizes, group)


def _style(path: str, plan: dict[str, str]) -> str:
    """The style of a module in a plan, which speaks of all layers at once."""
    return plan.get(path) or plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path), "")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach(), other.detach()
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def _awaits_gradient(shown: Tensor) -> bool:
    return shown.requires_grad and (shown.is_leaf or shown.retains_grad or bool(shown._backward_hooks))
