"""The pass with padding: it does not show in what the last layer gives."""

from __future__ import annotations

from torch import Tensor

from nnatomy.validation.near import TOLERANCE, distance
from nnatomy.validation.passes import PROMPT_LENGTH, Passes
from nnatomy.validation.reading import Reading

SHORT = PROMPT_LENGTH - 3


def check_padding(passes: Passes, reading: Reading) -> None:
    """Run the second prompt's first tokens, padded on the left, with positions of ours or the model's own."""
    model, get = passes.model, passes.model.layers_output.get
    if reading.seq != PROMPT_LENGTH:  # a soft prompt
        return
    if "input_ids" not in passes.inputs:
        return
    layer = model.layers_output.modules[-1]
    clean = reading.logits if layer is None else get(reading.seen.only(layer, "output"))
    ids = passes.inputs["input_ids"].tolist()
    decoder = passes.inputs.get("decoder_input_ids")

    def last(prompts: list[list[int]]) -> Tensor:
        more = {} if decoder is None else {"decoder_input_ids": decoder[-len(prompts) :]}
        output: Tensor = get(passes.plain(passes.prepare(prompts, **more)))
        return output[-1]

    alone = clean[1, :SHORT] if decoder is None else last([ids[1][:SHORT]])

    def off_by() -> float:
        try:
            return distance(last([ids[0], ids[1][:SHORT]])[-len(alone) :], alone)
        except RuntimeError:  # Reformer fills prompts up, but not their positions
            if not model._prompts.takes_positions:
                raise
            return float("inf")

    tolerance = 10 * TOLERANCE.get(clean.dtype, 1e-4)
    off = off_by()
    if off > tolerance and (layer is None or not model.causal):  # the tokens after these have changed them
        alone = last([ids[1][:SHORT]])
        off = off_by()
    if off > tolerance and model._prompts.takes_positions:
        model._prompts.takes_positions = False  # RoBERTa's begin at another number
        off = min(off, off_by())
        model._prompts.takes_positions = off > tolerance
    what = f"it shows in {'the logits' if layer is None else 'layers_output[-1]'}, by {off:.1e} (relative)"
    passes.expect(off <= tolerance, "padding", None, what, off)
