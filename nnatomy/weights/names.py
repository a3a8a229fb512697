"""The table of the names of weights: axes, and what they promise."""

from __future__ import annotations

from typing import Literal, NamedTuple

#: Which pass finds them.
Group = Literal["attention", "cross-attention", "mlp", "embedding", "unembedding"]


class WeightName(NamedTuple):
    """A name: its axes, and what is proved of it by value when it is first asked for.

    Attributes:
        name: as an attribute of the model; where it begins with `b_` it is the bias beside the matrix of that name.
        group: which weights are found together; those of ends are tensors, all others are by layer.
        role: of which projection.
        shape: its axes.
        doc: what it promises.
    """

    name: str
    group: Group
    role: str
    shape: str
    doc: str

    @property
    def by_layer(self) -> bool:
        """Whether there is one for each layer."""
        return self.group in ("attention", "cross-attention", "mlp")

    @property
    def is_bias(self) -> bool:
        """Whether it is a vector, zero where the projection has none."""
        return self.name.startswith("b_")


_BEHIND = "behind which are norms, clipping, rotary embedding and scale"
TABLE = (
    WeightName("W_E", "embedding", "E", "vocab hidden", "`W_E[input_ids]` is `token_embeddings`"),
    WeightName("W_Q", "attention", "Q", "head hidden head_dim", f"`attentions_input @ W_Q + b_Q`: queries, {_BEHIND}"),
    WeightName("W_K", "attention", "K", "kv_head hidden head_dim", f"`attentions_input @ W_K + b_K`: keys, {_BEHIND}"),
    WeightName(
        "W_V",
        "attention",
        "V",
        "kv_head hidden value_dim",
        "`attentions_input @ W_V + b_V`: values, behind which may be norms and clipping",
    ),
    WeightName(
        *("W_O", "attention", "O", "head value_dim hidden"),
        "`heads_output @ W_O`, summed over heads, `+ b_O`: what the output projection gives",
    ),
    WeightName("b_Q", "attention", "Q", "head head_dim", "see `W_Q`"),
    WeightName("b_K", "attention", "K", "kv_head head_dim", "see `W_K`"),
    WeightName("b_V", "attention", "V", "kv_head value_dim", "see `W_V`"),
    WeightName("b_O", "attention", "O", "hidden", "see `W_O`"),
    WeightName(
        *("W_cross_Q", "cross-attention", "Q", "head hidden head_dim"),
        "`cross_attentions_input @ W_cross_Q + b_cross_Q`: queries of its attention to an encoder, likewise",
    ),
    WeightName(
        *("W_cross_K", "cross-attention", "K", "kv_head encoder_hidden head_dim"),
        "what that attention is given of the encoder, `@ W_cross_K + b_cross_K`: its keys, likewise",
    ),
    WeightName(
        *("W_cross_V", "cross-attention", "V", "kv_head encoder_hidden value_dim"),
        "the same, `@ W_cross_V + b_cross_V`: its values, likewise",
    ),
    WeightName(
        *("W_cross_O", "cross-attention", "O", "head value_dim hidden"),
        "what its heads give, `@ W_cross_O`, summed over heads, `+ b_cross_O`: what its output projection gives",
    ),
    WeightName("b_cross_Q", "cross-attention", "Q", "head head_dim", "see `W_cross_Q`"),
    WeightName("b_cross_K", "cross-attention", "K", "kv_head head_dim", "see `W_cross_K`"),
    WeightName("b_cross_V", "cross-attention", "V", "kv_head value_dim", "see `W_cross_V`"),
    WeightName("b_cross_O", "cross-attention", "O", "hidden", "see `W_cross_O`"),
    WeightName(
        "W_in",
        "mlp",
        "in",
        "hidden neuron",
        "`mlps_input @ W_in + b_in`: what neurons are proportional to, or a function of, but for scales and norms of neurons "
        "(of a mixture of experts: by expert, expert first)",
    ),
    WeightName(
        "W_gate",
        "mlp",
        "gate",
        "hidden neuron",
        "`mlps_input @ W_gate + b_gate`: what the activation function is of, beside `W_in`, but for a scale of each neuron "
        "(of experts: by expert)",
    ),
    WeightName(
        "W_out",
        "mlp",
        "out",
        "neuron hidden",
        "`neurons @ W_out + b_out`: what the down projection gives, behind which may be a scale (of experts: by expert, "
        "before the router's weight)",
    ),
    WeightName("b_in", "mlp", "in", "neuron", "see `W_in`"),
    WeightName("b_gate", "mlp", "gate", "neuron", "see `W_gate`"),
    WeightName("b_out", "mlp", "out", "hidden", "see `W_out`"),
    WeightName(
        "W_U",
        "unembedding",
        "U",
        "hidden vocab",
        "`ln_final.output @ W_U + b_U` (with no norm there: what the last layer gives): logits before caps and scales",
    ),
    WeightName("b_U", "unembedding", "U", "vocab", "see `W_U`"),
)
ROWS = {row.name: row for row in TABLE}
