"""The pass with padding: it does not show in what the last layer gives. (What comes after a prompt may, in the other one.)"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnatomy.validation.near import TOLERANCE, distance
from nnatomy.validation.passes import PROMPT_LENGTH, Passes
from nnatomy.validation.reading import Reading

#: How many positions are padding.
PADDING = 2


def check_padding(passes: Passes, reading: Reading) -> None:
    """Run the second prompt, padded on the left, beside the first made longer; with positions of ours or the model's own."""
    model, layer = passes.model, passes.model.layers_output.modules[-1]
    if reading.seq != PROMPT_LENGTH or "input_ids" not in passes.inputs:  # a soft prompt, or patches
        return

    def output(of_last: Any) -> Tensor:
        given: Tensor = of_last if layer is None else model.layers_output.get(of_last)
        return given

    whole, clean = output(reading.logits if layer is None else reading.seen.only(layer, "output"))
    tolerance = TOLERANCE.get(clean.dtype, 1e-4)
    first, second = passes.inputs["input_ids"].tolist()
    more = {name: passes.inputs[name] for name in ("decoder_input_ids",) if name in passes.inputs}

    def off_by() -> float:
        try:
            longer, padded = output(passes.plain(passes.prepare([first + first[:PADDING], second], **more)))
        except RuntimeError:  # Reformer fills prompts up, but not their positions
            if not model._prompts.takes_positions:
                raise
            return float("inf")
        if passes.ahead and not more:
            model._causal = distance(longer[:PROMPT_LENGTH], whole) <= tolerance
        return distance(padded[-PROMPT_LENGTH:], clean)

    off = off_by()
    if off > 10 * tolerance and model._prompts.takes_positions:
        model._prompts.takes_positions = False  # RoBERTa's begin at another number
        off = min(off, off_by())
        model._prompts.takes_positions = off > 10 * tolerance
    what = f"it shows in {'the logits' if layer is None else 'layers_output[-1]'}, by {off:.1e} (relative)"
    passes.expect(off <= 10 * tolerance, "padding", None, what, off)
