"""The picture of the plots, docs/plots.png: `python docs/plots.py` (with kaleido, and Chrome or Chromium)."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from nnatomy import StandardizedTransformer
from nnatomy.methods import direct_logit_attribution, edge_attribution, lens_statistics, logit_difference
from nnatomy.plots import attention, save

PROMPT, OTHER = "The capital of France is", "The capital of Italy is"
WIDTH = 640  # of each plot, of which two lie side by side


def figures() -> list[Any]:
    """A lens, attention, parts and a circuit, of a small model."""
    model = StandardizedTransformer("demo:llama")
    metric = logit_difference(" Paris", " Rome", model)
    with model.trace(PROMPT):
        patterns = model.attention_probabilities[5][0, :3]
    tokens = lens_statistics(model, PROMPT).tokens[0]
    return [
        lens_statistics(model, PROMPT).plot(),
        direct_logit_attribution(model, PROMPT, " Paris", " Rome", by="head").plot(),
        attention(patterns, tokens=tokens, layer=5, title=f"Attention: {PROMPT}"),
        edge_attribution(model, PROMPT, OTHER, metric).plot(k=30),
    ]


def main(path: Path) -> None:
    """In two columns, with 256 colors, so that the file is small."""
    columns: list[list[Image.Image]] = [[], []]
    with TemporaryDirectory() as folder:
        for i, figure in enumerate(figures()):
            figure.update_layout(width=WIDTH)
            save(figure, Path(folder) / "a.png")
            drawn = Image.open(Path(folder) / "a.png").convert("RGB")
            columns[i // 3].append(drawn.resize((drawn.width // 2, drawn.height // 2), Image.Resampling.LANCZOS))
    wide = columns[0][0].width
    whole = Image.new("RGB", (2 * wide, max(sum(one.height for one in column) for column in columns)), "white")
    for i, column in enumerate(columns):
        top = 0
        for one in column:
            whole.paste(one, (i * wide, top))
            top += one.height
    whole.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(__file__).with_suffix(".png"))
