"""Attention heads, all of a model in one call: what they attend to, and what the model says without each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from nnatomy.errors import InputError
from nnatomy.methods.activation_patching import Grid, measured
from nnatomy.methods.arguments import method
from nnatomy.methods.metrics import Metric
from nnatomy.methods.pairs import Pairs
from nnatomy.methods.patched_runs import PatchedRuns
from nnatomy.methods.points import layers_of
from nnatomy.methods.result import Axis, Result, name_of, texts_of
from nnatomy.methods.tokens import refuse_encoder_decoder
from nnatomy.standardized import StandardizedTransformer
from nnatomy.words import Each, Instead

#: What heads are known to attend to.
Kind = Literal["previous_token", "duplicate_token", "induction"]
KINDS: tuple[Kind, ...] = ("previous_token", "duplicate_token", "induction")

#: How many sequences of random tokens are read by default, and of how many tokens, which then come once more.
_SEQUENCES, _HALF = 4, 32


@dataclass(frozen=True, repr=False)
class HeadMap(Result):
    """A number for each head.

    Attributes:
        effect: NaN for a head that a layer does not have.
        layers: those of the rows.
        name: what the numbers are.
        prompts: as texts.
    """

    effect: Float[Tensor, "layer head"]
    layers: tuple[int, ...]
    name: str
    prompts: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[Axis, ...]:
        """layer, head."""
        return (Axis("layer", self.layers), Axis("head", range(self.effect.shape[1])))

    @property
    def title(self) -> str:
        """What the numbers are."""
        return self.name[0].upper() + self.name[1:]

    def plot(self, title: str | None = None) -> Any:
        """A heat map of layer by head, as a plotly figure."""
        from nnatomy.plots import heat_map

        return heat_map(
            self.effect,
            rows=[str(layer) for layer in self.layers],
            columns=[str(head) for head in range(self.effect.shape[1])],
            title=self.heading(title),
            row_title="layer",
            column_title="head",
            diverging=bool((self.effect < 0).any()),
            value_name=self.name,
        )


@method
@torch.no_grad()
def head_scores(
    model: StandardizedTransformer,
    prompts: Any = None,
    *,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[Kind, HeadMap]:
    """How much of its attention each head gives to the previous token, to earlier copies of a token, and to what followed these.

    The three kinds of head of the induction circuit: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021);
    Olsson et al., "In-context Learning and Induction Heads" (2022), whose prefix matching score is "induction" on sequences of
    random tokens that come twice.

    Args:
        prompts: by default four sequences of 32 random tokens, none of them twice, which then come once more, after the
            tokenizer's token for the beginning of a text, if it has one.
        seed: of these.
        batch_size: how many prompts a forward pass has at most.
        progress: show a bar over the passes.

    Returns:
        By kind, a score from 0 to 1 of each head: the mean, over the positions of all prompts that have such a target, of
        what their query gives to it. Of the query at position q the targets are
        "previous_token": q - 1; "duplicate_token": each earlier position with the same token; "induction": each position up
        to q whose token before is the one at q. NaN where no position has one.

    Raises:
        InputError: for prompts that cannot be read.
        NotInThisModelError: for an encoder-decoder, or where no layer has a pattern.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import head_scores
        >>> scores = head_scores(StandardizedTransformer("demo:gpt2"))
        >>> scores["previous_token"].effect.shape
        torch.Size([6, 6])
    """
    refuse_encoder_decoder(model, "head_scores reads causal patterns, and {} has an encoder and a decoder.")
    accessor = model.attention_probabilities
    layers = layers_of(accessor, None)
    inputs = dict(model.prepare(_twice(model, seed) if prompts is None else prompts))
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    own = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    sums: dict[Kind, list[Tensor]] = {kind: [torch.zeros(())] * len(layers) for kind in KINDS}
    counts = dict.fromkeys(KINDS, 0)
    for rows in tqdm(torch.arange(len(ids)).split(batch_size), desc="head scores", disable=not progress):
        targets = _targets(ids[rows], own[rows])
        for kind, target in targets.items():
            counts[kind] += int(target.any(-1).sum())
        part = {name: x[rows] if isinstance(x, Tensor) else x for name, x in inputs.items()}
        with model.trace(part, use_cache=False):
            for row, layer in enumerate(layers):
                pattern = accessor[layer].float()
                for kind, target in targets.items():
                    found = (pattern * target[:, None].to(pattern.device)).sum((0, 2, 3))
                    sums[kind][row] = sums[kind][row] + found.cpu()
    heads = max(len(one) for one in sums["induction"])
    return {
        kind: HeadMap(
            torch.stack([_wide(one, heads) for one in sums[kind]]) / (counts[kind] or torch.nan),
            tuple(layers),
            f"attention to {kind.replace('_', ' ')}",
            texts_of(model, inputs) if prompts is None else texts_of(model, prompts),
        )
        for kind in KINDS
    }


def _twice(model: StandardizedTransformer, seed: int) -> Int[Tensor, "prompt seq"]:
    """Random tokens, none of them special or twice in a half."""
    special = {*getattr(model.tokenizer, "all_special_ids", ())}
    known = torch.tensor([i for i in range(model.vocab_size) if i not in special])
    draws = torch.Generator().manual_seed(seed)
    half = torch.stack([known[torch.randperm(len(known), generator=draws)[:_HALF]] for _ in range(_SEQUENCES)])
    begin = getattr(model.tokenizer, "bos_token_id", None)
    first = [] if begin is None else [torch.full((_SEQUENCES, 1), begin)]
    return torch.cat([*first, half, half], 1)


def _targets(ids: Int[Tensor, "batch seq"], own: Bool[Tensor, "batch seq"]) -> dict[Kind, Bool[Tensor, "batch q k"]]:
    """What the query at q may attend to, by kind, of the prompts' own tokens."""
    seq = ids.shape[1]
    back = torch.arange(seq, device=ids.device)[:, None] - torch.arange(seq, device=ids.device)
    both = own[:, :, None] & own[:, None]
    same = (ids[:, :, None] == ids[:, None]) & both & (back > 0)
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    return {"previous_token": both & (back == 1), "duplicate_token": same, "induction": after}


