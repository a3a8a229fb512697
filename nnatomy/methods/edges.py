"""The graph that edges are of: what writes to the residual stream, and what reads it.

Sources are the embeddings, each head, each MLP. Destinations are each head's queries, keys and values, each MLP, and the
logits; each reads, before its norm, the sum of all sources before it. Query heads that share keys and values are one
destination there. A token mixer that is no attention is one source and one destination; so is an attention that reads the
stream by something else too (an output gate).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnatomy.methods.frozen_norms import FrozenNorms
from nnatomy.methods.points import has, refuse_crossing
from nnatomy.standardized import StandardizedTransformer

INSIDE = ("queries", "keys", "values")


@dataclass(frozen=True)
class LayerNodes:
    """What one layer has.

    Attributes:
        mixer: the name of the token mixer as a whole; "" where there is none, or where it is taken by heads.
        heads: how many queries, keys and values there are; empty where it is not taken by heads.
        mlp: whether there is one.
        mid: whether that reads the stream behind the token mixer.
    """

    mixer: str
    heads: tuple[int, ...]
    mlp: bool
    mid: bool


@dataclass(frozen=True)
class Graph:
    """All nodes, by name in the order of the forward pass, with when they write or read: a source comes before."""

    layers: tuple[LayerNodes, ...]
    sources: dict[str, int] = field(init=False)
    destinations: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        sources = {"embeddings": -1}
        destinations: dict[str, int] = {}
        for i, layer in enumerate(self.layers):
            destinations |= dict.fromkeys(self.readers(i), 2 * i)
            sources |= dict.fromkeys(self.writers(i), 2 * i)
            if layer.mlp:
                destinations[f"L{i} mlp"] = 2 * i + layer.mid
                sources[f"L{i} mlp"] = 2 * i + 1
        destinations["logits"] = 2 * len(self.layers)
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "destinations", destinations)

    def writers(self, i: int) -> list[str]:
        """The sources in a layer's token mixer."""
        layer = self.layers[i]
        if layer.heads:
            return [f"L{i}H{h}" for h in range(layer.heads[0])]
        return [layer.mixer] if layer.mixer else []

    def readers(self, i: int) -> list[str]:
        """The destinations in a layer's token mixer: all queries, all keys, all values."""
        layer = self.layers[i]
        if not layer.heads:
            return self.writers(i)
        names = []
        for kind, count in zip("qkv", layer.heads, strict=True):
            share = layer.heads[0] // count
            spans = [f"H{h * share}" if share == 1 else f"H{h * share}-{(h + 1) * share - 1}" for h in range(count)]
            names += [f"L{i}{span}.{kind}" for span in spans]
        return names

    @property
    def edges(self) -> Bool[Tensor, "source destination"]:
        """Which source comes before which destination."""
        before = torch.tensor(list(self.sources.values()))[:, None]
        return before < torch.tensor(list(self.destinations.values()))


def graph_of(model: StandardizedTransformer, inputs: dict[str, Any]) -> Graph:
    """Raises NotInThisModelError where what a layer's parts add to the stream is not known."""
    refuse_crossing(model, "edge_attribution")
    layers = []
    model._shards.refuse_inner_gradients("A graph of edges")
    with torch.enable_grad(), model.trace(**inputs, use_cache=False):
        for i in range(model.num_layers):
            mixes, mlp, mid = (
                has(accessor, i) for accessor in (model.mixers_contribution, model.mlps_contribution, model.layers_mid)
            )
            if not mixes and not mlp:
                model.mixers_contribution.module(i)  # raises, with the reason
            heads: tuple[int, ...] = ()
            parts = (*INSIDE, "heads_output", "attentions_contribution")
            has_all = all(has(getattr(model, name), i) for name in parts)
            if model.layer_kinds[i] == "attention" and has_all:
                stream = model.layers_input[i].detach().requires_grad_()
                model.layers_input[i] = stream.clone()
                inside = [getattr(model, name)[i] for name in INSIDE]
                if _is_all(stream, inside, model.attentions_contribution[i]):
                    heads = tuple(one.shape[1] for one in inside)
            name = f"L{i} {model.layer_kinds[i]}" if mixes and not heads else ""
            layers.append(LayerNodes(name, heads, mlp, mid))
    return Graph(tuple(layers))


def _is_all(stream: Tensor, inside: list[Tensor], added: Tensor) -> bool:
    """Whether the stream reaches what is added by queries, keys and values alone: no gradient goes another way."""
    along = torch.randn(added.shape, generator=torch.Generator().manual_seed(0)).to(added)
    whole, *slopes = torch.autograd.grad(added, [stream, *inside], along, retain_graph=True)
    (by_these,) = torch.autograd.grad(inside, stream, slopes)
    return float((whole - by_these).norm()) < torch.finfo(added.dtype).eps ** 0.5 * float(whole.norm())


@dataclass(frozen=True)
class Streams:
    """One run: what each source writes, and the stream as each layer, each MLP and the head read it."""

    written: dict[str, Float[Tensor, "prompt seq hidden"]]
    inputs: list[Float[Tensor, "prompt seq hidden"]]
    mids: list[Float[Tensor, "prompt seq hidden"]]
    last: Float[Tensor, "prompt seq hidden"]
    logits: Float[Tensor, "prompt vocab"]


def run(model: StandardizedTransformer, graph: Graph, inputs: dict[str, Any]) -> Streams:
    """The model as it is."""
    written: dict[str, Tensor] = {}
    streams: list[Tensor] = []
    mids: list[Tensor] = []
    with torch.enable_grad(), FrozenNorms(), model.trace(**inputs, use_cache=False):
        for i, layer in enumerate(graph.layers):
            streams.append(model.layers_input[i].detach())
            written.setdefault("embeddings", streams[0])
            if layer.heads:
                written |= zip(graph.writers(i), heads_written(model, i), strict=True)
            elif layer.mixer:
                written[layer.mixer] = model.mixers_contribution[i].detach()
            mids.append(model.layers_mid[i].detach() if layer.mid else streams[-1])
            if layer.mlp:
                written[f"L{i} mlp"] = model.mlps_contribution[i].detach()
        last = model.layers_output[-1].detach()
        logits = model.logits[:, -1].detach()
    return Streams(written, streams, mids, last, logits)


def heads_written(model: StandardizedTransformer, i: int) -> Float[Tensor, "head prompt seq hidden"]:
    """In a trace with gradients and frozen norms: what each head adds to the stream, a bias in equal shares.

    That is a linear map of what the heads give (a norm behind them has its scale held fixed). The gradient of a map along
    `u` is linear in `u`; its gradient with respect to `u`, along one head, is the map of that head.
    """
    heads = model.heads_output[i].detach().requires_grad_()
    model.heads_output[i] = heads
    added = model.attentions_contribution[i]
    u = torch.zeros_like(added, requires_grad=True)
    (back,) = torch.autograd.grad(added, heads, u, create_graph=True)
    each = []
    for h in range(heads.shape[2]):
        alone = torch.zeros_like(heads)
        alone[:, :, h] = heads[:, :, h].detach()
        each.append(torch.autograd.grad(back, u, alone, retain_graph=True)[0])
    found = torch.stack(each)
    return found + (added.detach() - found.sum(0)) / len(each)
