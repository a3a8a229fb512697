"""`nnatomy attend`: what the heads of a layer attend to."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from nnatomy.cli.load import load
from nnatomy.cli.report import Report, grid, plain_numbers
from nnatomy.methods.prompts import token_texts
from nnatomy.plots import attention
from nnatomy.plots.labels import visible


@torch.no_grad()
def attend(options: argparse.Namespace) -> Report:
    """The attention patterns of one layer; as a table, what each head looks at most from each position."""
    model = load(options, prompts=True)
    with model.trace(options.prompt):
        ids = model.input_ids[0]
        patterns = model.attention_probabilities[options.layer][0].float().cpu()
    layer = range(model.num_layers)[options.layer]
    tokens = token_texts(model, ids)
    most = patterns.max(-1)
    heads = [f"L{layer}H{head}" for head in range(len(patterns))]
    data = {
        "model": options.model,
        "prompt": options.prompt,
        "layer": layer,
        "tokens": tokens,
        "patterns": plain_numbers(patterns),
    }

    def table(room: int) -> Any:
        from rich.text import Text

        cells = [
            [
                Text(f"{visible(tokens[key])} {share:.0%}")
                for key, share in zip(keys.tolist(), shares.tolist(), strict=True)
            ]
            for keys, shares in zip(most.indices, most.values, strict=True)
        ]
        return grid("head", heads, tokens, cells, room)

    title = f"Attention of layer {layer}: {options.prompt}"
    return Report(data, table, lambda: attention(patterns, tokens=tokens, title=title, layer=layer))
