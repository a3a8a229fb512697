"""The standard names that have a value on each layer."""

from __future__ import annotations

#: What a module is given or gives.
MODULES = (
    "layers_input",
    "layers_output",
    "attentions_input",
    "attentions_output",
    "mlps_input",
    "mlps_output",
    "mixers_output",
)
#: What is added to the stream, and the stream between.
SUMS = ("layers_mid", "attentions_contribution", "mlps_contribution", "mixers_contribution")
#: The inside of an attention, in the order in which one call has it.
INTERNALS = ("queries", "keys", "values", "attention_scores", "attention_probabilities", "heads_output")
ROUTERS = ("routers_logits", "routers_experts", "routers_weights")
#: Of the layers of a decoder that attend to an encoder; in the report where there is one.
CROSS = (
    "cross_attentions_input",
    "cross_attentions_output",
    "cross_attention_probabilities",
    "cross_attentions_contribution",
)
NAMES = (*MODULES, *SUMS, *INTERNALS, "neurons", *ROUTERS)
