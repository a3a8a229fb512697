"""Loading: an id, a folder or a demo's name to a Hugging Face model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
)

import nnatomy
from nnatomy.errors import LoadError
from nnatomy.standardized.packaged import PACKAGES, packaged

#: Arguments of `from_pretrained` that the tokenizer (and the processor) takes as well.
SHARED = (
    "revision",
    "trust_remote_code",
    "token",
    "cache_dir",
    "subfolder",
    "local_files_only",
    "force_download",
)
#: What a model that is no causal language model is loaded as, the first that there is; else without a head.
_AUTO = (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoModelForImageTextToText)
_DEMO = "demo:"


def load_model(id_or_path: str | Path, kwargs: dict[str, Any]) -> Any:
    """The causal language model of that id or folder; where its type is none, what it is: see `_AUTO`.

    Raises:
        LoadError: if it cannot be had; the text holds the reason Hugging Face gives.
    """
    place = locate(id_or_path)
    try:
        try:
            return AutoModelForCausalLM.from_pretrained(place, **kwargs)
        except ValueError as error:
            if not str(error).startswith("Unrecognized configuration class"):
                raise
        shared = {key: value for key, value in kwargs.items() if key in SHARED}
        config = AutoConfig.from_pretrained(place, **shared)
        auto = next((auto for auto in _AUTO if type(config) in auto._model_mapping), AutoModel)
        return auto.from_pretrained(place, **kwargs)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"The model {str(id_or_path)!r} could not be loaded: {_first_line(error)} Give the id of a "
            "causal language model on the Hugging Face hub (and be online, or have it in the cache), a "
            "folder that save_pretrained wrote, or a loaded model: StandardizedTransformer(model, tokenizer)."
        ) from error


def load_tokenizer(id_or_path: str | Path, kwargs: dict[str, Any]) -> tuple[Any, str]:
    """The tokenizer of that id or folder, which pads on the left; or None, and why there is none."""
    place = locate(id_or_path)
    shared = {key: value for key, value in kwargs.items() if key in SHARED}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **shared)
    except (OSError, ValueError, KeyError, ImportError) as error:
        return None, (
            f"none could be loaded from {str(id_or_path)!r} ({_first_line(error)}) Pass one: "
            "StandardizedTransformer(..., tokenizer=...), or give token ids."
        )
    tokenizer.padding_side = "left"
    return tokenizer, ""


def locate(id_or_path: str | Path) -> str:
    """The place to load from: a demo model's folder for `demo:NAME`, else what was given."""
    if not str(id_or_path).startswith(_DEMO):
        return str(id_or_path)
    name = str(id_or_path).removeprefix(_DEMO)
    if name in PACKAGES:
        return str(packaged(name))
    folder = Path(nnatomy.__file__).parent / "demo" / "models"
    shipped = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if name not in shipped:
        demos = ", ".join(f"demo:{known}" for known in (*shipped, *PACKAGES))
        raise LoadError(f"There is no demo model {str(id_or_path)!r}: there are {demos}.")
    return str(folder / name)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
