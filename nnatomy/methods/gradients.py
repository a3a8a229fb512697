"""What the methods share that multiply a gradient with the difference of two runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nnatomy.errors import InputError, a_kind
from nnatomy.methods.pairs import gap, refuse_same
from nnatomy.methods.points import accessor_of, attends_to_encoder, axes_of, streams_of
from nnatomy.methods.prompts import prepared, token_texts
from nnatomy.methods.result import Axis, Result, texts_of
from nnatomy.methods.tokens import fingerprint
from nnatomy.names import row_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import ids_of, mask_of

#: From the logits of the next token, one number for each prompt.
Metric = Callable[[Float[Tensor, "prompt vocab"]], Float[Tensor, " prompt"]]


@dataclass(frozen=True, repr=False)
class AttributionMap(Result):
    """How much each activation at a point accounts for what the metric is in the clean run and not in the corrupted one.

    Attributes:
        point: the accessor.
        layers: which layers.
        effect: (prompt, layer, position) for a point of the stream's width; (prompt, layer, position, head) for
            queries, keys, values and `heads_output`; (prompt, layer, head, query, key) for scores and patterns.
            Zero on padding. In units of the metric.
        clean, corrupted: the metric in the two runs.
        tokens: the first corrupted prompt's tokens.
        prompts: a clean one and its corrupted one in turn, as texts.
        metric: its name.
    """

    point: str
    layers: tuple[int, ...]
    effect: Float[Tensor, "prompt layer *axes"]
    clean: Float[Tensor, " prompt"]
    corrupted: Float[Tensor, " prompt"]
    tokens: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    metric: str = "metric"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """prompt, layer, and those of the point."""
        more = {3: ("position",), 4: ("position", "head"), 5: ("head", "query", "key")}[self.effect.ndim]
        sizes = self.effect.shape[2:]
        texts = self.tokens if len(self.clean) == 1 and len(self.tokens) == sizes[0] else None
        each = [
            Axis(name, range(size), texts if name == "position" else None)
            for name, size in zip(more, sizes, strict=True)
        ]
        return (Axis("prompt", range(len(self.clean))), Axis("layer", self.layers), *each)

    @property
    def title(self) -> str:
        """What it is of."""
        return f"Attribution of {self.point}, {self.metric}"

    @property
    def heads(self) -> Float[Tensor, "prompt layer head"]:
        """Of each head, summed over positions. Raises InputError where the point is not by heads."""
        if self.effect.ndim == 3:
            raise InputError(f"{self.point} is not by heads: take heads_output, queries, keys or values.")
        return self.effect.sum(2) if self.effect.ndim == 4 else self.effect.sum((3, 4))

    @property
    def normalized(self) -> Float[Tensor, "prompt layer *axes"]:
        """As a share of what lies between the corrupted run (0) and the clean run (1)."""
        whole = gap(self.clean, self.corrupted)
        return self.effect / whole.reshape(-1, *[1] * (self.effect.ndim - 1))

    def plot(self, title: str | None = None) -> Any:
        """A heat map, the mean over the prompts: layer by position, or by head."""
        from nnatomy.plots import heat_map

        by_position = self.effect.ndim == 3
        values = (self.effect if by_position else self.heads).mean(0)
        return heat_map(
            values,
            rows=[str(layer) for layer in self.layers],
            columns=self.tokens if by_position else [str(h) for h in range(values.shape[-1])],
            title=self.heading(title),
            column_title="position" if by_position else "head",
            diverging=True,
            value_name="effect on the metric",
        )


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupted prompts, token by token beside each other."""

    clean: dict[str, Any]
    corrupted: dict[str, Any]
    tokens: tuple[str, ...]
    of_encoder: bool
    prompts: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: StandardizedTransformer, clean: Any, corrupted: Any, point: str = "layers_output") -> Pairs:
        """The positions are those of what the layers at `point` read: an encoder-decoder's decoder, or its encoder.

        Raises InputError unless each clean prompt has as many tokens as its corrupted one.
        """
        of_encoder = accessor_of(model, point).of_encoder
        one, other = (prepared(model, prompts) for prompts in (clean, corrupted))
        for part in (of_encoder, True) if attends_to_encoder(point) else (of_encoder,):
            lengths = [mask_of(inputs, part).sum(-1).tolist() for inputs in (one, other)]
            if lengths[0] != lengths[1]:
                raise InputError(
                    f"Clean and corrupted prompts are compared token by token, but have {lengths[0]} and {lengths[1]} tokens."
                )
        if other.get("input_ids") is None:
            raise InputError("Attribution takes prompts as texts or token ids, not as embeddings.")
        refuse_same(enumerate(zip(_tokens(one), _tokens(other), strict=True)))
        read = ids_of(other, of_encoder)
        texts = zip(texts_of(model, clean), texts_of(model, corrupted), strict=False)
        prompts = tuple(text for pair in texts for text in pair)
        return cls(one, other, tuple(token_texts(model, () if read is None else read[0])), of_encoder, prompts)

    @property
    def mask(self) -> Int[Tensor, "prompt seq"]:
        """1 for tokens, 0 for padding."""
        return mask_of(self.clean, self.of_encoder)