def _wide(values: Float[Tensor, " head"], heads: int) -> Float[Tensor, " head"]:
    return torch.cat([values, values.new_full((heads - len(values),), torch.nan)])


@dataclass(frozen=True, repr=False)
class HeadAblation(Result):
    """What the model says without each head.

    Attributes:
        effect: the metric without that head, with an axis `prompt` before these where prompts were given as a list.
        base: the metric of the whole model: a number, or (prompt).
        layers, heads: what the axes of `effect` are.
        how: what was put in the place of what a head gives.
        prompts: as texts.
        metric: its name.
    """

    effect: Float[Tensor, "*prompt layer head"]
    base: Float[Tensor, "*prompt"]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    how: str
    prompts: tuple[str, ...] = ()
    metric: str = "metric"

    quantity = "change of the metric"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """`prompt` (of a list), layer, head."""
        prompts = (Axis("prompt", range(len(self.base))),) if self.base.ndim else ()
        return (*prompts, Axis("layer", self.layers), Axis("head", self.heads))

    @property
    def title(self) -> str:
        """How heads were taken out, and what it was measured by."""
        return f"Ablation of heads ({self.how}), {self.metric}"

    def _ranked(self) -> Tensor:
        return self.effect - self.base[..., None, None]

    @property
    def _of(self) -> str:
        return "the metric" if self.metric == "metric" else self.metric

    @property
    def change(self) -> HeadMap:
        """What taking the head out adds to the metric, on average over the prompts."""
        change = self.effect - self.base[..., None, None]
        values = change.mean(0) if change.ndim == 3 else change
        columns = values.new_full((len(self.layers), max(self.heads) + 1), torch.nan)
        columns[:, list(self.heads)] = values
        return HeadMap(columns, self.layers, f"change of {self._of} without the head ({self.how})", self.prompts)

    def plot(self) -> Any:
        """A heat map of `change`, as a plotly figure."""
        return self.change.plot(self.heading())


@method
@torch.no_grad()
def head_ablation(
    model: StandardizedTransformer,
    prompts: Any,
    *,
    metric: Metric,
    how: Instead = "zero",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | Each = "each",
    batch_size: int | None = None,
    progress: bool = True,
) -> HeadAblation:
    """Take one attention head out at a time, at all positions; what becomes of the metric.

    Michel et al., "Are Sixteen Heads Really Better than One?" (2019), section 3.2, for zeros; the mean keeps what a head gives
    whatever it reads (Wang et al., "Interpretability in the Wild", 2023, section 2). To put another prompt's heads in, see
    `activation_patching(..., point="heads_output", heads="each", mode="noising")`.

    Args:
        prompts: one, or a list of several.
        metric: see `nnatomy.methods.metrics`; it is given the logits at the last position, a row for each prompt.
        how: "zero", or "mean": what the head gives on average over these prompts' own tokens.
        layers: one or several; by default those that have attention heads.
        heads: "each", or those to take out.
        batch_size: how many rows a forward pass has at most (but one for each prompt); by default such that it has about
            4096 tokens.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        InputError: for another `how`, no such head, layers with unlike numbers of heads, or a metric that gives no number a row.
        LayerIndexError, NotInThisModelError: for a layer that there is not, or that has no heads; for an encoder-decoder.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import head_ablation, logit_difference
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> metric = logit_difference(" Paris", " Tokyo", model)
        >>> found = head_ablation(model, "The capital of France is", metric=metric)
        >>> found.effect.shape
        torch.Size([6, 6])
    """
    if how not in ("zero", "mean"):
        raise InputError(f"how={how!r}: give 'zero' or 'mean'.")
    refuse_encoder_decoder(
        model, "head_ablation takes out heads that read one prompt, and {} has an encoder and a decoder."
    )
    pairs = Pairs.of(model, prompts, prompts, "heads_output")
    where = layers_of(model.heads_output, layers)
    runs = PatchedRuns(model, pairs.clean, pairs.clean, "heads_output", where)
    own = torch.arange(pairs.seq) >= pairs.seq - torch.tensor(pairs.lengths)[:, None]  # (prompt, seq)
    for layer, value in runs.values.items():  # (prompt, seq, head, head_dim)
        mean = value[own.to(value.device)].mean(0) if how == "mean" else torch.zeros_like(value[0, 0])
        runs.values[layer] = mean.expand_as(value)
    grid = Grid(runs, heads, "all", pairs.columns("all"))
    assert grid.heads is not None
    effect = grid.effects(metric, [[layer] for layer in where], batch_size, progress)
    base = measured(metric, runs.logits(runs.base_end))
    if pairs.single:
        effect, base = effect[0], base[0]
    return HeadAblation(effect, base, tuple(where), grid.heads, how, pairs.prompts, name_of(metric))
