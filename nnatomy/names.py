"""The standard names: a table with one row for each, from which everything that knows a name is made.

From its row come an accessor on the model (`standardized.names`), with the annotation that editors and type checkers read
(`standardized/annotations.py`) and the name of an encoder-decoder's encoder; what validation checks of its shape and of what
follows from what; which axes hold positions and heads, for blocks of several prompts and for the methods; its rows in reports;
and its line in `docs/names.md`. `docs/extending.md` adds one.

Axis names, here and everywhere: `batch`, `seq` (positions of a prompt), `hidden` (the residual stream), `head`, `kv_head`
(heads of keys and values, which several heads may share), `query` and `key` (positions attending, and attended to: with a KV
cache all so far), `head_dim`, `value_dim`, `neuron`, `expert`, `choice` (of an expert, by a position), `layer`, `vocab`. Of recurrent
mixers: `ssm_head` (1 where the state has no heads), `channel` and `state` (rows and columns of the state, as the model has it),
`step`, `gate`, `scale`, `input` and `width` (of a convolution's window).

A name of a layer means **the one call** of its module in a forward pass (in a generation: in each step). Where a module is
called several times in a pass (in loops), or is the module of several layers (shared weights), no call is the layer's, and the
name is refused: each call is read under the model's own name, `model.path.to.module.calls[k].output`. Validation looks at a
short prompt; a module that works in pieces with a longer one (some positions, prompts or keys a call) is refused in that pass,
and so is one that is called again on all of them, as soon as the pass has come to that call. (Of a pass that is stopped before
that, nobody can tell.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

#: Where a value is: what a module is given or gives; inside a call of an attention (`standardized.attention` finds it), or of a
#: layer (`standardized.shown`), or of a recurrent mixer (`standardized.mixers`); or of the model as a whole (`standardized.values`).
Place = Literal["input", "output", "attention", "layer", "mixer", "model"]

#: What is said where a call has ended without the value.
UNREACHED: dict[Place, str] = {
    "attention": "A fused attention kernel never holds it: load the model with attn_implementation='sdpa' or 'eager'.",
    "layer": "It may have been computed before: ask for it before what comes later in the layer.",
    "mixer": "It is found in a call of the mixer that has not begun when it is asked for: ask for it before anything inside of the "
    "mixer. RWKV and RG-LRU keep states where the pass has use_cache=True. Time steps and gates are seen where the model's own code "
    "goes the way that was looked at, with a whole prompt; a fused kernel (of mamba_ssm, fla or causal_conv1d, or with "
    "use_kernels=True) never holds them.",
}
#: Why a model has none of the names of a cross-attention.
NO_CROSS = "no layer attends to an encoder"


@dataclass(frozen=True)
class Name:
    """A standard name.

    Attributes:
        name: as an attribute of the model.
        part: what of a layer it belongs to ("layers": to the layer itself), or "model".
        place: see `Place`.
        shape: its axes; of no axis, no tensor.
        doc: what it is, for `docs/names.md` and editors.
        refused: where a model or a layer does not have it, for `docs/names.md`.
        proved: what validation proves beside its shape, for `docs/names.md`.
        kind: the point of the module's call, where it is another than the name or the place say.
        integer: whether its entries are whole numbers.
        assignable: whether another tensor can be put in its place.
        shown_by: what has to be there for validation to prove it.
        product_of: the names of which it is the product, summed over the axes that it does not have.
        sums_to: the name that it is, summed over the axes which that does not have.
    """

    name: str
    part: str
    place: Place
    shape: str
    doc: str
    refused: str
    proved: str = ""
    kind: str = ""
    integer: bool = False
    assignable: bool = True
    shown_by: tuple[str, ...] = ()
    product_of: tuple[str, ...] = ()
    sums_to: str = ""

    def __post_init__(self) -> None:
        own = self.place if self.place in ("input", "output") else self.name
        object.__setattr__(self, "kind", self.kind or own)

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of its axes."""
        return tuple(self.shape.split())

    @property
    def seq(self) -> int | None:
        """The axis of positions; of queries', where there are two."""
        return self._first("seq", "query", "key")

    @property
    def head(self) -> int | None:
        """The axis of heads."""
        return self._first("head", "kv_head")

    @property
    def here(self) -> tuple[int, ...]:
        """The axes of this step's positions, from the end."""
        return tuple(i - len(self.axes) for i, axis in enumerate(self.axes) if axis in ("seq", "query"))

    @property
    def so_far(self) -> tuple[int, ...]:
        """The axes of the positions of this step and all before, from the end."""
        return tuple(i - len(self.axes) for i, axis in enumerate(self.axes) if axis == "key")

    @property
    def has_entries(self) -> bool:
        """Whether its last axis is of the entries of a vector, and not of positions."""
        return self.axes[-1] not in ("query", "key")

    @property
    def is_by_pairs(self) -> bool:
        """Whether it is one for each query and key."""
        return {"query", "key"} <= {*self.axes}

    @property
    def is_shared(self) -> bool:
        """Whether other modules may be given the same tensor (a parallel MLP, the residual addition)."""
        return self.place == "input" and self.part != "layers"

    @property
    def of_encoders(self) -> bool:
        """Whether an encoder-decoder has it of its encoder's layers, too, as `encoder_...`."""
        return self.place in ("input", "output", "attention") and self.part in (
            "layers",
            "attentions",
            "mlps",
        )

    def _first(self, *names: str) -> int | None:
        return next((self.axes.index(axis) for axis in names if axis in self.axes), None)


