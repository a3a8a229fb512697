"""The table of docs/weights.md: which weights each type has under standard names. `python tests/zoo/weights.py [type ...]` writes it.

With types, those lines alone are written anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nnatomy import StandardizedTransformer
from nnatomy.errors import ModelError
from nnatomy.weights import TABLE

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"
HEAD = "| type | has | copies | not there, and why |\n|---|---|---|---|\n"
NAMES_HEAD = "| name | axes | what is proved |\n|---|---|---|\n"
MATRICES = [row for row in TABLE if not row.is_bias and row.group != "cross-attention"]


def names() -> str:
    """The table of names."""
    return "".join(f"| `{row.name}` | {row.shape.replace(' ', ', ')} | {row.doc} |\n" for row in TABLE)


def row(model_type: str, model: StandardizedTransformer) -> str:
    """One type's line of the table: what it has on some layer, which of these are copies, and what it has not."""
    has, copies, refused = [], [], dict[tuple[str, tuple[int, ...]], list[str]]()
    everywhere = tuple(range(model.num_layers))
    for name, _, _, _, _ in MATRICES:
        found, whys = _of(model, name)
        if found:
            has.append(f"`{name}`")
        if any(one._base is None for one in found if not one.is_leaf):
            copies.append(f"`{name}`")
        for why, layers in whys.items():
            refused.setdefault((why, layers), []).append(f"`{name}`")
    for name, of in (("QK", model.QK), ("OV", model.OV)):
        where = []
        for i in everywhere:
            try:
                of(i)
                where.append(i)
            except ModelError as error:
                if "a norm, a gate or clipping" in str(error):
                    refused.setdefault(("a norm, a gate or clipping stands behind its weights", everywhere), []).append(
                        f"`{name}`"
                    )
                    break
        if where:
            has.append(f"`{name}`")
    texts = []
    for (why, layers), which in refused.items():
        place = "" if layers == everywhere else f" of layers {', '.join(map(str, layers))}"
        texts.append(f"{', '.join(which)}{place}: {why}")
    return f"| {model_type} | {', '.join(has)} | {', '.join(copies)} | {'; '.join(texts)} |"


def _of(model: StandardizedTransformer, name: str) -> tuple[list, dict[str, tuple[int, ...]]]:
    """What there is of a name, and why not the rest."""
    one = next(row for row in MATRICES if row.name == name)
    everywhere = tuple(range(model.num_layers))
    if one.by_layer:
        accessor = getattr(model, name)
        refused = accessor.refusals()
        without = {i for layers in refused.values() for i in layers}
        return [accessor[i] for i in everywhere if i not in without], refused
    try:
        return [getattr(model, name)], {}
    except ModelError as error:
        return [], {str(error).removeprefix(f"{name}: there is none: ").rstrip("."): everywhere}


def rows() -> dict[str, str]:
    """The lines of the page, by type."""
    lines = PAGE.read_text().partition(HEAD)[2].splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def write(types: list[str]) -> None:
    """Write these lines of the table anew, and the table of names."""
    import zoo

    lines = rows()
    for model_type in types:
        if model_type not in zoo.REASONS:
            lines[model_type] = row(model_type, StandardizedTransformer(zoo.build(model_type)))
    before, _, rest = PAGE.read_text().partition(NAMES_HEAD)
    between = rest.partition(HEAD)[0].partition("\n\n")[2]
    table = "\n".join(lines[one] for one in sorted(lines))
    PAGE.write_text(f"{before}{NAMES_HEAD}{names()}\n{between}{HEAD}{table}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import zoo

    write(sys.argv[1:] or sorted(zoo.TYPES))
