"""A plan as text that reads like the block."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nnatomy.errors import counted
from nnatomy.plans.graph import Block, Node, Of, Part, Ref, Size, mapped

if TYPE_CHECKING:
    from nnatomy.plans.plan import Plan

_BETWEEN = {"add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@", "gt": ">", "lt": "<", "eq": "=="}
_VIEWS = ("select", "slice", "unsqueeze", "view", "alias", "detach", "transpose", "squeeze", "permute", "expand")
_LAST = 2**63 - 1


def written(plan: Plan) -> str:
    """All of it."""
    about = plan.about
    lines = [f"plan of {about.get('id')} ({about.get('class')}, {about.get('dtype')})"]
    if plan.only is not None:
        lines.append(f"for one prompt alone, of {counted(len(plan.only['ids']), 'token')}: {plan.only['why']}")
    for i, block in enumerate(plan.blocks):
        if len(plan.blocks) > 1:
            lines.append(f"block {i}:")
        lines += _block(plan, block)
    lines += [f"{name}: {_shape(tensor)}" for name, tensor in plan.constants.items() if tensor.ndim]
    lines += [f"note: {note}" for note in plan.notes]
    for prompt in plan.prompts:
        what = repr(prompt["text"]) if prompt.get("text") else f"{counted(len(prompt['ids']), 'token')}"
        lines.append(f"expected on {what}: {len(prompt['numbers'])} numbers")
    return "\n".join(map(_plain, lines))


def _plain(line: str) -> str:
    """Without what is no character to be seen: a file may be anybody's."""
    return "".join(one if one.isprintable() else "?" for one in line)


def one_line(plan: Plan, block: int) -> str:
    """The first assignment."""
    if not plan.blocks:
        return "nothing yet"
    texts = (text for part in plan.blocks[block].parts for text in _Text(plan, part.nodes).lines())
    return _plain(next((text for text in texts if not re.match(r"x\d", text)), "nothing"))


def _block(plan: Plan, block: Block) -> list[str]:
    each = "" if block.together else ", to each prompt by itself"
    ends: list[int | None] = [part.first - 1 for part in block.parts[1:]] + [None]
    lines = []
    for part, end in zip(block.parts, ends, strict=True):
        lines.append(f"{_steps(part, end, len(block.parts))}{each}:")
        lines += [
            f"    {text}" for text in _Text(plan, part.nodes).lines() or [f"pass{part.why and '    # ' + part.why}"]
        ]
    return lines


def _steps(part: Part, end: int | None, count: int) -> str:
    if count == 1:
        return "in every step"
    if end is None:
        return f"in step {part.first} and all later ones"
    return f"in step {part.first}" if end == part.first else f"in steps {part.first} to {end}"


def _shape(tensor: Tensor) -> str:
    return f"tensor of {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}, norm {float(tensor.float().norm()):.4g}"


