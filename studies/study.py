"""What all studies share: the model, the numbers found with the bounds they have to keep, the figure."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from nnatomy import StandardizedTransformer
from nnatomy.plots import save

#: Three texts that no model has written.
TEXTS = [
    "The history of the bicycle begins in the nineteenth century, when inventors in France and Germany built machines with two "
    "wheels that were pushed along by the feet of the rider. Later came pedals, chains and tyres filled with air.",
    "Water boils at a lower temperature on a mountain than at the sea, because the air above it weighs less, and so it presses "
    "on the surface of the water with less force. This is why it takes longer to cook an egg on a high mountain.",
    "A good bread needs only flour, water, salt and time. The dough should rest in a cool place overnight, so that the flavour "
    "can develop before it is baked in a hot oven. It is done when it sounds hollow as you knock on it.",
]


class Study:
    """One study: `check` prints each number beside its bounds, `finish` saves the figure and fails if any was broken.

    Args:
        document: what it is about; its first line is the title.
    """

    def __init__(self, document: str | None) -> None:
        parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--figure", type=Path, metavar="FILE", help="save it: .html, .png or .svg")
        self._figure = parser.parse_args().figure
        self._began = time.perf_counter()
        self._broken: list[str] = []
        logging.disable_progress_bar()
        torch.manual_seed(0)
        title = (document or "").split("\n")[0]
        print(f"{title}\n\n| found | value | bounds |\n|---|---|---|", flush=True)

    def model(self) -> StandardizedTransformer:
        """SmolLM2-135M-Instruct, loaded and checked."""
        return StandardizedTransformer("demo:smollm2")

    def check(self, what: str, value: Any, *, at_least: float = -math.inf, at_most: float = math.inf) -> float:
        """Print a number with its bounds; NaN is within none."""
        number = float(value)
        kept = at_least <= number <= at_most
        parts = [f"{sign} {bound:g}" for sign, bound in (("≥", at_least), ("≤", at_most)) if math.isfinite(bound)]
        print(
            f"| {what} | {number:.3g} | {', '.join(parts) or 'none'}{'' if kept else ': BROKEN'} |",
            flush=True,
        )
        if not kept:
            self._broken.append(what)
        return number

    def finish(self, figure: Any) -> None:
        """Save the figure, if there is one and it was asked for, and leave with an error if a bound was broken."""
        if self._figure is not None and figure is not None:
            self._figure.parent.mkdir(parents=True, exist_ok=True)
            save(figure, self._figure)
        print(f"\n{time.perf_counter() - self._began:.0f} s", flush=True)
        if self._broken:
            sys.exit(f"Out of bounds: {'; '.join(self._broken)}")
