"""Edge attribution: how much of the metric each connection between two components carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnatomy.methods.arguments import method, whole
from nnatomy.methods.edges import INSIDE, Graph, graph_of, run
from nnatomy.methods.gradients import Metric, Pairs, measured
from nnatomy.methods.progress import shown
from nnatomy.methods.result import Axis, Result, name_of
from nnatomy.standardized import StandardizedTransformer


@dataclass(frozen=True, repr=False)
class EdgeAttribution(Result):
    """A score for each edge, from what writes to the stream to what reads it.

    Attributes:
        sources: "embeddings", "L0H2", "L0 mlp", ...
        destinations: "L1H0.q", "L1H0.k", "L1H0.v" ("L1H0-1.k" where query heads share keys), "L1 mlp", ..., "logits".
        effect: zero where there is no edge.
        edges: whether there is one.
        clean, corrupted: the metric in the two runs.
        prompts: a clean one and its corrupted one in turn, as texts.
        metric: its name.
    """

    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    effect: Float[Tensor, "prompt source destination"]
    edges: Bool[Tensor, "source destination"]
    clean: Float[Tensor, " prompt"]
    corrupted: Float[Tensor, " prompt"]
    prompts: tuple[str, ...] = ()
    metric: str = "metric"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """prompt, source, destination."""
        prompts = Axis("prompt", range(len(self.clean)))
        return (prompts, Axis("source", self.sources), Axis("destination", self.destinations))

    @property
    def title(self) -> str:
        """What it is of."""
        return f"Edge attribution, {self.metric}"

    def top(self, k: int = 10) -> list[tuple[str, str, float]]:
        """The `k` edges with the largest mean scores, in either direction."""
        means = self.effect.mean(0)
        best = self.kept(k).nonzero().tolist()
        found = [(self.sources[s], self.destinations[d], float(means[s, d])) for s, d in best]
        return sorted(found, key=lambda one: -abs(one[2]))

    def kept(self, k: int) -> Bool[Tensor, "source destination"]:
        """Which edges the first `k` are. Raises InputError for a `k` that is no number of edges."""
        whole(0)("k", k)
        size = torch.where(self.edges, self.effect.mean(0).abs(), -1.0).flatten()
        keep = torch.zeros_like(size, dtype=torch.bool)
        keep[size.argsort(descending=True, stable=True)[: min(k, int(self.edges.sum()))]] = True
        return keep.view_as(self.edges)

    def plot(self, title: str | None = None, k: int | None = 64) -> Any:
        """The circuit as a graph, of the means over the prompts.

        Args:
            k: the edges with the largest scores, so many of them; all if None.
        """
        from nnatomy.plots import circuit

        return circuit(
            self.effect.mean(0),
            sources=self.sources,
            destinations=self.destinations,
            k=int(self.edges.sum()) if k is None else k,
            title=self.heading(title),
            value_name="score",
        )


@method
def edge_attribution(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    *,
    metric: Metric,
    steps: int = 1,
    progress: bool = False,
) -> EdgeAttribution:
    """What corrupting each edge alone would take from the metric of the clean run, to first order.

    (what the source writes in the clean run - in the corrupted one) · gradient of the metric with respect to the stream as
    the destination alone reads it, before its norm. With one step the gradient is that of the clean run: edge attribution
    patching, EAP (Syed, Rager, Conmy 2023, "Attribution Patching Outperforms Automated Circuit Discovery", section 3). With
    more it is the mean over runs whose token embeddings lie k / steps of the way from the corrupted to the clean ones,
    k = 1 to steps: EAP-IG (Hanna, Pezzelle, Belinkov 2024, "Have Faith in Faithfulness", equation 3; they take 5 steps).

    Args:
        clean, corrupted, metric: as in `attribution_patching`.
        steps: how many gradients are averaged.
        progress: show a progress bar over the steps.

    Raises:
        InputError: as `attribution_patching`.
        NotInThisModelError: where what a layer's parts add to the stream is not known; the text says why.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import edge_attribution
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> paris, rome = (model.tokenizer.encode(token)[0] for token in (" Paris", " Rome"))
        >>> found = edge_attribution(
        ...     model,
        ...     "The capital of France is",
        ...     "The capital of Italy is",
        ...     metric=lambda logits: logits[:, paris] - logits[:, rome],
        ...     steps=5,
        ... )
        >>> found.effect.shape, [edge[:2] for edge in found.top(2)]
        (torch.Size([1, 43, 115]), [('embeddings', 'L0 mlp'), ('L0 mlp', 'L2H0.v')])
    """
    pairs = Pairs.of(model, clean, corrupted)
    graph = graph_of(model, pairs.clean)
    one, other = (run(model, graph, inputs) for inputs in (pairs.clean, pairs.corrupted))
    mask = pairs.mask[:, :, None]
    changes = torch.stack([(one.written[name] - other.written[name]).float().to(mask.device) for name in graph.sources])
    changes = changes * mask
    with torch.no_grad(), model.trace(**pairs.clean, use_cache=False):
        start = model.token_embeddings
    with torch.no_grad(), model.trace(**pairs.corrupted, use_cache=False):
        baseline = model.token_embeddings
    scores = torch.zeros(len(mask), len(graph.sources), len(graph.destinations))
    for k in shown(range(1, steps + 1), "steps", progress):
        at = start if k == steps else baseline + k / steps * (start - baseline)
        slopes = _slopes(model, graph, pairs.clean, at, metric)
        for d, name in enumerate(graph.destinations):
            scores[:, :, d] += torch.einsum("sbth,bth->bs", changes, slopes[name].to(changes)).cpu() / steps
    return EdgeAttribution(
        tuple(graph.sources),
        tuple(graph.destinations),
        scores * graph.edges,
        graph.edges,
        measured(metric, one.logits).cpu(),
        measured(metric, other.logits).cpu(),
        pairs.prompts,
        name_of(metric),
    )


def _slopes(
    model: StandardizedTransformer, graph: Graph, inputs: dict[str, Any], embeddings: Tensor, metric: Metric
) -> dict[str, Float[Tensor, "prompt seq hidden"]]:
    """The gradient of the metric with respect to the stream as each destination reads it."""
    read: dict[str, tuple[Tensor, Tensor, int | None]] = {}  # by destination: the stream, what comes of it, which head
    with torch.enable_grad(), model.trace(**inputs, use_cache=False):
        model.token_embeddings = embeddings.detach().requires_grad_().clone()
        for i, layer in enumerate(graph.layers):
            stream = model.layers_input[i]
            if layer.heads:
                inside = [getattr(model, name)[i] for name in INSIDE]
                each = [(stream, one, h) for one in inside for h in range(one.shape[1])]
                read |= zip(graph.readers(i), each, strict=True)
            elif layer.mixer:
                read[layer.mixer] = stream, model.mixers_contribution[i], None
            if layer.mlp:
                stream = model.layers_mid[i] if layer.mid else stream
                read[f"L{i} mlp"] = stream, model.mlps_contribution[i], None
        last = model.layers_output[-1]
        value = measured(metric, model.logits[:, -1])
    made = list({id(one): one for _, one, _ in read.values()}.values())
    got = torch.autograd.grad(value, [*made, last], torch.ones_like(value), retain_graph=True)
    by_value = {id(one): slope for one, slope in zip(made, got[:-1], strict=True)}
    slopes = {"logits": got[-1]}
    for name, (stream, one, head) in read.items():
        along = by_value[id(one)]
        if head is not None:
            along = torch.zeros_like(along).index_copy_(1, torch.tensor([head], device=along.device), along[:, [head]])
        slopes[name] = torch.autograd.grad(one, stream, along, retain_graph=True)[0]
    return slopes
