"""What the names of a mixture of experts' routing promise.

Reading: the experts are different ones, of as many as there are logits, with a weight of 0 or more each. Writing: for the
first prompt the logits of an expert that was not chosen become the largest by far, and it is chosen (or, where a table
chooses, the weights change). For the second prompt other experts at the second position, and other weights at the last one,
change what the MLP gives there, and nothing at the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.core import Collector, Slot
from nnatomy.core.points import versions
from nnatomy.names import EXPERTS, LOGITS, MLPS, ROUTERS, WEIGHTS
from nnatomy.validation.near import is_near

_FAR = 20.0


class Routers(Collector):
    """Checks it in values that have been read, and in a pass in which each layer is given what it was.

    Args:
        outputs: of each layer, and of each MLP that is a module, what it gave as read.
    """

    def __init__(self, model: Any, outputs: dict[Module, Tensor]) -> None:
        self.accessors = {name: getattr(model, name) for name in ROUTERS}
        self._get = model.layers_output.get
        self._clean = {layer: dict(sums.values) for layer, sums in model._sums.layers.items()}
        self._layers = {i: one for i, one in enumerate(model._anatomy.layers) if one in self._clean}
        for i in self._layers:
            self._read(i)
        self._layers = {i: layer for i, layer in self._layers.items() if self._has(i)}
        #: By what shows what comes of them, where it is not known what the layer adds: the MLP, or the layer itself.
        self._givers: dict[Module, Module] = {}
        for i, layer in self._layers.items():
            mlp = model._anatomy.mlps[i]
            giver = mlp if mlp in outputs else layer
            if MLPS not in self._clean[layer] and giver in outputs:
                self._givers[giver] = layer
                self._clean[layer][MLPS] = outputs[giver]
        self.modules = {*self._layers.values(), *self._givers}
        taps = {name: accessor.tap for name, accessor in self.accessors.items()}
        self.kinds = {"output": None, MLPS: model.mlps_contribution.tap, **taps} if self._layers else {}
        self._now: dict[tuple[Module, str], Tensor] = {}
        self._seen: list[tuple[str, Module, Tensor, Any]] = []

    def _has(self, i: int) -> list[str]:
        return [name for name, accessor in self.accessors.items() if accessor.modules[i] is not None]

    def _refuse(self, i: int, why: str, *names: str) -> None:
        for name in {*names}.intersection(self._has(i)):
            self.accessors[name].refuse(i, f"none that passes validation: {why}")

    def _read(self, i: int) -> None:
        values = self._clean[self._layers[i]]
        logits, experts, weights = (values.get(name) for name in ROUTERS)
        if experts is None:
            return
        choices = experts.sort(-1).values
        if (choices[..., 1:] == choices[..., :-1]).any() or (experts < 0).any():
            self._refuse(i, "an expert is chosen twice, or none is", *ROUTERS)
        if logits is not None and (experts >= logits.shape[-1]).any():
            chosen = int(experts.max())
            self._refuse(i, f"there are {logits.shape[-1]}, and expert {chosen} is chosen", LOGITS)
        if weights is not None and not (weights >= 0).all():
            self._refuse(i, f"there are weights below 0, down to {float(weights.min()):.3g}", WEIGHTS)
        if weights is not None and weights.shape != experts.shape:
            many, chosen = weights.shape[-1], experts.shape[-1]
            self._refuse(i, f"they are {many} a position, and experts {chosen}", WEIGHTS)
        for name in {*ROUTERS}.difference(self._has(i)):
            values.pop(name, None)

    def take(self, slot: Slot) -> None:
        layer, kind = slot.module, slot.kind
        if kind == "output" and layer not in self._givers:
            return
        value = self._get(slot.value)
        if kind == "output":
            layer, kind = self._givers[layer], MLPS
        self._now[layer, kind] = value.clone()
        if kind in ROUTERS and kind in self._clean[layer]:
            new = slot.value = self._changed(kind, value.clone(), self._clean[layer])
            self._seen.append((kind, layer, new, versions(new)))

    def _changed(self, name: str, new: Tensor, clean: dict[str, Tensor]) -> Tensor:
        if name == LOGITS:
            raised = self._raised(clean)
            new[0] = (new[0] - new[0].amax(-1, keepdim=True)).clamp(min=-_FAR) - _FAR
            new[0] = new[0].scatter(-1, raised[0], _FAR)
        elif name == EXPERTS:
            new[1, 1] = (new[1, 1] + 1) % max(int(clean[EXPERTS].max()) + 1, 2)  # which are there
        else:
            new[1, -1, 0] += 1  # not all, as there may be a norm behind
        return new

    @staticmethod
    def _raised(clean: dict[str, Tensor]) -> Tensor:
        """Of each position, the first expert that was not chosen, or the last one that was."""
        chosen = torch.zeros_like(clean[LOGITS]).scatter(-1, clean[EXPERTS].long(), 1.0)
        return chosen.argmin(-1, keepdim=True)

    def check(self) -> None:
        """Refuse what has not held."""
        for i, layer in self._layers.items():
            self._check(i, layer)
        for name, accessor in self.accessors.items():
            accessor.changed_later = {
                layer
                for kind, layer, new, before in self._seen
                if kind == name and (new.is_inference() or versions(new) != before)
            }

    def _check(self, i: int, layer: Module) -> None:
        clean = self._clean[layer]
        missing = [name for name in self._has(i) if (layer, name) not in self._now]
        if missing:
            self._refuse(i, f"{', '.join(missing)} do not show again where they were found", *ROUTERS)
            return
        has, now = self._has(i), {name: self._now[layer, name] for name in self._has(i)}
        if LOGITS in has and not self._are_chosen_by(now, clean):
            self._refuse(i, "the expert with the largest is not chosen", LOGITS)
        given, before = self._now.get((layer, MLPS)), clean.get(MLPS)
        if given is None or before is None:
            self._refuse(i, "nothing shows what comes of them", EXPERTS, WEIGHTS)
        elif not is_near(given[1, 0], before[1, 0], 64):
            self._refuse(i, "writing them changes other positions", EXPERTS, WEIGHTS)
        else:
            for name, position in ((EXPERTS, 1), (WEIGHTS, -1)):
                if is_near(given[1, position], before[1, position], 2):
                    self._refuse(i, "writing them changes nothing", name)

    def _are_chosen_by(self, now: dict[str, Tensor], clean: dict[str, Tensor]) -> bool:
        experts = now[EXPERTS][0]
        if bool((experts == self._raised(clean)[0]).any(-1).all()):
            return True
        by_table = torch.equal(experts, clean[EXPERTS][0])
        return by_table and WEIGHTS in now and not is_near(now[WEIGHTS][0], clean[WEIGHTS][0], 2)
