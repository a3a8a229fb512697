"""The pass with padding: it does not show in what the last layer gives."""

from __future__ import annotations

from torch import Tensor

from nnatomy.validation.near import TOLERANCE, distance
from nnatomy.validation.passes import PROMPT_LENGTH, Passes
from nnatomy.validation.reading import Reading

#: How many positions are padding.
PADDING = 2


def check_padding(passes: Passes, reading: Reading) -> None:
    """Run the second prompt beside a longer one, padded on the left, with positions of ours or the model's own."""
    model, get = passes.model, passes.model.layers_output.get
    if model.layers_output.modules[-1] is None or reading.seq != PROMPT_LENGTH:  # a soft prompt
        return
    if "input_ids" not in passes.inputs:
        return
    clean = get(reading.seen.only(model._anatomy.layers[-1], "output"))[1]
    first, second = passes.inputs["input_ids"].tolist()
    more = {name: passes.inputs[name] for name in ("decoder_input_ids",) if name in passes.inputs}

    def off_by() -> float:
        padded: Tensor = get(passes.plain(passes.prepare([first + first[:PADDING], second], **more)))
        return distance(padded[1, -len(clean) :], clean)

    off = off_by()
    tolerance = 10 * TOLERANCE.get(clean.dtype, 1e-4)
    if off > tolerance and model._prompts.takes_positions:
        model._prompts.takes_positions = False  # RoBERTa's begin at another number
        off = min(off, off_by())
        model._prompts.takes_positions = off > tolerance
    what = f"it shows in layers_output[-1], by {off:.1e} (relative)"
    passes.expect(off <= tolerance, "padding", None, what, off)
