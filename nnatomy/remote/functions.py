"""What is known of each function of PyTorch's: its name for the server, what it writes to, and the shape of its result."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from nnatomy.remote.shapes import Shapes

_shapes = Shapes(20_000)


def leaves(args: Any, kwargs: Any) -> list[Any]:
    """The arguments, and what is in lists of them."""
    found: list[Any] = []
    for one in (*args, *kwargs.values()):
        found.extend(one) if isinstance(one, (list, tuple)) else found.append(one)
    return found


class Function:
    """One overload.

    Attributes:
        base, overload, name: `add`, `Tensor`, `aten.add.Tensor`.
        is_view: its result shares memory with its argument.
        gives_values: no tensor.
        draws: random numbers.
        changes_shape: of its argument, in place.
    """

    def __init__(self, op: Any) -> None:
        schema = op._schema
        space, _, self.base = schema.name.partition("::")
        self.op = op
        self.overload = schema.overload_name or "default"
        self.is_aten = space == "aten"
        self.name = f"{space}.{self.base}.{self.overload}"
        self._writes = [
            (i, one.name)
            for i, one in enumerate(schema.arguments)
            if one.alias_info is not None and one.alias_info.is_write
        ]
        self.is_view = not self._writes and any(one.alias_info is not None for one in schema.returns)
        self.gives_values = not any("Tensor" in str(one.type) for one in schema.returns)
        self.draws = torch.Tag.nondeterministic_seeded in op.tags
        self.changes_shape = torch.Tag.inplace_view in op.tags
        self._outs = [one.name for one in schema.arguments if one.is_out]

    @staticmethod
    @lru_cache(4096)
    def of(op: Any) -> Function:
        return Function(op)

    @property
    def without_out(self) -> Any:
        """The overload that returns what this one writes to `out=`; None if it is no such one."""
        packet = getattr(torch.ops.aten, self.base)
        own = [(one.name, str(one.type)) for one in self.op._schema.arguments if not one.is_out]
        others = (getattr(packet, name) for name in packet.overloads()) if self._outs else ()
        return next((one for one in others if [(x.name, str(x.type)) for x in one._schema.arguments] == own), None)

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The tensors that it writes to."""
        found: list[Any] = []
        for i, name in self._writes:
            one = args[i] if i < len(args) else kwargs.get(name)
            found += one if isinstance(one, (list, tuple)) else [] if one is None else [one]
        return found

    def is_sure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Attention without dropout draws nothing, whatever its tag says."""
        if "attention" not in self.base:
            return False
        names = [one.name for one in self.op._schema.arguments]
        place = names.index("dropout_p") if "dropout_p" in names else -1
        return not (args[place] if 0 <= place < len(args) else kwargs.get("dropout_p", 0.0))

    def shaped(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What it gives, on tensors without elements; None if that depends on elements."""
        try:
            return _shapes.of(self.op, args, kwargs)
        except NotImplementedError:
            return None
        except RuntimeError as error:
            if "nonzero" in str(error) or "meta" in str(error).lower():
                return None
            raise
