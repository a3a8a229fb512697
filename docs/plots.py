"""The gallery of docs/plots.md, a picture of each plot: `python docs/plots.py [chromium]` (with kaleido, and Chrome or Chromium)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from nnatomy import StandardizedTransformer
from nnatomy.methods import direct_logit_attribution, edge_attribution, lens_statistics, logit_difference, logit_lens
from nnatomy.plots import attention, attention_view, bars, curves, over_picture, save, token_view

PROMPT, OTHER = "The capital of France is", "The capital of Italy is"
FOLDER = Path(__file__).parent / "gallery"
WIDTH = 760  # of each plot, in the pixels of a page; of its picture, too


def plots() -> dict[str, Any]:
    """One of each function, of a small model."""
    model = StandardizedTransformer("demo:llama")
    metric = logit_difference(" Paris", " Rome", model)
    with model.trace(PROMPT):
        patterns = model.attention_probabilities[5][0, :6]
    lens = lens_statistics(model, PROMPT)
    tokens, norms = (
        lens.tokens[0],
        model.run_with_cache(PROMPT, "layers_output")[1].stack("layers_output")[:, 0].norm(dim=-1),
    )
    layers = [f"layer {i}" for i in range(model.num_layers)]
    answers = {
        name: logit_lens(model, PROMPT)[0, :, model.to_tokens(name)[0, -1]].tolist() for name in (" Paris", " Rome")
    }
    across, down = torch.meshgrid(torch.linspace(0, 1, 90), torch.linspace(0, 1, 60), indexing="xy")
    picture = (torch.stack([across, down, 1 - across], -1) * 255).byte()
    maps = {f"L{i}H3": torch.rand(8, 12, generator=torch.Generator().manual_seed(i)) ** (i + 1) for i in (1, 4)}
    attributed = direct_logit_attribution(model, PROMPT, answer=" Paris", wrong=" Rome", by="head")
    return {
        "heat_map": lens.plot(),
        "bars": bars(norms[:, -1].detach(), labels=layers, title=PROMPT, value_name="norm at the last token"),
        "curves": curves(range(model.num_layers), answers, title=PROMPT, x_title="layer", y_title="probability"),
        "attention": attention(patterns, tokens=tokens, layer=5, title=f"Attention: {PROMPT}"),
        "parts": attributed.plot(),
        "circuit": edge_attribution(model, PROMPT, OTHER, metric=metric).plot(k=30),
        "over_picture": over_picture(picture, maps, title="From ' dog'", value_name="probability"),
        "attention_view": attention_view(patterns, tokens, layer=5),
        "token_view": token_view(tokens, {"norm": norms[-1].detach(), "norm of layer 0": norms[0].detach()}),
    }


def main(browser: str) -> None:
    """With 64 colors, so that the files are small."""
    FOLDER.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        for name, plot in plots().items():
            picture, page = Path(folder) / f"{name}.png", Path(folder) / f"{name}.html"
            if name.endswith("_view"):  # a page
                save(plot, page)
                size = f"--window-size={WIDTH},{760 if name == 'attention_view' else 240}"
                how = ("--headless", "--no-sandbox", "--hide-scrollbars", f"--screenshot={picture}", size)
                subprocess.run([browser, *how, page.as_uri()], check=True, capture_output=True)
            else:
                plot.update_layout(width=WIDTH)
                save(plot, picture)
            drawn = Image.open(picture).convert("RGB")
            drawn = drawn.resize((WIDTH, round(drawn.height * WIDTH / drawn.width)), Image.Resampling.LANCZOS)
            small = drawn.quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            small.save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["chromium"])
