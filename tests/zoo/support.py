"""The table of docs/architectures.md: what each type has under the standard names. `python tests/zoo/support.py` writes it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from nnatomy import StandardizedTransformer
from nnatomy.names import MODULES as MODULES
from nnatomy.names import OF_LAYERS as NAMES
from nnatomy.names import OF_MIXERS
from nnatomy.standardized.mixer_anatomy import NONE_KEPT
from nnatomy.standardized.mixers import NO_RECURRENCE
from nnatomy.standardized.routers import NO_EXPERTS

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = "| type | token mixers | not there, and why |\n|---|---|---|\n"
STATES = PAGE.with_name("states.md")
STATES_HEAD = f"| type | {' | '.join(f'`{name}`' for name in OF_MIXERS)} |\n|{'---|' * (len(OF_MIXERS) + 1)}\n"


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
            if reason in (NO_EXPERTS, NO_RECURRENCE, NONE_KEPT):  # as the page says for all such layers
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


def states_row(model_type: str, model: StandardizedTransformer) -> str | None:
    """One type's line of the table of recurrent mixers; None if it has none of that."""
    there = [any(getattr(model, name).modules) for name in OF_MIXERS]
    return f"| {model_type} | {' | '.join('yes' if one else '' for one in there)} |" if any(there) else None


def rows(page: Path = PAGE, head: str = HEAD) -> dict[str, str]:
    """The lines of a page, by type."""
    lines = page.read_text().partition(head)[2].splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def write() -> None:
    """Write the table anew, below what the page says before it."""
    import zoo

    lines, states = [], []
    for model_type in sorted(zoo.TYPES):
        if model_type in zoo.REASONS:
            lines.append(f"| {model_type} | | all: {zoo.REASONS[model_type].partition('; raises ')[0]} |")
        else:
            model = StandardizedTransformer(zoo.build(model_type))
            lines.append(row(model_type, model))
            states.append(states_row(model_type, model))
    PAGE.write_text(PAGE.read_text().partition(HEAD)[0] + HEAD + "\n".join(lines) + "\n")
    STATES.write_text(
        STATES.read_text().partition(STATES_HEAD)[0] + STATES_HEAD + "\n".join(filter(None, states)) + "\n"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    write()
