"""Path patching: what one part of the model tells another one directly, through the residual stream alone.

Where every part between a sender and a receiver stays as it was in the base run, all that comes to the receiver of another
sender is the difference of what the sender adds to the stream. So nothing has to be frozen: that difference is added to the
base run's stream before the receiver. It takes that the stream is a sum, which is what the names of contributions promise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError, NotInThisModelError
from nnatomy.methods.activation_patching import TOKENS, measured
from nnatomy.methods.arguments import method, several
from nnatomy.methods.metrics import Metric
from nnatomy.methods.pairs import Pairs, check_pair, gap
from nnatomy.methods.patched_runs import is_close, repeated
from nnatomy.methods.points import axes_of, layers_with, refuse_crossing
from nnatomy.methods.progress import shown
from nnatomy.methods.result import Axis, Result, name_of
from nnatomy.methods.tokens import Tokens, arguments_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.words import Mode

_SENDERS = ("heads_output", "attentions_contribution", "mixers_contribution", "mlps_contribution")
_RECEIVERS = ("queries", "keys", "values", "mlps_contribution")


class Part(NamedTuple):
    """A part of the model: `point[layer]`, or its `head`."""

    point: str
    layer: int
    head: int | None


@dataclass(frozen=True, repr=False)
class PathPatching(Result):
    """What a metric becomes where the receivers hear another sender.

    Attributes:
        senders, receivers: as they were given.
        effect: the metric with each sender's paths patched: (sender), or (pair, sender) where pairs were given as lists.
        clean, corrupted: the metric of the unpatched runs: a number, or (pair).
        prompts, metric, mode: as of `Patching`.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    effect: Float[Tensor, "*pair sender"]
    clean: Float[Tensor, "*pair"]
    corrupted: Float[Tensor, "*pair"]
    prompts: tuple[str, ...] = ()
    metric: str = "metric"
    mode: str = "denoising"

    quantity = "change of the metric"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """`pair` (of lists), sender."""
        pairs = (Axis("pair", range(len(self.clean))),) if self.clean.ndim else ()
        return (*pairs, Axis("sender", self.senders))

    @property
    def title(self) -> str:
        """Where the paths end, and what they were measured by."""
        more = f" and {len(self.receivers) - 3} more" if len(self.receivers) > 3 else ""
        return f"Paths to {', '.join(self.receivers[:3])}{more} ({self.mode}), {self.metric}"

    def _ranked(self) -> Tensor:
        return self.effect - (self.corrupted if self.mode == "denoising" else self.clean)[..., None]

    @property
    def normalized(self) -> Float[Tensor, "*pair sender"]:
        """(effect - corrupted) / (clean - corrupted): 1 as in the clean run, 0 as in the corrupted one."""
        return (self.effect - self.corrupted[..., None]) / gap(self.clean, self.corrupted)[..., None]

    def plot(self, pair: int | None = None, *, normalized: bool = True) -> Any:
        """A plotly figure with a bar for each sender. Arguments as `Patching.plot`."""
        from nnatomy.plots import parts

        values = self.normalized if normalized else self.effect
        check_pair(pair, self.clean)
        if self.clean.ndim:
            values = values.mean(0) if pair is None else values[pair]
        title = self.heading(which=pair)
        name = "normalized effect" if normalized else "metric"
        return parts(values, labels=self.senders, title=title, value_name=name)


