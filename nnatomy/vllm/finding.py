"""Where the standard names are on a model's layers: of each name the places that it may be at, the likeliest first.

Which of them it is, if any, values decide: those of the same model in Transformers (`compared`), or the stream's algebra (`algebra`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.nn import Module

from nnatomy.names import ATTENTIONS, MID, MIXERS, MLPS, NEURONS, ROUTERS
from nnatomy.vllm.anatomy import AS_A_FUNCTION, Anatomy, Layer, has_matrix
from nnatomy.vllm.attention import KeysPlace, PatternPlace
from nnatomy.vllm.places import HeadsPlace, Place, StreamPlace
from nnatomy.vllm.recording import Found, Recorder
from nnatomy.vllm.split import SplitPlace, ranks


@dataclass
class Options:
    """The places that a name may be at on one layer.

    Attributes:
        why: why there is none, where there is none.
    """

    places: list[Place] = field(default_factory=list)
    why: str = ""

    @property
    def first(self) -> Place | str:
        """The likeliest, or why there is none."""
        return self.places[0] if self.places else self.why


_NO_STREAM = "nothing at the module's call is of (tokens, hidden)"
_NO_SUM = "no value in the layer is it"
#: Why the stream between attention and MLP is only read where both are added in the layer's own forward.
_ADDED_INSIDE = (
    "the layer adds attention and MLP to it in its own forward, and what is read is what its norm is given. Write "
    "attentions_contribution, or layers_output"
)
_CHOSEN_INSIDE = (
    "the engine's kernel of a mixture of experts chooses them, where nothing is seen; routers_logits are there"
)


def options(anatomy: Anatomy, recorder: Recorder, width: int, shared_heads: int) -> dict[str, list[Options]]:
    """By name those of each layer."""
    found: dict[str, list[Options]] = {}
    for layer in anatomy.layers:
        for name, one in _Finder(layer, recorder, width, shared_heads).all().items():
            found.setdefault(name, []).append(one)
    return found


def place_of(module: Module, kind: str, *found: Found, only_read: str = "", summand: bool = False) -> StreamPlace:
    """Where the sum of those tensors is."""
    return StreamPlace(module, kind, only_read, tuple(one.path for one in found), found[0].in_batch, summand)


def _looks_elsewhere(inner: Module) -> str:
    """Why there is no pattern of an attention that is one of the engine's special ones; "" for others."""
    from vllm.model_executor.layers.attention.attention import Attention

    if not isinstance(inner, Attention) or type(inner) is Attention:
        return ""
    return (
        f"the engine's {type(inner).__name__} looks at positions by a rule of its own (chunks, a prefix), which is not known here; "
        "heads_output is there"
    )