_STREAM = "batch seq hidden"
_PATTERN = "batch head query key"
_NO_ATTENTION = "the layer has no one attention"
_NO_PRODUCT = "the layer has no one attention, or its products do not show"
_NO_MLP = "no module is the MLP"
_NO_SUM = "the stream is normalised or scaled on its way through the layer"
_NO_EXPERTS = "the layer has no experts to choose from"
_INSIDE = "the module is in the layer"
_MOVES = "the module is in the layer, and has a matrix; writing it changes what the layer gives"
_STEPS = "run on one position after the other, the mixer gives and keeps what it does at once; "
_BEHIND = "writing it changes what comes behind it, and nothing else"
_ADDS_UP = "input and contributions are the output, also where some are taken out"

#: In the order of reports. What one call computes at one place comes in this order, too.
# fmt: off
TABLE = (
    Name("layers_input", "layers", "input", _STREAM,
         doc="the residual stream before the layer",
         refused="no module is the layer, or it is not run on text",
         proved="it is what the layer before gives, bit for bit"),
    Name("layers_output", "layers", "output", _STREAM,
         doc="the residual stream after the layer",
         refused="the layer is not run on text, or the next one is given something else",
         proved="it is what the next layer is given; put back as read, it leaves all behind it as it was"),
    Name("attentions_input", "attentions", "input", _STREAM,
         doc="what the attention module is given",
         refused=_NO_ATTENTION,
         proved=_INSIDE),
    Name("attentions_output", "attentions", "output", _STREAM,
         doc="what the attention module gives",
         refused=_NO_ATTENTION,
         proved=_MOVES),
    Name("mlps_input", "mlps", "input", _STREAM,
         doc="what the MLP module is given",
         refused=_NO_MLP,
         proved=_INSIDE),
    Name("mlps_output", "mlps", "output", _STREAM,
         doc="what the MLP module gives",
         refused=_NO_MLP,
         proved=_MOVES),
    Name("mixers_output", "mixers", "output", _STREAM,
         doc="what the token mixer of any kind gives: attention, mamba, convolution, ...",
         refused="the layer has several token mixers, or none",
         proved=_MOVES),
    Name("layers_mid", "layers", "layer", _STREAM,
         doc="the residual stream between token mixer (or cross-attention) and MLP",
         refused="token mixer and MLP read the same stream (a parallel block)",
         proved="it is the input and what the token mixer adds"),
    Name("attentions_contribution", "attentions", "layer", _STREAM,
         doc="what its attention adds to the stream, behind norms and multipliers",
         refused=_NO_SUM,
         proved=_ADDS_UP),
    Name("mixers_contribution", "mixers", "layer", _STREAM,
         doc="the same for all its token mixers; input + this + the MLP's = output",
         refused=_NO_SUM,
         proved=_ADDS_UP),
    Name("cross_attentions_contribution", "cross_attentions", "layer", _STREAM,
         doc="the same for its attention to an encoder: one more summand",
         refused=f"{NO_CROSS}; {_NO_SUM}",
         proved=_ADDS_UP),
    Name("mlps_contribution", "mlps", "layer", _STREAM,
         doc="the same for its MLP, whether or not one module is the MLP",
         refused=_NO_SUM,
         proved=_ADDS_UP),
    Name("queries", "attentions", "attention", "batch head query head_dim",
         doc="queries as the attention function gets them",
         refused=_NO_PRODUCT,
         proved="scores move as their products with keys do, when they are changed",
         shown_by=("attention_scores", "attention_probabilities")),
    Name("keys", "attentions", "attention", "batch kv_head key head_dim",
         doc="keys as the attention function gets them",
         refused=_NO_PRODUCT,
         proved="scores move as their products with queries do, when they are changed",
         shown_by=("attention_scores", "attention_probabilities")),
    Name("values", "attentions", "attention", "batch kv_head key value_dim",
         doc="values as the attention function gets them",
         refused=_NO_PRODUCT,
         proved="the pattern's sums of them are what the heads give, also when they are changed",
         shown_by=("attention_probabilities", "heads_output")),
    Name("attention_scores", "attentions", "attention", _PATTERN,
         doc="what goes into the softmax",
         refused=_NO_PRODUCT,
         proved="their softmax is the pattern (a part of it, with attention sinks)",
         shown_by=("attention_probabilities",)),
    Name("attention_probabilities", "attentions", "attention", _PATTERN,
         doc="what multiplies the values",
         refused=_NO_PRODUCT,
         proved="rows are distributions over what the query may see; writing it changes the attention's output"),
    Name("values_weighted", "attentions", "attention", "batch head query key value_dim",
         doc="the values times the pattern, before the sum over keys",
         refused=_NO_PRODUCT,
         proved="its sum over keys is what the heads give, also when it is written",
         shown_by=("attention_probabilities", "values", "heads_output"),
         product_of=("attention_probabilities", "values"),
         sums_to="heads_output"),
    Name("heads_output", "attentions", "attention", "batch seq head value_dim",
         doc="what each head gives, before gates and output projection",
         refused=_NO_PRODUCT,
         proved="it is the pattern's sums of the values; writing it changes the attention's output",
         shown_by=("attention_probabilities", "values"),
         product_of=("attention_probabilities", "values")),
    Name("time_steps", "mixers", "mixer", "batch seq step",
         doc="how far a recurrent mixer goes on at each position: what a softplus gives",
         refused="no softplus gives them, or a fused kernel hides it",
         proved="writing one changes what the mixer gives there and behind, and nothing else"),
    Name("mixer_gates", "mixers", "mixer", "batch seq gate",
         doc="what multiplies a recurrent mixer's values before its output projection",
         refused="no two values by position are multiplied there, or a fused kernel hides it",
         proved="writing one changes what the mixer gives there, and nothing else"),
    Name("conv_states", "mixers", "mixer", "batch seq input width",
         doc="the newest inputs of a mixer's convolution (or token shift) after each position",
         refused="the mixer keeps none from one position to the next",
         proved=_STEPS + "it moves by one a position"),
    Name("ssm_states", "mixers", "mixer", "batch seq ssm_head channel state",
         doc="the state of a recurrent mixer after each position, as its cache has it",
         refused="the mixer keeps none from one position to the next",
         proved=_STEPS + _BEHIND),
    Name("ssm_normalizers", "mixers", "mixer", "batch seq ssm_head channel",
         doc="what a state is divided by when it is read: the sum of its weights",
         refused="the state is not divided by anything",
         proved="nothing changes where state and normalizer are divided by e and the stabilizer is 1 more"),
    Name("ssm_stabilizers", "mixers", "mixer", "batch seq ssm_head scale",
         doc="the logarithm of what a state and its normalizer are to be multiplied with",
         refused="the state is not divided by anything",
         proved="as for the normalizers"),
    Name("routers_logits", "routers", "layer", "batch seq expert",
         doc="of a mixture of experts, before softmax or sigmoid",
         refused=_NO_EXPERTS,
         proved="the expert whose logit is made the largest is chosen"),
    Name("routers_experts", "routers", "layer", "batch seq choice",
         doc="the indices of the experts chosen",
         refused=_NO_EXPERTS,
         proved="they are different ones; others change what the MLP gives there, and nowhere else",
         integer=True),
    Name("routers_weights", "routers", "layer", "batch seq choice",
         doc="what multiplies the output of each expert chosen",
         refused=_NO_EXPERTS,
         proved="none is below 0; others change what the MLP gives there, and nowhere else"),
    Name("neurons", "mlps", "layer", "batch seq neuron",
         doc="what the MLP's down projection reads",
         refused="the layer has no MLP, or a mixture of experts, each with neurons of its own",
         proved="all that the MLP gives comes of them, by the columns of the down projection"),
    Name("cross_attentions_input", "cross_attentions", "input", _STREAM,
         doc="what the attention to an encoder is given",
         refused=NO_CROSS,
         proved=_INSIDE),
    Name("cross_attentions_output", "cross_attentions", "output", _STREAM,
         doc="what the attention to an encoder gives",
         refused=NO_CROSS,
         proved="writing it changes what comes behind it"),
    Name("cross_attention_probabilities", "cross_attentions", "attention", _PATTERN,
         doc="what it attends to: keys are the encoder's positions",
         refused=NO_CROSS,
         proved="rows are distributions; writing it changes the module's output",
         kind="attention_probabilities"),
    Name("input_ids", "model", "model", "batch seq",
         doc="the token ids of the prompts, padded on the left (of the newest tokens, in a later step)",
         refused="the model is called without them",
         proved="the embedding is given them",
         integer=True, assignable=False),
    Name("attention_mask", "model", "model", "batch seq",
         doc="1 for the prompts' tokens, 0 for padding; in a later step of a generation those of the earlier ones too",
         refused="the model is called without one",
         integer=True, assignable=False),
    Name("input_size", "model", "model", "",
         doc="(batch, seq)",
         refused="the model is called without `input_ids`",
         assignable=False),
    Name("token_embeddings", "model", "model", _STREAM,
         doc="what the token embedding gives, before positions",
         refused="the model reads no tokens",
         proved="the embedding is called once, with the tokens' ids"),
    Name("logits", "model", "model", "batch seq vocab",
         doc="the model's logits, after all caps and scales",
         refused="the model has no head",
         proved="`project_on_vocab(layers_output[-1])` is equal to them"),
    Name("next_token_probs", "model", "model", "batch vocab",
         doc="the probabilities of the token after each prompt",
         refused="the model has no head",
         assignable=False),
)
# fmt: on
ROWS = {row.name: row for row in TABLE}


