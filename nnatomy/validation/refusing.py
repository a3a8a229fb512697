"""What a model is left with once it has been checked: names refused, and the report."""

from __future__ import annotations

from typing import Any

from nnatomy.arch_configs.fields import unknown_fields
from nnatomy.names import CROSS, OF_LAYERS
from nnatomy.validation.report import Findings, Place, Report, Row, Status

#: What belongs to no layer.
WHOLE = (
    "reading",
    "layers",
    "token_embeddings",
    "ln_final",
    "lm_head",
    "logits",
    "project_on_vocab",
    "padding",
    "config",
)


def refuse(model: Any, place: Place, why: str) -> bool:
    """Have the model give that name no more, for this reason. Returns whether it can be done without."""
    name, layer = place
    if name == "project_on_vocab":
        model._head.refused = why
    elif name == "padding":
        model._prompts.no_padding = why
    elif layer is None:
        model._refused[name] = why
        return name not in ("logits", "reading")
    else:
        getattr(model, name).refuse(layer, why)
        if name == "attentions_output":
            mixers = model.mixers_output
            if mixers.modules[layer] in model._anatomy.attentions:
                mixers.refuse(layer, why)
    return True


def report_of(model: Any, findings: Findings | None, status: Status = "verified") -> Report:
    """Every name on every layer: what has failed, what is refused, and the rest, of that status."""
    failures, errors = ({}, {}) if findings is None else (findings.failures, findings.errors)
    refused: dict[Place, str] = {}
    names = (*OF_LAYERS, *(name for name in CROSS if len(getattr(model, name))))
    for name in names:
        for why, layers in getattr(model, name).refusals().items():
            refused.update({(name, layer): why for layer in layers})
    if model._head.refused:
        refused["project_on_vocab", None] = model._head.refused
    if model._anatomy.ln_final is None:
        refused["ln_final", None] = "none reads what the last layer gives"
    unverified = {} if findings is None else findings.unverified
    if model._prompts.no_padding and ("padding", None) not in unverified:
        refused["padding", None] = model._prompts.no_padding
    refused |= {(name, None): why for name, why in model._refused.items()}
    unknown = ", ".join(f"{name}={value!r}" for name, value in unknown_fields(model.config).items())
    places: list[Place] = [(name, layer) for name in names for layer in range(model.num_layers)]
    rows = []
    for place in [*places, *((name, None) for name in WHOLE)]:
        if place in failures:
            rows.append(Row(*place, "failed", None, "; ".join(failures[place])))
        elif place in refused:
            rows.append(Row(*place, "refused", None, refused[place]))
        elif place == ("config", None) and unknown:
            why = f"nobody has looked at what these fields do to the computation: {unknown}"
            rows.append(Row(*place, "unverified", None, why))
        elif place in unverified:
            rows.append(Row(*place, "unverified", None, f"it could not be checked: {unverified[place]}"))
        else:
            rows.append(Row(*place, status, errors.get(place), ""))
    return Report(type(model.hf_model).__name__, rows)
