"""`nnatomy steer`: what the model writes with a direction added to its stream."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from nnatomy.cli.load import load
from nnatomy.cli.report import Report, grid
from nnatomy.errors import InputError
from nnatomy.methods import SteeringVector


@torch.no_grad()
def steer(options: argparse.Namespace) -> Report:
    """Greedy continuations of a prompt, with several multiples of the difference that two prompts make at a layer."""
    model = load(options, prompts=True)
    if options.tokens < 1:
        raise InputError(f"--tokens {options.tokens}: give 1 or more.")
    vector = SteeringVector.from_pairs(model, [(options.toward, options.away)], layers=[options.layer], progress=False)
    texts: dict[float, str] = {}
    for factor in options.factor:
        edited = model.edit(partial(vector.apply, model, factor))
        texts[factor] = edited.generate_text(options.prompt, max_new_tokens=options.tokens, do_sample=False)
    data = {
        "model": options.model,
        "prompt": options.prompt,
        "layer": options.layer,
        "toward": options.toward,
        "away": options.away,
        "texts": [{"factor": factor, "text": text} for factor, text in texts.items()],
    }

    def table(room: int) -> Any:
        from rich.text import Text

        cells = [[Text(text.replace("\n", " "))] for text in texts.values()]
        return grid("factor", [f"{factor:g}" for factor in texts], [f"after {options.prompt!r}"], cells, room)

    return Report(data, table)