def row_of(name: str) -> Name:
    """The row of a name, also of an encoder's."""
    return ROWS[name.removeprefix("encoder_")]


def _all(*places: Place, cross: bool = False) -> tuple[str, ...]:
    """The names with these places, of what every model may have or (`cross`) of attentions to an encoder."""
    return tuple(row.name for row in TABLE if row.place in places and (row.part == "cross_attentions") == cross)


#: What modules are given and give; the inside of attentions; all names of layers. Then those of attentions to an encoder.
MODULES, INTERNALS = _all("input", "output"), _all("attention")
OF_LAYERS = _all("input", "output", "attention", "layer", "mixer")
#: The inside of recurrent mixers; what they keep from one position to the next.
OF_MIXERS = TIME_STEPS, GATES, CONV_STATES, SSM_STATES, *_NORMAL = _all("mixer")
STATES = CONV_STATES, SSM_STATES, *_NORMAL
CROSS_MODULES = _all("input", "output", cross=True)
CROSS = _all("input", "output", "attention", "layer", cross=True)

#: What a layer adds to the stream, and the stream between; and the routing of a mixture of experts.
SUMS = MID, ATTENTIONS, MIXERS, CROSS_ATTENTIONS, MLPS = (
    *("layers_mid", "attentions_contribution", "mixers_contribution", "cross_attentions_contribution"),
    "mlps_contribution",
)
ROUTERS = LOGITS, EXPERTS, WEIGHTS = "routers_logits", "routers_experts", "routers_weights"
NEURONS = "neurons"


def equation(operands: Iterable[str], result: str) -> str:
    """The product of names that gives another, for `torch.einsum`: what axes are called says what is summed.

    Keys and values are to be given for each head, and `seq` is the queries' positions.

    Example:
        >>> equation(["attention_probabilities", "values"], "heads_output")
        'abcd,abde->acbe'
    """
    letters: dict[str, str] = {}

    def lettered(name: str) -> str:
        axes = ROWS[name].shape.replace("kv_head", "head").replace("seq", "query").split()
        return "".join(letters.setdefault(axis, chr(ord("a") + len(letters))) for axis in axes)

    return f"{','.join(map(lettered, [*operands]))}->{lettered(result)}"
