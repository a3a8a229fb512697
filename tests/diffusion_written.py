"""The tables of docs/diffusion.md, of names and of a run over all pipelines: `python tests/diffusion_written.py` writes them anew."""

from __future__ import annotations

from pathlib import Path

from diffusion_pipelines import ALL, loaded

from nnatomy.diffusion import DiffusionTransformer
from nnatomy.diffusion.names import TABLE

PAGE = Path(__file__).parents[1] / "docs" / "diffusion.md"
NAMES = "<!-- names -->\n"
PIPELINES = "<!-- pipelines -->\n"
END = "<!-- end -->\n"
GUIDANCE = {"rows": "two rows of a batch", "calls": "two calls", "none": "none that is known"}


def names() -> str:
    lines = ["| name | shape | what it is | proved at load | refused where |", "|---|---|---|---|---|"]
    for row in TABLE:
        name = row.name if row.part == "model" else f"{row.name}[i]"
        shape = f"({', '.join(row.axes)})" if row.shape else ""
        lines.append(f"| `{name}` | {shape} | {row.doc} | {row.proved} | {row.refused} |")
    return "\n".join(lines) + "\n"


def line(model: DiffusionTransformer) -> str:
    """The row of a pipeline."""
    kinds = dict.fromkeys(type(view.module).__name__ for view in model.layers)
    whole, some, none = [], [], []
    for row in TABLE:
        rows = [one for one in model.validation if one.name == row.name]
        verified = [one for one in rows if one.status == "verified"]
        if len(verified) == len(rows):
            whole.append(f"`{row.name}`")
        elif verified:
            layers = ", ".join(str(one.layer) for one in rows if one.status != "verified")
            some.append(f"`{row.name}` (not on {layers})")
        else:
            none.append(f"`{row.name}`")
    order = ", then ".join(half.replace("conditional", "cond.") for half in model.halves.order)
    guidance = GUIDANCE[model.halves.how] + (f": {order}" if model.halves.how != "none" else "")
    name, denoiser = type(model.pipeline).__name__, type(model.denoiser).__name__
    blocks = ", ".join(f"`{kind}`" for kind in kinds)
    return f"| `{name}` | `{denoiser}`: {blocks} | {guidance} | {', '.join(some)} | {', '.join(none)} |"


def pipelines() -> str:
    head = [
        "| pipeline | denoiser and its blocks | guidance | names that some blocks have | names it has not |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(line(loaded(name)) for name in ALL)]) + "\n"


def replaced(text: str, mark: str, table: str) -> str:
    before, _, rest = text.partition(mark)
    return f"{before}{mark}{table}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(replaced(replaced(PAGE.read_text(), NAMES, names()), PIPELINES, pipelines()))
