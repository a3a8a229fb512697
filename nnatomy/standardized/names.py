"""The standard names that take a layer: an accessor for each."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch.nn import Module

from nnatomy.core import ModuleView
from nnatomy.core.attach import Point
from nnatomy.standardized.accessors import LayerAccessor
from nnatomy.standardized.attention import AttentionMode
from nnatomy.standardized.contributions import ATTENTIONS, CROSS, MID, MIXERS, MLPS
from nnatomy.standardized.neurons import NEURONS
from nnatomy.standardized.parts import Parts
from nnatomy.standardized.routers import EXPERTS, LOGITS, WEIGHTS
from nnatomy.standardized.shown import NO_CROSS, Sums


class Names(Parts):
    """A model with its accessors."""

    #: Of an encoder-decoder's encoder; the plain names are the decoder's.
    encoder_layers_input: LayerAccessor
    encoder_layers_output: LayerAccessor
    encoder_attentions_input: LayerAccessor
    encoder_attentions_output: LayerAccessor
    encoder_mlps_input: LayerAccessor
    encoder_mlps_output: LayerAccessor
    encoder_queries: LayerAccessor
    encoder_keys: LayerAccessor
    encoder_values: LayerAccessor
    encoder_attention_scores: LayerAccessor
    encoder_attention_probabilities: LayerAccessor
    encoder_heads_output: LayerAccessor

    def _make_accessors(self) -> None:
        anatomy, blocks = self._anatomy, self._blocks
        parts: dict[str, tuple[Module | None, ...]]
        idle = anatomy.absent["layer"]
        ran = tuple(None if why else layer for layer, why in zip(anatomy.layers, idle, strict=True))
        parts = {"layers": ran, "attentions": anatomy.attentions, "mlps": anatomy.mlps}
        absent = {"layers": idle, "attentions": anatomy.absent["attention"], "mlps": anatomy.absent["mlp"]}

        def accessor(part: str, side: str) -> LayerAccessor:
            return LayerAccessor(f"{part}_{side}", parts[part], blocks, side, absent=absent.get(part, ()))

        parts["mixers"] = tuple(one[0] if len(one) == 1 else None for one in anatomy.mixers)
        absent["mixers"] = tuple(
            f"it has several token mixers ({kinds})" if several else why or "it mixes no tokens"
            for several, kinds, why in zip(anatomy.mixers, anatomy.kinds, idle, strict=True)
        )
        self.layers_input = accessor("layers", "input")
        for i, why in enumerate(anatomy.absent["input"]):
            if why:
                self.layers_input.refuse(i, why)
        self.layers_output = accessor("layers", "output")
        self.attentions_input = accessor("attentions", "input")
        self.attentions_output = accessor("attentions", "output")
        self.mlps_input = accessor("mlps", "input")
        self.mlps_output = accessor("mlps", "output")
        self.mixers_output = accessor("mixers", "output")
        self._sums = Sums(anatomy, blocks, self.hidden_size)
        self.layers_mid = self._sums.accessors[MID]
        self.attentions_contribution = self._sums.accessors[ATTENTIONS]
        self.mixers_contribution = self._sums.accessors[MIXERS]
        self.cross_attentions_contribution = self._sums.accessors[CROSS]
        self.mlps_contribution = self._sums.accessors[MLPS]
        self.neurons = self._sums.accessors[NEURONS]
        self.routers_logits = self._sums.accessors[LOGITS]
        self.routers_weights = self._sums.accessors[WEIGHTS]
        self.routers_experts = self._sums.accessors[EXPERTS]
        tap = partial(AttentionMode, self.dimensions.num_heads)

        def inside(name: str, kind: str = "", **places: Any) -> LayerAccessor:
            return LayerAccessor(
                name,
                blocks=blocks,
                kind=kind or name,
                get=lambda value: value,
                put=lambda _, new: new,
                tap=tap,
                **(places or {"modules": anatomy.attentions, "absent": absent["attentions"]}),
                unreached="A fused attention kernel never holds it: load the model with "
                "attn_implementation='sdpa' or 'eager'.",
            )

        self.queries = inside("queries")
        self.keys = inside("keys")
        self.values = inside("values")
        self.attention_scores = inside("attention_scores")
        self.attention_probabilities = inside("attention_probabilities")
        self.heads_output = inside("heads_output")
        crossing = anatomy.cross_attentions if any(anatomy.cross_attentions) else ()
        places: dict[str, Any] = {
            "modules": crossing,
            "absent": ("it has no one cross-attention",) * len(crossing),
            "none": NO_CROSS,
        }
        self.cross_attentions_input, self.cross_attentions_output = (
            LayerAccessor(f"cross_attentions_{side}", blocks=blocks, kind=side, **places)
            for side in ("input", "output")
        )
        self.cross_attention_probabilities = inside(
            "cross_attention_probabilities", "attention_probabilities", **places
        )

    def _point(self, point: str | ModuleView) -> Point:
        match = re.fullmatch(r"(\w+)\[(-?\d+)\]", point) if isinstance(point, str) else None
        accessor = getattr(self, match[1], None) if match else None
        if match is None or not isinstance(accessor, LayerAccessor):
            return super()._point(point)
        return accessor.point(int(match[2]))
