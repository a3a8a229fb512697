"""The table of docs/architectures.md: what each type has under the standard names. `python tests/zoo/support.py` writes it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from nnatomy import StandardizedTransformer
from nnatomy.names import MODULES as MODULES
from nnatomy.names import OF_LAYERS as NAMES
from nnatomy.standardized.routers import NO_EXPERTS

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = "| type | token mixers | not there, and why |\n|---|---|---|\n"


def row(model_type: str, model: StandardizedTransformer) -> str:
    """One type's line of the table."""
    return f"| {model_type} | {kinds(model)} | {missing(model)} |"


def kinds(model: StandardizedTransformer) -> str:
    """How many layers have which token mixer."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(model.layer_kinds).items())


def missing(model: StandardizedTransformer) -> str:
    """Which names the model has not, on which layers, and why."""
    refused: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in NAMES:
        for reason, layers in getattr(model, name).refusals().items():
            if reason == NO_EXPERTS:  # as the page says for all dense layers
                continue
            refused.setdefault((reason, layers), []).append(name)
    everywhere = tuple(range(model.num_layers))
    for whole in model.validation:
        if whole.layer is None and whole.status == "refused":
            refused.setdefault((whole.detail.partition(", by ")[0], everywhere), []).append(whole.name)
    texts = []
    for (reason, layers), names in refused.items():
        where = "" if len(layers) == model.num_layers else f" of layers {', '.join(map(str, layers))}"
        texts.append(f"{', '.join(f'`{name}`' for name in names)}{where}: {reason}")
    return "; ".join(texts)


def rows() -> dict[str, str]:
    """The lines of the page, by type."""
    lines = PAGE.read_text().partition(HEAD)[2].splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def write() -> None:
    """Write the table anew, below what the page says before it."""
    import zoo

    lines = []
    for model_type in sorted(zoo.TYPES):
        if model_type in zoo.REASONS:
            lines.append(f"| {model_type} | | all: {zoo.REASONS[model_type].partition('; raises ')[0]} |")
        else:
            lines.append(row(model_type, StandardizedTransformer(zoo.build(model_type))))
    PAGE.write_text(PAGE.read_text().partition(HEAD)[0] + HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    write()