class _Finder:
    """The places on one layer."""

    def __init__(self, layer: Layer, recorder: Recorder, width: int, shared_heads: int) -> None:
        self.layer, self.recorder, self.width = layer, recorder, width
        self.shared_heads = shared_heads  #: of keys and values, in all processes

    def all(self) -> dict[str, Options]:
        """By name."""
        layer = self.layer
        no_attention, no_mlp = layer.why.get("attention", ""), layer.why.get("mlp", "")
        attention = self._part(layer.attention, "output", no_attention)
        mlp = self._part(layer.mlp, "output", no_mlp)
        return {
            "layers_input": self._stream(layer.module, "input"),
            "layers_output": self._stream(layer.module, "output"),
            "attentions_input": self._part(layer.attention, "input", no_attention),
            "attentions_output": attention,
            "mlps_input": self._part(layer.mlp, "input", no_mlp),
            "mlps_output": mlp,
            "mixers_output": attention,
            **self._sums(attention, mlp),
            **self._inside(),
            **self._routing(),
            NEURONS: self._neurons(),
        }

    def _stream(self, module: Module, kind: str) -> Options:
        """The pair that a module is given or gives, or one of the two."""
        found = self.recorder.streams(module, kind, self.width)[:2]
        pair = [place_of(module, kind, *found)] if len(found) > 1 else []
        return Options([*pair, *(place_of(module, kind, one) for one in found)], _NO_STREAM)

    def _part(self, module: Module | None, kind: str, why: str) -> Options:
        """Of the module that is known; or, where the engine's own classes tell nothing, of any that it may be."""
        if module is not None:
            return self._stream(module, kind)
        if self.layer.inner is not None:
            return Options(why=why)
        parts = [one for one in self.layer.module.children() if one in self.recorder.calls and has_matrix(one)]
        return Options([place for one in parts for place in self._stream(one, kind).places], why or _NO_STREAM)

    def _sums(self, attention: Options, mlp: Options) -> dict[str, Options]:
        """What the layer adds to the stream, and the stream between."""
        streams = self.recorder.streams
        behind = self._behind()
        given = [(one, streams(one, "input", self.width)) for one in behind]
        normed = [
            place_of(one, "output", *found) for one in behind if len(found := streams(one, "output", self.width)) == 1
        ]
        mid: list[Place] = []
        added: list[Place] = []
        for one, found in given:  # the norm that adds the attention's to the stream: (what is added, the stream)
            if len(found) == 2:
                mid, added = [place_of(one, "input", *found)], [place_of(one, "input", found[0], summand=True)]
                break
        else:
            mid = [place_of(one, "input", *found, only_read=_ADDED_INSIDE) for one, found in given if len(found) == 1]
        output = streams(self.layer.module, "output", self.width)
        rest: list[Place] = [place_of(self.layer.module, "output", output[0], summand=True)] if len(output) == 2 else []
        contribution = Options([*added, *attention.places, *normed], _NO_SUM)
        return {
            MID: Options(mid, _NO_SUM),
            ATTENTIONS: contribution,
            MIXERS: contribution,
            MLPS: Options([*rest, *mlp.places, *reversed(normed)], _NO_SUM),
        }

    def _behind(self) -> list[Module]:
        """The modules directly in the layer that are called behind its attention (all, where nobody knows it), in their order."""
        order, attention = self.recorder.order, self.layer.attention
        children = set(self.layer.module.children())
        start = order.index(attention) + 1 if attention in self.recorder.calls else 0
        return [one for one in order[start:] if one in children]

    def _inside(self) -> dict[str, Options]:
        """Queries, keys, values and what the engine's attention makes of them."""
        inner = self.layer.inner
        names = ("queries", "keys", "values", "heads_output")
        patterns = ("attention_scores", "attention_probabilities", "values_weighted")
        why = self.layer.why.get("attention") or self.layer.why.get("inner")
        if not why and inner not in self.recorder.calls:
            why = AS_A_FUNCTION
        if why:
            return dict.fromkeys((*names, *patterns), Options(why=why))
        heads, shared, size, of_values = inner.num_heads, inner.num_kv_heads, inner.head_size, inner.head_size_v
        found: dict[str, Place] = {
            "queries": HeadsPlace(inner, "input", path=(0, 0), heads=heads, size=size),
            "keys": KeysPlace(inner, "input", path=(0, 1), heads=shared, size=size),
            "values": KeysPlace(inner, "input", path=(0, 2), heads=shared, size=of_values, which=1),
            **{name: PatternPlace(inner, "input", what=name) for name in patterns},
            "heads_output": HeadsPlace(inner, "output", heads=heads, size=of_values, positions_first=True),
        }
        own: dict[str, Options] = {}
        if other := _looks_elsewhere(inner):
            own = {name: Options(why=other) for name in ("keys", "values", *patterns)}
        if ranks() == 1:
            return {name: Options([place]) for name, place in found.items()} | own
        split = {}
        for name, place in found.items():
            copies = max(1, ranks() // self.shared_heads) if name in ("keys", "values") else 1
            split[name] = Options([SplitPlace.of(place, 2 if name == "heads_output" else 1, copies)])
        return split | own

    def _routing(self) -> dict[str, Options]:
        logits, *others = ROUTERS
        if self.layer.experts is None or self.layer.mlp is None:
            return dict.fromkeys(ROUTERS, Options(why="it has no experts to choose from"))
        maps = self._maps({*self.layer.mlp.modules()} - {self.layer.mlp})
        found = [place_of(one, "output", each) for one in maps for each in self.recorder.points[one, "output"]]
        return {logits: Options([*found], "no module gives them"), **dict.fromkeys(others, Options(why=_CHOSEN_INSIDE))}

    def _neurons(self) -> Options:
        """What one of the layer's linear maps behind the attention is given."""
        own = set() if self.layer.attention is None else {*self.layer.attention.modules()}
        maps = self._maps({*self.layer.module.modules()} - own)
        found = [
            place_of(one, "input", each) for one in reversed(maps) for each in self.recorder.points[one, "input"][:1]
        ]
        split = [SplitPlace.of(one, -1) for one in found] if ranks() > 1 else []
        return Options([*found, *split], "no linear map of the layer is called")

    def _maps(self, modules: set[Module]) -> Sequence[Module]:
        """The engine's linear maps among them, in the order of their calls."""
        return [one for one in self.recorder.order if one in modules and has_matrix(one) and not list(one.children())]
