"""The standard names as attributes, for editors and type checkers: `python tests/names_written.py` writes this file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from nnatomy.standardized.accessors import LayerAccessor

if TYPE_CHECKING:
    #: A standard name of layers. (At run time a text: who is given one that there is not says which there are.)
    PointName = Literal[
        "layers_input",
        "layers_output",
        "attentions_input",
        "attentions_output",
        "mlps_input",
        "mlps_output",
        "mixers_output",
        "layers_mid",
        "attentions_contribution",
        "mixers_contribution",
        "cross_attentions_contribution",
        "mlps_contribution",
        "queries",
        "keys",
        "values",
        "attention_scores",
        "attention_probabilities",
        "values_weighted",
        "heads_output",
        "time_steps",
        "mixer_gates",
        "conv_states",
        "ssm_states",
        "ssm_normalizers",
        "ssm_stabilizers",
        "routers_logits",
        "routers_experts",
        "routers_weights",
        "neurons",
        "cross_attentions_input",
        "cross_attentions_output",
        "cross_attention_probabilities",
        "encoder_layers_input",
        "encoder_layers_output",
        "encoder_attentions_input",
        "encoder_attentions_output",
        "encoder_mlps_input",
        "encoder_mlps_output",
        "encoder_queries",
        "encoder_keys",
        "encoder_values",
        "encoder_attention_scores",
        "encoder_attention_probabilities",
        "encoder_values_weighted",
        "encoder_heads_output",
    ]
else:
    PointName = str


class Annotations:
    """A model's accessors, as `nnatomy.names` has them."""

    layers_input: LayerAccessor
    """(batch, seq, hidden): the residual stream before the layer"""
    layers_output: LayerAccessor
    """(batch, seq, hidden): the residual stream after the layer"""
    attentions_input: LayerAccessor
    """(batch, seq, hidden): what the attention module is given"""
    attentions_output: LayerAccessor
    """(batch, seq, hidden): what the attention module gives"""
    mlps_input: LayerAccessor
    """(batch, seq, hidden): what the MLP module is given"""
    mlps_output: LayerAccessor
    """(batch, seq, hidden): what the MLP module gives"""
    mixers_output: LayerAccessor
    """(batch, seq, hidden): what the token mixer of any kind gives: attention, mamba, convolution, ..."""
    layers_mid: LayerAccessor
    """(batch, seq, hidden): the residual stream between token mixer (or cross-attention) and MLP"""
    attentions_contribution: LayerAccessor
    """(batch, seq, hidden): what its attention adds to the stream, behind norms and multipliers"""
    mixers_contribution: LayerAccessor
    """(batch, seq, hidden): the same for all its token mixers; input + this + the MLP's = output"""
    cross_attentions_contribution: LayerAccessor
    """(batch, seq, hidden): the same for its attention to an encoder: one more summand"""
    mlps_contribution: LayerAccessor
    """(batch, seq, hidden): the same for its MLP, whether or not one module is the MLP"""
    queries: LayerAccessor
    """(batch, head, query, head_dim): queries as the attention function gets them"""
    keys: LayerAccessor
    """(batch, kv_head, key, head_dim): keys as the attention function gets them"""
    values: LayerAccessor
    """(batch, kv_head, key, value_dim): values as the attention function gets them"""
    attention_scores: LayerAccessor
    """(batch, head, query, key): what goes into the softmax"""
    attention_probabilities: LayerAccessor
    """(batch, head, query, key): what multiplies the values"""
    values_weighted: LayerAccessor
    """(batch, head, query, key, value_dim): the values times the pattern, before the sum over keys"""
    heads_output: LayerAccessor
    """(batch, seq, head, value_dim): what each head gives, before gates and output projection"""
    time_steps: LayerAccessor
    """(batch, seq, step): how far a recurrent mixer goes on at each position: what a softplus gives"""
    mixer_gates: LayerAccessor
    """(batch, seq, gate): what multiplies a recurrent mixer's values before its output projection"""
    conv_states: LayerAccessor
    """(batch, seq, input, width): the newest inputs of a mixer's convolution (or token shift) after each position"""
    ssm_states: LayerAccessor
    """(batch, seq, ssm_head, channel, state): the state of a recurrent mixer after each position, as its cache has it"""
    ssm_normalizers: LayerAccessor
    """(batch, seq, ssm_head, channel): what a state is divided by when it is read: the sum of its weights"""
    ssm_stabilizers: LayerAccessor
    """(batch, seq, ssm_head, scale): the logarithm of what a state and its normalizer are to be multiplied with"""
    routers_logits: LayerAccessor
    """(batch, seq, expert): of a mixture of experts, before softmax or sigmoid"""
    routers_experts: LayerAccessor
    """(batch, seq, choice): the indices of the experts chosen"""
    routers_weights: LayerAccessor
    """(batch, seq, choice): what multiplies the output of each expert chosen"""
    neurons: LayerAccessor
    """(batch, seq, neuron): what the MLP's down projection reads"""
    cross_attentions_input: LayerAccessor
    """(batch, seq, hidden): what the attention to an encoder is given"""
    cross_attentions_output: LayerAccessor
    """(batch, seq, hidden): what the attention to an encoder gives"""
    cross_attention_probabilities: LayerAccessor
    """(batch, head, query, key): what it attends to: keys are the encoder's positions"""
    encoder_layers_input: LayerAccessor
    """`layers_input` of an encoder-decoder's encoder"""
    encoder_layers_output: LayerAccessor
    """`layers_output` of an encoder-decoder's encoder"""
    encoder_attentions_input: LayerAccessor
    """`attentions_input` of an encoder-decoder's encoder"""
    encoder_attentions_output: LayerAccessor
    """`attentions_output` of an encoder-decoder's encoder"""
    encoder_mlps_input: LayerAccessor
    """`mlps_input` of an encoder-decoder's encoder"""
    encoder_mlps_output: LayerAccessor
    """`mlps_output` of an encoder-decoder's encoder"""
    encoder_queries: LayerAccessor
    """`queries` of an encoder-decoder's encoder"""
    encoder_keys: LayerAccessor
    """`keys` of an encoder-decoder's encoder"""
    encoder_values: LayerAccessor
    """`values` of an encoder-decoder's encoder"""
    encoder_attention_scores: LayerAccessor
    """`attention_scores` of an encoder-decoder's encoder"""
    encoder_attention_probabilities: LayerAccessor
    """`attention_probabilities` of an encoder-decoder's encoder"""
    encoder_values_weighted: LayerAccessor
    """`values_weighted` of an encoder-decoder's encoder"""
    encoder_heads_output: LayerAccessor
    """`heads_output` of an encoder-decoder's encoder"""
