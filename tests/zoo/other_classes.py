"""The table of docs/other_classes.md: encoder-decoders and image-text models. `python tests/zoo/other_classes.py` writes it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from nnatomy import StandardizedTransformer
from nnatomy.errors import ModelError

PAGE = Path(__file__).parents[2] / "docs" / "other_classes.md"
HEAD = "| class | of | token mixers | encoder |\n|---|---|---|---|\n"
CLASSES = {name: model_type for model_type, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()} | {
    name: model_type for model_type, name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items()
}
LARGEST = 30_000_000


def row(name: str) -> str:
    """One class's line: what loads on text alone, from a tiny random model."""
    import zoo

    start = f"| {name} | {CLASSES[name]} |"
    try:
        hf = zoo.build_class(name, CLASSES[name])
    except Exception as error:
        return f"{start} not tried: no tiny config yet ({type(error).__name__}) | |"
    if sum(parameter.numel() for parameter in hf.parameters()) > LARGEST:
        return f"{start} not tried: no tiny config yet (too large) | |"
    try:
        model = StandardizedTransformer(hf)
    except (ModelError, AttributeError) as error:
        why, *_ = zoo.REFUSED_CLASSES.get(name, (type(error).__name__,))
        return f"{start} refused: {why} | |"
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(model.layer_kinds).items())
    encoder = len(model.encoder_layers_output)
    return f"{start} {kinds} | {f'{encoder} layers' if encoder else ''} |"


def write() -> None:
    """Write the table anew, below what the page says before it."""
    lines = [row(name) for name in sorted(CLASSES)]
    PAGE.write_text(PAGE.read_text().partition(HEAD)[0] + HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    write()
