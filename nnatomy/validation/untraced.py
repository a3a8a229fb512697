"""The pass without a trace: what the last layer gives is what was read, and padding does not show in it.

(What comes after a prompt may, in the other one.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nnatomy.validation.looks_ahead import LEAST, last_changed
from nnatomy.validation.near import TOLERANCE, distance
from nnatomy.validation.passes import PROMPT_LENGTH, Passes
from nnatomy.validation.reading import Reading
from nnatomy.validation.rounding import HALVES, is_rounding

#: How long both prompts are with padding.
PADDED = 8


def check_untraced(passes: Passes, reading: Reading) -> None:
    """Run the second prompt, padded on the left, beside the first made longer; with positions of ours or the model's own.

    Where that cannot be, padding shows, or something has failed before: the prompts as they were read; the second with
    another last position, if nobody says that the model is causal and there is nothing to pad. Then padding is unverified.
    """
    model = passes.model
    layer = model.layers_output.modules[-1]
    if model.takes_padding:
        failed = "other names have failed before"
        why = failed if passes.findings.failures else "its layers have other positions than tokens"
        passes.findings.unverified["padding", None] = why
    if ("layers_output", model.num_layers - 1) in passes.findings.failures:
        return
    what = "the logits" if layer is None else "layers_output[-1]"

    def output(of_last: Any) -> Tensor:
        given: Tensor = of_last if layer is None else model.layers_output.get(of_last)
        return given

    whole = output(reading.logits if layer is None else reading.seen.only(layer, "output"))
    bound = 10 * TOLERANCE.get(whole.dtype, 1e-4)
    # A soft prompt stands before the tokens, and has as many positions with padding.
    has_room = "input_ids" in passes.inputs and (reading.seq == PROMPT_LENGTH or passes.reads_tokens)
    off = float("inf")
    if has_room and not passes.findings.failures and model.takes_padding:
        off, shows = _off_padded(passes, output, whole, bound)
        if off == off:
            passes.expect(not shows, "padding", None, f"it shows in {what}, by {off:.1e} (relative)", off)
            del passes.findings.unverified["padding", None]
        off = float("inf") if shows else off
    if not off <= bound and passes.ahead and not has_room and model.layers_input.modules[0] is not None:
        with last_changed(model, slice(1, None)):
            clean, changed = output(passes.plain(passes.inputs))
        off = distance(clean, whole[0])
        model._causal = distance(changed[:-1], whole[1, :-1]) <= LEAST
    elif not off <= bound:
        plain = output(passes.plain(passes.inputs))
        off = distance(plain, whole)
        if off > bound and distance(output(passes.plain(passes.inputs)), plain) > bound:
            model._refused["reading"] = f"the model computes other values of {what} each time"
            return
    passes.expect(off <= bound, "reading", None, f"it changes {what}, by {off:.1e} (relative)", off)


def _off_padded(passes: Passes, output: Callable[[Any], Tensor], whole: Tensor, bound: float) -> tuple[float, bool]:
    """How far the padded prompt's values are from those it has alone, and whether padding shows in that.

    No number where nobody can tell which are the prompt's.
    """
    prompts = passes.model._prompts
    first, second = passes.inputs["input_ids"].tolist()
    longer_first = first + first[: PADDED - len(first)]
    more = {name: passes.inputs[name] for name in ("decoder_input_ids",) if name in passes.inputs}
    more_positions = 0 if more else PADDED - PROMPT_LENGTH  # a decoder's prompts stay as they were

    def own(values: Tensor) -> Tensor:
        return values[-PROMPT_LENGTH:]

    def run() -> tuple[Tensor, Tensor]:
        longer, padded = output(passes.plain(passes.prepare([longer_first, second], **more)))
        return longer, padded

    def off_by() -> tuple[float, bool]:
        try:
            longer, padded = run()
        except RuntimeError:  # Reformer fills prompts up, but not their positions
            if not prompts.takes_positions:
                raise
            return float("inf"), True
        if passes.ahead and not more:
            passes.model._causal = distance(longer[: len(whole[0])], whole[0]) <= bound / 10
        if len(padded) - len(whole[1]) != more_positions:
            return float("nan"), False
        off = distance(own(padded), own(whole[1]))
        if whole.dtype not in HALVES or off == 0 or off > bound / 10:
            return off, off > (bound / 10 if whole.dtype in HALVES else bound)

        def again() -> Tensor:
            return own(run()[1]).double() - own(output(passes.plain(passes.inputs))[1]).double()

        difference = own(padded).double() - own(whole[1]).double()
        return off, not is_rounding(passes.model, difference, again, own(whole[1]))

    off, shows = off_by()
    if shows and prompts.takes_positions:
        prompts.takes_positions = False  # RoBERTa's begin at another number
        without, shows = off_by()
        off = without if not shows else min(off, without)
        prompts.takes_positions = shows
    return off, shows
