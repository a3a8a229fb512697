"""The standard names of a diffusion pipeline: a table with one row for each.

Axis names: `batch` (the pictures; where guidance is computed in one batch, both halves of each), `channel`, `height`, `width`,
`token` (positions of a block's stream: of the picture, of the text, or of both), `hidden`, `head`, `query`, `key`, `head_dim`,
`part` (of a modulation: shifts, scales, gates).

A name means one step of the denoising (`tracer.iter`), and outside of a loop over steps the first. `layers` are the transformer
blocks of the denoiser in the order in which it calls them; of a U-Net those of all its resolutions.
"""

from __future__ import annotations

from nnatomy.names import Name

_PATTERN = "batch head query key"
_TOKENS = "batch token hidden"
_TWO = "the block has two streams: image_layers_{0} and text_layers_{0}"
_ONE = "the block has one stream"
_NO_ATTENTION = "the block has no one attention, or its products do not show"
_NO_CROSS = "no attention of the block is to the text alone"
_NO_MODULATION = "the block is not modulated, or it does not show"
_BACK = "put back as read, the block gives the same, bit for bit; zeros change what it gives"
_SOFTMAX = "the pattern is the softmax of the products of queries and keys"
_SUM = "the pattern's sums of the values are what the heads give"

# fmt: off
TABLE = (
    Name("steps", "model", "model", "",
         doc="how many steps the generation takes; it waits for nothing",
         refused="", assignable=False,
         proved="as many calls of the scheduler's step are made"),
    Name("latents", "model", "model", "batch channel height width",
         doc="the noisy latents that the step begins with; as the pipeline has them (Flux packs them: batch token channel)",
         refused="the pipeline draws those of the first step inside its `__call__`",
         proved="the scheduler is given them as its sample; put back as read, all steps stay the same, and zeros change them"),
    Name("timestep", "model", "model", "batch",
         doc="the timestep as the denoiser is given it",
         refused="the denoiser is given none by that name",
         proved="put back as read, all steps stay the same; another one changes the prediction"),
    Name("noise_prediction", "model", "model", "batch channel height width",
         doc="what the scheduler is given: after guidance. Of a half: what the denoiser gives for it",
         refused="",
         proved="the guided one is the halves' sum by the formula of guidance; put back as read, all steps stay the same"),
    Name("layers_input", "layers", "input", _TOKENS,
         doc="the stream before the block, where it has one",
         refused=_TWO.format("input"), proved=_BACK),
    Name("layers_output", "layers", "output", _TOKENS,
         doc="the stream after the block, where it has one",
         refused=_TWO.format("output"), proved=f"the next block on it is given it; {_BACK}"),
    Name("image_layers_input", "layers", "input", _TOKENS,
         doc="the picture's stream before the block",
         refused="picture and text are in one stream", proved=_BACK),
    Name("image_layers_output", "layers", "output", _TOKENS,
         doc="the picture's stream after the block",
         refused="picture and text are in one stream", proved=f"the next block is given it; {_BACK}"),
    Name("text_layers_input", "layers", "input", _TOKENS,
         doc="the text's stream before the block",
         refused=_ONE, proved=_BACK),
    Name("text_layers_output", "layers", "output", _TOKENS,
         doc="the text's stream after the block",
         refused=f"{_ONE}, or is the last one of the text's", proved=f"the next block is given it; {_BACK}"),
    Name("queries", "attentions", "attention", "batch head query head_dim",
         doc="queries as the attention function gets them",
         refused=_NO_ATTENTION, proved=f"{_SOFTMAX}; {_BACK}"),
    Name("keys", "attentions", "attention", "batch head key head_dim",
         doc="keys as the attention function gets them",
         refused=_NO_ATTENTION, proved=f"they move with the picture's stream; {_SOFTMAX}"),
    Name("values", "attentions", "attention", "batch head key head_dim",
         doc="values as the attention function gets them",
         refused=_NO_ATTENTION, proved=_SUM),
    Name("attention_probabilities", "attentions", "attention", _PATTERN,
         doc="the pattern of the block's attention within the picture, or of picture and text jointly",
         refused=_NO_ATTENTION, proved=f"rows are distributions; {_SUM}; assigned, the block gives the same but for rounding"),
    Name("heads_output", "attentions", "attention", "batch query head head_dim",
         doc="what each head gives, before the output projection",
         refused=_NO_ATTENTION, proved=f"{_SUM}; {_BACK}"),
    Name("cross_keys", "cross_attentions", "attention", "batch head key head_dim", kind="keys",
         doc="keys of the attention to the text",
         refused=_NO_CROSS, proved=f"they move with the text, and not with the picture's stream; {_SOFTMAX}"),
    Name("cross_values", "cross_attentions", "attention", "batch head key head_dim", kind="values",
         doc="values of the attention to the text",
         refused=_NO_CROSS, proved=_SUM),
    Name("cross_attention_probabilities", "cross_attentions", "attention", _PATTERN, kind="attention_probabilities",
         doc="the pattern of the attention to the text: keys are the text's tokens",
         refused=_NO_CROSS, proved=f"rows are distributions; {_SUM}; assigned, the block gives the same but for rounding"),
    Name("cross_heads_output", "cross_attentions", "attention", "batch query head head_dim", kind="heads_output",
         doc="what each head of the attention to the text gives",
         refused=_NO_CROSS, proved=f"{_SUM}; {_BACK}"),
    Name("modulation", "layers", "layer", "batch part hidden",
         doc="shifts, scales and gates, made of the timestep, that the picture's stream (or the one stream) is modulated by",
         refused=_NO_MODULATION, proved="zeros let the stream through as it came, bit for bit, but for what a cross-attention adds"),
    Name("text_modulation", "layers", "layer", "batch part hidden",
         doc="the same for the text's stream, where there are two",
         refused=_NO_MODULATION, proved="zeros let the text's stream through the block as it came, bit for bit"),
)
# fmt: on
ROWS = {row.name: row for row in TABLE}
OF_LAYERS = tuple(row.name for row in TABLE if row.part != "model")
OF_STEPS = tuple(row.name for row in TABLE if row.part == "model")
