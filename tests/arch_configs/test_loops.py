"""A model some of whose layers are gone through several times in a forward pass: the others have their names, proved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build, prompt_ids
from reference import hooked
from torch import nn

from nnatomy import ArchConfig, StandardizedTransformer
from nnatomy.arch_configs.infer import SEVERAL_TIMES
from nnatomy.errors import NotInThisModelError


class Looped(nn.ModuleList):
    """Layers that the model is given anew in their order: the middle ones twice."""

    def __getitem__(self, index: Any) -> Any:
        order = (0, *range(1, len(self) - 1), *range(1, len(self) - 1), len(self) - 1)
        return [self[i] for i in order] if isinstance(index, slice) else super().__getitem__(index)


@pytest.fixture
def looped() -> nn.Module:
    hf = build("llama", num_hidden_layers=4, use_cache=False)
    hf.model.layers = Looped(hf.model.layers.children())
    return hf


def test_layers_in_a_loop_are_refused_and_the_others_proved(looped: nn.Module) -> None:
    model, ids = StandardizedTransformer(looped, arch_config=ArchConfig(layers="model.layers")), prompt_ids()
    with torch.no_grad():
        plain = looped(ids).logits
        first, last = hooked(
            looped,
            lambda: looped(ids),
            {i: (looped.model.layers[i], "output") for i in (0, 3)},
        ).values()
        with model.trace(ids):
            assert torch.equal(model.layers_output[0], first)
            assert torch.equal(model.layers[1].calls[1].output, looped_again(looped, ids))
            assert torch.equal(model.layers_output[3], last)
            assert torch.equal(model.logits, plain)
        assert torch.allclose(model.project_on_vocab(last), plain, atol=1e-5)
    for i in (1, 2):
        with pytest.raises(NotInThisModelError, match=SEVERAL_TIMES.replace("[", r"\[")), model.trace(ids):
            model.layers_output[i]
    assert model.validation["layers_output", 0].status == "verified"
    assert model.validation["mlps_contribution", 3].status == "verified"


def looped_again(hf: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What the second layer gives the second time."""
    given: list[Any] = []
    hook = hf.model.layers[1].register_forward_hook(lambda _m, _a, output: given.append(output))
    with torch.no_grad():
        hf(ids)
    hook.remove()
    return given[1]
