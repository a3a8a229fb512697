"""The table of docs/other_classes.md: encoder-decoders and image-text models. `python tests/zoo/other_classes.py` writes it."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from nnatomy import StandardizedTransformer
from nnatomy.errors import ModelError

PAGE = Path(__file__).parents[2] / "docs" / "other_classes.md"
HEAD = "| class | of | token mixers | encoder | with an image | not there, and why |\n|---|---|---|---|---|---|\n"

READ_IMAGES = frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
CLASSES = {name: model_type for model_type, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()} | {
    name: model_type for model_type, name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items()
}


def row(name: str) -> str:
    """One class's line: what loads on text alone, from a tiny random model, and whether tests give it an image."""
    import zoo
    from zoo.images import NOT_TRIED
    from zoo.support import kinds, missing

    start = f"| {name} | {CLASSES[name]} |"
    if name in zoo.NOT_BUILT:
        return f"{start} not built: {zoo.NOT_BUILT[name].partition('; raises ')[0]} | | | |"
    hf = zoo.build_class(name, CLASSES[name])
    try:
        model = StandardizedTransformer(hf)
    except ModelError:
        return f"{start} refused: {zoo.REFUSED_CLASSES[name][0]} | | | |"
    encoder = len(model.encoder_layers_output)
    image = f"no: {NOT_TRIED[name]}" if name in NOT_TRIED else "yes" if name in READ_IMAGES else ""
    return f"{start} {kinds(model)} | {f'{encoder} layers' if encoder else ''} | {image} | {missing(model)} |"


def write() -> None:
    """Write the table anew, below what the page says before it."""
    lines = [row(name) for name in sorted(CLASSES)]
    PAGE.write_text(PAGE.read_text().partition(HEAD)[0] + HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    write()
