"""Interventions of pyvene, as far as its config and tensors of yours say what they do.

Its `config.json` lists representations (layer, component, unit, ...) and the types of interventions. Which positions are meant, and
the source of what is put there, are given to pyvene when it runs; so they are given here. Trained interventions (rotations, masks)
have their weights in pickled files beside the config, and are not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnatomy.errors import PlanError, a, counted
from nnatomy.paths import path_of
from nnatomy.plans.plan import Plan
from nnatomy.standardized.positions import Where, own_positions

_FIELDS = (
    *("layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention"),
    *("subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation"),
    "hidden_source_representation",
)
#: Its components that are a standard name, whatever the architecture.
COMPONENTS = {
    "block_input": "layers_input",
    "block_output": "layers_output",
    "attention_input": "attentions_input",
    "attention_output": "attentions_output",
    "mlp_input": "mlps_input",
    "mlp_output": "mlps_output",
}
_TYPES = ("ZeroIntervention", "VanillaIntervention", "AdditionIntervention", "SubtractionIntervention")


def from_pyvene(
    config: str | Path | Mapping[str, Any],
    model: Any,
    sources: Mapping[int, Tensor] | None = None,
    positions: Where = None,
) -> Plan:
    """The plan of a pyvene config.

    Args:
        config: the `config.json` that pyvene has saved, the folder that it is in, or what is in it.
        model: the model that it is for, on which the plan is recorded.
        sources: by the representation's place in the config, what is put, added or subtracted: a tensor that broadcasts to
            (batch, seq, hidden). (`ZeroIntervention` needs none.)
        positions: which of each prompt's own tokens; all if None.

    Raises:
        PlanError: for what cannot be read: trained interventions, heads and other units than positions, subspaces, components that
            are no standard name, interventions whose source is another prompt.
    """
    told = _read(config)
    rows = [_row(one, i) for i, one in enumerate(_list(told.get("representations")))]
    kinds = _kinds(told.get("intervention_types"), len(rows))
    edits = []
    for i, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        source = (sources or {}).get(i)
        _check(row, kind, source, model, i)
        edits.append((COMPONENTS[row["component"]], row["layer"], kind, source))
    edits.sort(key=lambda one: (one[1], [*COMPONENTS.values()].index(one[0])))

    def block() -> None:
        for name, layer, kind, source in edits:
            accessor = getattr(model, name)
            value = accessor[layer]
            new = _done(kind, value, None if source is None else source.to(value))
            if positions is not None:
                chosen = own_positions(model, "from_pyvene", value.shape[:2]).chosen(positions)
                new = torch.where(chosen[..., None].to(value.device), new, value)
            accessor[layer] = new

    plan: Plan = model.without_edits().record(block)
    plan.notes.append(
        "interventions of pyvene: " + ", ".join(f"{kind} at {name}[{layer}]" for name, layer, kind, _ in edits)
    )
    return plan


def _done(kind: str, value: Tensor, source: Tensor | None) -> Tensor:
    if source is None:
        return torch.zeros_like(value)
    if kind == "VanillaIntervention":
        return torch.zeros_like(value) + source
    return value + source if kind == "AdditionIntervention" else value - source


def _read(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    path = path_of(config, "a config of pyvene's", PlanError)
    path = path / "config.json" if path.is_dir() else path
    try:
        if path.stat().st_size > 1 << 20:
            raise PlanError(f"{path}: it is too large for a config.")
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: it cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: it is no JSON: {error}.") from None
    if not isinstance(told, dict):
        raise PlanError(f"{path}: it is no config of pyvene's.")
    return told


def _list(told: Any) -> list[Any]:
    if not isinstance(told, (list, tuple)) or not told:
        raise PlanError("A config of pyvene's has a list of representations.")
    return list(told)


def _row(told: Any, i: int) -> dict[str, Any]:
    """One representation, which pyvene saves as a list of its fields."""
    row = dict(zip(_FIELDS, told, strict=False)) if isinstance(told, (list, tuple)) else told
    if not isinstance(row, dict) or row.keys() - {*_FIELDS} or type(row.get("layer")) is not int:
        raise PlanError(f"representations[{i}] is no representation of pyvene's: {told!r:.80}.")
    return row


def _kinds(told: Any, count: int) -> list[str]:
    """The names of the types' classes; pyvene saves one for all, or one for each, as Python prints a class."""
    texts = [told] * count if isinstance(told, str) else _list(told)
    names = [re.sub(r"^<class '|'>$", "", one).rpartition(".")[2] for one in texts if isinstance(one, str)]
    if len(names) != count:
        raise PlanError(
            f"The config has {counted(count, 'representation')}, and {counted(len(names), 'type')} of interventions."
        )
    return names


def _check(row: dict[str, Any], kind: str, source: Tensor | None, model: Any, i: int) -> None:
    """Raise PlanError unless it is read."""
    where = f"representations[{i}]"
    if kind not in _TYPES:
        raise PlanError(
            f"{where} is a {kind!r:.60}, whose weights are pickled, or which is code; read are {', '.join(_TYPES)}."
        )
    component, unit = row.get("component"), row.get("unit", "pos")
    if not isinstance(component, str) or component not in COMPONENTS:
        raise PlanError(
            f"{where} is of {component!r:.60}, which is no standard name; read are {', '.join(COMPONENTS)}."
        )
    if unit != "pos":
        raise PlanError(f"{where} is of units {unit!r:.40}, and not of positions (pos).")
    named = ("low_rank_dimension", "subspace_partition", "group_key", "intervention_link_key", "moe_key")
    if others := [name for name in named if row.get(name) is not None]:
        raise PlanError(f"{where} has {', '.join(others)}: that is not read.")
    if kind == "ZeroIntervention":
        return
    if not isinstance(source, Tensor):
        raise PlanError(f"{where} is {a(kind)}, and needs its source: from_pyvene(..., sources={{{i}: tensor}}).")
    if source.shape[-1:] != (model.hidden_size,):
        raise PlanError(
            f"sources[{i}] is of {tuple(source.shape)}, the model's residual stream of width {model.hidden_size}."
        )
