"""`nnatomy patch`: activation patching between two prompts."""

from __future__ import annotations

import argparse
from typing import Any

from nnatomy.cli.load import load
from nnatomy.cli.report import Report, grid, plain_numbers
from nnatomy.errors import InputError
from nnatomy.methods import activation_patching, logit_difference
from nnatomy.names import CROSS, OF_LAYERS
from nnatomy.plots.labels import visible


def patch(options: argparse.Namespace) -> Report:
    """The effect of putting each activation of the clean run into the corrupted one."""
    if options.point is not None and options.point.removeprefix("encoder_") not in (*OF_LAYERS, *CROSS):
        heads = "; one head at a time is --heads" if "head" in options.point else ""
        names = ", ".join(OF_LAYERS)
        raise InputError(f"--point {options.point}: it is no standard name of layers{heads}. Names: {names}.")
    model = load(options, prompts=True)
    point: Any = options.point or ("heads_output" if options.heads else "layers_output")
    found = activation_patching(
        model,
        clean=options.clean,
        corrupted=options.corrupted,
        point=point,
        heads="each" if options.heads else None,
        metric=logit_difference(options.answer, options.wrong, model),
    )
    tokens = list(found.tokens[0])
    columns = tokens if found.heads is None else [f"H{head}" for head in found.heads]
    effect = plain_numbers(found.normalized)
    rows = [str(layer) for layer in found.layers]
    metric = f"logit({visible(options.answer)}) - logit({visible(options.wrong)})"
    ends = f"{metric}: {float(found.clean):.2f} clean (1 below), {float(found.corrupted):.2f} corrupted (0 below)"
    data = {
        "model": options.model,
        "clean": options.clean,
        "corrupted": options.corrupted,
        "point": point,
        "metric": metric,
        "metric_clean": float(found.clean),
        "metric_corrupted": float(found.corrupted),
        "layers": list(found.layers),
        "heads": found.heads,
        "tokens": tokens,
        "effect": plain_numbers(found.effect),
        "normalized": effect,
    }

    def table(room: int) -> Any:
        from rich.console import Group
        from rich.text import Text

        def cell(value: float | None) -> Text:
            shown = "-" if value is None else f"{value:z.2f}"
            return Text(shown, style="bold" if abs(value or 0) > 0.5 else "dim" if abs(value or 0) < 0.1 else "")

        cells = [[cell(value) for value in row] for row in effect]
        return Group(Text(f"{point}, {ends}"), Text(""), grid("layer", rows, columns, cells, room))

    return Report(data, table, found.plot)