class _Text:
    """The nodes of a part as lines; a value that is needed once stands where it is needed."""

    def __init__(self, plan: Plan, nodes: list[Node]) -> None:
        self._plan, self._nodes = plan, nodes
        self._uses: dict[int, int] = {}
        for node in nodes:
            for ref in node.refs:
                self._uses[ref] = self._uses.get(ref, 0) + 1
        #: By value: its text, and whether it is one term.
        self._texts: list[tuple[str, bool]] = []
        self._written = self._values_written()
        self._named = 0

    def _values_written(self) -> set[int]:
        """The values that are changed in place, themselves or as a view of theirs."""
        base: list[int] = []
        found = set[int]()
        for node in self._nodes:
            is_view = node.kind == "op" and node.gives == 1 and node.name.split(".")[1] in _VIEWS
            of = base[node.refs[0]] if is_view and node.refs else len(base)
            found.update(base[value] for value in node.writes)
            base += [of + (0 if is_view else i) for i in range(node.gives)]
        return found

    def lines(self) -> list[str]:
        found: list[str] = []
        for node in self._nodes:
            found += self._line(node)
        return found

    def _line(self, node: Node) -> list[str]:
        if node.kind == "put":
            return [f"{node.point} = {self._arg(node.args[0])}"]
        if node.kind == "skip":
            first, last, given = node.args
            return [f"skip_layers({first}, {last}{'' if given is None else ', ' + self._arg(given)})"]
        if node.kind == "op" and node.gives == 0:
            return [self._in_place(node)]
        if node.kind != "op":
            self._texts.append((self._source(node), True))
            return []
        text, is_term = self._op(node)
        first = len(self._texts)
        once = self._uses.get(first, 0) <= 1 or (is_term and node.name.split(".")[1] in _VIEWS)
        if node.gives == 1 and once and len(text) < 100 and first not in self._written:
            self._texts.append((text, is_term))
            return []
        names = [f"x{self._named + i}" for i in range(node.gives)]
        self._named += node.gives
        self._texts += [(name, True) for name in names]
        return [f"{', '.join(names)} = {text}"]

    def _source(self, node: Node) -> str:
        if node.kind == "constant":
            tensor = self._plan.constants[node.name]
            return node.name if tensor.ndim else f"{tensor.item():.6g}"
        if node.kind == "chosen":
            where = node.args[0]
            return f"positions({_slice(where.start, where.stop) if isinstance(where, slice) else where})"
        return f"weights[{node.name!r}]" if node.kind == "weight" else node.point

    def _op(self, node: Node) -> tuple[str, bool]:
        base = node.name.split(".")[1]
        args = [self._arg(one) for one in node.args]
        if base in _BETWEEN and len(args) == 2 and not node.kwargs:
            left, right = (self._term(one) for one in node.args)
            return f"{left} {_BETWEEN[base]} {right}", False
        of = node.args[0] if node.args else None
        special = self._special(base, of, node, args) if isinstance(of, Ref) else ""
        return special or f"{base}({self._given(args, node)})", True

    def _special(self, base: str, of: Ref, node: Node, args: list[str]) -> str:
        """What has a form of its own in Python; "" if it has none."""
        axis = node.args[1] if len(node.args) > 1 else 0
        before = ":, " * axis if isinstance(axis, int) and 0 <= axis < 8 else "..., " if axis == -1 else ""
        if base == "select" and len(args) == 3 and (before or axis == 0):
            return f"{self._term(of)}[{before}{args[2]}]"
        if base == "slice" and (before or axis == 0):
            index = _slice(*(*node.args[2:], None, None, None)[:3])
            return f"{self._term(of)}[{before}{index}]" if index != ":" else self._term(of)
        if base == "unsqueeze" and axis == -1:
            return f"{self._term(of)}[..., None]"
        if base in ("alias", "detach", "lift_fresh"):
            return self._term(of)
        if base == "_to_copy":
            return f"{self._term(of)}.to({', '.join(self._arg(one) for one in node.kwargs.values() if one)})"
        return ""

    def _given(self, args: list[str], node: Node) -> str:
        named = {key: self._arg(one) for key, one in node.kwargs.items() if one not in (None, False)}
        return ", ".join([*args, *(f"{key}={text}" for key, text in named.items())])

    def _in_place(self, node: Node) -> str:
        base = node.name.split(".")[1].removesuffix("_")
        target, *others = [self._arg(one) for one in node.args] or [""]
        if base in ("copy", "fill") and others:
            return f"{target} = {others[0]}" if target.endswith("]") else f"{target}[...] = {others[0]}"
        if base in _BETWEEN and len(others) == 1 and not node.kwargs:
            return f"{target} {_BETWEEN[base]}= {others[0]}"
        return f"{target}.{base}_({self._given(others, node)})"

    def _term(self, one: Any) -> str:
        text = self._arg(one)
        return text if not isinstance(one, Ref) or self._texts[one.value][1] else f"({text})"

    def _arg(self, one: Any) -> str:
        if isinstance(one, (list, tuple)):
            return f"[{', '.join(mapped(list(one), self._arg))}]"
        if isinstance(one, Ref):
            return self._texts[one.value][0]
        if isinstance(one, Of):
            return "dtype" if one is Of.DTYPE else "device"
        if isinstance(one, float):
            return f"{one:.6g}"
        return str(one).removeprefix("torch.") if not isinstance(one, (str, Size)) else str(one)


def _slice(start: Any, stop: Any, step: Any = None) -> str:
    by = "" if step in (None, 1) else f":{step}"
    return f"{'' if start in (None, 0) else start}:{'' if stop in (None, _LAST) else stop}{by}"
