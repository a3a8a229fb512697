"""The standard names that take a layer: an accessor for each row of `nnatomy.names` that is of layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, overload

from torch.nn import Module

from nnatomy.errors import UsageError
from nnatomy.names import CROSS, NO_CROSS, OF_LAYERS, ROWS, Name
from nnatomy.standardized.accessors import LayerAccessor
from nnatomy.standardized.annotations import Annotations
from nnatomy.standardized.attention import AttentionMode
from nnatomy.standardized.mixers import Mixers
from nnatomy.standardized.parts import Parts
from nnatomy.standardized.shown import Sums
from nnatomy.standardized.tower import names_without_media
from nnatomy.tracing import ModuleView
from nnatomy.tracing.attach import Point

if TYPE_CHECKING:
    from typing import Self

    from nnatomy.words import How

#: The modules of one part of the layers, and for each layer that has none, why.
Places = tuple[Sequence[Module | None], Sequence[str]]


class Names(Annotations, Parts):
    """A model with its accessors."""

    if TYPE_CHECKING:  # what the entries of `Traceable` give here

        def session(self) -> AbstractContextManager[Self]: ...

        @overload
        def edit(self, edit: Callable[[], Any]) -> Self: ...

        @overload
        def edit(self, edit: None = None) -> AbstractContextManager[Self]: ...

        def edit(self, edit: Callable[[], Any] | None = None) -> Any: ...

        def without_edits(self) -> Self: ...

        def attach(  # type: ignore[override]
            self,
            point: str | ModuleView,
            module: Module,
            *,
            how: How = "replace",
            takes: str | ModuleView | None = None,
            name: str | None = None,
        ) -> Self: ...

    def __dir__(self) -> list[str]:
        """For completion: what the model has, without the names that it refuses on every layer."""
        return sorted({*super().__dir__()}.difference(self._absent_names(), {"from_pretrained"}))

    def _absent_names(self) -> set[str]:
        """The names that this model does not have."""
        absent = {name for name, one in vars(self).items() if isinstance(one, LayerAccessor) and not any(one.modules)}
        absent |= names_without_media(self.steps_of)
        return absent.union(self._refused, (name for name, one in vars(self.dimensions).items() if one is None))

    def _free_name(self, name: str | None, module: Module) -> str:
        if name in self._absent_names():
            raise UsageError(
                f"attach(..., name={name!r}): that is a standard name, which this model refuses: give another."
            )
        return super()._free_name(name, module)

    def _make_accessors(self) -> None:
        self._sums = Sums(self._anatomy, self._blocks, self.hidden_size, self._split)
        self._mixers = Mixers(self._anatomy, self._blocks, self._split is not None)
        self._attention = partial(AttentionMode, self.dimensions.num_heads, split=self._split)
        places = self._places()
        for name in (*OF_LAYERS, *CROSS):
            row = ROWS[name]
            inside = self._sums.accessors.get(name) or self._mixers.accessors.get(name)
            setattr(self, name, inside or self._accessor(row, *places[row.part]))
        for i, why in enumerate(self._anatomy.absent["input"]):
            if why:
                self.layers_input.refuse(i, why)

    def _places(self) -> dict[str, Places]:
        anatomy = self._anatomy
        idle = anatomy.absent["layer"]
        mixers = tuple(one[0] if len(one) == 1 else None for one in anatomy.mixers)
        unknown = (
            why if kind == "unknown" else ""
            for why, kind in zip(anatomy.absent["attention"], anatomy.kinds, strict=True)
        )
        several = tuple(
            f"it has several token mixers ({kinds})" if several else why or odd or "it mixes no tokens"
            for several, kinds, why, odd in zip(anatomy.mixers, anatomy.kinds, idle, unknown, strict=True)
        )
        crossing = anatomy.cross_attentions if any(anatomy.cross_attentions) else ()
        return {
            "layers": (
                [None if why else one for one, why in zip(anatomy.layers, idle, strict=True)],
                idle,
            ),
            "attentions": (anatomy.attentions, anatomy.absent["attention"]),
            "mlps": (anatomy.mlps, anatomy.absent["mlp"]),
            "mixers": (mixers, several),
            "cross_attentions": (crossing, ["it has no one cross-attention"] * len(crossing)),
        }

    def _accessor(self, row: Name, modules: Sequence[Module | None], absent: Sequence[str]) -> LayerAccessor:
        modules, absent = self._without_shared(modules, absent)
        none = NO_CROSS if row.part == "cross_attentions" else "the model has no layers"
        tap = self._attention if row.place == "attention" else None
        layers = self._anatomy.layers
        return LayerAccessor(row, modules, self._blocks, tap=tap, absent=absent, none=none, layers=layers)

    def _without_shared(self, modules: Sequence[Module | None], absent: Sequence[str]) -> Places:
        """Without the modules of several layers: no call of such a one is that of the layer."""
        shared = {one for one in modules if one is not None and modules.count(one) > 1}
        if not shared:
            return modules, absent
        paths = {module: path for path, module in self.module.named_modules() if module in shared}
        whys = [
            f"{paths[one]} is the module of layers {', '.join(str(i) for i, m in enumerate(modules) if m is one)}, called for "
            f"each: read its calls as {paths[one]}.calls[k]"
            if one in shared
            else why
            for one, why in zip(modules, absent, strict=True)
        ]
        return [None if one in shared else one for one in modules], whys

    @property
    def _points(self) -> str:  # type: ignore[override]
        names = [name for name, one in vars(self).items() if isinstance(one, LayerAccessor) and any(one.modules)]
        paths = {module: path for path, module in self.module.named_modules()}
        embedded = paths.get(self._anatomy.embed_tokens)
        hint = f"; token_embeddings are {f'{embedded}.output'!r}" if embedded else ""
        return (
            "give a name of layers with the layer, such as 'layers_output[3]', or a module's path and .input or .output, such as "
            f"'layers.3.output'{hint}. The names of layers are {', '.join(names)}"
        )

    def _point(self, point: str | ModuleView) -> Point:
        match = re.fullmatch(r"(\w+)\[(-?\d+)\]", point) if isinstance(point, str) else None
        accessor = getattr(self, match[1], None) if match else None
        if match is None or not isinstance(accessor, LayerAccessor):
            return super()._point(point)
        return accessor.point(int(match[2]))
