"""Several recordings of one block, on prompts of several lengths or in several steps, made one.

Where they do the same and only whole numbers differ, these are sizes: of the positions of this step, or of those so far. Whatever
else differs is of the one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnatomy.plans.graph import Node, Of, Size, leaves, rewritten


@dataclass
class Recording:
    """What a block did in one pass.

    Attributes:
        constants: by what a constant's node has for an argument.
        sizes: how many positions the pass had ("seq"), and how many there were with those before ("key").
    """

    nodes: list[Node]
    constants: dict[int, Tensor]
    sizes: dict[str, int]


class Differ(Exception):  # noqa: N818
    """Two recordings are not the same; the text says in what."""


def united(recordings: Sequence[Recording]) -> list[Node]:
    """What all of them are, with the constants of the first.

    Raises:
        Differ: if they are not one.
    """
    first = recordings[0]
    for other in recordings[1:]:
        for one, its in zip(first.nodes, other.nodes, strict=False):
            if _kind(one) != _kind(its):
                raise Differ(
                    f"{one.line}: the block does {_what(one)} here, and {_what(its)} {_on(other)} ({its.line})"
                )
        if len(first.nodes) != len(other.nodes):
            more = max(first.nodes, other.nodes, key=len)[min(len(first.nodes), len(other.nodes))]
            raise Differ(f"{more.line}: the block does {_what(more)} in one case and not in the other ({_on(other)})")
    return [_united(nodes, recordings) for nodes in zip(*(one.nodes for one in recordings), strict=True)]


def _kind(node: Node) -> tuple[Any, ...]:
    return node.kind, "" if node.kind == "constant" else node.name, node.layer, node.gives


def _united(nodes: tuple[Node, ...], recordings: Sequence[Recording]) -> Node:
    first = nodes[0]
    if first.kind == "constant":
        a = recordings[0].constants[first.args[0]]
        for node, other in zip(nodes[1:], recordings[1:], strict=True):
            b = other.constants[node.args[0]]
            if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.nan_to_num(7), b.nan_to_num(7)):
                shapes = f"{tuple(a.shape)}" + ("" if a.shape == b.shape else f", {tuple(b.shape)}")
                raise Differ(
                    f"{first.line}: a tensor of {shapes} that the block uses is another {_on(other)}: it is made of this "
                    "prompt's length or values"
                )
        return first
    flat = [list(leaves([node.args, list(node.kwargs.values())])) for node in nodes]
    if len({len(one) for one in flat}) > 1:
        raise Differ(f"{first.line}: {_what(first)} is given other arguments {_on(recordings[1])}")
    found = iter([_leaf(first, column, recordings) for column in zip(*flat, strict=True)])
    return rewritten(first, lambda _: next(found))


def _leaf(node: Node, column: tuple[Any, ...], recordings: Sequence[Recording]) -> Any:
    first = column[0]
    if all(type(one) is type(first) and (one == first or one != one) for one in column):
        return first
    if all(type(one) is int for one in column):
        for axis in ("seq", "key"):
            sizes = [one.sizes[axis] for one in recordings]
            guesses = [Size(axis, 1, first - sizes[0])]
            guesses += [Size(axis, first // sizes[0])] if first % sizes[0] == 0 else []
            for guess in guesses:
                if all(guess.of(one.sizes) == got for one, got in zip(recordings, column, strict=True)):
                    return guess
    one = next(i for i, got in enumerate(column) if got != first)
    raise Differ(
        f"{node.line}: {_what(node)} is given {first!r:.40} here, and {column[one]!r:.40} {_on(recordings[one])}: it depends on "
        "the prompt"
    )


def _what(node: Node) -> str:
    return f"{node.kind} {node.point}".strip() if node.kind != "op" else node.name.removeprefix("aten.")


def _on(recording: Recording) -> str:
    return f"on {recording.sizes['seq']} tokens ({recording.sizes['key']} with those before)"


def for_any_model(nodes: list[Node], dtype: torch.dtype, devices: set[torch.device]) -> list[Node]:
    """With the model's dtype and device where these are arguments."""

    def change(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype) and leaf == dtype:
            return Of.DTYPE
        if isinstance(leaf, torch.device) and leaf in devices:
            return Of.DEVICE
        return leaf

    return [rewritten(node, change) for node in nodes]
