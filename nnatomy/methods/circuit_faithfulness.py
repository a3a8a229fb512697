"""How much of the metric a circuit keeps: edges in it carry what they do, all others what they did in the corrupted run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnatomy.errors import InputError, a_kind
from nnatomy.methods.arguments import method
from nnatomy.methods.edge_attribution import EdgeAttribution
from nnatomy.methods.edges import INSIDE, Graph, Streams, graph_of, heads_written, run
from nnatomy.methods.frozen_norms import FrozenNorms
from nnatomy.methods.gradients import Metric, Pairs, measured
from nnatomy.methods.pairs import gap
from nnatomy.methods.progress import shown
from nnatomy.methods.result import Axis, Result, name_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import numbers


@dataclass(frozen=True, repr=False)
class Faithfulness(Result):
    """The metric of circuits of growing size.

    Attributes:
        sizes: how many edges are kept.
        effect: what the metric is then.
        clean, corrupted: the metric in the two runs.
        prompts, metric: as of `EdgeAttribution`.
    """

    sizes: tuple[int, ...]
    effect: Float[Tensor, "prompt size"]
    clean: Float[Tensor, " prompt"]
    corrupted: Float[Tensor, " prompt"]
    prompts: tuple[str, ...] = ()
    metric: str = "metric"

    quantity = "metric by edges kept"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """prompt, size."""
        return (Axis("prompt", range(len(self.clean))), Axis("size", self.sizes))

    @property
    def title(self) -> str:
        """What it is of."""
        return f"Faithfulness, {self.metric}"

    @property
    def recovered(self) -> Float[Tensor, " size"]:
        """The share of what lies between the corrupted runs (0) and the clean ones (1), on average over the prompts."""
        base = self.corrupted.mean()
        return (self.effect.mean(0) - base) / gap(self.clean.mean(), base)

    def plot(self, title: str | None = None) -> Any:
        """The share recovered, by the number of edges."""
        from nnatomy.plots import curves

        return curves(
            self.sizes,
            {"circuit": self.recovered.tolist()},
            title=self.heading(title),
            x_title="edges kept",
            y_title="metric recovered",
        )


@method
def circuit_faithfulness(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    *,
    metric: Metric,
    attribution: EdgeAttribution,
    sizes: int | Sequence[int] | None = None,
    progress: bool = False,
) -> Faithfulness:
    """The metric where only the `k` edges with the largest scores are kept, for several `k`.

    Each destination reads the corrupted run's stream, and of each source that is kept for it, what that source writes now
    less what it wrote in the corrupted run (Syed et al. 2023; Hanna et al. 2024, section 4). With all edges that is the
    clean run, with none the corrupted one. A size costs one pass, with a copy of the prompts for each destination of a layer.

    Args:
        clean, corrupted, metric: as in `edge_attribution`; other prompts than those scored show whether a circuit is general.
        attribution: what `edge_attribution` gave on this model.
        sizes: how many edges; by default 0, powers of two, and all.
        progress: show a progress bar over the sizes.

    Raises:
        InputError: as `edge_attribution`, for scores of another model, and for more edges than there are.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import circuit_faithfulness, edge_attribution
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> paris, rome = (model.tokenizer.encode(token)[0] for token in (" Paris", " Rome"))
        >>> metric = lambda logits: logits[:, paris] - logits[:, rome]
        >>> prompts = "The capital of France is", "The capital of Italy is"
        >>> edges = edge_attribution(model, *prompts, metric=metric, steps=5)
        >>> sizes = [0, 16, 64, int(edges.edges.sum())]
        >>> found = circuit_faithfulness(model, *prompts, metric=metric, attribution=edges, sizes=sizes)
        >>> [round(share, 2) + 0.0 for share in found.recovered.tolist()]
        [0.0, 0.68, 1.06, 1.0]
    """
    if not isinstance(attribution, EdgeAttribution):
        raise InputError(f"attribution is {a_kind(attribution)}: give what edge_attribution gave.")
    pairs = Pairs.of(model, clean, corrupted)
    graph = graph_of(model, pairs.clean)
    if tuple(graph.sources) != attribution.sources or tuple(graph.destinations) != attribution.destinations:
        raise InputError("The scores are of another model: their nodes are not this one's.")
    count = int(graph.edges.sum())
    sizes = [0, *(2**n for n in range(count.bit_length())), count] if sizes is None else numbers("sizes", sizes)
    if wrong := [size for size in sizes if not 0 <= size <= count]:
        raise InputError(f"sizes={sizes}: {wrong[0]} edges cannot be kept, there are {count} (sizes: 0 to {count}).")
    one, other = (run(model, graph, inputs) for inputs in (pairs.clean, pairs.corrupted))
    metrics = [
        measured(metric, _circuit(model, graph, pairs, one, other, attribution.kept(size))).cpu()
        for size in shown(sizes, "sizes", progress)
    ]
    return Faithfulness(
        tuple(sizes),
        torch.stack(metrics, 1),
        measured(metric, one.logits).cpu(),
        measured(metric, other.logits).cpu(),
        pairs.prompts,
        name_of(metric),
    )


def _circuit(
    model: StandardizedTransformer,
    graph: Graph,
    pairs: Pairs,
    clean: Streams,
    corrupted: Streams,
    keep: Bool[Tensor, "source destination"],
) -> Float[Tensor, "prompt vocab"]:
    """The logits of a circuit.

    In a layer each destination reads another stream. So the batch has a copy of the prompts for each, and what they are to
    make of it (a head's queries, say) is put together from the copies for all of them.
    """
    count = len(pairs.mask)
    copies = max(len(graph.readers(i)) + layer.mlp for i, layer in enumerate(graph.layers))
    inputs: dict[str, Any] = {
        name: x.repeat(copies, *[1] * (x.ndim - 1)) if isinstance(x, Tensor) else x for name, x in pairs.clean.items()
    }
    sources, destinations = list(graph.sources), list(graph.destinations)
    changes = {"embeddings": clean.written["embeddings"] - corrupted.written["embeddings"]}

    def read(destination: str, base: Tensor) -> Tensor:
        for s in keep[:, destinations.index(destination)].nonzero()[:, 0].tolist():
            base = base + changes[sources[s]].to(base.device)
        return base

    def write(source: str, now: Tensor) -> None:
        changes[source] = now.detach() - corrupted.written[source]

    def batch(streams: list[Tensor]) -> Tensor:
        return torch.cat([*streams, *streams[:1] * (copies - len(streams))])

    with torch.enable_grad(), FrozenNorms(), model.trace(**inputs, use_cache=False):
        for i, layer in enumerate(graph.layers):
            readers, mlp = graph.readers(i), f"L{i} mlp"
            before = [*readers, mlp] if layer.mlp and not layer.mid else readers
            model.layers_input[i] = batch([read(name, corrupted.inputs[i]) for name in before])
            first = 0
            for name, heads in zip(INSIDE, layer.heads, strict=False):
                accessor = getattr(model, name)
                each = accessor[i].detach().unflatten(0, (copies, count))
                own = torch.stack([each[first + h, :, h] for h in range(heads)], 1)
                accessor[i] = own.repeat(copies, 1, 1, 1)
                first += heads
            if layer.heads:
                for name, now in zip(graph.writers(i), heads_written(model, i), strict=True):
                    write(name, now[:count])
            elif layer.mixer:
                write(layer.mixer, model.mixers_contribution[i][:count])
            if layer.mid:
                model.layers_mid[i] = batch([read(mlp, corrupted.mids[i])])
            if layer.mlp:
                place = 0 if layer.mid else len(readers)
                write(mlp, model.mlps_contribution[i].unflatten(0, (copies, count))[place])
        model.layers_output[-1] = batch([read("logits", corrupted.last)])
        return model.logits[:count, -1].detach()
