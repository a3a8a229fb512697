"""`nnatomy attribute`: what each part of the model adds to a logit."""

from __future__ import annotations

import argparse
from typing import Any

from nnatomy.cli.load import load
from nnatomy.cli.report import Report, grid, plain_numbers
from nnatomy.methods import direct_logit_attribution
from nnatomy.plots.labels import visible


def attribute(options: argparse.Namespace) -> Report:
    """Direct logit attribution: the logit, or the difference of two, as a sum over parts."""
    model = load(options, prompts=True)
    found = direct_logit_attribution(model, options.prompt, answer=options.answer, wrong=options.wrong, by=options.by)
    metric = f"logit({visible(options.answer)})" + (f" - logit({visible(options.wrong)})" if options.wrong else "")
    data = {
        "model": options.model,
        "prompt": options.prompt,
        "metric": metric,
        "logit": float(found.logits[0]),
        "parts": dict(zip(found.parts, plain_numbers(found.effect[0]), strict=True)),
    }

    def table(room: int) -> Any:
        from rich.console import Group
        from rich.text import Text

        top = found.top(options.top)
        cells = [[Text(f"{value:+.2f}")] for _, value in top]
        rest = float(found.logits[0]) - sum(value for _, value in top)
        heading = f"{metric} = {float(found.logits[0]):.2f}, of which all other parts have {rest:.2f}"
        return Group(Text(heading), Text(""), grid("part", [part for part, _ in top], ["adds"], cells, room))

    return Report(data, table, lambda: found.plot(f"Direct logit attribution: {metric} after {options.prompt}"))
