"""Plans in folders: `plan.json` and `tensors.safetensors`, without code. What is read is taken for anybody's.

Whatever does not hold of a file is an error before anything is made of it: functions are those of a list (see
`nnatomy.serve.policy`), points are standard names, numbers and sizes are bounded.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.errors import PlanError, a_kind
from nnatomy.methods.activation_store import write_whole
from nnatomy.paths import path_of, what_is_at
from nnatomy.plans.graph import GIVEN, Block, Node, Of, Part, Ref, Size, function, mapped, row_of
from nnatomy.plans.plan import Plan
from nnatomy.serve import policy
from nnatomy.serve.policy import Refused

FORMAT, VERSION = "nnatomy.plan", 1
_JSON, _TENSORS = "plan.json", "tensors.safetensors"
#: At most: bytes of the JSON, nodes in all, depth of lists, and how large whole numbers are.
_JSON_BYTES, _NODES, _DEPTH, _INTEGER = 16 << 20, 20_000, 24, 2**63 - 1
_COUNT = 10_000
_DTYPES = {
    str(one).removeprefix("torch."): one
    for one in (
        *(
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
        ),
        *(torch.uint8, torch.bool),
    )
}
#: What stands for what depends on the model, where a call is looked at.
_OF_A_MODEL = {Of.DTYPE: torch.float32, Of.DEVICE: torch.device("cpu")}
_DTYPE_NAMES = {one: name for name, one in _DTYPES.items()}
_FORMATS = {"contiguous": torch.contiguous_format, "preserve": torch.preserve_format}
_FORMAT_NAMES = {one: name for name, one in _FORMATS.items()}
_FIELDS = {"format", "version", "about", "constants", "blocks", "prompts", "only", "notes"}
_ABOUT = {"id", "revision", "class", "type", "layers", "hidden", "dtype", "weights", "tokenizer"}


# Writing.


def save_plan(plan: Plan, folder: Path) -> None:
    """Write a plan to a folder."""
    text = json.dumps(_told(plan), indent=1, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _TENSORS, save({name: one.cpu().contiguous() for name, one in plan.constants.items()}))
    write_whole(folder / _JSON, text.encode())


def _told(plan: Plan) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "about": plan.about,
        "constants": {name: [_DTYPE_NAMES[one.dtype], list(one.shape)] for name, one in plan.constants.items()},
        "blocks": [
            {
                "together": block.together,
                "parts": [
                    {"first": part.first, "why": part.why, "nodes": [_told_node(node) for node in part.nodes]}
                    for part in block.parts
                ],
            }
            for block in plan.blocks
        ],
        "prompts": [
            {**one, "numbers": {name: _told_leaf(number) for name, number in one["numbers"].items()}}
            for one in plan.prompts
        ],
        "only": plan.only,
        "notes": plan.notes,
    }


def _told_node(node: Node) -> dict[str, Any]:
    told: dict[str, Any] = {"kind": node.kind}
    if node.name:
        told["name"] = node.name
    if node.layer is not None:
        told["layer"] = node.layer
    if node.args:
        told["args"] = mapped(node.args, _told_leaf)
    if node.kwargs:
        told["kwargs"] = {key: mapped(one, _told_leaf) for key, one in node.kwargs.items()}
    if node.gives != _GIVES.get(node.kind, 1):
        told["gives"] = node.gives
    if node.sizes:
        told["sizes"] = node.sizes
    return told


def _told_leaf(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, (bool, int, str)):
        return leaf
    if isinstance(leaf, float):
        return leaf if math.isfinite(leaf) else {"float": str(leaf)}
    if isinstance(leaf, Ref):
        return {"value": leaf.value}
    if isinstance(leaf, Size):
        return {"size": [leaf.axis, leaf.times, leaf.plus]}
    if isinstance(leaf, slice):
        return {"slice": [leaf.start, leaf.stop]}
    if isinstance(leaf, Of):
        return {"of": leaf.name}
    if isinstance(leaf, torch.dtype) and leaf in _DTYPE_NAMES:
        return {"dtype": _DTYPE_NAMES[leaf]}
    if isinstance(leaf, torch.memory_format) and leaf in _FORMAT_NAMES:
        return {"memory": _FORMAT_NAMES[leaf]}
    if isinstance(leaf, torch.layout) and leaf is torch.strided:
        return {"layout": "strided"}
    raise PlanError(f"A plan cannot have {a_kind(leaf)} ({leaf!r:.60}) among the arguments of a function.")


_GIVES = {"put": 0, "skip": 0}


# Reading.


def load_plan(path: str | Path) -> Plan:
    """Read a plan that `Plan.save` wrote. Nothing in it is run before `Plan.apply` or `Plan.check`; then, only functions of a list.

    Raises:
        PlanError: for a folder that is no plan; the text says where, and what does not hold.
    """
    if isinstance(path, Plan):
        raise PlanError("This is a plan already, and no path of one: apply it, plan.apply(model).")
    folder = path_of(path, "a folder that Plan.save wrote", PlanError)
    if folder.is_file():
        raise PlanError(f"{folder} is a file: give the path of a folder that Plan.save wrote.{what_is_at(folder)}")
    told = _read_json(_regular(folder / _JSON, _JSON_BYTES))
    try:
        plan = _Reader(folder).plan(told)
    except _NotAPlanError as error:
        raise PlanError(f"{folder / _JSON}: {error}") from None
    plan.from_file = True
    return plan


class _NotAPlanError(Exception):
    """What does not hold of a file."""


def _regular(path: Path, most: int) -> Path:
    try:
        about = path.stat()
    except OSError as error:
        raise PlanError(f"{path}: there is no plan: {error.strerror}.{what_is_at(path.parent)}") from None
    if not stat.S_ISREG(about.st_mode):
        raise PlanError(f"{path}: it is no ordinary file.")
    if about.st_size > most:
        raise PlanError(f"{path}: it has {about.st_size:,} bytes; {most:,} are allowed.")
    return path


def _read_json(path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    def refuse(text: str) -> Any:
        raise ValueError(f"{text} is no number of JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: it is no JSON: {error}") from None


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise _NotAPlanError(what)


def _whole(value: Any, low: int, high: int, what: str) -> int:
    _need(
        type(value) is int and low <= value <= high,
        f"{what} is a whole number from {low} to {high}, and not {value!r:.40}",
    )
    return int(value)


def _text(value: Any, what: str, most: int = 1000) -> str:
    _need(isinstance(value, str) and len(value) <= most, f"{what} is a text of at most {most} characters")
    return str(value)


def _dict(value: Any, fields: set[str], what: str) -> dict[str, Any]:
    _need(isinstance(value, dict), f"{what} is an object")
    found: dict[str, Any] = value
    _need(
        not found.keys() - fields, f"{what} has {', '.join(map(repr, sorted(found.keys() - fields)))}, which is nothing"
    )
    return found


def _list(value: Any, most: int, what: str) -> list[Any]:
    _need(isinstance(value, list) and len(value) <= most, f"{what} is a list of at most {most:,}")
    found: list[Any] = value
    return found


class _Reader:
    """Reads one plan."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plan = Plan()
        self._left = _NODES

    def plan(self, told: Any) -> Plan:
        told, plan = _dict(told, _FIELDS, "a plan"), self._plan
        _need(told.get("format") == FORMAT, f"its format is not {FORMAT!r}")
        _need(
            told.get("version") == VERSION,
            f"it is of version {told.get('version')!r:.20}; this nnatomy reads {VERSION}",
        )
        _need(told.keys() == _FIELDS, f"it has no {', '.join(sorted(_FIELDS - told.keys()))}")
        plan.about = self._about(told["about"])
        plan.constants = self._constants(told["constants"])
        plan.blocks = [self._block(one) for one in _list(told["blocks"], 1000, "blocks")]
        _need(bool(plan.blocks), "it has no block")
        plan.prompts = [self._prompt(one) for one in _list(told["prompts"], 100, "prompts")]
        plan.only = None if told["only"] is None else self._only(told["only"])
        plan.notes = [_text(one, "a note") for one in _list(told["notes"], 100, "notes")]
        return plan

    def _about(self, told: Any) -> dict[str, Any]:
        about = _dict(told, _ABOUT, "about")
        for name, value in about.items():
            plain = value is None or isinstance(value, str) or type(value) is int
            _need(plain and len(str(value)) <= 500, f"about.{name} is a short text or a whole number")
        dtype = about.get("dtype")
        _need(isinstance(dtype, str) and dtype in _DTYPES, f"about.dtype is a dtype, and not {dtype!r:.40}")
        return about

    def _constants(self, told: Any) -> dict[str, Tensor]:
        _need(isinstance(told, dict) and len(told) <= _NODES, "constants is an object")
        for name, about in told.items():
            good = isinstance(about, list) and len(about) == 2 and isinstance(about[0], str) and about[0] in _DTYPES
            _need(good and name.isidentifier() and len(name) <= 80, f"the constant {name!r:.40} is a dtype and a shape")
            for size in _list(about[1], 16, f"the shape of {name}"):
                _whole(size, 0, 2**40, f"a size of {name}")
        if not told:
            return {}
        path = _regular(self._folder / _TENSORS, 1 << 40)
        try:
            with safe_open(path, "pt") as file:
                _need({*file.keys()} == told.keys(), f"{_TENSORS} has other tensors than the plan")
                for name, (dtype, shape) in told.items():
                    its = file.get_slice(name)
                    _need(
                        list(its.get_shape()) == shape,
                        f"{name} is of {its.get_shape()} in {_TENSORS}, and of {shape} in the plan",
                    )
                    tensor = file.get_tensor(name)
                    _need(
                        tensor.dtype == _DTYPES[dtype],
                        f"{name} is {tensor.dtype} in {_TENSORS}, and {dtype} in the plan",
                    )
                return {name: file.get_tensor(name) for name in told}
        except SafetensorError as error:
            raise _NotAPlanError(f"{_TENSORS} is not in the safetensors format: {error}") from None

    def _block(self, told: Any) -> Block:
        told = _dict(told, {"together", "parts"}, "a block")
        _need(type(told.get("together")) is bool, "together is true or false")
        parts = [self._part(one) for one in _list(told.get("parts"), 1000, "parts")]
        firsts = [part.first for part in parts]
        _need(
            bool(parts) and firsts == sorted({*firsts}) and firsts[0] == 0,
            "parts begin in step 0, and go on in later ones",
        )
        return Block(parts, told["together"])

    def _part(self, told: Any) -> Part:
        told = _dict(told, {"first", "nodes", "why"}, "a part")
        nodes = _list(told.get("nodes"), self._left, "the nodes of all parts")
        self._left -= len(nodes)
        found: list[Node] = []
        protected: list[bool] = []  # by value: whether it lies in a weight
        for one in nodes:
            node = self._node(one, len(protected))
            _need(not any(protected[value] for value in node.writes), f"{node.name} writes into a weight of the model")
            of_weight = node.kind == "weight" or (node.kind == "op" and any(protected[value] for value in node.refs))
            protected += [of_weight and (node.kind == "weight" or _may_be_view(node))] * node.gives
            found.append(node)
        return Part(_whole(told.get("first"), 0, 10**6, "first"), found, _text(told.get("why", ""), "why"))

    def _node(self, told: Any, values: int) -> Node:
        told = _dict(told, {"kind", "name", "layer", "args", "kwargs", "gives", "sizes"}, "a node")
        kind = told.get("kind")
        known = ("read", "put", "skip", "op", "constant", "weight", "chosen")
        _need(isinstance(kind, str) and kind in known, f"a node is of a kind, and not {kind!r:.40}")
        name = _text(told.get("name", ""), "the name of a node", 300)
        layer = told.get("layer")
        if layer is not None:
            _whole(layer, -_COUNT, _COUNT, f"the layer of {name}")
        args = self._leaves(_list(told.get("args", []), _COUNT, "args"), values)
        kwargs = told.get("kwargs", {})
        _need(isinstance(kwargs, dict) and len(kwargs) <= 30, "kwargs is an object")
        kwargs = {key: self._leaves(one, values) for key, one in kwargs.items()}
        gives = _whole(told.get("gives", _GIVES.get(str(kind), 1)), 0, 1000, "gives")
        sizes = told.get("sizes", {})
        _need(isinstance(sizes, dict) and len(sizes) <= 8, "sizes is an object")
        for axis, size in sizes.items():
            _need(len(axis) <= 20, "an axis has a short name")
            _whole(size, 0, 2**40, f"the size of {axis}")
        node = Node(kind, name, layer, args, kwargs, gives, sizes)
        _CHECKS[node.kind](self._plan, node)
        return node

    def _leaves(self, told: Any, values: int, depth: int = 0) -> Any:
        if isinstance(told, list):
            _need(depth < _DEPTH, f"lists lie more than {_DEPTH} deep in one another")
            return [self._leaves(one, values, depth + 1) for one in _list(told, _COUNT, "a list")]
        if told is None or isinstance(told, (bool, float)):
            return told
        if isinstance(told, str):
            return _text(told, "an argument", 40)
        if isinstance(told, int):
            return _whole(told, -_INTEGER - 1, _INTEGER, "an argument")
        _need(
            isinstance(told, dict) and len(told) == 1,
            "an argument is a number, a text, a list, or an object of one name",
        )
        ((kind, of),) = told.items()
        if kind == "value":
            return Ref(_whole(of, 0, values - 1, "the number of a value that is there already"))
        if kind == "size":
            good = isinstance(of, list) and len(of) == 3 and of[0] in ("seq", "key")
            _need(good, "a size is an axis, how many times, and how many more")
            return Size(of[0], _whole(of[1], 0, 2**31, "times"), _whole(of[2], -(2**31), 2**31, "plus"))
        if kind == "slice":
            for one in _list(of, 2, "a slice"):
                _need(one is None or (type(one) is int and abs(one) < 2**31), "a slice is of whole numbers")
            _need(len(of) == 2, "a slice has a start and a stop")
            return slice(*of)
        table: dict[str, dict[Any, Any]] = {
            "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
            "of": dict(Of.__members__),
            "dtype": _DTYPES,
            "memory": _FORMATS,
            "layout": {"strided": torch.strided},
        }
        _need(
            kind in table and isinstance(of, str) and of in table[kind],
            f"an argument that is nothing: {kind}: {of!r:.40}",
        )
        return table[kind][of]

    def _prompt(self, told: Any) -> dict[str, Any]:
        told = _dict(told, {"text", "ids", "numbers"}, "a prompt")
        numbers = told.get("numbers")
        _need(isinstance(numbers, dict) and len(numbers) <= _COUNT, "numbers is an object")
        found = {}
        for name, number in numbers.items():
            found[_text(name, "the name of a number", 200)] = value = self._leaves(number, 0)
            _need(type(value) in (int, float), f"{name:.40} is a number")
            if name.startswith("logits: of token "):
                _need(name.removeprefix("logits: of token ").isdecimal() and len(name) < 30, f"{name!r} names a token")
        text = told.get("text")
        return {
            "text": None if text is None else _text(text, "a prompt", 100_000),
            "ids": self._ids(told.get("ids")),
            "numbers": {name: float(value) for name, value in found.items()},
        }

    def _only(self, told: Any) -> dict[str, Any]:
        told = _dict(told, {"ids", "why"}, "only")
        return {"ids": self._ids(told.get("ids")), "why": _text(told.get("why"), "why", 5000)}

    def _ids(self, told: Any) -> list[int]:
        ids = _list(told, 1_000_000, "token ids")
        _need(bool(ids), "a prompt has tokens")
        return [_whole(one, 0, 2**31, "a token id") for one in ids]