@method
@torch.no_grad()
def path_patching(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    *,
    sender: str | Sequence[str],
    receivers: str | Sequence[str],
    metric: Metric,
    positions: int | Sequence[int] | None = None,
    mode: Mode = "denoising",
    batch_size: int | None = None,
    progress: bool = True,
) -> PathPatching:
    """The effect of the direct paths from a sender to receivers, all parts between them as they were.

    Goldowsky-Dill et al., "Localizing Model Behavior with Path Patching" (2023), section 3; Wang et al., "Interpretability in
    the Wild" (2022), section 3.1 (who let the MLPs between answer, and patch corrupted into clean: mode="noising").

    The sender has what it has in the other run; what that changes in the stream comes to the receivers alone. What they make
    of it goes on through the whole model.

    Args:
        clean, corrupted, metric, mode, batch_size, progress: as in `activation_patching`.
        sender: a head, `"heads_output[3][2]"`; all heads of a layer, `"heads_output[3]"`; or `"mlps_contribution[3]"`,
            `"attentions_contribution[3]"`, `"mixers_contribution[3]"`. Several are patched one at a time.
        receivers: heads' `"queries[5][1]"`, `"keys[5][0]"`, `"values[5]"`, `"mlps_contribution[4]"`, or `"logits"`; several at
            once. They come after the senders.
        positions: where the sender is patched; everywhere by default. As in `activation_patching`.

    Raises:
        InputError: for a sender or receiver of no such kind, or a receiver that comes before a sender.
        LayerIndexError, NotInThisModelError: for a part that there is not, or a model whose stream is no sum.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import logit_difference, path_patching
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> found = path_patching(
        ...     model,
        ...     clean="The capital of France is",
        ...     corrupted="The capital of Japan is",
        ...     sender=[f"mlps_contribution[{layer}]" for layer in range(model.num_layers)],
        ...     receivers="logits",
        ...     metric=logit_difference(" Paris", " Tokyo", model),
        ... )
        >>> found.effect.shape
        torch.Size([6])
    """
    pairs = Pairs.of(model, clean, corrupted).refuse_same()
    several("sender", sender)
    several("receivers", receivers)
    names = (sender,) if isinstance(sender, str) else tuple(sender)
    to = (receivers,) if isinstance(receivers, str) else tuple(receivers)
    base, source = pairs.of_mode(mode)
    senders = [_part(model, name, _SENDERS) for name in names]
    ends = [_part(model, name, _RECEIVERS) for name in to if name != "logits"]
    if not senders or not to:
        raise InputError("Give at least one sender and one receiver.")
    for end in ends:
        for one, name in zip(senders, names, strict=True):
            same_layer = end.point == "mlps_contribution" and one.point != "mlps_contribution"
            if end.layer < one.layer + (not same_layer):
                raise InputError(f"{end.point}[{end.layer}] comes before {name} or with it, and hears nothing of it.")
    paths = _Paths(model, base, source, senders, ends, "logits" in to)
    if positions is not None:
        pairs.all_have(positions)
        paths.only_at(pairs.columns(positions))
    rows = max(1, (batch_size or max(1, TOKENS // pairs.seq)) // len(base))
    values: list[Tensor] = []
    for start in shown(range(0, len(names), rows), "path patching", progress, delay=2.0):
        logits = paths.logits(list(range(start, min(start + rows, len(names)))))
        values += [measured(metric, one) for one in logits]
    effect = torch.stack(values, -1)
    of_both = [measured(metric, one) for one in (paths.source_logits, paths.base_logits)]
    of_clean, of_corrupted = of_both if mode == "denoising" else of_both[::-1]
    if pairs.single:
        effect, of_clean, of_corrupted = effect[0], of_clean[0], of_corrupted[0]
    return PathPatching(names, to, effect, of_clean, of_corrupted, pairs.prompts, name_of(metric), mode)


def _part(model: StandardizedTransformer, name: str, points: Sequence[str]) -> Part:
    match = re.fullmatch(r"(\w+)\[(-?\d+)\](?:\[(-?\d+)\])?", name) if isinstance(name, str) else None
    if match is None or match[1] not in points or (match[3] and axes_of(match[1]).head is None):
        forms = ", ".join(f"{point}[layer]" + "[head]" * (axes_of(point).head is not None) for point in points)
        logits = ", logits" * (points is _RECEIVERS)
        raise InputError(f"{name!r} is none of {forms}{logits}.")
    accessor = getattr(model, match[1])
    accessor.module(int(match[2]))  # raises if there is none
    return Part(match[1], int(match[2]) % len(accessor), int(match[3]) if match[3] else None)


class _Paths:
    """The unpatched runs, and what each sender changes in the stream."""

    def __init__(
        self,
        model: StandardizedTransformer,
        base: list[Tokens],
        source: list[Tokens],
        senders: list[Part],
        receivers: list[Part],
        to_logits: bool,
    ) -> None:
        self.model, self.senders, self.receivers, self.to_logits = model, senders, receivers, to_logits
        self.batch = len(base)
        both = model.prepare(arguments_of([*source, *base]), padding_side="left")
        self._inputs = model.prepare(arguments_of(base), padding_side="left")
        self._mixed = layers_with(model.mixers_contribution)
        self._streams: dict[int, Tensor] = {}
        self._mixers: dict[int, Tensor] = {}
        self._sent: dict[tuple[str, int], Tensor] = {}
        self._record(both)
        self.changes = self._changes()

    def _record(self, both: dict[str, Tensor]) -> None:
        model, n = self.model, self.batch
        refuse_crossing(model, "path_patching")
        summed = {*self._mixed, *layers_with(model.mlps_contribution)}
        before: Tensor | None = None
        with model.trace(both, use_cache=False):
            for layer in range(min(one.layer for one in self.senders), model.num_layers):
                if layer not in summed:
                    model.mixers_contribution.module(layer)  # raises, and says why
                stream = model.layers_input[layer]
                if before is not None and not is_close(stream, before):
                    raise NotInThisModelError(
                        f"The stream is changed between layers {layer - 1} and {layer}, so that there are no direct paths."
                    )
                self._streams[layer] = stream[n:]
                points = {one.point for one in self.senders if one.layer == layer}
                for point in _SENDERS:
                    if point in points:
                        self._sent[point, layer] = getattr(model, point)[layer]
                        self._check_heads(self.senders, point, layer, self._sent[point, layer])
                    if point == "mixers_contribution" and layer in self._mixed:
                        self._mixers[layer] = model.mixers_contribution[layer][n:]
                before = model.layers_output[layer]
            self.source_logits, self.base_logits = model.logits[:, -1].to(model.device).split(n)

    def _check_heads(self, parts: Sequence[Part], point: str, layer: int, value: Tensor) -> None:
        axis = axes_of(point).head
        for one in parts:
            if one.head is None or (one.point, one.layer) != (point, layer) or axis is None:
                continue
            if not -value.shape[axis] <= one.head < value.shape[axis]:
                raise InputError(
                    f"{point}[{layer}][{one.head}]: there are {value.shape[axis]} heads, 0 to {value.shape[axis] - 1}."
                )

    def _changes(self) -> list[Float[Tensor, "batch seq hidden"]]:
        """What each of the other run's senders changes in the stream after it."""
        n = self.batch
        heads = [i for i, one in enumerate(self.senders) if one.point == "heads_output"]
        changes: dict[int, Tensor] = {}
        for layer in {self.senders[i].layer for i in heads}:
            of_layer = [i for i in heads if self.senders[i].layer == layer]
            changes.update(zip(of_layer, self._changes_by_heads(layer, of_layer), strict=True))
        for i, one in enumerate(self.senders):
            if i not in changes:
                sent = self._sent[one.point, one.layer]
                changes[i] = sent[:n] - sent[n:]
        return [changes[i] for i in range(len(self.senders))]

    def _changes_by_heads(self, layer: int, which: list[int]) -> Sequence[Tensor]:
        model, count = self.model, len(which)
        inputs = {name: repeated(value, count).contiguous() for name, value in self._inputs.items()}
        sent = self._sent["heads_output", layer][: self.batch]
        with model.trace(inputs, use_cache=False):
            heads = model.heads_output[layer].clone()
            for rows, i in zip(heads.split(self.batch), which, strict=True):
                head = slice(None) if self.senders[i].head is None else self.senders[i].head
                rows[:, :, head] = sent[:, :, head]
            model.heads_output[layer] = heads
            contribution = model.mixers_contribution[layer]
        return (contribution - repeated(self._mixers[layer], count)).split(self.batch)

    def only_at(self, columns: list[int]) -> None:
        """Leave the senders as they are elsewhere."""
        for change in self.changes:
            elsewhere = torch.ones(change.shape[1], dtype=torch.bool)
            elsewhere[columns] = False
            change[:, elsewhere] = 0

    def logits(self, which: list[int]) -> Float[Tensor, "sender batch vocab"]:
        """The logits at the last position, with the paths of each of these senders patched."""
        model, count = self.model, len(which)
        inputs = {name: repeated(value, count).contiguous() for name, value in self._inputs.items()}
        heard = self._hear(inputs, which) if self.receivers else {}
        change = torch.cat([self.changes[i].to(model.device) for i in which])
        with model.trace(inputs, use_cache=False):
            for (layer, point), value in heard.items():
                getattr(model, point)[layer] = self._with_heads(point, layer, value)
            if self.to_logits:
                stream = model.layers_output[-1]
                model.layers_output[-1] = stream + change.to(stream)
            logits = model.logits[:, -1].to(model.device)
        return logits.unflatten(0, (count, self.batch))

    def _hear(self, inputs: dict[str, Tensor], which: list[int]) -> dict[tuple[int, str], Tensor]:
        """What the receivers make of the changed stream, in the order of the forward pass."""
        model, heard = self.model, {}
        with model.trace(inputs, use_cache=False):
            for layer in sorted({one.layer for one in self.receivers}):
                points = {one.point for one in self.receivers if one.layer == layer}
                model.layers_input[layer] = self._changed(self._streams[layer], which, range(layer))
                for point in _RECEIVERS[:-1]:
                    if point in points:
                        heard[layer, point] = getattr(model, point)[layer]
                if "mlps_contribution" in points:
                    if layer in self._mixers:
                        model.mixers_contribution[layer] = self._changed(self._mixers[layer], which, [layer])
                    heard[layer, "mlps_contribution"] = model.mlps_contribution[layer]
        return heard

    def _changed(self, value: Tensor, which: list[int], layers: Sequence[int]) -> Tensor:
        """`value` of the base run for each of these senders, with what it changes, if it is of these layers."""
        own = [self.changes[i].to(value) * (self.senders[i].layer in layers) for i in which]
        return torch.cat([value + change for change in own])

    def _with_heads(self, point: str, layer: int, heard: Tensor) -> Tensor:
        """Those heads that are receivers as they have heard, and the others as they are."""
        heads = [one.head for one in self.receivers if (one.layer, one.point) == (layer, point)]
        value = getattr(self.model, point)[layer]
        self._check_heads(self.receivers, point, layer, value)
        if None in heads:
            return heard
        value = value.clone()
        value[:, heads] = heard[:, heads]
        return value
