"""What a block did, as a list of nodes: points read, functions of their values, and what was put where.

Each node gives some values, which are numbered in the order of the nodes; later nodes refer to them by number. A function that
writes in place gives none: what it has written to goes on under its own number, also seen through views, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from torch._ops import OpOverload

from nnatomy.names import ROWS, Name
from nnatomy.serve import policy
from nnatomy.serve.policy import Refused

#: read: the value of a point. put: a value takes its place. skip: layers are not run. op: a function of `aten`.
#: constant: a tensor of the plan. weight: a parameter or buffer of the model. chosen: which positions are meant.
Kind = Literal["read", "put", "skip", "op", "constant", "weight", "chosen"]
#: Points that a block is given, and does not change.
GIVEN = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Ref:
    """The value of that number."""

    value: int


@dataclass(frozen=True)
class Size:
    """`times * axis + plus`, where the axis is "seq", the positions of this step, or "key", those so far."""

    axis: str
    times: int = 1
    plus: int = 0

    def of(self, sizes: dict[str, int]) -> int:
        return self.times * sizes[self.axis] + self.plus

    def __str__(self) -> str:
        times = "" if self.times == 1 else f"{self.times} * "
        plus = "" if not self.plus else f" {'-' if self.plus < 0 else '+'} {abs(self.plus)}"
        return f"{times}{self.axis}{plus}"


class Of(Enum):
    """What an argument is that depends on the model."""

    DTYPE = "the model's dtype"
    DEVICE = "the device of the values"


@dataclass
class Node:
    """One thing that a block did.

    Attributes:
        name: of a point, a function (`aten.add.Tensor`), a constant, or the path of a weight.
        layer: of a point; None of one that is of no layer.
        args, kwargs: of an op; of a put its value; of a skip the first and last layer, and a value or None; of a chosen where.
        gives: how many values.
        sizes: of a point, by axis, those that do not depend on the prompt.
        line: where it stands in the user's code; known while it is being recorded.
        refused: why it cannot be in a plan; "" if it can.
    """

    kind: Kind
    name: str = ""
    layer: int | None = None
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    gives: int = 1
    sizes: dict[str, int] = field(default_factory=dict)
    line: str = field(default="", compare=False)
    refused: str = field(default="", compare=False)

    @property
    def point(self) -> str:
        return self.name if self.layer is None else f"{self.name}[{self.layer}]"

    @property
    def op(self) -> OpOverload:
        """Its function. Raises Refused unless a plan may have it."""
        return function(self.name)

    @property
    def refs(self) -> list[int]:
        """The values that it needs."""
        return [leaf.value for leaf in leaves([self.args, list(self.kwargs.values())]) if isinstance(leaf, Ref)]

    @property
    def writes(self) -> list[int]:
        """The values that it changes in place."""
        if self.kind != "op":
            return []
        found = []
        for i, argument in enumerate(self.op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = self.args[i] if i < len(self.args) else self.kwargs.get(argument.name)
                found += [leaf.value for leaf in leaves(given) if isinstance(leaf, Ref)]
        return found


def function(name: str) -> OpOverload:
    """The overload of that name. Raises Refused unless a plan may have it."""
    op = policy.overload(name)
    base = op._schema.name.removeprefix("aten::")
    if base in policy.GIVE_VALUES or base in ("nonzero", "masked_select"):
        raise Refused(f"{name}: what it gives, or how much, is decided by values")
    return op


def row_of(name: str) -> Name | None:
    """The row of a point that a plan may have, or None."""
    row = ROWS.get(name)
    return None if row is None or name in ("input_size", "next_token_probs") or row.part == "cross_attentions" else row


def leaves(value: Any) -> Iterator[Any]:
    """What is in lists of arguments."""
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from leaves(one)
    else:
        yield value


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The arguments, with other leaves."""
    return [mapped(one, change) for one in value] if isinstance(value, (list, tuple)) else change(value)


@dataclass
class Part:
    """What is done in some steps: from `first` on, until the next part's first.

    Attributes:
        nodes: nothing is done if there are none.
        why: why nothing is done, where the block itself fails in these steps.
    """

    first: int
    nodes: list[Node]
    why: str = ""


@dataclass
class Block:
    """What one block did, one part after the other.

    Attributes:
        together: whether it may be done to a batch of prompts as it is to one; else to each prompt by itself.
    """

    parts: list[Part]
    together: bool = False

    def part(self, step: int) -> Part:
        """That of a step."""
        return [one for one in self.parts if one.first <= step][-1]


def alive(nodes: list[Node], root: list[Any]) -> list[Node]:
    """The nodes that have an effect, numbered anew.

    Args:
        root: by value, what is the same for all values that share memory.
    """
    roots, first = set(), 0
    starts = []
    for node in nodes:
        starts.append(first)
        if node.kind == "read" and node.name not in GIVEN:
            roots.add(root[first])
        first += node.gives
    keep = [False] * len(nodes)
    needed: set[int] = set()
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(nodes))):
            node, gives = nodes[i], range(starts[i], starts[i] + nodes[i].gives)
            writes = [] if keep[i] or node.refused or node.gives else node.writes
            effect = node.kind in ("put", "skip") or any(root[value] in roots for value in writes)
            if not keep[i] and (effect or not needed.isdisjoint(gives)):
                keep[i] = changed = True
                needed.update(node.refs)
                roots.update(root[value] for value in (*node.refs, *gives))
    numbers: dict[int, int] = {}
    kept = []
    for i, node in enumerate(nodes):
        if keep[i]:
            numbers.update({starts[i] + j: len(numbers) + j for j in range(node.gives)})
            kept.append(rewritten(node, lambda leaf: Ref(numbers[leaf.value]) if isinstance(leaf, Ref) else leaf))
    return kept


def rewritten(node: Node, change: Callable[[Any], Any]) -> Node:
    """The node, with other leaves of its arguments."""
    args, kwargs = mapped(node.args, change), {key: mapped(one, change) for key, one in node.kwargs.items()}
    return Node(node.kind, node.name, node.layer, args, kwargs, node.gives, node.sizes, node.line, node.refused)