# What holds of each kind of node.


def _check_point(_: Plan, node: Node) -> None:
    row = row_of(node.name)
    _need(row is not None, f"{node.name!r:.60} is no standard name that a plan may have")
    assert row is not None
    _need(
        (row.part == "model") == (node.layer is None),
        f"{node.name} {'has no layer' if row.part == 'model' else 'is of a layer'}",
    )
    _need(not node.kwargs and {*node.sizes} <= {*row.axes}, f"{node.point} has what a point has not")
    if node.kind == "put":
        _need(row.assignable and node.name not in GIVEN, f"{node.name} cannot be assigned")
        _need(len(node.args) == 1 and isinstance(node.args[0], Ref) and node.gives == 0, f"{node.point} = one value")
    else:
        _need(not node.args and node.gives == 1, f"{node.point} is one value")


def _check_skip(_: Plan, node: Node) -> None:
    good = len(node.args) == 3 and not node.kwargs and not node.gives and not node.name
    _need(
        good and (node.args[2] is None or isinstance(node.args[2], Ref)), "skip is of two layers, and a value or null"
    )
    for layer in node.args[:2]:
        _whole(layer, -_COUNT, _COUNT, "a layer")


def _check_op(_: Plan, node: Node) -> None:
    _need(not node.sizes and node.layer is None, f"{node.name:.60} has no sizes and no layer")
    try:
        op = function(node.name)
        given: Any = pytree.tree_map(
            lambda one: _OF_A_MODEL[one] if isinstance(one, Of) else one, (node.args, node.kwargs)
        )
        policy.check(op, *given)
    except Refused as error:
        raise _NotAPlanError(f"a plan cannot have {error}") from None
    arguments = op._schema.arguments
    names = [one.name for one in arguments]
    positional = [one for one in arguments if not one.kwarg_only]
    _need(
        len(node.args) <= len(positional) and {*node.kwargs} <= {*names[len(node.args) :]},
        f"{node.name} is given other arguments",
    )
    given = {*names[: len(node.args)], *node.kwargs}
    _need(all(one.has_default_value() or one.name in given for one in arguments), f"{node.name} is given too little")
    _need(bool(node.refs), f"{node.name} is of no value")
    writes = any(one.alias_info is not None and one.alias_info.is_write for one in arguments)
    _need((node.gives == 0) == writes, f"{node.name} gives {node.gives} values")


