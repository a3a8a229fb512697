"""`nnatomy lens`: the logit lens of a prompt."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from nnatomy.cli.load import load
from nnatomy.cli.report import Report, grid, plain_numbers
from nnatomy.errors import InputError
from nnatomy.methods.prompts import token_texts
from nnatomy.plots import heat_map
from nnatomy.plots.labels import visible


@torch.no_grad()
def lens(options: argparse.Namespace) -> Report:
    """The most probable next tokens after each layer, at each position."""
    model = load(options, prompts=True)
    if not 1 <= options.top <= model.vocab_size:
        raise InputError(
            f"--top {options.top}: give a number from 1 to {model.vocab_size}, the size of the vocabulary."
        )
    with model.trace(options.prompt):
        ids = model.input_ids[0]
        hidden = model.layers_output[:]
    # One layer at a time: the vocabulary is large.
    top = [model.project_on_vocab(h[0].to(model.device)).softmax(-1).topk(options.top) for h in hidden]
    probs = torch.stack([layer.values for layer in top]).float().cpu()
    found = [[token_texts(model, place) for place in layer.indices] for layer in top]
    tokens = token_texts(model, ids)
    rows = [str(i) for i in range(len(top))]
    cells = [
        [list(zip(texts, values, strict=True)) for texts, values in zip(*layer, strict=True)]
        for layer in zip(found, plain_numbers(probs), strict=True)
    ]
    data = {
        "model": options.model,
        "prompt": options.prompt,
        "tokens": tokens,
        "layers": [[[{"token": token, "probability": p} for token, p in cell] for cell in row] for row in cells],
    }

    def table(room: int) -> Any:
        return grid("layer", rows, tokens, [[_cell(cell) for cell in row] for row in cells], room)

    def drawn() -> Any:
        hover = [["\n".join(f"{visible(token)}: {p:.1%}" for token, p in cell) for cell in row] for row in cells]
        return heat_map(
            probs[..., 0],
            rows=rows,
            columns=tokens,
            texts=[[cell[0][0] for cell in row] for row in cells],
            hover=hover,
            title=f"Logit lens: {options.prompt}",
            value_name="probability",
        )

    return Report(data, table, drawn)


def _cell(tokens: list[tuple[str, float]]) -> Any:
    from rich.text import Text

    return Text("\n").join(
        Text(f"{visible(token)} {p:.0%}", style="bold" if p > 0.5 else "dim" if p < 0.1 else "") for token, p in tokens
    )
