"""Activation patching: which activations carry what sets two prompts apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.methods.arguments import method
from nnatomy.methods.metrics import Metric
from nnatomy.methods.pairs import Pairs, Positions, check_pair, gap
from nnatomy.methods.patched_runs import Cells, PatchedRuns
from nnatomy.methods.points import accessor_of, layers_of
from nnatomy.methods.progress import shown
from nnatomy.methods.result import Axis, Result, name_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.annotations import PointName
from nnatomy.standardized.positions import numbers
from nnatomy.words import Each, Mode

#: How many tokens a forward pass has, where nobody says how many rows.
TOKENS = 4096

#: How many rows of logits are computed, and held, at once.
_ENDS = 16


@dataclass(frozen=True, repr=False)
class Patching(Result):
    """What patching one activation at a time does to a metric.

    Attributes:
        point: the accessor whose values were put in.
        effect: the metric of each patched run: (layer, position), (layer, head) or (layer, head, position), with an axis
            `pair` before these where pairs were given as lists. NaN at positions that a shorter pair does not have.
        clean, corrupted: the metric of the unpatched runs: a number, or (pair).
        layers, heads, positions: what the axes of `effect` are; None for an axis that there is not. Positions count
            from the start of the longest prompt.
        tokens: by pair and position: the token, or "clean|corrupted" where the two prompts differ.
        shortcut: whether every pass started at its patched layer. If not, this model's layers need more of the
            earlier ones than the residual stream, and all of them were run.
        prompts: the first clean and corrupted prompt, and so on, as texts.
        metric: its name.
        mode: which run was patched: the corrupted one by "denoising", the clean one by "noising".
    """

    point: str
    effect: Float[Tensor, ...]
    clean: Float[Tensor, "*pair"]
    corrupted: Float[Tensor, "*pair"]
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    positions: tuple[int, ...] | None
    tokens: tuple[tuple[str, ...], ...]
    shortcut: bool
    prompts: tuple[str, ...] = ()
    metric: str = "metric"
    mode: str = "denoising"

    quantity = "change of the metric"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """`pair` (of lists), layer, head, position."""
        alike = len(set(self.tokens)) == 1
        pairs = (Axis("pair", range(len(self.clean))),) if self.clean.ndim else ()
        heads = () if self.heads is None else (Axis("head", self.heads),)
        texts = [self.tokens[0][at] for at in self.positions or ()] if alike else None
        positions = () if self.positions is None else (Axis("position", self.positions, texts),)
        return (*pairs, Axis("layer", self.layers), *heads, *positions)

    @property
    def title(self) -> str:
        """What was patched, and what it was measured by."""
        return f"Patching {self.point} ({self.mode}), {self.metric}"

    def _ranked(self) -> Tensor:
        base = self.corrupted if self.mode == "denoising" else self.clean
        return self.effect - base.reshape(*base.shape, *[1] * (self.effect.ndim - base.ndim))

    @property
    def normalized(self) -> Float[Tensor, ...]:
        """(effect - corrupted) / (clean - corrupted): 1 where the patched run is as the clean one, 0 as the corrupted.

        Raises InputError where the metric is the same of both.
        """
        axes = (1,) * (self.effect.ndim - self.clean.ndim)
        whole, corrupted = (one.reshape(*one.shape, *axes) for one in (gap(self.clean, self.corrupted), self.corrupted))
        return (self.effect - corrupted) / whole

    def plot(self, pair: int | None = None, *, normalized: bool = True) -> Any:
        """A plotly figure of the effects: a heat map, or bars where there is one for each layer.

        Args:
            pair: which pair; all are averaged by default.
            normalized: show `normalized`, not `effect`.
        """
        from nnatomy.plots import bars, heat_map

        values = self.normalized if normalized else self.effect
        check_pair(pair, self.clean)
        if self.clean.ndim:
            values = values.nanmean(0) if pair is None else values[pair]
        name = "normalized effect" if normalized else "metric"
        rows, row_title = [str(layer) for layer in self.layers], "layer"
        if self.heads is not None and self.positions is not None:
            rows, row_title = [f"L{layer}H{head}" for layer in rows for head in self.heads], "head"
            values = values.flatten(0, 1)
        title = self.heading(which=pair)
        if values.ndim == 1:
            return bars(values, labels=rows, title=title, value_name=name)
        if self.positions is None:
            columns, column_title = [str(head) for head in self.heads or ()], "head"
        else:
            columns, column_title = [self._column(position, pair) for position in self.positions], "position"
        return heat_map(
            values,
            rows=rows,
            columns=columns,
            title=title,
            row_title=row_title,
            column_title=column_title,
            diverging=True,
            value_name=name,
        )

    def _column(self, position: int, pair: int | None) -> str:
        """The token there, or where several pairs are averaged, and differ, how far from the end it is."""
        texts = {tokens[position] for tokens in (self.tokens if pair is None else [self.tokens[pair]])}
        return texts.pop() if len(texts) == 1 else str(position - len(self.tokens[0]))


@method
@torch.no_grad()
def activation_patching(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    *,
    metric: Metric,
    point: PointName = "layers_output",
    layers: int | Sequence[int] | None = None,
    positions: Positions | None = None,
    heads: int | Sequence[int] | Each | None = None,
    mode: Mode = "denoising",
    batch_size: int | None = None,
    progress: bool = True,
) -> Patching:
    """Put one activation of the clean run into the corrupted run, for each layer and position; what becomes of the metric.

    Vig et al., "Investigating Gender Bias in Language Models Using Causal Mediation Analysis" (2020), section 3; Meng et al.,
    "Locating and Editing Factual Associations in GPT" (2022), section 2; Heimersheim and Nanda, "How to use and interpret
    activation patching" (2024), for the two modes.

    Args:
        clean, corrupted: a prompt each, or lists of as many (pairs); the two of a pair have as many tokens.
        metric: see `nnatomy.methods.metrics`; it is given the logits at the last position, a row for each pair.
        point: an accessor's name: "layers_output", "mlps_contribution", "heads_output", "queries", ... Of an
            encoder-decoder those of its decoder, which begins with its start token unless prompts are mappings with
            `input_ids` and `decoder_input_ids`; or those of its encoder ("encoder_layers_output"). Positions are of what that
            part reads.
        layers: one or several; by default those that have such a value.
        positions: "each" by itself, "all" at once, or each of these. By default "each", and "all" where there are
            heads. (Of `attention_scores` and `attention_probabilities` it is the queries' positions.) Pairs of several
            lengths are aligned at their ends: there positions count from the end, -1 is the last.
        heads: "each", or those to patch one at a time, of a point that has heads (keys and values: their own);
            None: all at once.
        mode: "denoising" puts clean values into the corrupted run: what is enough to restore the behaviour; "noising"
            corrupted values into the clean one: what is needed for it.
        batch_size: how many rows a forward pass has at most (but one for each pair); by default such that it has about
            4096 tokens.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        InputError: for pairs that do not fit together, no such point, position or head, or a metric that does not give
            one number a row.
        LayerIndexError, NotInThisModelError: for a layer that there is not, or that has no such value.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import activation_patching, logit_difference
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> found = activation_patching(
        ...     model,
        ...     clean="The capital of France is",
        ...     corrupted="The capital of Japan is",
        ...     metric=logit_difference(" Paris", " Tokyo", model),
        ... )
        >>> found.effect.shape, found.tokens[0][3]
        (torch.Size([6, 5]), ' France| Japan')
        >>> found.normalized.argmax(-1).tolist()  # the position that matters, by layer: first the country, then the last
        [3, 3, 4, 4, 4, 4]
    """
    pairs = Pairs.of(model, clean, corrupted, point).refuse_same()
    where = layers_of(accessor_of(model, point), layers)
    base, source = pairs.of_mode(mode)
    runs = PatchedRuns(model, base, source, point, where)
    if positions is None:
        positions = "each" if heads is None else "all"
    grid = Grid(runs, heads, positions, pairs.columns(positions))
    effect = grid.effects(metric, [[layer] for layer in where], batch_size, progress)
    for pair, length in enumerate(pairs.lengths):
        if grid.positions is not None:
            effect[pair, ..., [p < pairs.seq - length for p in grid.positions]] = torch.nan
    ends = [measured(metric, runs.logits(end)) for end in (runs.source_end, runs.base_end)]
    of_clean, of_corrupted = ends if mode == "denoising" else ends[::-1]
    if pairs.single:
        effect, of_clean, of_corrupted = effect[0], of_clean[0], of_corrupted[0]
    return Patching(
        point,
        effect,
        of_clean,
        of_corrupted,
        tuple(where),
        grid.heads,
        grid.positions,
        pairs.texts(model),
        runs.shortcut,
        pairs.prompts,
        name_of(metric),
        mode,
    )


def measured(metric: Metric, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
    """The metric of each row, on the CPU. Raises InputError if it is none."""
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"A metric gives one number a row, of shape ({len(logits)},); this one gave {got}.")
    return values.float().cpu()


class Grid:
    """The cells that are patched one at a time: heads by positions.

    Attributes:
        heads, positions: of the axes; None where all are patched at once.
    """

    def __init__(
        self,
        runs: PatchedRuns,
        heads: int | Sequence[int] | Each | None,
        positions: Positions,
        columns: list[int],
    ) -> None:
        self._runs = runs
        self._seq = next(iter(runs.values.values())).shape[runs.axes.seq]
        self._count = 1
        self.positions = None if positions == "all" else tuple(columns)
        self.heads = None if heads is None else tuple(self._heads(heads))
        for name, axis in (("positions", self.positions), ("heads", self.heads)):
            if axis == ():
                raise InputError(f"{name}: give at least one.")

    def _heads(self, heads: int | Sequence[int] | Each) -> list[int]:
        name, axis = self._runs.accessor.name, self._runs.axes.head
        if axis is None:
            raise InputError(f"heads={heads!r}: {name} has no axis of heads; heads_output, queries, ... have.")
        counts = {layer: value.shape[axis] for layer, value in self._runs.values.items()}
        if len(set(counts.values())) > 1:
            raise InputError(
                f"heads={heads!r}: {name} has as many heads as {counts} (by layer): give layers that have as many."
            )
        self._count = count = next(iter(counts.values()))
        if isinstance(heads, str) and heads != "each":
            raise InputError(f"heads={heads!r}: give 'each', or a list of heads.")
        chosen = list(range(count)) if isinstance(heads, str) else numbers("heads", heads)
        if any(not -count <= head < count for head in chosen):
            raise InputError(f"heads={heads!r}: {name} has {count} heads, 0 to {count - 1}.")
        return [head % count for head in chosen]

    def cells(self) -> Cells:
        """What is put in, cell by cell, the positions of one head after those of another."""
        seq = torch.arange(self._seq)
        at = torch.ones(1, self._seq, dtype=torch.bool)
        if self.positions is not None:
            at = seq == torch.tensor(self.positions)[:, None]
        of = torch.ones(1, 1, dtype=torch.bool)
        if self.heads is not None:
            of = torch.arange(self._count) == torch.tensor(self.heads)[:, None]
        return (of[:, None, :, None] & at[None, :, None, :]).flatten(0, 1)

    def effects(
        self, metric: Metric, layers: list[list[int]], batch_size: int | None, progress: bool
    ) -> Float[Tensor, ...]:
        """The metric of (pair, layer, head, position), without the axes that there are not.

        Args:
            layers: by the layers of that axis, those that are patched at once.
        """
        runs, cells = self._runs, self.cells()
        rows = batch_size or max(1, TOKENS // self._seq)
        chunks = cells.split(max(1, rows // runs.batch))
        passes = [(at, chunk) for at in layers for chunk in chunks]
        values: list[Tensor] = []
        ends: list[Tensor] = []
        for number, (at, chunk) in enumerate(
            shown(passes, f"patching {runs.accessor.name}", progress, delay=2.0), start=1
        ):
            ends += runs(at, chunk)
            # The unembedding is as large as a layer or more, and is read once for all of these.
            if number == len(passes) or len(ends) * runs.batch >= _ENDS:
                values += [measured(metric, logits) for logits in runs.logits(torch.stack(ends))]
                ends = []
        axes = [len(axis) for axis in (self.heads, self.positions) if axis is not None]
        return torch.stack(values, 1).unflatten(1, (len(layers), *axes))