def _check_constant(plan: Plan, node: Node) -> None:
    bare = not node.args and not node.kwargs and node.gives == 1 and not node.sizes and node.layer is None
    _need(bare and node.name in plan.constants, f"there is no constant {node.name!r:.40}")


def _check_weight(_: Plan, node: Node) -> None:
    bare = not node.args and not node.kwargs and node.gives == 1 and not node.sizes and node.layer is None
    _need(bare and bool(node.name), "a weight is a path")


def _check_chosen(_: Plan, node: Node) -> None:
    where = node.args[0] if len(node.args) == 1 else "?"
    each = where if isinstance(where, list) and where else [where]
    good = where is None or isinstance(where, slice) or all(type(one) is int and abs(one) < 2**31 for one in each)
    _need(
        bool(good) and not node.kwargs and node.gives == 1 and not node.name,
        "chosen is of one or several positions, or a slice",
    )


_CHECKS: dict[str, Callable[[Plan, Node], None]] = {
    "read": _check_point,
    "put": _check_point,
    "skip": _check_skip,
    "op": _check_op,
    "constant": _check_constant,
    "weight": _check_weight,
    "chosen": _check_chosen,
}


def _may_be_view(node: Node) -> bool:
    """Whether what a function gives may lie in the memory of what it is given."""
    return any(one.alias_info is not None for one in node.op._schema.returns) or "view" in node.name