def _tokens(inputs: Mapping[str, Any]) -> list[list[int]]:
    """All that sets the prompts apart: ids, an encoder's too, and where there is padding."""
    read = (inputs.get(name) for name in ("input_ids", "decoder_input_ids", "attention_mask"))
    found: list[list[int]] = torch.cat([one for one in read if one is not None], 1).tolist()
    images = [fingerprint(one) for name, one in inputs.items() if "pixel" in name and isinstance(one, Tensor)]
    return [[*row, *images] for row in found]


@torch.no_grad()
def values(
    model: StandardizedTransformer, inputs: dict[str, Any], point: str, layers: Sequence[int], metric: Metric
) -> tuple[list[Tensor], Float[Tensor, " prompt"]]:
    """What the activations are, and the metric."""
    with model.trace(**inputs, use_cache=False):
        found = [accessor_of(model, point)[i] for i in layers]
        logits = model.logits[:, -1]
    axes = slice(1, -1 if row_of(point).has_entries else None)
    shapes = {layer: tuple(x.shape[axes]) for layer, x in zip(layers, found, strict=True)}
    if len(set(shapes.values())) > 1:
        raise InputError(f"{point} is not as large in each layer: {shapes}. Choose layers that are alike.")
    return found, measured(metric, logits)


def gradients(
    model: StandardizedTransformer,
    inputs: dict[str, Any],
    point: str,
    layers: Sequence[int],
    metric: Metric,
    drop: int | None = None,
) -> list[Tensor]:
    """The gradient of the metric with respect to the activations, by one backward pass.

    Args:
        drop: no gradient goes through what this layer computes, only past it, along the stream.
    """
    accessor = accessor_of(model, point)
    before_layers, behind_layers = streams_of(model, accessor)
    found = []
    with torch.enable_grad(), model.trace(**inputs, use_cache=False):
        if accessor.of_encoder:  # weights may need no gradients
            before_layers[0] = before_layers[0].detach().requires_grad_().clone()
        else:
            model.token_embeddings = model.token_embeddings.detach().requires_grad_().clone()
        for i in range(len(accessor)):
            before = before_layers[i] if i == drop else None
            if i in layers and accessor.row.is_shared:  # what it is in other modules' gradients is not meant
                found.append(accessor[i].clone())
                accessor[i] = found[-1]
            elif i in layers and accessor is not behind_layers:
                found.append(accessor[i])
                found[-1].retain_grad()  # so that a pattern under SDPA is what the model goes on with
            if before is not None:
                after = behind_layers[i]
                behind_layers[i] = after.detach() + (before - before.detach()).to(after.device)
            if i in layers and accessor is behind_layers:
                found.append(accessor[i])
        value = measured(metric, model.logits[:, -1])
    got = torch.autograd.grad(value, found, torch.ones_like(value), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(found, got, strict=True)]


def measured(metric: Metric, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
    """The metric. Raises InputError unless it is one number for each prompt."""
    value = metric(logits)
    if not isinstance(value, Tensor) or value.shape != logits.shape[:1]:
        is_ = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else a_kind(value)
        raise InputError(
            f"A metric takes logits of (prompt, vocab) and returns one number for each prompt: a tensor of "
            f"({len(logits)},). It returned {is_}."
        )
    return value


def difference(clean: Tensor, corrupted: Tensor) -> Tensor:
    """clean - corrupted, where both may be -inf."""
    return torch.where(clean == corrupted, 0, clean - corrupted)


def by_node(
    point: str, changes: Sequence[Tensor], slopes: Sequence[Tensor], mask: Int[Tensor, "prompt seq"]
) -> Float[Tensor, "prompt layer *axes"]:
    """change * slope of each layer, summed over the entries of a node: `AttributionMap.effect`."""
    each, row = [], row_of(point)
    for change, slope in zip(changes, slopes, strict=True):
        product, mine = (change * slope).detach().float(), mask.to(change.device)
        nodes = product.sum(-1) if row.has_entries else product
        if row.is_by_pairs:
            each.append(nodes * mine[:, None, :, None])
            continue
        nodes = nodes.movedim(axes_of(point).seq, 1)
        mine = F.pad(mine, (0, nodes.shape[1] - mine.shape[1]), value=1)  # compressed keys (DeepSeek-V4)
        each.append(nodes * mine.reshape(*mine.shape, *[1] * (nodes.ndim - 2)))
    return torch.stack([one.cpu() for one in each], 1)
